# mypy: ignore-errors
"""The chunk form of chunkwise.py's recurrence in Triton, forward; the equations and names are chunkwise_torch.py's.

Every gate becomes a weight once: `stabilizer_kernel` runs m over all of time as a scan of (d, m) pairs (normalized
only), `weights_kernel` makes w, a, κ and the parts of D of a chunk. `states_kernel` walks over chunks, one program for
a tile of the state. `scores_kernel` multiplies q and k of a chunk once for all heads and columns that read them, as
mamba_ssm does; `outputs_kernel` has a program for BT steps of a chunk. (triton_chunkwise_backward.py: the rest.)

Big tensors are (batch, time, heads or groups, width) with any stride of batch and time; weights are (row, steps), a row
being a batch and head, steps padded to whole chunks; states (row, chunk, d_k, d_v); scores (batch and group, chunk, L,
L), of which only tiles on and below the diagonal are written. Matmuls take operands in DOT and sum in COMPUTE.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a · b. The interpreter multiplies bfloat16 as if it were whole numbers: there, PRECISION "wide", the
    rounded operands are widened first, which changes nothing else."""
    if PRECISION == "wide":
        return total + tl.dot(a.to(DOT).to(COMPUTE), b.to(DOT).to(COMPUTE), out_dtype=COMPUTE)
    else:
        return total + tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION, out_dtype=COMPUTE)


@triton.jit
def inside(row, col, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of a tile exist; a width that tiles fill needs no mask, and saves registers."""
    if WIDTH % COLUMNS == 0:
        return tl.broadcast_to((row < limit)[:, None], (ROWS, COLUMNS))
    else:
        return (row < limit)[:, None] & (col < WIDTH)[None, :]


@triton.jit
def tile(ptr, stride, first, limit, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Steps from `first` and columns from `column` of a big tensor, zero outside; ptr: of its batch row and head."""
    row, col = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = inside(row, col, limit - first, ROWS, COLUMNS, WIDTH)
    return tl.load(ptr + first.to(tl.int64) * stride + row[:, None] * stride + col[None, :], mask=mask, other=0.0)


@triton.jit
def put(ptr, value, stride, first, limit, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Stores what `tile` would read."""
    row, col = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = inside(row, col, limit - first, ROWS, COLUMNS, WIDTH)
    at = ptr + first.to(tl.int64) * stride + row[:, None] * stride + col[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def state_tile(ptr, row, column, BK: tl.constexpr, BV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """A tile of one state, zero outside."""
    i, j = row + tl.arange(0, BK), column + tl.arange(0, BV)
    at = ptr + i[:, None] * DV + j[None, :]
    if DK % BK == 0 and DV % BV == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(i < DK)[:, None] & (j < DV)[None, :], other=0.0)


@triton.jit
def put_state(ptr, value, row, column, BK: tl.constexpr, BV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """Stores what `state_tile` would read."""
    i, j = row + tl.arange(0, BK), column + tl.arange(0, BV)
    at = ptr + i[:, None] * DV + j[None, :]
    if DK % BK == 0 and DV % BV == 0:
        tl.store(at, value.to(ptr.dtype.element_ty))
    else:
        tl.store(at, value.to(ptr.dtype.element_ty), mask=(i < DK)[:, None] & (j < DV)[None, :])


@triton.jit
def square(ptr, i0, j0, L: tl.constexpr, BT: tl.constexpr):
    """Where BT steps from i0 meet BT from j0 in a chunk's matrix of steps by steps."""
    return ptr + (i0 + tl.arange(0, BT))[:, None] * L + (j0 + tl.arange(0, BT))[None, :]


@triton.jit
def decay(hi_ptr, r_ptr, c_ptr, first_ptr, base, i0, j0, BT: tl.constexpr):
    """E_ij for BT steps from i0 and from j0 of a chunk that starts at `base` of the weights."""
    i, j = i0 + tl.arange(0, BT), j0 + tl.arange(0, BT)
    first = tl.load(first_ptr + base + i)
    seen = (j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None])
    hi = tl.load(hi_ptr + base + i)[:, None] - tl.load(hi_ptr + base + j)[None, :]
    x = hi + (tl.load(r_ptr + base + i)[:, None] + tl.load(c_ptr + base + j)[None, :])
    return tl.exp(tl.where(seen, x, float("-inf")))


@triton.jit
def later(d_before, m_before, d, m):
    """Two stretches of m's recurrence, one after the other."""
    return d_before + d, tl.maximum(m_before + d, m)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def stabilizer_kernel(
    d_ptr, g_ptr, reset_ptr, m_first_ptr, m_ptr, time, padded, heads, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr
):
    """m at the start and after every step, (row, 1 + padded)."""
    row = tl.program_id(0).to(tl.int64)
    out = m_ptr + row * (padded + 1)
    m = tl.load(m_first_ptr + row)
    tl.store(out, m)
    at = tl.arange(0, BLOCK)
    for start in range(0, padded, BLOCK):
        t = start + at
        d = tl.load(d_ptr + row * time + t, mask=t < time, other=0.0)
        g = tl.load(g_ptr + row * time + t, mask=t < time, other=float("-inf"))
        if HAS_RESET:
            reset = tl.load(reset_ptr + (row // heads) * time + t, mask=t < time, other=0)
            d = tl.where(reset != 0, float("-inf"), d)
        d, after = tl.associative_scan((d, g), 0, later)
        after = tl.maximum(after, m + d)
        tl.store(out + 1 + t, after, mask=t < padded)
        m = tl.sum(tl.where(at == BLOCK - 1, after, 0.0), 0)


@triton.jit
def weights_kernel(
    d_ptr, g_ptr, reset_ptr, m_ptr, hi_ptr, r_ptr, c_ptr, first_ptr, w_ptr, a_ptr, keep_ptr, time, chunks, heads,
    HAS_RESET: tl.constexpr, NORM: tl.constexpr, COMPUTE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """hi and the rest of the running sum of a chunk (r with −m, c with g), the step its sequence starts at (−1: before
    the chunk), w, a and κ. The sum is taken in float64: one step that decays by e^−1000 must not blur the others."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, L)
    t = chunk * L + at
    out = row * chunks * L + t
    b = tl.cumsum(tl.load(d_ptr + row * time + t, mask=t < time, other=0.0).to(tl.float64), 0)
    first = at * 0 - 1
    if HAS_RESET:
        reset = tl.load(reset_ptr + (row // heads) * time + t, mask=t < time, other=0)
        first = tl.associative_scan(tl.where(reset != 0, at, -1), 0, larger)
    hi = b.to(COMPUTE)
    low = (b - hi.to(tl.float64)).to(COMPUTE)
    end = tl.sum(tl.where(at == L - 1, b, 0.0), 0)
    first_end = tl.max(first, 0)
    tail, total = (end - b).to(COMPUTE), end.to(COMPUTE)
    start = hi
    r, c = low, -low
    if NORM:
        m_at = m_ptr + row * (chunks * L + 1)
        before, after, m = tl.load(m_at + chunk * L), tl.load(m_at + chunk * L + L), tl.load(m_at + 1 + t)
        g = tl.load(g_ptr + row * time + t, mask=t < time, other=float("-inf"))
        after = tl.where(after == float("-inf"), 0.0, after)
        m = tl.where(m == float("-inf"), 0.0, m)
        start, total, tail = hi + before - m, total + before - after, tail + g - after
        r, c = low - m, g - low
    tl.store(hi_ptr + out, hi)
    tl.store(r_ptr + out, r)
    tl.store(c_ptr + out, c)
    tl.store(first_ptr + out, first)
    tl.store(w_ptr + out, tl.exp(tl.where(first < 0, start, float("-inf"))))
    tl.store(a_ptr + out, tl.exp(tl.where(at >= first_end, tail, float("-inf"))))
    tl.store(keep_ptr + row * chunks + chunk, tl.exp(tl.where(first_end < 0, total, float("-inf"))))


@triton.jit
def states_kernel(
    k_ptr, k_batch, k_step, v_ptr, v_batch, v_step, g_ptr, a_ptr, keep_ptr, s_first_ptr, n_first_ptr, s_ptr, n_ptr,
    s_last_ptr, n_last_ptr, time, chunks, heads, groups, pieces, each,
    STORE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state at the start of every chunk (where STORE) and at the end of a piece of `each` chunks, from that at its
    start (row, piece)."""
    part = tl.program_id(2).to(tl.int64)
    row, chunk0 = part // pieces, tl.program_id(2) % pieces * each
    subs = (tl.minimum(chunk0 + each, chunks) - chunk0) * (L // BT)
    k0, v0 = tl.program_id(0) * BK, tl.program_id(1) * BV
    batch, head = row // heads, row % heads
    k_ptr += batch * k_batch + (head // (heads // groups)) * DK
    v_ptr += batch * v_batch + head * DV
    state = state_tile(s_first_ptr + part * DK * DV, k0, v0, BK, BV, DK, DV)
    of_k = k0 + tl.arange(0, BK)
    norm = tl.zeros((BK,), COMPUTE)
    if NORM:
        norm = tl.load(n_first_ptr + part * DK + of_k, mask=of_k < DK, other=0.0)
    # One loop over all steps, not one in a chunk: loads are then under way across the ends of chunks, too.
    for sub in range(subs):
        if sub % (L // BT) == 0:
            chunk = row * chunks + chunk0 + sub // (L // BT)
            if STORE:
                put_state(s_ptr + chunk * DK * DV, state, k0, v0, BK, BV, DK, DV)
                if NORM:
                    tl.store(n_ptr + chunk * DK + of_k, norm, mask=(of_k < DK) & (v0 == 0))
            keep = tl.load(keep_ptr + chunk)
            state, norm = state * keep, norm * keep
        t = chunk0 * L + sub * BT
        a = tl.load(a_ptr + row * chunks * L + t + tl.arange(0, BT))
        if not NORM:
            step = t + tl.arange(0, BT)
            a = a * tl.load(g_ptr + row * time + step, mask=step < time, other=0.0)
        k = tile(k_ptr, k_step, t, time, k0, BT, BK, DK)
        v = tile(v_ptr, v_step, t, time, v0, BT, BV, DV)
        state = product(tl.trans(k), a[:, None] * v.to(COMPUTE), state, DOT, COMPUTE, PRECISION)
        if NORM:
            norm += tl.sum(a[:, None] * k.to(COMPUTE), 0)
    put_state(s_last_ptr + part * DK * DV, state, k0, v0, BK, BV, DK, DV)
    if NORM:
        tl.store(n_last_ptr + part * DK + of_k, norm, mask=(of_k < DK) & (v0 == 0))


@triton.jit
def scores_kernel(
    q_ptr, q_batch, q_step, k_ptr, k_batch, k_step, scores_ptr, time, chunks, groups,
    DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """q_i·k_j of BT steps and BT steps not after them, of a chunk and group."""
    chunk, i0, j0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT, tl.program_id(2) * BT
    batch, group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    if j0 <= i0:
        t0 = chunk * L
        scores = tl.zeros((BT, BT), COMPUTE)
        for kb in range(0, DK, BK):
            q = tile(q_ptr + batch * q_batch + group * DK, q_step, t0 + i0, time, kb, BT, BK, DK)
            k = tile(k_ptr + batch * k_batch + group * DK, k_step, t0 + j0, time, kb, BT, BK, DK)
            scores = product(q, tl.trans(k), scores, DOT, COMPUTE, PRECISION)
        of = ((batch * groups + group) * chunks + chunk) * L * L
        tl.store(square(scores_ptr + of, i0, j0, L, BT), scores)


@triton.jit
def outputs_kernel(
    q_ptr, q_batch, q_step, v_ptr, v_batch, v_step, y_ptr, y_batch, y_step, g_ptr, hi_ptr, r_ptr, c_ptr, first_ptr,
    w_ptr, m_ptr, s_ptr, n_ptr, scores_ptr, inner_ptr, time, chunks, heads, groups,
    EPS: tl.constexpr, SCALE: tl.constexpr,
    NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """y of BT steps of a chunk, a head and BV columns; n·q̃ on the side, which backward divides by again."""
    row = tl.program_id(1).to(tl.int64)
    chunk, i0, v0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT, tl.program_id(2) * BV
    batch, head = row // heads, row % heads
    group = head // (heads // groups)
    q_ptr += batch * q_batch + group * DK
    v_ptr += batch * v_batch + head * DV
    y_ptr += batch * y_batch + head * DV
    s_ptr += (row * chunks + chunk) * DK * DV
    scores_ptr += ((batch * groups + group) * chunks + chunk) * L * L
    base, t0 = (row * chunks + chunk) * L, chunk * L
    y, inner = tl.zeros((BT, BV), COMPUTE), tl.zeros((BT,), COMPUTE)
    for kb in range(0, DK, BK):
        q = tile(q_ptr, q_step, t0 + i0, time, kb, BT, BK, DK)
        y = product(q, state_tile(s_ptr, kb, v0, BK, BV, DK, DV), y, DOT, COMPUTE, PRECISION)
        if NORM:
            of_k = kb + tl.arange(0, BK)
            norm = tl.load(n_ptr + (row * chunks + chunk) * DK + of_k, mask=of_k < DK, other=0.0)
            inner += tl.sum(q.to(COMPUTE) * norm[None, :], 1)
    w = tl.load(w_ptr + base + i0 + tl.arange(0, BT)) * tl.full((), SCALE, COMPUTE)
    y, inner = y * w[:, None], inner * w
    for j0 in range(0, i0 + BT, BT):
        mixed = tl.load(square(scores_ptr, i0, j0, L, BT)) * tl.full((), SCALE, COMPUTE)
        mixed = mixed * decay(hi_ptr, r_ptr, c_ptr, first_ptr, base, i0, j0, BT)
        if NORM:
            inner += tl.sum(mixed, 1)
        else:
            step = t0 + j0 + tl.arange(0, BT)
            mixed = mixed * tl.load(g_ptr + row * time + step, mask=step < time, other=0.0)[None, :]
        v = tile(v_ptr, v_step, t0 + j0, time, v0, BT, BV, DV)
        y = product(mixed, v, y, DOT, COMPUTE, PRECISION)
    if NORM:
        i = i0 + tl.arange(0, BT)
        floor = tl.exp(-tl.load(m_ptr + row * (chunks * L + 1) + 1 + t0 + i))
        y = y / (tl.maximum(tl.abs(inner), floor) + tl.full((), EPS, COMPUTE))[:, None]
        tl.store(inner_ptr + base + i, inner, mask=(t0 + i < time) & (v0 == 0))
    put(y_ptr, y, y_step, t0 + i0, time, v0, BT, BV, DV)
