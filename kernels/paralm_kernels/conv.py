"""The short causal depthwise convolution that stands before a recurrence, with a carried state.

    y_t = b + Σ_{k=0}^{K−1} w_{K−1−k} x_{t−k}        (per channel; w as torch.nn.Conv1d has it, the last tap is now)

Positions before the sequence come from `state`; positions before a reset do not reach positions at or after it. K
shifted multiply–adds on pieces of time that fit the cache: no transpose to (batch, channel, time), and measured
faster than a grouped torch.nn.functional.conv1d on a CPU. On a GPU the fused kernels of triton_conv.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import fused
from .checks import DTYPES, compute_dtype, same_device, shape
from .errors import ArgumentError
from .once import once_differentiable

_CHUNK = 65536
"""Numbers per piece on a CPU; on a device everything is one piece."""


METHODS = ("auto", "torch", "triton")


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The convolution of a sequence, and the state that continues it; differentiable in x, weight, bias and state.

    x: (batch, time, channel), float16, bfloat16, float32 or float64; weight: (channel, K), the last tap on the current
    step; bias: (channel,), zero if None; state: (batch, K−1, channel), the inputs before the sequence, zero if None;
    reset: bool (batch, time), true where a new sequence starts. Returns y like x and the new state, (batch, K−1,
    channel), in the dtype of x, with what a reset has cut off set to zero. Sums are in at least float32. method:
    "torch", "triton" (needs a GPU or Triton's interpreter) or "auto": triton on a GPU. Raises ArgumentError for
    mismatched shapes, dtypes or devices.
    """
    if method not in METHODS:
        raise ArgumentError(f"causal_conv: method is {method!r}; expected one of {', '.join(METHODS)}")
    dtype = check(x, weight, bias, state, reset)
    by_kernels = method == "triton" or (method == "auto" and fused.by_default(x))
    if by_kernels:
        fused.kernels("triton_solver", "causal_conv: ").check_device(x.device)
    state, bias = zeros_for(x, weight, bias, state)
    result: tuple[Tensor, Tensor] = _CausalConv.apply(x, weight, bias, state, reset, dtype, by_kernels)
    return result


def zeros_for(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state and the bias, zeros for None."""
    if state is None:
        state = x.new_zeros((x.shape[0], weight.shape[1] - 1, x.shape[2]))
    return state, weight.new_zeros(x.shape[2]) if bias is None else bias


def check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, reset: Tensor | None) -> torch.dtype:
    given = [("x", x), ("weight", weight), ("bias", bias), ("state", state)]
    present = [(name, value) for name, value in given if value is not None]
    for name, value in present:
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"causal_conv: {name} must be a floating-point tensor, got {kind}")
    if x.ndim != 3 or 0 in x.shape:
        raise ArgumentError(f"causal_conv: x is {tuple(x.shape)}, expected (batch, time, channel), none of them 0")
    batch, time, channel = x.shape
    if weight.ndim != 2 or weight.shape[0] != channel or weight.shape[1] < 1:
        raise ArgumentError(
            f"causal_conv: weight is {tuple(weight.shape)}, expected ({channel}, taps) for x {tuple(x.shape)}"
        )
    if bias is not None:
        shape("causal_conv: bias", bias, (channel,), f"(channel,) of x {tuple(x.shape)}")
    if state is not None:
        expected = (batch, weight.shape[1] - 1, channel)
        shape("causal_conv: state", state, expected, f"(batch, taps - 1, channel) of x {tuple(x.shape)}")
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise ArgumentError(f"causal_conv: reset must be a bool tensor (batch, time), got {kind}")
        shape("causal_conv: reset", reset, (batch, time), f"(batch, time) of x {tuple(x.shape)}")
        present.append(("reset", reset))
    same_device(("causal_conv: x", x), [(f"causal_conv: {name}", value) for name, value in present])
    return compute_dtype([(f"causal_conv: {name}", (value,)) for name, value in present if value is not reset])


class Geometry:
    """Pieces of time, and which taps resets cut in them."""

    def __init__(self, x: Tensor, taps: int, reset: Tensor | None) -> None:
        self.batch, self.time, self.channel = x.shape
        self.reach = taps - 1
        self.on_cpu = x.device.type == "cpu"
        self.length = max(1, _CHUNK // (self.batch * self.channel)) if self.on_cpu else self.time
        self.reset = reset

    @cached_property
    def ids(self) -> Tensor | None:
        """Which sequence a position belongs to, int32 (batch, time): a state belongs to sequence 0."""
        return None if self.reset is None else self.reset.cumsum(1, dtype=torch.int32)

    @cached_property
    def sequence(self) -> Tensor | None:
        """`ids` with the `reach` positions before; None if there is only one sequence."""
        if self.ids is None or (self.on_cpu and not bool(self.ids[:, -1].any())):
            return None
        return torch.cat((self.ids.new_zeros((self.batch, self.reach)), self.ids), 1)

    def pieces(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.time, self.length):
            yield start, min(start + self.length, self.time)

    def window(self, x: Tensor, state: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """x with the `reach` positions before it: (batch, reach + stop − start, channel)."""
        if start >= self.reach:
            return x[:, start - self.reach : stop].to(dtype)
        return torch.cat((state[:, start:].to(dtype), x[:, :stop].to(dtype)), 1)

    def cut(self, back: int, start: int, stop: int) -> Tensor | None:
        """Mask (batch, stop − start, 1): the input `back` steps ago is of another sequence. None if never."""
        if self.sequence is None or back == 0:
            return None
        now = self.sequence[:, self.reach + start : self.reach + stop]
        then = self.sequence[:, self.reach + start - back : self.reach + stop - back]
        return (now != then).unsqueeze(-1)

    def dropped(self) -> Tensor | None:
        """Mask (batch, reach, 1): which positions of the new state a reset has cut off."""
        if self.sequence is None or self.reach == 0:
            return None
        return (self.sequence[:, -self.reach :] != self.sequence[:, -1:]).unsqueeze(-1)


@dataclass(frozen=True)
class Call:
    """Checked arguments, the dtype to compute in, and whether by the fused kernels."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    state: Tensor
    reset: Tensor | None
    dtype: torch.dtype
    by_kernels: bool

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(self.x, self.weight.shape[1], self.reset)

    def outputs(self) -> Tensor:
        """y."""
        if self.by_kernels:
            made: Tensor = _kernels(self).forward(self.bias)
            return made
        return _outputs(self)

    def gradients(
        self, grad_y: Tensor | None, grad_tail: Tensor | None, of_state: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Those of x, weight, bias and, where asked for, state, each in its dtype, given those of y and of the new
        state."""
        if self.by_kernels:
            found = _gradients_fused(self, grad_y, grad_tail, of_state)
        else:
            found = _gradients(self, grad_y, grad_tail)
        like = (self.x, self.weight, self.bias, self.state)
        to_x, to_weight, to_bias, to_state = (g.to(given.dtype) for g, given in zip(found, like, strict=True))
        return to_x, to_weight, to_bias, to_state if of_state else None


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        state: Tensor,
        reset: Tensor | None,
        dtype: torch.dtype,
        by_kernels: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, state, reset)
        ctx.dtype, ctx.by_kernels = dtype, by_kernels
        ctx.set_materialize_grads(False)
        call = Call(x, weight, bias, state, reset, dtype, by_kernels)
        return call.outputs(), tail_of(x, state, call.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_tail: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, reset = ctx.saved_tensors
        call = Call(x, weight, bias, state, reset, ctx.dtype, ctx.by_kernels)
        return (*call.gradients(grad_y, grad_tail, of_state=ctx.needs_input_grad[3]), None, None, None)


def _outputs(call: Call) -> Tensor:
    x, weight, dtype, geometry, taps = call.x, call.weight, call.dtype, call.geometry, call.weight.shape[1]
    rows, shift = weight.to(dtype).t().contiguous(), call.bias.to(dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start, stop in geometry.pieces():
        window = geometry.window(x, call.state, start, stop, dtype)
        here = stop - start
        target = y[:, start:stop] if y.dtype == dtype else torch.empty_like(y[:, start:stop], dtype=dtype)
        torch.addcmul(shift, window[:, taps - 1 :], rows[taps - 1], out=target)
        for back in range(1, taps):
            source, cut = window[:, taps - 1 - back :][:, :here], geometry.cut(back, start, stop)
            target.addcmul_(source if cut is None else source.masked_fill(cut, 0.0), rows[taps - 1 - back])
        if y.dtype != dtype:
            y[:, start:stop] = target
    return y


def _gradients(call: Call, grad_y: Tensor | None, grad_tail: Tensor | None) -> tuple[Tensor, ...]:
    x, state, dtype, geometry, taps = call.x, call.state, call.dtype, call.geometry, call.weight.shape[1]
    rows = call.weight.to(dtype).t().contiguous()
    grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
    grad_state = torch.zeros(state.shape, dtype=dtype, device=x.device)
    grad_rows, grad_bias = torch.zeros_like(rows), torch.zeros_like(rows[0])
    if grad_tail is not None:
        dropped = geometry.dropped()
        tail = grad_tail.to(dtype)
        tail = tail if dropped is None else tail.masked_fill(dropped, 0.0)
        _add_back(grad_x, grad_state, tail, torch.ones_like(rows[0]), x.shape[1])
    for start, stop in geometry.pieces() if grad_y is not None else ():
        assert grad_y is not None
        window, here = geometry.window(x, state, start, stop, dtype), stop - start
        grad = grad_y[:, start:stop].to(dtype)
        product = torch.empty_like(window[:, :here])
        grad_bias += grad.sum((0, 1))
        for back in range(taps):
            cut = geometry.cut(back, start, stop)
            passed = grad if cut is None else grad.masked_fill(cut, 0.0)
            tap = taps - 1 - back
            grad_rows[tap] += torch.mul(passed, window[:, tap : tap + here], out=product).sum((0, 1))
            _add_back(grad_x, grad_state, passed, rows[tap], start + tap)
    return grad_x, grad_rows.t(), grad_bias, grad_state


def _gradients_fused(call: Call, grad_y: Tensor | None, grad_tail: Tensor | None, of_state: bool) -> tuple[Tensor, ...]:
    """By the kernels; what the first steps give to the state, and the new state to the last inputs, in torch."""
    x, state, dtype, geometry = call.x, call.state, call.dtype, call.geometry
    rows, taps = call.weight.to(dtype).t(), call.weight.shape[1]
    grad_state = torch.zeros(state.shape, dtype=dtype, device=x.device)
    if grad_y is None:
        grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
        grad_weight, grad_bias = torch.zeros_like(call.weight), torch.zeros_like(call.bias)
    else:
        found = _kernels(call).backward(grad_y, wide=grad_tail is not None)
        grad_x, grad_weight, grad_bias = found
        first = min(geometry.reach, geometry.time) if of_state else 0
        scratch = grad_x.new_zeros((geometry.batch, first, geometry.channel), dtype=dtype)
        for back in range(1, taps if of_state else 1):  # a step before the sequence reaches the first steps only
            cut = geometry.cut(back, 0, first)
            passed = grad_y[:, :first].to(dtype)
            passed = passed if cut is None else passed.masked_fill(cut, 0.0)
            _add_back(scratch, grad_state, passed, rows[taps - 1 - back], taps - 1 - back)
    if grad_tail is not None:
        dropped = geometry.dropped()
        tail = grad_tail.to(dtype)
        tail = tail if dropped is None else tail.masked_fill(dropped, 0.0)
        _add_back(grad_x, grad_state, tail, torch.ones_like(rows[0]), x.shape[1])
    return grad_x, grad_weight, grad_bias, grad_state


def _kernels(call: Call) -> Any:
    made = fused.kernels("triton_conv", "causal_conv: ")
    return made.ConvKernels(call.x, call.weight, call.state, call.geometry.ids, call.dtype)


def tail_of(x: Tensor, state: Tensor, geometry: Geometry) -> Tensor:
    """The last `reach` inputs, from the old state where the sequence is shorter; zero where a reset cut them off."""
    reach = geometry.reach
    tail = torch.cat((state.to(x.dtype), x[:, max(0, x.shape[1] - reach) :]), 1)
    tail = tail[:, tail.shape[1] - reach :].clone()
    dropped = geometry.dropped()
    return tail if dropped is None else tail.masked_fill_(dropped, 0.0)


def _add_back(grad_x: Tensor, grad_state: Tensor, grad: Tensor, row: Tensor, position: int) -> None:
    """Adds grad · row at a position of the state and the sequence laid end to end."""
    reach, length = grad_state.shape[1], grad.shape[1]
    before = min(max(reach - position, 0), length)
    if before:
        grad_state[:, position : position + before].addcmul_(grad[:, :before], row)
    if length > before:
        first = position + before - reach
        grad_x[:, first : first + length - before].addcmul_(grad[:, before:], row)
