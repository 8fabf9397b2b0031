"""Early checks of the arguments of `solve` and `step`: every message names the argument and both sides."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, Tensors
from .errors import ArgumentError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(cell: Cell, what: str, names: Sequence[str], values: Any) -> Tensors:
    """`values` as a tuple of floating tensors of one dtype and device, one per name."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise ArgumentError(f"{what} must be a tuple of tensors ({', '.join(names)}), got {type(values).__name__}")
    if len(values) != len(names):
        raise ArgumentError(
            f"{what}: cell {cell.name!r} takes {len(names)} ({', '.join(names) or 'none'}), got {len(values)}"
        )
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise ArgumentError(f"{what}[{name!r}] must be a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise ArgumentError(f"{what}[{name!r}] is {value.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        first = values[0]
        if value.dtype != first.dtype:
            raise ArgumentError(
                f"{what}[{name!r}] is {value.dtype} but {what}[{names[0]!r}] is {first.dtype}; give both one dtype"
            )
    return tuple(values)


def same_device(reference: tuple[str, Tensor], others: Sequence[tuple[str, Tensor]]) -> None:
    """Refuses tensors that are not where the reference is."""
    for name, value in others:
        if value.device != reference[1].device:
            raise ArgumentError(
                f"{name} is on {value.device} but {reference[0]} is on {reference[1].device}; move one of them"
            )


def shape(name: str, value: Tensor, expected: tuple[int, ...], because: str) -> None:
    """Refuses a tensor of another shape than expected."""
    if tuple(value.shape) != expected:
        raise ArgumentError(f"{name} is {tuple(value.shape)}, expected {expected} {because}")


def compute_dtype(groups: Sequence[tuple[str, Tensors]]) -> torch.dtype:
    """At least float32, and float64 only where everything is: a lone float64 is a mistake, not a wish."""
    present = [(name, values[0].dtype) for name, values in groups if values]
    first_name, first = present[0]
    for name, dtype in present[1:]:
        if (dtype == torch.float64) != (first == torch.float64):
            raise ArgumentError(
                f"{name} are {dtype} but {first_name} are {first}; float64 does not mix, convert one side"
            )
    result = torch.float32
    for _, dtype in present:
        result = torch.promote_types(result, dtype)
    return result


def sequence_arguments(
    cell: Cell, inputs: Any, params: Any, state: Any | None, reset: Tensor | None
) -> tuple[Tensors, Tensors, Tensors | None, torch.dtype]:
    """The checked (inputs, params, state, compute dtype) of a solve over time."""
    inputs = tensors(cell, "inputs", cell.inputs, inputs)
    params = tensors(cell, "params", cell.params, params)
    first_name, first = f"inputs[{cell.inputs[0]!r}]", inputs[0]
    if first.ndim != 3 or 0 in first.shape:
        raise ArgumentError(f"{first_name} is {tuple(first.shape)}, expected (batch, time, channel), none of them 0")
    batch, time, channel = first.shape
    for name, value in zip(cell.inputs, inputs, strict=True):
        shape(f"inputs[{name!r}]", value, (batch, time, channel), f"as {first_name}")
    _check_rest(cell, first_name, first, inputs, params, state, (batch, channel))
    groups = [("inputs", inputs), ("params", params)]
    if state is not None:
        state = tensors(cell, "state", cell.state, state)
        groups.append(("state", state))
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise ArgumentError(f"reset must be a bool tensor (batch, time), got {kind}")
        shape("reset", reset, (batch, time), f"(batch, time) as {first_name}")
        same_device((first_name, first), [("reset", reset)])
    return inputs, params, state, compute_dtype(groups)


def step_arguments(cell: Cell, state: Any, inputs: Any, params: Any) -> tuple[Tensors, Tensors, Tensors, torch.dtype]:
    """The checked (state, inputs, params, compute dtype) of one decode step."""
    inputs = tensors(cell, "inputs", cell.inputs, inputs)
    params = tensors(cell, "params", cell.params, params)
    first_name, first = f"inputs[{cell.inputs[0]!r}]", inputs[0]
    if first.ndim != 2:
        raise ArgumentError(f"{first_name} is {tuple(first.shape)}, expected (batch, channel)")
    batch, channel = first.shape
    for name, value in zip(cell.inputs, inputs, strict=True):
        shape(f"inputs[{name!r}]", value, (batch, channel), f"as {first_name}")
    _check_rest(cell, first_name, first, inputs, params, state, (batch, channel))
    state = tensors(cell, "state", cell.state, state)
    return state, inputs, params, compute_dtype([("inputs", inputs), ("params", params), ("state", state)])


def _check_rest(
    cell: Cell,
    first_name: str,
    first: Tensor,
    inputs: Tensors,
    params: Tensors,
    state: Any | None,
    rows: tuple[int, int],
) -> None:
    for name, value in zip(cell.params, params, strict=True):
        shape(f"params[{name!r}]", value, (rows[1],), f"(channel,) as {first_name} {tuple(first.shape)}")
    located = [(f"inputs[{name!r}]", value) for name, value in zip(cell.inputs, inputs, strict=True)]
    located += [(f"params[{name!r}]", value) for name, value in zip(cell.params, params, strict=True)]
    if state is not None:
        state = tensors(cell, "state", cell.state, state)
        for name, value in zip(cell.state, state, strict=True):
            shape(f"state[{name!r}]", value, rows, f"(batch, channel) as {first_name} {tuple(first.shape)}")
        located += [(f"state[{name!r}]", value) for name, value in zip(cell.state, state, strict=True)]
    same_device((first_name, first), located)


def whole_numbers(where: str, **options: Any) -> None:
    """Refuses an option that is given and no whole number of at least 1; `where` is put before its name."""
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ArgumentError(f"{where}{name} is {value!r}; expected at least 1 (a whole number)")


def tolerance(where: str, tol: Any) -> None:
    """Refuses a tolerance that is given and no number above 0."""
    if tol is not None and (isinstance(tol, bool) or not isinstance(tol, Real) or not float(tol) > 0):
        raise ArgumentError(f"{where}tol is {tol!r}; expected a number above 0")


def finite(cell: Cell, groups: Sequence[tuple[str, Sequence[str], Tensors, tuple[str, ...]]]) -> None:
    """Raises with the first position that is not finite. Waits for the device."""
    for what, names, values, axes in groups:
        for name, value in zip(names, values, strict=True):
            bad = ~torch.isfinite(value)
            if bool(bad.any()):
                position = bad.nonzero()[0].tolist()
                where = ", ".join(f"{axis} {index}" for axis, index in zip(axes, position, strict=True))
                raise ArgumentError(f"{what}[{name!r}] is {value[tuple(position)].item()} at ({where})")
