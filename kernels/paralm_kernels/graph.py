"""Pointwise graphs: the form in which a cell's step, Jacobian and gradient are kept and from which code is emitted.

A graph is a DAG of elementwise operations in static single assignment. `Builder` numbers values, so equal
subexpressions are one node (CSE), and folds what is exact: constants, x·1, x·0, x+0, −(−x), a+(−b). What no output
needs is never listed (DCE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

UNARY: dict[str, Callable[[float], float]] = {
    "neg": lambda a: -a,
    "reciprocal": lambda a: 1.0 / a,
    "exp": math.exp,
    "log": math.log,
    "log1p": math.log1p,
    "expm1": math.expm1,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1.0 / math.sqrt(a),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "sigmoid": lambda a: 1.0 / (1.0 + math.exp(-a)),
    "erf": math.erf,
    "abs": abs,
    "sign": lambda a: float((a > 0) - (a < 0)),
}
BINARY: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "maximum": max,
    "minimum": min,
    "sigmoid_backward": lambda g, y: g * y * (1.0 - y),
    "tanh_backward": lambda g, y: g * (1.0 - y * y),
}
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
LOGICAL = ("logical_and", "logical_or", "logical_not")
COMMUTATIVE = {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"}
OPERATIONS = (*UNARY, *BINARY, *COMPARE, *LOGICAL, "where")
"""Every operation a graph may hold, besides "input" and "const". All are elementwise."""


@dataclass(frozen=True, eq=False)
class Node:
    """One value. `op` is "input", "const" or one of OPERATIONS; nodes are compared by identity."""

    op: str
    args: tuple[Node, ...]
    index: int
    name: str = ""
    value: float = 0.0

    @property
    def is_bool(self) -> bool:
        return self.op in COMPARE or self.op in LOGICAL

    @property
    def is_const(self) -> bool:
        return self.op == "const"


@dataclass(frozen=True)
class Graph:
    """Named inputs and named outputs; `nodes` is what the outputs need, operands before their users."""

    inputs: tuple[str, ...]
    outputs: Mapping[str, Node]
    nodes: tuple[Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", ancestors(self.outputs.values()))

    def select(self, names: Iterable[str]) -> Graph:
        """The same graph with only some of its outputs."""
        return Graph(self.inputs, {name: self.outputs[name] for name in names})

    def __str__(self) -> str:
        def text(node: Node) -> str:
            return node.name if node.op == "input" else repr(node.value) if node.is_const else f"v{node.index}"

        lines = [
            f"v{node.index} = {node.op}({', '.join(text(arg) for arg in node.args)})"
            for node in self.nodes
            if node.op not in ("input", "const")
        ]
        lines += [f"{name} = {text(node)}" for name, node in self.outputs.items()]
        return "\n".join(lines)


def python_number(value: float) -> str:
    """A number as generated code has it; inf and nan are no names there."""
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def ancestors(roots: Iterable[Node]) -> tuple[Node, ...]:
    """The roots and everything they are computed from, operands first."""
    seen: dict[int, Node] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.index not in seen:
            seen[node.index] = node
            stack.extend(node.args)
    return tuple(seen[index] for index in sorted(seen))


class Builder:
    """Makes nodes; one builder serves all graphs of a cell, so that they share their common parts."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Node] = {}

    def _intern(self, op: str, args: tuple[Node, ...] = (), name: str = "", value: float = 0.0) -> Node:
        key = (op, tuple(arg.index for arg in args), name, repr(value))
        if key not in self._known:
            self._known[key] = Node(op, args, len(self._known), name, value)
        return self._known[key]

    def input(self, name: str) -> Node:
        return self._intern("input", name=name)

    def const(self, value: float) -> Node:
        return self._intern("const", value=float(value))

    def call(self, op: str, *args: Node) -> Node:
        """The node of an operation, simplified where that is exact for finite values."""
        if op not in OPERATIONS:
            raise KeyError(op)
        if op not in ("where", *LOGICAL):  # a condition used as a number
            args = tuple(self.as_number(arg) for arg in args)
        if all(arg.is_const for arg in args):
            folded = _fold(op, [arg.value for arg in args])
            if folded is not None:
                return self.const(folded)
        simpler = self._simplify(op, args)
        if simpler is not None:
            return simpler
        if op in COMMUTATIVE:
            args = tuple(sorted(args, key=lambda arg: arg.index))
        return self._intern(op, args)

    def as_number(self, node: Node) -> Node:
        return self.call("where", node, self.const(1.0), self.const(0.0)) if node.is_bool else node

    def _simplify(self, op: str, args: tuple[Node, ...]) -> Node | None:
        a, b = (*args, None, None)[:2]
        if op in ("mul", "add") and a is not None and b is not None:
            if a.is_const:
                a, b = b, a
            if b.is_const:
                if op == "mul" and b.value in (0.0, 1.0, -1.0):
                    return (b, a, self.call("neg", a))[(0.0, 1.0, -1.0).index(b.value)]
                if op == "add" and b.value == 0.0:
                    return a
            if op == "add" and b.op == "neg":
                return self.call("sub", a, b.args[0])
            if op == "add" and a.op == "neg":
                return self.call("sub", b, a.args[0])
        elif op == "sub" and a is not None and b is not None:
            if b.is_const and b.value == 0.0:
                return a
            if a.is_const and a.value == 0.0:
                return self.call("neg", b)
            if b.op == "neg":
                return self.call("add", a, b.args[0])
        elif op == "div" and a is not None and b is not None:
            if b.is_const and b.value == 1.0:
                return a
            if a.is_const and a.value == 0.0:
                return a
        elif op == "neg" and a is not None and a.op == "neg":
            return a.args[0]
        elif op in ("sigmoid_backward", "tanh_backward") and a is not None and a.is_const and a.value == 0.0:
            return a
        elif op == "where":
            if args[1] is args[2]:
                return args[1]
        elif op == "pow" and b is not None and b.is_const and b.value in (0.0, 0.5, 1.0, 2.0, 3.0) and a is not None:
            return self._small_power(a, b.value)
        return None

    def _small_power(self, base: Node, exponent: float) -> Node:
        if exponent == 0.5:
            return self.call("sqrt", base)
        result = self.const(1.0)
        for _ in range(int(exponent)):
            result = self.call("mul", result, base)
        return result

    def substitute(self, roots: Mapping[str, Node], values: Mapping[str, float]) -> dict[str, Node]:
        """The roots with some inputs replaced by constants, folded again."""
        new: dict[int, Node] = {}
        for node in ancestors(roots.values()):
            if node.op == "input" and node.name in values:
                new[node.index] = self.const(values[node.name])
            elif node.args:
                new[node.index] = self.call(node.op, *(new[arg.index] for arg in node.args))
            else:
                new[node.index] = node
        return {name: new[node.index] for name, node in roots.items()}


def _fold(op: str, values: list[float]) -> float | None:
    """The value of an operation on constants; None where it is not a finite number."""
    try:
        if op in UNARY:
            result = UNARY[op](*values)
        elif op in BINARY:
            result = BINARY[op](*values)
        else:
            return None
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return result if isinstance(result, int | float) and math.isfinite(result) else None
