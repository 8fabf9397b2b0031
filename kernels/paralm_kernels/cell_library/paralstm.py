"""ParaLSTM (ParaRNN, arXiv 2510.21450): the LSTM with peepholes, coupled gates and per-channel recurrent weights.

f = σ(a_f h_ + x_f + p_f c_)   g = tanh(a_c h_ + x_c)   c = f c_ + (1−f) g
o = σ(a_o h_ + x_o + p_o c)    h = o tanh(c)            state [c, h]
"""

import torch

from ..cell import Cell, Tensors, register


@register
class ParaLSTM(Cell):
    name = "paralstm"
    state = ("c", "h")
    inputs = ("x_f", "x_c", "x_o")
    params = ("a_f", "a_c", "a_o", "p_f", "p_o")

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (c, h), (x_f, x_c, x_o), (a_f, a_c, a_o, p_f, p_o) = state, inputs, params
        f = torch.sigmoid(a_f * h + x_f + p_f * c)
        g = torch.tanh(a_c * h + x_c)
        c = g + f * (c - g)  # f c + (1−f) g with one operation fewer
        o = torch.sigmoid(a_o * h + x_o + p_o * c)
        return (c, o * torch.tanh(c))

    def box(self, state: Tensors) -> tuple[torch.Tensor | float, ...]:
        c, _ = state
        return (c.abs().clamp(min=1), 1.0)
