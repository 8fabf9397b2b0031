"""The gradient of a recurrence whose states are known; needs no autograd and no Newton.

    λ_t = g_t + J_{t+1}ᵀ λ_{t+1}        ∂x_t = (∂f/∂x_t)ᵀ λ_t        ∂p = Σ_t (∂f/∂p)ᵀ λ_t        ∂h₀ = J_0ᵀ λ_0

(math of ParaRNN, arXiv 2510.21450, backward pass.) Time is cut into chunks small enough for the cache and walked from
the last to the first: Jacobians of a chunk, vectorised; the linear recurrence through it; then the vector–Jacobian
product, which reuses what the Jacobians left in scratch. A reset before step t cuts J_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import AffineMap, Recurrence
from .cell import Tensors
from .problem import Problem

_CHUNK = 65536
"""Numbers per buffer of a chunk on a CPU: the least that torch splits over two threads, and few enough that the
buffers of a chunk nearly fit the second-level cache (measured: a whole sequence at once takes 2.5 times as long)."""
_DEVICE_CHUNK = 1 << 22
"""The same on a device: enough to fill it; its buffers are what the adjoint needs besides the gradients."""


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
    grad_inputs = tuple(problem.empty(batch, time, channel) for _ in problem.inputs)
    grad_params = tuple(problem.empty(channel).zero_() for _ in problem.params)
    partial = problem.empty(channel)

    def accumulate(i: int, value: Tensor) -> None:
        grad_params[i].add_(torch.sum(value, (0, 1), out=partial))

    carry = problem.empty(problem.derived.n_state, batch, channel).zero_()
    for component, grad in zip(carry, grad_final, strict=True):
        if grad is not None:
            component.copy_(grad)
    numbers = _CHUNK if problem.device.type == "cpu" else _DEVICE_CHUNK
    length = min(time, max(1, numbers // (batch * channel)))
    chunk = _Chunk(problem, length)
    for start in reversed(range(0, time, length)):
        stop = min(start + length, time)
        if stop - start != chunk.length:
            chunk = _Chunk(problem, stop - start)
        arguments = (*problem.previous(states, start, stop), *problem.inputs_at(start, stop), *problem.params)
        chunk.linearise(arguments, problem.mask(start, stop))
        carry = chunk.run_back([None if grad is None else grad[:, start:stop] for grad in grad_states], carry)
        chunk.pull_back(arguments, [grad[:, start:stop] for grad in grad_inputs], accumulate)
    return Gradients(grad_inputs, grad_params, tuple(carry))


class _Chunk:
    """Buffers for a number of steps, and the three things done to them."""

    def __init__(self, problem: Problem, length: int) -> None:
        batch, _, channel = problem.shape
        size, diagonal = problem.derived.n_state, problem.derived.diagonal
        self.length = length
        self._code = problem.code
        self._scratch = problem.code.jacobian.scratch((batch, length, channel), problem.dtype, problem.device)
        rank = (size,) if diagonal else (size, size)
        self._jacobian = problem.empty(*rank, batch, length, channel)
        self._entries = self._jacobian.unbind(0) if diagonal else self._jacobian.flatten(0, 1).unbind(0)
        self._adjoint = problem.empty(size, batch, length, channel)
        self._cotangents = self._adjoint.unbind(0)
        transposed = self._jacobian if diagonal else self._jacobian.transpose(0, 1)
        later = AffineMap(transposed[..., 1:, :], self._adjoint[..., :-1, :])
        self._recurrence = Recurrence(later, reverse=True) if length > 1 else None
        self._first = AffineMap(transposed[..., 0, :], problem.empty(size, batch, channel).zero_())

    def linearise(self, arguments: Tensors, mask: Tensor | None) -> None:
        """The Jacobians; a reset before a step cuts that step's."""
        self._code.jacobian(*arguments, *self._entries, *self._scratch)
        if mask is not None:
            self._jacobian.masked_fill_(mask, 0.0)

    def run_back(self, grads: Sequence[Tensor | None], carry: Tensor) -> Tensor:
        """λ from g and the carry J_{t+1}ᵀ λ_{t+1} of the chunk after; returns the carry for the chunk before."""
        for cotangent, grad in zip(self._cotangents, grads, strict=True):
            if grad is None:
                cotangent.zero_()
            else:
                cotangent.copy_(grad)
        last = self._adjoint[..., -1, :]
        last += carry
        if self._recurrence is not None:
            self._recurrence.run(last)
        return self._first(self._adjoint[..., 0, :])

    def pull_back(
        self, arguments: Tensors, grad_inputs: Sequence[Tensor], accumulate: Callable[[int, Tensor], None]
    ) -> None:
        """The vector–Jacobian product with λ; reads what `linearise` left in scratch."""
        self._code.gradient(*arguments, *self._cotangents, *grad_inputs, accumulate, *self._scratch)
