"""Launches the dense recurrences' kernels (triton_dense_kernels.py): forward in one launch, backward in one a piece.

Heads that one multiprocessor does not hold go to many, in triton_dense_wide.py.

The backward pass is dense_torch.py's with its loop over time replaced: rows are made again with one matmul for a piece,
the kernel turns them into their gradients from the last step to the first, and ∂R is one matmul of the piece; no atomic
sums, so the same numbers every time. With inputs and weights in bfloat16 or float16 the products take h and δ rounded
to that, as any such matmul does, and sum in float32; states are float32. Products in float32 are exact to float32
(three TF32 products each on NVIDIA, never one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_dense_wide
from .autocast import no_autocast
from .dense_cells import KINDS, DenseKind, Tensors
from .dense_torch import DensePlan, Walk, needed_before, pull_back
from .once import once_differentiable
from .triton_dense_kernels import backward_kernel, forward_kernel
from .triton_launch import COMPUTE, DOT, Launch, on_device
from .triton_solver import check_device, interpreted

BLOCK_BATCH = 16
"""Rows of the batch in a program: the fewest that a matrix unit takes."""
LARGEST = {2: 128, 4: 64, 8: 64}
"""d_head up to which R's gates fit one multiprocessor of an A100 or H100, by the bytes of a weight."""
_GATE, _REST = 1 << 15, 1 << 13
"""Bytes of shared memory that the kernels take on NVIDIA at the largest d_head: for a gate's R, and for the rest."""
_MAXNREG = {("lstm", 64): 208, ("slstm", 32): 208}
"""Registers of a thread of backward in float32 on NVIDIA, by kind and BLOCK_D, where its compiler would rather spill
one or two than take more than 128."""


def way(plan: DensePlan, inputs: Tensor, weight: Tensor, asked: bool) -> Way | str:
    """How the kernels run these checked arguments, for `dense_triton`; or why they do not, or, unless they are asked
    for, why something else is likely faster. Raises ArgumentError on a CPU that does not interpret."""
    dtype, kind = _operand(inputs, weight), plan.kind.name
    if dtype == torch.float64 and weight.device.type != "cpu":
        return "method 'triton' has no float64 on a GPU; use method='auto' or float32"
    check_device(inputs.device)
    fits = largest(weight, dtype)
    if weight.shape[-1] <= fits:
        return Small(plan, weight.shape[-1], dtype)
    wide = triton_dense_wide.Wide(plan, inputs.shape, dtype, weight.device)
    if not wide.fits:
        most = max(fits, triton_dense_wide.largest(kind, dtype.itemsize, wide.on))
        return (
            f"method 'triton' keeps R on the chip: of {kind!r} with products in {dtype} d_head up to {most} on this "
            f"device ({wide.on.multiprocessors} multiprocessors, {wide.on.shared} bytes of shared memory each), got "
            f"{weight.shape[-1]}; use method='auto' or more heads"
        )
    return wide if asked or wide.fast else "more than one multiprocessor holds is for method 'triton' alone as yet"


def largest(weight: Tensor, dtype: torch.dtype) -> int:
    """The largest d_head of which one multiprocessor of R's device holds R, in the dtype of the products."""
    fits = weight.shape[0] * _GATE + _REST <= _room(weight.device)
    return LARGEST[dtype.itemsize] // (1 if fits else 2)


def _room(device: torch.device) -> float:
    """Bytes of shared memory that a program can have; AMD's keeps R in registers."""
    if device.type != "cuda" or torch.version.hip:
        return math.inf
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks it
    return float(properties.shared_memory_per_block_optin)


def _operand(inputs: Tensor, weight: Tensor) -> torch.dtype:
    """What h and R are multiplied in: 16 bits only where the inputs have no more either."""
    return torch.promote_types(inputs.dtype, weight.dtype)


def dense_triton(
    way: Way, inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensors, reset: Tensor | None
) -> tuple[Tensor, Tensors]:
    """y and the final state of checked arguments, differentiable."""
    y, *end = _Dense.apply(way, inputs, weight.to(_operand(inputs, weight)), bias, reset, *state)
    return y, tuple(end)


def _options(plan: DensePlan, d_head: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants that both kernels share, and their warps."""
    vendor = "hip" if torch.version.hip else "cuda"
    constants = _constants(plan.kind, d_head, DOT[dtype], COMPUTE[plan.dtype], vendor)
    if interpreted():
        constants["PRECISION"] = "wide"
    return {**constants, "num_warps": _warps(constants["BLOCK_D"], vendor), "num_stages": 1}


def _constants(kind: DenseKind, d_head: int, dot: tl.dtype, compute: tl.dtype, vendor: str) -> dict[str, Any]:
    block = max(16, triton.next_power_of_2(d_head))
    precision = "tf32x3" if dot == tl.float32 and vendor == "cuda" else "ieee"
    sizes = {"D": d_head, "BLOCK_B": BLOCK_BATCH, "BLOCK_D": block}
    return {"KIND": kind.name, "COMPUTE": compute, "DOT": dot, "PRECISION": precision, **sizes}


def _warps(block: int, vendor: str) -> int:
    """One for each tile of the matrix unit in a row of h: 8 columns on NVIDIA, 16 on AMD."""
    return min(8, block // (8 if vendor == "cuda" else 16))


def _bound(constants: dict[str, Any], vendor: str) -> int | None:
    """Backward's maxnreg, if any."""
    found = _MAXNREG.get((constants["KIND"], constants["BLOCK_D"]))
    return found if constants["DOT"] == tl.float32 and vendor == "cuda" else None


def _grid(batch: int, heads: int) -> tuple[int, int]:
    return triton.cdiv(batch, BLOCK_BATCH), heads


class Way(Protocol):
    """The loops over time by kernels, forward and backward: `Small` or triton_dense_wide.Wide."""

    plan: DensePlan

    def forward(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, reset: Tensor | None, begin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y (batch, time, head, d_head), the trajectory (state, head, time, batch, d_head) if the plan keeps it, and
        the last state. weight: in the dtype of the products; begin: (state, head, batch, d_head), as the last."""

    def walk(self, weight: Tensor, reset: Tensor | None, came: Tensor | None) -> Walk:
        """The loop over a piece for dense_torch.pull_back; came: the gradient of y."""


class _Dense(torch.autograd.Function):
    """As dense_torch's, by the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        way: Way,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reset: Tensor | None,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        begin = torch.stack([part.to(way.plan.dtype).transpose(0, 1) for part in state])
        y, kept, end = way.forward(inputs, weight, bias, reset, begin)
        ctx.way, ctx.state_dtypes = way, [part.dtype for part in state]
        if way.plan.keep:
            ctx.save_for_backward(inputs, weight, bias, reset, begin, kept)
        ctx.set_materialize_grads(False)
        return (y, *(part.transpose(0, 1).contiguous() for part in end.unbind(0)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, reset, begin, kept = ctx.saved_tensors
        walk = ctx.way.walk(weight, reset, grad_y)
        trajectory = (begin.unbind(0), kept.unbind(0))
        with no_autocast(inputs):
            grads = pull_back(ctx.way.plan, inputs, weight, bias, reset, *trajectory, grad_y, grad_final, walk)
        to_state = (grad.to(dtype) for grad, dtype in zip(grads[3], ctx.state_dtypes, strict=True))
        return None, *grads[:3], None, *to_state


class Small:
    """Of heads whose R one multiprocessor holds: a program for a head and some rows."""

    def __init__(self, plan: DensePlan, d_head: int, dtype: torch.dtype) -> None:
        self.plan, self.options = plan, _options(plan, d_head, dtype)

    def forward(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, reset: Tensor | None, begin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Way`."""
        batch, time, _, heads, d_head = inputs.shape
        y = torch.empty((batch, time, heads, d_head), dtype=inputs.dtype, device=inputs.device)
        steps = time if self.plan.keep else 1
        kept = begin.new_empty((len(begin), heads, steps, batch, d_head))
        with on_device(inputs.device):
            forward_kernel[_grid(batch, heads)](
                inputs.contiguous(),
                weight.contiguous(),
                begin if bias is None else bias.to(self.plan.dtype).contiguous(),
                begin,
                begin if reset is None else reset.contiguous().view(torch.uint8),
                y,
                kept,
                time,
                batch,
                heads,
                HAS_BIAS=bias is not None,
                HAS_RESET=reset is not None,
                KEEP=self.plan.keep,
                **self.options,
            )
        return y, kept, kept[:, :, -1]

    def walk(self, weight: Tensor, reset: Tensor | None, came: Tensor | None) -> Walk:
        """See `Way`."""
        kind, options = self.plan.kind, dict(self.options)
        bound = _bound(options, "hip" if torch.version.hip else "cuda")
        if bound is not None:
            options["maxnreg"] = bound
        matrix = weight.contiguous()
        resets = None if reset is None else reset.contiguous().view(torch.uint8)
        arrived = None if came is None else came.contiguous()

        def walk(rows: Tensor, before: Tensors, grads: Tensors, start: int, whole: int) -> Tensors:
            heads, time, batch = rows.shape[:3]
            after = torch.stack(grads)
            to = torch.empty_like(after)
            with on_device(rows.device):
                backward_kernel[_grid(batch, heads)](
                    rows,
                    *needed_before(kind, before, rows),
                    matrix,
                    rows if resets is None else resets,
                    rows if arrived is None else arrived,
                    after,
                    to,
                    time,
                    batch,
                    heads,
                    whole,
                    start,
                    HAS_RESET=resets is not None,
                    HAS_CAME=arrived is not None,
                    **options,
                )
            return to.unbind(0)

        return walk


_CHECKED = {"bf16": (128, 64), "fp16": (128, 64), "fp32": (64, 32), "fp64": ()}
"""d_head of the kernels compiled by default; the second for one kind only."""
_ALIKE = {"x_ptr", "y_ptr", "weight_ptr", "came_ptr"}
"""Arguments in the dtype of the inputs."""


def default_launches(dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Launch]:
    """Every kind's kernels at the largest d_head that one multiprocessor takes, and sLSTM's at half of it, for each
    vendor; and those of large heads."""
    launches = []
    for given in dtypes:
        for vendor, targets in (("cuda", ("sm_80", "sm_90")), ("hip", ("gfx942",))):
            for index, d_head in enumerate(_CHECKED[given]):
                for kind in KINDS.values() if index == 0 else [KINDS["slstm"]]:
                    launches += _launches(kind, given, d_head, vendor, targets)
        launches += triton_dense_wide.default_launches(given)
    return launches


def _launches(kind: DenseKind, given: str, d_head: int, vendor: str, targets: tuple[str, ...]) -> list[Launch]:
    dot = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[given]
    constants = _constants(kind, d_head, dot, tl.float32, vendor)
    constants |= {"HAS_BIAS": True, "HAS_RESET": True, "HAS_CAME": True, "KEEP": True}
    launches = []
    for kernel in (forward_kernel, backward_kernel):
        signature = {}
        for name in kernel.arg_names:
            pointer = "*u8" if name == "reset_ptr" else f"*{given if name in _ALIKE else 'fp32'}"
            signature[name] = "constexpr" if name.isupper() else pointer if name.endswith("_ptr") else "i32"
        chosen = {name: constants[name] for name in signature if name.isupper()}
        aligned = tuple(name for name in signature if name.endswith("_ptr") and name != "reset_ptr")
        label = f"{kernel.__name__} {kind.name} {d_head} {given}"
        warps = _warps(constants["BLOCK_D"], vendor)
        bound = _bound(constants, vendor) if kernel is backward_kernel else None
        launches.append(
            Launch(label, kernel, signature, chosen, warps, aligned=aligned, targets=targets, maxnreg=bound)
        )
    return launches
