"""Large heads: R in slices of columns over many multiprocessors, h exchanged at every step (triton_dense_wide_kernels).

One cooperative launch runs the whole sequence for as many heads and blocks of rows as the device has room for at once;
more of them are further launches. Everything here is about sizes: what a program keeps must fit its shared memory, and
the programs that wait for each other must all be on the device. On AMD's, where a barrier between programs was never
run, and under the interpreter, whose programs run one after the other, every step is a launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense_cells import KINDS, DenseKind, Tensors
from .dense_torch import DensePlan, Walk, needed_before
from .triton_dense_wide_kernels import wide_backward_kernel, wide_forward_kernel
from .triton_launch import COMPUTE, DOT, Launch, on_device
from .triton_solver import interpreted

SPLIT = 8
"""Warps, among which the columns that a product sums over are shared out."""
AUTO = False
"""Whether "auto" takes these kernels at all: not before a GPU has passed tests/kernels/test_gpu_dense.py. Programs that
wait for each other hang where something is wrong."""
MOST_LAUNCHES = 4
"""Launches one after the other up to which "auto" takes these kernels: a step of the loop in torch takes longer than
that many of theirs, and does any number of rows at once."""
_BLOCKS_B: dict[str, dict[int, tuple[int, ...]]] = {
    "cuda": {2: (4, 8, 16, 32), 4: (4, 8), 8: (16,)},
    "hip": {2: (16, 32), 4: (16, 32)},
}
_BLOCKS_N = {"cuda": (8, 16, 32), "hip": (16, 32)}
"""Rows, by the bytes of a number, and columns of a program: on AMD's at least what a matrix unit takes, on NVIDIA's in
float32 no more rows than its compiler has registers for. Float64 is for the interpreter only."""
_HELD = 4 if triton.__version__.startswith("3.7.") else 0
"""Tiles of 16 columns of a warp, for every gate, that a program of 16 columns has registers for besides. Triton 3.6
would put them into shared memory all the same, where there is no room; what later ones do was not looked at."""
_SUMS = 64
"""Registers of a thread for the sums of a step's products."""
_READ = {2: 1 << 17, 4: 1 << 15, 8: 1 << 20}
"""Bytes of the others' h or δ that a program reads at once at most, by those of a number: float32's go through
registers."""
_COUNTER = 32
"""Whole numbers a counter takes: a line of the cache for each."""


@dataclass(frozen=True)
class Chip:
    """A device: its multiprocessors, bytes of shared memory of a program, and vendor."""

    multiprocessors: int
    shared: int
    vendor: str = "cuda"


H100 = Chip(132, 232_448)
"""What tensors without values, and the interpreter's, are taken to be on."""


@dataclass(frozen=True)
class Sizes:
    """Of one kernel. block_b, block_n: rows and columns of a program. block_k, chunks, held: a warp's columns in a
    product are chunks · block_k, whose R is in shared memory, and held · 16, whose R is in registers. stage: tiles of h
    or δ that are read at once. shared: bytes that a program takes. programs: of a head and a block of rows. pairs: of a
    head and a block of rows in one launch, of which there are `launches`."""

    block_b: int
    block_n: int
    block_k: int
    chunks: int
    held: int
    stage: int
    shared: int
    programs: int
    pairs: int
    launches: int


def chip(device: torch.device) -> Chip:
    """The device that a tensor is on."""
    if device.type != "cuda":
        return H100
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks the second
    if torch.version.hip:
        return Chip(properties.multi_processor_count, 163_840, "hip")  # of registers: R lies there
    return Chip(properties.multi_processor_count, properties.shared_memory_per_block_optin)


@lru_cache(maxsize=256)
def sizes(kind: str, backward: bool, d_head: int, heads: int, batch: int, itemsize: int, on: Chip) -> Sizes | None:
    """The fastest sizes of a kernel by the model of `_clocks`, None where R does not fit; itemsize: of h and R in
    products."""
    products = KINDS[kind].recurrent
    found: list[tuple[float, Sizes]] = []
    for block_b, block_n in product(_BLOCKS_B[on.vendor][itemsize], _BLOCKS_N[on.vendor]):
        programs = triton.cdiv(d_head, block_n)
        if programs > on.multiprocessors or products * block_b * block_n > _SUMS * 32:
            continue
        pairs = min(heads * triton.cdiv(batch, block_b), on.multiprocessors // programs)
        launches = triton.cdiv(heads * triton.cdiv(batch, block_b), pairs)
        fitting = _fitting(products, backward, d_head, block_b, block_n, itemsize, on)
        if fitting is not None:
            one = Sizes(block_b, block_n, *fitting, programs, pairs, launches)
            read = block_b * d_head * itemsize * (products if backward else 1)
            found.append((launches * _clocks(read, products * d_head * block_n * itemsize, pairs * programs), one))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _clocks(read: int, kept: int, programs: int) -> float:
    """Of a step on an H100, as a model, not measured: a barrier and the latencies; `read` bytes for every program at 64
    a clock, or 3000 for all; `kept` bytes of R from shared memory at 128."""
    return 2500 + max(read / 64, programs * read / 3000) + kept / 128


def _fitting(
    products: int, backward: bool, d_head: int, block_b: int, block_n: int, itemsize: int, on: Chip
) -> tuple[int, int, int, int, int] | None:
    """block_k, chunks, held, stage and shared of `Sizes`: as few held and as large a stage as fit."""
    least = 16 if itemsize == 8 else 32  # smaller tiles of R would fill registers
    each = triton.cdiv(d_head, SPLIT * least) * least
    twice = 2 if itemsize == 4 and on.vendor == "cuda" else 1
    sums = SPLIT * block_b * block_n * 4 * (1 if backward or products == 1 else 4)
    may_hold = itemsize == 2 and on.vendor == "cuda" and block_n == 16 and block_b in ((16,) if backward else (4, 16))
    for held in range(0, min(_HELD + 1, each // 16) if may_hold else 1, 2):
        shared = each - 16 * held
        block_k = min(64 if itemsize == 2 else 32, shared & -shared)
        chunks = shared // block_k
        kept = products * shared * SPLIT * block_n * itemsize * twice
        tiles = chunks * (products if backward else 1)
        for stage in range(tiles, 0, -1):
            read = stage * SPLIT * block_b * block_k * itemsize
            all_of_it = kept + max(read if itemsize == 2 else read // stage, sums)
            if tiles % stage == 0 and read <= _READ[itemsize] and all_of_it <= on.shared:
                return block_k, chunks, held, stage, all_of_it
    return None


def largest(kind: str, itemsize: int, on: Chip) -> int:
    """The largest d_head, in steps of 16, of which both kernels take one head and a few rows; 0 if none."""

    def fits(d_head: int) -> bool:
        return all(sizes(kind, backward, d_head, 1, 1, itemsize, on) for backward in (False, True))

    return max((d_head for d_head in range(16, 16385, 16) if fits(d_head)), default=0)


class Wide:
    """Of inputs of a shape, with products in a dtype: the triton_dense.Way of large heads."""

    def __init__(self, plan: DensePlan, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        batch, _, _, heads, d_head = shape
        self.plan, self.on = plan, chip(device)
        asked = (d_head, heads, batch, dtype.itemsize, self.on)
        self.forwards, self.backwards = (sizes(plan.kind.name, backward, *asked) for backward in (False, True))

    @property
    def fits(self) -> bool:
        return self.forwards is not None and self.backwards is not None

    @property
    def fast(self) -> bool:
        """Whether "auto" may take it, it fits and is likely faster than the loop in torch."""
        pair = (self.forwards, self.backwards)
        return (
            AUTO and self.on.vendor == "cuda" and all(one is not None and one.launches <= MOST_LAUNCHES for one in pair)
        )

    def forward(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, reset: Tensor | None, begin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See triton_dense.Way."""
        assert self.forwards is not None
        plan, (batch, time, _, heads, d_head) = self.plan, inputs.shape
        state = begin.clone()
        y = torch.empty((batch, time, heads, d_head), dtype=inputs.dtype, device=inputs.device)
        kept = state.new_empty((len(begin), heads, time, batch, d_head) if plan.keep else (0,))
        exchange = torch.empty((2, heads, batch, d_head), dtype=weight.dtype, device=inputs.device)
        exchange[0] = state[0]
        given = {
            "x_ptr": inputs.contiguous(),
            "bias_ptr": state if bias is None else bias.to(plan.dtype).contiguous(),
            "reset_ptr": _bytes(reset, state),
            "y_ptr": y,
            "kept_ptr": kept,
            "state_ptr": state,
            "exchange_ptr": exchange,
            **{"HAS_BIAS": bias is not None, "HAS_RESET": reset is not None, "KEEP": plan.keep},
        }
        self._launch(wide_forward_kernel, self.forwards, weight, given, time, time)
        return y, kept, state

    def walk(self, weight: Tensor, reset: Tensor | None, came: Tensor | None) -> Walk:
        """See triton_dense.Way."""
        kind, resets, turned = self.plan.kind, _bytes(reset, weight), weight.mT.contiguous()

        def walk(rows: Tensor, before: Tensors, grads: Tensors, start: int, whole: int) -> Tensors:
            assert self.backwards is not None
            heads, time, batch, _, d_head = rows.shape
            after = torch.stack(grads)
            exchange = (2, kind.recurrent, heads, batch, d_head)
            given = {
                "rows_ptr": rows,
                **{f"before{index}_ptr": part for index, part in enumerate(needed_before(kind, before, rows))},
                "reset_ptr": resets,
                "came_ptr": rows if came is None else came.contiguous(),
                "grads_ptr": after,
                "exchange_ptr": torch.zeros(exchange, dtype=weight.dtype, device=rows.device),
                **{"whole": whole, "first": start, "HAS_RESET": reset is not None, "HAS_CAME": came is not None},
            }
            self._launch(wide_backward_kernel, self.backwards, turned, given, time, time + 1)
            return after.unbind(0)

        return walk

    def _launch(self, kernel: Any, one: Sizes, weight: Tensor, given: dict[str, Any], time: int, steps: int) -> None:
        """All heads and rows; `steps` of them at once where programs can wait for each other."""
        _, heads, d_head, _ = weight.shape
        batch = given["exchange_ptr"].shape[-2]
        together = _together(self.on)
        constants = _constants(self.plan.kind, d_head, one, DOT[weight.dtype], COMPUTE[self.plan.dtype], self.on.vendor)
        constants |= {"WAIT": together, "num_warps": SPLIT, "num_stages": 1}
        if together:
            constants["launch_cooperative_grid"] = True
        if interpreted():
            constants["PRECISION"] = "wide"
        pairs = heads * triton.cdiv(batch, one.block_b)
        count = torch.zeros(pairs * _COUNTER, dtype=torch.int32, device=weight.device)
        given |= {"weight_ptr": weight.contiguous(), "count_ptr": count, "batches": batch, "heads": heads, "time": time}
        with on_device(weight.device):
            for group in range(0, pairs, one.pairs):
                grid = (one.programs, min(one.pairs, pairs - group))
                for start in range(0, steps, steps if together else 1):
                    stop = steps if together else start + 1
                    kernel[grid](**given, group=group, start=start, stop=stop, **constants)


def _bytes(reset: Tensor | None, beside: Tensor) -> Tensor:
    """The resets as bytes, one of them where there are none."""
    if reset is None:
        return torch.zeros(1, dtype=torch.uint8, device=beside.device)
    return reset.contiguous().view(torch.uint8)


def _together(on: Chip) -> bool:
    """Whether programs run at the same time, and can wait for each other."""
    return on.vendor == "cuda" and not interpreted()


def _constants(
    kind: DenseKind, d_head: int, one: Sizes, dot: tl.dtype, compute: tl.dtype, vendor: str
) -> dict[str, Any]:
    blocks = {"BLOCK_B": one.block_b, "BLOCK_N": one.block_n, "BLOCK_K": one.block_k}
    counts = {"CHUNKS": one.chunks, "HELD": one.held, "SPLIT": SPLIT, "STAGE": one.stage}
    precision = "tf32x3" if dot == tl.float32 and vendor == "cuda" else "ieee"
    return {"KIND": kind.name, "D": d_head, "COMPUTE": compute, "DOT": dot, "PRECISION": precision, **blocks, **counts}


_CHIPS = {"sm_80": Chip(108, 166_912), "sm_90": H100, "gfx942": Chip(304, 163_840, "hip")}
"""For which kernels are compiled by default."""
_CHECKED = {"bf16": ((16, 1024), (1, 2048)), "fp16": ((16, 1024), (1, 2048)), "fp32": ((16, 512), (16, 768))}
"""(rows, d_head) of the kernels compiled by default, of one head; 2048 where R fills registers as well."""
_LIKE = {"x_ptr", "y_ptr", "weight_ptr", "exchange_ptr", "came_ptr"}
"""Arguments in the dtype of the inputs."""


def checked(given: str) -> Iterator[tuple[str, str, bool, int, Sizes]]:
    """(target, kind, backward, d_head, sizes) of the kernels compiled by default, for inputs of a dtype."""
    for target, on in _CHIPS.items():
        for kind, (rows, d_head), backward in product(KINDS, _CHECKED.get(given, ()), (False, True)):
            one = sizes(kind, backward, d_head, 1, rows, 4 if given == "fp32" else 2, on)
            if one is not None and (one.held or d_head < 2048):
                yield target, kind, backward, d_head, one


def default_launches(given: str) -> list[Launch]:
    """The kernels of `checked`."""
    dot = {"bf16": tl.bfloat16, "fp16": tl.float16}.get(given, tl.float32)
    launches = []
    for target, kind, backward, d_head, one in checked(given):
        kernel = wide_backward_kernel if backward else wide_forward_kernel
        vendor = _CHIPS[target].vendor
        constants = _constants(KINDS[kind], d_head, one, dot, tl.float32, vendor)
        constants |= {"HAS_BIAS": True, "HAS_RESET": True, "HAS_CAME": True, "KEEP": True, "WAIT": vendor == "cuda"}
        signature = {name: _type(name, given) for name in kernel.arg_names}
        launches.append(
            Launch(
                f"{kernel.__name__} {kind} {d_head} {given}",
                kernel,
                signature,
                {name: constants[name] for name in signature if name.isupper()},
                SPLIT,
                aligned=tuple(name for name in signature if name.endswith("_ptr") and name != "reset_ptr"),
                targets=(target,),
            )
        )
    return launches


def _type(name: str, given: str) -> str:
    """Of an argument of the kernels."""
    if name.isupper():
        return "constexpr"
    if not name.endswith("_ptr"):
        return "i32"
    return {"reset_ptr": "*u8", "count_ptr": "*i32"}.get(name, f"*{given if name in _LIKE else 'fp32'}")
