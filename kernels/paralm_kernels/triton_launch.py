"""Launching the kernels of a cell: their arguments by name, and every compilation a cell needs by default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import Cell, Tensors
from .derive import Derived, box_of, derive
from .generate import module
from .problem import Problem
from .triton_template import Names

COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}
DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, **COMPUTE}
TINY = {tl.float32: 2.0**-64, tl.float64: 2.0**-100}
"""A product of Jacobians this small is not followed further back: what it multiplies is not seen beside the rest."""
WALK_BLOCK = 64
"""Channels of a program that walks, one a thread: so many that it reads whole lines of 128 bytes in bfloat16 (measured
on an H100, backward at (1, 1M, 1024): 0.80 of a copy's bandwidth against 0.58 by half lines), no more, so that few
channels still make many programs."""
LANES = {"cuda": 32, "hip": 64}
"""Threads of a warp."""
CHECK = 32
"""Steps between the states in full precision at which a walk asks whether it has met the stored trajectory."""
_MUCH = ("segments_finish_kernel", "backward_maps_kernel", "segments_kernel again", "tile_kernel")
MAXNREG = dict.fromkeys(_MUCH, 255)
"""Kernels that hold much, and mostly have little to do: without a bound of ours NVIDIA's compiler rather spills a
register or two than give up a place for one more warp. (A kernel that knows AGAIN by that, behind its name.)"""
MODEL_WIDTH = 4096
"""Channels for which kernels are compiled ahead of a launch."""
_MULTIPLES = ("channels", "x_stride_batch", "x_stride_time")
"""Whole numbers that are multiples of 16 in models."""
_SLACK = 2.0**-10
"""Relative widening of a cell's box, as in newton.py."""
_INTEGERS = {"iterations", "steps", "walked", "rounds", "last_walked", "last_rounds"}


@dataclass(frozen=True)
class Launch:
    """One compilation of one kernel: what `triton.compile(ASTSource(function, signature, constexprs))` needs.

    signature: every argument's type, "constexpr" for those in constexprs. aligned: the arguments that Triton's launcher
    would see to be multiples of 16, for which it compiles wider loads. targets: those it is meant for (names as in
    compiled.py), all if empty. maxnreg: registers a thread may have on NVIDIA, None: what its compiler thinks best.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 1
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    maxnreg: int | None = None


@cache
def names_of(derived: Derived) -> Names:
    """The names in a cell's module, made once."""
    return Names(derived)


def tile_shape(names: Names) -> tuple[int, int, int]:
    """Steps, channels and warps of a tile that stays in registers: the matrices of more components take more."""
    return (32, 32, 4) if len(names.state) == 1 else (16, 16, 4)


class Kernels:
    """A problem with the arguments that its kernels share; `more` adds those of one kernel, `run` launches it."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.names = problem, names_of(problem.derived)
        self._module = module(problem.derived.cell)
        self.batch, self.time, self.channels = problem.shape
        self.walk_block = min(WALK_BLOCK, triton.next_power_of_2(self.channels))
        self.walk_warps = max(1, self.walk_block // LANES["hip" if torch.version.hip else "cuda"])
        x, strides = _aligned(problem.inputs)
        names, reset = self.names, problem.reset
        self.given: dict[str, Any] = dict(zip(names.ptr(names.inputs), x, strict=True))
        self.given |= zip(names.ptr(names.params), (p.contiguous() for p in problem.params), strict=True)
        self.given |= zip(names.ptr(names.state, "_first"), (s.contiguous() for s in problem.state), strict=True)
        self.given["reset_ptr"] = x[0] if reset is None else reset.contiguous().view(torch.uint8)
        self.more(HAS_RESET=reset is not None, COMPUTE=COMPUTE[problem.dtype])
        self.more(time=self.time, channels=self.channels, batches=self.batch)
        self.more(x_stride_batch=strides[0], x_stride_time=strides[1], X_STEP=strides[1], H_STEP=self.channels)

    def more(self, pairs: Iterable[tuple[str, Any]] = (), **values: Any) -> None:
        """Further arguments by name."""
        self.given.update(pairs)
        self.given.update(values)

    def programs(self, block: int, pieces: int = 1) -> int:
        """One a batch row, block of channels and piece."""
        return self.batch * triton.cdiv(self.channels, block) * pieces

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.problem.dtype, device=self.problem.device)

    def counters(self, programs: int) -> Tensor:
        """A whole number per program, zero."""
        return torch.zeros(programs, dtype=torch.int32, device=self.problem.device)

    def run(self, name: str, block: int | None = None, pieces: int = 1, warps: int = 1, **options: Any) -> None:
        """Launches a kernel; block: channels a program, None for a walk's, with its warps."""
        if block is None:
            block, warps = self.walk_block, self.walk_warps
        kernel = getattr(self._module, name)
        every = {**self.given, **options, "BLOCK": block}
        arguments = {argument: every[argument] for argument in kernel.arg_names}
        bound = MAXNREG.get(f"{name} again" if options.get("AGAIN") else name)
        if bound is not None and torch.version.hip is None:
            arguments["maxnreg"] = bound
        with on_device(self.problem.device):
            kernel[(self.programs(block, pieces),)](**arguments, num_warps=warps, num_stages=1)

    def bounds(self) -> None:
        """The cell's box, widened for rounding, (batch, channel) per bounded component."""
        box = box_of(self.problem.derived.cell, self.problem.state)
        for h, bound in zip(self.names.state, box, strict=True):
            if h not in self.names.bounded:
                continue
            wide = self.empty(self.batch, self.channels)
            if isinstance(bound, Tensor):
                wide.copy_(bound).mul_(1 + _SLACK)
            else:
                wide.fill_(float("inf") if bound is None else bound * (1 + _SLACK))
            self.given[f"{h}_bound_ptr"] = wide


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where Triton launches: a GPU's context; nothing under the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _aligned(inputs: Tensors) -> tuple[Tensors, tuple[int, int]]:
    """The inputs with one common stride over batch and time: as they are where they have it (slices of one tensor)."""
    strides = inputs[0].stride()
    if strides[2] == 1 and all(x.stride() == strides for x in inputs):
        return inputs, (strides[0], strides[1])
    _, time, channels = inputs[0].shape
    return tuple(x.contiguous() for x in inputs), (time * channels, channels)


def _signature(names: Names, function: Any, given: str) -> dict[str, str]:
    """The type of every argument of a kernel, for inputs of a dtype."""
    compute = "fp64" if given == "fp64" else "fp32"
    like_inputs = {*names.inputs, *names.state, *(f"g_{h}" for h in names.state), *(f"to_{x}" for x in names.inputs)}
    signature = {}
    for argument in function.arg_names:
        name = argument.removesuffix("_ptr")
        if argument.isupper():
            signature[argument] = "constexpr"
        elif name == argument:
            signature[argument] = "fp32" if argument == "tol" else "i32"
        elif name in _INTEGERS:
            signature[argument] = "*i32"
        else:
            other = {"reset": "u8", "update": "fp32"}.get(name, compute)
            signature[argument] = f"*{given if name in like_inputs else other}"
    return signature


def default_launches(cell: Cell, dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Launch]:
    """Every kernel of a cell in its default configurations, for each dtype of the inputs."""
    made, names = module(cell), names_of(derive(cell))
    tile, tile_block, tile_warps = tile_shape(names)
    walks = ("decode_kernel", "segments_join_kernel", "segments_finish_kernel")
    back = ("backward_kernel", "backward_maps_kernel", "backward_join_kernel")
    every: list[tuple[str, str, int, dict[str, Any]]] = [(name, name, 0, {}) for name in (*walks, *back)]
    every += [("walk_kernel", "walk_kernel", 0, {"FEW": False}), ("walk_kernel few", "walk_kernel", 0, {"FEW": True})]
    every += [("tile_kernel", "tile_kernel", tile_warps, {"TILE": tile, "BLOCK": tile_block})]
    every += [("segments_kernel first", "segments_kernel", 0, {"AGAIN": False})]
    every += [("segments_kernel again", "segments_kernel", 0, {"AGAIN": True})]
    vendors = {"cuda": ("sm_80", "sm_90"), "hip": ("gfx942",)}
    launches = []
    for given in dtypes:
        compute = tl.float64 if given == "fp64" else tl.float32
        common = {"HAS_RESET": True, "COMPUTE": compute, "BLOCK": WALK_BLOCK, "TINY": TINY[compute], "CHECK": CHECK}
        common |= {f"HAS_G_{h.upper()}": True for h in names.state}
        common |= {"X_STEP": len(names.inputs) * MODEL_WIDTH, "H_STEP": MODEL_WIDTH}
        for label, name, warps, options in every:
            function = getattr(made, name)
            signature = _signature(names, function, given)
            values = {**common, **options}
            constexprs = {argument: values[argument] for argument, kind in signature.items() if kind == "constexpr"}
            aligned = tuple(name for name, kind in signature.items() if kind[0] == "*" or name in _MULTIPLES)
            whole = Launch(f"{label} {given}", function, signature, constexprs, warps, aligned=aligned)
            for vendor, targets in vendors.items():
                bound = MAXNREG.get(label) if vendor == "cuda" else None
                number = warps or WALK_BLOCK // LANES[vendor]  # a walk: a thread for each channel
                launches.append(replace(whole, num_warps=number, targets=targets, maxnreg=bound))
    return launches
