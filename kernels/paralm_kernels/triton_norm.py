"""Launches the kernels of norms, gates and rotary positions (triton_norm_kernels.py).

Deterministic: every program writes its own sums of the weights' gradients, and they are added in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import COMPUTE, Launch, on_device
from .triton_norm_kernels import (
    norm_backward_kernel,
    norm_kernel,
    rotate_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
)

WIDEST, NARROW = 8192, 4096
"""Channels of a group that a program can hold in registers: of the norm and a gate after it; of any form."""
TILE = 1024
"""Numbers of a tensor that a program has at a time, where a row has fewer."""
PROGRAMS = 512
"""So many sum up weights' gradients, in all."""
_PER_THREAD = 8
_GLU = {"ROWS": 4, "BLOCK": 512}


class NormKernels:
    """The arguments that both kernels share. x, gate and v: (rows, channels), the last axis dense; ``given``: EPS,
    GATE, SIGMOID, CENTRED and SKIP; dtype: to compute in."""

    def __init__(
        self,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        skip: tuple[Tensor, Tensor] | None,
        groups: int,
        dtype: torch.dtype,
        given: dict[str, Any],
    ) -> None:
        self.rows, self.size = x.shape
        self.x, self.gate, self.weight, self.skip, self.groups, self.dtype = x, gate, weight, skip, groups, dtype
        coefficients, v = (weight, None) if skip is None else skip
        self.common: dict[str, Any] = {
            **_big("x", x),
            **_big("gate", x if gate is None else gate),
            **_big("v", x if v is None else v),
            "weight_ptr": weight.contiguous(),
            "skip_ptr": coefficients.contiguous(),
            "rows": self.rows,
            "COMPUTE": COMPUTE[dtype],
            "SIZE": self.size,
            "GROUP": self.size // groups,
            **given,
            **shape_of(self.size // groups),
        }

    def forward(self) -> Tensor:
        """y, (rows, channels), in the weight's dtype."""
        y = torch.empty((self.rows, self.size), dtype=self.weight.dtype, device=self.x.device)
        with on_device(self.x.device):
            norm_kernel[triton.cdiv(self.rows, self.common["ROWS"]), self.groups](y_ptr=y, **self.common)
        return y

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, tuple[Tensor, Tensor] | None]:
        """The gradients of x, gate, weight and skip; those of weights in the dtype it computes in."""
        most = max(1, PROGRAMS // self.groups)
        programs = min(most, triton.cdiv(self.rows, self.common["ROWS"]))
        to_x = torch.empty((self.rows, self.size), dtype=self.x.dtype, device=self.x.device)
        to_gate = None if self.gate is None else torch.empty_like(to_x, dtype=self.gate.dtype)
        to_v = None if self.skip is None else torch.empty_like(to_x, dtype=self.skip[1].dtype)
        sums = torch.empty((1 + (self.skip is not None), programs, self.size), dtype=self.dtype, device=self.x.device)
        with on_device(self.x.device):
            norm_backward_kernel[programs, self.groups](
                **_big("grad", grad),
                to_x_ptr=to_x,
                to_gate_ptr=to_x if to_gate is None else to_gate,
                to_v_ptr=to_x if to_v is None else to_v,
                to_weight_ptr=sums[0],
                to_skip_ptr=sums[-1],
                **self.common,
                **bound_of(self.common, self.weight.dtype == torch.float32, "hip" if torch.version.hip else "cuda"),
            )
        total = sums.sum(1)
        to_skip = None if to_v is None else (total[1].unflatten(0, (-1, self.common["SKIP"])).sum(1), to_v)
        return to_x, to_gate, total[0], to_skip


def swiglu_forward(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """SiLU(a) ⊙ b of (rows, 2 n), the last axis dense → (rows, n)."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    with on_device(gate_up.device):
        swiglu_kernel[_glu_grid(rows, size)](
            x_ptr=gate_up, y_ptr=y, rows=rows, stride=gate_up.stride(0), COMPUTE=COMPUTE[dtype], SIZE=size, **_GLU
        )
    return y


def swiglu_backward(gate_up: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of gate_up, contiguous."""
    rows, size = grad.shape
    to_x = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    with on_device(gate_up.device):
        swiglu_backward_kernel[_glu_grid(rows, size)](
            x_ptr=gate_up,
            to_x_ptr=to_x,
            rows=rows,
            stride=gate_up.stride(0),
            **_big("grad", grad),
            COMPUTE=COMPUTE[dtype],
            SIZE=size,
            **_GLU,
        )
    return to_x


def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """(batch, time, head, 2 n) turned by angles (batch or 1, time, 1, n), or back; contiguous, in the dtype of x."""
    batch, time, heads, width = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = shape_of(width // 2)
    rows = batch * time * heads
    with on_device(x.device):
        rotate_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
            x_ptr=x,
            cos_ptr=cos.contiguous(),
            sin_ptr=sin.contiguous(),
            y_ptr=y,
            rows=rows,
            time=time,
            heads=heads,
            x_batch=x.stride(0),
            x_time=x.stride(1),
            x_head=x.stride(2),
            angle_batch=0 if cos.shape[0] == 1 else time * width // 2,
            BACK=back,
            COMPUTE=COMPUTE[cos.dtype],
            HALF=width // 2,
            **shape,
        )
    return y


def _glu_grid(rows: int, size: int) -> tuple[int, int]:
    return triton.cdiv(rows, _GLU["ROWS"]), triton.cdiv(size, _GLU["BLOCK"])


def _big(name: str, x: Tensor) -> dict[str, Any]:
    return {f"{name}_ptr": x, f"{name}_stride": x.stride(0)}


def shape_of(group: int) -> dict[str, int]:
    """Rows, channels and warps of a program, for groups of so many channels."""
    block = triton.next_power_of_2(group)
    rows = max(1, TILE // block)
    threads = 64 if torch.version.hip else 32
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(16, rows * block // _PER_THREAD // threads))}


def bound_of(given: dict[str, Any], single: bool, vendor: str) -> dict[str, int]:
    """Backward's maxnreg, if any: on an A100 NVIDIA's compiler would, for a gate after the norm in single precision,
    rather spill a register or two than take more than 64."""
    return {"maxnreg": 128} if single and vendor == "cuda" and given["GATE"] == 1 and given["num_warps"] == 16 else {}


_CHECKED = (
    ("plain", 4096, 1, {"GATE": 0, "CENTRED": False, "SIGMOID": False, "SKIP": 0}),
    ("after", 4096, 1, {"GATE": 1, "CENTRED": False, "SIGMOID": False, "SKIP": 0}),
    ("first", 8192, 8, {"GATE": 2, "CENTRED": False, "SIGMOID": False, "SKIP": 64}),
    ("first, one group", 4096, 1, {"GATE": 2, "CENTRED": False, "SIGMOID": False, "SKIP": 64}),
    ("widest", 8192, 1, {"GATE": 1, "CENTRED": False, "SIGMOID": False, "SKIP": 0}),
    ("heads", 4096, 8, {"GATE": 1, "CENTRED": True, "SIGMOID": True, "SKIP": 0}),
)
"""Compiled by default: the norms of the 7B models, the residual stream's, ParaRNN's, Mamba2's and mLSTM's."""


def default_launches(dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Launch]:
    """Every kernel at the sizes of the 7B models, for each dtype of the inputs."""
    launches = []
    for given in dtypes:
        wide = "fp64" if given == "fp64" else "fp32"
        compute = tl.float64 if given == "fp64" else tl.float32
        cases: list[tuple[str, Any, dict[str, Any]]] = []
        for label, size, groups, constants in _CHECKED:
            sizes = {"SIZE": size, "GROUP": size // groups, "EPS": 1e-5, **shape_of(size // groups)}
            cases += [
                (f"{k.__name__} {label} {given}", k, constants | sizes) for k in (norm_kernel, norm_backward_kernel)
            ]
        cases += [
            (f"{k.__name__} {given}", k, {"SIZE": 10944, **_GLU}) for k in (swiglu_kernel, swiglu_backward_kernel)
        ]
        cases += [(f"rotate_kernel {given}", rotate_kernel, {"HALF": 32, "BACK": True, **shape_of(32)})]
        for name, kernel, chosen in cases:
            plain = "plain" in name  # of the residual stream, which is wide
            other = dict.fromkeys(("to_weight_ptr", "to_skip_ptr", "cos_ptr", "sin_ptr"), wide)
            other |= {"x_ptr": wide, "to_x_ptr": wide} if plain else {}
            signature, constants = {}, {**chosen, "COMPUTE": compute}
            for argument in kernel.arg_names:
                pointer = f"*{other.get(argument, given)}"
                kind = pointer if argument.endswith("_ptr") else "i32"
                signature[argument] = "constexpr" if argument.isupper() else kind
            values = {argument: constants[argument] for argument, kind in signature.items() if kind == "constexpr"}
            aligned = tuple(
                argument
                for argument in signature
                if argument.endswith(("_ptr", "stride", "x_batch", "x_time", "x_head"))
            )
            warps = chosen.get("num_warps", 4)
            whole = Launch(name, kernel, signature, values, warps, aligned=aligned)
            bound = bound_of(chosen, given == "fp32", "cuda") if kernel is norm_backward_kernel else {}
            if bound:
                launches.append(replace(whole, targets=("sm_80", "sm_90"), maxnreg=bound["maxnreg"]))
                whole = replace(whole, targets=("gfx942",))
            launches.append(whole)
    return launches
