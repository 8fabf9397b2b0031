"""Rotary positions: the pairs (i, i + d/2) of a head turned by position · θ^(−2i/d) (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused
from .errors import ArgumentError
from .once import once_differentiable


def rotary_angles(position: Tensor, d_head: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at int positions (batch, time) → (batch, time, 1, d_head/2) in at least float32; the
    angle itself is in float64, which a long position needs."""
    half = torch.arange(d_head // 2, device=position.device, dtype=torch.float64)
    angle = position[..., None, None] * theta ** (-half / (d_head // 2))
    wide = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(wide), angle.sin().to(wide)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, method: str = "auto") -> Tensor:
    """The pairs of x turned, computed in the dtype of the angles and rounded once.

    ``x``: (batch, time, head, d_head), any floating dtype; ``cos``, ``sin``: (batch or 1, time, 1, d_head/2), see
    :func:`rotary_angles`. ``method``: "triton" needs a GPU and is differentiable once, in x; "auto" takes it where it
    can. → the same shape and dtype. Raises ArgumentError, one line.
    """
    by_kernels = fused.taken(x, method, "triton_norm", "rotate")
    batch, time, _, d_head = x.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        if d_head % 2 or angles.shape not in [(n, time, 1, d_head // 2) for n in (1, batch)]:
            raise ArgumentError(f"rotate: {name} is {tuple(angles.shape)} and x is {tuple(x.shape)}")
    if not by_kernels:
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    y: Tensor = _Rotate.apply(x, cos, sin)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y: Tensor = fused.kernels("triton_norm", "rotate: ").rotated(x, cos, sin, back=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return fused.kernels("triton_norm", "rotate: ").rotated(grad, *ctx.saved_tensors, back=True), None, None
