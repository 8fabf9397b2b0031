"""The chunkwise recurrence over time shards: one map a part, and its cotangents back.

A part takes the state S before it to e^{D} S + E: D is the sum of its log decays, E its state at the end from nothing
(on the first rank from the given state). All ranks learn (D, E) of all, and each composes those before it. Backward,
the cotangent of a part's end is what the later parts give to the states before them,

    Ē_r = g_{r+1} + e^{D_{r+1}} Ē_{r+1}

with g what a part's own outputs give to the state before it; all ranks learn (D, g) of all, and the part's gradients
are then those of chunkwise with Ē for its last state. Normalized, S is (C, n) scaled by e^{−m}, and so are its maps.

What is computed goes in two lanes that have nothing to do with each other, rows or heads. While the message of one is
under way the other computes, forward and backward: E of the second while (D, E) of the first travel, the outputs of the
first while those of the second do. Lanes are views: nothing is copied for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import chunkwise_torch, fused
from .chunkwise import check, given_state, initial_state, plan_of
from .chunkwise_reference import ChunkState
from .chunkwise_torch import Plan
from .once import once_differentiable
from .time_shards import anchor

if TYPE_CHECKING:
    from .time_shards import Message, TimeShards


def chunkwise_sharded(
    shards: TimeShards,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    state: Any = None,
    reset: Tensor | None = None,
    *,
    normalized: bool = False,
    chunk_size: int | None = None,
    method: str = "auto",
    eps: float = 1e-6,
) -> tuple[Tensor, Any]:
    """`paralm_kernels.chunkwise` of a sequence of which every rank holds a part; `state` counts on the first rank."""
    plan = plan_of(check(q, k, v, log_decay, gain, state, reset, normalized), normalized, chunk_size, method, eps)
    kernels: Any = chunkwise_torch
    if method == "triton" or (method == "auto" and fused.by_default(q)):
        compiled = fused.kernels("triton_chunkwise", "chunkwise: ")
        taken = compiled.takes(q, v, plan, strict=method == "triton")
        if taken is not None:
            kernels, plan = compiled, taken
    given = state is not None and shards.first
    begin = given_state(state, plan.dtype) if given else initial_state(q, v, plan.dtype, normalized)
    y, *end = _Chunkwise.apply(shards, plan, kernels, reset, anchor(q), q, k, v, log_decay, gain, *begin)
    return y, (tuple(end) if normalized else end[0])


@dataclass(frozen=True)
class _Lane:
    """Some rows or heads."""

    rows: slice
    groups: slice
    heads: slice

    def problem(self, kernels: Any, plan: Plan, reset: Tensor | None, tensors: Sequence[Tensor], begin: Any) -> Any:
        q, k, v, log_decay, gain = tensors
        here, mine = (self.rows, slice(None), self.groups), (self.rows, slice(None), self.heads)
        cut = (q[here], k[here], v[mine], log_decay[mine], gain[mine])
        return kernels.Problem(plan, None if reset is None else reset[self.rows], (*cut, *begin))

    def of(self, x: Tensor) -> Tensor:
        """Of (batch, time, heads, …)."""
        return x[self.rows, :, self.heads]

    def of_state(self, state: Sequence[Tensor | None]) -> list[Any]:
        """Of (batch, heads, …) each."""
        return [None if part is None else part[self.rows, self.heads] for part in state]


def _lanes(q: Tensor, v: Tensor) -> list[_Lane]:
    """Two if there are two rows, or groups, or heads; heads of one group share its q and k."""
    batch, _, groups, _ = q.shape
    heads, every = v.shape[2], slice(None)
    if batch > 1:
        return [_Lane(part, every, every) for part in _halves(batch)]
    if groups > 1:
        shared = heads // groups
        return [_Lane(every, part, slice(part.start * shared, part.stop * shared)) for part in _halves(groups)]
    return [_Lane(every, every, part) for part in _halves(heads)]


def _halves(count: int) -> list[slice]:
    half = (count + 1) // 2
    return [part for part in (slice(0, half), slice(half, count)) if part.start < part.stop]


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shards: TimeShards, plan: Plan, kernels: Any, reset: Tensor | None, _: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        arguments, begin = tensors[:5], tensors[5:]
        q, _, v, log_decay, _ = arguments
        lanes, saved, ends = _lanes(q, v), [], []
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        with kernels.context(q):
            messages = [
                _tell_map(shards, lane.problem(kernels, plan, reset, arguments, lane.of_state(begin)), kernels)
                for lane in lanes
            ]
            for lane, message in zip(lanes, messages, strict=True):
                entry, after = _entry(shards, plan.normalized, message, lane.of_state(begin))
                end, kept = kernels.outputs(lane.problem(kernels, plan, reset, arguments, entry), lane.of(y))
                total = _total(lane.of(log_decay), None if reset is None else reset[lane.rows], plan.dtype)
                passed, unit = _scales(plan.normalized, total, entry, after, end)
                saved.append((*entry, passed, unit, *kept[1:]))
                ends.append(end)
        ctx.shards, ctx.plan, ctx.kernels, ctx.lanes = shards, plan, kernels, lanes
        ctx.each, ctx.keeps_y = len(saved[0]), bool(kept)
        ctx.save_for_backward(reset, *arguments, y if kept else None, *(x for one in saved for x in one))
        ctx.set_materialize_grads(False)
        whole = _whole(lanes, ends, begin)
        if plan.normalized:
            ctx.mark_non_differentiable(whole[-1])
        return (y, *whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_end: Tensor | None) -> tuple[Tensor | None, ...]:
        shards, plan, kernels, lanes = ctx.shards, ctx.plan, ctx.kernels, ctx.lanes
        reset, *rest = ctx.saved_tensors
        arguments, y, rest = rest[:5], rest[5], rest[6:]
        size, parts = (3, 2) if plan.normalized else (1, 1)  # of a state, and of its gradient
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments)
        firsts = []
        shared = len(lanes) > 1 and lanes[0].rows == lanes[1].rows and lanes[0].groups == lanes[1].groups
        sums = _Sums(plan.dtype) if shared else None
        with kernels.context(arguments[0]):
            given, messages = [], []
            for index, lane in enumerate(lanes):
                saved = rest[index * ctx.each : (index + 1) * ctx.each]
                entry, (passed, unit, *kept) = saved[:size], saved[size:]
                kept = (lane.of(y), *kept) if ctx.keeps_y else ()
                dy = None if grad_y is None else lane.of(grad_y)
                problem = lane.problem(kernels, plan, reset, arguments, entry)
                if shards.first:  # nobody needs it
                    own = [torch.zeros_like(part) for part in entry[:parts]]
                else:
                    own = kernels.entry_gradient(problem, kept, dy, lane.of_state(grad_end))[:parts]
                messages.append(shards.gather("state, gradient", passed, *own))
                given.append((problem, kept, dy, unit))
            for lane, message, (problem, kept, dy, unit) in zip(lanes, messages, given, strict=True):
                at_end = _cotangent(shards, message, unit, lane.of_state(grad_end))
                firsts.append(_gradients(kernels, lane, sums, grads, problem, kept, dy, at_end))
        wanted = any(ctx.needs_input_grad[-size:]) and shards.first
        return (None,) * 5 + grads + (_whole(lanes, firsts, firsts[0]) if wanted else (None,) * size)


def _tell_map(shards: TimeShards, problem: Any, kernels: Any) -> Message:
    """Begins to tell every rank the map of a lane of this part."""
    ends = problem.state if shards.last else kernels.end(problem)  # after the last one nobody begins
    total = _total(problem.log_decay, problem.reset, problem.plan.dtype)
    return shards.gather("state", total, *ends)


def _total(log_decay: Tensor, reset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The log of what a part leaves of the state before it, (batch, heads); −∞ behind a reset."""
    total = log_decay.sum(1, dtype=torch.float64).to(dtype)
    return total if reset is None else total.masked_fill(reset.any(1, keepdim=True), -math.inf)


def _entry(shards: TimeShards, normalized: bool, message: Message, begin: Sequence[Tensor]) -> tuple[ChunkState, Any]:
    """The state before this part, and m after it where normalized."""
    totals, *ends = message.taken()
    if shards.first:
        return tuple(begin), ends[2][0] if normalized else None
    now = tuple(part[0].clone() for part in ends)  # what is kept for the backward pass is not what every rank said
    for before in range(1, shards.rank):
        now = _moved(normalized, totals[before], now, tuple(part[before] for part in ends))
    after = None
    if normalized and not shards.last:
        after = torch.maximum(totals[shards.rank] + now[2], ends[2][shards.rank])
    return now, after


def _moved(normalized: bool, total: Tensor, state: ChunkState, end: ChunkState) -> ChunkState:
    """The state after a part whose map is given."""
    if not normalized:
        return (torch.addcmul(end[0], total.exp()[..., None, None], state[0]),)
    (c, n, m), (c_end, n_end, m_end) = state, end
    carried = total + m
    new = torch.maximum(carried, m_end)
    old, written = (carried - _finite(new)).exp(), (m_end - _finite(new)).exp()
    c = old[..., None, None] * c + written[..., None, None] * c_end
    return c, old[..., None] * n + written[..., None] * n_end, new


def _scales(
    normalized: bool, total: Tensor, entry: ChunkState, after: Tensor | None, end: ChunkState
) -> tuple[Tensor, Tensor]:
    """What is left at a part's end of the state before it; and the unit of that end as the ranks composed it over the
    one in which this rank computed it: two ways to round one m."""
    if not normalized:
        return total.exp(), torch.ones_like(total)
    if after is None:  # the last rank: nothing comes from behind it
        after = end[2]
    return (total + entry[2] - _finite(after)).exp(), (_finite(end[2]) - _finite(after)).exp()


def _finite(m: Tensor) -> Tensor:
    return torch.where(m.isfinite(), m, torch.zeros_like(m))


def _cotangent(shards: TimeShards, message: Message, unit: Tensor, own: list[Tensor | None]) -> list[Tensor | None]:
    """Of the state at the end of this part: what was given for it and what the later ranks found."""
    passed, *grads = message.taken()
    if shards.last:
        return own
    found: list[Tensor | None] = []
    for part, given in zip(grads, own, strict=False):  # of m there is none
        later = part[-1]
        for rank in range(shards.size - 2, shards.rank, -1):
            later = part[rank] + _like(passed[rank], later) * later
        later = _like(unit, later) * later
        found.append(later if given is None else given + later)
    return [*found, None] if len(own) > len(found) else found


def _like(factor: Tensor, x: Tensor) -> Tensor:
    return factor[(...,) + (None,) * (x.ndim - factor.ndim)]


def _gradients(
    kernels: Any,
    lane: _Lane,
    sums: _Sums | None,
    grads: Sequence[Tensor],
    problem: Any,
    kept: Sequence[Tensor],
    dy: Tensor | None,
    at_end: Sequence[Tensor | None],
) -> ChunkState:
    """Writes a lane's part of the gradients; returns those of the state before the part."""
    ours = [grad[lane.rows, :, lane.groups] for grad in grads[:2]]
    into = ours if sums is None else [torch.empty_like(grad, dtype=sums.dtype) for grad in ours]
    first: ChunkState = kernels.gradients(problem, kept, dy, at_end, (*into, *(lane.of(grad) for grad in grads[2:])))
    if sums is not None:
        sums.add(into, ours)
    return first


class _Sums:
    """Gradients of q and k that lanes of heads share: summed in the compute dtype, rounded once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._before = dtype, list[Tensor]()

    def add(self, grads: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """The first lane's are kept, the second's added to them and both written."""
        if not self._before:
            self._before = list(grads)
            return
        for grad, before, more in zip(into, self._before, grads, strict=True):
            grad.copy_(before.add_(more))


def _whole(lanes: Sequence[_Lane], states: Sequence[ChunkState], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The states of lanes side by side."""
    along = 0 if len(lanes) > 1 and lanes[0].rows != lanes[1].rows else 1
    return tuple(torch.cat([state[i] for state in states], along) for i in range(len(like)))
