# fmt: off
# ruff: noqa: RUF059
# mypy: ignore-errors
"""Kernels of the cell 'slstm', generated from its step by paralm_kernels.generate; not edited by hand.

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (s, y, h), (x_i, x_f, x_z, x_o), (r_i, r_f, r_z, r_o) = state, inputs, params
        i = x_i + r_i * h
        e = F.logsigmoid(x_f + r_f * h) + log_normaliser(s) - i
        # both gates, not one and its complement: near a fresh start 1 − σ(−e) would lose all digits of a small σ(e)
        y = torch.sigmoid(e) * y + torch.sigmoid(-e) * torch.tanh(x_z + r_z * h)
        return coordinate(i - F.logsigmoid(-e)), y, torch.sigmoid(x_o + r_o * h) * y

python -m paralm_kernels.generate writes this file again.
"""

import triton
import triton.language as tl

from ..triton_math import (
    add_compensated,
    constant,
    exp,
    finite,
    largest_size,
    largest_update,
    log1p,
    maximum,
    minimum,
    relative_change,
    sigmoid,
    spread,
    tanh,
)


@triton.jit
def step(s, y, h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o):
    """h_t = step(h_{t-1}, x_t; p)."""
    v0 = x_i + h * r_i
    v1 = x_f + h * r_f
    v2 = tl.where(s >= 1.0, s - 1.0, 1.0 - 1.0 / minimum(constant(1.0, s), maximum(s, constant(1e-06, s))))
    v3 = minimum(v1, constant(0.0, s)) - log1p(exp(-tl.abs(v1))) + v2 - v0
    v4 = -v3
    v5 = y * sigmoid(v3) + sigmoid(v4) * tanh(x_z + h * r_z)
    v6 = v0 - (minimum(constant(0.0, s), v4) - log1p(exp(-tl.abs(v4))))
    next_s = tl.where(v6 >= 0.0, 1.0 + v6, 1.0 / (1.0 - minimum(constant(0.0, s), v6)))
    next_y = v5
    next_h = v5 * sigmoid(x_o + h * r_o)
    return next_s, next_y, next_h


@triton.jit
def linearised(s, y, h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o):
    """The next state, and its Jacobian by the state before."""
    v0 = x_i + h * r_i
    v1 = x_f + h * r_f
    v2 = exp(-tl.abs(v1))
    v3 = s >= 1.0
    v4 = 1.0 / minimum(constant(1.0, s), maximum(s, constant(1e-06, s)))
    v5 = minimum(v1, constant(0.0, s)) - log1p(v2) + tl.where(v3, s - 1.0, 1.0 - v4) - v0
    v6 = sigmoid(v5)
    v7 = -v5
    v8 = sigmoid(v7)
    v9 = tanh(x_z + h * r_z)
    v10 = y * v6 + v8 * v9
    v11 = exp(-tl.abs(v7))
    v12 = v0 - (minimum(constant(0.0, s), v7) - log1p(v11))
    v13 = v12 >= 0.0
    v14 = 1.0 / (1.0 - minimum(constant(0.0, s), v12))
    v15 = sigmoid(x_o + h * r_o)
    v16 = v7 < 0.0
    v17 = tl.where(v16, constant(1.0, s), constant(0.0, s)) - tl.where(v16, constant(1.0, s), constant(-1.0, s)) * (v11 / (1.0 + v11))
    v18 = v4 * v4
    v19 = (s >= 1e-06) & (s <= 1.0)
    v20 = v1 < 0.0
    v21 = tl.where(v20, constant(1.0, s), constant(0.0, s)) - tl.where(v20, constant(1.0, s), constant(-1.0, s)) * (v2 / (1.0 + v2))
    v22 = tl.where(v12 <= 0.0, -(v14 * v14 * -tl.where(v13, constant(0.0, s), constant(1.0, s))), 0.0)
    v23 = tl.where(v13, constant(1.0, s), constant(0.0, s)) + v22
    v24 = v17 * -v23
    v25 = -v24
    v26 = y * (v6 * (1.0 - v6)) - v9 * (v8 * (1.0 - v8))
    v27 = y * v15 * (v6 * (1.0 - v6)) - v9 * v15 * (v8 * (1.0 - v8))
    v28 = r_o * (v10 * (v15 * (1.0 - v15))) + r_z * (v8 * v15 * (1.0 - v9 * v9)) + r_f * (v21 * v27)
    next_s = tl.where(v13, 1.0 + v12, v14)
    next_y = v10
    next_h = v10 * v15
    j_s_s = tl.where(v3, v25, 0.0) + tl.where(v19, v18 * tl.where(v3, 0.0, v25), 0.0)
    j_s_y = spread(0.0, s)
    j_s_h = r_f * (v21 * v25) + r_i * (v23 + v24)
    j_y_s = tl.where(v3, v26, 0.0) + tl.where(v19, v18 * tl.where(v3, 0.0, v26), 0.0)
    j_y_y = v6
    j_y_h = r_z * (v8 * (1.0 - v9 * v9)) + r_f * (v21 * v26) + r_i * -v26
    j_h_s = tl.where(v3, v27, 0.0) + tl.where(v19, v18 * tl.where(v3, 0.0, v27), 0.0)
    j_h_y = v6 * v15
    j_h_h = v28 + r_i * -v27
    return next_s, next_y, next_h, j_s_s, j_s_y, j_s_h, j_y_s, j_y_y, j_y_h, j_h_s, j_h_y, j_h_h


@triton.jit
def pullback(s, y, h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o, grad_s, grad_y, grad_h):
    """From the cotangents of the next state: those of the state before, of inputs and of params."""
    v0 = x_i + h * r_i
    v1 = x_f + h * r_f
    v2 = exp(-tl.abs(v1))
    v3 = s >= 1.0
    v4 = 1.0 / minimum(constant(1.0, s), maximum(s, constant(1e-06, s)))
    v5 = minimum(v1, constant(0.0, s)) - log1p(v2) + tl.where(v3, s - 1.0, 1.0 - v4) - v0
    v6 = sigmoid(v5)
    v7 = -v5
    v8 = sigmoid(v7)
    v9 = tanh(x_z + h * r_z)
    v10 = exp(-tl.abs(v7))
    v11 = v0 - (minimum(constant(0.0, s), v7) - log1p(v10))
    v12 = v11 >= 0.0
    v13 = 1.0 / (1.0 - minimum(constant(0.0, s), v11))
    v14 = sigmoid(x_o + h * r_o)
    v15 = grad_y + grad_h * v14
    v16 = grad_h * (y * v6 + v8 * v9) * (v14 * (1.0 - v14))
    v17 = tl.where(v12, grad_s, 0.0) + tl.where(v11 <= 0.0, -(-tl.where(v12, 0.0, grad_s) * (v13 * v13)), 0.0)
    v18 = v7 < 0.0
    v19 = tl.where(v18, constant(1.0, s), constant(0.0, s)) - tl.where(v18, constant(1.0, s), constant(-1.0, s)) * (v10 / (1.0 + v10))
    v20 = v8 * v15 * (1.0 - v9 * v9)
    v21 = -(-v17 * v19) - v9 * v15 * (v8 * (1.0 - v8)) + y * v15 * (v6 * (1.0 - v6))
    v22 = v17 - v21
    v23 = tl.where(v3, v21, 0.0) + tl.where((s >= 1e-06) & (s <= 1.0), tl.where(v3, 0.0, v21) * (v4 * v4), 0.0)
    v24 = v1 < 0.0
    v25 = tl.where(v24, constant(1.0, s), constant(0.0, s)) - tl.where(v24, constant(1.0, s), constant(-1.0, s)) * (v2 / (1.0 + v2))
    v26 = v21 * v25
    to_s = v23
    to_y = v6 * v15
    to_h = r_o * v16 + r_z * v20 + r_f * v26 + r_i * v22
    to_x_i = v22
    to_x_f = v26
    to_x_z = v20
    to_x_o = v16
    to_r_i = h * v22
    to_r_f = h * v26
    to_r_z = h * v20
    to_r_o = h * v16
    return to_s, to_y, to_h, to_x_i, to_x_f, to_x_z, to_x_o, to_r_i, to_r_f, to_r_z, to_r_o


@triton.jit
def load_inputs(x_i_row, x_f_row, x_z_row, x_o_row, offset, mask, COMPUTE: tl.constexpr):
    """The inputs at an offset, in the compute dtype."""
    x_i = tl.load(x_i_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_f = tl.load(x_f_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_z = tl.load(x_z_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_o = tl.load(x_o_row + offset, mask=mask, other=0.0).to(COMPUTE)
    return x_i, x_f, x_z, x_o


@triton.jit
def load_params(r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, channel, mask):
    """The parameters of some channels."""
    r_i = tl.load(r_i_ptr + channel, mask=mask, other=0.0)
    r_f = tl.load(r_f_ptr + channel, mask=mask, other=0.0)
    r_z = tl.load(r_z_ptr + channel, mask=mask, other=0.0)
    r_o = tl.load(r_o_ptr + channel, mask=mask, other=0.0)
    return r_i, r_f, r_z, r_o


@triton.jit
def advance(
    s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o,
    s_row, y_row, h_row, reset_row, t, stop, channels, mask, HAS_RESET: tl.constexpr, JACOBIAN: tl.constexpr,
):
    """One step of a walk: the state after it, which is stored, and the product of Jacobians."""
    valid = t < stop
    if HAS_RESET:
        cut = tl.load(reset_row + t, mask=valid, other=0) != 0
        s = tl.where(cut, 0.0, s)
        y = tl.where(cut, 0.0, y)
        h = tl.where(cut, 0.0, h)
    if JACOBIAN:
        (
            next_s, next_y, next_h, j_s_s, j_s_y, j_s_h, j_y_s, j_y_y, j_y_h, j_h_s, j_h_y, j_h_h,
        ) = linearised(s, y, h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o)
        new_m_s_s = j_s_s * m_s_s + j_s_h * m_h_s
        new_m_s_y = j_s_s * m_s_y + j_s_h * m_h_y
        new_m_s_h = j_s_s * m_s_h + j_s_h * m_h_h
        new_m_y_s = j_y_s * m_s_s + j_y_y * m_y_s + j_y_h * m_h_s
        new_m_y_y = j_y_s * m_s_y + j_y_y * m_y_y + j_y_h * m_h_y
        new_m_y_h = j_y_s * m_s_h + j_y_y * m_y_h + j_y_h * m_h_h
        new_m_h_s = j_h_s * m_s_s + j_h_y * m_y_s + j_h_h * m_h_s
        new_m_h_y = j_h_s * m_s_y + j_h_y * m_y_y + j_h_h * m_h_y
        new_m_h_h = j_h_s * m_s_h + j_h_y * m_y_h + j_h_h * m_h_h
        if HAS_RESET:
            new_m_s_s = tl.where(cut, 0.0, new_m_s_s)
            new_m_s_y = tl.where(cut, 0.0, new_m_s_y)
            new_m_s_h = tl.where(cut, 0.0, new_m_s_h)
            new_m_y_s = tl.where(cut, 0.0, new_m_y_s)
            new_m_y_y = tl.where(cut, 0.0, new_m_y_y)
            new_m_y_h = tl.where(cut, 0.0, new_m_y_h)
            new_m_h_s = tl.where(cut, 0.0, new_m_h_s)
            new_m_h_y = tl.where(cut, 0.0, new_m_h_y)
            new_m_h_h = tl.where(cut, 0.0, new_m_h_h)
        m_s_s = tl.where(valid, new_m_s_s, m_s_s)
        m_s_y = tl.where(valid, new_m_s_y, m_s_y)
        m_s_h = tl.where(valid, new_m_s_h, m_s_h)
        m_y_s = tl.where(valid, new_m_y_s, m_y_s)
        m_y_y = tl.where(valid, new_m_y_y, m_y_y)
        m_y_h = tl.where(valid, new_m_y_h, m_y_h)
        m_h_s = tl.where(valid, new_m_h_s, m_h_s)
        m_h_y = tl.where(valid, new_m_h_y, m_h_y)
        m_h_h = tl.where(valid, new_m_h_h, m_h_h)
    else:
        next_s, next_y, next_h = step(s, y, h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o)
    tl.store(s_row + t * channels, next_s.to(s_row.dtype.element_ty), mask=mask & valid)
    tl.store(y_row + t * channels, next_y.to(y_row.dtype.element_ty), mask=mask & valid)
    tl.store(h_row + t * channels, next_h.to(h_row.dtype.element_ty), mask=mask & valid)
    s = tl.where(valid, next_s, s)
    y = tl.where(valid, next_y, y)
    h = tl.where(valid, next_h, h)
    return s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h


@triton.jit
def walk_piece(
    s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, x_i_row, x_f_row, x_z_row, x_o_row, r_i,
    r_f, r_z, r_o, s_row, y_row, h_row, s_check_row, y_check_row, h_check_row, reset_row, start, stop, x_stride_time,
    channels, mask, tol, HAS_RESET: tl.constexpr, PIECES: tl.constexpr, MEET: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Walks from start to stop, or until the state meets the stored one; start is a multiple of 32.

    With PIECES it carries the product of Jacobians and keeps a checkpoint every 32 steps.
    """
    x_i_0, x_f_0, x_z_0, x_o_0 = load_inputs(
        x_i_row, x_f_row, x_z_row, x_o_row, (start) * x_stride_time, mask & (start < stop), COMPUTE,
    )
    x_i_1, x_f_1, x_z_1, x_o_1 = load_inputs(
        x_i_row, x_f_row, x_z_row, x_o_row, (start + 1) * x_stride_time, mask & (start + 1 < stop), COMPUTE,
    )
    x_i_2, x_f_2, x_z_2, x_o_2 = load_inputs(
        x_i_row, x_f_row, x_z_row, x_o_row, (start + 2) * x_stride_time, mask & (start + 2 < stop), COMPUTE,
    )
    x_i_3, x_f_3, x_z_3, x_o_3 = load_inputs(
        x_i_row, x_f_row, x_z_row, x_o_row, (start + 3) * x_stride_time, mask & (start + 3 < stop), COMPUTE,
    )
    t = start
    met = 0
    while (t < stop) & (met == 0):
        x_i_ahead_0, x_f_ahead_0, x_z_ahead_0, x_o_ahead_0 = load_inputs(
            x_i_row, x_f_row, x_z_row, x_o_row, (t + 4) * x_stride_time, mask & (t + 4 < stop), COMPUTE,
        )
        x_i_ahead_1, x_f_ahead_1, x_z_ahead_1, x_o_ahead_1 = load_inputs(
            x_i_row, x_f_row, x_z_row, x_o_row, (t + 5) * x_stride_time, mask & (t + 5 < stop), COMPUTE,
        )
        x_i_ahead_2, x_f_ahead_2, x_z_ahead_2, x_o_ahead_2 = load_inputs(
            x_i_row, x_f_row, x_z_row, x_o_row, (t + 6) * x_stride_time, mask & (t + 6 < stop), COMPUTE,
        )
        x_i_ahead_3, x_f_ahead_3, x_z_ahead_3, x_o_ahead_3 = load_inputs(
            x_i_row, x_f_row, x_z_row, x_o_row, (t + 7) * x_stride_time, mask & (t + 7 < stop), COMPUTE,
        )
        s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h = advance(
            s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, x_i_0, x_f_0, x_z_0, x_o_0, r_i,
            r_f, r_z, r_o, s_row, y_row, h_row, reset_row, t, stop, channels, mask, HAS_RESET, PIECES,
        )
        s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h = advance(
            s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, x_i_1, x_f_1, x_z_1, x_o_1, r_i,
            r_f, r_z, r_o, s_row, y_row, h_row, reset_row, t + 1, stop, channels, mask, HAS_RESET, PIECES,
        )
        s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h = advance(
            s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, x_i_2, x_f_2, x_z_2, x_o_2, r_i,
            r_f, r_z, r_o, s_row, y_row, h_row, reset_row, t + 2, stop, channels, mask, HAS_RESET, PIECES,
        )
        s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h = advance(
            s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, x_i_3, x_f_3, x_z_3, x_o_3, r_i,
            r_f, r_z, r_o, s_row, y_row, h_row, reset_row, t + 3, stop, channels, mask, HAS_RESET, PIECES,
        )
        x_i_0, x_f_0, x_z_0, x_o_0 = x_i_ahead_0, x_f_ahead_0, x_z_ahead_0, x_o_ahead_0
        x_i_1, x_f_1, x_z_1, x_o_1 = x_i_ahead_1, x_f_ahead_1, x_z_ahead_1, x_o_ahead_1
        x_i_2, x_f_2, x_z_2, x_o_2 = x_i_ahead_2, x_f_ahead_2, x_z_ahead_2, x_o_ahead_2
        x_i_3, x_f_3, x_z_3, x_o_3 = x_i_ahead_3, x_f_ahead_3, x_z_ahead_3, x_o_ahead_3
        t += 4
        if PIECES:
            edge = ((t - start) % 32 == 0) | (t >= stop)
            if edge:
                here = (tl.minimum(t, stop) - 1) // 32 * channels
                if MEET:
                    moved = 0.0
                    old = tl.load(s_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(s, old, mask))
                    old = tl.load(y_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(y, old, mask))
                    old = tl.load(h_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(h, old, mask))
                    met = (moved <= tol).to(tl.int32)
                tl.store(s_check_row + here, s, mask=mask & (met == 0))
                tl.store(y_check_row + here, y, mask=mask & (met == 0))
                tl.store(h_check_row + here, h, mask=mask & (met == 0))
    return s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, tl.minimum(t, stop), met


@triton.jit
def walk_kernel(
    x_i_ptr, x_f_ptr, x_z_ptr, x_o_ptr, r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, s_first_ptr, y_first_ptr, h_first_ptr,
    s_ptr, y_ptr, h_ptr, s_final_ptr, y_final_ptr, h_final_ptr, reset_ptr, time, channels, x_stride_batch,
    x_stride_time, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The sequential walk: one program a batch row and block of channels, the state in registers."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_i_row = x_i_ptr + batch * x_stride_batch + channel
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    s_row = s_ptr + batch * time * channels + channel
    y_row = y_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    r_i, r_f, r_z, r_o = load_params(r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, channel, mask)
    s = tl.load(s_first_ptr + here, mask=mask, other=0.0)
    y = tl.load(y_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    (
        s, y, h, _m_s_s, _m_s_y, _m_s_h, _m_y_s, _m_y_y, _m_y_h, _m_h_s, _m_h_y, _m_h_h, _t, _met,
    ) = walk_piece(
        s, y, h, s, s, s, s, s, s, s, s, s, x_i_row, x_f_row, x_z_row, x_o_row, r_i, r_f, r_z, r_o, s_row, y_row, h_row,
        s_row, y_row, h_row, reset_row, batch * 0, time, x_stride_time, channels, mask, 0.0, HAS_RESET, False, False,
        COMPUTE,
    )
    tl.store(s_final_ptr + here, s, mask=mask)
    tl.store(y_final_ptr + here, y, mask=mask)
    tl.store(h_final_ptr + here, h, mask=mask)


@triton.jit
def decode_kernel(
    x_i_ptr, x_f_ptr, x_z_ptr, x_o_ptr, r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, s_first_ptr, y_first_ptr, h_first_ptr,
    s_final_ptr, y_final_ptr, h_final_ptr, channels, x_stride_batch, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One step, state to state, for generation."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    r_i, r_f, r_z, r_o = load_params(r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, channel, mask)
    x_i, x_f, x_z, x_o = load_inputs(
        x_i_ptr, x_f_ptr, x_z_ptr, x_o_ptr, batch * x_stride_batch + channel, mask, COMPUTE,
    )
    s = tl.load(s_first_ptr + here, mask=mask, other=0.0)
    y = tl.load(y_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    next_s, next_y, next_h = step(s, y, h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o)
    tl.store(s_final_ptr + here, next_s, mask=mask)
    tl.store(y_final_ptr + here, next_y, mask=mask)
    tl.store(h_final_ptr + here, next_h, mask=mask)


@triton.jit
def compose(
    first_m_s_s, first_m_s_y, first_m_s_h, first_m_y_s, first_m_y_y, first_m_y_h, first_m_h_s, first_m_h_y, first_m_h_h,
    first_d_s, first_d_y, first_d_h, last_m_s_s, last_m_s_y, last_m_s_h, last_m_y_s, last_m_y_y, last_m_y_h, last_m_h_s,
    last_m_h_y, last_m_h_h, last_d_s, last_d_y, last_d_h,
):
    """Two affine maps as one: the first, then the last."""
    m_s_s = last_m_s_s * first_m_s_s + last_m_s_y * first_m_y_s + last_m_s_h * first_m_h_s
    m_s_y = last_m_s_s * first_m_s_y + last_m_s_y * first_m_y_y + last_m_s_h * first_m_h_y
    m_s_h = last_m_s_s * first_m_s_h + last_m_s_y * first_m_y_h + last_m_s_h * first_m_h_h
    m_y_s = last_m_y_s * first_m_s_s + last_m_y_y * first_m_y_s + last_m_y_h * first_m_h_s
    m_y_y = last_m_y_s * first_m_s_y + last_m_y_y * first_m_y_y + last_m_y_h * first_m_h_y
    m_y_h = last_m_y_s * first_m_s_h + last_m_y_y * first_m_y_h + last_m_y_h * first_m_h_h
    m_h_s = last_m_h_s * first_m_s_s + last_m_h_y * first_m_y_s + last_m_h_h * first_m_h_s
    m_h_y = last_m_h_s * first_m_s_y + last_m_h_y * first_m_y_y + last_m_h_h * first_m_h_y
    m_h_h = last_m_h_s * first_m_s_h + last_m_h_y * first_m_y_h + last_m_h_h * first_m_h_h
    d_s = last_m_s_s * first_d_s + last_m_s_y * first_d_y + last_m_s_h * first_d_h + last_d_s
    d_y = last_m_y_s * first_d_s + last_m_y_y * first_d_y + last_m_y_h * first_d_h + last_d_y
    d_h = last_m_h_s * first_d_s + last_m_h_y * first_d_y + last_m_h_h * first_d_h + last_d_h
    return m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, d_s, d_y, d_h


@triton.jit
def previous(s, y, h, s_entry, y_entry, h_entry, cut, HAS_RESET: tl.constexpr, TILE: tl.constexpr):
    """The state before each step of a tile."""
    row = tl.arange(0, TILE)[:, None]
    back = tl.broadcast_to(tl.maximum(row - 1, 0), s.shape)
    s = tl.where(row == 0, s_entry[None, :], tl.gather(s, back, 0))
    y = tl.where(row == 0, y_entry[None, :], tl.gather(y, back, 0))
    h = tl.where(row == 0, h_entry[None, :], tl.gather(h, back, 0))
    if HAS_RESET:
        s = tl.where(cut, 0.0, s)
        y = tl.where(cut, 0.0, y)
        h = tl.where(cut, 0.0, h)
    return s, y, h


@triton.jit
def tile_kernel(
    x_i_ptr, x_f_ptr, x_z_ptr, x_o_ptr, r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, s_first_ptr, y_first_ptr, h_first_ptr,
    y_bound_ptr, h_bound_ptr, s_ptr, y_ptr, h_ptr, s_final_ptr, y_final_ptr, h_final_ptr, reset_ptr, iterations_ptr,
    update_ptr, time, channels, x_stride_batch, x_stride_time, tol, limit, HAS_RESET: tl.constexpr,
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
    x_i_row = x_i_ptr + batch * x_stride_batch + channel
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    s_row = s_ptr + batch * time * channels + channel
    y_row = y_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    r_i, r_f, r_z, r_o = load_params(r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, channel, mask)
    s_entry = tl.load(s_first_ptr + here, mask=mask, other=0.0)
    y_entry = tl.load(y_first_ptr + here, mask=mask, other=0.0)
    h_entry = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    y_bound = tl.load(y_bound_ptr + here, mask=mask, other=0.0)
    h_bound = tl.load(h_bound_ptr + here, mask=mask, other=0.0)
    row = tl.arange(0, TILE)[:, None]
    most = 0
    worst = 0.0
    for first in range(0, time, TILE):
        t = tl.cast(first, tl.int64) + row
        inside = (t < time) & mask[None, :]
        x_i, x_f, x_z, x_o = load_inputs(
            x_i_row[None, :], x_f_row[None, :], x_z_row[None, :], x_o_row[None, :], t * x_stride_time, inside, COMPUTE,
        )
        cut = False
        if HAS_RESET:
            cut = tl.load(reset_row + t, mask=t < time, other=0) != 0
        s = tl.zeros_like(x_i)
        y = tl.zeros_like(x_i)
        h = tl.zeros_like(x_i)
        next_s, next_y, next_h = step(s, y, h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o)
        s = tl.where(finite(next_s), next_s, 0.0)
        y = tl.where(finite(next_y), next_y, 0.0)
        h = tl.where(finite(next_h), next_h, 0.0)
        y = tl.where(y > y_bound, y_bound, tl.where(y < -y_bound, -y_bound, y))
        h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
        for _ in range(3):
            s_before, y_before, h_before = previous(s, y, h, s_entry, y_entry, h_entry, cut, HAS_RESET, TILE)
            next_s, next_y, next_h = step(s_before, y_before, h_before, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o)
            s = tl.where(finite(next_s), next_s, 0.0)
            y = tl.where(finite(next_y), next_y, 0.0)
            h = tl.where(finite(next_h), next_h, 0.0)
            y = tl.where(y > y_bound, y_bound, tl.where(y < -y_bound, -y_bound, y))
            h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
        iterations = 0
        update = float("inf")
        while (iterations < limit) & (update > tol):
            s_before, y_before, h_before = previous(s, y, h, s_entry, y_entry, h_entry, cut, HAS_RESET, TILE)
            (
                next_s, next_y, next_h, j_s_s, j_s_y, j_s_h, j_y_s, j_y_y, j_y_h, j_h_s, j_h_y, j_h_h,
            ) = linearised(s_before, y_before, h_before, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o)
            if HAS_RESET:
                j_s_s = tl.where(cut, 0.0, j_s_s)
                j_s_y = tl.where(cut, 0.0, j_s_y)
                j_s_h = tl.where(cut, 0.0, j_s_h)
                j_y_s = tl.where(cut, 0.0, j_y_s)
                j_y_y = tl.where(cut, 0.0, j_y_y)
                j_y_h = tl.where(cut, 0.0, j_y_h)
                j_h_s = tl.where(cut, 0.0, j_h_s)
                j_h_y = tl.where(cut, 0.0, j_h_y)
                j_h_h = tl.where(cut, 0.0, j_h_h)
            (
                _m_s_s, _m_s_y, _m_s_h, _m_y_s, _m_y_y, _m_y_h, _m_h_s, _m_h_y, _m_h_h, d_s, d_y, d_h,
            ) = tl.associative_scan(
                (j_s_s, j_s_y, j_s_h, j_y_s, j_y_y, j_y_h, j_h_s, j_h_y, j_h_h, next_s - s, next_y - y, next_h - h), 0,
                compose,
            )
            update = 0.0
            s += d_s
            update = tl.maximum(update, largest_update(s, d_s, inside))
            s = tl.where(finite(s), s, tl.where(finite(next_s), next_s, 0.0))
            y += d_y
            update = tl.maximum(update, largest_update(y, d_y, inside))
            y = tl.where(finite(y), y, tl.where(finite(next_y), next_y, 0.0))
            y = tl.where(y > y_bound, y_bound, tl.where(y < -y_bound, -y_bound, y))
            h += d_h
            update = tl.maximum(update, largest_update(h, d_h, inside))
            h = tl.where(finite(h), h, tl.where(finite(next_h), next_h, 0.0))
            h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
            iterations += 1
        sweeps = 0
        while (sweeps < TILE) & (update > tol):
            s_before, y_before, h_before = previous(s, y, h, s_entry, y_entry, h_entry, cut, HAS_RESET, TILE)
            next_s, next_y, next_h = step(s_before, y_before, h_before, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o)
            update = 0.0
            moved = relative_change(next_s, s, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            s = next_s
            moved = relative_change(next_y, y, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            y = next_y
            moved = relative_change(next_h, h, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            h = next_h
            sweeps += 1
        most = tl.maximum(most, iterations + sweeps)
        worst = tl.maximum(worst, tl.where(sweeps < TILE, update, 0.0))
        tl.store(s_row[None, :] + t * channels, s.to(s_row.dtype.element_ty), mask=inside)
        tl.store(y_row[None, :] + t * channels, y.to(y_row.dtype.element_ty), mask=inside)
        tl.store(h_row[None, :] + t * channels, h.to(h_row.dtype.element_ty), mask=inside)
        last = tl.minimum(first + TILE, time) - 1 - first
        s_entry = tl.sum(tl.where(row == last, s, 0.0), 0)
        y_entry = tl.sum(tl.where(row == last, y, 0.0), 0)
        h_entry = tl.sum(tl.where(row == last, h, 0.0), 0)
    tl.store(s_final_ptr + here, s_entry, mask=mask)
    tl.store(y_final_ptr + here, y_entry, mask=mask)
    tl.store(h_final_ptr + here, h_entry, mask=mask)
    tl.store(iterations_ptr + program, most)
    tl.store(update_ptr + program, worst)


@triton.jit
def segments_kernel(
    x_i_ptr, x_f_ptr, x_z_ptr, x_o_ptr, r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, s_first_ptr, y_first_ptr, h_first_ptr,
    s_ptr, y_ptr, h_ptr, s_check_ptr, y_check_ptr, h_check_ptr, reset_ptr, s_used_ptr, y_used_ptr, h_used_ptr,
    s_end_ptr, y_end_ptr, h_end_ptr, m_s_s_ptr, m_s_y_ptr, m_s_h_ptr, m_y_s_ptr, m_y_y_ptr, m_y_h_ptr, m_h_s_ptr,
    m_h_y_ptr, m_h_h_ptr, s_entry_ptr, y_entry_ptr, h_entry_ptr, walked_ptr, rounds_ptr, batches, length, checks, time,
    channels, x_stride_batch, x_stride_time, tol, AGAIN: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
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
    x_i_row = x_i_ptr + batch * x_stride_batch + channel
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    s_row = s_ptr + batch * time * channels + channel
    y_row = y_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    r_i, r_f, r_z, r_o = load_params(r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, channel, mask)
    s_check_row = s_check_ptr + batch * checks * channels + channel
    y_check_row = y_check_ptr + batch * checks * channels + channel
    h_check_row = h_check_ptr + batch * checks * channels + channel
    at = piece.to(tl.int64) * batches * channels + here
    moved = 1.0
    if AGAIN:
        moved = 0.0
        s_entry = tl.load(s_entry_ptr + at, mask=mask, other=0.0)
        s_used = tl.load(s_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(s_entry, s_used, mask))
        y_entry = tl.load(y_entry_ptr + at, mask=mask, other=0.0)
        y_used = tl.load(y_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(y_entry, y_used, mask))
        h_entry = tl.load(h_entry_ptr + at, mask=mask, other=0.0)
        h_used = tl.load(h_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(h_entry, h_used, mask))
    else:
        s_entry = tl.load(s_first_ptr + here, mask=mask & (piece == 0), other=0.0)
        y_entry = tl.load(y_first_ptr + here, mask=mask & (piece == 0), other=0.0)
        h_entry = tl.load(h_first_ptr + here, mask=mask & (piece == 0), other=0.0)
    if moved > tol:
        tl.store(s_used_ptr + at, s_entry, mask=mask)
        tl.store(y_used_ptr + at, y_entry, mask=mask)
        tl.store(h_used_ptr + at, h_entry, mask=mask)
        s = s_entry
        y = y_entry
        h = h_entry
        m_s_s = tl.zeros_like(s_entry) + 1.0
        m_s_y = tl.zeros_like(s_entry) + 0.0
        m_s_h = tl.zeros_like(s_entry) + 0.0
        m_y_s = tl.zeros_like(s_entry) + 0.0
        m_y_y = tl.zeros_like(s_entry) + 1.0
        m_y_h = tl.zeros_like(s_entry) + 0.0
        m_h_s = tl.zeros_like(s_entry) + 0.0
        m_h_y = tl.zeros_like(s_entry) + 0.0
        m_h_h = tl.zeros_like(s_entry) + 1.0
        s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, t, met = walk_piece(
            s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, x_i_row, x_f_row, x_z_row, x_o_row,
            r_i, r_f, r_z, r_o, s_row, y_row, h_row, s_check_row, y_check_row, h_check_row, reset_row, start, stop,
            x_stride_time, channels, mask, tol, HAS_RESET, True, AGAIN, COMPUTE,
        )
        if met == 0:
            tl.store(s_end_ptr + at, s, mask=mask)
            tl.store(y_end_ptr + at, y, mask=mask)
            tl.store(h_end_ptr + at, h, mask=mask)
            tl.store(m_s_s_ptr + at, m_s_s, mask=mask)
            tl.store(m_s_y_ptr + at, m_s_y, mask=mask)
            tl.store(m_s_h_ptr + at, m_s_h, mask=mask)
            tl.store(m_y_s_ptr + at, m_y_s, mask=mask)
            tl.store(m_y_y_ptr + at, m_y_y, mask=mask)
            tl.store(m_y_h_ptr + at, m_y_h, mask=mask)
            tl.store(m_h_s_ptr + at, m_h_s, mask=mask)
            tl.store(m_h_y_ptr + at, m_h_y, mask=mask)
            tl.store(m_h_h_ptr + at, m_h_h, mask=mask)
        if AGAIN:
            walked = tl.load(walked_ptr + program) + (t - start).to(tl.int32)
            tl.store(walked_ptr + program, walked)
            tl.store(rounds_ptr + program, tl.load(rounds_ptr + program) + 1)


@triton.jit
def segments_join_kernel(
    s_first_ptr, y_first_ptr, h_first_ptr, y_bound_ptr, h_bound_ptr, s_used_ptr, y_used_ptr, h_used_ptr, s_end_ptr,
    y_end_ptr, h_end_ptr, m_s_s_ptr, m_s_y_ptr, m_s_h_ptr, m_y_s_ptr, m_y_y_ptr, m_y_h_ptr, m_h_s_ptr, m_h_y_ptr,
    m_h_h_ptr, s_entry_ptr, y_entry_ptr, h_entry_ptr, pieces, batches, channels, BLOCK: tl.constexpr,
):
    """The entries of the pieces from the first to the last: s'_{p+1} = y_p + M_p (s'_p - s_p)."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    s = tl.load(s_first_ptr + here, mask=mask, other=0.0)
    y = tl.load(y_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    y_bound = tl.load(y_bound_ptr + here, mask=mask, other=0.0)
    h_bound = tl.load(h_bound_ptr + here, mask=mask, other=0.0)
    for piece in range(0, pieces):
        at = tl.cast(piece, tl.int64) * batches * channels + here
        tl.store(s_entry_ptr + at, s, mask=mask)
        d_s = s - tl.load(s_used_ptr + at, mask=mask, other=0.0)
        tl.store(y_entry_ptr + at, y, mask=mask)
        d_y = y - tl.load(y_used_ptr + at, mask=mask, other=0.0)
        tl.store(h_entry_ptr + at, h, mask=mask)
        d_h = h - tl.load(h_used_ptr + at, mask=mask, other=0.0)
        m_s_s = tl.load(m_s_s_ptr + at, mask=mask, other=0.0)
        m_s_y = tl.load(m_s_y_ptr + at, mask=mask, other=0.0)
        m_s_h = tl.load(m_s_h_ptr + at, mask=mask, other=0.0)
        m_y_s = tl.load(m_y_s_ptr + at, mask=mask, other=0.0)
        m_y_y = tl.load(m_y_y_ptr + at, mask=mask, other=0.0)
        m_y_h = tl.load(m_y_h_ptr + at, mask=mask, other=0.0)
        m_h_s = tl.load(m_h_s_ptr + at, mask=mask, other=0.0)
        m_h_y = tl.load(m_h_y_ptr + at, mask=mask, other=0.0)
        m_h_h = tl.load(m_h_h_ptr + at, mask=mask, other=0.0)
        s_end = tl.load(s_end_ptr + at, mask=mask, other=0.0)
        step_s = m_s_s * d_s + m_s_y * d_y + m_s_h * d_h
        s = s_end + tl.where(finite(step_s), step_s, 0.0)
        y_end = tl.load(y_end_ptr + at, mask=mask, other=0.0)
        step_y = m_y_s * d_s + m_y_y * d_y + m_y_h * d_h
        y = y_end + tl.where(finite(step_y), step_y, 0.0)
        y = tl.where(y > y_bound, y_bound, tl.where(y < -y_bound, -y_bound, y))
        h_end = tl.load(h_end_ptr + at, mask=mask, other=0.0)
        step_h = m_h_s * d_s + m_h_y * d_y + m_h_h * d_h
        h = h_end + tl.where(finite(step_h), step_h, 0.0)
        h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))


@triton.jit
def segments_finish_kernel(
    x_i_ptr, x_f_ptr, x_z_ptr, x_o_ptr, r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, s_first_ptr, y_first_ptr, h_first_ptr,
    s_ptr, y_ptr, h_ptr, s_check_ptr, y_check_ptr, h_check_ptr, reset_ptr, s_used_ptr, y_used_ptr, h_used_ptr,
    s_end_ptr, y_end_ptr, h_end_ptr, m_s_s_ptr, m_s_y_ptr, m_s_h_ptr, m_y_s_ptr, m_y_y_ptr, m_y_h_ptr, m_h_s_ptr,
    m_h_y_ptr, m_h_h_ptr, s_final_ptr, y_final_ptr, h_final_ptr, last_walked_ptr, last_rounds_ptr, update_ptr, pieces,
    batches, length, checks, time, channels, x_stride_batch, x_stride_time, tol, HAS_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Goes through the pieces in order and walks again each that did not start where the one before ends."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    reset_row = reset_ptr + batch * time
    x_i_row = x_i_ptr + batch * x_stride_batch + channel
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    s_row = s_ptr + batch * time * channels + channel
    y_row = y_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    r_i, r_f, r_z, r_o = load_params(r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, channel, mask)
    s_check_row = s_check_ptr + batch * checks * channels + channel
    y_check_row = y_check_ptr + batch * checks * channels + channel
    h_check_row = h_check_ptr + batch * checks * channels + channel
    s_entry = tl.load(s_first_ptr + here, mask=mask, other=0.0)
    y_entry = tl.load(y_first_ptr + here, mask=mask, other=0.0)
    h_entry = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    walked = 0
    pieces_walked = 0
    worst = 0.0
    for piece in range(0, pieces):
        start = tl.cast(piece, tl.int64) * length
        stop = tl.minimum(start + length, time)
        at = tl.cast(piece, tl.int64) * batches * channels + here
        moved = 0.0
        s_used = tl.load(s_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(s_entry, s_used, mask))
        y_used = tl.load(y_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(y_entry, y_used, mask))
        h_used = tl.load(h_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(h_entry, h_used, mask))
        s_end = tl.load(s_end_ptr + at, mask=mask, other=0.0)
        y_end = tl.load(y_end_ptr + at, mask=mask, other=0.0)
        h_end = tl.load(h_end_ptr + at, mask=mask, other=0.0)
        if moved > tol:
            s = s_entry
            y = y_entry
            h = h_entry
            m_s_s = tl.zeros_like(s_entry) + 1.0
            m_s_y = tl.zeros_like(s_entry) + 0.0
            m_s_h = tl.zeros_like(s_entry) + 0.0
            m_y_s = tl.zeros_like(s_entry) + 0.0
            m_y_y = tl.zeros_like(s_entry) + 1.0
            m_y_h = tl.zeros_like(s_entry) + 0.0
            m_h_s = tl.zeros_like(s_entry) + 0.0
            m_h_y = tl.zeros_like(s_entry) + 0.0
            m_h_h = tl.zeros_like(s_entry) + 1.0
            (
                s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, t, met,
            ) = walk_piece(
                s, y, h, m_s_s, m_s_y, m_s_h, m_y_s, m_y_y, m_y_h, m_h_s, m_h_y, m_h_h, x_i_row, x_f_row, x_z_row,
                x_o_row, r_i, r_f, r_z, r_o, s_row, y_row, h_row, s_check_row, y_check_row, h_check_row, reset_row,
                start, stop, x_stride_time, channels, mask, tol, HAS_RESET, True, True, COMPUTE,
            )
            s_end = tl.where(met == 0, s, s_end)
            y_end = tl.where(met == 0, y, y_end)
            h_end = tl.where(met == 0, h, h_end)
            walked += (t - start).to(tl.int32)
            pieces_walked += 1
        else:
            worst = tl.maximum(worst, moved)
        s_entry = s_end
        y_entry = y_end
        h_entry = h_end
    tl.store(s_final_ptr + here, s_entry, mask=mask)
    tl.store(y_final_ptr + here, y_entry, mask=mask)
    tl.store(h_final_ptr + here, h_entry, mask=mask)
    tl.store(last_walked_ptr + program, walked)
    tl.store(last_rounds_ptr + program, pieces_walked)
    tl.store(update_ptr + program, worst)


@triton.jit
def load_step(
    x_i_row, x_f_row, x_z_row, x_o_row, s_row, y_row, h_row, s_first, y_first, h_first, g_s_row, g_y_row, g_h_row,
    reset_row, t, valid, x_stride_time, channels, mask, HAS_G_S: tl.constexpr, HAS_G_Y: tl.constexpr,
    HAS_G_H: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Inputs, the state before the step (zero after a reset), cotangents of the state, and whether a reset cuts."""
    x_i, x_f, x_z, x_o = load_inputs(x_i_row, x_f_row, x_z_row, x_o_row, t * x_stride_time, mask & valid, COMPUTE)
    s = tl.load(s_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    s = tl.where(t > 0, s, s_first)
    y = tl.load(y_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    y = tl.where(t > 0, y, y_first)
    h = tl.load(h_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    h = tl.where(t > 0, h, h_first)
    g_s = tl.zeros_like(s)
    if HAS_G_S:
        g_s = tl.load(g_s_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    g_y = tl.zeros_like(y)
    if HAS_G_Y:
        g_y = tl.load(g_y_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    g_h = tl.zeros_like(h)
    if HAS_G_H:
        g_h = tl.load(g_h_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    cut = False
    if HAS_RESET:
        cut = tl.load(reset_row + t, mask=valid, other=0) != 0
        s = tl.where(cut, 0.0, s)
        y = tl.where(cut, 0.0, y)
        h = tl.where(cut, 0.0, h)
    return x_i, x_f, x_z, x_o, s, y, h, g_s, g_y, g_h, cut


@triton.jit
def retreat(
    carry_s, carry_y, carry_h, sum_r_i, lost_r_i, sum_r_f, lost_r_f, sum_r_z, lost_r_z, sum_r_o, lost_r_o, x_i, x_f,
    x_z, x_o, s, y, h, g_s, g_y, g_h, cut, r_i, r_f, r_z, r_o, to_x_i_row, to_x_f_row, to_x_z_row, to_x_o_row, t, valid,
    channels, mask, HAS_RESET: tl.constexpr,
):
    """One step back: stores the gradients of the inputs, adds those of the params, returns the carry before it."""
    to_s, to_y, to_h, to_x_i, to_x_f, to_x_z, to_x_o, to_r_i, to_r_f, to_r_z, to_r_o = pullback(
        s, y, h, x_i, x_f, x_z, x_o, r_i, r_f, r_z, r_o, g_s + carry_s, g_y + carry_y, g_h + carry_h,
    )
    tl.store(to_x_i_row + t * channels, to_x_i.to(to_x_i_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_f_row + t * channels, to_x_f.to(to_x_f_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_z_row + t * channels, to_x_z.to(to_x_z_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_o_row + t * channels, to_x_o.to(to_x_o_row.dtype.element_ty), mask=mask & valid)
    sum_r_i, lost_r_i = add_compensated(sum_r_i, lost_r_i, tl.where(valid, to_r_i, 0.0))
    sum_r_f, lost_r_f = add_compensated(sum_r_f, lost_r_f, tl.where(valid, to_r_f, 0.0))
    sum_r_z, lost_r_z = add_compensated(sum_r_z, lost_r_z, tl.where(valid, to_r_z, 0.0))
    sum_r_o, lost_r_o = add_compensated(sum_r_o, lost_r_o, tl.where(valid, to_r_o, 0.0))
    if HAS_RESET:
        to_s = tl.where(cut, 0.0, to_s)
    carry_s = tl.where(valid, to_s, carry_s)
    if HAS_RESET:
        to_y = tl.where(cut, 0.0, to_y)
    carry_y = tl.where(valid, to_y, carry_y)
    if HAS_RESET:
        to_h = tl.where(cut, 0.0, to_h)
    carry_h = tl.where(valid, to_h, carry_h)
    return carry_s, carry_y, carry_h, sum_r_i, lost_r_i, sum_r_f, lost_r_f, sum_r_z, lost_r_z, sum_r_o, lost_r_o


@triton.jit
def backward_kernel(
    x_i_ptr, x_f_ptr, x_z_ptr, x_o_ptr, r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, s_first_ptr, y_first_ptr, h_first_ptr,
    s_ptr, y_ptr, h_ptr, g_s_ptr, g_y_ptr, g_h_ptr, reset_ptr, carry_s_ptr, carry_y_ptr, carry_h_ptr, to_x_i_ptr,
    to_x_f_ptr, to_x_z_ptr, to_x_o_ptr, to_r_i_ptr, to_r_f_ptr, to_r_z_ptr, to_r_o_ptr, to_s_first_ptr, to_y_first_ptr,
    to_h_first_ptr, batches, length, time, channels, x_stride_batch, x_stride_time, HAS_G_S: tl.constexpr,
    HAS_G_Y: tl.constexpr, HAS_G_H: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
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
    x_i_row = x_i_ptr + batch * x_stride_batch + channel
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    s_row = s_ptr + batch * time * channels + channel
    y_row = y_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    g_s_row = g_s_ptr + batch * time * channels + channel
    g_y_row = g_y_ptr + batch * time * channels + channel
    g_h_row = g_h_ptr + batch * time * channels + channel
    to_x_i_row = to_x_i_ptr + batch * time * channels + channel
    to_x_f_row = to_x_f_ptr + batch * time * channels + channel
    to_x_z_row = to_x_z_ptr + batch * time * channels + channel
    to_x_o_row = to_x_o_ptr + batch * time * channels + channel
    r_i, r_f, r_z, r_o = load_params(r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, channel, mask)
    s_first = tl.load(s_first_ptr + here, mask=mask, other=0.0)
    y_first = tl.load(y_first_ptr + here, mask=mask, other=0.0)
    h_first = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    at = piece.to(tl.int64) * batches * channels + here
    carry_s = tl.load(carry_s_ptr + at, mask=mask, other=0.0)
    carry_y = tl.load(carry_y_ptr + at, mask=mask, other=0.0)
    carry_h = tl.load(carry_h_ptr + at, mask=mask, other=0.0)
    sum_r_i = tl.zeros_like(carry_s)
    lost_r_i = tl.zeros_like(carry_s)
    sum_r_f = tl.zeros_like(carry_s)
    lost_r_f = tl.zeros_like(carry_s)
    sum_r_z = tl.zeros_like(carry_s)
    lost_r_z = tl.zeros_like(carry_s)
    sum_r_o = tl.zeros_like(carry_s)
    lost_r_o = tl.zeros_like(carry_s)
    x_i_0, x_f_0, x_z_0, x_o_0, s_0, y_0, h_0, g_s_0, g_y_0, g_h_0, cut_0 = load_step(
        x_i_row, x_f_row, x_z_row, x_o_row, s_row, y_row, h_row, s_first, y_first, h_first, g_s_row, g_y_row, g_h_row,
        reset_row, stop - 1, stop - 1 >= start, x_stride_time, channels, mask, HAS_G_S, HAS_G_Y, HAS_G_H, HAS_RESET,
        COMPUTE,
    )
    x_i_1, x_f_1, x_z_1, x_o_1, s_1, y_1, h_1, g_s_1, g_y_1, g_h_1, cut_1 = load_step(
        x_i_row, x_f_row, x_z_row, x_o_row, s_row, y_row, h_row, s_first, y_first, h_first, g_s_row, g_y_row, g_h_row,
        reset_row, stop - 2, stop - 2 >= start, x_stride_time, channels, mask, HAS_G_S, HAS_G_Y, HAS_G_H, HAS_RESET,
        COMPUTE,
    )
    t = stop - 1
    while t >= start:
        (
            x_i_ahead_0, x_f_ahead_0, x_z_ahead_0, x_o_ahead_0, s_ahead_0, y_ahead_0, h_ahead_0, g_s_ahead_0,
            g_y_ahead_0, g_h_ahead_0, cut_ahead_0,
        ) = load_step(
            x_i_row, x_f_row, x_z_row, x_o_row, s_row, y_row, h_row, s_first, y_first, h_first, g_s_row, g_y_row,
            g_h_row, reset_row, t - 2, t - 2 >= start, x_stride_time, channels, mask, HAS_G_S, HAS_G_Y, HAS_G_H,
            HAS_RESET, COMPUTE,
        )
        (
            x_i_ahead_1, x_f_ahead_1, x_z_ahead_1, x_o_ahead_1, s_ahead_1, y_ahead_1, h_ahead_1, g_s_ahead_1,
            g_y_ahead_1, g_h_ahead_1, cut_ahead_1,
        ) = load_step(
            x_i_row, x_f_row, x_z_row, x_o_row, s_row, y_row, h_row, s_first, y_first, h_first, g_s_row, g_y_row,
            g_h_row, reset_row, t - 3, t - 3 >= start, x_stride_time, channels, mask, HAS_G_S, HAS_G_Y, HAS_G_H,
            HAS_RESET, COMPUTE,
        )
        (
            carry_s, carry_y, carry_h, sum_r_i, lost_r_i, sum_r_f, lost_r_f, sum_r_z, lost_r_z, sum_r_o, lost_r_o,
        ) = retreat(
            carry_s, carry_y, carry_h, sum_r_i, lost_r_i, sum_r_f, lost_r_f, sum_r_z, lost_r_z, sum_r_o, lost_r_o,
            x_i_0, x_f_0, x_z_0, x_o_0, s_0, y_0, h_0, g_s_0, g_y_0, g_h_0, cut_0, r_i, r_f, r_z, r_o, to_x_i_row,
            to_x_f_row, to_x_z_row, to_x_o_row, t, t >= start, channels, mask, HAS_RESET,
        )
        (
            carry_s, carry_y, carry_h, sum_r_i, lost_r_i, sum_r_f, lost_r_f, sum_r_z, lost_r_z, sum_r_o, lost_r_o,
        ) = retreat(
            carry_s, carry_y, carry_h, sum_r_i, lost_r_i, sum_r_f, lost_r_f, sum_r_z, lost_r_z, sum_r_o, lost_r_o,
            x_i_1, x_f_1, x_z_1, x_o_1, s_1, y_1, h_1, g_s_1, g_y_1, g_h_1, cut_1, r_i, r_f, r_z, r_o, to_x_i_row,
            to_x_f_row, to_x_z_row, to_x_o_row, t - 1, t - 1 >= start, channels, mask, HAS_RESET,
        )
        x_i_0 = x_i_ahead_0
        x_f_0 = x_f_ahead_0
        x_z_0 = x_z_ahead_0
        x_o_0 = x_o_ahead_0
        s_0 = s_ahead_0
        y_0 = y_ahead_0
        h_0 = h_ahead_0
        g_s_0 = g_s_ahead_0
        g_y_0 = g_y_ahead_0
        g_h_0 = g_h_ahead_0
        cut_0 = cut_ahead_0
        x_i_1 = x_i_ahead_1
        x_f_1 = x_f_ahead_1
        x_z_1 = x_z_ahead_1
        x_o_1 = x_o_ahead_1
        s_1 = s_ahead_1
        y_1 = y_ahead_1
        h_1 = h_ahead_1
        g_s_1 = g_s_ahead_1
        g_y_1 = g_y_ahead_1
        g_h_1 = g_h_ahead_1
        cut_1 = cut_ahead_1
        t -= 2
    tl.store(to_r_i_ptr + at, sum_r_i, mask=mask)
    tl.store(to_r_f_ptr + at, sum_r_f, mask=mask)
    tl.store(to_r_z_ptr + at, sum_r_z, mask=mask)
    tl.store(to_r_o_ptr + at, sum_r_o, mask=mask)
    tl.store(to_s_first_ptr + here, carry_s, mask=mask & (piece == 0))
    tl.store(to_y_first_ptr + here, carry_y, mask=mask & (piece == 0))
    tl.store(to_h_first_ptr + here, carry_h, mask=mask & (piece == 0))


@triton.jit
def backward_maps_kernel(
    x_i_ptr, x_f_ptr, x_z_ptr, x_o_ptr, r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, s_first_ptr, y_first_ptr, h_first_ptr,
    s_ptr, y_ptr, h_ptr, g_s_ptr, g_y_ptr, g_h_ptr, reset_ptr, m_s_s_ptr, m_s_y_ptr, m_s_h_ptr, m_y_s_ptr, m_y_y_ptr,
    m_y_h_ptr, m_h_s_ptr, m_h_y_ptr, m_h_h_ptr, d_s_ptr, d_y_ptr, d_h_ptr, steps_ptr, batches, length, time, channels,
    x_stride_batch, x_stride_time, HAS_G_S: tl.constexpr, HAS_G_Y: tl.constexpr, HAS_G_H: tl.constexpr,
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
    x_i_row = x_i_ptr + batch * x_stride_batch + channel
    x_f_row = x_f_ptr + batch * x_stride_batch + channel
    x_z_row = x_z_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    s_row = s_ptr + batch * time * channels + channel
    y_row = y_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    g_s_row = g_s_ptr + batch * time * channels + channel
    g_y_row = g_y_ptr + batch * time * channels + channel
    g_h_row = g_h_ptr + batch * time * channels + channel
    r_i, r_f, r_z, r_o = load_params(r_i_ptr, r_f_ptr, r_z_ptr, r_o_ptr, channel, mask)
    s_first = tl.load(s_first_ptr + here, mask=mask, other=0.0)
    y_first = tl.load(y_first_ptr + here, mask=mask, other=0.0)
    h_first = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    m_s_s = tl.zeros_like(s_first) + 1.0
    m_s_y = tl.zeros_like(s_first) + 0.0
    m_s_h = tl.zeros_like(s_first) + 0.0
    m_y_s = tl.zeros_like(s_first) + 0.0
    m_y_y = tl.zeros_like(s_first) + 1.0
    m_y_h = tl.zeros_like(s_first) + 0.0
    m_h_s = tl.zeros_like(s_first) + 0.0
    m_h_y = tl.zeros_like(s_first) + 0.0
    m_h_h = tl.zeros_like(s_first) + 1.0
    d_s = tl.zeros_like(s_first)
    d_y = tl.zeros_like(y_first)
    d_h = tl.zeros_like(h_first)
    x_i_0, x_f_0, x_z_0, x_o_0, s_0, y_0, h_0, g_s_0, g_y_0, g_h_0, cut_0 = load_step(
        x_i_row, x_f_row, x_z_row, x_o_row, s_row, y_row, h_row, s_first, y_first, h_first, g_s_row, g_y_row, g_h_row,
        reset_row, start, start < stop, x_stride_time, channels, mask, HAS_G_S, HAS_G_Y, HAS_G_H, HAS_RESET, COMPUTE,
    )
    t = start
    inside = 1.0
    while (t < stop) & (inside > TINY):
        (
            x_i_ahead_0, x_f_ahead_0, x_z_ahead_0, x_o_ahead_0, s_ahead_0, y_ahead_0, h_ahead_0, g_s_ahead_0,
            g_y_ahead_0, g_h_ahead_0, cut_ahead_0,
        ) = load_step(
            x_i_row, x_f_row, x_z_row, x_o_row, s_row, y_row, h_row, s_first, y_first, h_first, g_s_row, g_y_row,
            g_h_row, reset_row, t + 1, t + 1 < stop, x_stride_time, channels, mask, HAS_G_S, HAS_G_Y, HAS_G_H,
            HAS_RESET, COMPUTE,
        )
        (
            _next_s, _next_y, _next_h, j_s_s, j_s_y, j_s_h, j_y_s, j_y_y, j_y_h, j_h_s, j_h_y, j_h_h,
        ) = linearised(s_0, y_0, h_0, x_i_0, x_f_0, x_z_0, x_o_0, r_i, r_f, r_z, r_o)
        new_m_s_s = m_s_s * j_s_s + m_s_h * j_s_h
        new_m_s_y = m_s_s * j_y_s + m_s_y * j_y_y + m_s_h * j_y_h
        new_m_s_h = m_s_s * j_h_s + m_s_y * j_h_y + m_s_h * j_h_h
        new_m_y_s = m_y_s * j_s_s + m_y_h * j_s_h
        new_m_y_y = m_y_s * j_y_s + m_y_y * j_y_y + m_y_h * j_y_h
        new_m_y_h = m_y_s * j_h_s + m_y_y * j_h_y + m_y_h * j_h_h
        new_m_h_s = m_h_s * j_s_s + m_h_h * j_s_h
        new_m_h_y = m_h_s * j_y_s + m_h_y * j_y_y + m_h_h * j_y_h
        new_m_h_h = m_h_s * j_h_s + m_h_y * j_h_y + m_h_h * j_h_h
        inside = 0.0
        if HAS_RESET:
            new_m_s_s = tl.where(cut_0, 0.0, new_m_s_s)
        m_s_s = tl.zeros_like(m_s_s) + new_m_s_s
        inside = tl.maximum(inside, largest_size(m_s_s, mask))
        if HAS_RESET:
            new_m_s_y = tl.where(cut_0, 0.0, new_m_s_y)
        m_s_y = tl.zeros_like(m_s_y) + new_m_s_y
        inside = tl.maximum(inside, largest_size(m_s_y, mask))
        if HAS_RESET:
            new_m_s_h = tl.where(cut_0, 0.0, new_m_s_h)
        m_s_h = tl.zeros_like(m_s_h) + new_m_s_h
        inside = tl.maximum(inside, largest_size(m_s_h, mask))
        if HAS_RESET:
            new_m_y_s = tl.where(cut_0, 0.0, new_m_y_s)
        m_y_s = tl.zeros_like(m_y_s) + new_m_y_s
        inside = tl.maximum(inside, largest_size(m_y_s, mask))
        if HAS_RESET:
            new_m_y_y = tl.where(cut_0, 0.0, new_m_y_y)
        m_y_y = tl.zeros_like(m_y_y) + new_m_y_y
        inside = tl.maximum(inside, largest_size(m_y_y, mask))
        if HAS_RESET:
            new_m_y_h = tl.where(cut_0, 0.0, new_m_y_h)
        m_y_h = tl.zeros_like(m_y_h) + new_m_y_h
        inside = tl.maximum(inside, largest_size(m_y_h, mask))
        if HAS_RESET:
            new_m_h_s = tl.where(cut_0, 0.0, new_m_h_s)
        m_h_s = tl.zeros_like(m_h_s) + new_m_h_s
        inside = tl.maximum(inside, largest_size(m_h_s, mask))
        if HAS_RESET:
            new_m_h_y = tl.where(cut_0, 0.0, new_m_h_y)
        m_h_y = tl.zeros_like(m_h_y) + new_m_h_y
        inside = tl.maximum(inside, largest_size(m_h_y, mask))
        if HAS_RESET:
            new_m_h_h = tl.where(cut_0, 0.0, new_m_h_h)
        m_h_h = tl.zeros_like(m_h_h) + new_m_h_h
        inside = tl.maximum(inside, largest_size(m_h_h, mask))
        d_s += m_s_s * g_s_0
        d_s += m_s_y * g_y_0
        d_s += m_s_h * g_h_0
        d_y += m_y_s * g_s_0
        d_y += m_y_y * g_y_0
        d_y += m_y_h * g_h_0
        d_h += m_h_s * g_s_0
        d_h += m_h_y * g_y_0
        d_h += m_h_h * g_h_0
        x_i_0 = x_i_ahead_0
        x_f_0 = x_f_ahead_0
        x_z_0 = x_z_ahead_0
        x_o_0 = x_o_ahead_0
        s_0 = s_ahead_0
        y_0 = y_ahead_0
        h_0 = h_ahead_0
        g_s_0 = g_s_ahead_0
        g_y_0 = g_y_ahead_0
        g_h_0 = g_h_ahead_0
        cut_0 = cut_ahead_0
        t += 1
    at = piece.to(tl.int64) * batches * channels + here
    tl.store(m_s_s_ptr + at, m_s_s, mask=mask)
    tl.store(m_s_y_ptr + at, m_s_y, mask=mask)
    tl.store(m_s_h_ptr + at, m_s_h, mask=mask)
    tl.store(m_y_s_ptr + at, m_y_s, mask=mask)
    tl.store(m_y_y_ptr + at, m_y_y, mask=mask)
    tl.store(m_y_h_ptr + at, m_y_h, mask=mask)
    tl.store(m_h_s_ptr + at, m_h_s, mask=mask)
    tl.store(m_h_y_ptr + at, m_h_y, mask=mask)
    tl.store(m_h_h_ptr + at, m_h_h, mask=mask)
    tl.store(d_s_ptr + at, d_s, mask=mask)
    tl.store(d_y_ptr + at, d_y, mask=mask)
    tl.store(d_h_ptr + at, d_h, mask=mask)
    tl.store(steps_ptr + program, (t - start).to(tl.int32))


@triton.jit
def backward_join_kernel(
    m_s_s_ptr, m_s_y_ptr, m_s_h_ptr, m_y_s_ptr, m_y_y_ptr, m_y_h_ptr, m_h_s_ptr, m_h_y_ptr, m_h_h_ptr, d_s_ptr, d_y_ptr,
    d_h_ptr, g_s_final_ptr, g_y_final_ptr, g_h_final_ptr, carry_s_ptr, carry_y_ptr, carry_h_ptr, pieces, batches,
    channels, BLOCK: tl.constexpr,
):
    """The carry at the end of every piece, from the last piece to the first."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    carry_s = tl.load(g_s_final_ptr + here, mask=mask, other=0.0)
    carry_y = tl.load(g_y_final_ptr + here, mask=mask, other=0.0)
    carry_h = tl.load(g_h_final_ptr + here, mask=mask, other=0.0)
    for back in range(0, pieces):
        at = (tl.cast(pieces - 1, tl.int64) - back) * batches * channels + here
        tl.store(carry_s_ptr + at, carry_s, mask=mask)
        tl.store(carry_y_ptr + at, carry_y, mask=mask)
        tl.store(carry_h_ptr + at, carry_h, mask=mask)
        m_s_s = tl.load(m_s_s_ptr + at, mask=mask, other=0.0)
        m_s_y = tl.load(m_s_y_ptr + at, mask=mask, other=0.0)
        m_s_h = tl.load(m_s_h_ptr + at, mask=mask, other=0.0)
        m_y_s = tl.load(m_y_s_ptr + at, mask=mask, other=0.0)
        m_y_y = tl.load(m_y_y_ptr + at, mask=mask, other=0.0)
        m_y_h = tl.load(m_y_h_ptr + at, mask=mask, other=0.0)
        m_h_s = tl.load(m_h_s_ptr + at, mask=mask, other=0.0)
        m_h_y = tl.load(m_h_y_ptr + at, mask=mask, other=0.0)
        m_h_h = tl.load(m_h_h_ptr + at, mask=mask, other=0.0)
        d_s = tl.load(d_s_ptr + at, mask=mask, other=0.0)
        d_y = tl.load(d_y_ptr + at, mask=mask, other=0.0)
        d_h = tl.load(d_h_ptr + at, mask=mask, other=0.0)
        new_carry_s = m_s_s * carry_s + m_s_y * carry_y + m_s_h * carry_h + d_s
        new_carry_y = m_y_s * carry_s + m_y_y * carry_y + m_y_h * carry_h + d_y
        new_carry_h = m_h_s * carry_s + m_h_y * carry_y + m_h_h * carry_h + d_h
        carry_s = new_carry_s
        carry_y = new_carry_y
        carry_h = new_carry_h
