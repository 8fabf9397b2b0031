"""A stand-in for the ranks that share a sequence: counts what this one would send, and answers with its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import paralm_kernels
import torch
from paralm_kernels import TimeShards
from paralm_kernels.solve import Trajectory
from paralm_kernels.time_shards import Message, anchor
from torch import Tensor

ROUNDS = 2
"""Rounds of a cell's solve, the guess among them: cells that forget are done with one further walk
(paralm_kernels.time_shards_solve)."""


class CountedShards(TimeShards):
    """A rank in the middle of ``size``. Gives tensors of the shapes that the real one gives."""

    def __init__(self, size: int) -> None:
        # No super().__init__, which asks a process group.
        self.group, self.size, self.rank = None, size, 1
        self.bytes_sent: dict[str, int] = {}
        self._under_way = []

    @property
    def last(self) -> bool:
        """As the ranks that send most: none but the first of two is the last."""
        return False

    def gather(self, kind: str, *tensors: Tensor) -> Message:
        flat = torch.cat([x.detach().flatten() for x in tensors])
        self.count(kind, flat, self.size - 1)
        parts = torch.stack([torch.empty_like(flat) for _ in range(self.size)])
        pieces = parts.split([x.numel() for x in tensors], 1)
        return Message([], lambda: [piece.unflatten(1, x.shape) for piece, x in zip(pieces, tensors, strict=True)])

    def pass_on(self, kind: str, tensor: Tensor, offset: int) -> Message:
        self.count(kind, tensor)
        return Message([], lambda: torch.empty_like(tensor, memory_format=torch.contiguous_format))

    def _add(self, **sizes: int) -> None:
        for kind, size in sizes.items():
            self.bytes_sent[kind] = self.bytes_sent.get(kind, 0) + size

    def solve(self, *arguments: Any, **options: Any) -> Trajectory:
        solved = paralm_kernels.solve(*arguments, **{**options, "state": None})
        size, (batch, channel) = len(solved.final), solved.final[0].shape
        part = batch * channel * solved.final[0].element_size()
        others, again = self.size - 1, ROUNDS - 1
        each = (size * size + 2 * size) * part * others
        self._add(guess=size * part, states=again * each, agreement=again * 8 * others)
        states = _Counted.apply(lambda: self._add(cotangents=each), *solved.states)
        return replace(solved, states=tuple(states))

    def hand_on(self, kind: str, *tensors: Tensor) -> Tensor:
        for tensor in tensors:
            self.count(kind, tensor)
        return anchor(tensors[0])

    def take_over(self, kind: str, zero: Tensor | None, *like: Tensor) -> tuple[Tensor, ...]:
        learning = [leaf for leaf in like if leaf.is_floating_point()]

        def sent_back() -> None:
            for leaf in learning:
                self.count(f"{kind}, gradient", leaf)

        begin = anchor(like[0]) if zero is None else zero
        counted = iter(_Counted.apply(sent_back, *(leaf + begin.to(leaf.dtype) for leaf in learning)))
        return tuple(next(counted) if leaf.is_floating_point() else leaf for leaf in like)


class _Counted(torch.autograd.Function):
    """Tensors whose gradients a rank sends: so often as it computes them, however often it computes the tensors."""

    @staticmethod
    def forward(ctx: Any, sent: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sent = sent
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.sent()
        return None, *grads
