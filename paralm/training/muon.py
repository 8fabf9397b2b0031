"""Muon's update of matrices that are cut over ranks: pieces to an owner, Newton–Schulz there, pieces back.

Every matrix of a flat tensor has one owner among the ranks, chosen so that the work is even. One all-to-all brings
the owners their pieces, another brings the updates back: 2 n/W elements sent by each of W ranks for n in all, and no
rank holds more than its share of whole matrices and the pieces it was cut.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from paralm.training.fragments import Fragment

# The quintic of Jordan et al. (2024): slope 3.44 at 0, and values near 1 for singular values up to 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def newton_schulz(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Singular values towards 1, the singular vectors kept: float32 (…, rows, columns) → the same.

    The products are in bf16 on a device, where it loses nothing that matters (the quintic is only rough), and in
    float32 on a CPU.
    """
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).float()


def orthogonalized_update(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """0.2 √max(rows, columns) · NS(matrix): an update of RMS about 0.2, as AdamW's is (arXiv 2502.16982)."""
    return newton_schulz(matrix, steps) * (0.2 * math.sqrt(max(matrix.shape[-2:])))


class MatrixUpdate:
    """The exchange for one flat tensor. Building and calling it are collective.

    ``fragments``: this rank's, of parameters with two or more dimensions; the last two are the matrix's, those
    before count matrices. ``device``: where the products are made (the pieces may be offloaded). ``whole``: every
    rank has all of it (stage 0), and makes the update itself. ``maps``: of parameters that are several maps below
    each other, the rows of each.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        whole: bool = False,
        maps: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.device = device
        self.rank, self.world_size = (0, 1) if whole else (dist.get_rank(), dist.get_world_size())
        self.mine = [(f.name, f.offset, f.numel) for f in fragments]
        everyone: list[list[tuple[str, int, int]]] = [self.mine]
        if self.world_size > 1:
            everyone = [[] for _ in range(self.world_size)]
            dist.all_gather_object(everyone, self.mine)
        names = sorted({name for part in everyone for name, _, _ in part})
        self.shapes = {name: shapes[name] for name in names}
        self.maps = {name: (maps or {}).get(name) or shapes[name][-2:-1] for name in names}
        self.owner = _owners(self.shapes, self.maps, self.world_size)
        # What goes where, in an order both sides know: by owner, then by (name, offset).
        self.order = sorted(range(len(self.mine)), key=lambda i: (self.owner[self.mine[i][0]], self.mine[i]))
        self.sent = [sum(n for name, _, n in self.mine if self.owner[name] == r) for r in range(self.world_size)]
        self.arriving = [sorted(piece for piece in part if self.owner[piece[0]] == self.rank) for part in everyone]
        self.received = [sum(n for _, _, n in part) for part in self.arriving]

    def __call__(
        self, pieces: Sequence[torch.Tensor], update: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """``update`` of the whole maps, cut as ``pieces`` are (1-D, in the order of the fragments)."""
        device, dtype = self.device, torch.float32
        outgoing = torch.cat([pieces[i] for i in self.order]) if pieces else torch.empty(0)
        outgoing = outgoing.to(device, dtype)
        incoming = torch.empty(sum(self.received), device=device, dtype=dtype)
        self._exchange(incoming, outgoing, self.received, self.sent)
        whole = {
            name: torch.empty(math.prod(shape), device=device, dtype=dtype)
            for name, shape in self.shapes.items()
            if self.owner[name] == self.rank
        }
        at = 0
        for name, offset, numel in (piece for part in self.arriving for piece in part):
            whole[name][offset : offset + numel] = incoming[at : at + numel]
            at += numel
        for name, flat in whole.items():
            made = [update(part) for part in flat.view(self.shapes[name]).split(self.maps[name], dim=-2)]
            flat.copy_(torch.cat(made, dim=-2).reshape(-1))
        at = 0
        for name, offset, numel in (piece for part in self.arriving for piece in part):
            incoming[at : at + numel] = whole[name][offset : offset + numel]
            at += numel
        self._exchange(outgoing, incoming, self.sent, self.received)
        found = dict(zip(self.order, outgoing.split([self.mine[i][2] for i in self.order]), strict=True))
        return [found[i].to(piece.device) for i, piece in enumerate(pieces)]

    def _exchange(self, into: torch.Tensor, source: torch.Tensor, into_sizes: list[int], sizes: list[int]) -> None:
        if self.world_size == 1:
            into.copy_(source)
        else:
            dist.all_to_all_single(into, source, into_sizes, sizes)


def _owners(shapes: Mapping[str, tuple[int, ...]], maps: Mapping[str, Sequence[int]], ranks: int) -> dict[str, int]:
    """An owner for each matrix: the dearest first, each to the rank with the least work so far."""

    def work(name: str) -> int:
        *count, _, columns = shapes[name]
        return math.prod(count) * sum(rows * columns * min(rows, columns) for rows in maps[name])

    loads = [(0, rank) for rank in range(ranks)]
    owner = {}
    for name in sorted(shapes, key=lambda n: (-work(n), n)):
        load, rank = heapq.heappop(loads)
        owner[name] = rank
        heapq.heappush(loads, (load + work(name), rank))
    return owner
