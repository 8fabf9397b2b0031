"""A quasi-Newton solve of the dense recurrences over all steps of a tile at once, made exact by its own bound.

The exact Jacobian of a head is d_head × d_head at every step, too much to scan over. Kept of it is what a channel has
to do with itself, through its own weights R_jj: a cell that is elementwise over channels, of which newton.py's tiles
and scans know everything. The other channels are read from the iterate:

    u_t = x_t + (R − diag R) h_{t−1}     r_t = f(s_{t−1}, u_t; diag R) − s_t     δ_t = J_t δ_{t−1} + r_t     s ← s + δ

with J block-diagonal per channel (DEER's quasi-Newton, arXiv 2407.19115; with J exact, ParaRNN, arXiv 2510.21450). The
fixed point is the sequential solution, whatever J; k iterations make the first k steps exact, so a tile of C steps is
exact after about C. Convergence is linear at a rate that R's off-diagonal part sets, so a small update alone does not
say that little is missing: it stops when what the rate lets expect, update · ρ / (1 − ρ), is below the tolerance too.

sLSTM is solved in the coordinates of slstm_diagonal (log-normaliser and average), which have no scale to overflow;
c, n and m are then recomputed from the solved h: m by a scan over max-plus maps, c and n by one over affine maps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine import AffineMap, trajectory
from .cell import Cell
from .cell_library.slstm_diagonal import SLSTMDiagonal, coordinate
from .dense_cells import DenseKind, Tensors
from .dense_torch import DensePlan, Solve, matrix_of, run
from .derive import derive
from .errors import NotConverged
from .newton import NewtonOptions, Tile
from .problem import Problem


class _LSTM(Cell):
    name = "lstm"
    state = ("c", "h")
    inputs = ("i", "f", "z", "o")
    params = ("r_i", "r_f", "r_z", "r_o")
    picard = 2

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        c, h = state
        i, f, z, o = (x + r * h for x, r in zip(inputs, params, strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        return c, torch.sigmoid(o) * torch.tanh(c)

    def box(self, state: Tensors) -> tuple[Tensor | None, ...]:
        return None, state[1].abs().clamp(min=1)


class _GRU(Cell):
    name = "gru"
    state = ("h",)
    inputs = ("r", "z", "a", "n")
    params = ("r_r", "r_z", "r_a")
    picard = 2

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (h,), (r, z, a, n), (r_r, r_z, r_a) = state, inputs, params
        n = torch.tanh(n + torch.sigmoid(r + r_r * h) * (a + r_a * h))
        return (n + torch.sigmoid(z + r_z * h) * (h - n),)

    def box(self, state: Tensors) -> tuple[Tensor]:
        return (state[0].abs().clamp(min=1),)


class _Elman(Cell):
    name = "elman"
    state = ("h",)
    inputs = ("z",)
    params = ("r_z",)
    picard = 2

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        return (torch.tanh(inputs[0] + params[0] * state[0]),)

    def box(self, state: Tensors) -> tuple[Tensor]:
        return (state[0].abs().clamp(min=1),)


_CELLS: dict[str, Cell] = {cell.name: cell for cell in (_LSTM(), _GRU(), _Elman())} | {"slstm": SLSTMDiagonal()}
"""What a channel has to do with itself, for each kind; h is the last component of each."""


def newton_run(options: NewtonOptions, on_failure: str) -> Solve:
    """`dense_torch.run` by the quasi-Newton method. on_failure: "raise" NotConverged, or "sequential"."""

    def solve(
        plan: DensePlan, inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensors, reset: Tensor | None
    ) -> tuple[Tensors, Tensors]:
        try:
            return _solve(plan, inputs, weight, bias, state, reset, options)
        except NotConverged:
            if on_failure == "raise":
                raise
            return run(plan, inputs, weight, bias, state, reset)

    return solve


def _solve(
    plan: DensePlan,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensors,
    reset: Tensor | None,
    options: NewtonOptions,
) -> tuple[Tensors, Tensors]:
    kind, dtype, cell = plan.kind, plan.dtype, _CELLS[plan.kind.name]
    _, time, _, heads, d_head = inputs.shape
    flat = tuple(part.transpose(0, 1).flatten(1) for part in state)  # (batch, channel), channels head by head
    begin = _to_coordinates(flat) if kind.name == "slstm" else _in_order(kind.state, cell.state, flat)
    diagonal = weight.to(dtype).diagonal(dim1=-2, dim2=-1).flatten(1)
    problem = Problem(derive(cell), _rows(kind, inputs, bias, dtype), diagonal.unbind(0), begin, reset, dtype)
    others = _Others(kind, weight, dtype)
    tol = options.tol if options.tol is not None else (1e-12 if dtype == torch.float64 else 1e-6)
    length, entry, every = options.tile or _default_tile(problem), torch.stack(begin), []
    for start in range(0, time, length):
        tile = _DenseTile(problem, entry, start, min(start + length, time), others)
        solved = tile.converge(tol, options.max_iter)
        if kind.name == "slstm":
            own = _from_rows(tile.rows_at(solved), flat, tile.mask)
            flat = tuple(part[:, -1] for part in own)
        else:
            own = _in_order(cell.state, kind.state, solved.unbind(0))
        entry = solved[:, :, -1]
        every.append(own)
    joined = (torch.cat(parts, 1) for parts in zip(*every, strict=True))
    states = tuple(part.unflatten(2, (heads, d_head)).permute(2, 1, 0, 3).contiguous() for part in joined)
    return states if plan.keep else states[:1], tuple(part[:, -1] for part in states)


def _default_tile(problem: Problem) -> int:
    """As many steps as the cache holds: an iteration costs its calls, and few tiles few of them (measured on one core,
    16 channels: 1024 is 3 to 20 times as fast as 32)."""
    batch, _, channel = problem.shape
    return min(1024, max(64, 65536 // (batch * channel)))


def _rows(kind: DenseKind, inputs: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensors:
    """The rows without recurrent products, (batch, time, channel) each."""
    batch, time, _, heads, d_head = inputs.shape
    rows = [torch.zeros((batch, time, heads * d_head), dtype=dtype, device=inputs.device) for _ in kind.rows]
    for gate, row in enumerate(kind.input_rows):
        rows[row] += inputs[:, :, gate].flatten(2)
    for index, row in enumerate(kind.bias_rows if bias is not None else ()):
        assert bias is not None
        rows[row] += bias[index].flatten().to(dtype)
    return tuple(rows)


def _in_order(given: tuple[str, ...], wanted: tuple[str, ...], parts: Tensors) -> Tensors:
    return tuple(parts[given.index(name)] for name in wanted)


class _Others:
    """(R − diag R) h for all steps: what the other channels of the head contribute to each recurrent row."""

    def __init__(self, kind: DenseKind, weight: Tensor, dtype: torch.dtype) -> None:
        self.count, (_, self.heads, self.d_head, _) = kind.recurrent, weight.shape
        eye = torch.eye(self.d_head, dtype=torch.bool, device=weight.device)
        self.matrix = matrix_of(weight.to(dtype).masked_fill(eye, 0.0), dtype)

    def __call__(self, h: Tensor) -> Tensors:
        batch, time, channels = h.shape
        product = torch.bmm(h.reshape(-1, self.heads, self.d_head).transpose(0, 1), self.matrix)
        rows = product.view(self.heads, batch, time, self.count, self.d_head).permute(3, 1, 2, 0, 4)
        return tuple(row.reshape(batch, time, channels) for row in rows)


class _DenseTile(Tile):
    """A tile whose inputs follow the iterate."""

    def __init__(self, problem: Problem, entry: Tensor, start: int, stop: int, others: _Others) -> None:
        super().__init__(problem, entry, start, stop)
        self.given, self.others = self.inputs, others

    def _follow(self, before: Tensor) -> None:
        count = self.others.count
        rows = zip(self.given[:count], self.others(before[-1]), strict=True)
        self.inputs = (*(x + other for x, other in rows), *self.given[count:])

    def step(self, before: Tensor) -> Tensor:
        self._follow(before)
        return super().step(before)

    def linearise(self, h: Tensor) -> tuple[Tensor, Tensor]:
        self._follow(self.previous(h))
        return super().linearise(h)

    def rows_at(self, h: Tensor) -> Tensors:
        """The rows, recurrent products included, at a trajectory."""
        before = self.previous(h)
        self._follow(before)
        count = self.others.count
        own = (x + r * before[-1] for x, r in zip(self.inputs[:count], self.problem.params, strict=True))
        return *own, *self.inputs[count:]

    def converge(self, tol: float, max_iter: int | None) -> Tensor:
        """The states (S, batch, time, channel). Waits for the device at every iteration. Raises NotConverged."""
        bound = max_iter if max_iter is not None else 2 * (self.stop - self.start) + 2
        h = guess = self.guess()
        floor, before, update = 8 * torch.finfo(h.dtype).eps, float("inf"), float("inf")
        for _ in range(bound):
            residual, jacobian = self.linearise(h)
            delta = trajectory(AffineMap(jacobian, residual))
            h = h + delta
            h = self.clamp(torch.where(torch.isfinite(h), h, guess))
            before, update = update, float((delta.abs() / (1 + h.abs())).amax())
            rate = update / before if before > 0 else 0.0
            if update <= tol and (update <= floor or (rate < 1 and update * rate / (1 - rate) <= tol)):
                return h
        raise NotConverged(
            f"newton: dense {self.problem.derived.cell.name!r} did not converge within max_iter={bound} iterations in "
            f"steps {self.start}..{self.stop - 1}: largest update {update:.1e}, tolerance {tol:.1e}; raise max_iter, "
            "use a smaller tile, or pass on_failure='sequential'"
        )


def _to_coordinates(state: Tensors) -> Tensors:
    """(h, c, n, m) → slstm_diagonal's (s, y, h); nothing written yet is s = y = 0."""
    h, c, n, m = state
    empty = (n <= 0) | (m == -float("inf"))
    log_n = torch.where(empty, 0.0, m) + torch.where(empty, 1.0, n).log()
    return torch.where(empty, 0.0, coordinate(log_n)), torch.where(empty, 0.0, c / torch.where(empty, 1.0, n)), h


def _from_rows(rows: Tensors, begin: Tensors, mask: Tensor | None) -> Tensors:
    """sLSTM's (h, c, n, m), (batch, time, channel) each, of a tile whose rows are known; begin: (batch, channel)."""
    i, f, z, o = rows
    _, c, n, m = begin
    decay = F.logsigmoid(f)
    if mask is not None:
        decay = decay.masked_fill(mask, -float("inf"))
    largest = _max_plus(decay, i, m)
    before = torch.cat((m.unsqueeze(1), largest[:, :-1]), 1)
    forget, write = torch.exp(decay + before - largest), torch.exp(i - largest)
    c, n = trajectory(
        AffineMap(torch.stack((forget, forget)), torch.stack((write * torch.tanh(z), write))), torch.stack((c, n))
    )
    return torch.sigmoid(o) * c / n, c, n, largest


def _max_plus(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """m_t = max(a_t + m_{t−1}, b_t) from m_{−1} = first, all steps by doubling; a may be −∞, b is finite."""
    b = torch.cat((torch.maximum(a[:, :1] + first.unsqueeze(1), b[:, :1]), b[:, 1:]), 1)
    reach = 1
    while reach < a.shape[1]:
        b = torch.cat((b[:, :reach], torch.maximum(b[:, :-reach] + a[:, reach:], b[:, reach:])), 1)
        a = torch.cat((a[:, :reach], a[:, :-reach] + a[:, reach:]), 1)
        reach *= 2
    return b
