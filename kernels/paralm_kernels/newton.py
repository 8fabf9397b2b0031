"""Newton's method over time (ParaRNN, arXiv 2510.21450): all steps of a tile at once, repeated until they agree.

    J_t = ∂f/∂h at (h_{t−1}, x_t)      r_t = f(h_{t−1}, x_t) − h_t      δ_t = J_t δ_{t−1} + r_t      h ← h + δ

Whatever the Jacobian, k iterations make the first k steps exact, so a tile of C steps needs at most about C (floating
point may need another to settle); close to the solution convergence is quadratic. A whole sequence need not converge
in a useful number, hence the tiles. Written in δ: the affine form h_t = J h_{t−1} + (f − J h) floors at eps times the
largest product of Jacobians, this one settles bit for bit on the plain loop. It stops on the update, not on the
residual: with gates near 0.0025 a residual of 7e-7 left an error of 1.2e-5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import AffineMap, trajectory
from .cell import Tensors
from .derive import box_of
from .errors import NotConverged
from .problem import Problem, SolveInfo

_SLACK = 2.0**-10
"""Relative widening of a cell's box: rounding may carry a true state past it, and must not be clamped away."""


@dataclass(frozen=True)
class NewtonOptions:
    """tile: steps solved at once; None: `default_tile`. tol: on |update| / (1 + |state|); None: 1e-6, in float64 1e-12.
    max_iter: per tile; None: as many as exactness can take."""

    tile: int | None = None
    tol: float | None = None
    max_iter: int | None = None


def default_tile(problem: Problem) -> int:
    """On a CPU as many steps as the cache holds: fewer tiles cost fewer calls (measured: 1024 beats 64 fourfold at 16
    channels and is as good at 256). On a device few, as each tile runs as many iterations as it has steps."""
    if not _on_cpu(problem):
        return 16
    batch, _, channel = problem.shape
    return min(1024, max(64, 65536 // (batch * channel)))


def solve_newton(problem: Problem, options: NewtonOptions) -> tuple[Tensors, SolveInfo]:
    """The states (batch, time, channel) in the compute dtype.

    Raises NotConverged on a CPU. On a device nothing is looked at: every tile runs its full number of iterations,
    which is exact by the bound unless `max_iter` is smaller, and `last_update` tells.
    """
    batch, time, channel = problem.shape
    length = options.tile or default_tile(problem)
    tol = options.tol if options.tol is not None else (1e-12 if problem.dtype == torch.float64 else 1e-6)
    states = tuple(problem.empty(batch, time, channel) for _ in problem.state)
    entry = torch.stack(problem.state)
    iterations, updates = 0, []
    for start in range(0, time, length):
        tile = Tile(problem, entry, start, min(start + length, time))
        solved, used, update = tile.solve(tol, options.max_iter)
        for component, part in zip(states, solved, strict=True):
            component[:, start : tile.stop] = part
        entry = solved[:, :, -1]
        iterations = max(iterations, used)
        updates.append(update)
    return states, problem.info(iterations, torch.stack(updates).amax(), "newton")


class Tile:
    """Some steps of a problem, from a known state before them."""

    def __init__(self, problem: Problem, entry: Tensor, start: int, stop: int) -> None:
        self.problem, self.entry, self.start, self.stop = problem, entry, start, stop
        self.inputs, self.mask = problem.inputs_at(start, stop), problem.mask(start, stop)
        self.box = _box(problem, entry)

    def solve(self, tol: float, max_iter: int | None) -> tuple[Tensor, int, Tensor]:
        """States (S, batch, time, channel), iterations used, last update. NotConverged on a CPU."""
        length, on_cpu = self.stop - self.start, _on_cpu(self.problem)
        # twice the length: a wild iterate may need a second pass to settle to the last bit
        bound = max_iter if max_iter is not None else (2 * length + 2 if on_cpu else length + 1)
        h = guess = self.guess()
        update = torch.zeros((), dtype=h.dtype, device=h.device)
        for iteration in range(1, bound + 1):
            residual, jacobian = self.linearise(h)
            delta = trajectory(AffineMap(jacobian, residual))
            h = h + delta
            h = self.clamp(torch.where(torch.isfinite(h), h, guess))
            # the update before clamping: at a wall of the box the clamped one is zero though nothing is solved
            update = (delta.abs() / (1 + h.abs())).amax()
            if on_cpu and float(update) <= tol:
                return h, iteration, update
        if on_cpu:
            raise NotConverged(
                f"newton: cell {self.problem.derived.cell.name!r} did not converge within max_iter={bound} iterations "
                f"in steps {self.start}..{self.stop - 1}: largest update {float(update):.1e}, tolerance {tol:.1e}; "
                "raise max_iter, use a smaller tile, or pass on_failure='sequential'"
            )
        return h, bound, update

    def guess(self) -> Tensor:
        """f(0, x), bettered by the cell's Picard sweeps; finite."""
        h = self.step(torch.zeros_like(self.entry).unsqueeze(2).expand(-1, -1, self.stop - self.start, -1))
        for _ in range(self.problem.derived.cell.picard):
            h = self.step(self.previous(h))
        return torch.where(torch.isfinite(h), h, 0.0)

    def previous(self, h: Tensor) -> Tensor:
        """The state before each step."""
        shifted = torch.cat((self.entry.unsqueeze(2), h[:, :, :-1]), 2)
        return shifted if self.mask is None else shifted.masked_fill_(self.mask, 0.0)

    def step(self, before: Tensor) -> Tensor:
        """One step everywhere."""
        return self.clamp(torch.stack(self.problem.code.step(*before, *self.inputs, *self.problem.params)))

    def linearise(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The residual f(h_{t−1}, x_t) − h_t, and the Jacobians, zero where a reset cuts."""
        size, diagonal = len(h), self.problem.derived.diagonal
        values = self.problem.code.linearised(*self.previous(h), *self.inputs, *self.problem.params)
        jacobian = torch.stack(values[size:])
        jacobian = jacobian if diagonal else jacobian.unflatten(0, (size, size))
        if self.mask is not None:
            jacobian = jacobian.masked_fill(self.mask, 0.0)
        return torch.stack(values[:size]) - h, jacobian

    def clamp(self, h: Tensor) -> Tensor:
        """Clamps to the cell's box, in place."""
        for component, bound in zip(h, self.box, strict=True):
            if bound is not None:
                torch.clamp(component, min=-bound, max=bound, out=component)
        return h


def _box(problem: Problem, entry: Tensor) -> list[Tensor | None]:
    """The cell's bounds for this tile, widened by rounding, (batch, 1, channel) or 0-dimensional."""
    bounds = box_of(problem.derived.cell, tuple(entry))
    wide: list[Tensor | None] = []
    for bound in bounds:
        if isinstance(bound, float | int):  # filled, not copied: a copy would wait for the device
            bound = torch.full((), float(bound), dtype=problem.dtype, device=problem.device)
        if bound is not None:
            bound = bound.to(problem.dtype) * (1 + _SLACK)
            bound = bound.unsqueeze(1) if bound.ndim == 2 else bound
        wide.append(bound)
    return wide


def _on_cpu(problem: Problem) -> bool:
    return problem.device.type == "cpu"
