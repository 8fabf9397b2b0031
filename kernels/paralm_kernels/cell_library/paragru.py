"""ParaGRU (ParaRNN, arXiv 2510.21450): the GRU with per-channel recurrent weights.

z = σ(a_z h_ + x_z)   r = σ(a_r h_ + x_r)   c = tanh(a_h h_ r + x_h)   h = (1−z) h_ + z c
"""

import torch

from ..cell import Cell, Tensors, register


@register
class ParaGRU(Cell):
    name = "paragru"
    state = ("h",)
    inputs = ("x_z", "x_r", "x_h")
    params = ("a_z", "a_r", "a_h")

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (h,), (x_z, x_r, x_h), (a_z, a_r, a_h) = state, inputs, params
        z = torch.sigmoid(a_z * h + x_z)
        r = torch.sigmoid(a_r * h + x_r)
        c = torch.tanh(a_h * h * r + x_h)
        return (h + z * (c - h),)  # (1−z) h + z c with one operation fewer

    def box(self, state: Tensors) -> tuple[torch.Tensor, ...]:
        return (state[0].abs().clamp(min=1),)
