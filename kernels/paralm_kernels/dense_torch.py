"""The dense recurrences in torch, any device: a loop over time of one batched matmul and the cell, and its adjoint.

Forward, per head: rows_t = x_t + R h_{t−1} + b, then the cell (dense_cells.py). Only arguments and states are kept.
Backward, in pieces of time from the last: the rows again with one matmul for the whole piece, the coefficients of all
its steps at once, then the loop that only multiplies by them,

    δ_t = ∂rows_t (from the gradients of h_t and the rest of the state)      ∂h_{t−1} = Rᵀ δ_t + what the cell passes on

and at the end of a piece ∂R = Σ_t δ_t h_{t−1}ᵀ as one matmul, ∂x_t = δ_t, ∂b = Σ_t δ_t. Inside, tensors are (head,
time, batch, row, d_head), so that each head's matmul over a piece needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autocast import no_autocast
from .dense_cells import DenseKind, Tensors
from .once import once_differentiable

PIECE = 256
"""Steps whose rows and coefficients are in memory at once."""

Solve = Callable[["DensePlan", Tensor, Tensor, "Tensor | None", Tensors, "Tensor | None"], tuple[Tensors, Tensors]]
"""As `run`."""

Walk = Callable[[Tensor, Tensors, Tensors, int, int], Tensors]
"""(rows of a piece, the states its steps start from, gradients of the state after it, where it starts, steps of the
whole sequence) → gradients of the state before it; rows are overwritten with theirs."""


@dataclass(frozen=True)
class DensePlan:
    """What passes through autograd besides tensors. keep: whether a backward pass may come. solve: what is taken
    instead of the loop `run`."""

    kind: DenseKind
    dtype: torch.dtype
    keep: bool
    solve: Solve | None = None


def matrix_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(gates, heads, out, in) → (heads, in, gates · out): h · matrix is every gate's recurrent product."""
    gates, heads, d_head, _ = weight.shape
    return weight.to(dtype).permute(1, 3, 0, 2).reshape(heads, d_head, gates * d_head)


def rows_of(kind: DenseKind, inputs: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Pre-activations without the recurrent products, (head, time, batch, row, d_head), of inputs (batch, time, gate,
    head, d_head): a tensor of its own."""
    batch, time, _, heads, d_head = inputs.shape
    rows = torch.empty((heads, time, batch, len(kind.rows), d_head), dtype=dtype, device=inputs.device)
    given = inputs.permute(3, 1, 0, 2, 4)
    if len(kind.input_rows) == len(kind.rows):
        rows.copy_(given)
    else:
        rows.zero_()
        for gate, row in enumerate(kind.input_rows):
            rows[..., row, :] = given[..., gate, :]
    if bias is not None:
        for index, row in enumerate(kind.bias_rows):
            rows[..., row, :] += bias[index, :, None, None].to(dtype)
    return rows


def pieces(time: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each piece of time."""
    for start in range(0, time, PIECE):
        yield start, min(start + PIECE, time)


def fresh(kind: DenseKind, state: Tensors, cut: Tensor | None) -> Tensors:
    """The state with what `cut`, broadcast over it, marks replaced by the initial one."""
    if cut is None:
        return state
    return tuple(part.masked_fill(cut, value) for part, value in zip(state, kind.initial, strict=True))


def cuts_of(reset: Tensor | None, time: int) -> list[Tensor | None]:
    """For each step the mask (batch, 1) of rows that start anew, None where there are none (looked at on a CPU)."""
    if reset is None:
        return [None] * time
    masks = reset.unsqueeze(-1).unbind(1)
    if reset.device.type != "cpu":
        return list(masks)
    return [mask if some else None for mask, some in zip(masks, reset.any(0).tolist(), strict=True)]


def run(
    plan: DensePlan, inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensors, reset: Tensor | None
) -> tuple[Tensors, Tensors]:
    """The trajectory (head, time, batch, d_head) of h, and of the other components too if the plan keeps them, in the
    compute dtype; and the last state. state: (head, batch, d_head) each, in the compute dtype."""
    kind, width = plan.kind, plan.kind.recurrent
    matrix, every = matrix_of(weight, plan.dtype), []
    for start, stop in pieces(inputs.shape[1]):
        rows = rows_of(kind, inputs[:, start:stop], bias, plan.dtype)
        cuts = cuts_of(None if reset is None else reset[:, start:stop], stop - start)
        # Views of all steps at once: in the loop, on a CPU, a call costs as much as the arithmetic of a small step.
        recurrent, rest = rows[..., :width, :].flatten(3).unbind(1), _steps(rows[..., width:, :])
        for row, others, cut in zip(recurrent, rest, cuts, strict=True):
            state = fresh(kind, state, cut)
            product = torch.baddbmm(row, state[0], matrix)
            state = kind.step((*product.chunk(width, 2), *others), state)
            every.append(state if plan.keep else state[:1])
    return tuple(torch.stack(parts, 1) for parts in zip(*every, strict=True)), state


def _steps(rows: Tensor) -> list[Tensors]:
    """For each step its rows, (head, batch, d_head) each, of rows (head, time, batch, row, d_head)."""
    if rows.shape[3] == 0:
        return [()] * rows.shape[1]
    return list(zip(*(row.unbind(1) for row in rows.unbind(3)), strict=True))


def decode(
    kind: DenseKind,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensors,
    reset: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensors]:
    """One step without a copy of the weights: y (batch, 1, head, d_head) and the state, as `dense_rnn` has them."""
    begin = tuple(part.to(dtype).transpose(0, 1) for part in state)
    begin = fresh(kind, begin, None if reset is None else reset)
    rows = list(rows_of(kind, inputs, bias, dtype).squeeze(1).unbind(2))
    product = torch.matmul(begin[0], weight.to(dtype).mT)  # (gate, head, batch, d_head)
    for row in range(kind.recurrent):
        rows[row] = rows[row] + product[row]
    end = tuple(part.transpose(0, 1) for part in kind.step(tuple(rows), begin))
    return end[0].unsqueeze(1).to(inputs.dtype, copy=True), end


class _Dense(torch.autograd.Function):
    """(inputs, weight, bias, state) → (y, final state); see the head of the file."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: DensePlan,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reset: Tensor | None,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        begin = tuple(part.to(plan.dtype).transpose(0, 1) for part in state)
        with no_autocast(inputs):
            trajectory, end = (plan.solve or run)(plan, inputs, weight, bias, begin, reset)
        ctx.plan, ctx.state_dtypes = plan, [part.dtype for part in state]
        if plan.keep:
            ctx.save_for_backward(inputs, weight, bias, reset, *begin, *trajectory)
        ctx.set_materialize_grads(False)
        y = trajectory[0].permute(2, 1, 0, 3).to(inputs.dtype, copy=True, memory_format=torch.contiguous_format)
        return (y, *(part.transpose(0, 1).contiguous() for part in end))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, reset, *saved = ctx.saved_tensors
        count = len(ctx.plan.kind.state)
        trajectory = (tuple(saved[:count]), tuple(saved[count:]))
        with no_autocast(inputs):
            grads = pull_back(ctx.plan, inputs, weight, bias, reset, *trajectory, grad_y, grad_final)
        to_state = (grad.to(dtype) for grad, dtype in zip(grads[3], ctx.state_dtypes, strict=True))
        return None, *grads[:3], None, *to_state


def pull_back(
    plan: DensePlan,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    begin: Tensors,
    trajectory: Tensors,
    grad_y: Tensor | None,
    grad_final: tuple[Tensor | None, ...],
    walk: Walk | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensors]:
    """Gradients of inputs, weight and bias in their dtypes, and of the state (batch, head, d_head) in the compute
    dtype. begin, trajectory: as `run` takes and gives them; grad_y, grad_final: of what `dense_rnn` returns; walk: what
    does the loop over a piece instead of `_walk_back`, for products in the dtype of the weights."""
    kind, dtype = plan.kind, plan.dtype
    batch, time, gates, heads, d_head = inputs.shape
    matrix = matrix_of(weight, dtype)
    to_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    to_matrix = torch.zeros_like(matrix)
    to_bias = torch.zeros((heads, len(kind.rows), d_head), dtype=dtype, device=inputs.device)
    zero = torch.zeros((heads, batch, d_head), dtype=dtype, device=inputs.device)
    grads = tuple(zero if grad is None else grad.to(dtype).transpose(0, 1) for grad in grad_final)
    for start, stop in reversed(list(pieces(time))):
        cut = None if reset is None else reset[:, start:stop]
        before = before_of(kind, begin, trajectory, start, stop, cut)
        rows = rows_of(kind, inputs[:, start:stop], bias, dtype)
        hidden = before[0].flatten(1, 2)
        if walk is not None:  # kernels multiply in the dtype of the weights
            hidden = hidden.to(weight.dtype).to(dtype)
        rows[..., : kind.recurrent, :] += torch.bmm(hidden, matrix).view(*before[0].shape[:3], kind.recurrent, d_head)
        to_rows = rows  # what follows needs them no longer, and the shape is right
        if walk is not None:
            grads = walk(rows, before, grads, start, time)
        else:
            after = tuple(part[:, start:stop] for part in trajectory)
            coefficients = kind.linearize(rows.unbind(3), before, after)
            came = None if grad_y is None else grad_y[:, start:stop].permute(2, 1, 0, 3).to(dtype)
            grads = _walk_back(kind, coefficients, came, grads, matrix, cut, to_rows)
        product = to_rows[..., : kind.recurrent, :].reshape(heads, -1, kind.recurrent * d_head)
        to_matrix += torch.bmm(hidden.mT, product)
        to_bias += to_rows.sum((1, 2))
        for gate, row in enumerate(kind.input_rows):
            to_inputs[:, start:stop, gate] = to_rows[..., row, :].permute(2, 1, 0, 3)
    to_weight = to_matrix.view(heads, d_head, gates, d_head).permute(2, 0, 3, 1)
    given_bias = None if bias is None else to_bias[:, list(kind.bias_rows)].transpose(0, 1).to(bias.dtype)
    return to_inputs, to_weight.to(weight.dtype), given_bias, tuple(grad.transpose(0, 1) for grad in grads)


def before_of(
    kind: DenseKind, begin: Tensors, trajectory: Tensors, start: int, stop: int, cut: Tensor | None
) -> Tensors:
    """The state that each step of a piece starts from, (head, time, batch, d_head); cut: bool (batch, time)."""
    first = begin if start == 0 else tuple(part[:, start - 1] for part in trajectory)
    shifted = (
        torch.cat((one.unsqueeze(1), part[:, start : stop - 1]), 1) for one, part in zip(first, trajectory, strict=True)
    )
    return fresh(kind, tuple(shifted), None if cut is None else cut.t().unsqueeze(-1))


def needed_before(kind: DenseKind, before: Tensors, filler: Tensor) -> Tensors:
    """The parts of a state that a step's transpose looks at, contiguous, three with the filler: GRU's h, and all but h
    of the others."""
    needed = before if kind.name == "gru" else before[1:]
    return (*(part.contiguous() for part in needed), filler, filler, filler)[:3]


def _walk_back(
    kind: DenseKind,
    coefficients: Tensors,
    came: Tensor | None,
    grads: Tensors,
    matrix: Tensor,
    cut: Tensor | None,
    to_rows: Tensor,
) -> Tensors:
    """Fills to_rows, the gradients of a piece's rows; returns those of the state before the piece."""
    time, width = to_rows.shape[1], kind.recurrent
    transposed, cuts = matrix.mT, cuts_of(cut, time)
    steps = list(zip(*(coefficient.unbind(1) for coefficient in coefficients), strict=True))
    targets, products = _steps(to_rows), to_rows[..., :width, :].flatten(3).unbind(1)
    arrivals = None if came is None else came.unbind(1)
    for t in range(time - 1, -1, -1):
        if arrivals is not None:
            grads = (grads[0] + arrivals[t], *grads[1:])
        direct, *rest = kind.pull(steps[t], grads, targets[t])
        product = products[t]
        back = torch.bmm(product, transposed) if direct is None else torch.baddbmm(direct, product, transposed)
        grads = (back, *(grad for grad in rest if grad is not None))
        mask = cuts[t]
        if mask is not None:
            grads = tuple(grad.masked_fill(mask, 0.0) for grad in grads)
    return grads


def dense_torch(
    plan: DensePlan, inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensors, reset: Tensor | None
) -> tuple[Tensor, Tensors]:
    """y and the final state of checked arguments, differentiable."""
    y, *end = _Dense.apply(plan, inputs, weight, bias, reset, *state)
    return y, tuple(end)
