"""Solves a recurrence with the fused kernels that generate.py derives from its cell: launches, and their arguments.

Nothing here waits for the device: how a solve went comes back in tensors. What runs under Triton's interpreter (on a
CPU with TRITON_INTERPRET=1 set before Triton is imported) is the same as on a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adjoint import Gradients
from .cell import Cell, Tensors
from .derive import Derived, derive
from .errors import ArgumentError
from .generate import module
from .newton import NewtonOptions
from .problem import Problem, SolveInfo
from .triton_table import ROUNDS, Choice, choose, pieces_for
from .triton_template import CHECK, Names

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}
WALK_BLOCK = 32
"""Channels of a program that walks: one a thread, one warp, so that few channels still make many programs."""


@dataclass(frozen=True)
class Launch:
    """One compilation of one kernel: what `triton.compile(ASTSource(function, signature, constexprs))` needs.

    signature: every argument's type, "constexpr" for those in constexprs.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 1
    num_stages: int = 1


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter in this process."""
    return bool(triton.knobs.runtime.interpret)


def check_device(device: torch.device) -> None:
    """Refuses a CPU that does not interpret, in one line."""
    if device.type == "cpu" and not interpreted():
        raise ArgumentError(
            "method 'triton' needs a GPU but inputs are on cpu; set TRITON_INTERPRET=1 before Triton is imported, or "
            "use method='auto'"
        )


def check_tile(method: str, tile: int | None) -> None:
    """Refuses a tile that the kernel of tiles cannot have."""
    if method == "triton-tile" and tile is not None and (tile & (tile - 1) or tile > 64):
        raise ArgumentError(f"tile is {tile}; method 'triton-tile' takes a power of two up to 64")


def tile_shape(names: Names) -> tuple[int, int, int]:
    """Steps, channels and warps of a tile that stays in registers: the matrices of more components take more."""
    return {1: (16, 64, 4), 2: (16, 32, 4)}.get(len(names.state), (16, 16, 4))


@cache
def _names(derived: Derived) -> Names:
    return Names(derived)


class _Kernels:
    """A problem with the arguments that its kernels share."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.names = problem, _names(problem.derived)
        self.module = module(problem.derived.cell)
        self.batch, self.time, self.channels = problem.shape
        x, strides = _aligned(problem.inputs)
        first = tuple(s.contiguous() for s in problem.state)
        reset = problem.reset
        self.reset = x[0] if reset is None else reset.contiguous().view(torch.uint8)
        names = self.names
        self.given: dict[str, Any] = dict(zip(names.ptr(names.inputs), x, strict=True))
        self.given |= zip(names.ptr(names.params), (p.contiguous() for p in problem.params), strict=True)
        self.given |= zip(names.ptr(names.state, "_first"), first, strict=True)
        self.given |= {"reset_ptr": self.reset, "HAS_RESET": reset is not None, "COMPUTE": _COMPUTE[problem.dtype]}
        self.given |= {"time": self.time, "channels": self.channels, "batches": self.batch}
        self.given |= {"x_stride_batch": strides[0], "x_stride_time": strides[1]}

    def more(self, pairs: Iterable[tuple[str, Any]] = (), **values: Any) -> None:
        """Further arguments by name."""
        self.given.update(pairs)
        self.given.update(values)

    def programs(self, block: int, pieces: int = 1) -> int:
        return self.batch * triton.cdiv(self.channels, block) * pieces

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.problem.dtype, device=self.problem.device)

    def run(self, name: str, block: int, pieces: int = 1, warps: int = 1, **options: Any) -> None:
        """Launches a kernel, one program a batch row, block of channels and piece."""
        kernel = getattr(self.module, name)
        every = {**self.given, **options, "BLOCK": block}
        arguments = {argument: every[argument] for argument in kernel.arg_names}
        with _on(self.problem.device):
            kernel[(self.programs(block, pieces),)](**arguments, num_warps=warps, num_stages=1)

    def bounds(self) -> None:
        """The cell's box, widened for rounding, (batch, channel) per bounded component."""
        if not self.names.bounded:
            return
        box = self.problem.derived.cell.box(self.problem.state) or (None,) * len(self.names.state)
        for h, bound in zip(self.names.state, box, strict=True):
            if h in self.names.bounded:
                wide = self.empty(self.batch, self.channels)
                wide.fill_(float("inf")) if bound is None else wide.copy_(torch.as_tensor(bound)).mul_(1 + 2.0**-10)
                self.given[f"{h}_bound_ptr"] = wide


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _aligned(inputs: Tensors) -> tuple[Tensors, tuple[int, int]]:
    """The inputs with one common stride over batch and time: as they are where that holds (slices of one projection)."""
    strides = inputs[0].stride()
    if strides[2] != 1 or any(x.stride() != strides for x in inputs):
        inputs = tuple(x.contiguous() for x in inputs)
        batch, time, channels = inputs[0].shape
        return inputs, (time * channels, channels)
    return inputs, (strides[0], strides[1])


def _choice(problem: Problem, method: str, tile: int | None, per_step: int) -> Choice:
    batch, time, channels = problem.shape
    width = problem.inputs[0].element_size() * per_step
    choice = choose(problem.derived.cell.name, batch, time, channels, width)
    if method == "triton":
        return choice
    name = method.removeprefix("triton-")
    if name != "segments":
        return Choice(name)
    length = _whole(tile) if tile else _whole(-(-time // max(2, pieces_for(batch, time, channels))))
    return Choice("segments", -(-time // length))


def _whole(steps: int) -> int:
    """Steps of a piece: a multiple of what lies between checkpoints."""
    return -(-steps // CHECK) * CHECK


def solve_triton(problem: Problem, method: str, options: NewtonOptions) -> tuple[Tensors, Tensors, SolveInfo]:
    """States (batch, time, channel) in the dtype of the inputs, the final state (batch, channel) in the compute dtype,
    and how it went. method: "triton" or one of its three algorithms by name."""
    names, cell = _names(problem.derived), problem.derived.cell
    batch, time, channels = problem.shape
    if time == 1 and method == "triton":
        state = problem.state
        if problem.reset is not None:
            state = tuple(s.masked_fill(problem.reset, 0.0) for s in state)
        final = decode(problem.derived, state, tuple(x[:, 0] for x in problem.inputs), problem.params, problem.dtype)
        return tuple(h.to(problem.inputs[0].dtype).unsqueeze(1) for h in final), final, problem.info(0, 0.0, method)
    choice = _choice(problem, method, options.tile, len(cell.inputs) + len(cell.state))
    kernels = _Kernels(problem)
    given = problem.inputs[0].dtype
    states = tuple(kernels.empty(batch, time, channels, dtype=given) for _ in cell.state)
    final = tuple(kernels.empty(batch, channels) for _ in cell.state)
    kernels.more(zip(names.ptr(names.state), states, strict=True))
    kernels.more(zip(names.ptr(names.state, "_final"), final, strict=True))
    tol = options.tol if options.tol is not None else (1e-12 if problem.dtype == torch.float64 else 1e-6)
    if choice.method == "walk":
        kernels.run("walk_kernel", WALK_BLOCK)
        return states, final, problem.info(0, 0.0, "triton-walk")
    run = _tile if choice.method == "tile" else _segments
    return states, final, run(kernels, choice, tol, options)


def _tile(kernels: _Kernels, choice: Choice, tol: float, options: NewtonOptions) -> SolveInfo:
    tile, block, warps = tile_shape(kernels.names)
    tile = options.tile or tile
    programs = kernels.programs(block)
    iterations = kernels.empty(programs, dtype=torch.int32)
    update = kernels.empty(programs, dtype=torch.float32)
    kernels.bounds()
    limit = min(tile, options.max_iter or tile)
    kernels.more(iterations_ptr=iterations, update_ptr=update, tol=tol, limit=limit)
    kernels.run("tile_kernel", block, warps=warps, TILE=tile)
    return _info(kernels, iterations.amax(), update.amax(), "triton-tile")


def _segments(kernels: _Kernels, choice: Choice, tol: float, options: NewtonOptions) -> SolveInfo:
    names, batch, channels, time = kernels.names, kernels.batch, kernels.channels, kernels.time
    pieces, length = choice.pieces, _whole(-(-time // choice.pieces))
    pieces, checks = -(-time // length), -(-time // CHECK)
    for what in ("_used", "_end", "_entry"):
        kernels.more((pointer, kernels.empty(pieces, batch, channels)) for pointer in names.ptr(names.state, what))
    kernels.more((f"{m}_ptr", kernels.empty(pieces, batch, channels)) for m in names.product)
    kernels.more((p, kernels.empty(batch, checks, channels)) for p in names.ptr(names.state, "_check"))
    kernels.bounds()
    walked, rounds = torch.zeros(2, kernels.programs(WALK_BLOCK, pieces), dtype=torch.int32, device=final_device(kernels))
    last, update = kernels.empty(2, kernels.programs(WALK_BLOCK), dtype=torch.int32), kernels.empty(
        kernels.programs(WALK_BLOCK), dtype=torch.float32
    )
    meet = min(tol, 2 * torch.finfo(kernels.problem.dtype).eps)
    kernels.more(walked_ptr=walked, rounds_ptr=rounds, last_walked_ptr=last[0], last_rounds_ptr=last[1])
    kernels.more(update_ptr=update, pieces=pieces, length=length, checks=checks, tol=meet)
    kernels.run("segments_kernel", WALK_BLOCK, pieces, AGAIN=False)
    for _ in range(min(options.max_iter or ROUNDS, pieces - 1)):
        kernels.run("segments_join_kernel", WALK_BLOCK)
        kernels.run("segments_kernel", WALK_BLOCK, pieces, AGAIN=True)
    kernels.run("segments_finish_kernel", WALK_BLOCK)
    again = (walked.sum() + last[0].sum()).to(torch.float32) / (kernels.programs(WALK_BLOCK) * time)
    iterations = 1 + rounds.amax() + last[1].amax()
    return _info(kernels, iterations, update.amax(), "triton-segments", again)


def final_device(kernels: _Kernels) -> torch.device:
    return kernels.problem.device


def _info(kernels: _Kernels, iterations: Tensor, update: Tensor, method: str, again: Tensor | None = None) -> SolveInfo:
    """Plain numbers on a CPU, tensors on a device."""
    if kernels.problem.device.type == "cpu":
        return SolveInfo(int(iterations), float(update), method, 0.0 if again is None else float(again))
    return SolveInfo(iterations, update, method, torch.zeros_like(update) if again is None else again)


def decode(derived: Derived, state: Tensors, inputs: Tensors, params: Tensors, dtype: torch.dtype) -> Tensors:
    """One step: state (batch, channel) and params (channel,) in the compute dtype, inputs (batch, channel)."""
    reset: Tensor | None = None
    kernels = _Kernels(Problem(derived, tuple(x.unsqueeze(1) for x in inputs), params, state, reset, dtype))
    names = kernels.names
    final = tuple(kernels.empty(kernels.batch, kernels.channels) for _ in names.state)
    kernels.more(zip(names.ptr(names.state, "_final"), final, strict=True))
    kernels.run("decode_kernel", WALK_BLOCK)
    return final


def gradients_triton(
    problem: Problem,
    states: Tensors,
    grad_states: tuple[Tensor | None, ...],
    grad_final: tuple[Tensor | None, ...],
    method: str,
    options: NewtonOptions,
) -> Gradients:
    """The gradients of sum(grad_states · states) + sum(grad_final · final); states as `solve_triton` gave them.

    The inputs' are in the dtype of the inputs, the others in the compute dtype. Deterministic: every program adds to
    its own row, and the rows are added in one order.
    """
    names, cell = _names(problem.derived), problem.derived.cell
    batch, time, channels = problem.shape
    per_step = 2 * len(cell.inputs) + 2 * len(cell.state)
    choice = _choice(problem, "triton" if method == "triton-tile" else method, options.tile, per_step)
    length = _whole(-(-time // choice.pieces))
    pieces = -(-time // length)
    kernels = _Kernels(problem)
    device, given = problem.device, problem.inputs[0].dtype
    kernels.more(zip(names.ptr(names.state), states, strict=True), length=length, pieces=pieces)
    for h, grad, last in zip(names.state, grad_states, grad_final, strict=True):
        kernels.more({f"HAS_G_{h.upper()}": grad is not None, f"g_{h}_ptr": states[0] if grad is None else grad.contiguous()}.items())
        last = torch.zeros(batch, channels, dtype=problem.dtype, device=device) if last is None else last
        kernels.more({f"g_{h}_final_ptr": last.to(problem.dtype).contiguous()}.items())
    to_inputs = tuple(kernels.empty(batch, time, channels, dtype=given) for _ in cell.inputs)
    to_params = tuple(kernels.empty(pieces * batch, channels) for _ in cell.params)
    to_state = tuple(kernels.empty(batch, channels) for _ in cell.state)
    kernels.more((f"to_{x}_ptr", grad) for x, grad in zip(names.inputs, to_inputs, strict=True))
    kernels.more((f"to_{a}_ptr", grad) for a, grad in zip(names.params, to_params, strict=True))
    kernels.more((f"to_{h}_first_ptr", grad) for h, grad in zip(names.state, to_state, strict=True))
    if pieces == 1:
        kernels.more((f"carry_{h}_ptr", kernels.given[f"g_{h}_final_ptr"]) for h in names.state)
    else:
        maps = [*names.product, *(f"d_{h}" for h in names.state), *(f"carry_{h}" for h in names.state)]
        kernels.more((f"{name}_ptr", kernels.empty(pieces, batch, channels)) for name in maps)
        tiny = 2.0**-64 if problem.dtype == torch.float32 else 2.0**-100
        kernels.more(steps_ptr=kernels.empty(kernels.programs(WALK_BLOCK, pieces), dtype=torch.int32))
        kernels.run("backward_maps_kernel", WALK_BLOCK, pieces, TINY=tiny)
        kernels.run("backward_join_kernel", WALK_BLOCK)
    kernels.run("backward_kernel", WALK_BLOCK, pieces)
    return Gradients(to_inputs, tuple(grad.sum(0) for grad in to_params), to_state)


def _walk_arguments(names: Names) -> dict[str, str]:
    """Pointer arguments of the forward walk and the kind of each: x as the inputs, c in the compute dtype, b bytes."""
    kinds = {name: "x" for name in names.ptr(names.inputs)}
    kinds |= {name: "c" for name in (*names.ptr(names.params), *names.ptr(names.state, "_first"))}
    kinds |= {name: "x" for name in names.ptr(names.state)}
    kinds |= {name: "c" for name in names.ptr(names.state, "_final")}
    return kinds | {"reset_ptr": "b"}


def _launch(
    name: str, function: Any, kinds: dict[str, str], sizes: Sequence[str], given: str, constexprs: dict[str, Any], **options: int
) -> Launch:
    types = {"x": f"*{given}", "c": "*fp64" if given == "fp64" else "*fp32", "b": "*u8", "i": "*i32", "f": "*fp32"}
    signature = {argument: types[kind] for argument, kind in kinds.items()}
    signature |= {size: "fp32" if size == "tol" else "i32" for size in sizes}
    compute = tl.float64 if given == "fp64" else tl.float32
    constexprs = {**constexprs, "COMPUTE": compute} if "COMPUTE" in function.arg_names else constexprs
    signature |= {argument: "constexpr" for argument in constexprs}
    return Launch(f"{name} {given}", function, {a: signature[a] for a in function.arg_names}, constexprs, **options)


def default_launches(cell: Cell, dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Launch]:
    """Every kernel of a cell in its default configurations, for each dtype of the inputs."""
    made, names = module(cell), Names(derive(cell))
    launches = []
    for given in dtypes:
        kinds = _walk_arguments(names)
        sizes = ["time", "channels", "x_stride_batch", "x_stride_time"]
        options: dict[str, Any] = {"HAS_RESET": True, "BLOCK": WALK_BLOCK}
        launches.append(_launch("walk_kernel", made.walk_kernel, kinds, sizes, given, options))
    return launches
