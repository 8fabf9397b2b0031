# mypy: ignore-errors
"""The chunk form of chunkwise.py's recurrence in Triton, backward; see triton_chunkwise_kernels.py for the layouts.

`norm_back_kernel` takes dy through the division (normalized only), `grad_states_kernel` walks over chunks from the last
to the first, and the others have a program for BT steps of a chunk. ∂d and ∂g follow from q·dq (what ends at a step),
k·dk (what starts there) and ⟨S', dS'⟩, head by head. Heads that share q and k share the gradient of q·k, too: it is
summed over them first (`pairs_kernel`; Dao & Gu, arXiv 2405.21060, section 6), and multiplied with k and q once; what
it gives to a head's q·dq and k·dk are its sums over j and over i. A program of these sums over the heads one after the
other, so that there are no atomic sums. `passing_kernel` makes ∂d and ∂g of them.
"""

import triton
import triton.language as tl

from .triton_chunkwise_kernels import decay, product, put, put_state, square, state_tile, tile


@triton.jit
def norm_back_kernel(
    y_ptr, y_batch, y_step, dy_ptr, dy_batch, dy_step, m_ptr, inner_ptr, rho_ptr, dn_ptr, time, chunks, heads,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """ρ = 1 / norm, with which dY = ρ dy, and the gradient of n·q̃, of BT steps and a head; zero past the end."""
    row, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BT + tl.arange(0, BT)
    y_ptr += (row // heads) * y_batch + (row % heads) * DV
    dy_ptr += (row // heads) * dy_batch + (row % heads) * DV
    flow = tl.zeros((BT,), COMPUTE)
    for vb in range(0, DV, BV):
        y = tile(y_ptr, y_step, tl.program_id(0) * BT, time, vb, BT, BV, DV).to(COMPUTE)
        flow += tl.sum(y * tile(dy_ptr, dy_step, tl.program_id(0) * BT, time, vb, BT, BV, DV).to(COMPUTE), 1)
    inner = tl.load(inner_ptr + row * chunks * L + i, mask=i < time, other=0.0)
    floor = tl.exp(-tl.load(m_ptr + row * (chunks * L + 1) + 1 + i))
    norm = tl.maximum(tl.abs(inner), floor) + tl.full((), EPS, COMPUTE)
    rho = tl.where(i < time, 1.0 / norm, 0.0)
    sign = tl.where(inner > 0, -1.0, 1.0)
    tl.store(rho_ptr + row * chunks * L + i, rho)
    tl.store(dn_ptr + row * chunks * L + i, tl.where((tl.abs(inner) > floor) & (i < time), flow * rho * sign, 0.0))


@triton.jit
def grad_states_kernel(
    q_ptr, q_batch, q_step, dy_ptr, dy_batch, dy_step, rho_ptr, dn_ptr, w_ptr, keep_ptr, s_ptr, n_ptr, s_last_ptr,
    n_last_ptr, ds_last_ptr, dn_last_ptr, ds_ptr, dnorm_ptr, ds_first_ptr, dn_first_ptr, end_ptr, time, chunks, heads,
    groups, pieces, each,
    STORE: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """dS at the start of a piece of `each` chunks from dS' at its end (row, piece); where STORE dS' of every chunk and
    ⟨S', dS'⟩ of the tile (row, chunk, tile), too."""
    part = tl.program_id(2).to(tl.int64)
    row, chunk0 = part // pieces, tl.program_id(2) % pieces * each
    end = tl.minimum(chunk0 + each, chunks)
    k0, v0 = tl.program_id(0) * BK, tl.program_id(1) * BV
    which = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tiles = tl.num_programs(0) * tl.num_programs(1)
    batch, head = row // heads, row % heads
    q_ptr += batch * q_batch + (head // (heads // groups)) * DK
    dy_ptr += batch * dy_batch + head * DV
    grad = state_tile(ds_last_ptr + part * DK * DV, k0, v0, BK, BV, DK, DV)
    of_k = k0 + tl.arange(0, BK)
    dnorm, norm_after = tl.zeros((BK,), COMPUTE), tl.zeros((BK,), COMPUTE)
    if NORM:
        dnorm = tl.load(dn_last_ptr + part * DK + of_k, mask=of_k < DK, other=0.0)
    if STORE:
        after = state_tile(s_last_ptr + part * DK * DV, k0, v0, BK, BV, DK, DV).to(COMPUTE)
        if NORM:
            norm_after = tl.load(n_last_ptr + part * DK + of_k, mask=of_k < DK, other=0.0)
    for back in range((end - chunk0) * (L // BT)):
        if back % (L // BT) == 0:
            here = row * chunks + end - 1 - back // (L // BT)
            if STORE:
                put_state(ds_ptr + here * DK * DV, grad, k0, v0, BK, BV, DK, DV)
                passing = tl.sum(tl.sum(grad * after, 1), 0)
                after = state_tile(s_ptr + here * DK * DV, k0, v0, BK, BV, DK, DV).to(COMPUTE)
                if NORM:
                    tl.store(dnorm_ptr + here * DK + of_k, dnorm, mask=(of_k < DK) & (v0 == 0))
                    passing += tl.where(v0 == 0, tl.sum(dnorm * norm_after, 0), 0.0)
                    norm_after = tl.load(n_ptr + here * DK + of_k, mask=of_k < DK, other=0.0)
                tl.store(end_ptr + here * tiles + which, passing)
            keep = tl.load(keep_ptr + here)
            grad, dnorm = grad * keep, dnorm * keep
        t = end * L - (back + 1) * BT
        at = row * chunks * L + t + tl.arange(0, BT)
        w = tl.load(w_ptr + at) * tl.full((), SCALE, COMPUTE)
        q = tile(q_ptr, q_step, t, time, k0, BT, BK, DK)
        dy = tile(dy_ptr, dy_step, t, time, v0, BT, BV, DV).to(COMPUTE)
        if NORM:
            dnorm += tl.sum((w * tl.load(dn_ptr + at))[:, None] * q.to(COMPUTE), 0)
            w = w * tl.load(rho_ptr + at)
        grad = product(tl.trans(q), w[:, None] * dy, grad, DOT, COMPUTE, PRECISION)
    put_state(ds_first_ptr + part * DK * DV, grad, k0, v0, BK, BV, DK, DV)
    if NORM:
        tl.store(dn_first_ptr + part * DK + of_k, dnorm, mask=(of_k < DK) & (v0 == 0))


@triton.jit
def shares(heads, groups, each):
    """Of programs along the second axis that sum over `each` heads of a group: how many share a group; which of those
    this is, of which group and row of the batch; and how many rows there are."""
    splits = heads // groups // each
    program, of_rows = tl.program_id(1), splits * groups
    batches = (tl.num_programs(1) // of_rows).to(tl.int64)
    return splits, program % splits, program // splits % groups, (program // of_rows).to(tl.int64), batches


@triton.jit
def pairs_kernel(
    v_ptr, v_batch, v_step, dy_ptr, dy_batch, dy_step, g_ptr, hi_ptr, r_ptr, c_ptr, first_ptr, rho_ptr, dn_ptr,
    scores_ptr, pairs_ptr, ending_ptr, starting_ptr, time, chunks, heads, groups, each,
    SCALE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of q_i·k_j of BT steps and BT steps not after them, summed over `each` heads of a group (split and
    batch and group, chunk, L, L), and of every head what it gives to q·dq (tile of j, row, step) and, without the gain
    of the plain form, to k·dk (tile of i, row, step)."""
    chunk, i0, j0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT, tl.program_id(2) * BT
    splits, split, group, batch, batches = shares(heads, groups, each)
    steps = batches * heads * chunks * L
    i, j = i0 + tl.arange(0, BT), j0 + tl.arange(0, BT)
    t0 = chunk * L
    if j0 <= i0:
        of = ((batch * groups + group) * chunks + chunk) * L * L
        scores = tl.load(square(scores_ptr + of, i0, j0, L, BT)) * tl.full((), SCALE, COMPUTE)
        total = tl.zeros((BT, BT), COMPUTE)
        for index in range(each):
            head = (group * splits + split) * each + index
            row = batch * heads + head
            base = (row * chunks + chunk) * L
            inner = tl.zeros((BT, BT), COMPUTE)
            for vb in range(0, DV, BV):
                dy = tile(dy_ptr + batch * dy_batch + head * DV, dy_step, t0 + i0, time, vb, BT, BV, DV)
                v = tile(v_ptr + batch * v_batch + head * DV, v_step, t0 + j0, time, vb, BT, BV, DV)
                inner = product(dy, tl.trans(v), inner, DOT, COMPUTE, PRECISION)
            if NORM:
                inner = inner * tl.load(rho_ptr + base + i)[:, None] + tl.load(dn_ptr + base + i)[:, None]
            inner = inner * decay(hi_ptr, r_ptr, c_ptr, first_ptr, base, i0, j0, BT)
            tl.store(starting_ptr + i0 // BT * steps + base + j, tl.sum(inner * scores, 0))
            if not NORM:
                inner = inner * tl.load(g_ptr + row * time + t0 + j, mask=t0 + j < time, other=0.0)[None, :]
            tl.store(ending_ptr + j0 // BT * steps + base + i, tl.sum(inner * scores, 1))
            total += inner
        total = total * tl.full((), SCALE, COMPUTE)
        of += split * batches * groups * chunks * L * L
        tl.store(square(pairs_ptr + of, i0, j0, L, BT), total.to(pairs_ptr.dtype.element_ty))


@triton.jit
def until_cut(cut_later, flow_later, cut, flow):
    """Two stretches of sums from the right, the later one first; nothing comes from beyond a cut."""
    return cut_later | cut, flow + tl.where(cut != 0, 0.0, flow_later)


@triton.jit
def passing_kernel(
    ending_ptr, starting_ptr, end_ptr, g_ptr, reset_ptr, dd_ptr, dd_batch, dd_step, dg_ptr, dg_batch, dg_step, time,
    chunks, heads, tiles, tiles_end,
    HAS_RESET: tl.constexpr, NORM: tl.constexpr, COMPUTE: tl.constexpr, L: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradients of gain and log decay of a chunk and head. That of a log decay is what flows past its step: what
    ends at or after it without what starts there, until its sequence ends, or the chunk, past which flows ⟨S', dS'⟩.
    Most of it cancels, so it is summed in float64. ending, starting: as `pairs_kernel` and those of dq and dk left
    them, `tiles` of d_k and then tiles of steps, of which those above the diagonal were not written."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    steps = tl.num_programs(0).to(tl.int64) * chunks * L
    at = tl.arange(0, L)
    t = chunk * L + at
    here = row * chunks * L + t
    ending, starting = tl.zeros((L,), COMPUTE), tl.zeros((L,), COMPUTE)
    for part in range(tiles):
        ending += tl.load(ending_ptr + part * steps + here)
        starting += tl.load(starting_ptr + part * steps + here)
    for sub in range(L // BT):
        ending += tl.load(ending_ptr + (tiles + sub) * steps + here, mask=at // BT >= sub, other=0.0)
        starting += tl.load(starting_ptr + (tiles + sub) * steps + here, mask=at // BT <= sub, other=0.0)
    dd_ptr += row // heads * dd_batch + row % heads
    dg_ptr += row // heads * dg_batch + row % heads
    tl.store(dg_ptr + t.to(tl.int64) * dg_step, starting.to(dg_ptr.dtype.element_ty), mask=t < time)
    if not NORM:
        starting *= tl.load(g_ptr + row * time + t, mask=t < time, other=0.0)
    beyond = tl.zeros((), COMPUTE)
    for part in range(tiles_end):
        beyond += tl.load(end_ptr + (row * chunks + chunk) * tiles_end + part)
    flow = (ending - starting).to(tl.float64) + tl.where(at == L - 1, beyond, 0.0).to(tl.float64)
    if HAS_RESET:
        of = reset_ptr + row // heads * time + t
        cut = tl.load(of + 1, mask=(at < L - 1) & (t + 1 < time), other=0).to(tl.int32)
        cut, flow = tl.associative_scan((cut, flow), 0, until_cut, reverse=True)
        flow = tl.where(tl.load(of, mask=t < time, other=0) != 0, 0.0, flow)  # what decays there was cut off
    else:
        flow = tl.cumsum(flow, 0, reverse=True)
    tl.store(dd_ptr + t.to(tl.int64) * dd_step, flow.to(dd_ptr.dtype.element_ty), mask=t < time)


@triton.jit
def grad_q_kernel(
    q_ptr, q_batch, q_step, k_ptr, k_batch, k_step, dy_ptr, dy_batch, dy_step, dq_ptr, dq_batch, dq_step, dq_split,
    w_ptr, rho_ptr, dn_ptr, s_ptr, n_ptr, pairs_ptr, flow_ptr, time, chunks, heads, groups, each,
    SCALE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq of BT steps and BK columns, summed over `each` heads of a group, and of every head what reading the state
    gives to q·dq of those columns."""
    chunk, i0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT
    k0, t0 = tl.program_id(2) * BK, chunk * L
    splits, split, group, batch, batches = shares(heads, groups, each)
    i, of_k = i0 + tl.arange(0, BT), k0 + tl.arange(0, BK)
    total = tl.zeros((BT, BK), COMPUTE)
    q_at = q_ptr + batch * q_batch + group * DK
    for index in range(each):
        head = (group * splits + split) * each + index
        row = batch * heads + head
        base = (row * chunks + chunk) * L
        grad = tl.zeros((BT, BK), COMPUTE)
        for vb in range(0, DV, BV):
            dy = tile(dy_ptr + batch * dy_batch + head * DV, dy_step, t0 + i0, time, vb, BT, BV, DV)
            state = state_tile(s_ptr + (row * chunks + chunk) * DK * DV, k0, vb, BK, BV, DK, DV)
            grad = product(dy, tl.trans(state), grad, DOT, COMPUTE, PRECISION)
        if NORM:
            norm = tl.load(n_ptr + (row * chunks + chunk) * DK + of_k, mask=of_k < DK, other=0.0)
            grad = grad * tl.load(rho_ptr + base + i)[:, None] + tl.load(dn_ptr + base + i)[:, None] * norm[None, :]
        grad = grad * (tl.load(w_ptr + base + i) * tl.full((), SCALE, COMPUTE))[:, None]
        q = tile(q_at, q_step, t0 + i0, time, k0, BT, BK, DK).to(COMPUTE)
        tl.store(flow_ptr + tl.program_id(2) * (batches * heads * chunks * L) + base + i, tl.sum(q * grad, 1))
        total += grad
    pairs_ptr += (((split * batches + batch) * groups + group) * chunks + chunk) * L * L
    for j0 in range(0, i0 + BT, BT):
        k = tile(k_ptr + batch * k_batch + group * DK, k_step, t0 + j0, time, k0, BT, BK, DK)
        total = product(tl.load(square(pairs_ptr, i0, j0, L, BT)), k, total, DOT, COMPUTE, PRECISION)
    dq_ptr += split * dq_split + batch * dq_batch + group * DK
    put(dq_ptr, total, dq_step, t0 + i0, time, k0, BT, BK, DK)


@triton.jit
def grad_k_kernel(
    q_ptr, q_batch, q_step, k_ptr, k_batch, k_step, v_ptr, v_batch, v_step, dk_ptr, dk_batch, dk_step, dk_split, g_ptr,
    a_ptr, ds_ptr, dnorm_ptr, pairs_ptr, flow_ptr, time, chunks, heads, groups, each,
    NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dk likewise, and of every head what writing the state gives to k·dk, without the gain of the plain form."""
    chunk, j0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT
    k0, t0 = tl.program_id(2) * BK, chunk * L
    splits, split, group, batch, batches = shares(heads, groups, each)
    j, of_k = j0 + tl.arange(0, BT), k0 + tl.arange(0, BK)
    total = tl.zeros((BT, BK), COMPUTE)
    k_at = k_ptr + batch * k_batch + group * DK
    for index in range(each):
        head = (group * splits + split) * each + index
        row = batch * heads + head
        base = (row * chunks + chunk) * L
        grad = tl.zeros((BT, BK), COMPUTE)
        for vb in range(0, DV, BV):
            v = tile(v_ptr + batch * v_batch + head * DV, v_step, t0 + j0, time, vb, BT, BV, DV)
            state = state_tile(ds_ptr + (row * chunks + chunk) * DK * DV, k0, vb, BK, BV, DK, DV)
            grad = product(v, tl.trans(state), grad, DOT, COMPUTE, PRECISION)
        if NORM:
            norm = tl.load(dnorm_ptr + (row * chunks + chunk) * DK + of_k, mask=of_k < DK, other=0.0)
            grad = grad + norm[None, :]
        grad = grad * tl.load(a_ptr + base + j)[:, None]
        k = tile(k_at, k_step, t0 + j0, time, k0, BT, BK, DK).to(COMPUTE)
        tl.store(flow_ptr + tl.program_id(2) * (batches * heads * chunks * L) + base + j, tl.sum(k * grad, 1))
        if not NORM:
            grad = grad * tl.load(g_ptr + row * time + t0 + j, mask=t0 + j < time, other=0.0)[:, None]
        total += grad
    pairs_ptr += (((split * batches + batch) * groups + group) * chunks + chunk) * L * L
    for i0 in range(j0, L, BT):
        q = tile(q_ptr + batch * q_batch + group * DK, q_step, t0 + i0, time, k0, BT, BK, DK)
        total = product(tl.trans(tl.load(square(pairs_ptr, i0, j0, L, BT))), q, total, DOT, COMPUTE, PRECISION)
    dk_ptr += split * dk_split + batch * dk_batch + group * DK
    put(dk_ptr, total, dk_step, t0 + j0, time, k0, BT, BK, DK)


@triton.jit
def grad_v_kernel(
    k_ptr, k_batch, k_step, dy_ptr, dy_batch, dy_step, dv_ptr, dv_batch, dv_step, g_ptr, hi_ptr, r_ptr, c_ptr,
    first_ptr, a_ptr, rho_ptr, ds_ptr, scores_ptr, time, chunks, heads, groups,
    SCALE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv of BT steps of a chunk, a head and BV columns."""
    row = tl.program_id(1).to(tl.int64)
    chunk, j0, v0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT, tl.program_id(2) * BV
    batch, head = row // heads, row % heads
    group = head // (heads // groups)
    k_ptr += batch * k_batch + group * DK
    dy_ptr += batch * dy_batch + head * DV
    dv_ptr += batch * dv_batch + head * DV
    ds_ptr += (row * chunks + chunk) * DK * DV
    scores_ptr += ((batch * groups + group) * chunks + chunk) * L * L
    base, t0 = (row * chunks + chunk) * L, chunk * L
    grad = tl.zeros((BT, BV), COMPUTE)
    for kb in range(0, DK, BK):
        k = tile(k_ptr, k_step, t0 + j0, time, kb, BT, BK, DK)
        grad = product(k, state_tile(ds_ptr, kb, v0, BK, BV, DK, DV), grad, DOT, COMPUTE, PRECISION)
    grad = grad * tl.load(a_ptr + base + j0 + tl.arange(0, BT))[:, None]
    for i0 in range(j0, L, BT):
        mixed = tl.load(square(scores_ptr, i0, j0, L, BT)) * tl.full((), SCALE, COMPUTE)
        mixed = mixed * decay(hi_ptr, r_ptr, c_ptr, first_ptr, base, i0, j0, BT)
        if NORM:
            mixed = mixed * tl.load(rho_ptr + base + i0 + tl.arange(0, BT))[:, None]
        dy = tile(dy_ptr, dy_step, t0 + i0, time, v0, BT, BV, DV)
        grad = product(tl.trans(mixed), dy, grad, DOT, COMPUTE, PRECISION)
    if not NORM:
        step = t0 + j0 + tl.arange(0, BT)
        grad = grad * tl.load(g_ptr + row * time + step, mask=step < time, other=0.0)[:, None]
    put(dv_ptr, grad, dv_step, t0 + j0, time, v0, BT, BV, DV)
