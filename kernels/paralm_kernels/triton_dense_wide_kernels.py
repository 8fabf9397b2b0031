# mypy: ignore-errors
"""The dense recurrences of large heads in Triton: a head's R in slices of columns, each on one multiprocessor's chip.

A program has a head, some rows of the batch and BLOCK_N of the d_head columns, with all their gates. It loads its slice
of R once (triton_dense_slices.py) and keeps the rest of its columns' state to itself; what a step needs of the others
is h (backward: the gradients of the rows, δ), exchanged through memory that all programs see, two copies taken in
turns:

    wait for the step before     read h_{t−1} of all columns · R of these     the cell     write h_t of these     arrive

One barrier a step is enough. A program writes into the copy that was read one step ago only after it has seen all
others arrive, and they arrived after that reading. `wait` and `arrive` are atomics on one counter for each head and
block of rows; all its programs must be on the device together (a cooperative launch). Without WAIT a launch has one
step, and its end is the barrier: nothing else differs, since all that passes from step to step is in memory at its
ends.
"""

import triton
import triton.language as tl

from .triton_dense_cells import cut_state, factors, four_of, hidden, pull, store_four
from .triton_dense_slices import arrive, biases, over_warps, products, row_limit, slices, wait
from .triton_math import sigmoid, tanh


@triton.jit(do_not_specialize=["time", "batches", "heads", "group", "start", "stop"])
def wide_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    reset_ptr,
    y_ptr,
    kept_ptr,
    state_ptr,
    exchange_ptr,
    count_ptr,
    time,
    batches,
    heads,
    group,
    start,
    stop,
    KIND: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    KEEP: tl.constexpr,
    WAIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGE: tl.constexpr,
    HELD: tl.constexpr,
):
    """Steps start to stop of x (batch, time, gate, head, d_head); y (batch, time, head, d_head); bias (row, head,
    d_head) in its public order; reset bytes (batch, time), one where there are none; kept (state, head, time, batch,
    d_head), written with KEEP. state (state, head, batch, d_head) is the one before and becomes the one after. exchange
    (2, head, batch, d_head) in the dtype of the products: h before step t is in copy t modulo 2. count: zeros, 32 whole
    numbers for each head and block of rows; they are numbered with the head innermost, and the launch begins with
    number `group`."""
    pair = group + tl.program_id(1)
    head = pair % heads
    rows = (pair // heads) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < batches) & (columns[None, :] < D)
    four: tl.constexpr = KIND == "lstm" or KIND == "slstm"
    GATES: tl.constexpr = 4 if four else (3 if KIND == "gru" else 1)
    COMPONENTS: tl.constexpr = 4 if KIND == "slstm" else (2 if KIND == "lstm" else 1)

    one_gate = heads * D
    one_step = one_gate * GATES
    x_at = x_ptr + start.to(tl.int64) * one_step + head * D
    y_at = y_ptr + start.to(tl.int64) * one_gate + head * D
    x_tile = rows[:, None].to(tl.int64) * time * one_step + columns[None, :]
    y_tile = rows[:, None].to(tl.int64) * time * one_gate + columns[None, :]
    tile = rows[:, None] * D + columns[None, :]  # in (batch, d_head)
    step = batches.to(tl.int64) * D
    size = heads * step  # of one component of a state
    state_at = state_ptr + head * step
    exchange_at = exchange_ptr + head * step
    kept_at = kept_ptr + (head.to(tl.int64) * time + start) * step
    reset_at = reset_ptr + rows.to(tl.int64) * time
    count_at = count_ptr + pair * 32

    EACH: tl.constexpr = CHUNKS * BLOCK_K + HELD * 16
    r = slices(weight_ptr, head, heads, columns, D, GATES, 0, BLOCK_K, CHUNKS, SPLIT, EACH)
    if HELD:
        held = slices(weight_ptr, head, heads, columns, D, GATES, CHUNKS * BLOCK_K, 16, HELD, SPLIT, EACH)
    limit = row_limit(reset_ptr, rows, batches, HELD)
    nothing = tl.zeros((SPLIT, BLOCK_B, BLOCK_N), COMPUTE)
    b0, b1, b2, b3 = biases(bias_ptr + head * D, columns, heads, D, COMPUTE, GATES, HAS_BIAS)
    h, c, n, m = four_of(state_at + tile, size, inside, COMPONENTS)
    x0, x1, x2, x3 = four_of(x_at + x_tile, one_gate, inside, GATES)
    cut = (rows < 0)[:, None]
    for t in range(start, stop):
        if HAS_RESET:
            cut = (tl.load(reset_at + t, mask=rows < batches, other=0) != 0)[:, None]
            h, c, n, m = cut_state(cut, h, c, n, m, -float("inf"), KIND)
        if WAIT:
            wait(count_at, (t - start) * tl.num_programs(0))
        read_at = exchange_at + (t % 2) * size
        a0, a1, a2, a3 = products(
            nothing, nothing, nothing, nothing, read_at, 0, r, rows, limit, cut, D, GATES, 1, HAS_RESET,
            COMPUTE, DOT, PRECISION, 0, BLOCK_K, CHUNKS, SPLIT, EACH, STAGE,
        )  # fmt: skip
        if HELD:
            a0, a1, a2, a3 = products(
                a0, a1, a2, a3, read_at, 0, held, rows, limit, cut, D, GATES, 1, HAS_RESET,
                COMPUTE, DOT, PRECISION, CHUNKS * BLOCK_K, 16, HELD, SPLIT, EACH, HELD,
            )  # fmt: skip
        a0, a1, a2, a3 = over_warps(a0, a1, a2, a3, GATES, PRECISION)
        a0 += x0.to(COMPUTE) + b0
        if KIND == "elman":
            h = tanh(a0)
        elif KIND == "gru":
            z = sigmoid(a1 + (x1.to(COMPUTE) + b1))
            candidate = tanh(x2.to(COMPUTE) + b2 + sigmoid(a0) * (a2 + b3))
            h = candidate + z * (h - candidate)
        else:
            forget, write, n, m = factors(a0, a1 + (x1.to(COMPUTE) + b1), n, m, KIND)
            c = forget * c + write * tanh(a2 + (x2.to(COMPUTE) + b2))
            h = hidden(sigmoid(a3 + (x3.to(COMPUTE) + b3)), c, n, KIND)
        tl.store(exchange_at + ((t + 1) % 2) * size + tile, h.to(DOT), mask=inside)
        if WAIT:
            arrive(count_at)
        # What nobody waits for, and the next inputs, while the others arrive.
        tl.store(y_at + y_tile, h.to(y_ptr.dtype.element_ty), mask=inside)
        if KEEP:
            store_four(kept_at + tile, size * time, h, c, n, m, inside, COMPONENTS)
        x_at += one_step
        y_at += one_gate
        kept_at += step
        x0, x1, x2, x3 = four_of(x_at + x_tile, one_gate, inside & (t + 1 < stop), GATES)
    store_four(state_at + tile, size, h, c, n, m, inside, COMPONENTS)


@triton.jit(do_not_specialize=["time", "batches", "heads", "whole", "first", "group", "start", "stop"])
def wide_backward_kernel(
    rows_ptr,
    before0_ptr,
    before1_ptr,
    before2_ptr,
    weight_ptr,
    reset_ptr,
    came_ptr,
    grads_ptr,
    exchange_ptr,
    count_ptr,
    time,
    batches,
    heads,
    whole,
    first,
    group,
    start,
    stop,
    KIND: tl.constexpr,
    D: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_CAME: tl.constexpr,
    WAIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGE: tl.constexpr,
    HELD: tl.constexpr,
):
    """The steps of a piece from its last, number 0, to its first, number time − 1, and what is left when those are
    done, number `time`: numbers start to stop. Arguments as of triton_dense_kernels.backward_kernel, whose start is
    here `first`; but weight is (gate, head, in, out), resets are one byte where there are none, and grads, the
    gradients of the state after the piece, become those of the state before it. In between, that of h is without what
    comes through the recurrent product: the gradients δ of the rows before number j are in copy j modulo 2 of exchange
    (2, row, head, batch, d_head), in the dtype of the products, zeros before 0."""
    pair = group + tl.program_id(1)
    head = pair % heads
    rows = (pair // heads) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < batches) & (columns[None, :] < D)
    four: tl.constexpr = KIND == "lstm" or KIND == "slstm"
    ROWS: tl.constexpr = 1 if KIND == "elman" else 4
    PRODUCTS: tl.constexpr = 4 if four else (3 if KIND == "gru" else 1)
    COMPONENTS: tl.constexpr = 4 if KIND == "slstm" else (2 if KIND == "lstm" else 1)

    step = batches.to(tl.int64) * D
    size = heads * step
    tile = rows[:, None] * D + columns[None, :]
    here = (head.to(tl.int64) * time + time - 1 - start) * step
    one_step = heads * D
    rows_at = rows_ptr + here * ROWS
    rows_tile = rows[:, None] * ROWS * D + columns[None, :]
    before0_at, before1_at = before0_ptr + here, before1_ptr + here
    before2_at = before2_ptr + here
    came_at = came_ptr + (first + time - 1 - start).to(tl.int64) * one_step + head * D
    came_tile = rows[:, None].to(tl.int64) * whole * one_step + columns[None, :]
    grads_at = grads_ptr + head * step
    exchange_at = exchange_ptr + head * step
    reset_at = reset_ptr + rows.to(tl.int64) * whole + first
    count_at = count_ptr + pair * 32

    EACH: tl.constexpr = CHUNKS * BLOCK_K + HELD * 16
    r = slices(weight_ptr, head, heads, columns, D, PRODUCTS, 0, BLOCK_K, CHUNKS, SPLIT, EACH)
    if HELD:
        held = slices(weight_ptr, head, heads, columns, D, PRODUCTS, CHUNKS * BLOCK_K, 16, HELD, SPLIT, EACH)
    limit = row_limit(reset_ptr, rows, batches, HELD)
    nothing = tl.zeros((SPLIT, BLOCK_B, BLOCK_N), COMPUTE)
    zero = tl.zeros((BLOCK_B, BLOCK_N), COMPUTE)
    # Not by four_of, with which sLSTM of 2048 columns spills on sm_90.
    gh = tl.load(grads_at + tile, mask=inside, other=0.0)
    gc, gn, gm = zero, zero, zero
    if four:
        gc = tl.load(grads_at + size + tile, mask=inside, other=0.0)
    if KIND == "slstm":
        gn = tl.load(grads_at + 2 * size + tile, mask=inside, other=0.0)
        gm = tl.load(grads_at + 3 * size + tile, mask=inside, other=0.0)
    live = inside & (start < time)
    row0, row1, row2, row3 = four_of(rows_at + rows_tile, D, live, ROWS)
    before0, before1, before2, came = zero, zero, zero, zero
    if KIND != "elman":
        before0 = tl.load(before0_at + tile, mask=live, other=0.0)
    if KIND == "slstm":
        before1 = tl.load(before1_at + tile, mask=live, other=0.0)
        before2 = tl.load(before2_at + tile, mask=live, other=0.0)
    if HAS_CAME:
        came = tl.load(came_at + came_tile, mask=live, other=0.0).to(COMPUTE)
    for back in range(start, stop):
        live = inside & (back < time)
        if WAIT:
            wait(count_at, (back - start) * tl.num_programs(0))
        read_at = exchange_at + (back % 2) * (size * PRODUCTS)
        a0, a1, a2, a3 = products(
            nothing, nothing, nothing, nothing, read_at, size, r, rows, limit, live, D, PRODUCTS, PRODUCTS, False,
            COMPUTE, DOT, PRECISION, 0, BLOCK_K, CHUNKS, SPLIT, EACH, STAGE,
        )  # fmt: skip
        if HELD:
            a0, a1, a2, a3 = products(
                a0, a1, a2, a3, read_at, size, held, rows, limit, live, D, PRODUCTS, PRODUCTS, False,
                COMPUTE, DOT, PRECISION, CHUNKS * BLOCK_K, 16, HELD, SPLIT, EACH, HELD * PRODUCTS,
            )  # fmt: skip
        if PRODUCTS > 1:
            a0 += a1 + a2
        if PRODUCTS > 3:
            a0 += a3
        gh += tl.sum(a0, 0)
        if HAS_RESET:
            mask = (rows < batches) & (back > 0)
            cut = (tl.load(reset_at + (time - back), mask=mask, other=0) != 0)[:, None]
            gh, gc, gn, gm = cut_state(cut, gh, gc, gn, gm, 0.0, KIND)
        to0, to1, to2, to3, direct, to_c, to_n, to_m = pull(
            gh + came, gc, gn, gm, row0, row1, row2, row3, before0, before1, before2, KIND
        )
        delta_at = exchange_at + ((back + 1) % 2) * (size * PRODUCTS) + tile
        store_four(delta_at, size, to0, to1, to2, to3, live, PRODUCTS)
        if WAIT:
            arrive(count_at)
        store_four(rows_at + rows_tile, D, to0, to1, to2, to3, live, ROWS)
        gh = tl.where(live, direct, gh)
        gc, gn, gm = tl.where(live, to_c, gc), tl.where(live, to_n, gn), tl.where(live, to_m, gm)
        rows_at -= step * ROWS
        before0_at -= step
        before1_at -= step
        before2_at -= step
        came_at -= one_step
        ahead = inside & (back + 1 < time)
        row0, row1, row2, row3 = four_of(rows_at + rows_tile, D, ahead, ROWS)
        if KIND != "elman":
            before0 = tl.load(before0_at + tile, mask=ahead, other=0.0)
        if KIND == "slstm":
            before1 = tl.load(before1_at + tile, mask=ahead, other=0.0)
            before2 = tl.load(before2_at + tile, mask=ahead, other=0.0)
        if HAS_CAME:
            came = tl.load(came_at + came_tile, mask=ahead, other=0.0).to(COMPUTE)
    store_four(grads_at + tile, size, gh, gc, gn, gm, inside, COMPONENTS)
