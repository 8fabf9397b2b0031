"""The chunk form of chunkwise.py's recurrence in plain torch, with a backward pass of its own.

With b the running sum of log decays in a chunk of L steps, D_ij = b_i − b_j (j ≤ i, no reset between; + g_j where
normalized), S and m the state at its start, m_i = max(b_i + m, max_j D_ij) and m' = m_L (all 0 where plain):

    E_ij = e^{D_ij − m_i}    w_i = e^{b_i + m − m_i}    a_j = e^{D_Lj − m'}    κ = e^{b_L + m − m'}
    Y = w ⊙ (Q S) + (E ⊙ Q Kᵀ) U        S' = κ S + Kᵀ (a ⊙ U)

U is g v where plain; where normalized it is [v, 1], so that the last column of S is n and that of Y is n·q̃, and
y = Y_v / (max(|Y_n|, e^{−m}) + eps). (Dao & Gu, arXiv 2405.21060, section 6; Beck et al., arXiv 2503.14376.) Backward,
Y and S being linear in U, with dY through the division and dS' from the chunk after:

    dS = κ dS' + Qᵀ (w ⊙ dY)      A = E ⊙ (dY Uᵀ)      dQ = A K + (w ⊙ dY) Sᵀ      dK = Aᵀ Q + (a ⊙ U) dS'ᵀ
    dU = (E ⊙ Q Kᵀ)ᵀ dY + a ⊙ (K dS')        ∂d_t = Σ_{i ≥ t} (Y_i·dY_i − U_i·dU_i) + ⟨S', dS'⟩

The last line counts what flows past t: what ends at or after it without what starts there. What passes a reset is
masked before any exponential, so nothing is −∞ − (−∞). Chunks go in blocks: batched matmuls within, one block at a
time, so that the memory is that of a block; backward keeps the arguments and the states at the starts of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autocast import no_autocast
from .chunkwise_reference import ChunkState
from .once import once_differentiable

_BUDGET = {"cpu": 1 << 21}
"""Numbers in a block's intermediate results: on a CPU what stays in the caches."""
_BUDGET_ELSEWHERE = 1 << 27


CHUNK = 64
"""Steps of a chunk where none are given."""


@dataclass(frozen=True)
class Plan:
    """What is not a tensor of a call of `chunkwise`."""

    normalized: bool
    chunk_size: int | None
    eps: float
    dtype: torch.dtype


def chunkwise_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    state: ChunkState,
    reset: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, ChunkState]:
    """Arguments of `chunkwise`, checked, the state given in the compute dtype; y and the last state."""
    y, *end = _Chunkwise.apply(plan, reset, q, k, v, log_decay, gain, *state)
    return y, tuple(end)


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, reset: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.save_for_backward(reset, *tensors)
        ctx.set_materialize_grads(False)
        y = torch.empty_like(tensors[2], memory_format=torch.contiguous_format)
        with context(tensors[0]):
            end, _ = outputs(Problem(plan, reset, tensors), y)
        if plan.normalized:
            ctx.mark_non_differentiable(end[-1])
        return (y, *end)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_end: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, *tensors = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:5])
        with context(tensors[0]):
            first = gradients(Problem(ctx.plan, reset, tensors), (), grad_y, grad_end, grads)
        return (None, None, *grads, *first)


def context(x: Tensor) -> AbstractContextManager[Any]:
    """In which `outputs`, `end`, `gradients` and `entry_gradient` are called."""
    return no_autocast(x)


class Problem:
    """The arguments, and how they are laid out: every result of a block has (chunks, batch, groups, …) first.

    The state is (batch, groups, d_k, shared · columns): the heads that share q and k lie side by side.
    """

    def __init__(self, plan: Plan, reset: Tensor | None, tensors: Any) -> None:
        self.plan, self.reset = plan, reset
        self.q, self.k, self.v, self.log_decay, self.gain, *self.state = tensors
        self.batch, self.time, self.groups, self.d_k = self.q.shape
        self.heads, self.d_v = self.v.shape[2:]
        self.shared = self.heads // self.groups
        self.columns = self.d_v + int(plan.normalized)
        self.scale = self.d_k**-0.5 if plan.normalized else 1.0

    def blocks(self) -> list[tuple[int, int, int]]:
        """(first step, chunks, steps of a chunk); what is left over at the end is a chunk of its own."""
        size = min(self.plan.chunk_size or CHUNK, self.time)
        whole, rest = divmod(self.time, size)
        per_head = 5 * size * size + 3 * self.d_k * self.columns + 8 * size * self.columns
        numbers = self.batch * (self.heads * per_head + self.groups * 6 * size * self.d_k)
        budget = _BUDGET.get(self.q.device.type, _BUDGET_ELSEWHERE)
        count = max(1, budget // numbers, math.isqrt(whole))
        found = [(first * size, min(count, whole - first), size) for first in range(0, whole, count)]
        return [*found, (whole * size, 1, rest)] if rest else found

    def per_group(self, x: Tensor, block: tuple[int, int, int]) -> Tensor:
        """A view (chunks, batch, groups, steps, d_k) of q or k."""
        first, chunks, size = block
        return x[:, first : first + chunks * size].unflatten(1, (chunks, size)).permute(1, 0, 3, 2, 4)

    def per_head(self, x: Tensor, block: tuple[int, int, int]) -> Tensor:
        """A view (chunks, batch, groups, steps, shared, d_v) of v or y."""
        first, chunks, size = block
        cut = x[:, first : first + chunks * size].unflatten(2, (self.groups, self.shared))
        return cut.unflatten(1, (chunks, size)).permute(1, 0, 3, 2, 4, 5)

    def gate(self, x: Tensor, block: tuple[int, int, int]) -> Tensor:
        """A view (chunks, batch, groups, shared, steps) of log_decay or gain."""
        first, chunks, size = block
        cut = x[:, first : first + chunks * size].unflatten(2, (self.groups, self.shared))
        return cut.unflatten(1, (chunks, size)).permute(1, 0, 3, 4, 2)

    def pack(self, state: Any) -> Tensor:
        """S or (C, n) as one matrix per group."""
        full = state[0] if len(state) == 1 else torch.cat((state[0], state[1].unsqueeze(-1)), -1)
        split = full.to(self.plan.dtype).unflatten(1, (self.groups, self.shared))
        return split.permute(0, 1, 3, 2, 4).reshape(self.batch, self.groups, self.d_k, -1)

    def unpack(self, state: Tensor) -> ChunkState:
        """S or (C, n) of one matrix per group."""
        split = state.unflatten(-1, (self.shared, self.columns)).permute(0, 1, 3, 2, 4)
        full = split.reshape(self.batch, self.heads, self.d_k, self.columns)
        if not self.plan.normalized:
            return (full.contiguous(),)
        return full[..., :-1].contiguous(), full[..., -1].contiguous()

    def first_m(self) -> Tensor | None:
        """(batch, groups, shared), with normalized."""
        if not self.plan.normalized:
            return None
        return self.state[2].to(self.plan.dtype).unflatten(1, (self.groups, self.shared))


class _Block:
    """Some chunks of a problem, with their weights and their contributions to the state."""

    def __init__(self, problem: Problem, block: tuple[int, int, int], m: Tensor | None) -> None:
        self.problem, self.block = problem, block
        plan, dtype = problem.plan, problem.plan.dtype
        self.chunks, self.size = block[1:]
        self.k = problem.per_group(problem.k, block).to(dtype).contiguous()
        self.v = problem.per_head(problem.v, block).to(dtype)
        self.gain = problem.gate(problem.gain, block).to(dtype)
        self.sequence: Tensor | None = None
        if problem.reset is not None:
            cut = problem.reset[:, block[0] : block[0] + self.chunks * self.size].unflatten(1, (self.chunks, self.size))
            self.sequence = cut.cumsum(-1).transpose(0, 1)[:, :, None, None]  # which sequence of its chunk a step is in
        if plan.normalized:
            u = torch.nn.functional.pad(self.v, (0, 1), value=1.0)
        else:
            u = self.v * self.gain.transpose(3, 4).unsqueeze(-1)
        self.u = u.contiguous()
        # The sum of log decays in two parts: a step that decays by e^−1000 must not blur the others' differences.
        exact = problem.gate(problem.log_decay, block).to(torch.float64).cumsum(-1)
        self.sums = exact.to(dtype)
        self.rest = None if dtype == torch.float64 else (exact - self.sums.double()).to(dtype)
        tail = self.sums[..., -1:] - self.sums
        if self.rest is not None:
            tail += self.rest[..., -1:] - self.rest
        total, start = self.sums[..., -1].clone(), self.sums.clone()
        if plan.normalized:
            tail += self.gain
        if self.sequence is not None:
            tail.masked_fill_(self.sequence != self.sequence[..., -1:], -math.inf)
            start.masked_fill_(self.sequence > 0, -math.inf)
            total.masked_fill_(self.sequence[..., -1] > 0, -math.inf)
        self.m: list[Tensor] | None = None  # at the start of every chunk and at the end
        if m is not None:
            peaks, self.m = tail.amax(-1), [m]
            for chunk in range(self.chunks):
                self.m.append(torch.maximum(total[chunk] + self.m[chunk], peaks[chunk]))
            before, after = torch.stack(self.m[:-1]), _finite(torch.stack(self.m[1:]))
            start += before.unsqueeze(-1)
            total += before - after
            tail -= after.unsqueeze(-1)
        self.start, self.keep, self.write = start, total.exp_(), tail.exp_()
        self.written = self.u * self.write.transpose(3, 4).unsqueeze(-1)  # a ⊙ U

    def last_m(self) -> Tensor | None:
        return None if self.m is None else self.m[-1]

    def states(self, first: Tensor) -> Tensor:
        """The states at the start of every chunk and at the end: (chunks + 1, batch, groups, d_k, shared · columns)."""
        states = first.new_empty((self.chunks + 1, *first.shape))
        states[0] = first
        torch.matmul(self.k.transpose(3, 4), self.written.flatten(4), out=states[1:])
        for chunk in range(self.chunks):
            self._of_state(states[chunk + 1]).addcmul_(self._of_state(states[chunk]), self._keep(chunk))
        return states

    def grad_states(self, read: Tensor, last: Tensor) -> Tensor:
        """Likewise their gradients, given that of the state at the end; read: w ⊙ dY."""
        grads = last.new_empty((self.chunks + 1, *last.shape))
        grads[-1] = last
        torch.matmul(self.q.transpose(3, 4), read.flatten(4), out=grads[:-1])
        for chunk in reversed(range(self.chunks)):
            self._of_state(grads[chunk]).addcmul_(self._of_state(grads[chunk + 1]), self._keep(chunk))
        return grads

    def _of_state(self, state: Tensor) -> Tensor:
        return state.unflatten(-1, (self.problem.shared, self.problem.columns))

    def _keep(self, chunk: int) -> Tensor:
        return self.keep[chunk, :, :, None, :, None]

    def read(self, states: Tensor) -> Tensor:
        """Y, (chunks, batch, groups, steps, shared, columns); leaves the weights it is made of behind."""
        problem = self.problem
        self.q = problem.per_group(problem.q, self.block).to(problem.plan.dtype).mul(problem.scale).contiguous()
        d = self.sums.unsqueeze(-1) - self.sums.unsqueeze(-2)
        if self.rest is not None:
            d += self.rest.unsqueeze(-1) - self.rest.unsqueeze(-2)
        later = torch.ones((self.size, self.size), dtype=torch.bool, device=d.device).triu(1)
        if self.m is not None:
            d += self.gain.unsqueeze(-2)
        if self.sequence is not None:
            later = later | (self.sequence.unsqueeze(-1) != self.sequence.unsqueeze(-2))
        d.masked_fill_(later, -math.inf)
        if self.m is not None:
            self.peak = torch.maximum(self.start, d.amax(-1))  # m_i
            by = _finite(self.peak)
            self.start -= by
            d -= by.unsqueeze(-1)
        self.within = d.exp_()  # E
        self.across = self.start.exp_().transpose(3, 4).unsqueeze(-1)  # w
        self.scores = self.q @ self.k.transpose(3, 4)
        self.mixed = self.within * self.scores.unsqueeze(3)  # E ⊙ Q Kᵀ
        y = (self.q @ states[:-1].flatten(4)).unflatten(-1, (problem.shared, problem.columns)).mul_(self.across)
        return y.add_((self.mixed @ self.u.transpose(3, 4)).transpose(3, 4))

    def divide(self, y: Tensor) -> Tensor:
        """y of Y, where normalized."""
        self.inner, floor = y[..., -1:], torch.exp(-self.peak).transpose(3, 4).unsqueeze(-1)
        self.above = self.inner.abs() > floor  # the floor is a constant: where it counts, no gradient passes
        self.norm = torch.where(self.above, self.inner.abs(), floor).add_(self.problem.plan.eps)
        return y[..., :-1] / self.norm

    def divide_back(self, y: Tensor, grad: Tensor) -> Tensor:
        """dY of dy, where normalized."""
        by_value = grad / self.norm
        by_norm = (self.divide(y) * by_value).sum(-1, keepdim=True).neg_()
        return torch.cat((by_value, torch.where(self.above, by_norm * self.inner.sign(), 0.0)), -1)


def _finite(m: Tensor) -> Tensor:
    """m where it may be subtracted: before anything is written it is −∞, and every weight e^{−∞}."""
    return m.masked_fill(m == -math.inf, 0.0)


def outputs(problem: Problem, y: Tensor) -> tuple[ChunkState, tuple[Tensor, ...]]:
    """Writes y, of any strides; the state at the end, and what `gradients` needs of this again (here nothing)."""
    state, m = problem.pack(problem.state[:2]), problem.first_m()
    for where in problem.blocks():
        block = _Block(problem, where, m)
        states = block.states(state)
        result = block.read(states)
        problem.per_head(y, where).copy_(block.divide(result) if problem.plan.normalized else result)
        state, m = states[-1].clone(), block.last_m()
    return _end(problem, state, m), ()


def end(problem: Problem) -> ChunkState:
    """The state at the end alone, as of `outputs`."""
    state, m = problem.pack(problem.state[:2]), problem.first_m()
    for where in problem.blocks():
        block = _Block(problem, where, m)
        state, m = block.states(state)[-1].clone(), block.last_m()
    return _end(problem, state, m)


def _end(problem: Problem, state: Tensor, m: Tensor | None) -> ChunkState:
    found = problem.unpack(state)
    return found if m is None else (*found, m.flatten(1).clone())


def _starts(problem: Problem) -> Iterator[tuple[tuple[int, int, int], Tensor, Tensor | None]]:
    """Every block with the state and m at its start."""
    state, m = problem.pack(problem.state[:2]), problem.first_m()
    blocks = problem.blocks()
    for where in blocks:
        yield where, state, m
        if where is not blocks[-1]:
            block = _Block(problem, where, m)
            state, m = block.states(state)[-1].clone(), block.last_m()


GradEnd = Sequence[Tensor | None]
"""Gradients of the state at the end, S or (C, n, None); None for a zero."""


def gradients(
    problem: Problem,
    kept: Sequence[Tensor],
    grad_y: Tensor | None,
    grad_end: GradEnd,
    grads: Sequence[Tensor],
) -> ChunkState:
    """Writes those of q, k, v, log_decay and gain, of any strides; returns those of the state at the start (m's is 0).

    kept: what `outputs` gave.
    """
    grad_state = _packed_end(problem, grad_end)
    for where, block, states, y, grad in _reversed(problem, grad_y):
        grad_state = _pull_back(block, where, grads, states, y, grad, grad_state)
    return _unpacked_start(problem, grad_state)


def entry_gradient(problem: Problem, kept: Sequence[Tensor], grad_y: Tensor | None, grad_end: GradEnd) -> ChunkState:
    """Only what `gradients` returns."""
    grad_state = _packed_end(problem, grad_end)
    for _, block, _, _, grad in _reversed(problem, grad_y):
        grad_state = block.grad_states(grad * block.across, grad_state)[0].clone()
    return _unpacked_start(problem, grad_state)


def _packed_end(problem: Problem, grad_end: GradEnd) -> Tensor:
    sizes, dtype = problem.state[:2] if problem.plan.normalized else problem.state, problem.plan.dtype
    return problem.pack(
        [torch.zeros_like(part, dtype=dtype) if g is None else g for part, g in zip(sizes, grad_end, strict=False)]
    )


def _unpacked_start(problem: Problem, grad_state: Tensor) -> ChunkState:
    first = problem.unpack(grad_state)
    if problem.plan.normalized:
        first = (*first, torch.zeros_like(problem.state[2]))
    return tuple(g.to(part.dtype) for g, part in zip(first, problem.state, strict=True))


def _reversed(
    problem: Problem, grad_y: Tensor | None
) -> Iterator[tuple[tuple[int, int, int], _Block, Tensor, Tensor, Tensor]]:
    """From the last block to the first: where it is, its weights, states, Y and dY."""
    for where, state, m in reversed(list(_starts(problem))):
        block = _Block(problem, where, m)
        states = block.states(state)
        y = block.read(states)
        if grad_y is None:
            grad = torch.zeros_like(y)
        else:
            grad = problem.per_head(grad_y, where).to(problem.plan.dtype)
            if problem.plan.normalized:
                block.divide(y)
                grad = block.divide_back(y, grad)
            grad = grad.contiguous()
        yield where, block, states, y, grad


def _pull_back(
    block: _Block,
    where: tuple[int, int, int],
    grads: Sequence[Tensor],
    states: Tensor,
    y: Tensor,
    grad: Tensor,
    grad_last: Tensor,
) -> Tensor:
    """Writes a block's part of the gradients; returns that of the state at its start. grad: dY; grad_last: dS'."""
    problem = block.problem
    read = grad * block.across
    grad_states = block.grad_states(read, grad_last)
    by_head, u = grad.transpose(3, 4), block.u.transpose(3, 4)
    inner = (by_head @ u.transpose(4, 5)).mul_(block.within).sum(3)  # A
    grad_q = torch.matmul(inner, block.k).add_(read.flatten(4) @ states[:-1].transpose(3, 4)).mul_(problem.scale)
    grad_k = torch.matmul(inner.transpose(3, 4), block.q)
    grad_k += block.written.flatten(4) @ grad_states[1:].transpose(3, 4)
    by_write = block.write.transpose(3, 4).unsqueeze(-1)
    grad_u = (block.k @ grad_states[1:]).unflatten(-1, (problem.shared, problem.columns)).mul_(by_write)
    grad_u += (block.mixed.transpose(4, 5) @ by_head).transpose(3, 4)
    flow = (y * grad).sum(-1) - (block.u * grad_u).sum(-1)
    at_end = (states[1:] * grad_states[1:]).unflatten(-1, (problem.shared, problem.columns)).sum((3, 5))
    sequence = None if block.sequence is None else block.sequence[:, :, 0, 0]
    by_step, ends = flow.transpose(2, 3).flatten(3), at_end.flatten(2).unsqueeze(-2)
    passing = past(sequence, by_step, ends).unflatten(-1, (problem.groups, problem.shared)).movedim(2, -1)
    if problem.plan.normalized:
        grad_v, grad_gain = grad_u[..., :-1], (block.u * grad_u).sum(-1)
    else:
        grad_v, grad_gain = grad_u * block.gain.transpose(3, 4).unsqueeze(-1), (block.v * grad_u).sum(-1)
    problem.per_group(grads[0], where).copy_(grad_q)
    problem.per_group(grads[1], where).copy_(grad_k)
    problem.per_head(grads[2], where).copy_(grad_v)
    problem.gate(grads[3], where).copy_(passing)
    problem.gate(grads[4], where).copy_(grad_gain.transpose(3, 4))
    return grad_states[0].clone()


def past(sequence: Tensor | None, flow: Tensor, at_end: Tensor) -> Tensor:
    """What flows past every step of a chunk: the sum of flow from it to the end of its sequence, or of the chunk, where
    the flow into the next one is added. sequence (…, steps), which one a step is in; flow (…, steps, heads); at_end
    (…, 1, heads). In float64: most of it cancels."""
    wide = flow.to(torch.float64)
    if sequence is None:
        return (wide.flip(-2).cumsum(-2).flip(-2) + at_end).to(flow.dtype)
    same = (sequence.unsqueeze(-1) == sequence.unsqueeze(-2)).triu()
    found = same.to(torch.float64) @ wide
    found += torch.where(sequence == sequence[..., -1:], 1.0, 0.0).unsqueeze(-1) * at_end
    first = torch.cat((sequence[..., :1], sequence.diff(dim=-1)), -1) > 0  # what decays there was cut off
    return found.masked_fill_(first.unsqueeze(-1), 0.0).to(flow.dtype)
