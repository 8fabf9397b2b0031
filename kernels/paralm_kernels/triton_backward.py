"""The backward kernels of a cell's Triton module: a reverse walk, and what lets pieces of time walk side by side.

    c_t = J_tᵀ (g_t + c_{t+1})        ∂x_t = (∂f/∂x_t)ᵀ (g_t + c_{t+1})        ∂p = Σ_t (∂f/∂p)ᵀ (g_t + c_{t+1})

is linear in c, the cotangent of the state before a step. So a piece of time is one affine map from the carry that comes
in at its end to the one that goes out at its start. The map is built from the piece's first step on: once the
product of Jacobians is negligible what lies further on cannot be seen from the start, and a cell that forgets reads
little twice. The maps join from the last piece to the first; then all pieces walk back from their true carry.
"""

from __future__ import annotations

from .triton_template import SIZES, STEPS, Names, assign, function, group, place, plus, returns, state_rows, times

_AHEAD = 40
"""As for the walk forward."""


def unroll(names: Names) -> int:
    return group(_AHEAD, len(names.inputs) + 2 * len(names.state), names.derived.pullback)


def load_step(names: Names) -> str:
    """Everything a backward step reads."""
    g_rows, g = [f"g_{h}_row" for h in names.state], [f"g_{h}" for h in names.state]
    lines = []
    for x, row in zip(names.inputs, names.row(names.inputs), strict=True):
        lines.append(f"    {x} = tl.load({row} + x_at, mask=mask, other=0.0)")
    for h, row in zip(names.state, names.row(names.state), strict=True):
        lines.append(f"    {h} = tl.load({row} + at - H_STEP, mask=before, other=0.0)")
    for h, row, name in zip(names.state, g_rows, g, strict=True):
        lines += [f"    {name} = tl.zeros_like({h})", f"    if HAS_{name.upper()}:"]
        lines += [f"        {name} = tl.load({row} + at, mask=mask, other=0.0)"]
    return function(
        "load_step",
        [
            *(*names.row(names.inputs), *names.row(names.state), *g_rows, "x_at", "at", "mask", "before"),
            *("H_STEP: tl.constexpr", *flags(names)),
        ],
        "Inputs, the state before the step, and cotangents of the state, as they are stored.",
        [*lines, *returns([*names.inputs, *names.state, *g])],
    )


def widen(names: Names) -> str:
    """What was loaded, ready to compute with."""
    g = [f"g_{h}" for h in names.state]
    every = [*names.inputs, *names.state, *g]
    lines = [f"    {name} = {name}.to(COMPUTE)" for name in every]
    lines += ["    if FIRST:", *(f"        {h} = tl.where(t > 0, {h}, {h}_first)" for h in names.state)]
    lines += ["    if HAS_RESET:", *(f"        {h} = tl.where(cut, 0.0, {h})" for h in names.state)]
    return function(
        "widen",
        [
            *(*every, "cut", *(f"{h}_first" for h in names.state), "t"),
            *("FIRST: tl.constexpr", "HAS_RESET: tl.constexpr", "COMPUTE: tl.constexpr"),
        ],
        "In the compute dtype, the state before the step zero after a reset. FIRST: the step may be the first.",
        [*lines, *returns(every)],
    )


def flags(names: Names, typed: bool = True) -> list[str]:
    """Which cotangents of the states there are."""
    return [f"HAS_G_{h.upper()}{': tl.constexpr' if typed else ''}" for h in names.state]


def _accumulators(names: Names) -> list[str]:
    return [name for a in names.params for name in (f"sum_{a}", f"lost_{a}")]


def retreat(names: Names) -> str:
    """One step of a backward walk."""
    g, carries = [f"g_{h}" for h in names.state], [f"carry_{h}" for h in names.state]
    loaded, every = [*names.inputs, *names.state, *g], [*names.state, *names.inputs, *names.params]
    lines = []
    grads = [f"to_{name}" for name in every]
    arguments = [*every, *(f"{name} + {carry}" for name, carry in zip(g, carries, strict=True))]
    lines += assign(grads, "pullback", arguments)
    rows = [f"to_{x}_row" for x in names.inputs]
    for x, row in zip(names.inputs, rows, strict=True):
        lines.append(f"    tl.store({row} + at, to_{x}.to({row}.dtype.element_ty), mask=mask)")
    lines += ["    if HAS_RESET:", *(f"        to_{h} = tl.where(cut, 0.0, to_{h})" for h in names.state)]
    return function(
        "retreat",
        [
            *(*carries, *loaded, "cut", *names.params, *rows, "at", "mask", "HAS_RESET: tl.constexpr"),
        ],
        "One step back: stores the gradients of the inputs; the carry before it, and what the params' get from it.",
        [*lines, *returns([*(f"to_{h}" for h in names.state), *(f"to_{a}" for a in names.params)])],
    )


def _loaded(names: Names, suffix: str = "") -> list[str]:
    return [f"{name}{suffix}" for name in [*names.inputs, *names.state, *(f"g_{h}" for h in names.state)]]


def _call_load(names: Names, suffix: str, back: int, mask: str, before: str, indent: int) -> list[str]:
    """Loads the step that is `back` steps before the one the rows point to; after it where `back` is negative."""
    sign, steps = ("-" if back > 0 else ""), abs(back)
    args = [*names.row(names.inputs), *names.row(names.state), *(f"g_{h}_row" for h in names.state)]
    args += [f"{sign}{times(steps, 'X_STEP')}" if back else "0", f"{sign}{times(steps, 'H_STEP')}" if back else "0"]
    return assign(_loaded(names, suffix), "load_step", [*args, mask, before, "H_STEP", *flags(names, False)], indent)


def _rows(names: Names, more: list[tuple[str, str]]) -> list[str]:
    rows = [*state_rows(names), *((f"g_{h}_row", f"g_{h}_ptr") for h in names.state), *more]
    lines = place(names, True, rows)
    return lines + [f"    {h}_first = tl.load({h}_first_ptr + here, mask=mask, other=0.0)" for h in names.state]


def _pointers(names: Names) -> list[str]:
    return [
        *(*names.ptr(names.inputs), *names.ptr(names.params), *names.ptr(names.state, "_first")),
        *(*names.ptr(names.state), *(f"g_{h}_ptr" for h in names.state), "reset_ptr"),
    ]


def _options(names: Names) -> list[str]:
    return ["batches", "length", *SIZES, *STEPS, *flags(names), "HAS_RESET: tl.constexpr", "COMPUTE: tl.constexpr"]


def _to(names: Names, where: str) -> list[str]:
    """The rows moved to a step."""
    own = [*names.row(names.state), *(f"g_{h}_row" for h in names.state)]
    lines = [f"    {row} += tl.cast({where}, tl.int64) * X_STEP" for row in names.row(names.inputs)]
    return lines + [f"    {row} += tl.cast({where}, tl.int64) * H_STEP" for row in own]


def backward_kernel(names: Names) -> str:
    """The pieces walked back."""
    carries, steps = [f"carry_{h}" for h in names.state], unroll(names)
    to_rows, firsts = [f"to_{x}_row" for x in names.inputs], [f"{h}_first" for h in names.state]
    own = [*names.row(names.state), *(f"g_{h}_row" for h in names.state), *to_rows]
    parts = [f"to_{a}" for a in names.params]

    def ready(suffix: str, cut: str, t: str, first: bool) -> list[str]:
        args = [*_loaded(names, suffix), cut, *firsts, t, str(first), "HAS_RESET", "COMPUTE"]
        return assign([f"now_{name}" for name in _loaded(names, suffix)], "widen", args, 8)

    def step(suffix: str, cut: str, at: str) -> list[str]:
        now = [*(f"now_{name}" for name in _loaded(names, suffix)), cut]
        args = [*carries, *now, *names.params, *to_rows, at, "mask", "HAS_RESET"]
        return assign([*carries, *parts], "retreat", args, 8)

    def back(count: int) -> list[str]:
        lines = [f"        {row} -= {times(count, 'X_STEP')}" for row in names.row(names.inputs)]
        return [*lines, *(f"        {row} -= {times(count, 'H_STEP')}" for row in own), f"        t -= {count}"]

    def add(values: str) -> list[str]:
        return [f"        sum_{a}, lost_{a} = add_compensated(sum_{a}, lost_{a}, {values}{a})" for a in names.params]

    lines = _rows(names, [(f"to_{x}_row", f"to_{x}_ptr") for x in names.inputs])
    lines += ["    at = piece.to(tl.int64) * batches * channels + here"]
    lines += [f"    {carry} = tl.load({carry}_ptr + at, mask=mask, other=0.0)" for carry in carries]
    lines += [f"    {name} = tl.zeros_like({carries[0]})" for name in _accumulators(names)]
    lines += [f"    whole = stop - (stop - start) // {steps} * {steps}", "    some = mask & (whole < stop)"]
    lines += [*_to(names, "stop - 1"), *(f"    {row} += tl.cast(stop - 1, tl.int64) * H_STEP" for row in to_rows)]
    lines += ["    cuts = 0"]
    for u in range(steps):
        # of a group only its last step can be the sequence's first
        before = f"some & (stop > {u + 1})" if u == steps - 1 else "some"
        lines += _call_load(names, f"_{u}", u, "some", before, 4)
        lines += [f"    cuts = with_flag(cuts, {u}, reset_row, {plus('stop', -u - 1)}, whole < stop, HAS_RESET)"]
    lines += ["    t = stop - 1", "    while t >= whole:"]
    lines += [f"        more = t - {steps} >= whole", "        some = mask & more"]
    for u in range(steps):
        lines += ready(f"_{u}", f"flag_of(cuts, {u})", plus("t", -u), u == steps - 1)
    lines += ["        now_cuts, cuts = cuts, 0"]
    for u in range(steps):
        before = f"some & (t > {steps + u})" if u == steps - 1 else "some"
        lines += _call_load(names, f"_{u}", steps + u, "some", before, 8)
        lines += [f"        cuts = with_flag(cuts, {u}, reset_row, t - {steps + u}, more, HAS_RESET)"]
    for u in range(steps):
        lines += step(f"_{u}", f"flag_of(now_cuts, {u})", f"-{times(u, 'H_STEP')}" if u else "0")
        lines += [f"        part_{a} = {f'part_{a} + ' if u else ''}to_{a}" for a in names.params]
    lines += [*add("part_"), *back(steps), "    while t >= start:"]
    lines += _call_load(names, "", 0, "mask", "mask & (t > 0)", 8)
    lines += [
        "        cut = flag_at(reset_row, t, t >= start, HAS_RESET)",
        *ready("", "cut", "t", True),
        *step("", "cut", "0"),
    ]
    lines += [*add("to_"), *back(1)]
    lines += [f"    tl.store(to_{a}_ptr + at, sum_{a}, mask=mask)" for a in names.params]
    lines += [f"    tl.store(to_{h}_first_ptr + here, carry_{h}, mask=mask & (piece == 0))" for h in names.state]
    pointers = [*_pointers(names), *(f"{carry}_ptr" for carry in carries), *(f"to_{x}_ptr" for x in names.inputs)]
    pointers += [*(f"to_{a}_ptr" for a in names.params), *(f"to_{h}_first_ptr" for h in names.state)]
    return function(
        "backward_kernel",
        [*pointers, *_options(names), "BLOCK: tl.constexpr"],
        "Walks every piece back from its carry; the sums over its steps of the params' gradients go to its own row.",
        lines,
    )


def backward_maps_kernel(names: Names) -> str:
    """The affine map of each piece."""
    size, steps = range(len(names.state)), unroll(names)
    firsts = [f"{h}_first" for h in names.state]
    lines = _rows(names, [])
    for i, j in names.pairs:
        lines.append(f"    {names.entry('m', i, j)} = tl.zeros_like({names.state[0]}_first) + {float(i == j)}")
    lines += [f"    d_{h} = tl.zeros_like({h}_first)" for h in names.state]
    lines += _to(names, "start")
    for u in range(steps):
        there = f"mask & ({plus('start', u)} < stop)"
        lines += _call_load(names, f"_{u}", -u, there, there if u else "mask & (start > 0)", 4)
        lines += [f"    cut_{u} = flag_at(reset_row, {plus('start', u)}, {plus('start', u)} < stop, HAS_RESET)"]
    lines += ["    t = start", "    inside = 1.0", "    while (t < stop) & (inside > TINY):"]
    for u in range(steps):
        now = plus("t", u)
        args = [*_loaded(names, f"_{u}"), f"cut_{u}", *firsts, now, str(u == 0), "HAS_RESET", "COMPUTE"]
        lines += assign(_loaded(names), "widen", args, 8)
        ahead = f"t + {steps + u} < stop"
        lines += _call_load(names, f"_{u}", -steps - u, f"mask & ({ahead})", f"mask & ({ahead})", 8)
        given = [*names.state, *names.inputs, *names.params]
        lines += assign([*(f"_next_{h}" for h in names.state), *names.jacobian], "linearised", given, 8)
        # the map so far after Jᵀ: new = m · Jᵀ
        for i, j in names.pairs:
            terms = [
                f"{names.entry('m', i, k)} * {names.entry('j', j, k)}"
                for k in size
                if names.entry("m", i, k) and names.entry("j", j, k) and not names.zero(j, k)
            ]
            lines.append(f"        new_{names.entry('m', i, j)} = {' + '.join(terms) or '0.0'}")
        for i, j in names.pairs:
            m = names.entry("m", i, j)
            lines += [f"        if HAS_RESET:\n            new_{m} = tl.where(cut_{u}, 0.0, new_{m})"]
            lines += [f"        {m} = tl.where({now} < stop, new_{m}, {m})"]
        for i in size:
            for k in size:
                if names.entry("m", i, k):
                    h = names.state[i]
                    lines.append(f"        d_{h} += {names.entry('m', i, k)} * g_{names.state[k]}")
        lines += [f"        cut_{u} = flag_at(reset_row, t + {steps + u}, {ahead}, HAS_RESET)"]
    lines += ["        inside = 0.0"]
    lines += [f"        inside = tl.maximum(inside, largest_size({m}, mask))" for m in names.product]
    lines += [f"        {row} += {times(steps, 'X_STEP')}" for row in names.row(names.inputs)]
    own = [*names.row(names.state), *(f"g_{h}_row" for h in names.state)]
    lines += [*(f"        {row} += {times(steps, 'H_STEP')}" for row in own), f"        t += {steps}"]
    lines += ["    at = piece.to(tl.int64) * batches * channels + here"]
    results = [*names.product, *(f"d_{h}" for h in names.state)]
    lines += [f"    tl.store({name}_ptr + at, {name}, mask=mask)" for name in results]
    lines += ["    tl.store(steps_ptr + program, (tl.minimum(t, stop) - start).to(tl.int32))"]
    return function(
        "backward_maps_kernel",
        [
            *(*_pointers(names), *(f"{name}_ptr" for name in results), "steps_ptr", *_options(names)),
            *("TINY: tl.constexpr", "BLOCK: tl.constexpr"),
        ],
        "The map from the carry at a piece's end to that at its start, read until the rest cannot be seen.",
        lines,
    )


def backward_join_kernel(names: Names) -> str:
    """The carries of the pieces, last to first."""
    size, carries = range(len(names.state)), [f"carry_{h}" for h in names.state]
    lines = [
        "    blocks = tl.cdiv(channels, BLOCK)",
        "    program = tl.program_id(0)",
        "    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)",
        "    mask = channel < channels",
        "    batch = (program // blocks).to(tl.int64)",
        "    here = batch * channels + channel",
    ]
    lines += [
        f"    {carry} = tl.load(g_{h}_final_ptr + here, mask=mask, other=0.0)" for h, carry in zip(names.state, carries)
    ]
    lines += ["    for back in range(0, pieces):"]
    lines += ["        at = (tl.cast(pieces - 1, tl.int64) - back) * batches * channels + here"]
    lines += [f"        tl.store({carry}_ptr + at, {carry}, mask=mask)" for carry in carries]
    results = [*names.product, *(f"d_{h}" for h in names.state)]
    lines += [f"        {name} = tl.load({name}_ptr + at, mask=mask, other=0.0)" for name in results]
    for i in size:
        terms = [f"{names.entry('m', i, k)} * {carries[k]}" for k in size if names.entry("m", i, k)]
        lines.append(f"        new_{carries[i]} = {' + '.join(terms)} + d_{names.state[i]}")
    lines += [f"        {carry} = new_{carry}" for carry in carries]
    return function(
        "backward_join_kernel",
        [
            *(*(f"{name}_ptr" for name in results), *(f"g_{h}_final_ptr" for h in names.state)),
            *(*(f"{carry}_ptr" for carry in carries), "pieces", "batches", "channels", "BLOCK: tl.constexpr"),
        ],
        "The carry at the end of every piece, from the last piece to the first.",
        lines,
    )


def backward(names: Names) -> list[str]:
    """All functions of the backward pass, in order."""
    make = (load_step, widen, retreat, backward_kernel, backward_maps_kernel, backward_join_kernel)
    return [one(names) for one in make]
