"""What a recurrent cell is: names, counts and one elementwise step; and the registry that finds cells by name.

A cell is h_t = step(h_{t−1}, x_t; p), elementwise over channels. `step` is the single source of truth: the
Jacobian, the vector–Jacobian product, the loops over time and the decode step are derived from it (derive.py).
"""

from __future__ import annotations

import difflib
import keyword
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, TypeVar

from torch import Tensor

from .errors import CellError

Tensors = tuple[Tensor, ...]


class Cell:
    """A recurrence over time, elementwise over channels. Subclass it, fill in the names, write `step`.

    `state`, `inputs` and `params` are tuples of distinct Python identifiers. `step` sees tensors that broadcast
    over (batch, channel) or (batch, time, channel), all of one dtype (float32 or float64); it may use elementwise
    torch operations only, must not look at values (`if h > 0`), shapes or dtypes, and returns the new state as a
    tuple in the order of `state`.
    """

    name: ClassVar[str] = ""
    state: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()
    params: ClassVar[tuple[str, ...]] = ()
    picard: ClassVar[int] = 0
    """Fixed-point sweeps h ← f(shift h, x) before Newton; cells with exponential gates need a few."""
    free_state: ClassVar[bool] = True
    """Whether any value may stand in the state; false where a component is a normaliser, whose scale means nothing."""

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        """The next state. Every tensor has, or broadcasts to, one common shape."""
        raise CellError(f"cell {self.name!r}: step is not defined; write step(self, state, inputs, params)")

    def box(self, state: Tensors) -> tuple[Tensor | float | None, ...] | None:
        """Bounds that hold for every later state: |component| ≤ bound, None where there is none.

        `state` is the initial state, (batch, channel) each; a bound is a number or broadcasts to that shape, and
        must also hold after a reset to zero. Newton clamps its iterates to the box, which keeps wild iterates from
        forming and cannot change the solution, as the true states lie inside.
        """
        return None


CellOrClass = TypeVar("CellOrClass", bound="Cell | type[Cell]")

_RESERVED = frozenset({"torch", "aten", "zip", "tl", "triton"})
_registry: dict[str, Cell] = {}


def validate(cell: Cell) -> Cell:
    """Returns the cell if its names are well-formed; raises CellError with one line otherwise."""
    if not isinstance(cell, Cell):
        raise CellError(f"expected a Cell instance, got {type(cell).__name__}; subclass paralm_kernels.Cell")
    kind = type(cell)
    where = f"cell {kind.__qualname__}"
    if not isinstance(kind.name, str) or not kind.name:
        raise CellError(f"{where}: name must be a non-empty string, e.g. name = {kind.__name__.lower()!r}")
    seen: dict[str, str] = {}
    for field in ("state", "inputs", "params"):
        names = getattr(kind, field)
        if isinstance(names, str):
            raise CellError(f"{where}: {field} is the string {names!r}; write a tuple, ({names!r},)")
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise CellError(f"{where}: {field} must be a tuple of names, got {names!r}")
        if field != "params" and not names:
            raise CellError(f"{where}: {field} is empty; name at least one")
        for name in names:
            if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
                raise CellError(f"{where}: {field} name {name!r} is not a plain Python identifier")
            if name in _RESERVED or name.startswith(("next_", "grad_", "d_next_")):
                raise CellError(f"{where}: {field} name {name!r} is reserved for generated code; choose another")
            if name in seen:
                raise CellError(f"{where}: {name!r} is in both {seen[name]} and {field}; names must differ")
            seen[name] = field
    if not isinstance(kind.picard, int) or kind.picard < 0:
        raise CellError(f"{where}: picard must be a number of sweeps >= 0, got {kind.picard!r}")
    if kind.step is Cell.step:
        raise CellError(f"{where}: step is not defined; write step(self, state, inputs, params)")
    return cell


def register(cell: CellOrClass) -> CellOrClass:
    """Makes a cell findable by its name; takes an instance or a class (so it works as a decorator).

    Defining the same class again (a notebook, a reload) replaces it; two different cells of one name are refused.
    """
    instance = cell() if isinstance(cell, type) else cell
    validate(instance)
    present = _registry.get(instance.name)
    if present is not None and type(present).__qualname__ != type(instance).__qualname__:
        raise CellError(
            f"cell name {instance.name!r} is taken by {type(present).__qualname__}; "
            f"give {type(instance).__qualname__} another name"
        )
    _registry[instance.name] = instance
    return cell


def cells() -> Mapping[str, Cell]:
    """The registered cells by name, read-only, in the order they were registered."""
    return MappingProxyType(_registry)


def get_cell(name: str) -> Cell:
    """The registered cell of that name; CellError with the nearest name if there is none."""
    if name in _registry:
        return _registry[name]
    nearest = difflib.get_close_matches(str(name), _registry, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise CellError(f"no cell named {name!r}{hint} (registered: {', '.join(_registry)})")
