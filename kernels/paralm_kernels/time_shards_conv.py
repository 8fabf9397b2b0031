"""The short convolution over time shards: one message to the rank after, which travels while the part is computed.

Only the first K − 1 outputs of a part need the inputs before it. So the last inputs are sent, the outputs of the whole
part computed, and those few computed again once the inputs of the rank before have come. Backward likewise: what the
first outputs give to the inputs before them is sent, the part's gradients computed, and what the rank after sends added
to the last inputs'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import conv, fused
from .errors import ArgumentError
from .time_shards import anchor

if TYPE_CHECKING:
    from .time_shards import TimeShards


def conv_sharded(
    shards: TimeShards, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`paralm_kernels.causal_conv` of a sequence of which every rank holds a part. A part has at least as many steps as
    the convolution looks back; ArgumentError otherwise."""
    dtype = conv.check(x, weight, bias, state, reset)
    reach = weight.shape[1] - 1
    if x.shape[1] < reach:
        raise ArgumentError(
            f"causal_conv over time shards: this rank's part has {x.shape[1]} steps, the convolution looks back "
            f"{reach}; use fewer time shards or longer sequences"
        )
    if reach == 0:
        return conv.causal_conv(x, weight, bias, state, reset)
    state, bias = conv.zeros_for(x, weight, bias, state if shards.first else None)
    result: tuple[Tensor, Tensor] = _Conv.apply(
        shards, reset, dtype, fused.by_default(x), anchor(x), x, weight, bias, state
    )
    return result


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shards: TimeShards,
        reset: Tensor | None,
        dtype: torch.dtype,
        by_kernels: bool,
        _: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, weight, bias, state = tensors
        geometry = conv.Geometry(x, weight.shape[1], reset)
        tail = conv.tail_of(x, state, geometry)
        message = shards.pass_on("convolution", tail, 1)
        y = conv.outputs(x, weight, bias, state, geometry, dtype, by_kernels)
        before = message.taken()
        if before is None:
            before = state
        else:
            first, small = _first_steps(x, weight, reset)
            y[:, : first.shape[1]] = conv.outputs(first, weight, bias, before, small, dtype, by_kernels)
        ctx.save_for_backward(x, weight, bias, before, reset)
        ctx.shards, ctx.dtype, ctx.by_kernels = shards, dtype, by_kernels
        ctx.set_materialize_grads(False)
        return y, tail

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_tail: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, before, reset = ctx.saved_tensors
        shards, how = ctx.shards, (ctx.dtype, ctx.by_kernels)
        if shards.first:  # nobody needs it
            to_before = torch.zeros(before.shape, dtype=ctx.dtype, device=before.device)
        else:
            first, small = _first_steps(x, weight, reset)
            at_first = None if grad_y is None else grad_y[:, : first.shape[1]]
            to_before = conv.gradients(first, weight, bias, before.to(ctx.dtype), small, at_first, None, *how)[3]
        message = shards.pass_on("convolution, gradient", to_before, -1)
        geometry = conv.Geometry(x, weight.shape[1], reset)
        grads = conv.gradients(x, weight, bias, before, geometry, grad_y, None, *how)
        tail, last = message.taken(), grads[0][:, x.shape[1] - before.shape[1] :]
        if grad_tail is not None:
            tail = grad_tail.to(ctx.dtype) if tail is None else tail + grad_tail
        if tail is not None:
            dropped = geometry.dropped()
            last.copy_(last + (tail if dropped is None else tail.masked_fill(dropped, 0.0)))
        return (None,) * 5 + grads[:3] + (grads[3] if shards.first else None,)


def _first_steps(x: Tensor, weight: Tensor, reset: Tensor | None) -> tuple[Tensor, conv.Geometry]:
    """The steps that see what was before the part."""
    taps = weight.shape[1]
    first = x[:, : taps - 1]
    return first, conv.Geometry(first, taps, None if reset is None else reset[:, : taps - 1])
