"""A nonlinear recurrence whose time lies on several ranks, solved exactly: Newton's method on the states at the cuts.

Each rank walks its part from a guessed entry s_r (multiple shooting); y_r is the state at its end, M_r the product of
its Jacobians. The guess is the state after the last steps of the part before, walked from nothing: it is sent before
the part is walked, and has come when that is done. A cell that forgets is right then, but for the first steps of the
part, which are walked again until they meet the trajectory that is there. Then all ranks learn (s, y, M) of all,
(batch, channel) × (S² + 2S) numbers a rank, and join them,

    s'_0 = s_0        s'_{r+1} = y_r + M_r (s'_r − s_r)

which is Newton's step on the entries; a rank whose entry moved walks its part again. After k walks the first k parts
are exact whatever M is, so it ends after as many rounds as there are ranks.

Backward the recurrence is linear: one exchange of (M, d), where d is what a part's own cotangents give to its entry,
and then one pass over the part with the carry that the later ranks send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import fused
from .affine import AffineMap, whole
from .cell import Cell, Tensors
from .newton import NewtonOptions
from .once import once_differentiable
from .problem import Problem, SolveInfo
from .solve import Trajectory, checked_call, gradients_of, problem_of, run, trajectory
from .time_shards import anchor

if TYPE_CHECKING:
    from .time_shards import TimeShards

_FIRST = 256
"""Steps that guess the state at the end of a part; and of a second walk before it looks whether it has met the first,
then twice as many, and so on."""
_NUMBERS = 1 << 16
"""Of a buffer: so many steps at once that it has about as many."""
_TINY = {torch.float32: 2.0**-64, torch.float64: 2.0**-100}
"""A product of Jacobians this small is taken for zero, as in the fused kernels."""


def solve_sharded(
    shards: TimeShards,
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
    on_failure: Any = "raise",
    check_finite: bool = False,
) -> Trajectory:
    """`paralm_kernels.solve` of a sequence of which every rank holds a part; arguments as there, `state` on the first
    rank. `info.iterations` counts the rounds of walks over the ranks, `info.rewalked` this rank's steps walked again
    over its own, `info.last_update` what the last join moved an entry. Raises as `solve`."""
    state, options = state if shards.first else None, NewtonOptions(tile, tol, max_iter)
    call, tensors = checked_call(cell, inputs, params, state, reset, method, options, on_failure, check_finite)
    results = _Sharded.apply(shards, call, reset, anchor(tensors[0]), *tensors)
    return trajectory(call, results)


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shards: TimeShards, call: Any, reset: Tensor | None, _: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        problem, states, final = _walks(shards, call, problem_of(call, reset, tensors))
        given = tensors[0].dtype
        ctx.shards, ctx.call, ctx.given = shards, call, [tensor.dtype for tensor in tensors]
        n_state = len(states)
        ctx.save_for_backward(reset, *tensors[:-n_state], *problem.state, *states)
        ctx.set_materialize_grads(False)
        return (*(h.to(given) for h in states), *final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, *saved = ctx.saved_tensors
        count, shards = len(ctx.given), ctx.shards
        problem = problem_of(ctx.call, reset, saved[:count])
        states, size = tuple(saved[count:]), len(problem.state)
        adjoint = _Adjoint(ctx.call, problem, states, grads[:size])
        product, entry = adjoint.part_map()
        own = [torch.zeros_like(s) if g is None else g.to(problem.dtype) for s, g in zip(problem.state, grads[size:])]
        cotangent = torch.stack(own)
        products, entries, finals = shards.gather("cotangents", product, entry, cotangent).taken()
        carry = torch.zeros_like(cotangent)  # of the state at the end of a part, from the last rank back to this one
        for later in range(shards.size - 1, shards.rank, -1):
            carry = entries[later] + _transposed(products[later], carry + finals[later])
        result = adjoint.gradients(tuple(cotangent + carry))
        to_state = result.state if shards.first else tuple(torch.zeros_like(s) for s in result.state)
        every = (*result.inputs, *result.params, *to_state)
        return (None, None, None, None, *(grad.to(dtype) for grad, dtype in zip(every, ctx.given, strict=True)))


def _walks(shards: TimeShards, call: Any, problem: Problem) -> tuple[Problem, Tensors, Tensors]:
    """The part solved from its true entry, that entry in the problem; how it went is in `call.info`."""
    time, size = problem.shape[1], len(problem.state)
    meet = 2 * torch.finfo(problem.dtype).eps
    message, walked = None, 0
    if time > _FIRST:
        _, final, _ = run(call, _steps(problem, time - _FIRST, time, tuple(torch.zeros_like(s) for s in problem.state)))
        message, walked = shards.pass_on("guess", torch.stack(final), 1), _FIRST
    states, final, info = run(call, problem)
    guess = (message or shards.pass_on("guess", torch.stack(final), 1)).taken()
    product = torch.zeros((size, size, *problem.state[0].shape), dtype=problem.dtype, device=problem.device)
    rounds, entry = 1, guess
    change = 0.0 if guess is None else float(_change(guess, torch.stack(problem.state)))
    while True:
        if change > meet:
            assert entry is not None
            problem = replace(problem, state=tuple(entry))
            states, final, steps = _again(call, problem, states, final)
            walked += steps
            product, _ = part_map(call, problem, states, (None,) * size)
        rounds += 1
        ends, entries, products = shards.gather(
            "states", torch.stack(final), torch.stack(problem.state), product
        ).taken()
        entry = entries[0]
        for before in range(shards.rank):
            moved = _applied(products[before], entry - entries[before])
            entry = ends[before] + torch.where(moved.isfinite(), moved, torch.zeros_like(moved))
        change, update = shards.largest(_change(entry, entries[shards.rank]))
        if update <= meet:
            break
    call.info = SolveInfo(rounds, update, f"shards of {info.method}", walked / time)
    return problem, states, final


def _change(new: Tensor, old: Tensor) -> Tensor:
    """The largest |new − old| / (1 + |new|), float64 (); 0 where both are the same, not finite ones too."""
    change = (new - old).abs() / (1 + new.abs())
    change = torch.where((new == old) | (new.isnan() & old.isnan()), torch.zeros_like(change), change)
    return torch.where(change.isnan(), torch.full_like(change, torch.inf), change).max().to(torch.float64)


def _again(call: Any, problem: Problem, states: Tensors, final: Tensors) -> tuple[Tensors, Tensors, int]:
    """The part walked from another entry until it meets the trajectory that is there, and how many steps that took."""
    time = problem.shape[1]
    if states[0].dtype != problem.dtype:  # rounded: meeting them says little
        new, final, _ = run(call, problem)
        return new, final, time
    meet = 2 * torch.finfo(problem.dtype).eps
    states, entry, start, length = tuple(h.clone() for h in states), problem.state, 0, _FIRST
    while start < time:
        stop = min(start + length, time)
        new, entry, _ = run(call, _steps(problem, start, stop, entry))
        met = float(_change(torch.stack(entry), torch.stack([h[:, stop - 1] for h in states]))) <= meet
        for h, values in zip(states, new, strict=True):
            h[:, start:stop] = values
        if met:
            return states, final, stop
        start, length = stop, 2 * length
    return states, entry, time


def _steps(problem: Problem, start: int, stop: int, entry: Tensors) -> Problem:
    """Some steps, from a state before them."""
    reset = None if problem.reset is None else problem.reset[:, start:stop]
    return replace(problem, inputs=tuple(x[:, start:stop] for x in problem.inputs), state=entry, reset=reset)


def part_map(call: Any, problem: Problem, states: Tensors, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Of a solved part: M = J_{T−1} ⋯ J_0, (S, S, batch, channel), and d = Σ_t (J_t ⋯ J_0)ᵀ g_t, (S, batch, channel),
    the cotangent that the part's own cotangents g (batch, time, channel) give to the state before it.

    Goes through the part from its first step and ends where the product has become too small to be seen. With the
    fused kernels, by those.
    """
    if call.method.startswith("triton"):
        fused_map: tuple[Tensor, Tensor] = _fused_adjoint(call, problem, states, grads).part_map()
        return fused_map
    batch, time, channel = problem.shape
    size, diagonal, dtype = problem.derived.n_state, problem.derived.diagonal, problem.dtype
    states = tuple(h.to(dtype) for h in states)
    length = max(1, min(time, _NUMBERS // (batch * channel)))
    scratch: list[Tensor] = []
    found = AffineMap(*_identity(problem))
    for start in range(0, time, length):
        stop = min(start + length, time)
        arguments = (*problem.previous(states, start, stop), *problem.inputs_at(start, stop), *problem.params)
        if not scratch or stop - start < length:
            scratch = problem.code.jacobian.scratch((batch, stop - start, channel), dtype, problem.device)
        jacobian = problem.empty(*((size,) if diagonal else (size, size)), batch, stop - start, channel)
        problem.code.jacobian(*arguments, *(jacobian if diagonal else jacobian.flatten(0, 1)).unbind(0), *scratch)
        mask = problem.mask(start, stop)
        if mask is not None:
            jacobian.masked_fill_(mask, 0.0)
        cotangents = problem.empty(size, batch, stop - start, channel)
        for cotangent, grad in zip(cotangents, grads, strict=True):
            cotangent.zero_() if grad is None else cotangent.copy_(grad[:, start:stop])
        matrix = jacobian if diagonal else jacobian.transpose(0, 1)
        given = matrix * cotangents if diagonal else (matrix * cotangents).sum(1)
        found = found.after(whole(AffineMap(matrix, given)))
        assert found.matrix is not None
        if float(found.matrix.abs().max()) < _TINY[dtype]:
            found = AffineMap(torch.zeros_like(found.matrix), found.offset)
            break
    assert found.matrix is not None
    matrix = found.matrix if found.full else found.matrix * _identity(problem, full=True)[0]
    return matrix.transpose(0, 1), found.offset


def _fused_adjoint(call: Any, problem: Problem, states: Tensors, grads: Sequence[Tensor | None]) -> Any:
    compiled = fused.kernels("triton_solver")
    return compiled.Adjoint(problem, states, grads, call.method, call.options)


class _Adjoint:
    """A part's map, and its gradients once the cotangent of its end is known."""

    def __init__(self, call: Any, problem: Problem, states: Tensors, grads: tuple[Tensor | None, ...]) -> None:
        self._given = (call, problem, states, grads)
        self._fused = _fused_adjoint(*self._given) if call.method.startswith("triton") else None

    def part_map(self) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = part_map(*self._given) if self._fused is None else self._fused.part_map()
        return found

    def gradients(self, final: tuple[Tensor | None, ...]) -> Any:
        return gradients_of(*self._given, final) if self._fused is None else self._fused.gradients(final)


def _identity(problem: Problem, full: bool = False) -> tuple[Tensor, Tensor]:
    """The matrix and the offset of the map that changes nothing."""
    batch, _, channel = problem.shape
    size = problem.derived.n_state
    eye = torch.eye(size, dtype=problem.dtype, device=problem.device)
    if problem.derived.diagonal and not full:
        eye = torch.ones(size, dtype=problem.dtype, device=problem.device)
    matrix = eye[..., None, None].expand(*eye.shape, batch, channel)
    return matrix, problem.empty(size, batch, channel).zero_()


def _applied(matrix: Tensor, x: Tensor) -> Tensor:
    """M x of (S, S, …) and (S, …)."""
    return (matrix * x.unsqueeze(0)).sum(1)


def _transposed(matrix: Tensor, x: Tensor) -> Tensor:
    """Mᵀ x."""
    return (matrix * x.unsqueeze(1)).sum(0)
