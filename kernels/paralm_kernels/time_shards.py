"""A sequence whose time lies on several ranks: each holds consecutive steps, and no rank ever holds the whole.

`TimeShards(group)` has the functions of this package that run over time, with the same arguments, for a part of the
sequence: `causal_conv`, `chunkwise`, `solve` (time_shards_solve.py), and `relay` for whatever carries a state. A part
may be of any length, also unequal ones. `state` is the one before the whole sequence and counts on the first rank
alone; the state that comes back is the one after the rank's own part, on the last rank the sequence's. Every rank calls
the same functions in the same order, forward and backward. What is wrong with the arguments is said by the rank that
has them; where the other ranks' are right they wait for it, until the group's timeout.

What is sent is of the size of a state, however long the sequence: an affine recurrence is one map a part,
S ↦ e^{D} S + E, and each rank composes those of the ranks before it; a convolution takes the last inputs of the part
before. Gradients come back by one sum over the ranks. Ranks meet at these sums. `relay` sends without waiting: a rank
computes its next rows while a state, or its gradient, is under way, and calls `settle` before it leaves the group
where nothing after the last relay makes it meet the others. `bytes_sent` counts all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from . import conv
from .chunkwise import check, chunkwise
from .errors import ArgumentError
from .solve import Trajectory


class TimeShards:
    """The ranks of a process group in the order of time.

    group: a torch.distributed process group (None: all ranks); its first rank holds the sequence's first steps.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent: dict[str, int] = {}
        """By the kind of message: bytes that this rank has given to collectives and to its neighbours."""
        self._under_way: list[tuple[Any, Tensor]] = []  # messages that may not have left yet

    @property
    def first(self) -> bool:
        """Whether this rank's part begins the sequence."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether this rank's part ends it."""
        return self.rank == self.size - 1

    def count(self, kind: str, *tensors: Tensor) -> None:
        """Adds what is about to be sent."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.bytes_sent[kind] = self.bytes_sent.get(kind, 0) + size

    def gathered(self, kind: str, *tensors: Tensor) -> list[Tensor]:
        """Tensors of every rank, (rank, …) each, in one message; of one dtype, and of one shape on all ranks. No
        gradient: see :meth:`joined`."""
        flat = torch.cat([x.detach().flatten() for x in tensors])
        self.count(kind, flat)
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(parts, flat, group=self.group)
        pieces = torch.stack(parts).split([x.numel() for x in tensors], 1)
        return [piece.unflatten(1, x.shape) for piece, x in zip(pieces, tensors, strict=True)]

    def joined(self, kind: str, combine: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """combine(*gathered tensors), differentiable: the gradients of what came from a rank go back to it, by one sum
        over the ranks. combine may differ from rank to rank; its outputs must be used on all ranks, or on none."""
        result: tuple[Tensor, ...] = _Join.apply(self, kind, combine, *tensors)
        return result

    def largest(self, x: float, device: torch.device) -> float:
        """The largest of a number over the ranks, the same number on all."""
        value = torch.tensor(x, dtype=torch.float64, device=device)
        self.count("agreement", value)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return float(value)

    def neighbour(self, offset: int) -> int:
        """The global rank of the neighbour in time."""
        return self.rank + offset if self.group is None else dist.get_global_rank(self.group, self.rank + offset)

    def send(self, kind: str, tensor: Tensor, offset: int) -> None:
        """To a neighbour in time, without waiting until it takes it. Messages to one arrive in their order."""
        self.count(kind, tensor)
        work = dist.isend(tensor, self.neighbour(offset), group=self.group)
        self._under_way.append((work, tensor))  # which must stay as it is so long

    def settle(self) -> None:
        """Wait until what was sent has been taken."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        state: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :func:`paralm_kernels.causal_conv`, after one message from the rank before. A part has at least as many
        steps as the convolution looks back; ArgumentError otherwise."""
        conv.check(x, weight, bias, state, reset)
        reach = weight.shape[1] - 1
        if x.shape[1] < reach:
            raise ArgumentError(
                f"causal_conv over time shards: this rank's part has {x.shape[1]} steps, the convolution looks back "
                f"{reach}; use fewer time shards or longer sequences"
            )
        if reach == 0:
            return conv.causal_conv(x, weight, bias, state, reset)
        tail = conv.tail_of(x, x[:, :reach], conv.Geometry(x, reach + 1, reset))
        given = _zero_unless(self.first, state, tail)

        def entry(tails: Tensor, states: Tensor) -> tuple[Tensor]:
            return (states[0] if self.first else tails[self.rank - 1],)

        (before,) = self.joined("convolution", entry, tail, given)
        return conv.causal_conv(x, weight, bias, before, reset)

    def chunkwise(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        gain: Tensor,
        state: Any = None,
        reset: Tensor | None = None,
        *,
        normalized: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """As :func:`paralm_kernels.chunkwise`."""
        dtype = check(q, k, v, log_decay, gain, state, reset, normalized)
        total, write = _suffix(log_decay.to(dtype), reset)
        entry: Any
        if normalized:
            entry = self._normalized_entry(k.to(dtype), v.to(dtype), total, write + gain.to(dtype), state)
        else:
            entry = self._plain_entry(k.to(dtype), v.to(dtype), total, write.exp() * gain.to(dtype), state)
        return chunkwise(q, k, v, log_decay, gain, entry, reset, normalized=normalized, **options)

    def _plain_entry(self, k: Tensor, v: Tensor, total: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
        """S before this rank's part."""
        end = _written(k, v * weight.unsqueeze(-1))

        def entry(totals: Tensor, ends: Tensor, states: Tensor) -> tuple[Tensor]:
            now = states[0]
            for before in range(self.rank):
                now = totals[before].exp()[..., None, None] * now + ends[before]
            return (now,)

        return self.joined("state", entry, total, end, _zero_unless(self.first, state, end))[0]

    def _normalized_entry(self, k: Tensor, v: Tensor, total: Tensor, logs: Tensor, state: Any) -> tuple[Tensor, ...]:
        """(C, n, m) before this rank's part; m is a constant in the gradient."""
        m_end = logs.detach().amax(1)  # (batch, head); −∞ only if every gain is
        weight = (logs - _finite(m_end).unsqueeze(1)).exp()
        c_end, n_end = _written(k, v * weight.unsqueeze(-1)), _written(k, weight.unsqueeze(-1)).squeeze(-1)
        given = (None, None, None) if state is None else state
        begin = [_zero_unless(self.first, part, like) for part, like in zip(given, (c_end, n_end, m_end), strict=True)]
        if state is None or not self.first:
            begin[2] = torch.full_like(m_end, -math.inf)

        def entry(totals: Tensor, ms: Tensor, cs: Tensor, ns: Tensor, *begin: Tensor) -> tuple[Tensor, ...]:
            c, n, m = (part[0] for part in begin)
            m, ms = m.detach(), ms.detach()
            for before in range(self.rank):
                carried = totals[before] + m
                new = torch.maximum(carried.detach(), ms[before])
                old, written = (carried - _finite(new)).exp(), (ms[before] - _finite(new)).exp()
                c = old[..., None, None] * c + written[..., None, None] * cs[before]
                n = old[..., None] * n + written[..., None] * ns[before]
                m = new
            return c, n, m

        return self.joined("state", entry, total, m_end, c_end, n_end, *begin)

    def solve(
        self,
        cell: Any,
        inputs: Sequence[Tensor],
        params: Sequence[Tensor],
        state: Sequence[Tensor] | None = None,
        reset: Tensor | None = None,
        method: str = "auto",
        **options: Any,
    ) -> Trajectory:
        """As :func:`paralm_kernels.solve`, by Newton's method over the ranks; see time_shards_solve.py."""
        from .time_shards_solve import solve_sharded

        return solve_sharded(self, cell, inputs, params, state, reset, method, **options)

    def relay(
        self,
        forward: Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Any]],
        like: Callable[[int], Any],
        x: Tensor,
        state: Any = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Anything that carries a state: a rank begins when the one before hands on the state after its part.

        forward: (x (batch, time, …), state, reset) → (y, state), as a mixer's. like: (batch) → a state as it is handed
        on, whose values do not matter. Rows are split over the ranks' number of micro-batches, so that after as many
        steps all ranks work at the same time. The parts of a state travel one by one; floating ones have gradients.
        """
        self.settle()  # of the call before, of which by now all has been taken where ranks are equally fast
        count = min(len(x), self.size)
        rows = [slice(i * len(x) // count, (i + 1) * len(x) // count) for i in range(count)]
        outputs, ends = [], []
        for part in rows:
            entry = None if state is None else pytree.tree_map(lambda leaf, part=part: leaf[part], state)
            if not self.first:
                entry = self._take_over(like(part.stop - part.start), x)
            y, end = forward(x[part], entry, None if reset is None else reset[part])
            if not self.last:
                y = self._hand_on(end, y)
            outputs.append(y)
            ends.append(end)
        return torch.cat(outputs), pytree.tree_map(lambda *leaves: torch.cat(leaves), *ends)

    def _take_over(self, like: Any, x: Tensor) -> Any:
        leaves, structure = pytree.tree_flatten(like)
        return pytree.tree_unflatten(list(_TakeOver.apply(self, _anchor(x), *leaves)), structure)

    def _hand_on(self, end: Any, y: Tensor) -> Tensor:
        """y, whose backward pass takes the gradients of the state that was handed on."""
        zero: Tensor = _HandOn.apply(self, _anchor(y), *(leaf.contiguous() for leaf in pytree.tree_leaves(end)))
        return y + zero.to(y.dtype)


def _anchor(x: Tensor) -> Tensor:
    """Makes both ends of a message part of the backward pass, even where one of them has nothing to learn."""
    return x.new_zeros((), requires_grad=torch.is_grad_enabled())


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.zeros_like(x))


def _suffix(log_decay: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of a part: the log of what is left of the state before it, (batch, head), and of what is left at its end of what
    each step writes, (batch, time, head); −∞ where a reset cuts it."""
    after = log_decay.flip(1).cumsum(1).flip(1)
    total, write = after[:, 0], after - log_decay
    if reset is None:
        return total, write
    later = reset.flip(1).cumsum(1).flip(1)  # resets at or after a step
    total = total.masked_fill(later[:, :1] > 0, -math.inf)
    return total, write.masked_fill(((later - reset.to(later.dtype)) > 0).unsqueeze(-1), -math.inf)


def _written(k: Tensor, v: Tensor) -> Tensor:
    """Σ_t k_t v_tᵀ, (batch, head, d_k, d_v); k by groups of heads."""
    shared = v.unflatten(2, (k.shape[2], -1))
    return torch.einsum("btgk,btgsv->bgskv", k, shared).flatten(1, 2)


def _zero_unless(here: bool, state: Tensor | None, like: Tensor) -> Tensor:
    return state.to(like.dtype) if here and state is not None else torch.zeros_like(like)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shards: TimeShards, kind: str, combine: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shards, ctx.kind = shards, kind
        with torch.enable_grad():
            ctx.leaves = [leaf.detach().requires_grad_() for leaf in shards.gathered(kind, *tensors)]
            ctx.results = combine(*ctx.leaves)
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        pairs = [(result, grad) for result, grad in zip(ctx.results, grads, strict=True) if result.requires_grad]
        results, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, ctx.leaves, given, retain_graph=True, allow_unused=True)
        every = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(ctx.leaves, found, strict=True)]
        flat = torch.cat([grad.flatten(1) for grad in every], 1)
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        ctx.shards.count(f"{ctx.kind}, gradient", wide)
        dist.all_reduce(wide, group=ctx.shards.group)
        own = wide[ctx.shards.rank].to(flat.dtype).split([grad[0].numel() for grad in every])
        return None, None, None, *(piece.view(grad.shape[1:]) for piece, grad in zip(own, every, strict=True))


class _TakeOver(torch.autograd.Function):
    """The leaves of a state from the rank before; their gradients go back there."""

    @staticmethod
    def forward(ctx: Any, shards: TimeShards, anchor: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        taken = tuple(torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in like)
        for leaf in taken:
            dist.recv(leaf, shards.neighbour(-1), group=shards.group)
        ctx.shards = shards
        ctx.mark_non_differentiable(*(leaf for leaf in taken if not leaf.is_floating_point()))
        return taken

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        for grad in grads:
            if grad is not None and grad.is_floating_point():
                ctx.shards.send("relay, gradient", grad.contiguous(), -1)
        return (None, None, *(None for _ in grads))


class _HandOn(torch.autograd.Function):
    """Sends the leaves of a state to the rank after, and takes their gradients from there; gives a zero to add to the
    output, so that this happens before anything that the output's gradient is used for."""

    @staticmethod
    def forward(ctx: Any, shards: TimeShards, anchor: Tensor, *leaves: Tensor) -> Tensor:
        for leaf in leaves:
            shards.send("relay", leaf.detach(), 1)
        ctx.shards, ctx.like = shards, [leaf.detach() for leaf in leaves]
        return torch.zeros((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        grads: list[Tensor | None] = []
        for leaf in ctx.like:
            grads.append(torch.empty_like(leaf) if leaf.is_floating_point() else None)
            if grads[-1] is not None:
                dist.recv(grads[-1], ctx.shards.neighbour(1), group=ctx.shards.group)
        return None, None, *grads
