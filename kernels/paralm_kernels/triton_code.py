"""A cell's graphs as lines of Triton: the second emitter over the graphs that torch_code.py runs with PyTorch.

A value used once is written where it is used, any other gets a name, so the generated text reads like the cell.
Elementwise functions come from triton_math.py, which is the same on every device.
"""

from __future__ import annotations

import builtins
import keyword
import re
import struct
from collections.abc import Iterable, Mapping, Sequence

from .derive import Derived
from .errors import CellError
from .graph import Node, ancestors, python_number

_INFIX = {
    "add": ("+", 5),
    "sub": ("-", 5),
    "mul": ("*", 6),
    "div": ("/", 6),
    "gt": (">", 3),
    "ge": (">=", 3),
    "lt": ("<", 3),
    "le": ("<=", 3),
    "eq": ("==", 3),
    "ne": ("!=", 3),
    "logical_and": ("&", 2),
    "logical_or": ("|", 2),
}
"""Operators with their precedence: arithmetic as in Python; operands of comparisons at least sums, of & and | in
parentheses."""
_FUNCTIONS = (
    *("exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf", "sign"),
    *("maximum", "minimum"),
)
_OTHER = ("neg", "abs", "reciprocal", "pow", "where", "logical_not", "sigmoid_backward", "tanh_backward")
LOWERED = frozenset((*_INFIX, *_FUNCTIONS, *_OTHER))
"""The operations that have a form in Triton."""
_ATOM = 9
_WIDTH = 64

_USED = frozenset(
    [
        "add_compensated",
        "advance",
        "ahead",
        "alive",
        "at",
        "back",
        "batch",
        "batches",
        "before",
        "block",
        "blocks",
        "carry",
        "channel",
        "channel_blocks",
        "channels",
        "checks",
        "compose",
        "constant",
        "cut",
        "cuts",
        "edge",
        "entry",
        "finite",
        "first",
        "flag_at",
        "flag_of",
        "grid",
        "here",
        "inside",
        "iterations",
        "jacobian",
        "keep",
        "kept",
        "largest_size",
        "largest_update",
        "last",
        "length",
        "limit",
        "linearised",
        "load_inputs",
        "load_params",
        "load_step",
        "lost",
        "mask",
        "met",
        "more",
        "most",
        "moved",
        "new",
        "now_cuts",
        "offset",
        "old",
        "piece",
        "pieces",
        "pieces_walked",
        "power",
        "previous",
        "program",
        "pullback",
        "relative_change",
        "reset",
        "reset_row",
        "retreat",
        "rounds",
        "row",
        "rows",
        "some",
        "spread",
        "start",
        "step",
        "steps",
        "stop",
        "sweeps",
        "t",
        "there",
        "tile",
        "time",
        "tl",
        "to",
        "tol",
        "tolerance",
        "total",
        "triton",
        "update",
        "used",
        "valid",
        "walk_again",
        "walk_piece",
        "walked",
        "whole",
        "widen",
        "with_flag",
        "worst",
        "x_at",
    ]
)
_PREFIXES = (
    "g_",
    "d_",
    "m_",
    "j_",
    "carry_",
    "to_",
    "sum_",
    "lost_",
    "part_",
    "new_",
    "now_",
    "first_",
    "last_",
    "step_",
)
_SUFFIXES = re.compile(
    r"(_row|_ptr|_first|_used|_end|_entry|_check|_bound|_final|_before|_stride_batch|_stride_time|_kernel|_\d+)$"
)
"""What the text makes of a cell's names, and so must not be one: the state h has a carry_h and an h_row."""


def identifiers(derived: Derived) -> dict[str, str]:
    """The cell's names as they stand in generated Triton: themselves, or with _ or own_ where the text needs them."""
    cell = derived.cell
    taken = _USED | set(_FUNCTIONS) | set(keyword.kwlist) | {name.lower() for name in dir(builtins)}
    result: dict[str, str] = {}
    for name in (*cell.state, *cell.inputs, *cell.params):
        text = name.lower()  # flags and constants are in capitals
        if text.startswith(_PREFIXES) or re.fullmatch(r"v\d+", text):
            text = f"own_{text}"
        while text in taken or _SUFFIXES.search(text):
            text += "_"
        taken |= {text}
        result[name] = text
    return result


def statements(derived: Derived, outputs: Sequence[tuple[str, Node]], names: Mapping[str, str], like: str) -> list[str]:
    """Assignments that compute each (name, node) of `outputs`; `names` maps the graph's inputs to identifiers.

    like: an identifier that has the full shape; an output that does not depend on state or inputs is spread to it.
    Raises CellError for an operation without a form in Triton.
    """
    roots = [node for _, node in outputs]
    every = ancestors(roots)
    for node in every:
        if node.op not in ("input", "const") and node.op not in LOWERED:
            allowed = ", ".join(sorted(LOWERED))
            raise CellError(f"cell {derived.cell.name!r}: {node.op} has no form in Triton; allowed are: {allowed}")
    writer = _Writer(every, roots, names, like)
    lines = list(writer.lines)
    full = _depends(every, {*derived.cell.state, *derived.cell.inputs, *_cotangents(derived)})
    for name, node in outputs:
        text = writer.expression(node)
        lines.append(f"{name} = {text if node.index in full else f'spread({text}, {like})'}")
    return lines


def _cotangents(derived: Derived) -> list[str]:
    return [f"grad_{name}" for name in derived.cell.state]


def _depends(every: Iterable[Node], names: set[str]) -> set[int]:
    found: set[int] = set()
    for node in every:
        if (node.op == "input" and node.name in names) or any(arg.index in found for arg in node.args):
            found.add(node.index)
    return found


class _Writer:
    """Turns nodes into expressions; `lines` names the values that are used more than once."""

    def __init__(self, every: Sequence[Node], roots: Sequence[Node], names: Mapping[str, str], like: str) -> None:
        self.lines: list[str] = []
        self._names, self._like = names, like
        self._text: dict[int, tuple[str, int]] = {}
        uses: dict[int, int] = {}
        for node in every:
            for arg in node.args:
                uses[arg.index] = uses.get(arg.index, 0) + 1
            if node.op in ("sigmoid_backward", "tanh_backward"):
                uses[node.args[1].index] += 1  # their text has it twice
        for root in roots:
            uses[root.index] = uses.get(root.index, 0) + 1
        count = 0
        for node in every:
            text, level = self._write(node)
            simple = node.op in ("input", "const")
            if not simple and (uses[node.index] > 1 or len(text) > _WIDTH):
                self.lines.append(f"v{count} = {text}")
                text, level, count = f"v{count}", _ATOM, count + 1
            self._text[node.index] = (text, level)

    def expression(self, node: Node) -> str:
        return self._text[node.index][0]

    def _arg(self, node: Node, level: int) -> str:
        text, own = self._text[node.index]
        return f"({text})" if own < level else text

    def _full(self, node: Node, beside: Node | None = None) -> str:
        """An argument of a function: a number there has no dtype of its own, which does no harm `beside` a tensor if
        float32 holds it exactly."""
        if not node.is_const:
            return self._text[node.index][0]
        try:
            exact = struct.unpack("f", struct.pack("f", node.value))[0] == node.value
        except OverflowError:
            exact = False
        plain = exact and beside is not None and not beside.is_const
        text = python_number(node.value)
        return text if plain else f"constant({text}, {self._like})"

    def _write(self, node: Node) -> tuple[str, int]:
        op, args = node.op, node.args
        if op == "input":
            return self._names[node.name], _ATOM
        if op == "const":
            return python_number(node.value), 7 if node.value < 0 else _ATOM
        if op in _INFIX:
            sign, level = _INFIX[op]
            least = {2: 7, 3: 5}.get(level, level)
            left = self._full(args[0]) if args[0].is_const and args[1].is_const else self._arg(args[0], least)
            return f"{left} {sign} {self._arg(args[1], max(least, level + 1))}", level
        if op == "neg":
            return f"-{self._arg(args[0], 7)}", 7
        if op == "abs":
            return f"tl.abs({self._full(args[0])})", _ATOM
        if op == "reciprocal":
            return f"1.0 / {self._arg(args[0], 7)}", 6
        if op == "pow":
            return f"power({self._full(args[0])}, {args[1].value!r})", _ATOM
        if op == "where":
            condition, a, b = args
            return f"tl.where({self._text[condition.index][0]}, {self._full(a, b)}, {self._full(b, a)})", _ATOM
        if op == "logical_not":
            return f"~{self._arg(args[0], 8)}", 8
        if op == "sigmoid_backward":
            y = self._arg(args[1], 7)
            return f"{self._arg(args[0], 6)} * ({y} * (1.0 - {y}))", 6
        if op == "tanh_backward":
            y = self._arg(args[1], 7)
            return f"{self._arg(args[0], 6)} * (1.0 - {y} * {y})", 6
        return f"{op}({', '.join(self._full(arg) for arg in args)})", _ATOM
