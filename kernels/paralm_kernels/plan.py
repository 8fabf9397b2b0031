"""From a graph to a list of torch calls: what is computed once, what is fused, and which buffer holds what.

Values that depend on constants and parameters only are computed ahead of the loop over time or space. A product that
is only added to something becomes one addcmul. A buffer is free again after the last read of its value, and may then
hold the result of that very read (elementwise operations allow it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .graph import Node, ancestors, python_number

_CALLS = {"div": "torch.true_divide"}
_BACKWARD = ("sigmoid_backward", "tanh_backward")


@dataclass(frozen=True)
class Instruction:
    """One torch call that computes `value`."""

    value: Node
    function: str
    operands: tuple[Node, ...]
    options: str = ""


class Plan:
    """Instructions for some outputs, in phases that run one after the other.

    `text` maps a node's index to the expression that names its value in the generated code.
    """

    def __init__(self, phases: Sequence[Iterable[Node]], fixed_inputs: Iterable[str]) -> None:
        self.outputs = [tuple(phase) for phase in phases]
        every = ancestors(node for phase in self.outputs for node in phase)
        self.text = {node.index: node.name for node in every if node.op == "input"}
        self.fixed = _fixed(every, set(fixed_inputs))
        self._ahead = [node for node in every if node.index in self.fixed and node.op != "input"]
        for node in self._ahead:
            self.text[node.index] = f"_{'k' if node.is_const else 'p'}{node.index}"
        uses = self._uses(every)
        done = self.fixed | {node.index for node in every if node.op == "input"}
        self.phases: list[list[Instruction]] = []
        for outputs in self.outputs:
            new = [node for node in ancestors(outputs) if node.index not in done]
            done = done | {node.index for node in new}
            self.phases.append(_fuse([Instruction(node, node.op, node.args) for node in new], uses))

    def _uses(self, every: Iterable[Node]) -> dict[int, int]:
        uses: dict[int, int] = {}
        for node in every:
            for arg in node.args:
                uses[arg.index] = uses.get(arg.index, 0) + 1
        for node in (node for outputs in self.outputs for node in outputs):
            uses[node.index] = uses.get(node.index, 0) + 2  # an output is never fused away
        return uses

    def prelude(self, like: str, phase: int = 0) -> list[str]:
        """Assignments of the constants (0-dimensional, in the dtype and on the device of `like`) and of the functions
        of parameters that a phase reads."""
        read = [operand for instruction in self.phases[phase] for operand in instruction.operands]
        needed = {node.index for node in ancestors((*read, *self.outputs[phase]))}
        lines = []
        for node in self._ahead:
            if node.index not in needed:
                continue
            value = f"_constant({python_number(node.value)}, {like})" if node.is_const else self.call(_plain(node))
            lines.append(f"{self.text[node.index]} = {value}")
        return lines

    def call(self, instruction: Instruction, out: str | None = None) -> str:
        """The text of a call; with `out` the variant that writes there."""
        backward = instruction.function in _BACKWARD
        if backward:
            function = f"aten.{instruction.function}" + (".grad_input" if out else "")
        else:
            function = _CALLS.get(instruction.function, f"torch.{instruction.function}")
        args = [self.text[operand.index] for operand in instruction.operands]
        args += [instruction.options] if instruction.options else []
        args += [f"{'grad_input' if backward else 'out'}={out}"] if out else []
        return f"{function}({', '.join(args)})"


def _plain(node: Node) -> Instruction:
    return Instruction(node, node.op, node.args)


def _fixed(every: Iterable[Node], names: set[str]) -> set[int]:
    fixed: set[int] = set()
    for node in every:
        known = node.is_const or (node.op == "input" and node.name in names)
        if known or (node.args and all(arg.index in fixed for arg in node.args)):
            fixed.add(node.index)
    return fixed


def _fuse(instructions: list[Instruction], uses: Mapping[int, int]) -> list[Instruction]:
    """a + b·c and a − b·c as one addcmul where the product has no other use."""
    here = {instruction.value.index for instruction in instructions}

    def product(node: Node) -> bool:
        return node.op == "mul" and uses[node.index] == 1 and node.index in here

    gone: set[int] = set()
    result = []
    for instruction in instructions:
        node = instruction.value
        if node.op in ("add", "sub"):
            first, second = node.args
            if product(second):
                options = "value=-1" if node.op == "sub" else ""
                instruction = Instruction(node, "addcmul", (first, *second.args), options)
                gone.add(second.index)
            elif node.op == "add" and product(first):
                instruction = Instruction(node, "addcmul", (second, *first.args))
                gone.add(first.index)
        result.append(instruction)
    return [instruction for instruction in result if instruction.value.index not in gone]


class Scratch:
    """Gives every value of a plan a buffer, phase by phase, and reuses buffers whose value is dead."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._free: dict[bool, list[str]] = {False: [], True: []}
        self._taken: set[str] = set()
        self.numbers = self.flags = 0
        self._last: dict[int, tuple[int, int]] = {}
        for phase, instructions in enumerate(plan.phases):
            for i, instruction in enumerate(instructions):
                for operand in instruction.operands:
                    self._last[operand.index] = (phase, i)

    @property
    def names(self) -> list[str]:
        """The scratch arguments of the generated function: numbers, then booleans."""
        return [f"_w{i}" for i in range(self.numbers)] + [f"_b{i}" for i in range(self.flags)]

    def lines(self, phase: int, places: Mapping[str, Node], sinks: Mapping[str, Node] | None = None) -> list[str]:
        """The calls of one phase.

        places: tensors of the caller that receive outputs. A value that a later phase still reads is computed in
        scratch and copied, since the caller may change its tensors between phases. sinks: statements, with {} for
        the value, that run as soon as the value is there.
        """
        lines: list[str] = []
        direct, copies = self._direct(phase, places)
        waiting = [(f"{place}.copy_({{}})", node) for place, node in copies]
        waiting += [item for item in (sinks or {}).items() if not _is_zero(item[1])]
        computed = {instruction.value.index for instruction in self._plan.phases[phase]}
        for statement, node in waiting:
            if node.index not in computed:
                lines.append(statement.format(self._plan.text[node.index]))
        for i, instruction in enumerate(self._plan.phases[phase]):
            node = instruction.value
            for operand in instruction.operands:
                if self._last[operand.index] == (phase, i):
                    self._release(operand)
            place = direct.get(node.index) or self._take(node.is_bool)
            lines.append(self._plan.call(instruction, place))
            self._plan.text[node.index] = place
            lines += [statement.format(place) for statement, value in waiting if value is node]
            if node.index not in self._last:
                self._release(node)
        return lines

    def _direct(self, phase: int, places: Mapping[str, Node]) -> tuple[dict[int, str], list[tuple[str, Node]]]:
        """Outputs computed in the caller's tensor, and those copied there from somewhere else."""
        computed = {instruction.value.index for instruction in self._plan.phases[phase]}
        direct: dict[int, str] = {}
        copies: list[tuple[str, Node]] = []
        for place, node in places.items():
            read_later = self._last.get(node.index, (phase, 0))[0] > phase
            if node.index in computed and node.index not in direct and not read_later:
                direct[node.index] = place
            else:
                copies.append((place, node))
        return direct, copies

    def _take(self, flag: bool) -> str:
        if self._free[flag]:
            return self._free[flag].pop()
        if flag:
            self.flags += 1
            name = f"_b{self.flags - 1}"
        else:
            self.numbers += 1
            name = f"_w{self.numbers - 1}"
        self._taken.add(name)
        return name

    def _release(self, node: Node) -> None:
        name = self._plan.text[node.index]
        if name in self._taken and name not in self._free[node.is_bool]:
            self._free[node.is_bool].append(name)


def _is_zero(node: Node) -> bool:
    return node.is_const and node.value == 0.0
