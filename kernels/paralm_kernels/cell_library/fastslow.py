"""A cell of three components, as proof that nothing here stops at two: a fast state, a slow one, and what is read.

u = tanh(a_u u_ + b h_ + x_u)             fast: overwritten every step, sees what was read before
g = σ(a_v v_ + x_v)   v = (1−g) v_ + g u  slow: a gated average of the fast one
o = σ(a_o h_ + x_o)   h = o tanh(p u + q v)

Every component depends on others, so the Jacobian is a full 3×3 per channel. Our own; no paper.
"""

import torch

from ..cell import Cell, Tensors, register


@register
class FastSlow(Cell):
    name = "fastslow"
    state = ("u", "v", "h")
    inputs = ("x_u", "x_v", "x_o")
    params = ("a_u", "b", "a_v", "a_o", "p", "q")

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (u, v, h), (x_u, x_v, x_o), (a_u, b, a_v, a_o, p, q) = state, inputs, params
        u = torch.tanh(a_u * u + b * h + x_u)
        v = v + torch.sigmoid(a_v * v + x_v) * (u - v)  # (1−g) v + g u
        o = torch.sigmoid(a_o * h + x_o)
        return u, v, o * torch.tanh(p * u + q * v)

    def box(self, state: Tensors) -> tuple[torch.Tensor | float, ...]:
        _, v, _ = state
        return (1.0, v.abs().clamp(min=1), 1.0)
