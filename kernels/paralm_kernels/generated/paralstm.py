# fmt: off
# ruff: noqa: RUF059
# mypy: ignore-errors
"""Kernels of the cell 'paralstm', generated from its step by paralm_kernels.generate; not edited by hand.

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (c, h), (x_f, x_c, x_o), (a_f, a_c, a_o, p_f, p_o) = state, inputs, params
        f = torch.sigmoid(a_f * h + x_f + p_f * c)
        g = torch.tanh(a_c * h + x_c)
        c = g + f * (c - g)  # f c + (1−f) g with one operation fewer
        o = torch.sigmoid(a_o * h + x_o + p_o * c)
        return (c, o * torch.tanh(c))

python -m paralm_kernels.generate writes this file again.
"""

import triton
import triton.language as tl

from ..triton_math import add_compensated, finite, largest_size, largest_update, relative_change, sigmoid, tanh


@triton.jit
def step(c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o):
    """h_t = step(h_{t-1}, x_t; p)."""
    v0 = tanh(x_c + h * a_c)
    v1 = v0 + sigmoid(x_f + h * a_f + c * p_f) * (c - v0)
    next_c = v1
    next_h = sigmoid(x_o + h * a_o + p_o * v1) * tanh(v1)
    return next_c, next_h


@triton.jit
def linearised(c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o):
    """The next state, and its Jacobian by the state before."""
    v0 = sigmoid(x_f + h * a_f + c * p_f)
    v1 = tanh(x_c + h * a_c)
    v2 = c - v1
    v3 = v1 + v0 * v2
    v4 = sigmoid(x_o + h * a_o + p_o * v3)
    v5 = tanh(v3)
    v6 = v2 * (v0 * (1.0 - v0))
    v7 = v5 * (v4 * (1.0 - v4))
    v8 = v4 * (1.0 - v5 * v5) + p_o * v7
    v9 = v0 * v8
    v10 = v2 * v8 * (v0 * (1.0 - v0))
    next_c = v3
    next_h = v4 * v5
    j_c_c = v0 + p_f * v6
    j_c_h = a_c * ((1.0 - v0) * (1.0 - v1 * v1)) + a_f * v6
    j_h_c = v9 + p_f * v10
    j_h_h = a_o * v7 + a_c * ((v8 - v9) * (1.0 - v1 * v1)) + a_f * v10
    return next_c, next_h, j_c_c, j_c_h, j_h_c, j_h_h


@triton.jit
def pullback(c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o, grad_c, grad_h):
    """From the cotangents of the next state: those of the state before, of inputs and of params."""
    v0 = sigmoid(x_f + h * a_f + c * p_f)
    v1 = tanh(x_c + h * a_c)
    v2 = c - v1
    v3 = v1 + v0 * v2
    v4 = sigmoid(x_o + h * a_o + p_o * v3)
    v5 = tanh(v3)
    v6 = grad_h * v5 * (v4 * (1.0 - v4))
    v7 = grad_c + grad_h * v4 * (1.0 - v5 * v5) + p_o * v6
    v8 = v0 * v7
    v9 = (v7 - v8) * (1.0 - v1 * v1)
    v10 = v2 * v7 * (v0 * (1.0 - v0))
    to_c = v8 + p_f * v10
    to_h = a_o * v6 + a_c * v9 + a_f * v10
    to_x_f = v10
    to_x_c = v9
    to_x_o = v6
    to_a_f = h * v10
    to_a_c = h * v9
    to_a_o = h * v6
    to_p_f = c * v10
    to_p_o = v3 * v6
    return to_c, to_h, to_x_f, to_x_c, to_x_o, to_a_f, to_a_c, to_a_o, to_p_f, to_p_o


@triton.jit
def load_inputs(x_f_row, x_c_row, x_o_row, offset, mask, COMPUTE: tl.constexpr):
    """The inputs at an offset, in the compute dtype."""
    x_f = tl.load(x_f_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_c = tl.load(x_c_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_o = tl.load(x_o_row + offset, mask=mask, other=0.0).to(COMPUTE)
    return x_f, x_c, x_o


@triton.jit
def load_params(a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, channel, mask):
    """The parameters of some channels."""
    a_f = tl.load(a_f_ptr + channel, mask=mask, other=0.0)
    a_c = tl.load(a_c_ptr + channel, mask=mask, other=0.0)
    a_o = tl.load(a_o_ptr + channel, mask=mask, other=0.0)
    p_f = tl.load(p_f_ptr + channel, mask=mask, other=0.0)
    p_o = tl.load(p_o_ptr + channel, mask=mask, other=0.0)
    return a_f, a_c, a_o, p_f, p_o


@triton.jit
def advance(
    c, h, m_c_c, m_c_h, m_h_c, m_h_h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o, c_row, h_row, reset_row, t, stop,
    channels, mask, HAS_RESET: tl.constexpr, JACOBIAN: tl.constexpr,
):
    """One step of a walk: the state after it, which is stored, and the product of Jacobians."""
    valid = t < stop
    if HAS_RESET:
        cut = tl.load(reset_row + t, mask=valid, other=0) != 0
        c = tl.where(cut, 0.0, c)
        h = tl.where(cut, 0.0, h)
    if JACOBIAN:
        next_c, next_h, j_c_c, j_c_h, j_h_c, j_h_h = linearised(c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o)
        new_m_c_c = j_c_c * m_c_c + j_c_h * m_h_c
        new_m_c_h = j_c_c * m_c_h + j_c_h * m_h_h
        new_m_h_c = j_h_c * m_c_c + j_h_h * m_h_c
        new_m_h_h = j_h_c * m_c_h + j_h_h * m_h_h
        if HAS_RESET:
            new_m_c_c = tl.where(cut, 0.0, new_m_c_c)
            new_m_c_h = tl.where(cut, 0.0, new_m_c_h)
            new_m_h_c = tl.where(cut, 0.0, new_m_h_c)
            new_m_h_h = tl.where(cut, 0.0, new_m_h_h)
        m_c_c = tl.where(valid, new_m_c_c, m_c_c)
        m_c_h = tl.where(valid, new_m_c_h, m_c_h)
        m_h_c = tl.where(valid, new_m_h_c, m_h_c)
        m_h_h = tl.where(valid, new_m_h_h, m_h_h)
    else:
        next_c, next_h = step(c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o)
    tl.store(c_row + t * channels, next_c.to(c_row.dtype.element_ty), mask=mask & valid)
    tl.store(h_row + t * channels, next_h.to(h_row.dtype.element_ty), mask=mask & valid)
    c = tl.where(valid, next_c, c)
    h = tl.where(valid, next_h, h)
    return c, h, m_c_c, m_c_h, m_h_c, m_h_h


@triton.jit
def walk_piece(
    c, h, m_c_c, m_c_h, m_h_c, m_h_h, x_f_row, x_c_row, x_o_row, a_f, a_c, a_o, p_f, p_o, c_row, h_row, c_check_row,
    h_check_row, reset_row, start, stop, x_stride_time, channels, mask, tol, HAS_RESET: tl.constexpr,
    PIECES: tl.constexpr, MEET: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Walks from start to stop, or until the state meets the stored one; start is a multiple of 32.

    With PIECES it carries the product of Jacobians and keeps a checkpoint every 32 steps.
    """
    x_f_0, x_c_0, x_o_0 = load_inputs(
        x_f_row, x_c_row, x_o_row, (start) * x_stride_time, mask & (start < stop), COMPUTE,
    )
    x_f_1, x_c_1, x_o_1 = load_inputs(
        x_f_row, x_c_row, x_o_row, (start + 1) * x_stride_time, mask & (start + 1 < stop), COMPUTE,
    )
    x_f_2, x_c_2, x_o_2 = load_inputs(
        x_f_row, x_c_row, x_o_row, (start + 2) * x_stride_time, mask & (start + 2 < stop), COMPUTE,
    )
    x_f_3, x_c_3, x_o_3 = load_inputs(
        x_f_row, x_c_row, x_o_row, (start + 3) * x_stride_time, mask & (start + 3 < stop), COMPUTE,
    )
    t = start
    met = 0
    while (t < stop) & (met == 0):
        x_f_ahead_0, x_c_ahead_0, x_o_ahead_0 = load_inputs(
            x_f_row, x_c_row, x_o_row, (t + 4) * x_stride_time, mask & (t + 4 < stop), COMPUTE,
        )
        x_f_ahead_1, x_c_ahead_1, x_o_ahead_1 = load_inputs(
            x_f_row, x_c_row, x_o_row, (t + 5) * x_stride_time, mask & (t + 5 < stop), COMPUTE,
        )
        x_f_ahead_2, x_c_ahead_2, x_o_ahead_2 = load_inputs(
            x_f_row, x_c_row, x_o_row, (t + 6) * x_stride_time, mask & (t + 6 < stop), COMPUTE,
        )
        x_f_ahead_3, x_c_ahead_3, x_o_ahead_3 = load_inputs(
            x_f_row, x_c_row, x_o_row, (t + 7) * x_stride_time, mask & (t + 7 < stop), COMPUTE,
        )
        c, h, m_c_c, m_c_h, m_h_c, m_h_h = advance(
            c, h, m_c_c, m_c_h, m_h_c, m_h_h, x_f_0, x_c_0, x_o_0, a_f, a_c, a_o, p_f, p_o, c_row, h_row, reset_row, t,
            stop, channels, mask, HAS_RESET, PIECES,
        )
        c, h, m_c_c, m_c_h, m_h_c, m_h_h = advance(
            c, h, m_c_c, m_c_h, m_h_c, m_h_h, x_f_1, x_c_1, x_o_1, a_f, a_c, a_o, p_f, p_o, c_row, h_row, reset_row,
            t + 1, stop, channels, mask, HAS_RESET, PIECES,
        )
        c, h, m_c_c, m_c_h, m_h_c, m_h_h = advance(
            c, h, m_c_c, m_c_h, m_h_c, m_h_h, x_f_2, x_c_2, x_o_2, a_f, a_c, a_o, p_f, p_o, c_row, h_row, reset_row,
            t + 2, stop, channels, mask, HAS_RESET, PIECES,
        )
        c, h, m_c_c, m_c_h, m_h_c, m_h_h = advance(
            c, h, m_c_c, m_c_h, m_h_c, m_h_h, x_f_3, x_c_3, x_o_3, a_f, a_c, a_o, p_f, p_o, c_row, h_row, reset_row,
            t + 3, stop, channels, mask, HAS_RESET, PIECES,
        )
        x_f_0, x_c_0, x_o_0 = x_f_ahead_0, x_c_ahead_0, x_o_ahead_0
        x_f_1, x_c_1, x_o_1 = x_f_ahead_1, x_c_ahead_1, x_o_ahead_1
        x_f_2, x_c_2, x_o_2 = x_f_ahead_2, x_c_ahead_2, x_o_ahead_2
        x_f_3, x_c_3, x_o_3 = x_f_ahead_3, x_c_ahead_3, x_o_ahead_3
        t += 4
        if PIECES:
            edge = ((t - start) % 32 == 0) | (t >= stop)
            if edge:
                here = (tl.minimum(t, stop) - 1) // 32 * channels
                if MEET:
                    moved = 0.0
                    old = tl.load(c_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(c, old, mask))
                    old = tl.load(h_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(h, old, mask))
                    met = (moved <= tol).to(tl.int32)
                tl.store(c_check_row + here, c, mask=mask & (met == 0))
                tl.store(h_check_row + here, h, mask=mask & (met == 0))
    return c, h, m_c_c, m_c_h, m_h_c, m_h_h, tl.minimum(t, stop), met


@triton.jit
def walk_kernel(
    x_f_ptr, x_c_ptr, x_o_ptr, a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, c_first_ptr, h_first_ptr, c_ptr, h_ptr,
    c_final_ptr, h_final_ptr, reset_ptr, time, channels, x_stride_batch, x_stride_time, HAS_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The sequential walk: one program a batch row and block of channels, the state in registers."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_c_row = x_c_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    c_row = c_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    a_f, a_c, a_o, p_f, p_o = load_params(a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, channel, mask)
    c = tl.load(c_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    c, h, _m_c_c, _m_c_h, _m_h_c, _m_h_h, _t, _met = walk_piece(
        c, h, c, c, c, c, x_f_row, x_c_row, x_o_row, a_f, a_c, a_o, p_f, p_o, c_row, h_row, c_row, h_row, reset_row,
        batch * 0, time, x_stride_time, channels, mask, 0.0, HAS_RESET, False, False, COMPUTE,
    )
    tl.store(c_final_ptr + here, c, mask=mask)
    tl.store(h_final_ptr + here, h, mask=mask)


@triton.jit
def decode_kernel(
    x_f_ptr, x_c_ptr, x_o_ptr, a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, c_first_ptr, h_first_ptr, c_final_ptr,
    h_final_ptr, channels, x_stride_batch, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One step, state to state, for generation."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    a_f, a_c, a_o, p_f, p_o = load_params(a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, channel, mask)
    x_f, x_c, x_o = load_inputs(x_f_ptr, x_c_ptr, x_o_ptr, batch * x_stride_batch + channel, mask, COMPUTE)
    c = tl.load(c_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    next_c, next_h = step(c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o)
    tl.store(c_final_ptr + here, next_c, mask=mask)
    tl.store(h_final_ptr + here, next_h, mask=mask)


@triton.jit
def compose(
    first_m_c_c, first_m_c_h, first_m_h_c, first_m_h_h, first_d_c, first_d_h, last_m_c_c, last_m_c_h, last_m_h_c,
    last_m_h_h, last_d_c, last_d_h,
):
    """Two affine maps as one: the first, then the last."""
    m_c_c = last_m_c_c * first_m_c_c + last_m_c_h * first_m_h_c
    m_c_h = last_m_c_c * first_m_c_h + last_m_c_h * first_m_h_h
    m_h_c = last_m_h_c * first_m_c_c + last_m_h_h * first_m_h_c
    m_h_h = last_m_h_c * first_m_c_h + last_m_h_h * first_m_h_h
    d_c = last_m_c_c * first_d_c + last_m_c_h * first_d_h + last_d_c
    d_h = last_m_h_c * first_d_c + last_m_h_h * first_d_h + last_d_h
    return m_c_c, m_c_h, m_h_c, m_h_h, d_c, d_h


@triton.jit
def previous(c, h, c_entry, h_entry, cut, HAS_RESET: tl.constexpr, TILE: tl.constexpr):
    """The state before each step of a tile."""
    row = tl.arange(0, TILE)[:, None]
    back = tl.broadcast_to(tl.maximum(row - 1, 0), c.shape)
    c = tl.where(row == 0, c_entry[None, :], tl.gather(c, back, 0))
    h = tl.where(row == 0, h_entry[None, :], tl.gather(h, back, 0))
    if HAS_RESET:
        c = tl.where(cut, 0.0, c)
        h = tl.where(cut, 0.0, h)
    return c, h


@triton.jit
def tile_kernel(
    x_f_ptr, x_c_ptr, x_o_ptr, a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, c_first_ptr, h_first_ptr, c_bound_ptr,
    h_bound_ptr, c_ptr, h_ptr, c_final_ptr, h_final_ptr, reset_ptr, iterations_ptr, update_ptr, time, channels,
    x_stride_batch, x_stride_time, tol, limit, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Newton's method, one tile of steps after the other, each solved in registers."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_c_row = x_c_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    c_row = c_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    a_f, a_c, a_o, p_f, p_o = load_params(a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, channel, mask)
    c_entry = tl.load(c_first_ptr + here, mask=mask, other=0.0)
    h_entry = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    c_bound = tl.load(c_bound_ptr + here, mask=mask, other=0.0)
    h_bound = tl.load(h_bound_ptr + here, mask=mask, other=0.0)
    row = tl.arange(0, TILE)[:, None]
    most = 0
    worst = 0.0
    for first in range(0, time, TILE):
        t = tl.cast(first, tl.int64) + row
        inside = (t < time) & mask[None, :]
        x_f, x_c, x_o = load_inputs(
            x_f_row[None, :], x_c_row[None, :], x_o_row[None, :], t * x_stride_time, inside, COMPUTE,
        )
        cut = False
        if HAS_RESET:
            cut = tl.load(reset_row + t, mask=t < time, other=0) != 0
        c = tl.zeros_like(x_f)
        h = tl.zeros_like(x_f)
        next_c, next_h = step(c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o)
        c = tl.where(finite(next_c), next_c, 0.0)
        h = tl.where(finite(next_h), next_h, 0.0)
        c = tl.where(c > c_bound, c_bound, tl.where(c < -c_bound, -c_bound, c))
        h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
        iterations = 0
        update = float("inf")
        while (iterations < limit) & (update > tol):
            c_before, h_before = previous(c, h, c_entry, h_entry, cut, HAS_RESET, TILE)
            next_c, next_h, j_c_c, j_c_h, j_h_c, j_h_h = linearised(
                c_before, h_before, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o,
            )
            if HAS_RESET:
                j_c_c = tl.where(cut, 0.0, j_c_c)
                j_c_h = tl.where(cut, 0.0, j_c_h)
                j_h_c = tl.where(cut, 0.0, j_h_c)
                j_h_h = tl.where(cut, 0.0, j_h_h)
            _m_c_c, _m_c_h, _m_h_c, _m_h_h, d_c, d_h = tl.associative_scan(
                (j_c_c, j_c_h, j_h_c, j_h_h, next_c - c, next_h - h), 0, compose,
            )
            update = 0.0
            c += d_c
            update = tl.maximum(update, largest_update(c, d_c, inside))
            c = tl.where(finite(c), c, tl.where(finite(next_c), next_c, 0.0))
            c = tl.where(c > c_bound, c_bound, tl.where(c < -c_bound, -c_bound, c))
            h += d_h
            update = tl.maximum(update, largest_update(h, d_h, inside))
            h = tl.where(finite(h), h, tl.where(finite(next_h), next_h, 0.0))
            h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
            iterations += 1
        sweeps = 0
        while (sweeps < TILE) & (update > tol):
            c_before, h_before = previous(c, h, c_entry, h_entry, cut, HAS_RESET, TILE)
            next_c, next_h = step(c_before, h_before, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o)
            update = 0.0
            moved = relative_change(next_c, c, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            c = next_c
            moved = relative_change(next_h, h, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            h = next_h
            sweeps += 1
        most = tl.maximum(most, iterations + sweeps)
        worst = tl.maximum(worst, tl.where(sweeps < TILE, update, 0.0))
        tl.store(c_row[None, :] + t * channels, c.to(c_row.dtype.element_ty), mask=inside)
        tl.store(h_row[None, :] + t * channels, h.to(h_row.dtype.element_ty), mask=inside)
        last = tl.minimum(first + TILE, time) - 1 - first
        c_entry = tl.sum(tl.where(row == last, c, 0.0), 0)
        h_entry = tl.sum(tl.where(row == last, h, 0.0), 0)
    tl.store(c_final_ptr + here, c_entry, mask=mask)
    tl.store(h_final_ptr + here, h_entry, mask=mask)
    tl.store(iterations_ptr + program, most)
    tl.store(update_ptr + program, worst)


@triton.jit
def segments_kernel(
    x_f_ptr, x_c_ptr, x_o_ptr, a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, c_first_ptr, h_first_ptr, c_ptr, h_ptr,
    c_check_ptr, h_check_ptr, reset_ptr, c_used_ptr, h_used_ptr, c_end_ptr, h_end_ptr, m_c_c_ptr, m_c_h_ptr, m_h_c_ptr,
    m_h_h_ptr, c_entry_ptr, h_entry_ptr, walked_ptr, rounds_ptr, batches, length, checks, time, channels,
    x_stride_batch, x_stride_time, tol, AGAIN: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
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
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_c_row = x_c_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    c_row = c_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    a_f, a_c, a_o, p_f, p_o = load_params(a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, channel, mask)
    c_check_row = c_check_ptr + batch * checks * channels + channel
    h_check_row = h_check_ptr + batch * checks * channels + channel
    at = piece.to(tl.int64) * batches * channels + here
    moved = 1.0
    if AGAIN:
        moved = 0.0
        c_entry = tl.load(c_entry_ptr + at, mask=mask, other=0.0)
        c_used = tl.load(c_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(c_entry, c_used, mask))
        h_entry = tl.load(h_entry_ptr + at, mask=mask, other=0.0)
        h_used = tl.load(h_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(h_entry, h_used, mask))
    else:
        c_entry = tl.load(c_first_ptr + here, mask=mask & (piece == 0), other=0.0)
        h_entry = tl.load(h_first_ptr + here, mask=mask & (piece == 0), other=0.0)
    if moved > tol:
        tl.store(c_used_ptr + at, c_entry, mask=mask)
        tl.store(h_used_ptr + at, h_entry, mask=mask)
        c = c_entry
        h = h_entry
        m_c_c = tl.zeros_like(c_entry) + 1.0
        m_c_h = tl.zeros_like(c_entry) + 0.0
        m_h_c = tl.zeros_like(c_entry) + 0.0
        m_h_h = tl.zeros_like(c_entry) + 1.0
        c, h, m_c_c, m_c_h, m_h_c, m_h_h, t, met = walk_piece(
            c, h, m_c_c, m_c_h, m_h_c, m_h_h, x_f_row, x_c_row, x_o_row, a_f, a_c, a_o, p_f, p_o, c_row, h_row,
            c_check_row, h_check_row, reset_row, start, stop, x_stride_time, channels, mask, tol, HAS_RESET, True,
            AGAIN, COMPUTE,
        )
        if met == 0:
            tl.store(c_end_ptr + at, c, mask=mask)
            tl.store(h_end_ptr + at, h, mask=mask)
            tl.store(m_c_c_ptr + at, m_c_c, mask=mask)
            tl.store(m_c_h_ptr + at, m_c_h, mask=mask)
            tl.store(m_h_c_ptr + at, m_h_c, mask=mask)
            tl.store(m_h_h_ptr + at, m_h_h, mask=mask)
        if AGAIN:
            walked = tl.load(walked_ptr + program) + (t - start).to(tl.int32)
            tl.store(walked_ptr + program, walked)
            tl.store(rounds_ptr + program, tl.load(rounds_ptr + program) + 1)


@triton.jit
def segments_join_kernel(
    c_first_ptr, h_first_ptr, c_bound_ptr, h_bound_ptr, c_used_ptr, h_used_ptr, c_end_ptr, h_end_ptr, m_c_c_ptr,
    m_c_h_ptr, m_h_c_ptr, m_h_h_ptr, c_entry_ptr, h_entry_ptr, pieces, batches, channels, BLOCK: tl.constexpr,
):
    """The entries of the pieces from the first to the last: s'_{p+1} = y_p + M_p (s'_p - s_p)."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    c = tl.load(c_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    c_bound = tl.load(c_bound_ptr + here, mask=mask, other=0.0)
    h_bound = tl.load(h_bound_ptr + here, mask=mask, other=0.0)
    for piece in range(0, pieces):
        at = tl.cast(piece, tl.int64) * batches * channels + here
        tl.store(c_entry_ptr + at, c, mask=mask)
        d_c = c - tl.load(c_used_ptr + at, mask=mask, other=0.0)
        tl.store(h_entry_ptr + at, h, mask=mask)
        d_h = h - tl.load(h_used_ptr + at, mask=mask, other=0.0)
        m_c_c = tl.load(m_c_c_ptr + at, mask=mask, other=0.0)
        m_c_h = tl.load(m_c_h_ptr + at, mask=mask, other=0.0)
        m_h_c = tl.load(m_h_c_ptr + at, mask=mask, other=0.0)
        m_h_h = tl.load(m_h_h_ptr + at, mask=mask, other=0.0)
        c_end = tl.load(c_end_ptr + at, mask=mask, other=0.0)
        step_c = m_c_c * d_c + m_c_h * d_h
        c = c_end + tl.where(finite(step_c), step_c, 0.0)
        c = tl.where(c > c_bound, c_bound, tl.where(c < -c_bound, -c_bound, c))
        h_end = tl.load(h_end_ptr + at, mask=mask, other=0.0)
        step_h = m_h_c * d_c + m_h_h * d_h
        h = h_end + tl.where(finite(step_h), step_h, 0.0)
        h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))


@triton.jit
def segments_finish_kernel(
    x_f_ptr, x_c_ptr, x_o_ptr, a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, c_first_ptr, h_first_ptr, c_ptr, h_ptr,
    c_check_ptr, h_check_ptr, reset_ptr, c_used_ptr, h_used_ptr, c_end_ptr, h_end_ptr, m_c_c_ptr, m_c_h_ptr, m_h_c_ptr,
    m_h_h_ptr, c_final_ptr, h_final_ptr, last_walked_ptr, last_rounds_ptr, update_ptr, pieces, batches, length, checks,
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
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_c_row = x_c_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    c_row = c_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    a_f, a_c, a_o, p_f, p_o = load_params(a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, channel, mask)
    c_check_row = c_check_ptr + batch * checks * channels + channel
    h_check_row = h_check_ptr + batch * checks * channels + channel
    c_entry = tl.load(c_first_ptr + here, mask=mask, other=0.0)
    h_entry = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    walked = 0
    pieces_walked = 0
    worst = 0.0
    for piece in range(0, pieces):
        start = tl.cast(piece, tl.int64) * length
        stop = tl.minimum(start + length, time)
        at = tl.cast(piece, tl.int64) * batches * channels + here
        moved = 0.0
        c_used = tl.load(c_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(c_entry, c_used, mask))
        h_used = tl.load(h_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(h_entry, h_used, mask))
        c_end = tl.load(c_end_ptr + at, mask=mask, other=0.0)
        h_end = tl.load(h_end_ptr + at, mask=mask, other=0.0)
        if moved > tol:
            c = c_entry
            h = h_entry
            m_c_c = tl.zeros_like(c_entry) + 1.0
            m_c_h = tl.zeros_like(c_entry) + 0.0
            m_h_c = tl.zeros_like(c_entry) + 0.0
            m_h_h = tl.zeros_like(c_entry) + 1.0
            c, h, m_c_c, m_c_h, m_h_c, m_h_h, t, met = walk_piece(
                c, h, m_c_c, m_c_h, m_h_c, m_h_h, x_f_row, x_c_row, x_o_row, a_f, a_c, a_o, p_f, p_o, c_row, h_row,
                c_check_row, h_check_row, reset_row, start, stop, x_stride_time, channels, mask, tol, HAS_RESET, True,
                True, COMPUTE,
            )
            c_end = tl.where(met == 0, c, c_end)
            h_end = tl.where(met == 0, h, h_end)
            walked += (t - start).to(tl.int32)
            pieces_walked += 1
        else:
            worst = tl.maximum(worst, moved)
        c_entry = c_end
        h_entry = h_end
    tl.store(c_final_ptr + here, c_entry, mask=mask)
    tl.store(h_final_ptr + here, h_entry, mask=mask)
    tl.store(last_walked_ptr + program, walked)
    tl.store(last_rounds_ptr + program, pieces_walked)
    tl.store(update_ptr + program, worst)


@triton.jit
def load_step(
    x_f_row, x_c_row, x_o_row, c_row, h_row, c_first, h_first, g_c_row, g_h_row, reset_row, t, valid, x_stride_time,
    channels, mask, HAS_G_C: tl.constexpr, HAS_G_H: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Inputs, the state before the step (zero after a reset), cotangents of the state, and whether a reset cuts."""
    x_f, x_c, x_o = load_inputs(x_f_row, x_c_row, x_o_row, t * x_stride_time, mask & valid, COMPUTE)
    c = tl.load(c_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    c = tl.where(t > 0, c, c_first)
    h = tl.load(h_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    h = tl.where(t > 0, h, h_first)
    g_c = tl.zeros_like(c)
    if HAS_G_C:
        g_c = tl.load(g_c_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    g_h = tl.zeros_like(h)
    if HAS_G_H:
        g_h = tl.load(g_h_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    cut = False
    if HAS_RESET:
        cut = tl.load(reset_row + t, mask=valid, other=0) != 0
        c = tl.where(cut, 0.0, c)
        h = tl.where(cut, 0.0, h)
    return x_f, x_c, x_o, c, h, g_c, g_h, cut


@triton.jit
def retreat(
    carry_c, carry_h, sum_a_f, lost_a_f, sum_a_c, lost_a_c, sum_a_o, lost_a_o, sum_p_f, lost_p_f, sum_p_o, lost_p_o,
    x_f, x_c, x_o, c, h, g_c, g_h, cut, a_f, a_c, a_o, p_f, p_o, to_x_f_row, to_x_c_row, to_x_o_row, t, valid, channels,
    mask, HAS_RESET: tl.constexpr,
):
    """One step back: stores the gradients of the inputs, adds those of the params, returns the carry before it."""
    to_c, to_h, to_x_f, to_x_c, to_x_o, to_a_f, to_a_c, to_a_o, to_p_f, to_p_o = pullback(
        c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o, g_c + carry_c, g_h + carry_h,
    )
    tl.store(to_x_f_row + t * channels, to_x_f.to(to_x_f_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_c_row + t * channels, to_x_c.to(to_x_c_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_o_row + t * channels, to_x_o.to(to_x_o_row.dtype.element_ty), mask=mask & valid)
    sum_a_f, lost_a_f = add_compensated(sum_a_f, lost_a_f, tl.where(valid, to_a_f, 0.0))
    sum_a_c, lost_a_c = add_compensated(sum_a_c, lost_a_c, tl.where(valid, to_a_c, 0.0))
    sum_a_o, lost_a_o = add_compensated(sum_a_o, lost_a_o, tl.where(valid, to_a_o, 0.0))
    sum_p_f, lost_p_f = add_compensated(sum_p_f, lost_p_f, tl.where(valid, to_p_f, 0.0))
    sum_p_o, lost_p_o = add_compensated(sum_p_o, lost_p_o, tl.where(valid, to_p_o, 0.0))
    if HAS_RESET:
        to_c = tl.where(cut, 0.0, to_c)
    carry_c = tl.where(valid, to_c, carry_c)
    if HAS_RESET:
        to_h = tl.where(cut, 0.0, to_h)
    carry_h = tl.where(valid, to_h, carry_h)
    return (
        carry_c, carry_h, sum_a_f, lost_a_f, sum_a_c, lost_a_c, sum_a_o, lost_a_o, sum_p_f, lost_p_f, sum_p_o, lost_p_o,
    )


@triton.jit
def backward_kernel(
    x_f_ptr, x_c_ptr, x_o_ptr, a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, c_first_ptr, h_first_ptr, c_ptr, h_ptr,
    g_c_ptr, g_h_ptr, reset_ptr, carry_c_ptr, carry_h_ptr, to_x_f_ptr, to_x_c_ptr, to_x_o_ptr, to_a_f_ptr, to_a_c_ptr,
    to_a_o_ptr, to_p_f_ptr, to_p_o_ptr, to_c_first_ptr, to_h_first_ptr, batches, length, time, channels, x_stride_batch,
    x_stride_time, HAS_G_C: tl.constexpr, HAS_G_H: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
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
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_c_row = x_c_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    c_row = c_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    g_c_row = g_c_ptr + batch * time * channels + channel
    g_h_row = g_h_ptr + batch * time * channels + channel
    to_x_f_row = to_x_f_ptr + batch * time * channels + channel
    to_x_c_row = to_x_c_ptr + batch * time * channels + channel
    to_x_o_row = to_x_o_ptr + batch * time * channels + channel
    a_f, a_c, a_o, p_f, p_o = load_params(a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, channel, mask)
    c_first = tl.load(c_first_ptr + here, mask=mask, other=0.0)
    h_first = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    at = piece.to(tl.int64) * batches * channels + here
    carry_c = tl.load(carry_c_ptr + at, mask=mask, other=0.0)
    carry_h = tl.load(carry_h_ptr + at, mask=mask, other=0.0)
    sum_a_f = tl.zeros_like(carry_c)
    lost_a_f = tl.zeros_like(carry_c)
    sum_a_c = tl.zeros_like(carry_c)
    lost_a_c = tl.zeros_like(carry_c)
    sum_a_o = tl.zeros_like(carry_c)
    lost_a_o = tl.zeros_like(carry_c)
    sum_p_f = tl.zeros_like(carry_c)
    lost_p_f = tl.zeros_like(carry_c)
    sum_p_o = tl.zeros_like(carry_c)
    lost_p_o = tl.zeros_like(carry_c)
    x_f_0, x_c_0, x_o_0, c_0, h_0, g_c_0, g_h_0, cut_0 = load_step(
        x_f_row, x_c_row, x_o_row, c_row, h_row, c_first, h_first, g_c_row, g_h_row, reset_row, stop - 1,
        stop - 1 >= start, x_stride_time, channels, mask, HAS_G_C, HAS_G_H, HAS_RESET, COMPUTE,
    )
    x_f_1, x_c_1, x_o_1, c_1, h_1, g_c_1, g_h_1, cut_1 = load_step(
        x_f_row, x_c_row, x_o_row, c_row, h_row, c_first, h_first, g_c_row, g_h_row, reset_row, stop - 2,
        stop - 2 >= start, x_stride_time, channels, mask, HAS_G_C, HAS_G_H, HAS_RESET, COMPUTE,
    )
    t = stop - 1
    while t >= start:
        (
            x_f_ahead_0, x_c_ahead_0, x_o_ahead_0, c_ahead_0, h_ahead_0, g_c_ahead_0, g_h_ahead_0, cut_ahead_0,
        ) = load_step(
            x_f_row, x_c_row, x_o_row, c_row, h_row, c_first, h_first, g_c_row, g_h_row, reset_row, t - 2,
            t - 2 >= start, x_stride_time, channels, mask, HAS_G_C, HAS_G_H, HAS_RESET, COMPUTE,
        )
        (
            x_f_ahead_1, x_c_ahead_1, x_o_ahead_1, c_ahead_1, h_ahead_1, g_c_ahead_1, g_h_ahead_1, cut_ahead_1,
        ) = load_step(
            x_f_row, x_c_row, x_o_row, c_row, h_row, c_first, h_first, g_c_row, g_h_row, reset_row, t - 3,
            t - 3 >= start, x_stride_time, channels, mask, HAS_G_C, HAS_G_H, HAS_RESET, COMPUTE,
        )
        (
            carry_c, carry_h, sum_a_f, lost_a_f, sum_a_c, lost_a_c, sum_a_o, lost_a_o, sum_p_f, lost_p_f, sum_p_o,
            lost_p_o,
        ) = retreat(
            carry_c, carry_h, sum_a_f, lost_a_f, sum_a_c, lost_a_c, sum_a_o, lost_a_o, sum_p_f, lost_p_f, sum_p_o,
            lost_p_o, x_f_0, x_c_0, x_o_0, c_0, h_0, g_c_0, g_h_0, cut_0, a_f, a_c, a_o, p_f, p_o, to_x_f_row,
            to_x_c_row, to_x_o_row, t, t >= start, channels, mask, HAS_RESET,
        )
        (
            carry_c, carry_h, sum_a_f, lost_a_f, sum_a_c, lost_a_c, sum_a_o, lost_a_o, sum_p_f, lost_p_f, sum_p_o,
            lost_p_o,
        ) = retreat(
            carry_c, carry_h, sum_a_f, lost_a_f, sum_a_c, lost_a_c, sum_a_o, lost_a_o, sum_p_f, lost_p_f, sum_p_o,
            lost_p_o, x_f_1, x_c_1, x_o_1, c_1, h_1, g_c_1, g_h_1, cut_1, a_f, a_c, a_o, p_f, p_o, to_x_f_row,
            to_x_c_row, to_x_o_row, t - 1, t - 1 >= start, channels, mask, HAS_RESET,
        )
        x_f_0 = x_f_ahead_0
        x_c_0 = x_c_ahead_0
        x_o_0 = x_o_ahead_0
        c_0 = c_ahead_0
        h_0 = h_ahead_0
        g_c_0 = g_c_ahead_0
        g_h_0 = g_h_ahead_0
        cut_0 = cut_ahead_0
        x_f_1 = x_f_ahead_1
        x_c_1 = x_c_ahead_1
        x_o_1 = x_o_ahead_1
        c_1 = c_ahead_1
        h_1 = h_ahead_1
        g_c_1 = g_c_ahead_1
        g_h_1 = g_h_ahead_1
        cut_1 = cut_ahead_1
        t -= 2
    tl.store(to_a_f_ptr + at, sum_a_f, mask=mask)
    tl.store(to_a_c_ptr + at, sum_a_c, mask=mask)
    tl.store(to_a_o_ptr + at, sum_a_o, mask=mask)
    tl.store(to_p_f_ptr + at, sum_p_f, mask=mask)
    tl.store(to_p_o_ptr + at, sum_p_o, mask=mask)
    tl.store(to_c_first_ptr + here, carry_c, mask=mask & (piece == 0))
    tl.store(to_h_first_ptr + here, carry_h, mask=mask & (piece == 0))


@triton.jit
def backward_maps_kernel(
    x_f_ptr, x_c_ptr, x_o_ptr, a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, c_first_ptr, h_first_ptr, c_ptr, h_ptr,
    g_c_ptr, g_h_ptr, reset_ptr, m_c_c_ptr, m_c_h_ptr, m_h_c_ptr, m_h_h_ptr, d_c_ptr, d_h_ptr, steps_ptr, batches,
    length, time, channels, x_stride_batch, x_stride_time, HAS_G_C: tl.constexpr, HAS_G_H: tl.constexpr,
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
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_c_row = x_c_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    c_row = c_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    g_c_row = g_c_ptr + batch * time * channels + channel
    g_h_row = g_h_ptr + batch * time * channels + channel
    a_f, a_c, a_o, p_f, p_o = load_params(a_f_ptr, a_c_ptr, a_o_ptr, p_f_ptr, p_o_ptr, channel, mask)
    c_first = tl.load(c_first_ptr + here, mask=mask, other=0.0)
    h_first = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    m_c_c = tl.zeros_like(c_first) + 1.0
    m_c_h = tl.zeros_like(c_first) + 0.0
    m_h_c = tl.zeros_like(c_first) + 0.0
    m_h_h = tl.zeros_like(c_first) + 1.0
    d_c = tl.zeros_like(c_first)
    d_h = tl.zeros_like(h_first)
    x_f_0, x_c_0, x_o_0, c_0, h_0, g_c_0, g_h_0, cut_0 = load_step(
        x_f_row, x_c_row, x_o_row, c_row, h_row, c_first, h_first, g_c_row, g_h_row, reset_row, start, start < stop,
        x_stride_time, channels, mask, HAS_G_C, HAS_G_H, HAS_RESET, COMPUTE,
    )
    t = start
    inside = 1.0
    while (t < stop) & (inside > TINY):
        (
            x_f_ahead_0, x_c_ahead_0, x_o_ahead_0, c_ahead_0, h_ahead_0, g_c_ahead_0, g_h_ahead_0, cut_ahead_0,
        ) = load_step(
            x_f_row, x_c_row, x_o_row, c_row, h_row, c_first, h_first, g_c_row, g_h_row, reset_row, t + 1, t + 1 < stop,
            x_stride_time, channels, mask, HAS_G_C, HAS_G_H, HAS_RESET, COMPUTE,
        )
        _next_c, _next_h, j_c_c, j_c_h, j_h_c, j_h_h = linearised(
            c_0, h_0, x_f_0, x_c_0, x_o_0, a_f, a_c, a_o, p_f, p_o,
        )
        new_m_c_c = m_c_c * j_c_c + m_c_h * j_c_h
        new_m_c_h = m_c_c * j_h_c + m_c_h * j_h_h
        new_m_h_c = m_h_c * j_c_c + m_h_h * j_c_h
        new_m_h_h = m_h_c * j_h_c + m_h_h * j_h_h
        inside = 0.0
        if HAS_RESET:
            new_m_c_c = tl.where(cut_0, 0.0, new_m_c_c)
        m_c_c = tl.zeros_like(m_c_c) + new_m_c_c
        inside = tl.maximum(inside, largest_size(m_c_c, mask))
        if HAS_RESET:
            new_m_c_h = tl.where(cut_0, 0.0, new_m_c_h)
        m_c_h = tl.zeros_like(m_c_h) + new_m_c_h
        inside = tl.maximum(inside, largest_size(m_c_h, mask))
        if HAS_RESET:
            new_m_h_c = tl.where(cut_0, 0.0, new_m_h_c)
        m_h_c = tl.zeros_like(m_h_c) + new_m_h_c
        inside = tl.maximum(inside, largest_size(m_h_c, mask))
        if HAS_RESET:
            new_m_h_h = tl.where(cut_0, 0.0, new_m_h_h)
        m_h_h = tl.zeros_like(m_h_h) + new_m_h_h
        inside = tl.maximum(inside, largest_size(m_h_h, mask))
        d_c += m_c_c * g_c_0
        d_c += m_c_h * g_h_0
        d_h += m_h_c * g_c_0
        d_h += m_h_h * g_h_0
        x_f_0 = x_f_ahead_0
        x_c_0 = x_c_ahead_0
        x_o_0 = x_o_ahead_0
        c_0 = c_ahead_0
        h_0 = h_ahead_0
        g_c_0 = g_c_ahead_0
        g_h_0 = g_h_ahead_0
        cut_0 = cut_ahead_0
        t += 1
    at = piece.to(tl.int64) * batches * channels + here
    tl.store(m_c_c_ptr + at, m_c_c, mask=mask)
    tl.store(m_c_h_ptr + at, m_c_h, mask=mask)
    tl.store(m_h_c_ptr + at, m_h_c, mask=mask)
    tl.store(m_h_h_ptr + at, m_h_h, mask=mask)
    tl.store(d_c_ptr + at, d_c, mask=mask)
    tl.store(d_h_ptr + at, d_h, mask=mask)
    tl.store(steps_ptr + program, (t - start).to(tl.int32))


@triton.jit
def backward_join_kernel(
    m_c_c_ptr, m_c_h_ptr, m_h_c_ptr, m_h_h_ptr, d_c_ptr, d_h_ptr, g_c_final_ptr, g_h_final_ptr, carry_c_ptr,
    carry_h_ptr, pieces, batches, channels, BLOCK: tl.constexpr,
):
    """The carry at the end of every piece, from the last piece to the first."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    carry_c = tl.load(g_c_final_ptr + here, mask=mask, other=0.0)
    carry_h = tl.load(g_h_final_ptr + here, mask=mask, other=0.0)
    for back in range(0, pieces):
        at = (tl.cast(pieces - 1, tl.int64) - back) * batches * channels + here
        tl.store(carry_c_ptr + at, carry_c, mask=mask)
        tl.store(carry_h_ptr + at, carry_h, mask=mask)
        m_c_c = tl.load(m_c_c_ptr + at, mask=mask, other=0.0)
        m_c_h = tl.load(m_c_h_ptr + at, mask=mask, other=0.0)
        m_h_c = tl.load(m_h_c_ptr + at, mask=mask, other=0.0)
        m_h_h = tl.load(m_h_h_ptr + at, mask=mask, other=0.0)
        d_c = tl.load(d_c_ptr + at, mask=mask, other=0.0)
        d_h = tl.load(d_h_ptr + at, mask=mask, other=0.0)
        new_carry_c = m_c_c * carry_c + m_c_h * carry_h + d_c
        new_carry_h = m_h_c * carry_c + m_h_h * carry_h + d_h
        carry_c = new_carry_c
        carry_h = new_carry_h
