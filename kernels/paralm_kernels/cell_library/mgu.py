"""The minimal gated unit (MGU, arXiv 1603.09420) with per-channel recurrent weights: one gate forgets and resets.

f = σ(a_f h_ + x_f)   c = tanh(a_h f h_ + x_h)   h = (1−f) h_ + f c

Both gates read h_, so it is a nonlinear recurrence. (minGRU and minLSTM, arXiv 2410.01201, have gates of x alone:
theirs are linear in h_ and need no more than `diagonal_scan`.)
"""

import torch

from ..cell import Cell, Tensors, register


@register
class MGU(Cell):
    name = "mgu"
    state = ("h",)
    inputs = ("x_f", "x_h")
    params = ("a_f", "a_h")

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (h,), (x_f, x_h), (a_f, a_h) = state, inputs, params
        f = torch.sigmoid(a_f * h + x_f)
        c = torch.tanh(a_h * f * h + x_h)
        return (h + f * (c - h),)  # (1−f) h + f c with one operation fewer

    def box(self, state: Tensors) -> tuple[torch.Tensor, ...]:
        return (state[0].abs().clamp(min=1),)
