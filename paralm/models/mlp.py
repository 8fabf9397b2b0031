"""SwiGLU: y = W_down (SiLU(W_gate x) ⊙ W_up x) (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor, nn

from paralm.config import MLPConfig
from paralm.models.functional import swiglu
from paralm.models.linear import Linear
from paralm.models.parameters import output_std, wang_std


def default_d_ff(d_model: int) -> int:
    """8/3 d_model, which gives as many parameters as a plain MLP of 4 d_model, rounded up to 64."""
    return -(-8 * d_model // (3 * 64)) * 64


class SwiGLU(nn.Module):
    """The feed-forward half of a block. Gate and up share one matrix: rows [0, d_ff) are the gate."""

    def __init__(self, config: MLPConfig, d_model: int, n_layers: int) -> None:
        super().__init__()
        self.d_ff = config.d_ff or default_d_ff(d_model)
        self.gate_up = Linear(d_model, (self.d_ff, self.d_ff))
        std = wang_std(d_model, n_layers) if config.down_init == "wang" else output_std(self.d_ff, n_layers)
        self.down = Linear(self.d_ff, d_model, std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)."""
        return self.down(swiglu(self.gate_up(x)))
