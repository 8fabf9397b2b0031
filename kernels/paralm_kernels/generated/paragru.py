# fmt: off
# mypy: ignore-errors
"""Kernels of the cell 'paragru', generated from its step by paralm_kernels.generate; not edited by hand.

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (h,), (x_z, x_r, x_h), (a_z, a_r, a_h) = state, inputs, params
        z = torch.sigmoid(a_z * h + x_z)
        r = torch.sigmoid(a_r * h + x_r)
        c = torch.tanh(a_h * h * r + x_h)
        return (h + z * (c - h),)  # (1−z) h + z c with one operation fewer

python -m paralm_kernels.generate writes this file again.
"""

import triton
import triton.language as tl

from ..triton_math import add_compensated, finite, largest_size, largest_update, relative_change, sigmoid, tanh


@triton.jit
def step(h, x_z, x_r, x_h, a_z, a_r, a_h):
    """h_t = step(h_{t-1}, x_t; p)."""
    v0 = h + sigmoid(x_z + h * a_z) * (tanh(x_h + sigmoid(x_r + h * a_r) * (h * a_h)) - h)
    next_h = v0
    return next_h


@triton.jit
def linearised(h, x_z, x_r, x_h, a_z, a_r, a_h):
    """The next state, and its Jacobian by the state before."""
    v0 = sigmoid(x_z + h * a_z)
    v1 = sigmoid(x_r + h * a_r)
    v2 = h * a_h
    v3 = tanh(x_h + v1 * v2)
    v4 = v3 - h
    v5 = v0 * (1.0 - v3 * v3)
    v6 = 1.0 - v0 + a_h * (v1 * v5) + a_r * (v2 * v5 * (v1 * (1.0 - v1))) + a_z * (v4 * (v0 * (1.0 - v0)))
    next_h = h + v0 * v4
    j_h_h = v6
    return next_h, j_h_h


@triton.jit
def pullback(h, x_z, x_r, x_h, a_z, a_r, a_h, grad_h):
    """From the cotangents of the next state: those of the state before, of inputs and of params."""
    v0 = sigmoid(x_z + h * a_z)
    v1 = sigmoid(x_r + h * a_r)
    v2 = h * a_h
    v3 = tanh(x_h + v1 * v2)
    v4 = grad_h * v0
    v5 = v4 * (1.0 - v3 * v3)
    v6 = v1 * v5
    v7 = v2 * v5 * (v1 * (1.0 - v1))
    v8 = grad_h * (v3 - h) * (v0 * (1.0 - v0))
    to_h = grad_h - v4 + a_h * v6 + a_r * v7 + a_z * v8
    to_x_z = v8
    to_x_r = v7
    to_x_h = v5
    to_a_z = h * v8
    to_a_r = h * v7
    to_a_h = h * v6
    return to_h, to_x_z, to_x_r, to_x_h, to_a_z, to_a_r, to_a_h


@triton.jit
def load_inputs(x_z_row, x_r_row, x_h_row, offset, mask, COMPUTE: tl.constexpr):
    """The inputs at an offset, in the compute dtype."""
    x_z = tl.load(x_z_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_r = tl.load(x_r_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_h = tl.load(x_h_row + offset, mask=mask, other=0.0).to(COMPUTE)
    return x_z, x_r, x_h


@triton.jit
def load_params(a_z_ptr, a_r_ptr, a_h_ptr, channel, mask):
    """The parameters of some channels."""
    a_z = tl.load(a_z_ptr + channel, mask=mask, other=0.0)
    a_r = tl.load(a_r_ptr + channel, mask=mask, other=0.0)
    a_h = tl.load(a_h_ptr + channel, mask=mask, other=0.0)
    return a_z, a_r, a_h


@triton.jit
def advance(
    h, m_h_h, x_z, x_r, x_h, a_z, a_r, a_h, h_row, reset_row, t, stop, channels, mask, HAS_RESET: tl.constexpr,
    JACOBIAN: tl.constexpr,
):
    """One step of a walk: the state after it, which is stored, and the product of Jacobians."""
    valid = t < stop
    if HAS_RESET:
        cut = tl.load(reset_row + t, mask=valid, other=0) != 0
        h = tl.where(cut, 0.0, h)
    if JACOBIAN:
        next_h, j_h_h = linearised(h, x_z, x_r, x_h, a_z, a_r, a_h)
        new_m_h_h = j_h_h * m_h_h
        if HAS_RESET:
            new_m_h_h = tl.where(cut, 0.0, new_m_h_h)
        m_h_h = tl.where(valid, new_m_h_h, m_h_h)
    else:
        next_h = step(h, x_z, x_r, x_h, a_z, a_r, a_h)
    tl.store(h_row + t * channels, next_h.to(h_row.dtype.element_ty), mask=mask & valid)
    h = tl.where(valid, next_h, h)
    return h, m_h_h


@triton.jit
def walk_piece(
    h, m_h_h, x_z_row, x_r_row, x_h_row, a_z, a_r, a_h, h_row, h_check_row, reset_row, start, stop, x_stride_time,
    channels, mask, tol, HAS_RESET: tl.constexpr, PIECES: tl.constexpr, MEET: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Walks from start to stop, or until the state meets the stored one; start is a multiple of 32.

    With PIECES it carries the product of Jacobians and keeps a checkpoint every 32 steps.
    """
    x_z_0, x_r_0, x_h_0 = load_inputs(
        x_z_row, x_r_row, x_h_row, (start) * x_stride_time, mask & (start < stop), COMPUTE,
    )
    x_z_1, x_r_1, x_h_1 = load_inputs(
        x_z_row, x_r_row, x_h_row, (start + 1) * x_stride_time, mask & (start + 1 < stop), COMPUTE,
    )
    x_z_2, x_r_2, x_h_2 = load_inputs(
        x_z_row, x_r_row, x_h_row, (start + 2) * x_stride_time, mask & (start + 2 < stop), COMPUTE,
    )
    x_z_3, x_r_3, x_h_3 = load_inputs(
        x_z_row, x_r_row, x_h_row, (start + 3) * x_stride_time, mask & (start + 3 < stop), COMPUTE,
    )
    t = start
    met = 0
    while (t < stop) & (met == 0):
        x_z_ahead_0, x_r_ahead_0, x_h_ahead_0 = load_inputs(
            x_z_row, x_r_row, x_h_row, (t + 4) * x_stride_time, mask & (t + 4 < stop), COMPUTE,
        )
        x_z_ahead_1, x_r_ahead_1, x_h_ahead_1 = load_inputs(
            x_z_row, x_r_row, x_h_row, (t + 5) * x_stride_time, mask & (t + 5 < stop), COMPUTE,
        )
        x_z_ahead_2, x_r_ahead_2, x_h_ahead_2 = load_inputs(
            x_z_row, x_r_row, x_h_row, (t + 6) * x_stride_time, mask & (t + 6 < stop), COMPUTE,
        )
        x_z_ahead_3, x_r_ahead_3, x_h_ahead_3 = load_inputs(
            x_z_row, x_r_row, x_h_row, (t + 7) * x_stride_time, mask & (t + 7 < stop), COMPUTE,
        )
        h, m_h_h = advance(
            h, m_h_h, x_z_0, x_r_0, x_h_0, a_z, a_r, a_h, h_row, reset_row, t, stop, channels, mask, HAS_RESET, PIECES,
        )
        h, m_h_h = advance(
            h, m_h_h, x_z_1, x_r_1, x_h_1, a_z, a_r, a_h, h_row, reset_row, t + 1, stop, channels, mask, HAS_RESET,
            PIECES,
        )
        h, m_h_h = advance(
            h, m_h_h, x_z_2, x_r_2, x_h_2, a_z, a_r, a_h, h_row, reset_row, t + 2, stop, channels, mask, HAS_RESET,
            PIECES,
        )
        h, m_h_h = advance(
            h, m_h_h, x_z_3, x_r_3, x_h_3, a_z, a_r, a_h, h_row, reset_row, t + 3, stop, channels, mask, HAS_RESET,
            PIECES,
        )
        x_z_0, x_r_0, x_h_0 = x_z_ahead_0, x_r_ahead_0, x_h_ahead_0
        x_z_1, x_r_1, x_h_1 = x_z_ahead_1, x_r_ahead_1, x_h_ahead_1
        x_z_2, x_r_2, x_h_2 = x_z_ahead_2, x_r_ahead_2, x_h_ahead_2
        x_z_3, x_r_3, x_h_3 = x_z_ahead_3, x_r_ahead_3, x_h_ahead_3
        t += 4
        if PIECES:
            edge = ((t - start) % 32 == 0) | (t >= stop)
            if edge:
                here = (tl.minimum(t, stop) - 1) // 32 * channels
                if MEET:
                    moved = 0.0
                    old = tl.load(h_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(h, old, mask))
                    met = (moved <= tol).to(tl.int32)
                tl.store(h_check_row + here, h, mask=mask & (met == 0))
    return h, m_h_h, tl.minimum(t, stop), met


@triton.jit
def walk_kernel(
    x_z_ptr, x_r_ptr, x_h_ptr, a_z_ptr, a_r_ptr, a_h_ptr, h_first_ptr, h_ptr, h_final_ptr, reset_ptr, time, channels,
    x_stride_batch, x_stride_time, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The sequential walk: one program a batch row and block of channels, the state in registers."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_r_row = x_r_ptr + batch * x_stride_batch + channel
    x_h_row = x_h_ptr + batch * x_stride_batch + channel
    h_row = h_ptr + batch * time * channels + channel
    a_z, a_r, a_h = load_params(a_z_ptr, a_r_ptr, a_h_ptr, channel, mask)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    h, _m_h_h, _t, _met = walk_piece(
        h, h, x_z_row, x_r_row, x_h_row, a_z, a_r, a_h, h_row, h_row, reset_row, batch * 0, time, x_stride_time,
        channels, mask, 0.0, HAS_RESET, False, False, COMPUTE,
    )
    tl.store(h_final_ptr + here, h, mask=mask)


@triton.jit
def decode_kernel(
    x_z_ptr, x_r_ptr, x_h_ptr, a_z_ptr, a_r_ptr, a_h_ptr, h_first_ptr, h_final_ptr, channels, x_stride_batch,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One step, state to state, for generation."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    a_z, a_r, a_h = load_params(a_z_ptr, a_r_ptr, a_h_ptr, channel, mask)
    x_z, x_r, x_h = load_inputs(x_z_ptr, x_r_ptr, x_h_ptr, batch * x_stride_batch + channel, mask, COMPUTE)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    next_h = step(h, x_z, x_r, x_h, a_z, a_r, a_h)
    tl.store(h_final_ptr + here, next_h, mask=mask)


@triton.jit
def compose(first_m_h_h, first_d_h, last_m_h_h, last_d_h):
    """Two affine maps as one: the first, then the last."""
    m_h_h = last_m_h_h * first_m_h_h
    d_h = last_m_h_h * first_d_h + last_d_h
    return m_h_h, d_h


@triton.jit
def previous(h, h_entry, cut, HAS_RESET: tl.constexpr, TILE: tl.constexpr):
    """The state before each step of a tile."""
    row = tl.arange(0, TILE)[:, None]
    back = tl.broadcast_to(tl.maximum(row - 1, 0), h.shape)
    h = tl.where(row == 0, h_entry[None, :], tl.gather(h, back, 0))
    if HAS_RESET:
        h = tl.where(cut, 0.0, h)
    return h


@triton.jit
def tile_kernel(
    x_z_ptr, x_r_ptr, x_h_ptr, a_z_ptr, a_r_ptr, a_h_ptr, h_first_ptr, h_bound_ptr, h_ptr, h_final_ptr, reset_ptr,
    iterations_ptr, update_ptr, time, channels, x_stride_batch, x_stride_time, tol, limit, HAS_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Newton's method, one tile of steps after the other, each solved in registers."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_r_row = x_r_ptr + batch * x_stride_batch + channel
    x_h_row = x_h_ptr + batch * x_stride_batch + channel
    h_row = h_ptr + batch * time * channels + channel
    a_z, a_r, a_h = load_params(a_z_ptr, a_r_ptr, a_h_ptr, channel, mask)
    h_entry = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    h_bound = tl.load(h_bound_ptr + here, mask=mask, other=0.0)
    row = tl.arange(0, TILE)[:, None]
    most = 0
    worst = 0.0
    for first in range(0, time, TILE):
        t = tl.cast(first, tl.int64) + row
        inside = (t < time) & mask[None, :]
        x_z, x_r, x_h = load_inputs(
            x_z_row[None, :], x_r_row[None, :], x_h_row[None, :], t * x_stride_time, inside, COMPUTE,
        )
        cut = False
        if HAS_RESET:
            cut = tl.load(reset_row + t, mask=t < time, other=0) != 0
        h = tl.zeros_like(x_z)
        next_h = step(h, x_z, x_r, x_h, a_z, a_r, a_h)
        h = tl.where(finite(next_h), next_h, 0.0)
        h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
        iterations = 0
        update = float("inf")
        while (iterations < limit) & (update > tol):
            h_before = previous(h, h_entry, cut, HAS_RESET, TILE)
            next_h, j_h_h = linearised(h_before, x_z, x_r, x_h, a_z, a_r, a_h)
            if HAS_RESET:
                j_h_h = tl.where(cut, 0.0, j_h_h)
            _m_h_h, d_h = tl.associative_scan((j_h_h, next_h - h), 0, compose)
            update = 0.0
            h += d_h
            update = tl.maximum(update, largest_update(h, d_h, inside))
            h = tl.where(finite(h), h, tl.where(finite(next_h), next_h, 0.0))
            h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
            iterations += 1
        sweeps = 0
        while (sweeps < TILE) & (update > tol):
            h_before = previous(h, h_entry, cut, HAS_RESET, TILE)
            next_h = step(h_before, x_z, x_r, x_h, a_z, a_r, a_h)
            update = 0.0
            moved = relative_change(next_h, h, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            h = next_h
            sweeps += 1
        most = tl.maximum(most, iterations + sweeps)
        worst = tl.maximum(worst, tl.where(sweeps < TILE, update, 0.0))
        tl.store(h_row[None, :] + t * channels, h.to(h_row.dtype.element_ty), mask=inside)
        last = tl.minimum(first + TILE, time) - 1 - first
        h_entry = tl.sum(tl.where(row == last, h, 0.0), 0)
    tl.store(h_final_ptr + here, h_entry, mask=mask)
    tl.store(iterations_ptr + program, most)
    tl.store(update_ptr + program, worst)


@triton.jit
def segments_kernel(
    x_z_ptr, x_r_ptr, x_h_ptr, a_z_ptr, a_r_ptr, a_h_ptr, h_first_ptr, h_ptr, h_check_ptr, reset_ptr, h_used_ptr,
    h_end_ptr, m_h_h_ptr, h_entry_ptr, walked_ptr, rounds_ptr, batches, length, checks, time, channels, x_stride_batch,
    x_stride_time, tol, AGAIN: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Walks every piece whose entry moved; the first time all, from the initial state and from zero."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks % batches).to(tl.int64)
    piece = program // blocks // batches
    start = piece.to(tl.int64) * length
    stop = tl.minimum(start + length, time)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_r_row = x_r_ptr + batch * x_stride_batch + channel
    x_h_row = x_h_ptr + batch * x_stride_batch + channel
    h_row = h_ptr + batch * time * channels + channel
    a_z, a_r, a_h = load_params(a_z_ptr, a_r_ptr, a_h_ptr, channel, mask)
    h_check_row = h_check_ptr + batch * checks * channels + channel
    at = piece.to(tl.int64) * batches * channels + here
    moved = 1.0
    if AGAIN:
        moved = 0.0
        h_entry = tl.load(h_entry_ptr + at, mask=mask, other=0.0)
        h_used = tl.load(h_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(h_entry, h_used, mask))
    else:
        h_entry = tl.load(h_first_ptr + here, mask=mask & (piece == 0), other=0.0)
    if moved > tol:
        tl.store(h_used_ptr + at, h_entry, mask=mask)
        h = h_entry
        m_h_h = tl.zeros_like(h_entry) + 1.0
        h, m_h_h, t, met = walk_piece(
            h, m_h_h, x_z_row, x_r_row, x_h_row, a_z, a_r, a_h, h_row, h_check_row, reset_row, start, stop,
            x_stride_time, channels, mask, tol, HAS_RESET, True, AGAIN, COMPUTE,
        )
        if met == 0:
            tl.store(h_end_ptr + at, h, mask=mask)
            tl.store(m_h_h_ptr + at, m_h_h, mask=mask)
        if AGAIN:
            walked = tl.load(walked_ptr + program) + (t - start).to(tl.int32)
            tl.store(walked_ptr + program, walked)
            tl.store(rounds_ptr + program, tl.load(rounds_ptr + program) + 1)


@triton.jit
def segments_join_kernel(
    h_first_ptr, h_bound_ptr, h_used_ptr, h_end_ptr, m_h_h_ptr, h_entry_ptr, pieces, batches, channels,
    BLOCK: tl.constexpr,
):
    """The entries of the pieces from the first to the last: s'_{p+1} = y_p + M_p (s'_p - s_p)."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    h_bound = tl.load(h_bound_ptr + here, mask=mask, other=0.0)
    for piece in range(0, pieces):
        at = tl.cast(piece, tl.int64) * batches * channels + here
        tl.store(h_entry_ptr + at, h, mask=mask)
        d_h = h - tl.load(h_used_ptr + at, mask=mask, other=0.0)
        m_h_h = tl.load(m_h_h_ptr + at, mask=mask, other=0.0)
        h_end = tl.load(h_end_ptr + at, mask=mask, other=0.0)
        step_h = m_h_h * d_h
        h = h_end + tl.where(finite(step_h), step_h, 0.0)
        h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))


@triton.jit
def segments_finish_kernel(
    x_z_ptr, x_r_ptr, x_h_ptr, a_z_ptr, a_r_ptr, a_h_ptr, h_first_ptr, h_ptr, h_check_ptr, reset_ptr, h_used_ptr,
    h_end_ptr, m_h_h_ptr, h_final_ptr, last_walked_ptr, last_rounds_ptr, update_ptr, pieces, batches, length, checks,
    time, channels, x_stride_batch, x_stride_time, tol, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Goes through the pieces in order and walks again each that did not start where the one before ends."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_r_row = x_r_ptr + batch * x_stride_batch + channel
    x_h_row = x_h_ptr + batch * x_stride_batch + channel
    h_row = h_ptr + batch * time * channels + channel
    a_z, a_r, a_h = load_params(a_z_ptr, a_r_ptr, a_h_ptr, channel, mask)
    h_check_row = h_check_ptr + batch * checks * channels + channel
    h_entry = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    walked = 0
    pieces_walked = 0
    worst = 0.0
    for piece in range(0, pieces):
        start = tl.cast(piece, tl.int64) * length
        stop = tl.minimum(start + length, time)
        at = tl.cast(piece, tl.int64) * batches * channels + here
        moved = 0.0
        h_used = tl.load(h_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(h_entry, h_used, mask))
        h_end = tl.load(h_end_ptr + at, mask=mask, other=0.0)
        if moved > tol:
            h = h_entry
            m_h_h = tl.zeros_like(h_entry) + 1.0
            h, m_h_h, t, met = walk_piece(
                h, m_h_h, x_z_row, x_r_row, x_h_row, a_z, a_r, a_h, h_row, h_check_row, reset_row, start, stop,
                x_stride_time, channels, mask, tol, HAS_RESET, True, True, COMPUTE,
            )
            h_end = tl.where(met == 0, h, h_end)
            walked += (t - start).to(tl.int32)
            pieces_walked += 1
        else:
            worst = tl.maximum(worst, moved)
        h_entry = h_end
    tl.store(h_final_ptr + here, h_entry, mask=mask)
    tl.store(last_walked_ptr + program, walked)
    tl.store(last_rounds_ptr + program, pieces_walked)
    tl.store(update_ptr + program, worst)


@triton.jit
def load_step(
    x_z_row, x_r_row, x_h_row, h_row, h_first, g_h_row, reset_row, t, valid, x_stride_time, channels, mask,
    HAS_G_H: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Inputs, the state before the step (zero after a reset), cotangents of the state, and whether a reset cuts."""
    x_z, x_r, x_h = load_inputs(x_z_row, x_r_row, x_h_row, t * x_stride_time, mask & valid, COMPUTE)
    h = tl.load(h_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    h = tl.where(t > 0, h, h_first)
    g_h = tl.zeros_like(h)
    if HAS_G_H:
        g_h = tl.load(g_h_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    cut = False
    if HAS_RESET:
        cut = tl.load(reset_row + t, mask=valid, other=0) != 0
        h = tl.where(cut, 0.0, h)
    return x_z, x_r, x_h, h, g_h, cut


@triton.jit
def retreat(
    carry_h, sum_a_z, lost_a_z, sum_a_r, lost_a_r, sum_a_h, lost_a_h, x_z, x_r, x_h, h, g_h, cut, a_z, a_r, a_h,
    to_x_z_row, to_x_r_row, to_x_h_row, t, valid, channels, mask, HAS_RESET: tl.constexpr,
):
    """One step back: stores the gradients of the inputs, adds those of the params, returns the carry before it."""
    to_h, to_x_z, to_x_r, to_x_h, to_a_z, to_a_r, to_a_h = pullback(h, x_z, x_r, x_h, a_z, a_r, a_h, g_h + carry_h)
    tl.store(to_x_z_row + t * channels, to_x_z.to(to_x_z_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_r_row + t * channels, to_x_r.to(to_x_r_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_h_row + t * channels, to_x_h.to(to_x_h_row.dtype.element_ty), mask=mask & valid)
    sum_a_z, lost_a_z = add_compensated(sum_a_z, lost_a_z, tl.where(valid, to_a_z, 0.0))
    sum_a_r, lost_a_r = add_compensated(sum_a_r, lost_a_r, tl.where(valid, to_a_r, 0.0))
    sum_a_h, lost_a_h = add_compensated(sum_a_h, lost_a_h, tl.where(valid, to_a_h, 0.0))
    if HAS_RESET:
        to_h = tl.where(cut, 0.0, to_h)
    carry_h = tl.where(valid, to_h, carry_h)
    return carry_h, sum_a_z, lost_a_z, sum_a_r, lost_a_r, sum_a_h, lost_a_h


@triton.jit
def backward_kernel(
    x_z_ptr, x_r_ptr, x_h_ptr, a_z_ptr, a_r_ptr, a_h_ptr, h_first_ptr, h_ptr, g_h_ptr, reset_ptr, carry_h_ptr,
    to_x_z_ptr, to_x_r_ptr, to_x_h_ptr, to_a_z_ptr, to_a_r_ptr, to_a_h_ptr, to_h_first_ptr, batches, length, time,
    channels, x_stride_batch, x_stride_time, HAS_G_H: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Walks every piece back from its carry; the sums over its steps of the params' gradients go to its own row."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks % batches).to(tl.int64)
    piece = program // blocks // batches
    start = piece.to(tl.int64) * length
    stop = tl.minimum(start + length, time)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_r_row = x_r_ptr + batch * x_stride_batch + channel
    x_h_row = x_h_ptr + batch * x_stride_batch + channel
    h_row = h_ptr + batch * time * channels + channel
    g_h_row = g_h_ptr + batch * time * channels + channel
    to_x_z_row = to_x_z_ptr + batch * time * channels + channel
    to_x_r_row = to_x_r_ptr + batch * time * channels + channel
    to_x_h_row = to_x_h_ptr + batch * time * channels + channel
    a_z, a_r, a_h = load_params(a_z_ptr, a_r_ptr, a_h_ptr, channel, mask)
    h_first = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    at = piece.to(tl.int64) * batches * channels + here
    carry_h = tl.load(carry_h_ptr + at, mask=mask, other=0.0)
    sum_a_z = tl.zeros_like(carry_h)
    lost_a_z = tl.zeros_like(carry_h)
    sum_a_r = tl.zeros_like(carry_h)
    lost_a_r = tl.zeros_like(carry_h)
    sum_a_h = tl.zeros_like(carry_h)
    lost_a_h = tl.zeros_like(carry_h)
    x_z_0, x_r_0, x_h_0, h_0, g_h_0, cut_0 = load_step(
        x_z_row, x_r_row, x_h_row, h_row, h_first, g_h_row, reset_row, stop - 1, stop - 1 >= start, x_stride_time,
        channels, mask, HAS_G_H, HAS_RESET, COMPUTE,
    )
    x_z_1, x_r_1, x_h_1, h_1, g_h_1, cut_1 = load_step(
        x_z_row, x_r_row, x_h_row, h_row, h_first, g_h_row, reset_row, stop - 2, stop - 2 >= start, x_stride_time,
        channels, mask, HAS_G_H, HAS_RESET, COMPUTE,
    )
    t = stop - 1
    while t >= start:
        x_z_ahead_0, x_r_ahead_0, x_h_ahead_0, h_ahead_0, g_h_ahead_0, cut_ahead_0 = load_step(
            x_z_row, x_r_row, x_h_row, h_row, h_first, g_h_row, reset_row, t - 2, t - 2 >= start, x_stride_time,
            channels, mask, HAS_G_H, HAS_RESET, COMPUTE,
        )
        x_z_ahead_1, x_r_ahead_1, x_h_ahead_1, h_ahead_1, g_h_ahead_1, cut_ahead_1 = load_step(
            x_z_row, x_r_row, x_h_row, h_row, h_first, g_h_row, reset_row, t - 3, t - 3 >= start, x_stride_time,
            channels, mask, HAS_G_H, HAS_RESET, COMPUTE,
        )
        carry_h, sum_a_z, lost_a_z, sum_a_r, lost_a_r, sum_a_h, lost_a_h = retreat(
            carry_h, sum_a_z, lost_a_z, sum_a_r, lost_a_r, sum_a_h, lost_a_h, x_z_0, x_r_0, x_h_0, h_0, g_h_0, cut_0,
            a_z, a_r, a_h, to_x_z_row, to_x_r_row, to_x_h_row, t, t >= start, channels, mask, HAS_RESET,
        )
        carry_h, sum_a_z, lost_a_z, sum_a_r, lost_a_r, sum_a_h, lost_a_h = retreat(
            carry_h, sum_a_z, lost_a_z, sum_a_r, lost_a_r, sum_a_h, lost_a_h, x_z_1, x_r_1, x_h_1, h_1, g_h_1, cut_1,
            a_z, a_r, a_h, to_x_z_row, to_x_r_row, to_x_h_row, t - 1, t - 1 >= start, channels, mask, HAS_RESET,
        )
        x_z_0 = x_z_ahead_0
        x_r_0 = x_r_ahead_0
        x_h_0 = x_h_ahead_0
        h_0 = h_ahead_0
        g_h_0 = g_h_ahead_0
        cut_0 = cut_ahead_0
        x_z_1 = x_z_ahead_1
        x_r_1 = x_r_ahead_1
        x_h_1 = x_h_ahead_1
        h_1 = h_ahead_1
        g_h_1 = g_h_ahead_1
        cut_1 = cut_ahead_1
        t -= 2
    tl.store(to_a_z_ptr + at, sum_a_z, mask=mask)
    tl.store(to_a_r_ptr + at, sum_a_r, mask=mask)
    tl.store(to_a_h_ptr + at, sum_a_h, mask=mask)
    tl.store(to_h_first_ptr + here, carry_h, mask=mask & (piece == 0))


@triton.jit
def backward_maps_kernel(
    x_z_ptr, x_r_ptr, x_h_ptr, a_z_ptr, a_r_ptr, a_h_ptr, h_first_ptr, h_ptr, g_h_ptr, reset_ptr, m_h_h_ptr, d_h_ptr,
    steps_ptr, batches, length, time, channels, x_stride_batch, x_stride_time, HAS_G_H: tl.constexpr,
    HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
):
    """The map from the carry at a piece's end to that at its start, read until the rest cannot be seen."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks % batches).to(tl.int64)
    piece = program // blocks // batches
    start = piece.to(tl.int64) * length
    stop = tl.minimum(start + length, time)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_r_row = x_r_ptr + batch * x_stride_batch + channel
    x_h_row = x_h_ptr + batch * x_stride_batch + channel
    h_row = h_ptr + batch * time * channels + channel
    g_h_row = g_h_ptr + batch * time * channels + channel
    a_z, a_r, a_h = load_params(a_z_ptr, a_r_ptr, a_h_ptr, channel, mask)
    h_first = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    m_h_h = tl.zeros_like(h_first) + 1.0
    d_h = tl.zeros_like(h_first)
    x_z_0, x_r_0, x_h_0, h_0, g_h_0, cut_0 = load_step(
        x_z_row, x_r_row, x_h_row, h_row, h_first, g_h_row, reset_row, start, start < stop, x_stride_time, channels,
        mask, HAS_G_H, HAS_RESET, COMPUTE,
    )
    t = start
    inside = 1.0
    while (t < stop) & (inside > TINY):
        x_z_ahead_0, x_r_ahead_0, x_h_ahead_0, h_ahead_0, g_h_ahead_0, cut_ahead_0 = load_step(
            x_z_row, x_r_row, x_h_row, h_row, h_first, g_h_row, reset_row, t + 1, t + 1 < stop, x_stride_time, channels,
            mask, HAS_G_H, HAS_RESET, COMPUTE,
        )
        _next_h, j_h_h = linearised(h_0, x_z_0, x_r_0, x_h_0, a_z, a_r, a_h)
        new_m_h_h = m_h_h * j_h_h
        inside = 0.0
        if HAS_RESET:
            new_m_h_h = tl.where(cut_0, 0.0, new_m_h_h)
        m_h_h = tl.zeros_like(m_h_h) + new_m_h_h
        inside = tl.maximum(inside, largest_size(m_h_h, mask))
        d_h += m_h_h * g_h_0
        x_z_0 = x_z_ahead_0
        x_r_0 = x_r_ahead_0
        x_h_0 = x_h_ahead_0
        h_0 = h_ahead_0
        g_h_0 = g_h_ahead_0
        cut_0 = cut_ahead_0
        t += 1
    at = piece.to(tl.int64) * batches * channels + here
    tl.store(m_h_h_ptr + at, m_h_h, mask=mask)
    tl.store(d_h_ptr + at, d_h, mask=mask)
    tl.store(steps_ptr + program, (t - start).to(tl.int32))


@triton.jit
def backward_join_kernel(
    m_h_h_ptr, d_h_ptr, g_h_final_ptr, carry_h_ptr, pieces, batches, channels, BLOCK: tl.constexpr,
):
    """The carry at the end of every piece, from the last piece to the first."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    carry_h = tl.load(g_h_final_ptr + here, mask=mask, other=0.0)
    for back in range(0, pieces):
        at = (tl.cast(pieces - 1, tl.int64) - back) * batches * channels + here
        tl.store(carry_h_ptr + at, carry_h, mask=mask)
        m_h_h = tl.load(m_h_h_ptr + at, mask=mask, other=0.0)
        d_h = tl.load(d_h_ptr + at, mask=mask, other=0.0)
        new_carry_h = m_h_h * carry_h + d_h
        carry_h = new_carry_h
