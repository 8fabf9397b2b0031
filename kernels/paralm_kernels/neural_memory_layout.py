"""How ragged rows become tiles: every row's tokens cut at its own chunks, then laid side by side.

Chunks of the neural memory count from a row's own start, so rows of a batch are at different places in theirs, and a
reset moves one row's chunks but not another's. A row is cut where a chunk starts, where a tile starts inside a chunk,
and at resets; slot n of the batch is the n-th piece of each row, padded to the longest of them. So that these are of
about one length, the sequences between a row's first reset and its last, none of which another one's state is of, are
taken longest first. A batch without resets whose rows are at one place in their chunk is only sliced.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .once import once_differentiable


@dataclass(frozen=True)
class Slot:
    """Times [begin, end) of the laid-out sequence. ``lengths`` (batch,): tokens that are a row's own, None for all;
    ``fresh`` (batch,): rows that start anew here; ``ends`` (batch,): rows whose chunk is complete after it."""

    begin: int
    end: int
    ends: Tensor | bool
    lengths: Tensor | None = None
    fresh: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Slots in order; for rows that were moved, ``source`` (batch, places) and ``target`` (batch, time): where a
    laid-out place comes from, and where a token went; ``own``: which places hold a token. ``position`` (batch,): tokens
    read in the chunk that follows."""

    slots: list[Slot]
    position: Tensor
    source: Tensor | None = None
    target: Tensor | None = None
    own: Tensor | None = None

    def lay(self, x: Tensor) -> Tensor:
        """(batch, time, …) → (batch, places, …); padding repeats some token."""
        if self.source is None or self.target is None or self.own is None:
            return x
        moved: Tensor = _Move.apply(x, self.source, self.target, None)
        return moved

    def restore(self, x: Tensor) -> Tensor:
        """(batch, places, …) → (batch, time, …)."""
        if self.source is None or self.target is None or self.own is None:
            return x
        moved: Tensor = _Move.apply(x, self.target, self.source, self.own)
        return moved


class _Move(torch.autograd.Function):
    """x at ``index``; the gradient at its inverse, zero where ``own`` is false: a gather both ways, so no atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, own: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, own)
        return _at(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, own = ctx.saved_tensors
        grad = _at(grad, inverse)
        return grad if own is None else grad.masked_fill(~_like(own, grad), 0.0), None, None, None


def _like(index: Tensor, x: Tensor) -> Tensor:
    return index.reshape(*index.shape, *(1,) * (x.dim() - 2))


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _like(index, x).expand(-1, -1, *x.shape[2:]))


def plan(position: Tensor | None, reset: Tensor | None, batch: int, time: int, chunk: int, tile: int) -> Layout:
    """The layout of ``time`` tokens of rows that are ``position`` (batch,) tokens into their chunk (None: all 0).

    ``reset`` (batch, time): true where a row starts anew; at the first token the caller has seen to the state itself.
    Looks at the values (waits for the device) where there are positions or resets and more than one token: once, and
    twice more where rows are moved.
    """
    tile = min(tile, chunk)
    if position is not None and time == 1:
        after = position + 1
        return Layout([Slot(0, 1, after == chunk)], after % chunk)
    first = 0
    if position is not None or reset is not None:
        begin = position if position is not None else torch.zeros(batch, dtype=torch.int64, device=_device(reset))
        later = reset[:, 1:].any() if reset is not None else torch.zeros((), dtype=torch.bool, device=begin.device)
        first, highest, moved = torch.stack((begin.min(), begin.max(), later.to(begin.dtype))).tolist()
        if moved or first != highest:
            return _ragged(begin, reset, time, chunk, tile)
    slots, at = [], 0
    while at < time:
        inside = (first + at) % chunk
        end = min(at + tile - inside % tile, at + chunk - inside, time)
        slots.append(Slot(at, end, (first + end) % chunk == 0))
        at = end
    device = position.device if position is not None else _device(reset)
    return Layout(slots, torch.full((batch,), (first + time) % chunk, dtype=torch.int64, device=device))


def _device(reset: Tensor | None) -> torch.device:
    return torch.device("cpu") if reset is None else reset.device


def _ragged(begin: Tensor, reset: Tensor | None, time: int, chunk: int, tile: int) -> Layout:
    batch, device = len(begin), begin.device
    index = torch.arange(time, device=device)
    read = begin[:, None] + index
    if reset is not None:
        start = torch.where(reset, index, -1).cummax(1).values
        read = torch.where(start >= 0, index - start, read)
    phase = read % chunk
    after = (phase[:, -1] + 1) % chunk
    order = None
    if reset is not None and batch > 1:
        order = _longest_first(reset, index)
        phase, reset = phase.gather(1, order), reset.gather(1, order)
    cut = phase % tile == 0
    if reset is not None:
        cut = cut | reset
    cut[:, 0] = True
    piece = cut.cumsum(1) - 1
    offset = index - torch.where(cut, index, 0).cummax(1).values
    last = torch.cat((cut[:, 1:], cut[:, :1]), 1)  # of its piece; cut is true at 0
    lengths = offset.new_zeros(batch, time + 1).scatter(1, torch.where(last, piece, time), offset + 1)[:, :time]
    # A slot is as long as its longest piece: with one length for all, documents of a few tokens would take a tile each.
    widest = lengths.amax(0)
    count = int((widest > 0).sum())
    lengths, ends_at = lengths[:, :count], widest[:count].cumsum(0)
    begins = ends_at - widest[:count]
    edges = [0, *ends_at.tolist()]
    target = begins[piece] + offset
    source = torch.zeros(batch, edges[-1], dtype=torch.int64, device=device)
    source = source.scatter(1, target, index.expand(batch, -1))  # of the order in which they are taken, so far
    own = torch.zeros(batch, edges[-1], dtype=torch.bool, device=device).scatter(1, target, True)
    final = source.gather(1, begins + (lengths - 1).clamp(min=0))
    ends = (phase.gather(1, final) == chunk - 1) & (lengths > 0)
    fresh = None
    if reset is not None:
        fresh = reset.gather(1, source[:, begins]) & own[:, begins]
    slots = [
        Slot(*edge, ends[:, n], lengths[:, n], fresh[:, n] if fresh is not None and n else None)
        for n, edge in enumerate(pairwise(edges))
    ]
    if order is not None:
        source, target = order.gather(1, source), torch.empty_like(target).scatter(1, order, target)
    return Layout(slots, after, source, target, own)


def _longest_first(reset: Tensor, index: Tensor) -> Tensor:
    """(batch, time): the tokens of each row in the order in which they are taken. What it begins with may go on from a
    state, and what it ends with makes one: these stay where they are."""
    time = len(index)
    number = reset.cumsum(1)
    lengths = number.new_zeros(len(number), time + 1).scatter_add(1, number, torch.ones_like(number))
    rank = time - lengths.gather(1, number)
    rank = torch.where(number == number[:, :1], -1, torch.where(number == number[:, -1:], time, rank))
    return (rank * (time + 1) + number).argsort(dim=1, stable=True)
