"""The plain recurrent network (Elman, Finding Structure in Time, 1990) with a recurrent weight per channel.

h = tanh(a h_ + x)
"""

import torch

from ..cell import Cell, Tensors, register


@register
class Tanh(Cell):
    name = "tanh"
    state = ("h",)
    inputs = ("x",)
    params = ("a",)

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        return (torch.tanh(params[0] * state[0] + inputs[0]),)

    def box(self, state: Tensors) -> tuple[float]:
        return (1.0,)
