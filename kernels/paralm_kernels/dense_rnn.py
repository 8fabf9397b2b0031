"""LSTM, GRU, sLSTM and Elman's network with a dense recurrence within each head: sequential by nature, and fused.

    rows_t = W x_t + R h_{t−1} + b      state_t = cell(rows_t, state_{t−1})      (per head; the cells: dense_cells.py)

W x is given, computed for the whole sequence at once; what is left is the loop over time, whose cost is that R is read
again at every step unless it stays on chip (FlashRNN, arXiv 2412.07752). With one head "lstm", "gru" and "elman" are
`torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`; "slstm" is xLSTM's (arXiv 2405.04517). Faces with one result:
`reference_dense_rnn`, the loop under autograd; "torch", the loop with its adjoint written out (dense_torch.py);
"triton", one kernel for the whole sequence (triton_dense.py; large heads: triton_dense_wide.py); "newton", a parallel
solve (dense_newton.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import fused
from .autocast import no_autocast
from .checks import DTYPES, compute_dtype, same_device, shape, tolerance, whole_numbers
from .dense_cells import KINDS, DenseKind, Tensors
from .dense_newton import newton_run
from .dense_torch import DensePlan, decode, dense_torch
from .errors import ArgumentError
from .newton import NewtonOptions

METHODS = ("auto", "torch", "newton", "triton")


def dense_rnn(
    kind: str,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Sequence[Tensor] | None = None,
    reset: Tensor | None = None,
    method: str = "auto",
    *,
    tol: float | None = None,
    max_iter: int | None = None,
    tile: int | None = None,
    on_failure: Literal["raise", "sequential"] = "raise",
) -> tuple[Tensor, Tensors]:
    """The outputs h of a sequence and the state that continues it; differentiable in all inputs and the state.

    kind, with its gates in the order of inputs and weight, and its state:

        lstm   i, f, z, o   (h, c)          z is the cell's candidate, nn.LSTM's g
        gru    r, z, n      (h,)            as nn.GRU: r multiplies R_n h + its bias; z is how much of h is kept
        elman  z            (h,)            tanh
        slstm  i, f, z, o   (h, c, n, m)    exponential i, sigmoid f, stabilised by m

    inputs: W x, (batch, time, gate, head, d_head); weight: R, (gate, head, d_head out, d_head in); both of float16,
    bfloat16, float32 or float64. bias: (gate, head, d_head), zero if None; GRU's has a fourth row, the recurrent
    bias of n: (r, z, n, recurrent n). state: a tuple of (batch, head, d_head); None is the initial one, zeros and −∞
    for sLSTM's m. reset: bool (batch, time); where true the state before that step is the initial one and no gradient
    passes. Computed in at least float32; float64 does not mix.

    method: "torch", "triton" (fused kernels on a GPU, R on the chip, on one multiprocessor or in slices on many), or
    "newton" (all steps of a tile at once, dense_newton.py; the backward pass is the loop), or "auto", the fastest:
    triton on a GPU where R fits one multiprocessor, else torch. One takes d_head up to 128 where inputs and weights
    have 16 bits, 64 in float32; half of that for all but "elman" on NVIDIA's with 99 KiB of shared memory, as L40S.
    Many take, on an H100 and 16 bits (in float32), d_head up to 2048 (768) of "lstm" and "slstm", 1536 with another
    Triton than 3.7; 2112 (1024) of "gru" and 3328 (1536) of "elman"; "auto" leaves those to torch until a GPU has run
    them, and then takes them on NVIDIA's, where not more than four rounds are needed for all heads and rows (by a
    model). Measured on a CPU (benchmarks/dense_rnn.py), "newton" beats the loop only where a step is a few numbers and
    R is small, so "auto" never takes it. tol, max_iter, tile, on_failure: of "newton", as in `solve`; it looks at every
    iteration, on a GPU as well.

    Returns y (batch, time, head, d_head) in the dtype of inputs, and the state in the compute dtype. A backward pass
    keeps the arguments and the states. sLSTM's m is part of the state and has its true gradient. Raises ArgumentError,
    NotConverged.
    """
    cell, begin, dtype = _prepared(kind, inputs, weight, bias, state, reset)
    _check_options(method, tol, max_iter, tile, on_failure)
    every = (inputs, weight, *(() if bias is None else (bias,)), *begin)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in every)
    if inputs.shape[1] == 1 and not keep:
        with no_autocast(inputs):
            return decode(cell, inputs, weight, bias, begin, reset, dtype)
    plan = DensePlan(cell, dtype, keep)
    if method == "newton":
        plan = replace(plan, solve=newton_run(NewtonOptions(tile, tol, max_iter), on_failure))
    if method == "triton" or (method == "auto" and fused.by_default(inputs)):
        kernels = fused.kernels("triton_dense", "dense_rnn: ")
        way = kernels.way(plan, inputs, weight, asked=method == "triton")
        if not isinstance(way, str):
            result: tuple[Tensor, Tensors] = kernels.dense_triton(way, inputs, weight, bias, begin, reset)
            return result
        if method == "triton":
            raise ArgumentError(f"dense_rnn: {way}")
    return dense_torch(plan, inputs, weight, bias, begin, reset)


def reference_dense_rnn(
    kind: str,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Sequence[Tensor] | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """`dense_rnn` as its equations are written, one step after the other under autograd: slow, to compare with."""
    cell, begin, dtype = _prepared(kind, inputs, weight, bias, state, reset)
    now, outputs = tuple(part.to(dtype) for part in begin), []
    for t in range(inputs.shape[1]):
        if reset is not None:
            cut = reset[:, t, None, None]
            now = tuple(torch.where(cut, value, part) for value, part in zip(cell.initial, now, strict=True))
        with no_autocast(inputs):
            products = torch.einsum("ghoi,bhi->gbho", weight.to(dtype), now[0])
        rows = [torch.zeros_like(now[0]) for _ in cell.rows]
        for row in range(cell.recurrent):
            rows[row] = rows[row] + products[row]
        for gate, row in enumerate(cell.input_rows):
            rows[row] = rows[row] + inputs[:, t, gate].to(dtype)
        if bias is not None:
            for index, row in enumerate(cell.bias_rows):
                rows[row] = rows[row] + bias[index].to(dtype)
        now = cell.step(tuple(rows), now)
        outputs.append(now[0])
    return torch.stack(outputs, 1).to(inputs.dtype), now


def dense_state(
    kind: str,
    batch: int,
    heads: int,
    d_head: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """The initial state of a kind: (batch, heads, d_head) each, in at least float32. Raises ArgumentError."""
    wide = torch.promote_types(dtype, torch.float32)
    return tuple(torch.full((batch, heads, d_head), value, dtype=wide, device=device) for value in _kind(kind).initial)


def _check_options(method: str, tol: float | None, max_iter: int | None, tile: int | None, on_failure: str) -> None:
    if method not in METHODS:
        raise ArgumentError(f"dense_rnn: method is {method!r}; expected one of {', '.join(METHODS)}")
    if on_failure not in ("raise", "sequential"):
        raise ArgumentError(f"dense_rnn: on_failure is {on_failure!r}; expected 'raise' or 'sequential'")
    whole_numbers("dense_rnn: ", max_iter=max_iter, tile=tile)
    tolerance("dense_rnn: ", tol)


def _kind(kind: str) -> DenseKind:
    if kind not in KINDS:
        raise ArgumentError(f"dense_rnn: kind is {kind!r}; expected one of {', '.join(KINDS)}")
    return KINDS[kind]


def _prepared(
    kind: str, inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Sequence[Tensor] | None, reset: Tensor | None
) -> tuple[DenseKind, Tensors, torch.dtype]:
    """The cell, the state it starts from and the compute dtype, of checked arguments."""
    cell = _kind(kind)
    _tensor("inputs", inputs)
    if inputs.ndim != 5 or 0 in inputs.shape or inputs.shape[2] != len(cell.gates):
        raise ArgumentError(
            f"dense_rnn: inputs is {tuple(inputs.shape)}, expected (batch, time, {len(cell.gates)}, head, d_head) for "
            f"the gates {', '.join(cell.gates)} of {kind!r}, none of them 0"
        )
    batch, time, gates, heads, d_head = inputs.shape
    origin = f"of inputs {tuple(inputs.shape)}"
    located, groups = [("dense_rnn: weight", weight)], [("dense_rnn: inputs", (inputs,))]
    _tensor("weight", weight)
    shape("dense_rnn: weight", weight, (gates, heads, d_head, d_head), f"(gate, head, d_head, d_head) {origin}")
    if bias is not None:
        _tensor("bias", bias)
        names = ", ".join(name if name != "a" else "recurrent n" for name in cell.biases)
        shape("dense_rnn: bias", bias, (len(cell.biases), heads, d_head), f"({names}; head, d_head) {origin}")
        located.append(("dense_rnn: bias", bias))
    if state is None:
        begin = dense_state(kind, batch, heads, d_head, inputs.device, torch.promote_types(inputs.dtype, weight.dtype))
    else:
        begin = _state(cell, state, (batch, heads, d_head), origin)
        located += [(f"dense_rnn: state {name!r}", part) for name, part in zip(cell.state, begin, strict=True)]
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            given = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise ArgumentError(f"dense_rnn: reset must be a bool tensor (batch, time), got {given}")
        shape("dense_rnn: reset", reset, (batch, time), f"(batch, time) {origin}")
    groups += [(name, (tensor,)) for name, tensor in located]
    dtype = compute_dtype(groups)
    same_device(("dense_rnn: inputs", inputs), [*located, *([] if reset is None else [("dense_rnn: reset", reset)])])
    return cell, begin, dtype


def _state(cell: DenseKind, state: Any, expected: tuple[int, ...], origin: str) -> Tensors:
    names = ", ".join(cell.state)
    if isinstance(state, Tensor) or not isinstance(state, Sequence) or len(state) != len(cell.state):
        given = f"{len(state)} of them" if isinstance(state, Sequence) else type(state).__name__
        raise ArgumentError(f"dense_rnn: state must be a tuple of {len(cell.state)} tensors ({names}), got {given}")
    for name, part in zip(cell.state, state, strict=True):
        _tensor(f"state {name!r}", part)
        shape(f"dense_rnn: state {name!r}", part, expected, f"(batch, head, d_head) {origin}")
    return tuple(state)


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"dense_rnn: {name} must be a floating-point tensor, got {given}")
