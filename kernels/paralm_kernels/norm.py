"""RMSNorm and LayerNorm with what stands around them, and SwiGLU: on a GPU one pass over memory each way.

    u = x + D v                        (skip: D a number for some channels each)
    u = u ⊙ act(g)                     (gate_first: Mamba2's order, Dao & Gu, arXiv 2405.21060)
    n = (u − mean) / √(var + eps)      within each of ``groups`` equal runs of channels; the mean only where centred
    y = n ⊙ w        y = y ⊙ act(g)    (the gate after the norm)

    swiglu([a, b]) = SiLU(a) ⊙ b       (Shazeer 2020)

act is SiLU or the sigmoid. Statistics and products are in at least float32 and rounded once. What is kept for the
backward are the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .errors import ArgumentError
from .once import once_differentiable

ACTIVATIONS = ("silu", "sigmoid")


@dataclass(frozen=True)
class Form:
    """What is computed; see the module."""

    eps: float
    groups: int = 1
    centred: bool = False
    gate_first: bool = False
    activation: str = "silu"


def gated_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    *,
    skip: tuple[Tensor, Tensor] | None = None,
    groups: int = 1,
    centred: bool = False,
    gate_first: bool = False,
    activation: str = "silu",
    method: str = "auto",
) -> Tensor:
    """The norm over the last axis; see the module for its form.

    ``x``, ``gate``: (..., channels), any floating dtype; ``weight``: (channels,); ``skip``: D, (channels / k,), for k
    channels each that lie side by side, and v, (..., channels). ``method``: "triton" needs a GPU, "torch" computes
    anywhere; "auto" takes "triton" where it can. → (..., channels) in the weight's dtype. Differentiable once in every
    tensor by "triton". Raises ArgumentError, one line.
    """
    form = Form(eps, groups, centred, gate_first, activation)
    _check(x, weight, gate, skip, form, method)
    group = x.shape[-1] // groups
    if method == "triton" and group > _widths(centred)[0]:
        widest = _widths(centred)[0]
        raise ArgumentError(f"gated_norm: groups of {group} channels; method 'triton' takes {widest} at most")
    if not fused.taken(x, method, "triton_norm", "gated_norm") or group > _widths(centred)[0]:
        return _composite(x, weight, gate, skip, form)
    if group > _widths(centred)[1]:
        x, gate, skip = *_before(x.to(_wide(x, weight)), gate, skip, form), None
    d, v = skip or (None, None)
    y: Tensor = _Norm.apply(form, x, weight, gate, d, v)
    return y


def swiglu(gate_up: Tensor, *, method: str = "auto") -> Tensor:
    """SiLU(a) ⊙ b of (..., 2 n) = [a, b] → (..., n), of any floating dtype. ``method``: as in :func:`gated_norm`.
    Raises ArgumentError, one line."""
    if gate_up.shape[-1] % 2:
        raise ArgumentError(f"swiglu: the last axis has {gate_up.shape[-1]} channels, which are not two halves")
    if not fused.taken(gate_up, method, "triton_norm", "swiglu"):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    y: Tensor = _SwiGLU.apply(gate_up)
    return y


def _widths(centred: bool) -> tuple[int, int]:
    """The most channels of a group that the kernels take, and up to which in any form."""
    made = fused.kernels("triton_norm", "gated_norm: ")
    return made.NARROW if centred else made.WIDEST, made.NARROW


def _check(
    x: Tensor, weight: Tensor, gate: Tensor | None, skip: tuple[Tensor, Tensor] | None, form: Form, method: str
) -> None:
    channels = x.shape[-1]
    if weight.shape != (channels,):
        raise ArgumentError(f"gated_norm: weight is {tuple(weight.shape)} and x has {channels} channels")
    for name, other in (("gate", gate), ("skip's v", None if skip is None else skip[1])):
        if other is not None and other.shape != x.shape:
            raise ArgumentError(f"gated_norm: {name} is {tuple(other.shape)} and x is {tuple(x.shape)}")
    if skip is not None and (skip[0].dim() != 1 or not len(skip[0]) or channels % len(skip[0])):
        raise ArgumentError(
            f"gated_norm: skip's D is {tuple(skip[0].shape)}, which does not divide {channels} channels"
        )
    if form.groups < 1 or channels % form.groups:
        raise ArgumentError(f"gated_norm: {form.groups} groups do not divide {channels} channels")
    if form.activation not in ACTIVATIONS:
        raise ArgumentError(f"gated_norm: no activation '{form.activation}' among {', '.join(ACTIVATIONS)}")


def _wide(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _composite(
    x: Tensor, weight: Tensor, gate: Tensor | None, skip: tuple[Tensor, Tensor] | None, form: Form
) -> Tensor:
    """What defines it, in torch."""
    wide = _wide(x, weight)
    u, gate = _before(x.to(wide), gate, skip, form)
    u = u.unflatten(-1, (form.groups, -1))
    within = (u.shape[-1],)
    n = F.layer_norm(u, within, eps=form.eps) if form.centred else F.rms_norm(u, within, eps=form.eps)
    y = n.flatten(-2) * weight.to(wide)
    if gate is not None:
        y = y * _activation(form)(gate.to(wide))
    return y.to(weight.dtype)


def _activation(form: Form) -> Callable[[Tensor], Tensor]:
    return F.silu if form.activation == "silu" else torch.sigmoid


def _before(
    x: Tensor, gate: Tensor | None, skip: tuple[Tensor, Tensor] | None, form: Form
) -> tuple[Tensor, Tensor | None]:
    """u before the norm, in the dtype of x, and the gate that is still to come."""
    if skip is not None:
        d, v = skip
        x = x + d.to(x.dtype).repeat_interleave(x.shape[-1] // len(d)) * v.to(x.dtype)
    if gate is not None and form.gate_first:
        return x * _activation(form)(gate.to(x.dtype)), None
    return x, gate


def _rows(x: Tensor) -> Tensor:
    """(rows, channels), the last axis dense; a view of a part of a wider projection."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _kernels_of(form: Form, x: Tensor, weight: Tensor, gate: Tensor | None, d: Tensor | None, v: Tensor | None) -> Any:
    given = {
        "EPS": form.eps,
        "GATE": 0 if gate is None else 1 + form.gate_first,
        "SIGMOID": form.activation == "sigmoid",
        "CENTRED": form.centred,
        "SKIP": 0 if d is None else x.shape[-1] // len(d),
    }
    skip = None if d is None or v is None else (d, _rows(v))
    made = fused.kernels("triton_norm", "gated_norm: ")
    rows = None if gate is None else _rows(gate)
    return made.NormKernels(_rows(x), rows, weight, skip, form.groups, _wide(x, weight), given)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, form: Form, x: Tensor, weight: Tensor, gate: Tensor | None, d: Tensor | None, v: Tensor | None
    ) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(x, weight, gate, d, v)
        y: Tensor = _kernels_of(form, x, weight, gate, d, v).forward()
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing gives them once
        x, weight, _, d, _ = saved
        to_x, to_gate, to_weight, to_skip = _kernels_of(ctx.form, *saved).backward(_rows(grad))
        to_d, to_v = (None, None) if to_skip is None else (to_skip[0].to(d.dtype), to_skip[1].view(x.shape))
        to_gate = None if to_gate is None else to_gate.view(x.shape)
        return None, to_x.view(x.shape), to_weight.to(weight.dtype), to_gate, to_d, to_v


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        dtype = torch.promote_types(gate_up.dtype, torch.float32)
        y: Tensor = fused.kernels("triton_norm", "swiglu: ").swiglu_forward(_rows(gate_up), dtype)
        return y.view(*gate_up.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        dtype = torch.promote_types(gate_up.dtype, torch.float32)
        made = fused.kernels("triton_norm", "swiglu: ")
        to_x: Tensor = made.swiglu_backward(_rows(gate_up), _rows(grad), dtype)
        return to_x.view(gate_up.shape)
