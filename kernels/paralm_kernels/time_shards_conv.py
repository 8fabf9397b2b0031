"""The short convolution over time shards: one message to the rank after, which travels while the part is computed.

Only the first K − 1 outputs of a part need the inputs before it. So the last inputs are sent, the outputs of the whole
part computed, and those few computed again once the inputs of the rank before have come. Backward likewise: what the
first outputs give to the inputs before them is sent, the part's gradients computed, and what the rank after sends added
to the last inputs'.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import conv, fused
from .errors import ArgumentError
from .once import once_differentiable
from .time_shards import anchor

if TYPE_CHECKING:
    from .time_shards import TimeShards


def conv_sharded(
    shards: TimeShards,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
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
        call = conv.Call(x, weight, bias, state, reset, dtype, by_kernels)
        tail = conv.tail_of(x, state, call.geometry)
        message = shards.pass_on("convolution", tail, 1)
        y = call.outputs()
        before = message.taken()
        if before is None:
            before = state
        else:
            y[:, : before.shape[1]] = _first_steps(replace(call, state=before)).outputs()
        ctx.save_for_backward(x, weight, bias, before, reset)
        ctx.shards, ctx.dtype, ctx.by_kernels = shards, dtype, by_kernels
        ctx.set_materialize_grads(False)
        return y, tail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_tail: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, before, reset = ctx.saved_tensors
        shards, call = ctx.shards, conv.Call(x, weight, bias, before, reset, ctx.dtype, ctx.by_kernels)
        before = before.to(ctx.dtype)
        reach = before.shape[1]
        to_before: Tensor | None = torch.zeros_like(before)
        if not shards.first:  # nobody needs it
            first = _first_steps(replace(call, state=before))
            to_before = first.gradients(None if grad_y is None else grad_y[:, :reach], None)[3]
        assert to_before is not None
        message = shards.pass_on("convolution, gradient", to_before, -1)
        grads = call.gradients(grad_y, None, of_state=shards.first and ctx.needs_input_grad[8])
        tail, last = message.taken(), grads[0][:, x.shape[1] - reach :]
        if grad_tail is not None:
            tail = grad_tail.to(ctx.dtype) if tail is None else tail + grad_tail
        if tail is not None:
            dropped = call.geometry.dropped()
            last.copy_(last + (tail if dropped is None else tail.masked_fill(dropped, 0.0)))
        return (None,) * 5 + grads


def _first_steps(call: conv.Call) -> conv.Call:
    """The steps that see what was before the part."""
    reach = call.state.shape[1]
    return replace(call, x=call.x[:, :reach], reset=None if call.reset is None else call.reset[:, :reach])
