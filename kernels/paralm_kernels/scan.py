"""Linear recurrences over time for users who want only that: h_t = A_t h_{t−1} + b_t, diagonal or a small matrix.

It is Newton's inner solve and the shape of every adjoint. Three faces with one result: "loop", a plain loop over time
under autograd (slow, obviously right); "torch", odd–even reduction over affine maps with the analytic adjoint (any
device); "triton", the fused kernels generated from the recurrence as a cell (cell_library/linear.py). "auto" is
"triton" on a GPU that has Triton and "torch" elsewhere.

    λ_t = g_t + A_{t+1}ᵀ λ_{t+1}        ∂A_t = λ_t h_{t−1}ᵀ        ∂b_t = λ_t        ∂h₋₁ = A_0ᵀ λ_0
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import fused
from .affine import TIME, AffineMap, trajectory
from .cell_library.linear import DiagonalScan, matrix_scan_cell
from .checks import DTYPES
from .errors import ArgumentError
from .once import once_differentiable
from .solve import solve

METHODS = ("auto", "loop", "torch", "triton")
LARGEST = 4
"""Rows of a matrix; a composition costs their cube, and the kernels hold it in registers."""


class Scan(NamedTuple):
    """states: shaped like b, in its dtype. final: the last state in the order of the scan, without time, in the
    compute dtype (at least float32), so that a carried state loses nothing."""

    states: Tensor
    final: Tensor


def diagonal_scan(
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    *,
    method: str = "auto",
) -> Scan:
    """h_t = a_t h_{t−1} + b_t, element by element; differentiable in a, b and state.

    a, b: (batch, time, channel), one dtype: float16, bfloat16, float32 or float64. state: (batch, channel), the state
    before the first step, zeros if None. reset: bool (batch, time); where true the state is zeroed before that step.
    reverse: h_t = a_t h_{t+1} + b_t, from the last step to the first (`state` is then the one after the last step, and
    `final` that of step 0); costs a copy of the arguments. Computed in at least float32.

    Returns states (batch, time, channel) and final (batch, channel). Raises ArgumentError.
    """
    _check_kinds("diagonal_scan", a, b, state, reset)
    if a.ndim != 3 or a.shape != b.shape or 0 in a.shape:
        raise ArgumentError(
            f"diagonal_scan: a is {tuple(a.shape)} and b is {tuple(b.shape)}; "
            "expected the same (batch, time, channel), none of them 0"
        )
    whole = None if state is None else state.unsqueeze(0)
    result = _scan("diagonal_scan", a.unsqueeze(0), b.unsqueeze(0), whole, reset, reverse, method)
    return Scan(result.states[0], result.final[0])


def matrix_scan(
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    *,
    method: str = "auto",
) -> Scan:
    """h_t = A_t h_{t−1} + b_t with a small matrix for every (batch, time, channel).

    a: (S, S, batch, time, channel), row first, S from 1 to 4; b: (S, batch, time, channel); state: (S, batch, channel);
    the rest as in `diagonal_scan`. Returns states (S, batch, time, channel) and final (S, batch, channel).
    """
    _check_kinds("matrix_scan", a, b, state, reset)
    size = b.shape[0] if b.ndim == 4 else 0
    if not 1 <= size <= LARGEST or a.shape != (size, *b.shape) or 0 in b.shape:
        raise ArgumentError(
            f"matrix_scan: a is {tuple(a.shape)} and b is {tuple(b.shape)}; expected (S, S, batch, time, channel) and "
            f"(S, batch, time, channel) with S from 1 to {LARGEST}, none of them 0"
        )
    return _scan("matrix_scan", a, b, state, reset, reverse, method)


def _scan(
    what: str, a: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None, reverse: bool, method: str
) -> Scan:
    """a: (S, …) diagonal or (S, S, …), b: (S, batch, time, channel), state: (S, batch, channel)."""
    _check(what, a, b, state, reset, method)
    dtype = torch.promote_types(b.dtype, torch.float32)
    state = torch.zeros_like(b[..., 0, :], dtype=dtype) if state is None else state.to(dtype)
    if reverse:
        a, b = a.flip(TIME), b.flip(TIME)
        reset = None if reset is None else reset.flip(1)
    if method == "auto":
        method = "triton" if fused.by_default(b) else "torch"
    if method == "triton":
        cell = DiagonalScan() if a.ndim == b.ndim else matrix_scan_cell(len(b))
        inputs = (*(a if a.ndim == b.ndim else a.flatten(0, 1)).unbind(0), *b.unbind(0))
        solved = solve(cell, inputs, (), state.unbind(0), reset, method)
        states, final = torch.stack(solved.states), torch.stack(solved.final)
    else:
        a, wide = a.to(dtype), b.to(dtype)
        if reset is not None:
            a = a.masked_fill(reset.unsqueeze(-1), 0.0)
        states = _loop(a, wide, state) if method == "loop" else _LinearScan.apply(a, wide, state)
        # of its own: writing into the states must not change a state that is carried on
        final, states = states[..., -1, :].clone(), states.to(b.dtype)
    return Scan(states.flip(TIME) if reverse else states, final)


def _loop(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """The recurrence as it is written; autograd runs through it."""
    maps, states = AffineMap(a, b), []
    for t in range(maps.length):
        state = maps.at(t)(state)
        states.append(state)
    return torch.stack(states, TIME)


class _LinearScan(torch.autograd.Function):
    """(A, b, state before) → states, with the analytic adjoint; all in the compute dtype."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, offset: Tensor, initial: Tensor) -> Tensor:
        states = trajectory(AffineMap(matrix, offset), initial)
        ctx.save_for_backward(matrix, initial, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        matrix, initial, states = ctx.saved_tensors
        full = matrix.ndim == states.ndim + 1
        adjoint = grad.clone(memory_format=torch.contiguous_format)
        transposed = matrix.transpose(0, 1) if full else matrix
        later = AffineMap(transposed[..., 1:, :], adjoint[..., :-1, :])
        if later.length:
            adjoint[..., :-1, :] = trajectory(later, adjoint[..., -1, :], reverse=True)
        previous = torch.cat((initial.unsqueeze(TIME), states[..., :-1, :]), TIME)
        grad_matrix = adjoint.unsqueeze(1) * previous.unsqueeze(0) if full else adjoint * previous
        first = AffineMap(transposed[..., 0, :], torch.zeros_like(initial))
        return grad_matrix, adjoint, first(adjoint[..., 0, :])


def _check_kinds(what: str, a: Any, b: Any, state: Any, reset: Any) -> None:
    for name, value in (("a", a), ("b", b), ("state", state), ("reset", reset)):
        if not isinstance(value, Tensor) and (name in "ab" or value is not None):
            raise ArgumentError(f"{what}: {name} must be a tensor, got {type(value).__name__}")


def _check(what: str, a: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None, method: str) -> None:
    if method not in METHODS:
        raise ArgumentError(f"{what}: method is {method!r}; expected one of {', '.join(METHODS)}")
    if a.dtype not in DTYPES or b.dtype != a.dtype:
        raise ArgumentError(f"{what}: a is {a.dtype} and b is {b.dtype}; expected one floating dtype for both")
    *_, batch, time, channel = b.shape
    if state is not None:
        drop = 1 if what == "diagonal_scan" else 0  # the leading 1 that is not the user's
        given, expected = tuple(state.shape)[drop:], (len(b), batch, channel)[drop:]
        if given != expected:
            raise ArgumentError(f"{what}: state is {given}, expected {expected}")
        if state.dtype not in DTYPES or (state.dtype == torch.float64) != (a.dtype == torch.float64):
            raise ArgumentError(f"{what}: state is {state.dtype} but a is {a.dtype}; convert one of them")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != (batch, time)):
        raise ArgumentError(
            f"{what}: reset is {reset.dtype} {tuple(reset.shape)}, expected torch.bool {(batch, time)}, (batch, time)"
        )
    for name, tensor in (("b", b), ("state", state), ("reset", reset)):
        if tensor is not None and tensor.device != a.device:
            raise ArgumentError(f"{what}: {name} is on {tensor.device} but a is on {a.device}; move one of them")
