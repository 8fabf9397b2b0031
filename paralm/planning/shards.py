"""A stand-in for the ranks that share a sequence: counts what this one would send, and answers with its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paralm_kernels
import torch
from paralm_kernels import TimeShards
from paralm_kernels.solve import Trajectory
from torch import Tensor
from torch.utils import _pytree as pytree

ROUNDS = 2
"""Exchanges of a cell's solve: cells that forget are done with one further walk (paralm_kernels.time_shards_solve)."""


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

    def gathered(self, kind: str, *tensors: Tensor) -> list[Tensor]:
        flat = torch.cat([x.detach().flatten() for x in tensors])
        self.count(kind, flat)
        parts = torch.stack([torch.empty_like(flat) for _ in range(self.size)])
        pieces = parts.split([x.numel() for x in tensors], 1)
        return [piece.unflatten(1, x.shape) for piece, x in zip(pieces, tensors, strict=True)]

    def joined(self, kind: str, combine: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = self.gathered(kind, *tensors)
        wide = torch.promote_types(tensors[0].dtype, torch.float32).itemsize
        key = f"{kind}, gradient"
        sent = sum(leaf.numel() for leaf in leaves) * wide
        self.bytes_sent[key] = self.bytes_sent.get(key, 0) + sent
        anchor = sum((x.sum() * 0 for x in tensors), torch.zeros((), device=leaves[0].device))
        return tuple(result + anchor.to(result.dtype) for result in combine(*leaves))

    def largest(self, x: float, device: torch.device) -> float:
        self.bytes_sent["agreement"] = self.bytes_sent.get("agreement", 0) + 8
        return x

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
        solved = paralm_kernels.solve(cell, inputs, params, None, reset, method, **options)
        size, (batch, channel) = len(solved.final), solved.final[0].shape
        each = (size * size + 2 * size) * batch * channel * solved.final[0].element_size()
        for kind, count in (("states", ROUNDS), ("cotangents", 1)):
            self.bytes_sent[kind] = self.bytes_sent.get(kind, 0) + count * each
        self.bytes_sent["agreement"] = self.bytes_sent.get("agreement", 0) + 8 * ROUNDS
        return solved

    def _take_over(self, like: Any, x: Tensor) -> Any:
        return like

    def _hand_on(self, end: Any, y: Tensor) -> Tensor:
        leaves = pytree.tree_leaves(end)
        self.count("relay", *leaves)
        self.count("relay, gradient", *(leaf for leaf in leaves if leaf.is_floating_point()))
        return y
