"""Where tokens are in sequences that resets cut."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(carried: Tensor, reset: Tensor | None, time: int) -> Tensor:
    """(batch, time): how far each token is from its start; ``carried`` (batch,): tokens read before; ``reset`` bool
    (batch, time) or None."""
    index = torch.arange(time, device=carried.device)
    position = carried[:, None] + index
    if reset is None:
        return position
    start = torch.where(reset, index, -1).cummax(dim=1).values
    return torch.where(start >= 0, index - start, position)
