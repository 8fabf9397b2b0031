"""A sequence whose time lies on several ranks: each holds consecutive steps, and no rank ever holds the whole.

`TimeShards(group)` has the functions of this package that run over time, with the same arguments, for a part of the
sequence: `causal_conv`, `chunkwise`, `solve` (time_shards_solve.py), and `relay` for whatever carries a state. A part
may be of any length, also unequal ones. `state` is the one before the whole sequence and counts on the first rank
alone; the state that comes back is the one after the rank's own part, on the last rank the sequence's. Every rank calls
the same functions in the same order, forward and backward. What is wrong with the arguments is said by the rank that
has them; where the other ranks' are right they wait for it, until the group's timeout.

What is sent is of the size of a state, however long the sequence, and travels while something is computed that does not
need it: a convolution's halo while the part is convolved, the map of an affine recurrence while the other half of its
rows or heads is computed, a cell's guess while its part is walked; forward and backward. Waited for are what a cell's
solve asks of all ranks after that, and its one message backward: some numbers a channel. `relay` sends without waiting:
a rank computes its next rows while a state, or its gradient, is under way, and calls `settle` before it leaves the
group where nothing after the last relay makes it meet the others. `bytes_sent` counts all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from .positions import positions
from .solve import Trajectory

HIDDEN = frozenset(
    {"convolution", "convolution, gradient", "state", "state, gradient", "guess", "positions", "window"}
    | {"window, gradient"}
)
"""Kinds of messages that travel while this rank computes what does not need them."""
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on


class Message:
    """What is under way between ranks."""

    def __init__(self, works: Sequence[Any], taken: Callable[[], Any], *sent: Tensor) -> None:
        self._works, self._taken = works, taken
        self._sent = sent  # must stay as it is until it has arrived

    def taken(self) -> Any:
        """What came, once it has; a device's stream waits for it, not this thread."""
        for work in self._works:
            work.wait()
        return self._taken()


class TimeShards:
    """The ranks of a process group in the order of time.

    group: a torch.distributed process group (None: all ranks); its first rank holds the sequence's first steps.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent: dict[str, int] = {}
        """By the kind of message: bytes that left this rank, once for every rank that got them."""
        self._under_way: list[tuple[Any, Tensor]] = []  # messages that may not have left yet

    @property
    def first(self) -> bool:
        """Whether this rank's part begins the sequence."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether this rank's part ends it."""
        return self.rank == self.size - 1

    def count(self, kind: str, tensor: Tensor, ranks: int = 1) -> None:
        """Adds what is about to be sent to so many ranks."""
        size = tensor.numel() * tensor.element_size() * ranks
        self.bytes_sent[kind] = self.bytes_sent.get(kind, 0) + size

    def gather(self, kind: str, *tensors: Tensor) -> Message:
        """Begins to tell every rank. Taken: tensors of every rank, (rank, …) each, without gradients. They are of one
        dtype, and of one shape on all ranks."""
        flat = torch.cat([x.detach().flatten() for x in tensors])
        self.count(kind, flat, self.size - 1)
        every = flat.new_empty(self.size * flat.numel())
        work = _all_gather(every, flat, group=self.group, async_op=True)

        def taken() -> list[Tensor]:
            pieces = every.unflatten(0, (self.size, -1)).split([x.numel() for x in tensors], 1)
            return [piece.unflatten(1, x.shape) for piece, x in zip(pieces, tensors, strict=True)]

        return Message([work], taken, flat)

    def pass_on(self, kind: str, tensor: Tensor, offset: int) -> Message:
        """Begins to send to a neighbour in time (+1 or −1), as all ranks do. Taken: what came from the other side, like
        `tensor`; None where there is no such rank."""
        tensor, operations, came = tensor.detach().contiguous(), [], None
        if 0 <= self.rank + offset < self.size:
            self.count(kind, tensor)
            operations.append(dist.P2POp(dist.isend, tensor, self.neighbour(offset), self.group))
        if 0 <= self.rank - offset < self.size:
            came = torch.empty_like(tensor)
            operations.append(dist.P2POp(dist.irecv, came, self.neighbour(-offset), self.group))
        return Message(dist.batch_isend_irecv(operations) if operations else [], lambda: came, tensor)

    def position(self, before: Tensor, reset: Tensor | None, time: int) -> Message:
        """Begins to find how many steps every row has read since its last reset, before this part of ``time`` steps.
        before: that before the whole sequence, int64 (batch,); it counts on the first rank. Taken: the like."""
        start = before if self.first else torch.zeros_like(before)
        end = positions(start, reset, time)[:, -1] + 1
        keep = torch.ones_like(before) if reset is None else (~reset.any(1)).to(before.dtype)
        message = self.gather("positions", keep, end)

        def taken() -> Tensor:
            keeps, ends = message.taken()
            now = before if self.first else ends[0]
            for rank in range(1, self.rank):
                now = ends[rank] + keeps[rank] * now
            return now

        return Message([], taken)

    def hand_on(self, kind: str, *tensors: Tensor) -> Tensor:
        """Sends tensors to the rank after, which takes them over, without waiting. Returns a zero; the gradients of the
        tensors come back when that of the zero is asked for."""
        begin = anchor(tensors[0])
        if self.last:
            return begin
        zero: Tensor = _HandOn.apply(self, kind, begin, *(tensor.contiguous() for tensor in tensors))
        return zero

    def take_over(self, kind: str, zero: Tensor | None, *like: Tensor) -> tuple[Tensor, ...]:
        """What the rank before hands on, shaped as ``like``; on the first rank ``like`` itself. zero: what `hand_on`
        returned before, if it did; its gradient is asked for once that of the result has been sent."""
        zero = anchor(like[0]) if zero is None else zero
        if self.first:
            return tuple(x + zero.to(x.dtype) if x.is_floating_point() else x for x in like)
        return tuple(_TakeOver.apply(self, kind, zero, *like))

    def largest(self, x: Tensor) -> tuple[float, float]:
        """This rank's number, and the largest over the ranks, the same on all; x: float64 ()."""
        both = torch.stack((x, x))
        self.count("agreement", x, self.size - 1)
        dist.all_reduce(both[1:], op=dist.ReduceOp.MAX, group=self.group)
        own, largest = both.tolist()  # one look at the device
        return own, largest

    def neighbour(self, offset: int) -> int:
        """The global rank of the neighbour in time."""
        return self.rank + offset if self.group is None else dist.get_global_rank(self.group, self.rank + offset)

    def send(self, kind: str, tensor: Tensor, offset: int) -> None:
        """To a neighbour in time, without waiting until it takes it. Messages to one arrive in their order."""
        self.count(kind, tensor)
        work = dist.isend(tensor, self.neighbour(offset), group=self.group)
        self._under_way = [(work, tensor) for work, tensor in self._under_way if not work.is_completed()]
        self._under_way.append((work, tensor))  # which must stay as it is so long

    def settle(self) -> None:
        """Wait until what was sent has been taken."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def causal_conv(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """As :func:`paralm_kernels.causal_conv`; see time_shards_conv.py."""
        from .time_shards_conv import conv_sharded

        return conv_sharded(self, *arguments, **options)

    def chunkwise(self, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        """As :func:`paralm_kernels.chunkwise`; see time_shards_chunkwise.py."""
        from .time_shards_chunkwise import chunkwise_sharded

        return chunkwise_sharded(self, *arguments, **options)

    def solve(self, *arguments: Any, **options: Any) -> Trajectory:
        """As :func:`paralm_kernels.solve`, by Newton's method over the ranks; see time_shards_solve.py."""
        from .time_shards_solve import solve_sharded

        return solve_sharded(self, *arguments, **options)

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
                leaves, structure = pytree.tree_flatten(like(part.stop - part.start))
                entry = pytree.tree_unflatten(list(self.take_over("relay", None, *leaves)), structure)
            y, end = forward(x[part], entry, None if reset is None else reset[part])
            if not self.last:  # its gradients are taken before any that the output's gradient is used for
                y = y + self.hand_on("relay", *pytree.tree_leaves(end)).to(y.dtype)
            outputs.append(y)
            ends.append(end)
        return torch.cat(outputs), pytree.tree_map(lambda *leaves: torch.cat(leaves), *ends)


def anchor(x: Tensor) -> Tensor:
    """Makes both ends of a message part of the backward pass, even where one of them has nothing to learn."""
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return x.new_zeros((), dtype=dtype, requires_grad=torch.is_grad_enabled())


class _TakeOver(torch.autograd.Function):
    """The leaves of a state from the rank before; their gradients go back there."""

    @staticmethod
    def forward(ctx: Any, shards: TimeShards, kind: str, zero: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        taken = tuple(torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in like)
        for leaf in taken:
            dist.recv(leaf, shards.neighbour(-1), group=shards.group)
        ctx.shards, ctx.kind, ctx.zero = shards, kind, torch.zeros_like(zero)
        ctx.mark_non_differentiable(*(leaf for leaf in taken if not leaf.is_floating_point()))
        return taken

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        for grad in grads:
            if grad is not None and grad.is_floating_point():
                ctx.shards.send(f"{ctx.kind}, gradient", grad.contiguous(), -1)
        return (None, None, ctx.zero, *(None for _ in grads))


class _HandOn(torch.autograd.Function):
    """Sends tensors to the rank after, and takes their gradients from there when that of the zero it gives is known."""

    @staticmethod
    def forward(ctx: Any, shards: TimeShards, kind: str, anchor: Tensor, *leaves: Tensor) -> Tensor:
        for leaf in leaves:
            shards.send(kind, leaf.detach(), 1)
        ctx.shards, ctx.kinds = shards, [(leaf.shape, leaf.dtype) for leaf in leaves]
        return torch.zeros_like(anchor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads: list[Tensor | None] = []
        for shape, dtype in ctx.kinds:
            grads.append(grad.new_empty(shape, dtype=dtype) if dtype.is_floating_point else None)
            if grads[-1] is not None:
                dist.recv(grads[-1], ctx.shards.neighbour(1), group=ctx.shards.group)
        return None, None, None, *grads
