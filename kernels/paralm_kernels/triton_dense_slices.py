# mypy: ignore-errors
"""What the kernels of large heads (triton_dense_wide_kernels.py) are made of: a barrier between programs, and products
with a slice of R that stays on the chip.

In a product the SPLIT warps share out the sum over columns, not the result, so that each reads only its part of h and
of R: operands are (SPLIT, …, BLOCK_K), CHUNKS of them, and the sums of the warps are added at the end, in order. The
compiler puts R's tiles into shared memory, but for HELD more of 16 columns, which stay in registers where shared memory
alone is too small.
"""

import triton
import triton.language as tl

from .triton_dense_cells import product


@triton.jit
def arrive(count_ptr):
    """Says that this program has written its part of the step."""
    tl.debug_barrier()  # all threads' stores come before the one thread's release
    tl.atomic_add(count_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(count_ptr, goal):
    """Until `goal` programs have arrived since the launch; what they wrote before can then be read."""
    while tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu") - goal < 0:
        pass


@triton.jit
def slices(
    weight_ptr,
    head,
    heads,
    columns,
    D: tl.constexpr,
    PRODUCTS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    EACH: tl.constexpr,
):
    """What a product needs for these columns of its result: CHUNKS tiles (SPLIT, BLOCK_K, BLOCK_N) of these gates'
    matrices, from each warp's number FIRST on; weight (gate, head, column of the result, column summed over)."""
    k = tl.arange(0, SPLIT)[:, None, None] * EACH + FIRST + tl.arange(0, BLOCK_K)[None, :, None]
    n = columns[None, None, :]
    tiles = ()
    for gate in tl.static_range(PRODUCTS):
        for chunk in tl.static_range(CHUNKS):
            row = k + chunk * BLOCK_K
            start = weight_ptr + (gate * heads + head).to(tl.int64) * D * D
            tiles += (tl.load(start + n * D + row, mask=(row < D) & (n < D), other=0.0),)
    return tiles


@triton.jit
def add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def over_warps(a0, a1, a2, a3, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr):
    """The sums over SPLIT of the products there are, in one exchange; the interpreter's is fast for one at a time."""
    if PRODUCTS == 1:
        total = tl.sum(a0, 0)
        return total, total, total, total
    elif PRECISION == "wide":
        return tl.sum(a0, 0), tl.sum(a1, 0), tl.sum(a2, 0), tl.sum(a3, 0)
    else:
        return tl.reduce((a0, a1, a2, a3), 0, add_four)


@triton.jit
def row_limit(reset_ptr, rows, batches, HELD: tl.constexpr):
    """The number of rows, for each of them; with HELD by way of a byte in memory that changes nothing: Triton takes
    operands whose loads depend on bytes in groups of four, and only such tiles of R get into registers without going
    through shared memory. Where a version does otherwise, the launch says so: it asks for more than there is."""
    limit = batches + rows * 0
    if HELD:
        limit += tl.load(reset_ptr + rows * 0).to(tl.int32) & 256
    return limit


@triton.jit
def products(
    a0,
    a1,
    a2,
    a3,
    source,
    gate_step,
    r,
    rows,
    limit,
    cut,
    D: tl.constexpr,
    PRODUCTS: tl.constexpr,
    OPERANDS: tl.constexpr,
    HAS_CUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    EACH: tl.constexpr,
    STAGE: tl.constexpr,
):
    """With what the tiles r add: for each of PRODUCTS gates, (SPLIT, BLOCK_B, BLOCK_N), parts of operand · R. source:
    (batch, d_head) in memory that others write, one for all gates or OPERANDS = PRODUCTS of them, gate_step apart; rows
    from their `limit` on and those that are `cut` are zeros. STAGE tiles, which divides their number, are read at
    once."""
    k = tl.arange(0, SPLIT)[:, None, None] * EACH + FIRST + tl.arange(0, BLOCK_K)[None, None, :]
    row = rows[None, :, None]
    at = row * D + k
    inside = row < limit[None, :, None]
    if HAS_CUT:
        inside = inside & (cut[None, :, :] == 0)
    for stage in tl.static_range(OPERANDS * CHUNKS // STAGE):
        tiles = ()
        for index in tl.static_range(stage * STAGE, stage * STAGE + STAGE):
            start = source + (index // CHUNKS) * gate_step + (index % CHUNKS) * BLOCK_K
            mask = inside
            if D < SPLIT * EACH:
                mask = inside & (k < D - (index % CHUNKS) * BLOCK_K)
            tiles += (tl.load(start + at, mask=mask, other=0.0, cache_modifier=".cg"),)
        for index in tl.static_range(stage * STAGE, stage * STAGE + STAGE):
            if index < CHUNKS:
                a0 = product(tiles[index % STAGE], r[index], a0, DOT, COMPUTE, PRECISION)
            if PRODUCTS > 1 and (OPERANDS == 1 or index // CHUNKS == 1):
                a1 = product(tiles[index % STAGE], r[CHUNKS + index % CHUNKS], a1, DOT, COMPUTE, PRECISION)
            if PRODUCTS > 2 and (OPERANDS == 1 or index // CHUNKS == 2):
                a2 = product(tiles[index % STAGE], r[2 * CHUNKS + index % CHUNKS], a2, DOT, COMPUTE, PRECISION)
            if PRODUCTS > 3 and (OPERANDS == 1 or index // CHUNKS == 3):
                a3 = product(tiles[index % STAGE], r[3 * CHUNKS + index % CHUNKS], a3, DOT, COMPUTE, PRECISION)
    return a0, a1, a2, a3


@triton.jit
def biases(
    bias_at, columns, heads, D: tl.constexpr, COMPUTE: tl.constexpr, GATES: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """The biases' rows of these columns in their public order, (1, BLOCK_N), the last of them again where there are
    fewer than four; zeros without."""
    b0 = tl.zeros((1, columns.shape[0]), COMPUTE)
    b1, b2, b3 = b0, b0, b0
    if HAS_BIAS:
        b0 = tl.load(bias_at + columns, mask=columns < D, other=0.0)[None, :]
        if GATES > 1:
            b1 = tl.load(bias_at + heads * D + columns, mask=columns < D, other=0.0)[None, :]
            b2 = tl.load(bias_at + 2 * heads * D + columns, mask=columns < D, other=0.0)[None, :]
            b3 = tl.load(bias_at + 3 * heads * D + columns, mask=columns < D, other=0.0)[None, :]
    return b0, b1, b2, b3
