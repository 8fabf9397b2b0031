"""Solves a recurrence with the fused kernels that generate.py derives from its cell.

Nothing here waits for the device: how a solve went comes back in tensors. What runs under Triton's interpreter (on a
CPU with TRITON_INTERPRET=1 set before Triton is imported) is the same as on a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .adjoint import Gradients
from .affine import AffineMap, whole
from .cell import Tensors
from .derive import Derived
from .errors import ArgumentError
from .newton import NewtonOptions
from .problem import Problem, SolveInfo
from .triton_launch import CHECK, COMPUTE, TINY, Kernels, Launch, default_launches, tile_shape
from .triton_table import FEW, ROUNDS, Choice, choose, pieces_for

__all__ = [
    "Adjoint",
    "Launch",
    "check_device",
    "check_tile",
    "decode",
    "default_launches",
    "gradients_triton",
    "interpreted",
    "solve_triton",
]

_LARGEST_TILE = 64


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter in this process."""
    return bool(triton.knobs.runtime.interpret)


def check_device(device: torch.device) -> None:
    """Refuses a CPU that does not interpret, in one line."""
    if device.type == "cpu" and not interpreted():
        raise ArgumentError(
            "method 'triton' needs a GPU but inputs are on cpu; use method='auto', or set TRITON_INTERPRET=1 before "
            "Triton is imported"
        )


def check_tile(method: str, tile: int | None) -> None:
    """Refuses a tile that the kernel of tiles cannot have."""
    if method == "triton-tile" and tile is not None and (tile & (tile - 1) or tile > _LARGEST_TILE):
        raise ArgumentError(f"tile is {tile}; method 'triton-tile' takes a power of two up to {_LARGEST_TILE}")


def solve_triton(problem: Problem, method: str, options: NewtonOptions) -> tuple[Tensors, Tensors, SolveInfo]:
    """States (batch, time, channel) in the dtype of the inputs, the final state (batch, channel) in the compute dtype,
    and how it went. method: "triton" or one of its three algorithms by name."""
    cell, given = problem.derived.cell, problem.inputs[0].dtype
    batch, time, channels = problem.shape
    if time == 1 and method == "triton":
        state = problem.state
        if problem.reset is not None:
            state = tuple(s.masked_fill(problem.reset, 0.0) for s in state)
        final = decode(problem.derived, state, tuple(x[:, 0] for x in problem.inputs), problem.params, problem.dtype)
        states = tuple(h.to(given, copy=True).unsqueeze(1) for h in final)
        return states, final, problem.info(0, 0.0, "triton-decode")
    choice = _choice(problem, method, options.tile, len(cell.inputs) + len(cell.state))
    kernels = Kernels(problem)
    names = kernels.names
    states = tuple(kernels.empty(batch, time, channels, dtype=given) for _ in cell.state)
    final = tuple(kernels.empty(batch, channels) for _ in cell.state)
    kernels.more(zip(names.ptr(names.state), states, strict=True))
    kernels.more(zip(names.ptr(names.state, "_final"), final, strict=True))
    if choice.method == "walk":
        kernels.run("walk_kernel", FEW=kernels.programs(kernels.walk_block) * kernels.walk_warps <= FEW)
        return states, final, problem.info(0, 0.0, "triton-walk")
    run = _tile if choice.method == "tile" else _segments
    tol = options.tol if options.tol is not None else (1e-12 if problem.dtype == torch.float64 else 1e-6)
    return states, final, run(kernels, choice, tol, options)


def _choice(problem: Problem, method: str, tile: int | None, numbers: int) -> Choice:
    """The algorithm, and pieces of time of which all but the last have a multiple of CHECK steps.

    numbers: how many a step of one channel reads and writes.
    """
    batch, time, channels = problem.shape
    name = method.removeprefix("triton").removeprefix("-")
    if not name:
        width = numbers * problem.inputs[0].element_size()
        choice = choose(problem.derived.cell.name, batch, time, channels, width)
        name, pieces = choice.method, choice.pieces
    else:
        pieces = -(-time // tile) if tile else max(2, pieces_for(batch, time, channels))
    return Choice(name, -(-time // _length(time, pieces)) if name == "segments" else 1)


def _length(time: int, pieces: int) -> int:
    """The steps of a piece."""
    return -(-time // (pieces * CHECK)) * CHECK


def _tile(kernels: Kernels, choice: Choice, tol: float, options: NewtonOptions) -> SolveInfo:
    tile, block, warps = tile_shape(kernels.names)
    tile, block = options.tile or tile, min(block, triton.next_power_of_2(kernels.channels))
    programs = kernels.programs(block)
    iterations, update = kernels.counters(programs), kernels.empty(programs, dtype=torch.float32)
    kernels.bounds()
    kernels.more(iterations_ptr=iterations, update_ptr=update, tol=tol, limit=min(tile, options.max_iter or tile))
    kernels.run("tile_kernel", block, warps=warps, TILE=tile)
    return _info(kernels, iterations.amax(), update.amax(), "triton-tile")


def _segments(kernels: Kernels, choice: Choice, tol: float, options: NewtonOptions) -> SolveInfo:
    names, batch, channels, time = kernels.names, kernels.batch, kernels.channels, kernels.time
    pieces, length, checks = choice.pieces, _length(time, choice.pieces), -(-time // CHECK)
    for what in ("_used", "_end", "_entry"):
        kernels.more((pointer, kernels.empty(pieces, batch, channels)) for pointer in names.ptr(names.state, what))
    kernels.more((f"{m}_ptr", kernels.empty(pieces, batch, channels).zero_()) for m in names.product)
    kernels.more((pointer, kernels.empty(batch, checks, channels)) for pointer in names.ptr(names.state, "_check"))
    kernels.bounds()
    many, few = kernels.programs(kernels.walk_block, pieces), kernels.programs(kernels.walk_block)
    walked, rounds, last_walked, last_rounds = (kernels.counters(count) for count in (many, many, few, few))
    update = kernels.empty(few, dtype=torch.float32)
    kernels.more(walked_ptr=walked, rounds_ptr=rounds, last_walked_ptr=last_walked, last_rounds_ptr=last_rounds)
    meet = min(tol, 2 * torch.finfo(kernels.problem.dtype).eps)
    kernels.more(update_ptr=update, pieces=pieces, length=length, checks=checks, tol=meet, CHECK=CHECK)
    kernels.run("segments_kernel", pieces=pieces, AGAIN=False)
    for _ in range(min(options.max_iter or ROUNDS, pieces - 1)):
        kernels.run("segments_join_kernel")
        kernels.run("segments_kernel", pieces=pieces, AGAIN=True)
    kernels.run("segments_finish_kernel")
    again = (walked.sum() + last_walked.sum()).to(torch.float32) / (few * time)
    return _info(kernels, 1 + rounds.amax() + last_rounds.amax(), update.amax(), "triton-segments", again)


def _info(kernels: Kernels, iterations: Tensor, update: Tensor, method: str, again: Tensor | None = None) -> SolveInfo:
    """Plain numbers on a CPU, tensors on a device."""
    if kernels.problem.device.type == "cpu":
        return SolveInfo(int(iterations), float(update), method, 0.0 if again is None else float(again))
    return SolveInfo(iterations, update, method, torch.zeros_like(update) if again is None else again)


def decode(derived: Derived, state: Tensors, inputs: Tensors, params: Tensors, dtype: torch.dtype) -> Tensors:
    """One step: state (batch, channel) and params (channel,) in the compute dtype, inputs (batch, channel)."""
    kernels = Kernels(Problem(derived, tuple(x.unsqueeze(1) for x in inputs), params, state, None, dtype))
    names = kernels.names
    final = tuple(kernels.empty(kernels.batch, kernels.channels) for _ in names.state)
    kernels.more(zip(names.ptr(names.state, "_final"), final, strict=True))
    kernels.run("decode_kernel")
    return final


def gradients_triton(
    problem: Problem,
    states: Tensors,
    grad_states: tuple[Tensor | None, ...],
    grad_final: tuple[Tensor | None, ...],
    method: str,
    options: NewtonOptions,
) -> Gradients:
    """The gradients of sum(grad_states · states) + sum(grad_final · final); see `Adjoint`."""
    return Adjoint(problem, states, grad_states, method, options).gradients(grad_final)


class Adjoint:
    """The backward pass of a solved problem: states as `solve_triton` gave them, their cotangents (None: zero). What
    the pieces of time that walk side by side are as maps is found once, for `part_map` and `gradients`."""

    def __init__(
        self,
        problem: Problem,
        states: Tensors,
        grads: Sequence[Tensor | None],
        method: str,
        options: NewtonOptions,
    ) -> None:
        cell, time = problem.derived.cell, problem.shape[1]
        numbers = 2 * (len(cell.inputs) + len(cell.state))
        self.pieces = _choice(problem, "triton" if method == "triton-tile" else method, options.tile, numbers).pieces
        self.kernels, self.mapped = Kernels(problem), False
        names, length = self.kernels.names, _length(time, self.pieces)
        self.kernels.more(zip(names.ptr(names.state), states, strict=True), length=length, pieces=self.pieces)
        for h, grad in zip(names.state, grads, strict=True):
            self.kernels.given[f"HAS_G_{h.upper()}"] = grad is not None
            self.kernels.given[f"g_{h}_ptr"] = states[0] if grad is None else grad.contiguous()

    def gradients(self, grad_final: Sequence[Tensor | None]) -> Gradients:
        """Given the cotangent of the final state. The inputs' are in the dtype of the inputs, the others in the compute
        dtype. Deterministic: every program adds to its own row, and the rows are added in one order."""
        kernels, pieces, names = self.kernels, self.pieces, self.kernels.names
        problem, given = kernels.problem, kernels.problem.inputs[0].dtype
        batch, time, channels = problem.shape
        final = [
            kernels.empty(batch, channels).zero_() if last is None else last.to(problem.dtype).contiguous()
            for last in grad_final
        ]
        to_inputs = tuple(kernels.empty(batch, time, channels, dtype=given) for _ in names.inputs)
        to_params = tuple(kernels.empty(pieces * batch, channels) for _ in names.params)
        to_state = tuple(kernels.empty(batch, channels) for _ in names.state)
        kernels.more((f"to_{x}_ptr", grad) for x, grad in zip(names.inputs, to_inputs, strict=True))
        kernels.more((f"to_{a}_ptr", grad) for a, grad in zip(names.params, to_params, strict=True))
        kernels.more((f"to_{h}_first_ptr", grad) for h, grad in zip(names.state, to_state, strict=True))
        if pieces == 1:
            kernels.more((f"carry_{h}_ptr", last) for h, last in zip(names.state, final, strict=True))
        else:
            kernels.more((f"g_{h}_final_ptr", last) for h, last in zip(names.state, final, strict=True))
            kernels.more((f"carry_{h}_ptr", kernels.empty(pieces, batch, channels)) for h in names.state)
            self._maps()
            kernels.run("backward_join_kernel")
        kernels.run("backward_kernel", pieces=pieces)
        return Gradients(to_inputs, tuple(grad.sum(0) for grad in to_params), to_state)

    def part_map(self) -> tuple[Tensor, Tensor]:
        """M and d of `time_shards_solve.part_map`: those of the pieces joined."""
        self._maps()
        kernels, names = self.kernels, self.kernels.names
        size, zero = range(len(names.state)), kernels.empty(self.pieces, kernels.batch, kernels.channels).zero_()
        rows = [[names.entry("m", i, j) for j in size] for i in size]
        entries = [[kernels.given[f"{name}_ptr"] if name else zero for name in row] for row in rows]
        matrix = torch.stack([torch.stack(row) for row in entries])
        offset = torch.stack([kernels.given[f"d_{h}_ptr"] for h in names.state])
        joined = whole(AffineMap(*(x.movedim(-3, -2) for x in (matrix, offset))))  # pieces are its time
        assert joined.matrix is not None
        return joined.matrix.transpose(0, 1), joined.offset

    def _maps(self) -> None:
        """The affine map of every piece, (pieces, batch, channel) an entry."""
        if self.mapped:
            return
        kernels, self.mapped = self.kernels, True
        maps = [*kernels.names.product, *(f"d_{h}" for h in kernels.names.state)]
        kernels.more((f"{name}_ptr", kernels.empty(self.pieces, kernels.batch, kernels.channels)) for name in maps)
        kernels.more(steps_ptr=kernels.counters(kernels.programs(kernels.walk_block, self.pieces)))
        tiny = TINY[COMPUTE[kernels.problem.dtype]]
        kernels.run("backward_maps_kernel", pieces=self.pieces, TINY=tiny)
