"""Linear maps without surprises: no bias, and an initial scale stated where they are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paralm.models.parameters import declare, linear_std, normal


class Linear(nn.Module):
    """y = x Wᵀ, W (out, in) normal with standard deviation ``std`` (default √(2/(5 in))).

    ``out_features``: of several maps of one x, whose rows lie below each other in W, those of each.
    """

    def __init__(self, in_features: int, out_features: int | Sequence[int], std: float | None = None) -> None:
        super().__init__()
        self.maps = () if isinstance(out_features, int) else tuple(out_features)
        self.in_features = in_features
        self.out_features = out_features if isinstance(out_features, int) else sum(out_features)
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features))
        start = normal(linear_std(in_features) if std is None else std)
        declare(self, "weight", start, decay=True, maps=self.maps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"  # the weight may be elsewhere (ZeRO-3)
