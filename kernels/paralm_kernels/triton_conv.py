"""Launches the convolution's kernels: forward in one, backward in one, and what is small in torch.

Deterministic: every program writes its own sums of the weights' gradients, and they are added in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_conv_kernels import conv_backward_kernel, conv_kernel
from .triton_launch import COMPUTE, Launch, on_device

BLOCK_TIME, BLOCK_CHANNELS, WARPS = 32, 64, 4
BACK_TIME = 16
"""Steps that backward has at a time: of twice as many, half of the programs find room on a multiprocessor."""
PROGRAMS = 2048
"""Backward, a program has more than one block of time beyond so many, and one set of sums for all of them."""


class ConvKernels:
    """The arguments that both kernels share. x: (batch, time, channel) of any strides; state (batch, taps − 1,
    channel); ids: int32 (batch, time), the sequence a step belongs to, or None for one; dtype: to compute in."""

    def __init__(self, x: Tensor, weight: Tensor, state: Tensor, ids: Tensor | None, dtype: torch.dtype) -> None:
        self.x = x if x.stride(2) == 1 else x.contiguous()
        self.weight, self.state = weight.contiguous(), state.contiguous()
        self.ids = ids
        self.batch, self.time, self.channels = x.shape
        self.steps = triton.cdiv(self.time, BLOCK_TIME)
        self.dtype = dtype
        self.common: dict[str, Any] = {
            "x_ptr": self.x,
            "weight_ptr": self.weight,
            "state_ptr": self.state if self.state.numel() else self.x,
            "ids_ptr": self.x if self.ids is None else self.ids,
            "time": self.time,
            "steps": self.steps,
            "channels": self.channels,
            "stride_batch": self.x.stride(0),
            "stride_time": self.x.stride(1),
            "TAPS": weight.shape[1],
            "HAS_RESET": ids is not None,
            "COMPUTE": COMPUTE[dtype],
            "BLOCK_T": BLOCK_TIME,
            "BLOCK_C": BLOCK_CHANNELS,
            "num_warps": WARPS,
        }

    @property
    def _grid(self) -> tuple[int, int]:
        return self.batch * self.steps, triton.cdiv(self.channels, BLOCK_CHANNELS)

    def forward(self, bias: Tensor | None) -> Tensor:
        """y, contiguous, in the dtype of x."""
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        with on_device(self.x.device):
            conv_kernel[self._grid](
                y_ptr=y,
                bias_ptr=self.x if bias is None else bias.contiguous(),
                HAS_BIAS=bias is not None,
                **self.common,
            )
        return y

    def backward(self, grad: Tensor, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x by y alone (``wide``: in the compute dtype, to be added to), of the weight, (channel,
        taps), and of the bias, the last two in the compute dtype."""
        across = triton.cdiv(self.channels, BLOCK_CHANNELS)
        steps = triton.cdiv(self.time, BACK_TIME)
        blocks = max(1, min(steps, self.batch * steps * across // PROGRAMS))
        steps = triton.cdiv(steps, blocks)
        programs = self.batch * steps
        to_x = torch.empty(self.x.shape, dtype=self.dtype if wide else self.x.dtype, device=self.x.device)
        taps = self.common["TAPS"]
        to_weight = torch.empty((programs, taps, self.channels), dtype=self.dtype, device=self.x.device)
        to_bias = torch.empty((programs, self.channels), dtype=self.dtype, device=self.x.device)
        with on_device(self.x.device):
            conv_backward_kernel[programs, across](
                grad_ptr=grad.contiguous(),
                to_x_ptr=to_x,
                to_weight_ptr=to_weight,
                to_bias_ptr=to_bias,
                blocks=blocks,
                BLOCK_TAPS=triton.next_power_of_2(taps),
                **{**self.common, "steps": steps, "BLOCK_T": BACK_TIME},
            )
        return to_x, to_weight.sum(0).t(), to_bias.sum(0)


def default_launches(dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Launch]:
    """Both kernels with four taps and resets, for each dtype of the inputs."""
    launches, multiples = [], ("channels", "stride_batch", "stride_time")
    for given in dtypes:
        compute = tl.float64 if given == "fp64" else tl.float32
        wide = "fp64" if given == "fp64" else "fp32"
        constants = {"TAPS": 4, "HAS_BIAS": True, "HAS_RESET": True, "COMPUTE": compute}
        constants |= {"BLOCK_C": BLOCK_CHANNELS, "BLOCK_TAPS": 4}
        for kernel, block in ((conv_kernel, BLOCK_TIME), (conv_backward_kernel, BACK_TIME)):
            constants["BLOCK_T"] = block
            signature = {}
            for name in kernel.arg_names:
                other = {"ids_ptr": "*i32", "to_weight_ptr": f"*{wide}", "to_bias_ptr": f"*{wide}"}.get(
                    name, f"*{given}"
                )
                signature[name] = "constexpr" if name.isupper() else other if name.endswith("_ptr") else "i32"
            chosen = {name: constants[name] for name in signature if name.isupper()}
            aligned = tuple(name for name in signature if name.endswith("_ptr") or name in multiples)
            launches.append(Launch(f"{kernel.__name__} {given}", kernel, signature, chosen, WARPS, aligned=aligned))
    return launches
