"""The forward kernels of a cell's Triton module that are parallel in time: tile Newton, and segments.

Tile: all steps of a tile in registers. Newton's update δ_t = J_t δ_{t−1} + f(h_{t−1}, x_t) − h_t is one associative
scan, repeated until the largest update is under the tolerance, at most as often as the tile has steps. Rounding or a
wild iterate may have left a tile unsettled by then; it is finished by sweeps h ← f(shift h, x), of which k make the
first k steps those of the plain loop, bit for bit.

Segments (multiple shooting): pieces of time are walked side by side from guessed entries s_p, with y_p the state at the
end of a piece and M_p the product of its Jacobians. Joining them, s'_{p+1} = y_p + M_p (s'_p − s_p), is a Newton step
on the entries. A piece whose entry moved is walked again, until it meets the trajectory it has stored. The first walk
takes M_p = 0 and saves the Jacobians, which a cell that forgets never needs; what does not meet gets them with the
second. After a fixed
number of rounds one program a batch row and block of channels goes through the pieces in order and walks again each
whose entry is not the state at the end of the piece before: so the result is exact however many rounds were enough.
"""

from __future__ import annotations

from .triton_template import SIZES, STEPS, Names, assign, function, place, returns, state_rows


def compose(names: Names) -> str:
    """The combine function of the scan over affine maps."""
    size, offsets = range(len(names.state)), [f"d_{name}" for name in names.state]
    every = [*names.product, *offsets]
    lines = []
    for i, j in names.pairs:
        lines.append(f"    {names.entry('m', i, j)} = {names.sum_of_products('last_m', 'first_m', i, j)}")
    for i in size:
        entries = [(names.entry("last_m", i, k), names.state[k]) for k in size]
        terms = [f"{entry} * first_d_{name}" for entry, name in entries if entry]
        lines.append(f"    {offsets[i]} = {' + '.join(terms)} + last_{offsets[i]}")
    return function(
        "compose",
        [*(f"first_{name}" for name in every), *(f"last_{name}" for name in every)],
        "Two affine maps as one: the first, then the last.",
        [*lines, *returns(every)],
    )


def previous(names: Names) -> str:
    """The states before those of a tile."""
    lines = ["    row = tl.arange(0, TILE)[:, None]"]
    lines += [f"    back = tl.broadcast_to(tl.maximum(row - 1, 0), {names.state[0]}.shape)"]
    for h in names.state:
        lines.append(f"    {h} = tl.where(row == 0, {h}_entry[None, :], tl.gather({h}, back, 0))")
    lines += ["    if HAS_RESET:", *(f"        {h} = tl.where(cut, 0.0, {h})" for h in names.state)]
    return function(
        "previous",
        [*names.state, *(f"{h}_entry" for h in names.state), "cut", "HAS_RESET: tl.constexpr", "TILE: tl.constexpr"],
        "The state before each step of a tile.",
        [*lines, *returns(names.state)],
    )


def _clamp(names: Names, name: str, h: str, indent: int) -> list[str]:
    """Into the cell's box; what is not finite passes, to be seen."""
    if h not in names.bounded:
        return []
    low = f"tl.where({name} < -{h}_bound, -{h}_bound, {name})"
    return [f"{' ' * indent}{name} = tl.where({name} > {h}_bound, {h}_bound, {low})"]


def tile_kernel(names: Names) -> str:
    """Tile Newton."""
    entries, new = [f"{h}_entry" for h in names.state], [f"next_{h}" for h in names.state]
    given = [*names.inputs, *names.params]
    before = [f"{h}_before" for h in names.state]
    shift = assign(before, "previous", [*names.state, *entries, "cut", "HAS_RESET", "TILE"], 12)
    lines = place(names, False, state_rows(names))
    lines += [
        f"    {entry} = tl.load({h}_first_ptr + here, mask=mask, other=0.0)" for h, entry in zip(names.state, entries)
    ]
    lines += [f"    {h}_bound = tl.load({h}_bound_ptr + here, mask=mask, other=0.0)" for h in names.bounded]
    lines += ["    row = tl.arange(0, TILE)[:, None]", "    most = 0", "    worst = 0.0"]
    lines += ["    for first in range(0, time, TILE):", "        t = tl.cast(first, tl.int64) + row"]
    lines += ["        inside = (t < time) & mask[None, :]"]
    rows = [f"{row}[None, :]" for row in names.row(names.inputs)]
    lines += assign(names.inputs, "load_inputs", [*rows, "t * x_stride_time", "inside", "COMPUTE"], 8)
    lines += ["        cut = False", "        if HAS_RESET:"]
    lines += ["            cut = tl.load(reset_row + t, mask=t < time, other=0) != 0"]
    lines += [f"        {h} = tl.zeros_like({names.inputs[0]})" for h in names.state]
    # the guess: f(0, x), bettered by sweeps
    lines += [*assign(new, "step", [*names.state, *given], 8)]
    lines += [f"        {h} = tl.where(finite(next_{h}), next_{h}, 0.0)" for h in names.state]
    for h in names.state:
        lines += _clamp(names, h, h, 8)
    if names.cell.picard:
        lines += [f"        for _ in range({names.cell.picard}):", *shift, *assign(new, "step", [*before, *given], 12)]
        lines += [f"            {h} = tl.where(finite(next_{h}), next_{h}, 0.0)" for h in names.state]
        for h in names.state:
            lines += _clamp(names, h, h, 12)
    lines += ["        iterations = 0", '        update = float("inf")']
    lines += ["        while (iterations < limit) & (update > tol):", *shift]
    lines += assign([*new, *names.jacobian], "linearised", [*before, *given], 12)
    lines += ["            if HAS_RESET:", *(f"                {j} = tl.where(cut, 0.0, {j})" for j in names.jacobian)]
    deltas = [f"d_{h}" for h in names.state]
    elements = [*names.jacobian, *(f"{n} - {h}" for n, h in zip(new, names.state, strict=True))]
    scanned = [*(f"_{m}" for m in names.product), *deltas]
    lines += assign(scanned, "tl.associative_scan", [f"({', '.join(elements)})", "0", "compose"], 12)
    lines += ["            update = 0.0"]
    for h, d, n in zip(names.state, deltas, new, strict=True):
        lines += [f"            {h} += {d}"]
        lines += [f"            update = tl.maximum(update, largest_update({h}, {d}, inside))"]
        lines += [f"            {h} = tl.where(finite({h}), {h}, tl.where(finite({n}), {n}, 0.0))"]
        lines += _clamp(names, h, h, 12)
    lines += [
        "            iterations += 1",
        "        sweeps = 0",
        "        while (sweeps < TILE) & (update > tol):",
        *shift,
    ]
    lines += [*assign(new, "step", [*before, *given], 12), "            update = 0.0"]
    for h, n in zip(names.state, new, strict=True):
        # the sum of changes is the last update if anything changes at all: a small change says nothing about the error
        lines += [f"            moved = relative_change({n}, {h}, inside)"]
        lines += ['            update = tl.where(moved > 0.0, float("inf"), update)', f"            {h} = {n}"]
    lines += ["            sweeps += 1"]
    lines += ["        most = tl.maximum(most, iterations + sweeps)"]
    lines += ["        worst = tl.maximum(worst, tl.where(sweeps < TILE, update, 0.0))"]
    for h, row in zip(names.state, names.row(names.state), strict=True):
        lines.append(f"        tl.store({row}[None, :] + t * channels, {h}.to({row}.dtype.element_ty), mask=inside)")
    lines += ["        last = tl.minimum(first + TILE, time) - 1 - first"]
    lines += [f"        {h}_entry = tl.sum(tl.where(row == last, {h}, 0.0), 0)" for h in names.state]
    lines += [f"    tl.store({h}_final_ptr + here, {h}_entry, mask=mask)" for h in names.state]
    lines += ["    tl.store(iterations_ptr + program, most)", "    tl.store(update_ptr + program, worst)"]
    pointers = [*names.ptr(names.inputs), *names.ptr(names.params), *names.ptr(names.state, "_first")]
    pointers += [*names.ptr(names.bounded, "_bound"), *names.ptr(names.state), *names.ptr(names.state, "_final")]
    return function(
        "tile_kernel",
        [
            *(
                *pointers,
                "reset_ptr",
                "iterations_ptr",
                "update_ptr",
                *SIZES,
                "x_stride_time",
                "tol",
                "limit",
                "HAS_RESET: tl.constexpr",
            ),
            *("COMPUTE: tl.constexpr", "TILE: tl.constexpr", "BLOCK: tl.constexpr"),
        ],
        "Newton's method, one tile of steps after the other, each solved in registers.",
        lines,
    )


def _walk(names: Names, again: bool, jacobian: bool, indent: int) -> list[str]:
    """A walk of one piece from its entry; leaves the state, the product m, `t` and `met`. again: until it meets the
    trajectory that is there, in shorter groups, as what it keeps besides takes registers."""
    pad = " " * indent
    lines = [f"{pad}{h} = {h}_entry" for h in names.state]
    first = f"{names.state[0]}_entry"
    products = [f"tl.zeros_like({first}) + {float(i == j)}" if jacobian else first for i, j in names.pairs]
    lines += [f"{pad}{m} = {value}" for m, value in zip(names.product, products, strict=True)]
    args = [*names.state, *names.product, *names.row(names.inputs), *names.params, *names.row(names.state)]
    args += [
        *names.row(names.state, "_check"),
        *("reset_row", "start", "stop", "mask", "tol", "X_STEP", "H_STEP"),
    ]
    args += ["HAS_RESET", "True", str(jacobian), str(again), "COMPUTE", "CHECK", *([] if again else ["False"])]
    products = names.product if jacobian else [f"_{m}" for m in names.product]
    return lines + assign([*names.state, *products, "t", "met"], "walk_again" if again else "walk_piece", args, indent)


def _tensors(names: Names) -> list[str]:
    """Pointers that the kernels of the segments share."""
    return [
        *(
            *names.ptr(names.inputs),
            *names.ptr(names.params),
            *names.ptr(names.state, "_first"),
            *names.ptr(names.state),
        ),
        *(
            *names.ptr(names.state, "_check"),
            "reset_ptr",
            *names.ptr(names.state, "_used"),
            *names.ptr(names.state, "_end"),
        ),
        *(f"{m}_ptr" for m in names.product),
    ]


def _check_rows(names: Names) -> list[str]:
    lines = []
    for h in names.state:
        lines.append(f"    {h}_check_row = {h}_check_ptr + batch * checks * channels + channel")
    return lines


def segments_kernel(names: Names) -> str:
    """All pieces walked side by side."""
    lines = place(names, True, state_rows(names)) + _check_rows(names)
    lines += ["    at = piece.to(tl.int64) * batches * channels + here", "    moved = 1.0"]
    lines += ["    if AGAIN:", "        moved = 0.0"]
    for h in names.state:
        lines += [f"        {h}_entry = tl.load({h}_entry_ptr + at, mask=mask, other=0.0)"]
        lines += [f"        {h}_used = tl.load({h}_used_ptr + at, mask=mask, other=0.0)"]
        lines += [f"        moved = tl.maximum(moved, relative_change({h}_entry, {h}_used, mask))"]
    lines += ["    else:"]
    lines += [
        f"        {h}_entry = tl.load({h}_first_ptr + here, mask=mask & (piece == 0), other=0.0)" for h in names.state
    ]
    lines += ["    if moved > tol:"]
    lines += [f"        tl.store({h}_used_ptr + at, {h}_entry, mask=mask)" for h in names.state]
    lines += ["        if AGAIN:", *_walk(names, True, True, 12), "            if met == 0:"]
    lines += [f"                tl.store({h}_end_ptr + at, {h}, mask=mask)" for h in names.state]
    lines += [f"                tl.store({m}_ptr + at, {m}, mask=mask)" for m in names.product]
    lines += ["            walked = tl.load(walked_ptr + program) + (t - start).to(tl.int32)"]
    lines += ["            tl.store(walked_ptr + program, walked)"]
    lines += ["            tl.store(rounds_ptr + program, tl.load(rounds_ptr + program) + 1)"]
    lines += ["        else:", *_walk(names, False, False, 12)]
    lines += [f"            tl.store({h}_end_ptr + at, {h}, mask=mask)" for h in names.state]
    return function(
        "segments_kernel",
        [
            *(*_tensors(names), *names.ptr(names.state, "_entry"), "walked_ptr", "rounds_ptr", "batches", "length"),
            *(
                "checks",
                *SIZES,
                "tol",
                *STEPS,
                "AGAIN: tl.constexpr",
                "HAS_RESET: tl.constexpr",
                "COMPUTE: tl.constexpr",
            ),
            *("CHECK: tl.constexpr", "BLOCK: tl.constexpr"),
        ],
        "Walks every piece whose entry moved; the first time all, from the initial state and from zero.",
        lines,
    )


def segments_join_kernel(names: Names) -> str:
    """Newton's step on the entries."""
    size = range(len(names.state))
    lines = [
        "    blocks = tl.cdiv(channels, BLOCK)",
        "    program = tl.program_id(0)",
        "    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)",
        "    mask = channel < channels",
        "    batch = (program // blocks).to(tl.int64)",
        "    here = batch * channels + channel",
    ]
    lines += [f"    {h} = tl.load({h}_first_ptr + here, mask=mask, other=0.0)" for h in names.state]
    lines += [f"    {h}_bound = tl.load({h}_bound_ptr + here, mask=mask, other=0.0)" for h in names.bounded]
    lines += ["    for piece in range(0, pieces):", "        at = tl.cast(piece, tl.int64) * batches * channels + here"]
    for h in names.state:
        lines += [f"        tl.store({h}_entry_ptr + at, {h}, mask=mask)"]
        lines += [f"        d_{h} = {h} - tl.load({h}_used_ptr + at, mask=mask, other=0.0)"]
    lines += [f"        {m} = tl.load({m}_ptr + at, mask=mask, other=0.0)" for m in names.product]
    for i in size:
        h = names.state[i]
        terms = [f"{names.entry('m', i, k)} * d_{names.state[k]}" for k in size if names.entry("m", i, k)]
        lines += [f"        {h}_end = tl.load({h}_end_ptr + at, mask=mask, other=0.0)"]
        lines += [f"        step_{h} = {' + '.join(terms)}"]
        lines += [f"        {h} = {h}_end + tl.where(finite(step_{h}), step_{h}, 0.0)"]
        lines += _clamp(names, h, h, 8)
    pointers = [
        *names.ptr(names.state, "_first"),
        *names.ptr(names.bounded, "_bound"),
        *names.ptr(names.state, "_used"),
    ]
    pointers += [
        *names.ptr(names.state, "_end"),
        *(f"{m}_ptr" for m in names.product),
        *names.ptr(names.state, "_entry"),
    ]
    return function(
        "segments_join_kernel",
        [*pointers, "pieces", "batches", "channels", "BLOCK: tl.constexpr"],
        "The entries of the pieces from the first to the last: s'_{p+1} = y_p + M_p (s'_p - s_p).",
        lines,
    )


def segments_finish_kernel(names: Names) -> str:
    """What is left, in order."""
    lines = place(names, False, state_rows(names)) + _check_rows(names)
    lines += [f"    {h}_entry = tl.load({h}_first_ptr + here, mask=mask, other=0.0)" for h in names.state]
    lines += ["    walked = 0", "    pieces_walked = 0", "    worst = 0.0", "    for piece in range(0, pieces):"]
    lines += ["        start = piece * length", "        stop = tl.minimum(start + length, time)"]
    lines += ["        at = tl.cast(piece, tl.int64) * batches * channels + here", "        moved = 0.0"]
    for h in names.state:
        lines += [f"        {h}_used = tl.load({h}_used_ptr + at, mask=mask, other=0.0)"]
        lines += [f"        moved = tl.maximum(moved, relative_change({h}_entry, {h}_used, mask))"]
    end = [f"            {h}_end = tl.load({h}_end_ptr + at, mask=mask, other=0.0)" for h in names.state]
    lines += ["        if moved > tol:", *_walk(names, True, False, 12), *end]
    lines += [f"            {h}_end = tl.where(met == 0, {h}, {h}_end)" for h in names.state]
    lines += ["            walked += (t - start).to(tl.int32)", "            pieces_walked += 1"]
    lines += ["        else:", *end, "            worst = tl.maximum(worst, moved)"]
    lines += [f"        {h}_entry = {h}_end" for h in names.state]
    lines += [f"    tl.store({h}_final_ptr + here, {h}_entry, mask=mask)" for h in names.state]
    lines += [
        "    tl.store(last_walked_ptr + program, walked)",
        "    tl.store(last_rounds_ptr + program, pieces_walked)",
    ]
    lines += ["    tl.store(update_ptr + program, worst)"]
    return function(
        "segments_finish_kernel",
        [
            *(*_tensors(names), *names.ptr(names.state, "_final"), "last_walked_ptr", "last_rounds_ptr", "update_ptr"),
            *("pieces", "batches", "length", "checks", *SIZES, "tol", *STEPS, "HAS_RESET: tl.constexpr"),
            *("COMPUTE: tl.constexpr", "CHECK: tl.constexpr", "BLOCK: tl.constexpr"),
        ],
        "Goes through the pieces in order and walks again each that did not start where the one before ends.",
        lines,
    )


def parallel(names: Names) -> list[str]:
    """All functions of the forward methods that are parallel in time, in order."""
    make = (compose, previous, tile_kernel, segments_kernel, segments_join_kernel, segments_finish_kernel)
    return [one(names) for one in make]
