# mypy: ignore-errors
"""The dense recurrences in Triton: one program for a head and some rows of the batch, R on the chip for all of time.

The cells are dense_cells.py's; what a step costs is a matrix product of at least 16 rows with R, whose tiles are loaded
once. Tensors inside are (head, time, batch, d_head), as in dense_torch.py, so that a tile of a step is one stretch of
memory. Steps' inputs are read one step ahead. The batch and d_head are padded: a column of padding has zero weights,
and its state stays finite; a row of padding is never stored.
"""

import triton
import triton.language as tl

from . import triton_math as tm
from .triton_dense_cells import cut_state, factors, four_of, hidden, product, pull, store_four


@triton.jit
def matrix(weight_ptr, gate, head, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """R of a gate and head, (out, in), or (in, out) TRANSPOSED; weight (gate, head, out, in)."""
    row, column = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (row < D) & (column < D)
    at = column * D + row if TRANSPOSED else row * D + column
    return tl.load(weight_ptr + (gate * heads + head).to(tl.int64) * D * D + at, mask=inside, other=0.0)


@triton.jit
def biased(x, bias_at, d, D: tl.constexpr, COMPUTE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """x in COMPUTE plus a row of the bias, read from the cache every time: kept, it would fill registers."""
    x = x.to(COMPUTE)
    if HAS_BIAS:
        x += tl.load(bias_at + d, mask=d < D, other=0.0)[None, :]
    return x


@triton.jit(do_not_specialize=["time", "batches", "heads"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    begin_ptr,
    reset_ptr,
    y_ptr,
    kept_ptr,
    time,
    batches,
    heads,
    KIND: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    KEEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x (batch, time, gate, head, d_head); y (batch, time, head, d_head); bias (row, head, d_head) in its public order;
    reset bytes (batch, time); begin (state, head, batch, d_head); kept (state, head, time, batch, d_head), or without
    KEEP one step's worth, which holds the last state."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < batches) & (d[None, :] < D)
    four: tl.constexpr = KIND == "lstm" or KIND == "slstm"

    # A tile is a pointer that moves and offsets that do not: pointers that all move would fill the registers.
    gates: tl.constexpr = 4 if four else (3 if KIND == "gru" else 1)
    components: tl.constexpr = 4 if KIND == "slstm" else (2 if KIND == "lstm" else 1)
    one_gate = heads * D
    one_step = one_gate * gates
    x_at = x_ptr + head * D
    y_at = y_ptr + head * D
    bias_at = bias_ptr + head * D
    x_tile = rows[:, None].to(tl.int64) * time * one_step + d[None, :]
    y_tile = rows[:, None].to(tl.int64) * time * one_gate + d[None, :]
    tile = rows[:, None] * D + d[None, :]  # in (batch, d_head)
    step = batches.to(tl.int64) * D
    size = heads * step  # of one component of a state
    begin_at = begin_ptr + head * step
    kept_steps = time if KEEP else 1
    kept_at = kept_ptr + head * step * kept_steps
    kept_size = size * kept_steps
    reset_at = reset_ptr + rows.to(tl.int64) * time

    r0 = matrix(weight_ptr, 0, head, heads, D, BLOCK_D, True)
    if KIND != "elman":
        r1 = matrix(weight_ptr, 1, head, heads, D, BLOCK_D, True)
        r2 = matrix(weight_ptr, 2, head, heads, D, BLOCK_D, True)
        if four:
            r3 = matrix(weight_ptr, 3, head, heads, D, BLOCK_D, True)
    zero = tl.zeros((BLOCK_B, BLOCK_D), COMPUTE)
    h, c, n, m = four_of(begin_at + tile, size, inside, components)

    next0, next1, next2, next3 = four_of(x_at + x_tile, one_gate, inside, gates)
    for t in range(time):
        x0, x1, x2, x3 = next0, next1, next2, next3
        x_at += one_step
        next0, next1, next2, next3 = four_of(x_at + x_tile, one_gate, inside & (t + 1 < time), gates)
        if HAS_RESET:
            cut = (tl.load(reset_at + t, mask=rows < batches, other=0) != 0)[:, None]
            h, c, n, m = cut_state(cut, h, c, n, m, -float("inf"), KIND)
        if KIND == "elman":
            h = tm.tanh(product(h, r0, biased(x0, bias_at, d, D, COMPUTE, HAS_BIAS), DOT, COMPUTE, PRECISION))
        elif KIND == "gru":
            r = tm.sigmoid(product(h, r0, biased(x0, bias_at, d, D, COMPUTE, HAS_BIAS), DOT, COMPUTE, PRECISION))
            z = tm.sigmoid(
                product(h, r1, biased(x1, bias_at + 1 * one_gate, d, D, COMPUTE, HAS_BIAS), DOT, COMPUTE, PRECISION)
            )
            candidate = tm.tanh(
                biased(x2, bias_at + 2 * one_gate, d, D, COMPUTE, HAS_BIAS)
                + r
                * product(h, r2, biased(zero, bias_at + 3 * one_gate, d, D, COMPUTE, HAS_BIAS), DOT, COMPUTE, PRECISION)
            )
            h = candidate + z * (h - candidate)
        else:
            # In the order in which they are used up: the fewer live at once, the fewer registers.
            f = product(h, r1, biased(x1, bias_at + 1 * one_gate, d, D, COMPUTE, HAS_BIAS), DOT, COMPUTE, PRECISION)
            i = product(h, r0, biased(x0, bias_at, d, D, COMPUTE, HAS_BIAS), DOT, COMPUTE, PRECISION)
            forget, write, n, m = factors(i, f, n, m, KIND)
            z = product(h, r2, biased(x2, bias_at + 2 * one_gate, d, D, COMPUTE, HAS_BIAS), DOT, COMPUTE, PRECISION)
            c = forget * c + write * tm.tanh(z)
            o = tm.sigmoid(
                product(h, r3, biased(x3, bias_at + 3 * one_gate, d, D, COMPUTE, HAS_BIAS), DOT, COMPUTE, PRECISION)
            )
            h = hidden(o, c, n, KIND)
        tl.store(y_at + y_tile, h.to(y_ptr.dtype.element_ty), mask=inside)
        y_at += one_gate
        store_four(kept_at + tile, kept_size, h, c, n, m, inside, components)
        if KEEP:
            kept_at += step


@triton.jit(do_not_specialize=["time", "batches", "heads", "whole", "start"])
def backward_kernel(
    rows_ptr,
    before0_ptr,
    before1_ptr,
    before2_ptr,
    weight_ptr,
    reset_ptr,
    came_ptr,
    grads_ptr,
    to_ptr,
    time,
    batches,
    heads,
    whole,
    start,
    KIND: tl.constexpr,
    D: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_CAME: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the last step of a piece to the first: the gradients of its rows in place of the rows, (head, time, batch,
    row, d_head). before: the state that each step starts from, (head, time, batch, d_head) each: lstm c; gru h; slstm
    c, n, m. reset (batch, time) and came, the outputs' gradients (batch, time, head, d_head), are of the whole
    sequence of `whole` steps, in which the piece begins at `start`. grads, to: those of the state after and before the
    piece, (state, head, batch, d_head)."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < batches) & (d[None, :] < D)
    four: tl.constexpr = KIND == "lstm" or KIND == "slstm"
    width: tl.constexpr = 1 if KIND == "elman" else 4
    components: tl.constexpr = 4 if KIND == "slstm" else (2 if KIND == "lstm" else 1)

    step = batches.to(tl.int64) * D
    tile = rows[:, None] * D + d[None, :]
    size = heads * step
    last = (head.to(tl.int64) * time + time - 1) * step
    one_step = heads * D
    rows_at = rows_ptr + last * width
    rows_tile = rows[:, None] * width * D + d[None, :]
    before0_at, before1_at = before0_ptr + last, before1_ptr + last
    before2_at = before2_ptr + last
    came_at = came_ptr + (start + time - 1).to(tl.int64) * one_step + head * D
    came_tile = rows[:, None].to(tl.int64) * whole * one_step + d[None, :]
    grads_at, to_at = grads_ptr + head * step, to_ptr + head * step
    reset_at = reset_ptr + rows.to(tl.int64) * whole + start

    r0 = matrix(weight_ptr, 0, head, heads, D, BLOCK_D, False)
    if KIND != "elman":
        r1 = matrix(weight_ptr, 1, head, heads, D, BLOCK_D, False)
        r2 = matrix(weight_ptr, 2, head, heads, D, BLOCK_D, False)
        if four:
            r3 = matrix(weight_ptr, 3, head, heads, D, BLOCK_D, False)
    zero = tl.zeros((BLOCK_B, BLOCK_D), COMPUTE)
    gh, gc, gn, gm = four_of(grads_at + tile, size, inside, components)
    for back in range(time):
        row0, row1, row2, row3 = four_of(rows_at + rows_tile, D, inside, width)
        if HAS_CAME:
            gh += tl.load(came_at + came_tile, mask=inside, other=0.0).to(COMPUTE)
        before0, before1, before2 = zero, zero, zero
        if KIND != "elman":
            before0 = tl.load(before0_at + tile, mask=inside, other=0.0)
        if KIND == "slstm":
            before1 = tl.load(before1_at + tile, mask=inside, other=0.0)
            before2 = tl.load(before2_at + tile, mask=inside, other=0.0)
        to0, to1, to2, to3, gh, gc, gn, gm = pull(
            gh, gc, gn, gm, row0, row1, row2, row3, before0, before1, before2, KIND
        )
        store_four(rows_at + rows_tile, D, to0, to1, to2, to3, inside, width)
        gh = product(to0, r0, gh, DOT, COMPUTE, PRECISION)
        if KIND != "elman":
            gh = product(to1, r1, gh, DOT, COMPUTE, PRECISION)
            gh = product(to2, r2, gh, DOT, COMPUTE, PRECISION)
            if four:
                gh = product(to3, r3, gh, DOT, COMPUTE, PRECISION)
        if HAS_RESET:
            cut = (tl.load(reset_at + (time - 1 - back), mask=rows < batches, other=0) != 0)[:, None]
            gh, gc, gn, gm = cut_state(cut, gh, gc, gn, gm, 0.0, KIND)
        rows_at -= step * width
        before0_at -= step
        before1_at -= step
        before2_at -= step
        came_at -= one_step
    store_four(to_at + tile, size, gh, gc, gn, gm, inside, components)
