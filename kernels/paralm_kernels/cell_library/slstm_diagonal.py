"""sLSTM (xLSTM, arXiv 2405.04517) with per-channel recurrent weights: exponential input gate, normaliser, no overflow.

The paper, with pre-activations î = x_i + r_i h_ and likewise f̂, ẑ, ô, from c = n = 0 and m = −∞:

    m = max(log σ(f̂) + m_, î)   c = e^{log σ(f̂)+m_−m} c_ + e^{î−m} tanh ẑ   n = e^{log σ(f̂)+m_−m} n_ + e^{î−m}
    h = σ(ô) c/n

Only c/n and the true normaliser N = n e^m matter; m is there to keep numbers small. So the state here is the logarithm
of the normaliser, ℓ = log N, and the normalised cell y = c/n, and the same recurrence is a gated average:

    e = log σ(f̂) + ℓ_ − î       how much the past outweighs this step
    ℓ = î + log(1 + eᵉ)          y = σ(e) y_ + σ(−e) tanh ẑ          h = σ(ô) y

Nothing overflows (ℓ is of the size of î), y and h have a box, and the Jacobian is 3×3 instead of 4×4. At the start
N = 0, that is ℓ = −∞, but a state starts, and is reset, at zero. The component `s` is therefore ℓ in a coordinate in
which zero is −∞: s = 1 + ℓ for ℓ ≥ 0 and 1/(1 − ℓ) below, smooth to the first order, with ℓ's own accuracy. What is
below 10⁻⁶ reads as ℓ = 1 − 10⁶: then σ(−e) rounds to one, y = tanh ẑ and ℓ = î exactly as from −∞, and no gradient
passes.
"""

import torch
import torch.nn.functional as F

from ..cell import Cell, Tensors, register

_START = 1e-6
"""Any s below stands for a fresh start; also s < 0, which only a wild iterate of Newton's method has."""


@register
class SLSTMDiagonal(Cell):
    name = "slstm_diagonal"
    state = ("s", "y", "h")
    inputs = ("x_i", "x_f", "x_z", "x_o")
    params = ("r_i", "r_f", "r_z", "r_o")
    picard = 3
    free_state = False

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (s, y, h), (x_i, x_f, x_z, x_o), (r_i, r_f, r_z, r_o) = state, inputs, params
        i = x_i + r_i * h
        e = F.logsigmoid(x_f + r_f * h) + log_normaliser(s) - i
        # both gates, not one and its complement: near a fresh start 1 − σ(−e) would lose all digits of a small σ(e)
        y = torch.sigmoid(e) * y + torch.sigmoid(-e) * torch.tanh(x_z + r_z * h)
        return coordinate(i - F.logsigmoid(-e)), y, torch.sigmoid(x_o + r_o * h) * y

    def box(self, state: Tensors) -> tuple[torch.Tensor | None, ...]:
        bound = state[1].abs().clamp(min=1)
        return None, bound, bound


def log_normaliser(s: torch.Tensor) -> torch.Tensor:
    """ℓ of the coordinate s; 1 − 10⁶ at a fresh start."""
    return torch.where(s >= 1, s - 1, 1 - 1 / s.clamp(min=_START, max=1))


def coordinate(log_n: torch.Tensor) -> torch.Tensor:
    """s of ℓ, above 0."""
    return torch.where(log_n >= 0, 1 + log_n, 1 / (1 - log_n.clamp(max=0)))
