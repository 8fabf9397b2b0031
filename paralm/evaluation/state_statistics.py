"""Numbers of a carried state, head by head: how large it is, how spread out, how much of its room it uses.

    norm      ‖h‖                         extreme   max |h_i|            mean, variance   over a head's elements
    rank      exp(−Σ p_i ln p_i), p_i = σ_i / Σ σ    effective rank (Roy & Vetterli 2007) of a matrix head, 0 for h = 0
    cosine    h·h' / (‖h‖ ‖h'‖) to the head's state h' at an earlier position; 0 where one of them is 0
    channels  the elements that are largest in |h| on average over streams, by their index in the head, largest first

What a head is a mixer says (:attr:`Mixer.state_leaves`); a leaf it says nothing of is one head. Counters and a
mitigation's own book-keeping are no state of the recurrence and are left out; elements that are not finite (the −∞ of
a stabiliser before anything was read) count as 0. In float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from paralm.models import LanguageModel
from paralm.models.mixers.base import StateLeaf, named_leaves

CHANNELS = 3


class LeafStatistics(BaseModel):
    """One leaf of a layer's state at one checkpoint; every list has one entry a head, norm and extreme one a stream
    within. ``rank``: None where heads are no matrices; ``cosine``: None at the first checkpoints."""

    layer: int
    leaf: str
    norm: list[list[float]]
    extreme: list[list[float]]
    mean: list[float]
    variance: list[float]
    rank: list[float] | None
    cosine: list[float] | None
    channels: list[list[int]]


def state_statistics(model: LanguageModel, state: Any, earlier: Any = None) -> list[LeafStatistics]:
    """Of every leaf of ``state`` (as the model's forward gives it, one row a stream), layer by layer.

    ``earlier``: a state of the same streams, for the cosine. Means are over streams.
    """
    before = dict(_heads(model, earlier)) if earlier is not None else {}
    return [_measured(*where, h, matrix, before.get((*where,))) for where, (h, matrix) in _heads(model, state)]


def _heads(model: LanguageModel, state: Any) -> Iterator[tuple[tuple[int, str], tuple[Tensor, bool]]]:
    """(layer, path) and (streams, heads, …), finite; whether heads are matrices."""
    for layer, (mixer, leaves) in enumerate(zip(model.mixers, state["layers"], strict=True)):
        for path, leaf in named_leaves(leaves):
            name = path.removeprefix("inner/")
            if not leaf.is_floating_point() or "window" in name.split("/"):
                continue
            layout: StateLeaf = mixer.leaf(path)
            h = leaf.unsqueeze(1) if layout.heads is None else leaf.movedim(layout.heads, 1)
            h = h.detach().to(torch.promote_types(h.dtype, torch.float32))
            yield (layer, name), (torch.nan_to_num(h, nan=0.0, posinf=0.0, neginf=0.0), layout.matrix)


def _measured(layer: int, leaf: str, h: Tensor, matrix: bool, before: tuple[Tensor, bool] | None) -> LeafStatistics:
    flat = h.flatten(2)  # (streams, heads, elements)
    norm, size = torch.linalg.vector_norm(flat, dim=-1), flat.abs()
    cosine = None
    if before is not None:
        then = before[0].flatten(2)
        product = norm * torch.linalg.vector_norm(then, dim=-1)
        cosine = torch.where(product > 0, (flat * then).sum(-1) / product.clamp(min=1e-30), 0.0)
    largest = size.mean(0).topk(min(CHANNELS, size.shape[-1]), dim=-1).indices
    return LeafStatistics(
        layer=layer,
        leaf=leaf,
        norm=norm.T.tolist(),
        extreme=size.amax(-1).T.tolist(),
        mean=flat.mean(-1).mean(0).tolist(),
        variance=flat.var(-1, correction=0).mean(0).tolist(),
        rank=effective_rank(h).mean(0).tolist() if matrix else None,
        cosine=None if cosine is None else cosine.mean(0).tolist(),
        channels=largest.tolist(),
    )


def effective_rank(h: Tensor) -> Tensor:
    """exp of the entropy of the normed singular values of the last two axes; 0 for a matrix of zeros.

    The singular values are the roots of the smaller Gram matrix's eigenvalues, in float64: those below 1e-8 of the
    largest, which count for nothing here, are lost.
    """
    wide = h.double()
    if wide.shape[-1] > wide.shape[-2]:
        wide = wide.mT
    squares = torch.linalg.eigvalsh(wide.mT @ wide).clamp(min=0)
    sigma = squares.sqrt()
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.clamp(min=torch.finfo(sigma.dtype).tiny)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(p).sum(-1).exp(), 0.0)
