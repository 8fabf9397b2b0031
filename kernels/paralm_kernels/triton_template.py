"""The parts of a cell's Triton module: functions that advance, linearise and pull back one step, and forward kernels.

Triton has no lists of tensors, so what runs over the cell's components is written out here, under the cell's own names;
what does not (elementwise functions, comparisons, compensated sums) is in triton_math.py. `Names` says which names a
module uses; each function below returns the text of one function of it. triton_backward.py has the backward kernels.

Layouts: inputs and states (batch, time, channel); what belongs to pieces of time (piece, batch, channel).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .derive import Derived, cotangent_name, jacobian_name, next_name
from .graph import Graph
from .triton_code import identifiers, statements

_AHEAD, _LONG = 48, 60
"""Numbers that a walk has on their way while it computes with as many before them; half of it where a step has more
operations than _LONG, which hide the loads by themselves."""
WIDTH = 120
_PLAIN = ("time", "batches", "pieces", "length", "checks")
"""Arguments that Triton would compile for anew where they are one or a multiple of 16."""


class Names:
    """The identifiers of one cell's module, in the order of the cell's names."""

    def __init__(self, derived: Derived) -> None:
        self.derived, self.cell = derived, derived.cell
        self.of = identifiers(derived)
        self.state = [self.of[name] for name in self.cell.state]
        self.inputs = [self.of[name] for name in self.cell.inputs]
        self.params = [self.of[name] for name in self.cell.params]
        self.bounded = [self.of[name] for name in derived.bounded]
        size = range(len(self.state))
        self.pairs = [(i, i) for i in size] if derived.diagonal else [(i, j) for i in size for j in size]
        self.unroll = group(_AHEAD, len(self.inputs), derived.linearised)
        self.jacobian = self.matrix("j")
        self.product = self.matrix("m")

    def matrix(self, prefix: str) -> list[str]:
        """Names of the S×S entries, or of the diagonal."""
        return [f"{prefix}_{self.state[i]}_{self.state[j]}" for i, j in self.pairs]

    def entry(self, prefix: str, i: int, j: int) -> str | None:
        """The name of one entry; None where it is outside the diagonal that is kept."""
        return f"{prefix}_{self.state[i]}_{self.state[j]}" if (i, j) in self.pairs else None

    def zero(self, i: int, j: int) -> bool:
        """Whether the Jacobian's entry is zero whatever the state."""
        rows = self.cell.state
        node = self.derived.jacobian.outputs[jacobian_name(rows[i], rows[j])]
        return node.is_const and node.value == 0.0

    def ptr(self, names: Iterable[str], what: str = "") -> list[str]:
        return [f"{name}{what}_ptr" for name in names]

    def row(self, names: Iterable[str], what: str = "") -> list[str]:
        return [f"{name}{what}_row" for name in names]

    def sum_of_products(self, first: str, second: str, i: int, j: int, sparse: str = "") -> str:
        """Σ_k first_ik second_kj, without the entries that are always zero in the matrix named `sparse`."""
        terms = []
        for k in range(len(self.state)):
            a, b = self.entry(first, i, k), self.entry(second, k, j)
            if a and b and not (sparse == first and self.zero(i, k)) and not (sparse == second and self.zero(k, j)):
                terms.append(f"{a} * {b}")
        return " + ".join(terms) or "0.0"


def group(ahead: int, loads: int, graph: Graph) -> int:
    """Steps whose `loads` numbers a step are fetched together: a power of two, from 2 to 16.

    A warp has six counters to wait for what is on its way, so what is waited for must have been asked for before what
    comes next is: first all numbers of a group are taken over, then the next group's are asked for, then the group is
    computed with.
    """
    fit = ahead // max(1, loads) // (2 if len(graph.nodes) > _LONG else 1)
    return max(2, min(16, 1 << max(0, fit.bit_length() - 1)))


def wrapped(items: Sequence[str], indent: int) -> list[str]:
    """The items with commas, as many a line as fit."""
    lines, pad = [""], " " * indent
    for item in items:
        if lines[-1] and len(pad) + len(lines[-1]) + len(item) + 2 > WIDTH:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{item},"
    return [pad + line for line in lines]


def bracket(head: str, args: Sequence[str], tail: str, indent: int = 0) -> list[str]:
    """`head(args)tail`, on one line or the arguments on lines of their own."""
    pad = " " * indent
    line = f"{pad}{head}({', '.join(args)}){tail}"
    return [line] if len(line) <= WIDTH else [f"{pad}{head}(", *wrapped(args, indent + 4), f"{pad}){tail}"]


def assign(targets: Sequence[str], function: str, args: Sequence[str], indent: int = 4) -> list[str]:
    """`targets = function(args)`; many targets in parentheses."""
    pad, left = " " * indent, ", ".join(targets)
    if len(left) + indent < WIDTH - 30:
        return bracket(f"{left} = {function}", args, "", indent)
    return [f"{pad}(", *wrapped(targets, indent + 4), *bracket(f") = {function}", args, "", indent)]


def function(name: str, args: Sequence[str], doc: str, body: Iterable[str]) -> str:
    """The text of one jitted function. A kernel is not compiled again for another batch or length."""
    plain = [arg for arg in args if arg in _PLAIN and name.endswith("_kernel")]
    jit = f"@triton.jit(do_not_specialize=[{', '.join(map(repr, plain))}])" if plain else "@triton.jit"
    return "\n".join([jit.replace("'", '"'), *bracket(f"def {name}", args, ":"), f'    """{doc}"""', *body, ""])


def returns(values: Sequence[str]) -> list[str]:
    line = f"    return {', '.join(values)}"
    return [line] if len(line) <= WIDTH else ["    return (", *wrapped(values, 8), "    )"]


def plus(text: str, number: int) -> str:
    return f"{text} {'-' if number < 0 else '+'} {abs(number)}" if number else text


def elementwise(names: Names) -> list[str]:
    """step, linearised and pullback: the cell's graphs."""
    derived, cell = names.derived, names.cell
    given = [*names.state, *names.inputs, *names.params]
    like = names.state[0]
    new = [f"next_{name}" for name in names.state]
    steps = list(zip(new, (derived.step.outputs[next_name(name)] for name in cell.state), strict=True))
    entries = [derived.jacobian.outputs[name] for name in derived.jacobian_names]
    both = [*steps, *zip(names.jacobian, entries, strict=True)]
    cotangents = [f"grad_{name}" for name in names.state]
    every = [*zip(cell.state, names.state), *zip(cell.inputs, names.inputs), *zip(cell.params, names.params)]
    grads = [(f"to_{own}", derived.pullback.outputs[cotangent_name(name)]) for name, own in every]
    of = {**names.of, **{cotangent_name(name): f"grad_{own}" for name, own in names.of.items()}}

    def text(name: str, doc: str, args: Sequence[str], outputs: list, graph: object) -> str:
        lines = statements(derived, outputs, of, like)
        return function(
            name, args, doc, [*(f"    {line}" for line in lines), *returns([output for output, _ in outputs])]
        )

    return [
        text("step", "h_t = step(h_{t-1}, x_t; p).", given, steps, derived.step),
        text("linearised", "The next state, and its Jacobian by the state before.", given, both, derived.linearised),
        text(
            "pullback",
            "From the cotangents of the next state: those of the state before, of inputs and of params.",
            [*given, *cotangents],
            grads,
            derived.pullback,
        ),
    ]


def loads(names: Names) -> list[str]:
    """load_inputs and load_params."""
    rows = names.row(names.inputs)
    lines = [
        f"    {x} = tl.load({row} + offset, mask=mask, other=0.0).to(COMPUTE)"
        for x, row in zip(names.inputs, rows, strict=True)
    ]
    text = [
        function(
            "load_inputs",
            [*rows, "offset", "mask", "COMPUTE: tl.constexpr"],
            "The inputs at an offset, in the compute dtype.",
            [*lines, *returns(names.inputs)],
        )
    ]
    if names.params:
        pointers = names.ptr(names.params)
        lines = [
            f"    {a} = tl.load({pointer} + channel, mask=mask, other=0.0)"
            for a, pointer in zip(names.params, pointers, strict=True)
        ]
        text.append(
            function(
                "load_params",
                [*pointers, "channel", "mask"],
                "The parameters of some channels.",
                [*lines, *returns(names.params)],
            )
        )
    return text


def call_load_params(names: Names) -> list[str]:
    if not names.params:
        return []
    return assign(names.params, "load_params", [*names.ptr(names.params), "channel", "mask"])


def advance(names: Names) -> str:
    """One step of a walk."""
    rows = names.row(names.state)
    lines = [f"    {x} = {x}.to(COMPUTE)" for x in names.inputs]
    lines += ["    if HAS_RESET:", *(f"        {h} = tl.where(cut, 0.0, {h})" for h in names.state)]
    new = [f"next_{h}" for h in names.state]
    given = [*names.state, *names.inputs, *names.params]
    lines += ["    if JACOBIAN:", *assign([*new, *names.jacobian], "linearised", given, 8)]
    for i, j in names.pairs:
        product = names.sum_of_products("j", "m", i, j, sparse="j")
        lines.append(f"        new_{names.entry('m', i, j)} = {product}")
    lines += ["        if HAS_RESET:"]
    lines += [f"            new_{m} = tl.where(cut, 0.0, new_{m})" for m in names.product]
    lines += [f"        {m} = tl.zeros_like({m}) + new_{m}" for m in names.product]
    lines += ["    else:", *assign(new, "step", given, 8)]
    for h, row in zip(names.state, rows, strict=True):
        lines.append(f"    tl.store({row} + to, next_{h}.to({row}.dtype.element_ty), mask=mask)")
    return function(
        "advance",
        [
            *(*names.state, *names.product, *names.inputs, *names.params, "cut", *rows, "to", "mask"),
            *("HAS_RESET: tl.constexpr", "JACOBIAN: tl.constexpr", "COMPUTE: tl.constexpr"),
        ],
        "One step of a walk: the state after it, which is stored, and the product of Jacobians.",
        [*lines, *returns([*new, *names.product])],
    )


def keep(names: Names) -> str:
    """What a walk of a piece does every CHECK steps."""
    checks = names.row(names.state, "_check")
    lines = ["    met = 0", "    if MEET:", "        moved = 0.0"]
    for h, row in zip(names.state, checks, strict=True):
        lines += [f"        old = tl.load({row} + here, mask=mask, other=0.0)"]
        lines += [f"        moved = tl.maximum(moved, relative_change({h}, old, mask))"]
    lines += ["        met = (moved <= tol).to(tl.int32)"]
    for h, row in zip(names.state, checks, strict=True):
        lines += [f"    tl.store({row} + here, {h}, mask=mask & (met == 0))"]
    return function(
        "keep",
        [*names.state, *checks, "here", "mask", "tol", "MEET: tl.constexpr"],
        "Keeps the state in full precision, unless it has met the one that is kept.",
        [*lines, "    return met"],
    )


def walk_piece(names: Names, name: str, unroll: int) -> str:
    """A walk over some steps, which are fetched in groups of `unroll`.

    NVIDIA's compiler moves the loads of the next group behind most steps of this one, where they come too late (in
    sm_90's code of ParaGRU 13 of 16). Many warps hide that from each other. For FEW the steps wait for a maximum over
    the threads, which no load passes; that takes registers (of ParaGRU 141, not 107).
    """
    carried = [*names.state, *names.product]
    x_rows, rows, checks = names.row(names.inputs), names.row(names.state), names.row(names.state, "_check")

    def load(u: int, offset: str, mask: str, indent: int, suffix: str = "") -> list[str]:
        pad = " " * indent
        pairs = zip(names.inputs, x_rows, strict=True)
        return [f"{pad}{x}{suffix} = tl.load({row}{offset}, mask={mask}, other=0.0)" for x, row in pairs]

    def step(inputs: Sequence[str], cut: str, to: str) -> list[str]:
        args = [*carried, *inputs, *names.params, cut, *rows, to, "mask"]
        return assign(carried, "advance", [*args, "HAS_RESET", "JACOBIAN", "COMPUTE"], 8)

    def further(steps: int) -> list[str]:
        lines = [f"        t += {steps}"]
        lines += [f"        {row} += {times(steps, 'X_STEP')}" for row in x_rows]
        lines += [f"        {row} += {times(steps, 'H_STEP')}" for row in rows]
        lines += ["        if PIECES:", "            edge = ((t - start) % CHECK == 0) | (t >= stop)"]
        lines += ["            if edge:", "                here = tl.cast((t - 1) // CHECK, tl.int64) * H_STEP"]
        return lines + assign(["met"], "keep", [*names.state, *checks, "here", "mask", "tol", "MEET"], 16)

    lines = [f"    whole = start + (stop - start) // {unroll} * {unroll}", "    some = mask & (start < whole)"]
    lines += [f"    {row} += tl.cast(start, tl.int64) * X_STEP" for row in x_rows]
    lines += [f"    {row} += tl.cast(start, tl.int64) * H_STEP" for row in rows]
    lines += ["    cuts = 0"]
    for u in range(unroll):
        lines += load(u, f" + {times(u, 'X_STEP')}" if u else "", "some", 4, f"_{u}")
        lines += [f"    cuts = with_flag(cuts, {u}, reset_row, {plus('start', u)}, start < whole, HAS_RESET)"]
    lines += ["    t = start", "    met = 0", "    while (t < whole) & (met == 0):"]
    lines += [f"        more = t + {unroll} < whole", "        some = mask & more"]
    for u in range(unroll):
        lines += [f"        now_{x}_{u} = {x}_{u}.to(COMPUTE)" for x in names.inputs]
    lines += ["        now_cuts, cuts = cuts, 0"]
    for u in range(unroll):
        lines += load(u, f" + {times(unroll + u, 'X_STEP')}", "some", 8, f"_{u}")
        lines += [f"        cuts = with_flag(cuts, {u}, reset_row, t + {unroll + u}, more, HAS_RESET)"]
    if name == "walk_piece":
        lines += ["        if FEW:", "            alive = tl.max((mask & (t >= start)).to(tl.int32), 0) > 0  # always"]
        lines += [f"            {state} = tl.where(alive, {state}, 0.0)" for state in names.state]
    for u in range(unroll):
        lines += step([f"now_{x}_{u}" for x in names.inputs], f"flag_of(now_cuts, {u})", times(u, "H_STEP"))
    lines += further(unroll)
    lines += ["    while (t < stop) & (met == 0):", *load(0, "", "mask", 8)]
    lines += ["        cut = flag_at(reset_row, t, t < stop, HAS_RESET)", *step(names.inputs, "cut", "0"), *further(1)]
    return function(
        name,
        [
            *(*carried, *x_rows, *names.params, *rows, *checks, "reset_row", "start", "stop", "mask", "tol"),
            *("X_STEP: tl.constexpr", "H_STEP: tl.constexpr", "HAS_RESET: tl.constexpr", "PIECES: tl.constexpr"),
            *("JACOBIAN: tl.constexpr", "MEET: tl.constexpr", "COMPUTE: tl.constexpr", "CHECK: tl.constexpr"),
            *(["FEW: tl.constexpr"] if name == "walk_piece" else []),
        ],
        "Walks from start to stop, with MEET until the state meets the stored one. With PIECES it keeps a checkpoint\n"
        "    every CHECK steps (start is a multiple of that), with JACOBIAN the product of Jacobians.",
        [*lines, *returns([*carried, "t", "met"])],
    )


def times(steps: int, stride: str) -> str:
    return {0: "0", 1: stride}.get(steps, f"{steps} * {stride}")


def place(
    names: Names, pieces: bool, rows: Sequence[tuple[str, str]] = (), stride: str = "time * channels"
) -> list[str]:
    """Which program this is, its channels, its rows of the tensors that run over time, and its parameters."""
    lines = [
        "    blocks = tl.cdiv(channels, BLOCK)",
        "    program = tl.program_id(0)",
        "    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)",
        "    mask = channel < channels",
    ]
    if pieces:
        lines += [
            "    batch = (program // blocks % batches).to(tl.int64)",
            "    piece = program // blocks // batches",
            "    start = piece * length",
            "    stop = tl.minimum(start + length, time)",
        ]
    else:
        lines += ["    batch = (program // blocks).to(tl.int64)"]
    lines += ["    here = batch * channels + channel", "    reset_row = reset_ptr + batch * time"]
    for x in names.inputs:
        lines.append(f"    {x}_row = {x}_ptr + batch * x_stride_batch + channel")
    for row, pointer in rows:
        lines.append(f"    {row} = {pointer} + batch * {stride} + channel")
    return [*lines, *call_load_params(names)]


def state_rows(names: Names, what: str = "") -> list[tuple[str, str]]:
    return list(zip(names.row(names.state, what), names.ptr(names.state, what), strict=True))


SIZES = ["time", "channels", "x_stride_batch"]
STEPS = ["X_STEP: tl.constexpr", "H_STEP: tl.constexpr"]
"""Elements from a step to the next, of inputs and of states: known when a kernel is compiled, they become part of the
instructions that load and store."""


def walk_kernel(names: Names) -> str:
    """The whole sequence in one walk."""
    rows = names.row(names.state)
    lines = place(names, False, state_rows(names))
    lines += [f"    {h} = tl.load({h}_first_ptr + here, mask=mask, other=0.0)" for h in names.state]
    walked = [
        *(
            *names.state,
            *(names.state[0] for _ in names.product),
            *names.row(names.inputs),
            *names.params,
            *rows,
            *rows,
        ),
        *("reset_row", "0", "time", "mask", "0.0", "X_STEP", "H_STEP", "HAS_RESET", "False", "False", "False"),
        *("COMPUTE", "1", "FEW"),
    ]
    lines += assign([*names.state, *(f"_{m}" for m in names.product), "_t", "_met"], "walk_piece", walked)
    lines += [f"    tl.store({h}_final_ptr + here, {h}, mask=mask)" for h in names.state]
    pointers = [*names.ptr(names.inputs), *names.ptr(names.params), *names.ptr(names.state, "_first")]
    pointers += [*names.ptr(names.state), *names.ptr(names.state, "_final"), "reset_ptr"]
    return function(
        "walk_kernel",
        [*pointers, *SIZES, *STEPS, *(f"{name}: tl.constexpr" for name in ("HAS_RESET", "COMPUTE", "BLOCK", "FEW"))],
        "The sequential walk: one program a batch row and block of channels, the state in registers.",
        lines,
    )


def decode_kernel(names: Names) -> str:
    """One step."""
    lines = [
        "    blocks = tl.cdiv(channels, BLOCK)",
        "    program = tl.program_id(0)",
        "    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)",
        "    mask = channel < channels",
        "    batch = (program // blocks).to(tl.int64)",
        "    here = batch * channels + channel",
        *call_load_params(names),
    ]
    lines += assign(
        names.inputs, "load_inputs", [*names.ptr(names.inputs), "batch * x_stride_batch + channel", "mask", "COMPUTE"]
    )
    lines += [f"    {h} = tl.load({h}_first_ptr + here, mask=mask, other=0.0)" for h in names.state]
    new = [f"next_{h}" for h in names.state]
    lines += assign(new, "step", [*names.state, *names.inputs, *names.params])
    lines += [f"    tl.store({h}_final_ptr + here, next_{h}, mask=mask)" for h in names.state]
    pointers = [*names.ptr(names.inputs), *names.ptr(names.params)]
    pointers += [*names.ptr(names.state, "_first"), *names.ptr(names.state, "_final")]
    return function(
        "decode_kernel",
        [*pointers, "channels", "x_stride_batch", "COMPUTE: tl.constexpr", "BLOCK: tl.constexpr"],
        "One step, state to state, for generation.",
        lines,
    )
