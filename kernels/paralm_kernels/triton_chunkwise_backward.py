# mypy: ignore-errors
"""The chunk form of chunkwise.py's recurrence in Triton, backward; see triton_chunkwise_kernels.py for the layouts.

`norm_back_kernel` takes dy through the division (normalized only), `grad_states_kernel` walks over chunks from the last
to the first, and the others have a program for BT steps of a chunk. ∂d and ∂g follow from q·dq (what ends at a step),
k·dk (what starts there) and ⟨S', dS'⟩, head by head. A program of dq or dk sums over the heads that share q and k, one
after the other, so that there are no atomic sums.
"""

import triton
import triton.language as tl

from .triton_chunkwise_kernels import decay, product, put, put_state, state_tile, tile


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
    groups,
    SCALE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dS' of every chunk, ⟨S', dS'⟩ of the tile (row, chunk, tile), and dS at the start."""
    row = tl.program_id(2).to(tl.int64)
    k0, v0 = tl.program_id(0) * BK, tl.program_id(1) * BV
    which = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tiles = tl.num_programs(0) * tl.num_programs(1)
    batch, head = row // heads, row % heads
    q_ptr += batch * q_batch + (head // (heads // groups)) * DK
    dy_ptr += batch * dy_batch + head * DV
    grad = state_tile(ds_last_ptr + row * DK * DV, k0, v0, BK, BV, DK, DV)
    after = state_tile(s_last_ptr + row * DK * DV, k0, v0, BK, BV, DK, DV).to(COMPUTE)
    of_k = k0 + tl.arange(0, BK)
    dnorm, norm_after = tl.zeros((BK,), COMPUTE), tl.zeros((BK,), COMPUTE)
    if NORM:
        dnorm = tl.load(dn_last_ptr + row * DK + of_k, mask=of_k < DK, other=0.0)
        norm_after = tl.load(n_last_ptr + row * DK + of_k, mask=of_k < DK, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        here = row * chunks + chunk
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
        for sub in range(0, L, BT):
            t = chunk * L + sub
            at = row * chunks * L + t + tl.arange(0, BT)
            w = tl.load(w_ptr + at) * tl.full((), SCALE, COMPUTE)
            q = tile(q_ptr, q_step, t, time, k0, BT, BK, DK)
            dy = tile(dy_ptr, dy_step, t, time, v0, BT, BV, DV).to(COMPUTE)
            if NORM:
                dnorm += tl.sum((w * tl.load(dn_ptr + at))[:, None] * q.to(COMPUTE), 0)
                w = w * tl.load(rho_ptr + at)
            grad = product(tl.trans(q), w[:, None] * dy, grad, DOT, COMPUTE, PRECISION)
    put_state(ds_first_ptr + row * DK * DV, grad, k0, v0, BK, BV, DK, DV)
    if NORM:
        tl.store(dn_first_ptr + row * DK + of_k, dnorm, mask=(of_k < DK) & (v0 == 0))


@triton.jit
def inner_grad(
    dy_ptr, dy_step, v_ptr, v_step, rho_ptr, dn_ptr, base, t0, i0, j0, time, NORM: tl.constexpr, DOT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dY_i·U_j of BT steps from i0 and from j0, without the gain of the plain form."""
    result = tl.zeros((BT, BT), COMPUTE)
    for vb in range(0, DV, BV):
        dy = tile(dy_ptr, dy_step, t0 + i0, time, vb, BT, BV, DV)
        v = tile(v_ptr, v_step, t0 + j0, time, vb, BT, BV, DV)
        result = product(dy, tl.trans(v), result, DOT, COMPUTE, PRECISION)
    if NORM:
        i = base + i0 + tl.arange(0, BT)
        result = result * tl.load(rho_ptr + i)[:, None] + tl.load(dn_ptr + i)[:, None]
    return result


@triton.jit
def grad_q_kernel(
    q_ptr, q_batch, q_step, k_ptr, k_batch, k_step, v_ptr, v_batch, v_step, dy_ptr, dy_batch, dy_step, dq_ptr, dq_batch,
    dq_step, dq_split, g_ptr, hi_ptr, r_ptr, c_ptr, first_ptr, w_ptr, rho_ptr, dn_ptr, s_ptr, n_ptr, flow_ptr, time,
    chunks, heads, groups, each,
    SCALE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq of BT steps and BK columns, summed over `each` heads of a group, and q·dq of those columns and every head."""
    chunk, i0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT
    k0, t0 = tl.program_id(2) * BK, chunk * L
    splits = heads // groups // each
    split, group = tl.program_id(1) % splits, tl.program_id(1) // splits % groups
    batch = (tl.program_id(1) // (splits * groups)).to(tl.int64)
    rows = tl.num_programs(1).to(tl.int64) * each
    i, of_k = i0 + tl.arange(0, BT), k0 + tl.arange(0, BK)
    total = tl.zeros((BT, BK), COMPUTE)
    for index in range(each):
        head = (group * splits + split) * each + index
        row = batch * heads + head
        base = (row * chunks + chunk) * L
        dy_at, v_at = dy_ptr + batch * dy_batch + head * DV, v_ptr + batch * v_batch + head * DV
        grad = tl.zeros((BT, BK), COMPUTE)
        for vb in range(0, DV, BV):
            dy = tile(dy_at, dy_step, t0 + i0, time, vb, BT, BV, DV)
            state = state_tile(s_ptr + (row * chunks + chunk) * DK * DV, k0, vb, BK, BV, DK, DV)
            grad = product(dy, tl.trans(state), grad, DOT, COMPUTE, PRECISION)
        w = tl.load(w_ptr + base + i)
        if NORM:
            norm = tl.load(n_ptr + (row * chunks + chunk) * DK + of_k, mask=of_k < DK, other=0.0)
            grad = grad * tl.load(rho_ptr + base + i)[:, None] + tl.load(dn_ptr + base + i)[:, None] * norm[None, :]
        grad = grad * w[:, None]
        for j0 in range(0, i0 + BT, BT):
            inner = inner_grad(
                dy_at, dy_step, v_at, v_step, rho_ptr, dn_ptr, base, t0, i0, j0, time,
                NORM, DOT, COMPUTE, PRECISION, DV, BT, BV,
            )  # fmt: skip
            inner = inner * decay(hi_ptr, r_ptr, c_ptr, first_ptr, base, i0, j0, BT)
            if not NORM:
                step = t0 + j0 + tl.arange(0, BT)
                inner = inner * tl.load(g_ptr + row * time + step, mask=step < time, other=0.0)[None, :]
            k = tile(k_ptr + batch * k_batch + group * DK, k_step, t0 + j0, time, k0, BT, BK, DK)
            grad = product(inner, k, grad, DOT, COMPUTE, PRECISION)
        grad = grad * tl.full((), SCALE, COMPUTE)
        q = tile(q_ptr + batch * q_batch + group * DK, q_step, t0 + i0, time, k0, BT, BK, DK).to(COMPUTE)
        tl.store(flow_ptr + tl.program_id(2) * rows * chunks * L + base + i, tl.sum(q * grad, 1))
        total += grad
    dq_ptr += split * dq_split + batch * dq_batch + group * DK
    put(dq_ptr, total, dq_step, t0 + i0, time, k0, BT, BK, DK)


@triton.jit
def grad_k_kernel(
    q_ptr, q_batch, q_step, k_ptr, k_batch, k_step, v_ptr, v_batch, v_step, dy_ptr, dy_batch, dy_step, dk_ptr, dk_batch,
    dk_step, dk_split, g_ptr, hi_ptr, r_ptr, c_ptr, first_ptr, a_ptr, rho_ptr, dn_ptr, ds_ptr, dnorm_ptr, flow_ptr,
    time, chunks, heads, groups, each,
    SCALE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dk likewise, and k·dk without the gain of the plain form: the gradient of the gain."""
    chunk, j0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT
    k0, t0 = tl.program_id(2) * BK, chunk * L
    splits = heads // groups // each
    split, group = tl.program_id(1) % splits, tl.program_id(1) // splits % groups
    batch = (tl.program_id(1) // (splits * groups)).to(tl.int64)
    rows = tl.num_programs(1).to(tl.int64) * each
    j, of_k = j0 + tl.arange(0, BT), k0 + tl.arange(0, BK)
    total = tl.zeros((BT, BK), COMPUTE)
    for index in range(each):
        head = (group * splits + split) * each + index
        row = batch * heads + head
        base = (row * chunks + chunk) * L
        dy_at, v_at = dy_ptr + batch * dy_batch + head * DV, v_ptr + batch * v_batch + head * DV
        grad = tl.zeros((BT, BK), COMPUTE)
        for vb in range(0, DV, BV):
            v = tile(v_at, v_step, t0 + j0, time, vb, BT, BV, DV)
            state = state_tile(ds_ptr + (row * chunks + chunk) * DK * DV, k0, vb, BK, BV, DK, DV)
            grad = product(v, tl.trans(state), grad, DOT, COMPUTE, PRECISION)
        if NORM:
            norm = tl.load(dnorm_ptr + (row * chunks + chunk) * DK + of_k, mask=of_k < DK, other=0.0)
            grad = grad + norm[None, :]
        grad = grad * tl.load(a_ptr + base + j)[:, None]
        for i0 in range(j0, L, BT):
            inner = inner_grad(
                dy_at, dy_step, v_at, v_step, rho_ptr, dn_ptr, base, t0, i0, j0, time,
                NORM, DOT, COMPUTE, PRECISION, DV, BT, BV,
            )  # fmt: skip
            inner = inner * decay(hi_ptr, r_ptr, c_ptr, first_ptr, base, i0, j0, BT) * tl.full((), SCALE, COMPUTE)
            q = tile(q_ptr + batch * q_batch + group * DK, q_step, t0 + i0, time, k0, BT, BK, DK)
            grad = product(tl.trans(inner), q, grad, DOT, COMPUTE, PRECISION)
        k = tile(k_ptr + batch * k_batch + group * DK, k_step, t0 + j0, time, k0, BT, BK, DK).to(COMPUTE)
        tl.store(flow_ptr + tl.program_id(2) * rows * chunks * L + base + j, tl.sum(k * grad, 1))
        if not NORM:
            step = t0 + j
            grad = grad * tl.load(g_ptr + row * time + step, mask=step < time, other=0.0)[:, None]
        total += grad
    dk_ptr += split * dk_split + batch * dk_batch + group * DK
    put(dk_ptr, total, dk_step, t0 + j0, time, k0, BT, BK, DK)


@triton.jit
def grad_v_kernel(
    q_ptr, q_batch, q_step, k_ptr, k_batch, k_step, dy_ptr, dy_batch, dy_step, dv_ptr, dv_batch, dv_step, g_ptr, hi_ptr,
    r_ptr, c_ptr, first_ptr, a_ptr, rho_ptr, ds_ptr, time, chunks, heads, groups,
    SCALE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv of BT steps of a chunk, a head and BV columns."""
    row = tl.program_id(1).to(tl.int64)
    chunk, j0, v0 = tl.program_id(0) // (L // BT), tl.program_id(0) % (L // BT) * BT, tl.program_id(2) * BV
    batch, head = row // heads, row % heads
    group = head // (heads // groups)
    q_ptr += batch * q_batch + group * DK
    k_ptr += batch * k_batch + group * DK
    dy_ptr += batch * dy_batch + head * DV
    dv_ptr += batch * dv_batch + head * DV
    ds_ptr += (row * chunks + chunk) * DK * DV
    base, t0 = (row * chunks + chunk) * L, chunk * L
    grad = tl.zeros((BT, BV), COMPUTE)
    for kb in range(0, DK, BK):
        k = tile(k_ptr, k_step, t0 + j0, time, kb, BT, BK, DK)
        grad = product(k, state_tile(ds_ptr, kb, v0, BK, BV, DK, DV), grad, DOT, COMPUTE, PRECISION)
    grad = grad * tl.load(a_ptr + base + j0 + tl.arange(0, BT))[:, None]
    for i0 in range(j0, L, BT):
        mixed = tl.zeros((BT, BT), COMPUTE)
        for kb in range(0, DK, BK):
            q = tile(q_ptr, q_step, t0 + i0, time, kb, BT, BK, DK)
            k = tile(k_ptr, k_step, t0 + j0, time, kb, BT, BK, DK)
            mixed = product(q, tl.trans(k), mixed, DOT, COMPUTE, PRECISION)
        mixed = mixed * decay(hi_ptr, r_ptr, c_ptr, first_ptr, base, i0, j0, BT) * tl.full((), SCALE, COMPUTE)
        if NORM:
            mixed = mixed * tl.load(rho_ptr + base + i0 + tl.arange(0, BT))[:, None]
        dy = tile(dy_ptr, dy_step, t0 + i0, time, v0, BT, BV, DV)
        grad = product(tl.trans(mixed), dy, grad, DOT, COMPUTE, PRECISION)
    if not NORM:
        step = t0 + j0 + tl.arange(0, BT)
        grad = grad * tl.load(g_ptr + row * time + step, mask=step < time, other=0.0)[:, None]
    put(dv_ptr, grad, dv_step, t0 + j0, time, v0, BT, BV, DV)
