"""Launches chunkwise's kernels (triton_chunkwise_kernels.py, triton_chunkwise_backward.py), forward and backward.

Time goes in segments of whole chunks, so that the states at the starts of chunks never take more than a set room;
forward and backward both make them anew. Backward keeps the arguments and, normalized, y and n·q̃. With q, k and v in
bfloat16 the products take their operands, states among them, rounded to that and sum in float32; states are carried in
float32. Products in float32 are exact to float32 (three TF32 products each on NVIDIA). With float16, beyond whose
65,504 a state may well go, operands are float32 (rounded to TF32 on NVIDIA, as fine as float16), and so are the states
at the starts of chunks. No atomic sums: the same numbers every time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_chunkwise_shapes as shapes
from .chunkwise_reference import ChunkState
from .chunkwise_torch import GradEnd, Plan, chunkwise_torch
from .errors import ArgumentError
from .once import once_differentiable
from .triton_solver import check_device, interpreted

SEGMENT = 1 << 27
"""Numbers in the states of a segment (256 MiB in bfloat16) and in its scores."""
PROGRAMS = 256
"""So many, two for each multiprocessor of an H100; heads that share q and k share a program beyond that."""
_ROWS = 65535
"""The largest second axis of a grid."""


def chunkwise_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    state: ChunkState,
    reset: Tensor | None,
    plan: Plan,
    strict: bool,
) -> tuple[Tensor, ChunkState]:
    """As chunkwise_torch. strict: refuse what the kernels do not take (ArgumentError), else torch computes it."""
    taken = takes(q, v, plan, strict)
    if taken is None:
        return chunkwise_torch(q, k, v, log_decay, gain, state, reset, plan)
    y, *end = _Fused.apply(taken, reset, q, k, v, log_decay, gain, *state)
    return y, tuple(end)


def takes(q: Tensor, v: Tensor, plan: Plan, strict: bool) -> Plan | None:
    """The plan by which the kernels compute this, in chunks of the nearest size that they take; None where they cannot.
    strict: ArgumentError, one line, where they cannot or the chunk is another."""
    wide = plan.dtype == torch.float64 and not interpreted()
    rows = v.shape[0] * v.shape[2]
    size = plan.chunk_size or shapes.fastest_chunk(q.shape[3], v.shape[3], v.shape[2] // q.shape[2], q.shape[1])
    if not strict:
        if wide or rows > _ROWS:
            return None
        size = min(shapes.CHUNKS, key=lambda taken: abs(taken - size))
    check_device(q.device)
    if size not in shapes.CHUNKS:
        known = ", ".join(map(str, shapes.CHUNKS))
        raise ArgumentError(f"chunkwise: chunk_size is {size}; method 'triton' takes one of {known}")
    if wide:
        raise ArgumentError("chunkwise: method 'triton' takes no float64 on a GPU, q is float64; use method='torch'")
    if rows > _ROWS:
        raise ArgumentError(
            f"chunkwise: v has {v.shape[0]} batch rows × {v.shape[2]} heads; method 'triton' takes {_ROWS} together"
        )
    return replace(plan, chunk_size=size)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, reset: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        problem = Problem(plan, reset, tensors)
        y = torch.empty_like(tensors[2], memory_format=torch.contiguous_format)
        with context(problem.q):
            end, kept = outputs(problem, y)
        ctx.plan = plan
        ctx.save_for_backward(reset, *tensors, *kept)
        ctx.set_materialize_grads(False)
        if plan.normalized:
            ctx.mark_non_differentiable(end[-1])
        return (y, *end)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_end: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, *tensors = ctx.saved_tensors
        count = 8 if ctx.plan.normalized else 6
        problem, kept = Problem(ctx.plan, reset, tensors[:count]), tensors[count:]
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in problem.tensors[:5])
        with context(problem.q):
            return (None, None, *grads, *gradients(problem, kept, grad_y, grad_end, grads))


def context(x: Tensor) -> AbstractContextManager[Any]:
    """In which `outputs`, `end`, `gradients` and `entry_gradient` are called."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


class Problem:
    """The arguments, with q, k and v such that heads lie side by side, and the launching of kernels."""

    def __init__(self, plan: Plan, reset: Tensor | None, tensors: Sequence[Tensor]) -> None:
        self.plan, self.reset = plan, reset
        self.q, self.k, self.v, self.log_decay, self.gain, *self.state = tensors
        self.tensors = tensors
        self.q, self.k, self.v = (_packed(x) for x in (self.q, self.k, self.v))
        self.batch, self.time, self.groups, self.d_k = self.q.shape
        self.heads, self.d_v = self.v.shape[2:]
        self.rows, self.shared = self.batch * self.heads, self.heads // self.groups
        assert plan.chunk_size is not None  # `takes` has chosen
        self.size = plan.chunk_size
        self.operand = self.plan.dtype if self.q.dtype == torch.float16 else self.q.dtype
        self.vendor = "hip" if torch.version.hip else "cuda"
        given = shapes.DOT[self.q.dtype]
        self.given = shapes.constants(plan.normalized, plan.eps, given, self.d_k, self.d_v, self.size, self.vendor)
        if interpreted():
            self.given["PRECISION"] = "wide"
        self.given |= {"heads": self.heads, "groups": self.groups, "HAS_RESET": reset is not None}
        self.subs = self.size // self.given["BT"]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.plan.dtype, device=self.q.device)

    def segments(self) -> list[tuple[int, int]]:
        """(first step, step after the last): whole chunks, but for the last."""
        each = self.rows * self.d_k * self.d_v + self.batch * self.groups * self.size**2
        chunks = min(_ROWS, max(1, SEGMENT // each))
        steps = chunks * self.size
        return [(start, min(start + steps, self.time)) for start in range(0, self.time, steps)]

    def tiles(self, name: str) -> tuple[int, int]:
        """A kernel's tiles of d_k and of d_v."""
        chosen, *_ = shapes.shaped(name, self.given, self.rows, self.vendor)
        return -(-self.d_k // chosen["BK"]), -(-self.d_v // chosen["BV"])

    def run(self, name: str, grid: tuple[int, ...], given: dict[str, Any]) -> None:
        kernel = shapes.NAMED[name]
        every, warps, stages = shapes.shaped(name, {**self.given, **given}, self.rows, self.vendor)
        arguments = {argument: every[argument] for argument in kernel.arg_names}
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)


def _packed(x: Tensor) -> Tensor:
    """x with its last two axes side by side; that is so for a slice of a wider projection, which is not copied."""
    return x if x.stride(3) == 1 and (x.stride(2) == x.shape[3] or x.shape[2] == 1) else x.contiguous()


def _big(name: str, x: Tensor) -> dict[str, Any]:
    return {f"{name}_ptr": x, f"{name}_batch": x.stride(0), f"{name}_step": x.stride(1)}


_GRADS = ("d{}_last_ptr", "d{}_first_ptr")
"""Arguments of grad_states_kernel."""
_UNREAD = ("n", "n_first", "n_last", "s", "s_last", "rho", "dn", "ds", "dnorm", "dn_last", "dn_first", "inner", "end")
"""Arguments that some call does not read."""


class _Segment:
    """A segment's views and weights, and the states of its chunks."""

    def __init__(self, problem: Problem, start: int, stop: int, state: ChunkState) -> None:
        self.problem, self.cut = problem, slice(start, stop)
        plan, rows, size = problem.plan, problem.rows, problem.size
        self.time, self.chunks = stop - start, -(-(stop - start) // size)
        self.pieces = _pieces(problem, self.chunks)
        padded = self.chunks * size
        d, g = (self._gate(x) for x in (problem.log_decay, problem.gain))
        none = d  # stands for what a kernel does not read
        reset = None if problem.reset is None else problem.reset[:, self.cut].contiguous()
        names = ("hi", "r", "c", "w", "a")
        weights = dict(zip(names, problem.empty(len(names), rows, padded), strict=True))
        self.given: dict[str, Any] = {f"{name}_ptr": value for name, value in weights.items()}
        self.given |= {"d_ptr": d, "g_ptr": g, "reset_ptr": none if reset is None else reset.view(torch.uint8)}
        self.given |= {"time": self.time, "chunks": self.chunks, "padded": padded}
        self.given |= (
            _big("q", problem.q[:, self.cut]) | _big("k", problem.k[:, self.cut]) | _big("v", problem.v[:, self.cut])
        )
        self.given["first_ptr"] = problem.empty(rows, padded, dtype=torch.int32)
        self.given["keep_ptr"] = problem.empty(rows, self.chunks)
        self.given["m_ptr"] = none
        self.first, self.m = state, None
        if plan.normalized:
            self.given["m_first_ptr"] = state[2].contiguous()
            self.given["m_ptr"] = self.m = problem.empty(rows, padded + 1)
            steps = max(16, min(shapes.SCAN, triton.next_power_of_2(padded)))
            self.run("stabilizer_kernel", (rows,), BLOCK=steps)
        self.run("weights_kernel", (rows, self.chunks))
        for name in _UNREAD:
            self.given[f"{name}_ptr"] = none

    def _gate(self, x: Tensor) -> Tensor:
        """(row, steps) of (batch, time, heads)."""
        return x[:, self.cut].to(self.problem.plan.dtype).transpose(1, 2).contiguous()

    def run(self, name: str, grid: tuple[int, ...], **given: Any) -> None:
        self.problem.run(name, grid, {**self.given, **given})

    def states(self, store: bool = True) -> ChunkState:
        """The state at the end; leaves those at the starts of chunks behind, where they are stored."""
        p = self.problem
        if store:
            self.given["s_ptr"] = p.empty(p.rows, self.chunks, p.d_k, p.d_v, dtype=p.operand)
            self.given["n_ptr"] = p.empty(p.rows, self.chunks, p.d_k) if p.plan.normalized else self.given["d_ptr"]
        last = self.walk("states_kernel", ("{}_first_ptr", "{}_last_ptr"), self.first, store)
        if self.m is None:
            return last
        return (*last, self.m[:, -1].clone().view(p.batch, p.heads))

    def walk(self, kernel: str, names: tuple[str, str], begin: Sequence[Tensor], store: bool) -> tuple[Tensor, ...]:
        """What a kernel that goes over chunks makes of a state S or (C, n) at one end, at the other one, with what it
        stores of every chunk. names: of its arguments for both ends of a piece, which it leaves behind.

        A state is carried from chunk to chunk, so where few programs walk, time goes in pieces: all at once from
        nothing, then, knowing where each piece begins, all at once as they are. The recurrence is linear: what a piece
        makes of nothing and the decay over it tell its end for any begin.
        """
        p, pieces = self.problem, self.pieces
        each = -(-self.chunks // pieces)
        parts = "sn" if p.plan.normalized else "s"
        begin = [x.contiguous() for x in begin[: len(parts)]]
        ends = [p.empty(p.rows, pieces, *x.shape[2:]) for x in begin]
        starts = [torch.zeros_like(end) for end in ends] if pieces > 1 else begin

        def run(store: bool) -> None:
            for name, start, end in zip(parts, starts, ends, strict=True):
                self.given |= {names[0].format(name): start, names[1].format(name): end}
            self.run(kernel, (*p.tiles(kernel), p.rows * pieces), STORE=store, pieces=pieces, each=each)

        order = list(range(pieces)) if kernel == "states_kernel" else list(range(pieces))[::-1]
        if pieces > 1:
            run(store=False)
            keep = torch.nn.functional.pad(self.given["keep_ptr"], (0, pieces * each - self.chunks), value=1.0)
            keep = keep.unflatten(1, (pieces, each)).prod(-1)
            for start, end, first in zip(starts, ends, begin, strict=True):
                decay = keep.view(p.rows, pieces, *[1] * (start.ndim - 2))
                start[:, order[0]] = first.flatten(0, 1)
                for before, piece in itertools.pairwise(order):
                    torch.addcmul(end[:, before], start[:, before], decay[:, before], out=start[:, piece])
                end[:, order[-1]].addcmul_(start[:, order[-1]], decay[:, order[-1]])
        if pieces == 1 or store:
            run(store)
        return tuple(end[:, order[-1]].contiguous().view(first.shape) for end, first in zip(ends, begin, strict=True))

    def scores(self) -> None:
        """Leaves q·k of every chunk behind."""
        p = self.problem
        self.given["scores_ptr"] = p.empty(p.batch * p.groups, self.chunks, p.size, p.size)
        self.run("scores_kernel", (self.chunks * p.subs, p.batch * p.groups, p.subs))


def outputs(problem: Problem, y: Tensor) -> tuple[ChunkState, tuple[Tensor, ...]]:
    """As chunkwise_torch's; y has a head's columns side by side. Kept: y and n·q̃ of every segment laid end to end (row,
    steps), where normalized."""
    state: ChunkState = tuple(problem.state)
    inner = []
    for start, stop in problem.segments():
        segment = _Segment(problem, start, stop, state)
        state = segment.states()
        segment.scores()
        if problem.plan.normalized:
            inner.append(problem.empty(problem.rows, segment.given["padded"]))
            segment.given["inner_ptr"] = inner[-1]
        grid = (segment.chunks * problem.subs, problem.rows, problem.tiles("outputs_kernel")[1])
        segment.run("outputs_kernel", grid, **_big("y", y[:, segment.cut]))
    return state, ((y, torch.cat(inner, 1)) if inner else ())


def end(problem: Problem) -> ChunkState:
    """As chunkwise_torch's."""
    state: ChunkState = tuple(problem.state)
    for start, stop in problem.segments():
        state = _Segment(problem, start, stop, state).states(store=False)
    return state


def _starts(problem: Problem) -> Iterator[tuple[int, int, ChunkState]]:
    """Every segment with the state at its start."""
    state: ChunkState = tuple(problem.state)
    for start, stop in problem.segments():
        yield start, stop, state
        if stop < problem.time:
            state = _Segment(problem, start, stop, state).states(store=False)


def gradients(
    problem: Problem, kept: Sequence[Tensor], grad_y: Tensor | None, grad_end: GradEnd, grads: Sequence[Tensor]
) -> ChunkState:
    """As chunkwise_torch's; those of q, k and v have their last two axes side by side, those of the gates the last."""
    grad_state = _at_end(problem, grad_end)
    for segment in _reversed(problem, kept, grad_y):
        grad_state = _pull_back(segment, grad_state, tuple(x[:, segment.cut] for x in grads))
    return _at_start(problem, grad_state)


def entry_gradient(problem: Problem, kept: Sequence[Tensor], grad_y: Tensor | None, grad_end: GradEnd) -> ChunkState:
    """As chunkwise_torch's."""
    grad_state = _at_end(problem, grad_end)
    for segment in _reversed(problem, kept, grad_y, states=False):
        grad_state = list(segment.walk("grad_states_kernel", _GRADS, grad_state, store=False))
    return _at_start(problem, grad_state)


def _at_end(p: Problem, grad_end: GradEnd) -> list[Tensor]:
    parts = 2 if p.plan.normalized else 1
    ends = zip(p.state[:parts], grad_end[:parts], strict=True)
    return [p.empty(*s.shape).zero_() if g is None else g.contiguous() for s, g in ends]


def _at_start(problem: Problem, grad_state: list[Tensor]) -> ChunkState:
    return (*grad_state, torch.zeros_like(problem.state[2])) if problem.plan.normalized else tuple(grad_state)


def _reversed(p: Problem, kept: Sequence[Tensor], grad_y: Tensor | None, states: bool = True) -> Iterator[_Segment]:
    """From the last segment to the first, with its states and with dy, through the division where normalized."""
    dy = _packed(torch.zeros_like(p.v) if grad_y is None else grad_y.to(p.v.dtype))
    for start, stop, state in reversed(list(_starts(p))):
        segment = _Segment(p, start, stop, state)
        if states:
            segment.states()
        segment.given |= _big("dy", dy[:, segment.cut])
        if p.plan.normalized:
            y, inner = kept
            padded = segment.given["padded"]
            rho, dn = p.empty(2, p.rows, padded)
            segment.given |= _big("y", y[:, segment.cut]) | {"rho_ptr": rho, "dn_ptr": dn}
            segment.given["inner_ptr"] = inner[:, start : start + padded].contiguous()
            segment.run("norm_back_kernel", (segment.chunks * p.subs, p.rows))
        yield segment


def _grad_states(segment: _Segment, last: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The gradient of the state before a segment, and what flows past the ends of its chunks, by tiles; leaves those of
    the states at the starts of chunks behind."""
    p, given = segment.problem, segment.given
    given["ds_ptr"] = torch.empty_like(given["s_ptr"])
    if p.plan.normalized:
        given["dnorm_ptr"] = torch.empty_like(given["n_ptr"])
    given["end_ptr"] = passed = p.empty(p.rows, segment.chunks, math.prod(p.tiles("grad_states_kernel")))
    return list(segment.walk("grad_states_kernel", _GRADS, last, store=True)), passed


def _pull_back(segment: _Segment, last: list[Tensor], grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Writes a segment's part of the gradients of q, k, v, log_decay and gain; returns that of the state before it."""
    p, given, chunks = segment.problem, segment.given, segment.chunks
    first, end = _grad_states(segment, last)
    segment.scores()
    segment.run("grad_v_kernel", (chunks * p.subs, p.rows, p.tiles("grad_v_kernel")[1]), **_big("dv", grads[2]))
    splits, tiles = _splits(p, chunks), p.tiles("grad_q_kernel")[0]
    rows, each = p.batch * p.groups * splits, p.shared // splits
    # What the state gives to q·dq and k·dk, by tiles of d_k, then what the chunk's own steps give, by tiles of steps.
    ending, starting = p.empty(2, tiles + p.subs, p.rows, chunks * p.size)
    given |= {"each": each, "pairs_ptr": p.empty(rows, chunks, p.size, p.size, dtype=p.operand)}
    within = {"ending_ptr": ending[tiles:], "starting_ptr": starting[tiles:]}
    segment.run("pairs_kernel", (chunks * p.subs, rows, p.subs), **within)
    for name, grad, flow in (("q", grads[0], ending), ("k", grads[1], starting)):
        part = grad.unsqueeze(0)
        if splits > 1:
            part = p.empty(splits, p.batch, segment.time, p.groups, p.d_k)
        options = {**_big(f"d{name}", part[0]), f"d{name}_split": part.stride(0), "flow_ptr": flow}
        segment.run(f"grad_{name}_kernel", (chunks * p.subs, rows, tiles), **options)
        if splits > 1:
            torch.sum(part, 0, out=grad) if grad.dtype == part.dtype else grad.copy_(part.sum(0))
    flows = {"ending_ptr": ending, "starting_ptr": starting, "end_ptr": end, "tiles": tiles, "tiles_end": end.shape[2]}
    segment.run("passing_kernel", (p.rows, chunks), **flows, **_big("dd", grads[3]), **_big("dg", grads[4]))
    return first


def _pieces(problem: Problem, chunks: int) -> int:
    """In how many pieces of time the walks over a segment go: as many as WALKS leaves room for, but one where a second
    walk would take what the first one saves."""
    programs = problem.rows * math.prod(problem.tiles("states_kernel"))
    count = min(shapes.WALKS // programs, chunks * problem.subs // shapes.WALKED)
    return min(count, shapes.MOST_PIECES) if count > 2 else 1


def _splits(problem: Problem, chunks: int) -> int:
    """How many programs share the heads of a group: the fewest that make PROGRAMS, or one for each head."""
    programs = chunks * problem.subs * problem.batch * problem.groups * problem.tiles("grad_q_kernel")[0]
    counts = [count for count in range(1, problem.shared + 1) if problem.shared % count == 0]
    return next((count for count in counts if count * programs >= PROGRAMS), problem.shared)
