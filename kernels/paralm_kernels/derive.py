"""Derives everything a solver needs from `Cell.step`: the step, its Jacobian and its gradient, as pointwise graphs.

`make_fx` traces step and `torch.func.vjp` of it once per cell. Putting unit vectors in place of the cotangent of that
one vector–Jacobian product gives the S×S Jacobian ∂next_i/∂state_j, with what is zero or one folded away. Nothing
here runs while a recurrence is solved (torch.func inside torch.utils.checkpoint raises).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx

from .cell import Cell, Tensors, validate
from .errors import CellError
from .graph import Builder, Graph, Node
from .lowering import DECOMPOSED, lower

_TRACE_DTYPE = torch.float64
_TRACE_SHAPE = (2, 3)  # every argument alike: broadcasting is the solver's business, not the step's


@dataclass(frozen=True, eq=False)
class Derived:
    """The graphs of one cell. Inputs are named as in the cell; outputs as the methods below name them."""

    cell: Cell
    step: Graph
    """state, inputs, params → next state."""
    jacobian: Graph
    """state, inputs, params → ∂next_i/∂state_j."""
    gradient: Graph
    """state, inputs, params, cotangents of the next state → cotangents of inputs and params."""
    pullback: Graph
    """The same with the cotangents of the state before them."""
    bounded: tuple[str, ...]
    """The state components that the cell's box bounds."""

    @property
    def n_state(self) -> int:
        return len(self.cell.state)

    @cached_property
    def diagonal(self) -> bool:
        """True where no state component's next value depends on another component."""
        names = self.cell.state
        off = [self.jacobian.outputs[jacobian_name(a, b)] for a in names for b in names if a != b]
        return all(node.is_const and node.value == 0.0 for node in off)

    @cached_property
    def jacobian_names(self) -> tuple[str, ...]:
        """The outputs of `jacobian` that a solver keeps: the diagonal, or all of it row by row."""
        names = self.cell.state
        if self.diagonal:
            return tuple(jacobian_name(name, name) for name in names)
        return tuple(jacobian_name(a, b) for a in names for b in names)

    @cached_property
    def linearised(self) -> Graph:
        """Next state and Jacobian together."""
        jacobian = {name: self.jacobian.outputs[name] for name in self.jacobian_names}
        return Graph(self.step.inputs, {**self.step.outputs, **jacobian})


def next_name(name: str) -> str:
    return f"next_{name}"


def jacobian_name(row: str, column: str) -> str:
    return f"d_next_{row}_d_{column}"


def cotangent_name(name: str) -> str:
    """The name of the cotangent (the gradient that flows in or out) of a state component, input or parameter."""
    return f"grad_{name}"


_cache: weakref.WeakKeyDictionary[type, dict[Any, Derived]] = weakref.WeakKeyDictionary()


def derive(cell: Cell) -> Derived:
    """The derived graphs of a cell, traced on first use. CellError (one line) if its step cannot be lowered."""
    attributes = tuple(sorted(vars(cell).items())) if isinstance(cell, Cell) else ()
    try:
        hash(attributes)
        key: Any = attributes
    except TypeError:
        key = id(cell)  # kept alive by Derived.cell, so the id is not used again
    known = _cache.setdefault(type(cell), {})
    if key not in known:
        # In a thread of its own, away from what the caller is in: hooks for saved tensors (activation checkpointing),
        # modes, a default device. All of these belong to a thread, and a trace would see them.
        with ThreadPoolExecutor(1, thread_name_prefix="derive") as alone:
            known[key] = alone.submit(lambda: _derive(validate(cell))).result()
    return known[key]


def _derive(cell: Cell) -> Derived:
    names = (*cell.state, *cell.inputs, *cell.params)
    cotangents = tuple(cotangent_name(name) for name in cell.state)
    traced = _trace(cell, len(names))
    build = Builder()
    outputs = _lower_all(cell, build, traced, (*names, *cotangents))
    _refuse_shapes(cell, _samples(len(names)))
    n = len(cell.state)
    step = dict(zip(map(next_name, cell.state), outputs[:n], strict=True))
    grads = dict(zip(map(cotangent_name, names), outputs[n:], strict=True))
    jacobian: dict[str, Node] = {}
    for row in cell.state:
        unit = {cotangent_name(name): float(name == row) for name in cell.state}
        columns = build.substitute({name: grads[cotangent_name(name)] for name in cell.state}, unit)
        jacobian.update({jacobian_name(row, name): columns[name] for name in cell.state})
    kept = {name: grads[name] for name in map(cotangent_name, (*cell.inputs, *cell.params))}
    given = (*names, *cotangents)
    return Derived(
        cell, Graph(names, step), Graph(names, jacobian), Graph(given, kept), Graph(given, grads), _bounded(cell)
    )


def _bounded(cell: Cell) -> tuple[str, ...]:
    """The state components that the box bounds."""
    try:
        box = cell.box(tuple(torch.zeros(_TRACE_SHAPE, dtype=_TRACE_DTYPE) for _ in cell.state))
    except Exception as error:
        raise CellError(
            f"cell {cell.name!r}: box raised {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if box is None:
        return ()
    expected = f"None or a tuple of {len(cell.state)} bounds ({', '.join(cell.state)})"
    if not isinstance(box, tuple) or len(box) != len(cell.state):
        got = f"a tuple of {len(box)}" if isinstance(box, tuple) else type(box).__name__
        raise CellError(f"cell {cell.name!r}: box must return {expected}, got {got}")
    for name, bound in zip(cell.state, box, strict=True):
        if not isinstance(bound, Tensor | float | int | None):
            got = f"a {type(bound).__name__} for {name}"
            raise CellError(f"cell {cell.name!r}: box must return {expected}, got {got}")
        negative = bool((bound < 0).any()) if isinstance(bound, Tensor) else bound is not None and not bound >= 0
        if negative:
            got = "one in a tensor" if isinstance(bound, Tensor) else repr(bound)
            raise CellError(f"cell {cell.name!r}: box bounds |{name}|, so by no negative number, got {got}")
    return tuple(name for name, bound in zip(cell.state, box, strict=True) if bound is not None)


def box_of(cell: Cell, state: Tensors) -> tuple[Tensor | float | None, ...]:
    """The cell's bounds from an initial state, (batch, channel) each, one a component. CellError for a tensor that
    does not broadcast to the state."""
    box = cell.box(state) or (None,) * len(state)
    for name, bound, h in zip(cell.state, box, state, strict=True):
        if isinstance(bound, Tensor) and not _broadcasts(bound.shape, h.shape):
            raise CellError(
                f"cell {cell.name!r}: box bounds {name} by a tensor of shape {tuple(bound.shape)}, which does not "
                f"broadcast to the state's {tuple(h.shape)}, (batch, channel)"
            )
    return box


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1], strict=False))


def _samples(count: int) -> list[Tensor]:
    """Numbers to trace with, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(_TRACE_SHAPE, generator=generator, dtype=_TRACE_DTYPE) for _ in range(count)]


def _grouped(cell: Cell, tensors: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors]:
    """State, inputs and params of a step, of them in one row."""
    n, m = len(cell.state), len(cell.state) + len(cell.inputs)
    return tuple(tensors[:n]), tuple(tensors[n:m]), tuple(tensors[m:])


def _refuse_shapes(cell: Cell, samples: Sequence[Tensor]) -> None:
    """CellError where a step gives other values for the same numbers in larger tensors: what it took from a shape would
    stand in the graphs as a constant, that of the trace. (One that changes from call to call the laws find.)"""
    larger = [x.repeat(2, 2) for x in samples]
    with torch.no_grad():
        before, wide, after = (cell.step(*_grouped(cell, given)) for given in (samples, larger, samples))
    for name, a, b, again in zip(cell.state, before, wide, after, strict=True):
        if torch.equal(a.nan_to_num(), again.nan_to_num()) and not torch.allclose(a.repeat(2, 2), b, equal_nan=True):
            raise CellError(
                f"cell {cell.name!r}: step gives another {name} for the same numbers in tensors of another shape; it "
                "must not look at shapes"
            )


def _trace(cell: Cell, count: int) -> GraphModule:
    """The fx graph of (next state, cotangents of state, inputs and params)."""
    samples = _samples(count + len(cell.state))

    def step(*args: Tensor) -> tuple[Tensor, ...]:
        return _checked(cell, cell.step(*_grouped(cell, args)))

    def step_and_vjp(*args: Tensor) -> tuple[Tensor, ...]:
        pullback: Any = torch.func.vjp(step, *args[:count])
        outputs, vjp = pullback
        return (*outputs, *vjp(args[count:]))

    functional = torch.func.functionalize(step_and_vjp, remove="mutations")
    try:
        with torch.random.fork_rng(devices=()), torch.enable_grad():
            return make_fx(functional, decomposition_table=DECOMPOSED)(*samples)
    except CellError:
        raise
    except Exception as error:
        text = str(error)
        if "_local_scalar_dense" in text or "data-dependent" in text or "Boolean value" in text:
            reason = "it branches on data (a tensor used as bool or number); use torch.where(condition, a, b)"
        elif "in-place operation" in text:
            reason = "it changes an argument in place; a step returns new tensors"
        else:
            reason = f"it raised {type(error).__name__}: {text.splitlines()[0] if text else ''}"
        raise CellError(f"cell {cell.name!r}: step cannot be traced: {reason}") from error


def _checked(cell: Cell, result: Any) -> tuple[Tensor, ...]:
    expected = f"a tuple of {len(cell.state)} tensors ({', '.join(cell.state)})"
    if not isinstance(result, tuple) or len(result) != len(cell.state):
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise CellError(f"cell {cell.name!r}: step must return {expected}, got {got}")
    for name, value in zip(cell.state, result, strict=True):
        if not isinstance(value, Tensor):
            raise CellError(f"cell {cell.name!r}: step must return {expected}; {name} is a {type(value).__name__}")
        if value.shape != _TRACE_SHAPE:
            raise CellError(
                f"cell {cell.name!r}: step turns {name} of shape {_TRACE_SHAPE} into {tuple(value.shape)}; "
                "a step is elementwise and must not mix channels or rows"
            )
        if value.dtype != _TRACE_DTYPE:
            raise CellError(
                f"cell {cell.name!r}: step turns {name} from {_TRACE_DTYPE} into {value.dtype}; "
                "a step computes in the dtype it is given"
            )
    return result


def _lower_all(cell: Cell, build: Builder, traced: GraphModule, names: tuple[str, ...]) -> list[Node]:
    values: dict[FxNode, Any] = {}
    remaining = iter(names)
    for node in traced.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise CellError(
                f"cell {cell.name!r}: step draws random numbers ({node.target}); it must be a pure function"
            )
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = build.input(next(remaining))
        elif node.op == "get_attr":
            values[node] = build.const(_constant(cell, getattr(traced, str(node.target))))
        elif node.op == "call_function":
            values[node] = _lower_one(cell, build, node, values)
        elif node.op == "output":
            return [
                build.as_number(values[result]) if isinstance(result, FxNode) else build.const(0.0)
                for result in node.args[0]
            ]
    raise CellError(f"cell {cell.name!r}: the traced step has no output")


def _lower_one(cell: Cell, build: Builder, node: FxNode, values: dict[FxNode, Any]) -> Any:
    args = [values[arg] if isinstance(arg, FxNode) else arg for arg in node.args]
    kwargs = {key: values[arg] if isinstance(arg, FxNode) else arg for key, arg in node.kwargs.items()}
    try:
        return lower(build, node.target, args, kwargs, _TRACE_DTYPE)
    except CellError as error:
        raise CellError(f"cell {cell.name!r}: step cannot be used: {error}") from None


def _constant(cell: Cell, value: Tensor) -> float:
    if value.numel() != 1:
        raise CellError(
            f"cell {cell.name!r}: step uses a tensor of shape {tuple(value.shape)} that is not an argument; "
            "name it in params"
        )
    if value.requires_grad:
        raise CellError(
            f"cell {cell.name!r}: step uses a tensor that wants a gradient and is not an argument; name it in params"
        )
    return float(value.item())
