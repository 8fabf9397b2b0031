"""The gradient of a recurrence whose states are known; needs no autograd and no Newton.

    λ_t = g_t + J_{t+1}ᵀ λ_{t+1}        ∂x_t = (∂f/∂x_t)ᵀ λ_t        ∂p = Σ_t (∂f/∂p)ᵀ λ_t        ∂h₀ = J_0ᵀ λ_0

(math of ParaRNN, arXiv 2510.21450, backward pass.) Time is cut into chunks small enough for the cache and walked from
the last to the first: Jacobians of a chunk, vectorised; the linear recurrence through it; then the vector–Jacobian
product, which reuses what the Jacobians left in scratch. A reset before step t cuts J_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import AffineMap, trajectory
from .cell import Tensors
from .problem import Problem

_CHUNK = 65536
"""Numbers per buffer of a chunk: large enough to hide the cost of a call, small enough that all buffers of a chunk
stay in the second-level cache of a core (measured: benchmarks/cpu_solver.py)."""


@dataclass(frozen=True)
class Gradients:
    """Cotangents: inputs (batch, time, channel), params (channel,), state (batch, channel); the compute dtype."""

    inputs: Tensors
    params: Tensors
    state: Tensors


def gradients(
    problem: Problem, states: Tensors, grad_states: tuple[Tensor | None, ...], grad_final: tuple[Tensor | None, ...]
) -> Gradients:
    """The gradients of sum(grad_states · states) + sum(grad_final · final state).

    states: the solution, (batch, time, channel), compute dtype. None stands for a cotangent of zero.
    """
    batch, time, channel = problem.shape
    derived, code = problem.derived, problem.code
    size = derived.n_state
    length = min(time, max(1, _CHUNK // (batch * channel)))
    scratch = code.jacobian.scratch((batch, length, channel), problem.dtype, problem.device)
    rank = (size,) if derived.diagonal else (size, size)
    jacobian = problem.empty(*rank, batch, length, channel)
    adjoint = problem.empty(size, batch, length, channel)
    grad_inputs = tuple(problem.empty(batch, time, channel) for _ in problem.inputs)
    grad_params = tuple(problem.empty(channel).zero_() for _ in problem.params)
    partial = problem.empty(channel)

    def accumulate(i: int, value: Tensor) -> None:
        grad_params[i].add_(torch.sum(value, (0, 1), out=partial))

    carry = problem.empty(size, batch, channel).zero_()
    for i, grad in enumerate(grad_final):
        if grad is not None:
            carry[i] = grad
    for start in reversed(range(0, time, length)):
        stop = min(start + length, time)
        here = stop - start
        j, lam = jacobian[..., :here, :], adjoint[..., :here, :]
        work = [buffer[:, :here] for buffer in scratch]
        arguments = (*problem.previous(states, start, stop), *problem.inputs_at(start, stop), *problem.params)
        code.jacobian(*arguments, *(j if derived.diagonal else j.flatten(0, 1)), *work)
        mask = problem.mask(start, stop)
        if mask is not None:
            j.masked_fill_(mask, 0.0)
        for i, grad in enumerate(grad_states):
            if grad is None:
                lam[i].zero_()
            else:
                lam[i].copy_(grad[:, start:stop])
        carry = _run_back(j if derived.diagonal else j.transpose(0, 1), lam, carry)
        code.gradient(*arguments, *lam, *(grad[:, start:stop] for grad in grad_inputs), accumulate, *work)
    return Gradients(grad_inputs, grad_params, tuple(carry))


def _run_back(transposed: Tensor, adjoint: Tensor, carry: Tensor) -> Tensor:
    """Turns g into λ in place, given the carry J_{t+1}ᵀ λ_{t+1} of the chunk after; returns the carry for the one
    before."""
    adjoint[..., -1, :] += carry
    if adjoint.shape[-2] > 1:
        maps = AffineMap(transposed[..., 1:, :], adjoint[..., :-1, :])
        trajectory(maps, adjoint[..., -1, :], reverse=True, out=maps.offset)
    return AffineMap(transposed[..., 0, :], torch.zeros_like(carry))(adjoint[..., 0, :])
