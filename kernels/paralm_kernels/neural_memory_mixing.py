"""The coefficients of a neural memory's tile (D, E, G, f, h, β of neural_memory_tile.py) from its gates, and back.

D and E come from sums over the steps between (never a difference of two cumulative sums, which cancels), so that η = 0
and α = 1 are exact zeros and not NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .neural_memory_pointwise import between, between_grad, running, running_grad


class Mixing(NamedTuple):
    """``keep`` β and ``from_momentum`` f (batch, heads, time), ``grads`` G (batch, heads, time, time); of the momentum
    ``persist`` h and ``momentum_grads`` E; ``decay`` D. None where there is no momentum, or no forgetting."""

    keep: Tensor | None
    from_momentum: Tensor | None
    grads: Tensor
    persist: Tensor | None
    momentum_grads: Tensor | None
    decay: Tensor | None


class Ends(NamedTuple):
    """Row ``t`` of :class:`Mixing` for a row's last token in the tile; or gradients to that."""

    keep: Tensor | None
    from_momentum: Tensor | None
    grads: Tensor
    persist: Tensor | None
    momentum_grads: Tensor | None


def mixing(like: Tensor, log_momentum: Tensor | None, log_keep: Tensor | None, compiled: bool) -> Mixing:
    """The coefficients; log η and log(1 − α): (batch, heads, time), None for η = 0 and α = 0, as ``like``."""
    decay = keep = None
    if log_keep is not None:
        decay, keep = between(compiled, log_keep), running(compiled, log_keep)
    if log_momentum is None:
        if decay is None:
            length = like.shape[-1]
            triangle = torch.ones(length, length, dtype=like.dtype, device=like.device).tril()
            return Mixing(None, None, triangle.expand(*like.shape, length), None, None, None)
        return Mixing(keep, None, decay, None, None, decay)
    momentum, persist = between(compiled, log_momentum), running(compiled, log_momentum)
    if decay is None:
        return Mixing(None, persist.cumsum(-1), momentum.cumsum(-2), persist, momentum, None)
    return Mixing(keep, (decay @ persist.unsqueeze(-1)).squeeze(-1), decay @ momentum, persist, momentum, decay)


def last_rows(mix: Mixing, lengths: Tensor | None) -> Ends:
    """Coefficients at the last of ``lengths`` (batch,) tokens; a row of no tokens keeps what it has."""

    def at_last(c: Tensor | None, empty: float) -> Tensor | None:
        if c is None or lengths is None:
            return None if c is None else c.select(2, -1)
        index, none = ((x.reshape(-1, *(1,) * (c.dim() - 1))) for x in ((lengths - 1).clamp(min=0), lengths == 0))
        picked = c.gather(2, index.expand(-1, c.shape[1], 1, *c.shape[3:]))
        return torch.where(none, empty, picked).squeeze(2)

    grads = at_last(mix.grads, 0.0)
    assert grads is not None
    kept = at_last(mix.keep, 1.0), at_last(mix.from_momentum, 0.0)
    return Ends(*kept, grads, at_last(mix.persist, 1.0), at_last(mix.momentum_grads, 0.0))


def mixing_grads(
    mix: Mixing,
    keep: Tensor | None,
    from_momentum: Tensor | None,
    grads: Tensor | None,
    ends: Ends,
    lengths: Tensor | None,
    compiled: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to log η and log(1 − α), from those to β, f and G (None: not used) and to the last rows."""

    def with_last(total: Tensor | None, row: Tensor | None, like: Tensor | None) -> Tensor | None:
        if row is None or like is None:
            return total
        total = torch.zeros_like(like) if total is None else total
        if lengths is None:
            total.select(2, -1).add_(row)
            return total
        places = torch.arange(like.shape[2], device=like.device) == (lengths - 1)[:, None]  # none of an empty row
        return total + torch.where(places.reshape(len(places), 1, -1, *(1,) * (like.dim() - 3)), row.unsqueeze(2), 0.0)

    by_keep = with_last(keep, ends.keep, mix.keep)
    by_rate = with_last(from_momentum, ends.from_momentum, mix.from_momentum)
    by_persist = with_last(None, ends.persist, mix.persist)
    by_decay = by_grads = with_last(grads, ends.grads, mix.grads)
    by_log_momentum = by_log_keep = None
    if mix.momentum_grads is not None and mix.persist is not None:
        assert by_grads is not None
        assert by_rate is not None
        if mix.decay is None:
            summed, more = by_grads.flip(-2).cumsum(-2).flip(-2), by_rate.flip(-1).cumsum(-1).flip(-1)
        else:
            summed = mix.decay.mT @ by_grads
            more = (mix.decay.mT @ by_rate.unsqueeze(-1)).squeeze(-1)
            by_decay = by_grads @ mix.momentum_grads.mT
        by_momentum = with_last(summed, ends.momentum_grads, mix.momentum_grads)
        by_persist = more if by_persist is None else by_persist + more
        by_between = between_grad(compiled, by_momentum, mix.momentum_grads, None, None)
        by_log_momentum = running_grad(compiled, by_between, by_persist, mix.persist)
    if mix.decay is not None:
        outer = (None, None) if by_rate is None else (by_rate, mix.persist)
        by_between = between_grad(compiled, by_decay, mix.decay, *outer)
        by_log_keep = running_grad(compiled, by_between, by_keep, mix.keep)
    return by_log_momentum, by_log_keep
