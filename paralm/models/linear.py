"""Linear maps without surprises: no bias, and an initial scale stated where they are made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paralm.models.parameters import declare, linear_std, normal


class Linear(nn.Module):
    """y = x Wᵀ, W (out, in) normal with standard deviation ``std`` (default √(2/(5 in)))."""

    def __init__(self, in_features: int, out_features: int, std: float | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        declare(self, "weight", normal(linear_std(in_features) if std is None else std), decay=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"  # the weight may be elsewhere (ZeRO-3)
