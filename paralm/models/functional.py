"""Elementwise and block-diagonal pieces with a forward and backward of their own.

    rms_norm(x) = x / √(mean(x²) + eps) ⊙ w          gated: rms_norm(x) ⊙ SiLU(g)
    swiglu([a, b]) = SiLU(a) ⊙ b                     block_diagonal(v)_k = v B_kᵀ + b_k,  B_k block-diagonal over heads

Autograd over the composites makes two to four times the passes over memory and keeps more for the backward, which on
a CPU costs as much as a matrix product. Nothing here is an approximation: the tests hold each against its composite.
"""

from __future__ import annotations

from typing import Any

import paralm_kernels
import torch
import torch.nn.functional as F
from paralm_kernels import gated_norm
from paralm_kernels.dry import on_gpu
from paralm_kernels.once import once_differentiable
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


FEW = 32
"""Rows, as of decoding, of which a kernel of ours would take its host longer than torch's few."""


def fused(x: Tensor) -> bool:
    """Whether norms and gates of a tensor are left to the kernels of a GPU (torch's compiler fuses the composites)."""
    return on_gpu(x) and x.shape[:-1].numel() >= FEW and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """RMSNorm over the last axis, times SiLU(gate) if given; statistics in at least float32.

    ``x``, ``gate``: (..., size) of any floating dtype; ``weight``: (size,). The result has the weight's dtype.
    """
    if fused(x):
        return gated_norm(x, weight, eps, gate)
    wide = _wide(x.dtype)
    plain = weight.dtype == wide and x.dtype == wide and (gate is None or gate.dtype == wide)
    if plain and x.device.type == "cpu" and not torch.compiler.is_compiling():
        normed: Tensor = _RMSNorm.apply(x.contiguous(), weight, gate, eps)
        return normed
    # Torch's compiler fuses this; in low precision on a CPU speed is nobody's concern.
    y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    return (y if gate is None else y * F.silu(gate.to(wide))).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """With n = x ⊙ rstd and u = dL/d(n ⊙ w) ⊙ w:  dx = rstd (u − n mean(u ⊙ n)),  dw = Σ dL/d(n ⊙ w) ⊙ n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, gate, rstd)
        y = torch.mul(x, rstd).mul_(weight)
        return y if gate is None else y.mul_(F.silu(gate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, rstd = ctx.saved_tensors
        d_gate = None
        if gate is not None:
            y = torch.mul(x, rstd).mul_(weight).mul_(grad)
            d_gate = torch.ops.aten.silu_backward(y, gate)
            grad = torch.mul(grad, F.silu(gate), out=y)  # y has served its purpose
        size = x.shape[-1]
        products = (x * grad).view(-1, size)  # contiguous, as x is
        d_weight = torch.mv(products.t(), rstd.view(-1))
        # mean(u ⊙ n) rstd, a matrix–vector product because w is the same in every row
        slope = torch.mv(products, weight).view_as(rstd).mul_(rstd.square()).div_(size)
        d_x = torch.mul(grad, weight, out=products.view_as(x))
        d_x.addcmul_(x, slope, value=-1.0).mul_(rstd)
        return d_x, d_weight, d_gate, None


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(a) ⊙ b of (..., 2 n) = [a, b] → (..., n). Keeps only its input for the backward."""
    if fused(gate_up):
        return paralm_kernels.swiglu(gate_up)
    if torch.compiler.is_compiling():  # which fuses the composite, and cannot write into parts of a tensor
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    product: Tensor = _SwiGLU.apply(gate_up)
    return product


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        d_gate, d_up = result.chunk(2, dim=-1)
        scratch = grad * up
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=d_gate)
        torch.ops.aten.silu.out(gate, out=scratch)
        torch.mul(grad, scratch, out=d_up)
        return result


def block_diagonal(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Several block-diagonal maps of one input.

    ``x``: (batch, time, channel); ``weight``: (maps, heads, out, in), heads × in = heads × out = channel; ``bias``:
    (maps, channel). Returns one contiguous (batch, time, channel) for each map.
    """
    maps: tuple[Tensor, ...] = _BlockDiagonal.apply(x, weight, bias)
    return maps


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(batch, time, channel) → a view (heads, batch · time, channel/heads)."""
    return x.reshape(-1, heads, x.shape[-1] // heads).transpose(0, 1)


class _BlockDiagonal(torch.autograd.Function):
    """One batched product for all maps of all heads; the bias is added on the way back to (batch, time, channel)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        maps, heads, out, inner = weight.shape
        stacked = weight.permute(1, 3, 0, 2).reshape(heads, inner, maps * out)
        products = torch.bmm(_by_head(x, heads), stacked).view(heads, -1, maps, out)
        results = []
        for k in range(maps):
            result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            torch.add(products[:, :, k].transpose(0, 1), bias[k].view(heads, out), out=result.view(-1, heads, out))
            results.append(result)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        maps, heads, out, inner = weight.shape
        grad = torch.stack([_by_head(g, heads) for g in grads], dim=2).view(heads, -1, maps * out)
        stacked = weight.permute(1, 0, 2, 3).reshape(heads, maps * out, inner)
        d_x = torch.bmm(grad, stacked).transpose(0, 1).reshape(x.shape)
        d_stacked = torch.bmm(grad.transpose(1, 2), _by_head(x, heads))
        d_weight = d_stacked.view(heads, maps, out, inner).transpose(0, 1)
        d_bias = torch.stack([g.sum((0, 1)) for g in grads])
        return d_x, d_weight, d_bias
