"""The backward kernels of a cell's Triton module: a reverse walk, and what lets pieces of time walk side by side.

    c_t = J_tᵀ (g_t + c_{t+1})        ∂x_t = (∂f/∂x_t)ᵀ (g_t + c_{t+1})        ∂p = Σ_t (∂f/∂p)ᵀ (g_t + c_{t+1})

is linear in c, the cotangent of the state before a step. So a piece of time is one affine map from the carry that comes
in at its end to the one that goes out at its start. The map is built from the piece's first step on: once the
product of Jacobians is negligible what lies further on cannot be seen from the start, and a cell that forgets reads
little twice. The maps join from the last piece to the first; then all pieces walk back from their true carry.
"""

from __future__ import annotations

from .triton_template import SIZES, Names, assign, function, move, place, plus, returns, state_rows

AHEAD = 2
"""Steps a backward walk computes while the values of as many earlier ones are on their way."""


def load_step(names: Names) -> str:
    """Everything a backward step reads."""
    g_rows, g = [f"g_{h}_row" for h in names.state], [f"g_{h}" for h in names.state]
    lines = ["    here = tl.cast(t, tl.int64) * channels"]
    lines += assign(
        names.inputs,
        "load_inputs",
        [*names.row(names.inputs), "tl.cast(t, tl.int64) * x_stride_time", "mask & valid", "COMPUTE"],
    )
    for h, row in zip(names.state, names.row(names.state), strict=True):
        lines.append(f"    {h} = tl.load({row} + here - channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)")
        lines.append(f"    {h} = tl.where(t > 0, {h}, {h}_first)")
    for h, row, name in zip(names.state, g_rows, g, strict=True):
        lines += [f"    {name} = tl.zeros_like({h})", f"    if HAS_{name.upper()}:"]
        lines += [f"        {name} = tl.load({row} + here, mask=mask & valid, other=0.0).to(COMPUTE)"]
    lines += ["    cut = flag_at(reset_row, t, valid, HAS_RESET)", "    if HAS_RESET:"]
    lines += [f"        {h} = tl.where(cut, 0.0, {h})" for h in names.state]
    return function(
        "load_step",
        [
            *(*names.row(names.inputs), *names.row(names.state), *(f"{h}_first" for h in names.state), *g_rows),
            *("reset_row", "t", "valid", "x_stride_time", "channels", "mask", *flags(names)),
            *("HAS_RESET: tl.constexpr", "COMPUTE: tl.constexpr"),
        ],
        "Inputs, the state before the step (zero after a reset), cotangents of the state, and whether a reset cuts.",
        [*lines, *returns([*names.inputs, *names.state, *g, "cut"])],
    )


def flags(names: Names, typed: bool = True) -> list[str]:
    """Which cotangents of the states there are."""
    return [f"HAS_G_{h.upper()}{': tl.constexpr' if typed else ''}" for h in names.state]


def _accumulators(names: Names) -> list[str]:
    return [name for a in names.params for name in (f"sum_{a}", f"lost_{a}")]


def retreat(names: Names) -> str:
    """One step of a backward walk."""
    g, carries = [f"g_{h}" for h in names.state], [f"carry_{h}" for h in names.state]
    every = [*names.state, *names.inputs, *names.params]
    lines = ["    here = tl.cast(t, tl.int64) * channels"]
    grads = [f"to_{name}" for name in every]
    arguments = [*every, *(f"{name} + {carry}" for name, carry in zip(g, carries, strict=True))]
    lines += assign(grads, "pullback", arguments)
    for x in names.inputs:
        row = f"to_{x}_row"
        lines.append(f"    tl.store({row} + here, to_{x}.to({row}.dtype.element_ty), mask=mask & valid)")
    for a in names.params:
        call = f"add_compensated(sum_{a}, lost_{a}, tl.where(valid, to_{a}, 0.0))"
        lines.append(f"    sum_{a}, lost_{a} = {call}")
    for h, carry in zip(names.state, carries, strict=True):
        lines += [f"    if HAS_RESET:\n        to_{h} = tl.where(cut, 0.0, to_{h})"]
        lines += [f"    {carry} = tl.where(valid, to_{h}, {carry})"]
    rows = [f"to_{x}_row" for x in names.inputs]
    return function(
        "retreat",
        [
            *(*carries, *_accumulators(names), *names.inputs, *names.state, *g, "cut", *names.params, *rows),
            *("t", "valid", "channels", "mask", "HAS_RESET: tl.constexpr"),
        ],
        "One step back: stores the gradients of the inputs, adds those of the params, returns the carry before it.",
        [*lines, *returns([*carries, *_accumulators(names)])],
    )


def _loaded(names: Names, suffix: str) -> list[str]:
    every = [*names.inputs, *names.state, *(f"g_{h}" for h in names.state), "cut"]
    return [f"{name}_{suffix}" for name in every]


def _call_load(names: Names, suffix: str, t: str, valid: str, indent: int) -> list[str]:
    args = [*names.row(names.inputs), *names.row(names.state), *(f"{h}_first" for h in names.state)]
    args += [*(f"g_{h}_row" for h in names.state), "reset_row", t, valid, "x_stride_time", "channels", "mask"]
    return assign(_loaded(names, suffix), "load_step", [*args, *flags(names, False), "HAS_RESET", "COMPUTE"], indent)


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
    return ["batches", "length", *SIZES, *flags(names), "HAS_RESET: tl.constexpr", "COMPUTE: tl.constexpr"]


def backward_kernel(names: Names) -> str:
    """The pieces walked back."""
    carries = [f"carry_{h}" for h in names.state]
    lines = _rows(names, [(f"to_{x}_row", f"to_{x}_ptr") for x in names.inputs])
    lines += ["    at = piece.to(tl.int64) * batches * channels + here"]
    lines += [f"    {carry} = tl.load({carry}_ptr + at, mask=mask, other=0.0)" for carry in carries]
    lines += [f"    {name} = tl.zeros_like({carries[0]})" for name in _accumulators(names)]
    for u in range(AHEAD):
        lines += _call_load(names, str(u), plus("stop", -u - 1), f"stop - {u + 1} >= start", 4)
    lines += ["    t = stop - 1", "    while t >= start:"]
    for u in range(AHEAD):
        lines += _call_load(names, f"ahead_{u}", f"t - {AHEAD + u}", f"t - {AHEAD + u} >= start", 8)
    for u in range(AHEAD):
        args = [*carries, *_accumulators(names), *_loaded(names, str(u)), *names.params]
        args += [
            *(f"to_{x}_row" for x in names.inputs),
            plus("t", -u),
            f"{plus('t', -u)} >= start",
            "channels",
            "mask",
            "HAS_RESET",
        ]
        lines += assign([*carries, *_accumulators(names)], "retreat", args, 8)
    for u in range(AHEAD):
        lines += move(_loaded(names, str(u)), _loaded(names, f"ahead_{u}"), 8)
    lines += [f"        t -= {AHEAD}"]
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
    size = range(len(names.state))
    lines = _rows(names, [])
    for i, j in names.pairs:
        lines.append(f"    {names.entry('m', i, j)} = tl.zeros_like({names.state[0]}_first) + {float(i == j)}")
    lines += [f"    d_{h} = tl.zeros_like({h}_first)" for h in names.state]
    lines += _call_load(names, "0", "start", "start < stop", 4)
    lines += ["    t = start", "    inside = 1.0", "    while (t < stop) & (inside > TINY):"]
    lines += _call_load(names, "ahead_0", "t + 1", "t + 1 < stop", 8)
    given = [*(f"{name}_0" for name in [*names.state, *names.inputs]), *names.params]
    lines += assign([*(f"_next_{h}" for h in names.state), *names.jacobian], "linearised", given, 8)
    # the map so far after Jᵀ: new = m · Jᵀ
    for i, j in names.pairs:
        terms = [
            f"{names.entry('m', i, k)} * {names.entry('j', j, k)}"
            for k in size
            if names.entry("m", i, k) and names.entry("j", j, k) and not names.zero(j, k)
        ]
        lines.append(f"        new_{names.entry('m', i, j)} = {' + '.join(terms) or '0.0'}")
    lines += ["        inside = 0.0"]
    for i, j in names.pairs:
        m = names.entry("m", i, j)
        lines += [f"        if HAS_RESET:\n            new_{m} = tl.where(cut_0, 0.0, new_{m})"]
        lines += [f"        {m} = tl.zeros_like({m}) + new_{m}"]
        lines += [f"        inside = tl.maximum(inside, largest_size({m}, mask))"]
    for i in size:
        for k in size:
            if names.entry("m", i, k):
                h = names.state[i]
                lines.append(f"        d_{h} += {names.entry('m', i, k)} * g_{names.state[k]}_0")
    lines += [*move(_loaded(names, "0"), _loaded(names, "ahead_0"), 8), "        t += 1"]
    lines += ["    at = piece.to(tl.int64) * batches * channels + here"]
    results = [*names.product, *(f"d_{h}" for h in names.state)]
    lines += [f"    tl.store({name}_ptr + at, {name}, mask=mask)" for name in results]
    lines += ["    tl.store(steps_ptr + program, (t - start).to(tl.int32))"]
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
    make = (load_step, retreat, backward_kernel, backward_maps_kernel, backward_join_kernel)
    return [one(names) for one in make]
