"""The one entry: run a cell over time, by whichever method, with gradients to everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks, fused
from .adjoint import Gradients, gradients
from .cell import Cell, Tensors
from .derive import derive
from .errors import ArgumentError, NotConverged
from .newton import NewtonOptions, solve_newton
from .once import once_differentiable
from .problem import Problem, SolveInfo
from .sequential import solve_sequential
from .torch_code import torch_code

METHODS = ("auto", "sequential", "newton", "triton", "triton-walk", "triton-tile", "triton-segments")


@dataclass(frozen=True)
class Trajectory:
    """states: (batch, time, channel) per component, in the dtype of the inputs. final: (batch, channel) per
    component, in the compute dtype (at least float32), so that a carried state loses nothing. info: how it went."""

    states: Tensors
    final: Tensors
    info: SolveInfo


@dataclass
class Call:
    """What passes through autograd besides tensors, and the info that comes back."""

    cell: Cell
    method: str
    options: NewtonOptions
    on_failure: str
    dtype: torch.dtype
    info: SolveInfo | None = None


def solve(
    cell: Cell,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    state: Sequence[Tensor] | None = None,
    reset: Tensor | None = None,
    method: str = "auto",
    *,
    tol: float | None = None,
    max_iter: int | None = None,
    tile: int | None = None,
    on_failure: Literal["raise", "sequential"] = "raise",
    check_finite: bool = False,
) -> Trajectory:
    """Runs h_t = cell.step(h_{t−1}, x_t; p) over time; differentiable in inputs, params and state.

    inputs: one (batch, time, channel) tensor per input of the cell, one dtype: float16, bfloat16, float32 or float64.
    params: one (channel,) per parameter. state: one (batch, channel) per component, zeros if None. reset: bool
    (batch, time); where true the state is zeroed before that step and no gradient passes. Everything is computed in
    at least float32; float64 does not mix with other dtypes.

    method: "sequential", "newton" (tiles of `tile` steps, at most `max_iter` iterations each until the largest
    |update| / (1 + |state|) is at most `tol`: default 1e-6, 1e-12 in float64), "triton" (fused kernels, on a GPU; the
    algorithm chosen by shape, or by name: "triton-walk", "triton-tile" with `tile` a power of two, "triton-segments"
    with `tile` the steps of a segment and `max_iter` the rounds before what is left is walked in order), or "auto", the
    fastest for device and shape, which never fails to converge. on_failure: what to do on a CPU when Newton does not
    converge: "raise" NotConverged, or solve sequentially. check_finite: look at all arguments first and report the
    first that is not finite.

    Raises ArgumentError (shapes, dtypes, devices, options), CellError (an unusable step), NotConverged.
    """
    options = NewtonOptions(tile, tol, max_iter)
    call, tensors = checked_call(cell, inputs, params, state, reset, method, options, on_failure, check_finite)
    results = _Solve.apply(call, reset, *tensors)
    return trajectory(call, results)


def checked_call(
    cell: Cell,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    state: Sequence[Tensor] | None,
    reset: Tensor | None,
    method: str,
    options: NewtonOptions,
    on_failure: str,
    check_finite: bool,
) -> tuple[Call, Tensors]:
    """All arguments of `solve` looked at; what is to be done, and (*inputs, *params, *state), zeros for no state."""
    if method not in METHODS:
        raise ArgumentError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    if on_failure not in ("raise", "sequential"):
        raise ArgumentError(f"on_failure is {on_failure!r}; expected 'raise' or 'sequential'")
    checks.whole_numbers("", max_iter=options.max_iter, tile=options.tile)
    checks.tolerance("", options.tol)
    derive(cell)
    given_inputs, given_params, given_state, dtype = checks.sequence_arguments(cell, inputs, params, state, reset)
    if check_finite:
        groups: list[Any] = [("inputs", cell.inputs, given_inputs, ("batch", "time", "channel"))]
        groups.append(("params", cell.params, given_params, ("channel",)))
        if given_state is not None:
            groups.append(("state", cell.state, given_state, ("batch", "channel")))
        checks.finite(cell, groups)
    if given_state is None:
        batch, _, channel = given_inputs[0].shape
        zeros = torch.zeros((batch, channel), dtype=dtype, device=given_inputs[0].device)
        given_state = tuple(zeros for _ in cell.state)
    if method.startswith("triton"):
        fused.kernels("triton_solver").check_device(given_inputs[0].device)
        fused.kernels("triton_solver").check_tile(method, options.tile)
    call = call_of(cell, method, options, on_failure, dtype, given_inputs[0])
    return call, (*given_inputs, *given_params, *given_state)


def trajectory(call: Call, results: Tensors) -> Trajectory:
    """Of a call that is done: its states, then its final states."""
    count = len(call.cell.state)
    assert call.info is not None
    return Trajectory(results[:count], results[count:], call.info)


def call_of(cell: Cell, method: str, options: NewtonOptions, on_failure: str, dtype: torch.dtype, x: Tensor) -> Call:
    """What is to be done, "auto" made into a method; x: one input, (batch, time, channel)."""
    if method == "auto":
        method, on_failure = choose_method(x), "sequential"
        if method == "newton":
            options = replace(options, max_iter=options.max_iter or _AUTO_ITERATIONS)
    return Call(cell, method, options, on_failure, dtype)


_AUTO_ITERATIONS = 32
"""After so many iterations a tile costs more than the loop; "auto" then takes the loop."""


def choose_method(x: Tensor) -> str:
    """The fastest method for a device and shape; x: one input, (batch, time, channel).

    A step of the loop costs its calls, a Newton iteration its arithmetic. Measured on one core, both cells, recurrent
    weights up to 2: Newton is 2 to 10 times faster with up to 16 rows × channels over 1024 or more steps, the loop
    from 256 on and for short sequences.
    """
    batch, time, channel = x.shape
    if fused.by_default(x):
        return "triton"
    return "newton" if x.device.type == "cpu" and batch * channel <= 16 and time >= 1024 else "sequential"


def step(cell: Cell, state: Sequence[Tensor], inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Tensors:
    """One step, for decoding: the new state, (batch, channel) per component, in the compute dtype.

    state, inputs: (batch, channel) each; params: (channel,) each; dtypes as for `solve`. Raises ArgumentError.
    """
    derived = derive(cell)
    state, inputs, params, dtype = checks.step_arguments(cell, state, inputs, params)
    tensors = (*state, *inputs, *params)
    if fused.by_default(state[0]) and not _wants_gradient(tensors):
        converted = tuple(tuple(value.to(dtype) for value in group) for group in (state, params))
        return fused.kernels("triton_solver").decode(derived, converted[0], inputs, converted[1], dtype)
    wide = tuple(value.to(dtype) for value in tensors)
    if not _wants_gradient(tensors):
        return tuple(torch_code(derived).step(*wide))
    # the cell's own: autograd through the lowered one would see no detach, halve a tie, and make NaN of 0 · ∞
    n, m = len(state), len(state) + len(inputs)
    result = cell.step(wide[:n], wide[n:m], wide[m:])
    return tuple(h.to(dtype).expand_as(state[0]) for h in result)


def _wants_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def run(call: Call, problem: Problem) -> tuple[Tensors, Tensors, SolveInfo]:
    """States, final state in the compute dtype, and how it went. Triton's states are in the dtype of the inputs."""
    if call.method.startswith("triton"):
        solved: tuple[Tensors, Tensors, SolveInfo] = fused.kernels("triton_solver").solve_triton(
            problem, call.method, call.options
        )
        return solved
    states, info = _run_torch(call, problem)
    return states, tuple(h[:, -1].clone() for h in states), info


def _run_torch(call: Call, problem: Problem) -> tuple[Tensors, SolveInfo]:
    if call.method == "sequential":
        return solve_sequential(problem)
    try:
        return solve_newton(problem, call.options)
    except NotConverged:
        if call.on_failure == "raise":
            raise
        return solve_sequential(problem)


def gradients_of(
    call: Call,
    problem: Problem,
    states: Tensors,
    grad_states: tuple[Tensor | None, ...],
    grad_final: tuple[Tensor | None, ...],
) -> Gradients:
    """The adjoint that goes with the method: `adjoint.gradients`, or the fused kernels'."""
    if call.method.startswith("triton"):
        result: Gradients = fused.kernels("triton_solver").gradients_triton(
            problem, states, grad_states, grad_final, call.method, call.options
        )
        return result
    return gradients(problem, states, grad_states, grad_final)


class _Solve(torch.autograd.Function):
    """Any forward method with the one analytic adjoint; saves inputs and states, recomputes Jacobians."""

    @staticmethod
    def forward(ctx: Any, call: Call, reset: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        problem = problem_of(call, reset, tensors)
        states, final, call.info = run(call, problem)
        given = tensors[0].dtype
        outputs = tuple(h.to(given) for h in states)
        ctx.call, ctx.given = call, [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(reset, *tensors, *states)
        ctx.set_materialize_grads(False)
        return (*outputs, *final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, *saved = ctx.saved_tensors
        count = len(ctx.given)
        problem = problem_of(ctx.call, reset, saved[:count])
        size = len(problem.state)
        result = gradients_of(ctx.call, problem, tuple(saved[count:]), grads[:size], grads[size:])
        every = (*result.inputs, *result.params, *result.state)
        return (None, None, *(grad.to(dtype) for grad, dtype in zip(every, ctx.given, strict=True)))


def problem_of(call: Call, reset: Tensor | None, tensors: Sequence[Tensor]) -> Problem:
    cell = call.cell
    n_inputs, n_params = len(cell.inputs), len(cell.params)
    rest = [tensor.to(call.dtype) for tensor in tensors[n_inputs:]]
    return Problem(
        derive(cell), tuple(tensors[:n_inputs]), tuple(rest[:n_params]), tuple(rest[n_params:]), reset, call.dtype
    )
