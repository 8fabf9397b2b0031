"""The sizes in which chunkwise's kernels are compiled and run: chunks, tiles, warps; and what CI compiles of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_chunkwise_backward as backward
from . import triton_chunkwise_kernels as forward
from .triton_launch import Launch

CHUNKS = (16, 32, 64, 128, 256)
WALKS = 264
"""So many programs of a walk over time, two for each multiprocessor of an H100, run side by side; fewer go in pieces of
time, at least WALKED tiles of steps long."""
WALKED = 64
MOST_PIECES = 16
DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
SCAN = 2048
"""Steps that m's scan takes at a time: one program goes over a row, so the fewer times the better."""


def fastest_chunk(d_k: int, d_v: int, shared: int, time: int) -> int:
    """The chunk in which forward and backward of heads that share q and k by so many take the least time on an H100, by
    their arithmetic: what they multiply at _FLOPS a second, or read and write at _BYTES a second, whichever is longer.
    Short chunks write more states, long ones multiply more steps with each other. Not measured yet."""

    def seconds(size: int) -> float:
        seen = (size + _TILE) / 2
        flops = 2 * (7 * d_k * d_v + seen * (3 * d_v + 4 * d_k / shared))
        sent = 16 * d_k * d_v / size + 2 * (10 * d_v + 8 * d_k / shared) + 12 * seen / shared
        return max(flops / _FLOPS, sent / _BYTES)

    longest = max(64, triton.next_power_of_2(time))
    return min((size for size in CHUNKS if 64 <= size <= longest), key=seconds)


_FLOPS, _BYTES, _TILE = 350e12, 3e12, 64


def constants(
    normalized: bool, eps: float, given: tl.dtype, d_k: int, d_v: int, chunk: int, vendor: str
) -> dict[str, Any]:
    """What the kernels are compiled for; given: the dtype of q."""
    compute = tl.float64 if given == tl.float64 else tl.float32
    dot = tl.float32 if given == tl.float16 else given
    exact = "tf32" if given == tl.float16 else "tf32x3"
    return {
        "NORM": normalized,
        "EPS": eps,
        "SCALE": d_k**-0.5 if normalized else 1.0,
        "DOT": dot,
        "COMPUTE": compute,
        "PRECISION": exact if dot == tl.float32 and vendor == "cuda" else "ieee",
        "DK": d_k,
        "DV": d_v,
        "L": chunk,
        "BLOCK": SCAN,
        **blocks(dot, d_k, d_v, chunk),
    }


def blocks(dot: tl.dtype, d_k: int, d_v: int, chunk: int) -> dict[str, int]:
    """Steps and columns of a tile."""
    most = 64 if dot.primitive_bitwidth == 16 else 32
    return {"BT": min(most, chunk)} | {
        name: max(16, min(most, triton.next_power_of_2(width))) for name, width in (("BK", d_k), ("BV", d_v))
    }


WIDENED = {
    "states_kernel": (2, 2),
    "grad_states_kernel": (1, 2),
    "outputs_kernel": (1, 2),
    "grad_v_kernel": (1, 2),
    "grad_q_kernel": (2, 1),
    "grad_k_kernel": (2, 1),
}
"""Kernels whose tiles are so many times as wide in d_k and d_v where operands have 16 bits and heads are as wide: a
product then reads less for what it multiplies."""
WIDE_BITS = (16,)
_WALKS = ("states_kernel", "grad_states_kernel")
"""These go over time: wide where that leaves enough of them, on AMD never, which has too few registers for it."""
_EIGHT_WARPS = ("grad_states_kernel", "grad_q_kernel", "grad_k_kernel", "pairs_kernel", "stabilizer_kernel")
"""As those that are wide; walks on AMD have four, for all its registers."""


def shaped(name: str, chosen: dict[str, Any], rows: int, vendor: str) -> tuple[dict[str, Any], int, int]:
    """A kernel's constants, warps and stages (loads under way ahead of a loop's products, one more where it walks).
    rows: batch times heads."""
    by = WIDENED.get(name, (1, 1)) if chosen["DOT"].primitive_bitwidth in WIDE_BITS else (1, 1)
    wide, tiles = {}, []
    for tile, width, times in zip(("BK", "BV"), (chosen["DK"], chosen["DV"]), by, strict=True):
        wide[tile] = chosen[tile] * (times if width > chosen[tile] else 1)
        tiles.append(-(-width // wide[tile]))
    if name in _WALKS and vendor == "hip":
        return chosen, 4, 2
    if name in _WALKS and rows * math.prod(tiles) < WALKS:
        wide = {}
    eight = name in _EIGHT_WARPS or any(chosen[tile] < size for tile, size in wide.items())
    return {**chosen, **wide}, 8 if eight else 4, 3 if name in _WALKS else 2


PLAIN_KERNELS = (
    forward.weights_kernel,
    forward.states_kernel,
    forward.scores_kernel,
    forward.outputs_kernel,
    backward.grad_states_kernel,
    backward.pairs_kernel,
    backward.grad_q_kernel,
    backward.grad_k_kernel,
    backward.grad_v_kernel,
    backward.passing_kernel,
)
KERNELS = (*PLAIN_KERNELS, forward.stabilizer_kernel, backward.norm_back_kernel)
NAMED = {kernel.__name__: kernel for kernel in KERNELS}
_CHECKED = (("ssd", False, 128, 64, 256), ("mlstm", True, 256, 512, 256))
"""Compiled by default: name, normalized, d_k, d_v and chunk of Mamba2 and of the 7B mLSTM."""
_ALIKE = {"q", "k", "v", "y", "dy", "dq", "dk", "dv"}
"""Arguments in the dtype of q; s and ds are too, but for float16."""
_OTHER = {"reset_ptr": "*u8", "first_ptr": "*i32"}


def default_launches(dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Launch]:
    """Every kernel at the sizes of Mamba2 and of mLSTM, for each vendor; float64 is for the interpreter alone."""
    launches = []
    for given in dtypes:
        if given == "fp64":
            continue
        dot = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[given]
        for vendor, targets in (("cuda", ("sm_80", "sm_90")), ("hip", ("gfx942",))):
            for form, normalized, d_k, d_v, chunk in _CHECKED:
                chosen = constants(normalized, 1e-6, dot, d_k, d_v, chunk, vendor) | {"HAS_RESET": True, "STORE": True}
                for kernel in KERNELS if normalized else PLAIN_KERNELS:
                    forms = {repr(x): x for x in (shaped(kernel.__name__, chosen, n, vendor) for n in (WALKS, 1))}
                    for number, taken in enumerate(forms.values()):
                        label = f"{form} {d_k}x{d_v}{' few' * number} {given}"
                        launches.append(_launch(kernel, label, given, *taken, targets))
    return launches


def _launch(
    kernel: Any, label: str, given: str, chosen: dict[str, Any], warps: int, stages: int, targets: tuple[str, ...]
) -> Launch:
    signature = {}
    alike = _ALIKE if given == "fp16" else {*_ALIKE, "s", "ds", "pairs"}
    for name in kernel.arg_names:
        short = name.removesuffix("_ptr")
        pointer = _OTHER.get(name, f"*{given if short in alike else 'fp32'}")
        signature[name] = "constexpr" if name.isupper() else "i32" if short == name else pointer
    # Triton's launcher sees these to be multiples of 16 for the sizes of models: pointers, strides of time and batch.
    aligned = tuple(n for n in signature if n != "reset_ptr" and n.endswith(("_ptr", "_batch", "_step")))
    values = {name: chosen[name] for name in signature if name.isupper()}
    name = f"{kernel.__name__} {label}"
    return Launch(name, kernel, signature, values, warps, stages, aligned, targets)
