"""RMSNorm, y = x / √(mean(x²) + eps) ⊙ w (Zhang & Sennrich 2019), plain and gated: RMSNorm(x) ⊙ SiLU(g); and LayerNorm
(Ba et al. 2016) within each head.

Statistics are taken in at least float32 whatever the input's dtype; the result has the weight's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from paralm_kernels import gated_norm
from torch import Tensor, nn

from paralm.models.functional import fused, rms_norm
from paralm.models.parameters import constant, declare


class RMSNorm(nn.Module):
    """RMSNorm over the last axis with a learned scale, which starts at 1."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size))
        declare(self, "weight", constant(1.0), decay=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) of any floating dtype → the same shape in the weight's dtype."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) ⊙ SiLU(gate): the norm first, then the gate (the order of the ParaRNN block)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """(..., size) and (..., size) → (..., size) in the weight's dtype."""
        return rms_norm(x, self.weight, self.eps, gate)


class HeadLayerNorm(nn.Module):
    """w ⊙ (x − mean) / √(var + eps) within each head, w (head · width) starting at 1: a group norm without bias."""

    def __init__(self, n_heads: int, d_head: int, eps: float) -> None:
        super().__init__()
        self.n_heads, self.d_head, self.eps = n_heads, d_head, eps
        self.weight = nn.Parameter(torch.empty(n_heads * d_head))
        declare(self, "weight", constant(1.0), decay=False)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """(batch, time, head, d_head) of any floating dtype → (batch, time, head · d_head) in the weight's dtype, times
        σ(gate), (batch, time, head · d_head), if given."""
        form: dict[str, Any] = {"groups": self.n_heads, "centred": True, "activation": "sigmoid"}
        method = "auto" if fused(x.select(-2, 0)) else "torch"  # a token's heads are one row
        return gated_norm(x.flatten(-2), self.weight, self.eps, gate, **form, method=method)

    def extra_repr(self) -> str:
        return f"{self.n_heads} × {self.d_head}, eps={self.eps}"
