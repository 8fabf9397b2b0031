# fmt: off
# ruff: noqa: RUF059
# mypy: ignore-errors
"""Kernels of the cell 'fastslow', generated from its step by paralm_kernels.generate; not edited by hand.

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        (u, v, h), (x_u, x_v, x_o), (a_u, b, a_v, a_o, p, q) = state, inputs, params
        u = torch.tanh(a_u * u + b * h + x_u)
        v = v + torch.sigmoid(a_v * v + x_v) * (u - v)  # (1−g) v + g u
        o = torch.sigmoid(a_o * h + x_o)
        return u, v, o * torch.tanh(p * u + q * v)

python -m paralm_kernels.generate writes this file again.
"""

import triton
import triton.language as tl

from ..triton_math import add_compensated, finite, largest_size, largest_update, relative_change, sigmoid, spread, tanh


@triton.jit
def step(u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q):
    """h_t = step(h_{t-1}, x_t; p)."""
    v0 = tanh(x_u + (u * a_u + h * b))
    v1 = v + sigmoid(x_v + v * a_v) * (v0 - v)
    next_u = v0
    next_v = v1
    next_h = sigmoid(x_o + h * a_o) * tanh(p * v0 + q * v1)
    return next_u, next_v, next_h


@triton.jit
def linearised(u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q):
    """The next state, and its Jacobian by the state before."""
    v0 = tanh(x_u + (u * a_u + h * b))
    v1 = sigmoid(x_v + v * a_v)
    v2 = v0 - v
    v3 = v + v1 * v2
    v4 = sigmoid(x_o + h * a_o)
    v5 = tanh(p * v0 + q * v3)
    v6 = 1.0 * (1.0 - v0 * v0)
    v7 = v1 * (1.0 - v0 * v0)
    v8 = v4 * (1.0 - v5 * v5)
    v9 = q * v8
    v10 = v1 * v9
    v11 = (p * v8 + v10) * (1.0 - v0 * v0)
    next_u = v0
    next_v = v3
    next_h = v4 * v5
    j_u_u = a_u * v6
    j_u_v = spread(0.0, u)
    j_u_h = b * v6
    j_v_u = a_u * v7
    j_v_v = 1.0 - v1 + a_v * (v2 * (v1 * (1.0 - v1)))
    j_v_h = b * v7
    j_h_u = a_u * v11
    j_h_v = v9 - v10 + a_v * (v2 * v9 * (v1 * (1.0 - v1)))
    j_h_h = a_o * (v5 * (v4 * (1.0 - v4))) + b * v11
    return next_u, next_v, next_h, j_u_u, j_u_v, j_u_h, j_v_u, j_v_v, j_v_h, j_h_u, j_h_v, j_h_h


@triton.jit
def pullback(u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q, grad_u, grad_v, grad_h):
    """From the cotangents of the next state: those of the state before, of inputs and of params."""
    v0 = tanh(x_u + (u * a_u + h * b))
    v1 = sigmoid(x_v + v * a_v)
    v2 = v0 - v
    v3 = v + v1 * v2
    v4 = sigmoid(x_o + h * a_o)
    v5 = tanh(p * v0 + q * v3)
    v6 = grad_h * v4 * (1.0 - v5 * v5)
    v7 = grad_v + q * v6
    v8 = grad_h * v5 * (v4 * (1.0 - v4))
    v9 = v1 * v7
    v10 = v2 * v7 * (v1 * (1.0 - v1))
    v11 = (grad_u + p * v6 + v9) * (1.0 - v0 * v0)
    to_u = a_u * v11
    to_v = v7 - v9 + a_v * v10
    to_h = a_o * v8 + b * v11
    to_x_u = v11
    to_x_v = v10
    to_x_o = v8
    to_a_u = u * v11
    to_b = h * v11
    to_a_v = v * v10
    to_a_o = h * v8
    to_p = v0 * v6
    to_q = v3 * v6
    return to_u, to_v, to_h, to_x_u, to_x_v, to_x_o, to_a_u, to_b, to_a_v, to_a_o, to_p, to_q


@triton.jit
def load_inputs(x_u_row, x_v_row, x_o_row, offset, mask, COMPUTE: tl.constexpr):
    """The inputs at an offset, in the compute dtype."""
    x_u = tl.load(x_u_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_v = tl.load(x_v_row + offset, mask=mask, other=0.0).to(COMPUTE)
    x_o = tl.load(x_o_row + offset, mask=mask, other=0.0).to(COMPUTE)
    return x_u, x_v, x_o


@triton.jit
def load_params(a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, channel, mask):
    """The parameters of some channels."""
    a_u = tl.load(a_u_ptr + channel, mask=mask, other=0.0)
    b = tl.load(b_ptr + channel, mask=mask, other=0.0)
    a_v = tl.load(a_v_ptr + channel, mask=mask, other=0.0)
    a_o = tl.load(a_o_ptr + channel, mask=mask, other=0.0)
    p = tl.load(p_ptr + channel, mask=mask, other=0.0)
    q = tl.load(q_ptr + channel, mask=mask, other=0.0)
    return a_u, b, a_v, a_o, p, q


@triton.jit
def advance(
    u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q,
    u_row, v_row, h_row, reset_row, t, stop, channels, mask, HAS_RESET: tl.constexpr, JACOBIAN: tl.constexpr,
):
    """One step of a walk: the state after it, which is stored, and the product of Jacobians."""
    valid = t < stop
    if HAS_RESET:
        cut = tl.load(reset_row + t, mask=valid, other=0) != 0
        u = tl.where(cut, 0.0, u)
        v = tl.where(cut, 0.0, v)
        h = tl.where(cut, 0.0, h)
    if JACOBIAN:
        (
            next_u, next_v, next_h, j_u_u, j_u_v, j_u_h, j_v_u, j_v_v, j_v_h, j_h_u, j_h_v, j_h_h,
        ) = linearised(u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q)
        new_m_u_u = j_u_u * m_u_u + j_u_h * m_h_u
        new_m_u_v = j_u_u * m_u_v + j_u_h * m_h_v
        new_m_u_h = j_u_u * m_u_h + j_u_h * m_h_h
        new_m_v_u = j_v_u * m_u_u + j_v_v * m_v_u + j_v_h * m_h_u
        new_m_v_v = j_v_u * m_u_v + j_v_v * m_v_v + j_v_h * m_h_v
        new_m_v_h = j_v_u * m_u_h + j_v_v * m_v_h + j_v_h * m_h_h
        new_m_h_u = j_h_u * m_u_u + j_h_v * m_v_u + j_h_h * m_h_u
        new_m_h_v = j_h_u * m_u_v + j_h_v * m_v_v + j_h_h * m_h_v
        new_m_h_h = j_h_u * m_u_h + j_h_v * m_v_h + j_h_h * m_h_h
        if HAS_RESET:
            new_m_u_u = tl.where(cut, 0.0, new_m_u_u)
            new_m_u_v = tl.where(cut, 0.0, new_m_u_v)
            new_m_u_h = tl.where(cut, 0.0, new_m_u_h)
            new_m_v_u = tl.where(cut, 0.0, new_m_v_u)
            new_m_v_v = tl.where(cut, 0.0, new_m_v_v)
            new_m_v_h = tl.where(cut, 0.0, new_m_v_h)
            new_m_h_u = tl.where(cut, 0.0, new_m_h_u)
            new_m_h_v = tl.where(cut, 0.0, new_m_h_v)
            new_m_h_h = tl.where(cut, 0.0, new_m_h_h)
        m_u_u = tl.where(valid, new_m_u_u, m_u_u)
        m_u_v = tl.where(valid, new_m_u_v, m_u_v)
        m_u_h = tl.where(valid, new_m_u_h, m_u_h)
        m_v_u = tl.where(valid, new_m_v_u, m_v_u)
        m_v_v = tl.where(valid, new_m_v_v, m_v_v)
        m_v_h = tl.where(valid, new_m_v_h, m_v_h)
        m_h_u = tl.where(valid, new_m_h_u, m_h_u)
        m_h_v = tl.where(valid, new_m_h_v, m_h_v)
        m_h_h = tl.where(valid, new_m_h_h, m_h_h)
    else:
        next_u, next_v, next_h = step(u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q)
    tl.store(u_row + t * channels, next_u.to(u_row.dtype.element_ty), mask=mask & valid)
    tl.store(v_row + t * channels, next_v.to(v_row.dtype.element_ty), mask=mask & valid)
    tl.store(h_row + t * channels, next_h.to(h_row.dtype.element_ty), mask=mask & valid)
    u = tl.where(valid, next_u, u)
    v = tl.where(valid, next_v, v)
    h = tl.where(valid, next_h, h)
    return u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h


@triton.jit
def walk_piece(
    u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, x_u_row, x_v_row, x_o_row, a_u, b, a_v, a_o,
    p, q, u_row, v_row, h_row, u_check_row, v_check_row, h_check_row, reset_row, start, stop, x_stride_time, channels,
    mask, tol, HAS_RESET: tl.constexpr, PIECES: tl.constexpr, MEET: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Walks from start to stop, or until the state meets the stored one; start is a multiple of 32.

    With PIECES it carries the product of Jacobians and keeps a checkpoint every 32 steps.
    """
    x_u_0, x_v_0, x_o_0 = load_inputs(
        x_u_row, x_v_row, x_o_row, (start) * x_stride_time, mask & (start < stop), COMPUTE,
    )
    x_u_1, x_v_1, x_o_1 = load_inputs(
        x_u_row, x_v_row, x_o_row, (start + 1) * x_stride_time, mask & (start + 1 < stop), COMPUTE,
    )
    x_u_2, x_v_2, x_o_2 = load_inputs(
        x_u_row, x_v_row, x_o_row, (start + 2) * x_stride_time, mask & (start + 2 < stop), COMPUTE,
    )
    x_u_3, x_v_3, x_o_3 = load_inputs(
        x_u_row, x_v_row, x_o_row, (start + 3) * x_stride_time, mask & (start + 3 < stop), COMPUTE,
    )
    t = start
    met = 0
    while (t < stop) & (met == 0):
        x_u_ahead_0, x_v_ahead_0, x_o_ahead_0 = load_inputs(
            x_u_row, x_v_row, x_o_row, (t + 4) * x_stride_time, mask & (t + 4 < stop), COMPUTE,
        )
        x_u_ahead_1, x_v_ahead_1, x_o_ahead_1 = load_inputs(
            x_u_row, x_v_row, x_o_row, (t + 5) * x_stride_time, mask & (t + 5 < stop), COMPUTE,
        )
        x_u_ahead_2, x_v_ahead_2, x_o_ahead_2 = load_inputs(
            x_u_row, x_v_row, x_o_row, (t + 6) * x_stride_time, mask & (t + 6 < stop), COMPUTE,
        )
        x_u_ahead_3, x_v_ahead_3, x_o_ahead_3 = load_inputs(
            x_u_row, x_v_row, x_o_row, (t + 7) * x_stride_time, mask & (t + 7 < stop), COMPUTE,
        )
        u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h = advance(
            u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, x_u_0, x_v_0, x_o_0, a_u, b, a_v,
            a_o, p, q, u_row, v_row, h_row, reset_row, t, stop, channels, mask, HAS_RESET, PIECES,
        )
        u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h = advance(
            u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, x_u_1, x_v_1, x_o_1, a_u, b, a_v,
            a_o, p, q, u_row, v_row, h_row, reset_row, t + 1, stop, channels, mask, HAS_RESET, PIECES,
        )
        u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h = advance(
            u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, x_u_2, x_v_2, x_o_2, a_u, b, a_v,
            a_o, p, q, u_row, v_row, h_row, reset_row, t + 2, stop, channels, mask, HAS_RESET, PIECES,
        )
        u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h = advance(
            u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, x_u_3, x_v_3, x_o_3, a_u, b, a_v,
            a_o, p, q, u_row, v_row, h_row, reset_row, t + 3, stop, channels, mask, HAS_RESET, PIECES,
        )
        x_u_0, x_v_0, x_o_0 = x_u_ahead_0, x_v_ahead_0, x_o_ahead_0
        x_u_1, x_v_1, x_o_1 = x_u_ahead_1, x_v_ahead_1, x_o_ahead_1
        x_u_2, x_v_2, x_o_2 = x_u_ahead_2, x_v_ahead_2, x_o_ahead_2
        x_u_3, x_v_3, x_o_3 = x_u_ahead_3, x_v_ahead_3, x_o_ahead_3
        t += 4
        if PIECES:
            edge = ((t - start) % 32 == 0) | (t >= stop)
            if edge:
                here = (tl.minimum(t, stop) - 1) // 32 * channels
                if MEET:
                    moved = 0.0
                    old = tl.load(u_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(u, old, mask))
                    old = tl.load(v_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(v, old, mask))
                    old = tl.load(h_check_row + here, mask=mask, other=0.0)
                    moved = tl.maximum(moved, relative_change(h, old, mask))
                    met = (moved <= tol).to(tl.int32)
                tl.store(u_check_row + here, u, mask=mask & (met == 0))
                tl.store(v_check_row + here, v, mask=mask & (met == 0))
                tl.store(h_check_row + here, h, mask=mask & (met == 0))
    return u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, tl.minimum(t, stop), met


@triton.jit
def walk_kernel(
    x_u_ptr, x_v_ptr, x_o_ptr, a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, u_first_ptr, v_first_ptr, h_first_ptr,
    u_ptr, v_ptr, h_ptr, u_final_ptr, v_final_ptr, h_final_ptr, reset_ptr, time, channels, x_stride_batch,
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
    x_u_row = x_u_ptr + batch * x_stride_batch + channel
    x_v_row = x_v_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    u_row = u_ptr + batch * time * channels + channel
    v_row = v_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    a_u, b, a_v, a_o, p, q = load_params(a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, channel, mask)
    u = tl.load(u_first_ptr + here, mask=mask, other=0.0)
    v = tl.load(v_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    (
        u, v, h, _m_u_u, _m_u_v, _m_u_h, _m_v_u, _m_v_v, _m_v_h, _m_h_u, _m_h_v, _m_h_h, _t, _met,
    ) = walk_piece(
        u, v, h, u, u, u, u, u, u, u, u, u, x_u_row, x_v_row, x_o_row, a_u, b, a_v, a_o, p, q, u_row, v_row, h_row,
        u_row, v_row, h_row, reset_row, batch * 0, time, x_stride_time, channels, mask, 0.0, HAS_RESET, False, False,
        COMPUTE,
    )
    tl.store(u_final_ptr + here, u, mask=mask)
    tl.store(v_final_ptr + here, v, mask=mask)
    tl.store(h_final_ptr + here, h, mask=mask)


@triton.jit
def decode_kernel(
    x_u_ptr, x_v_ptr, x_o_ptr, a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, u_first_ptr, v_first_ptr, h_first_ptr,
    u_final_ptr, v_final_ptr, h_final_ptr, channels, x_stride_batch, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One step, state to state, for generation."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    a_u, b, a_v, a_o, p, q = load_params(a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, channel, mask)
    x_u, x_v, x_o = load_inputs(x_u_ptr, x_v_ptr, x_o_ptr, batch * x_stride_batch + channel, mask, COMPUTE)
    u = tl.load(u_first_ptr + here, mask=mask, other=0.0)
    v = tl.load(v_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    next_u, next_v, next_h = step(u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q)
    tl.store(u_final_ptr + here, next_u, mask=mask)
    tl.store(v_final_ptr + here, next_v, mask=mask)
    tl.store(h_final_ptr + here, next_h, mask=mask)


@triton.jit
def compose(
    first_m_u_u, first_m_u_v, first_m_u_h, first_m_v_u, first_m_v_v, first_m_v_h, first_m_h_u, first_m_h_v, first_m_h_h,
    first_d_u, first_d_v, first_d_h, last_m_u_u, last_m_u_v, last_m_u_h, last_m_v_u, last_m_v_v, last_m_v_h, last_m_h_u,
    last_m_h_v, last_m_h_h, last_d_u, last_d_v, last_d_h,
):
    """Two affine maps as one: the first, then the last."""
    m_u_u = last_m_u_u * first_m_u_u + last_m_u_v * first_m_v_u + last_m_u_h * first_m_h_u
    m_u_v = last_m_u_u * first_m_u_v + last_m_u_v * first_m_v_v + last_m_u_h * first_m_h_v
    m_u_h = last_m_u_u * first_m_u_h + last_m_u_v * first_m_v_h + last_m_u_h * first_m_h_h
    m_v_u = last_m_v_u * first_m_u_u + last_m_v_v * first_m_v_u + last_m_v_h * first_m_h_u
    m_v_v = last_m_v_u * first_m_u_v + last_m_v_v * first_m_v_v + last_m_v_h * first_m_h_v
    m_v_h = last_m_v_u * first_m_u_h + last_m_v_v * first_m_v_h + last_m_v_h * first_m_h_h
    m_h_u = last_m_h_u * first_m_u_u + last_m_h_v * first_m_v_u + last_m_h_h * first_m_h_u
    m_h_v = last_m_h_u * first_m_u_v + last_m_h_v * first_m_v_v + last_m_h_h * first_m_h_v
    m_h_h = last_m_h_u * first_m_u_h + last_m_h_v * first_m_v_h + last_m_h_h * first_m_h_h
    d_u = last_m_u_u * first_d_u + last_m_u_v * first_d_v + last_m_u_h * first_d_h + last_d_u
    d_v = last_m_v_u * first_d_u + last_m_v_v * first_d_v + last_m_v_h * first_d_h + last_d_v
    d_h = last_m_h_u * first_d_u + last_m_h_v * first_d_v + last_m_h_h * first_d_h + last_d_h
    return m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, d_u, d_v, d_h


@triton.jit
def previous(u, v, h, u_entry, v_entry, h_entry, cut, HAS_RESET: tl.constexpr, TILE: tl.constexpr):
    """The state before each step of a tile."""
    row = tl.arange(0, TILE)[:, None]
    back = tl.broadcast_to(tl.maximum(row - 1, 0), u.shape)
    u = tl.where(row == 0, u_entry[None, :], tl.gather(u, back, 0))
    v = tl.where(row == 0, v_entry[None, :], tl.gather(v, back, 0))
    h = tl.where(row == 0, h_entry[None, :], tl.gather(h, back, 0))
    if HAS_RESET:
        u = tl.where(cut, 0.0, u)
        v = tl.where(cut, 0.0, v)
        h = tl.where(cut, 0.0, h)
    return u, v, h


@triton.jit
def tile_kernel(
    x_u_ptr, x_v_ptr, x_o_ptr, a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, u_first_ptr, v_first_ptr, h_first_ptr,
    u_bound_ptr, v_bound_ptr, h_bound_ptr, u_ptr, v_ptr, h_ptr, u_final_ptr, v_final_ptr, h_final_ptr, reset_ptr,
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
    x_u_row = x_u_ptr + batch * x_stride_batch + channel
    x_v_row = x_v_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    u_row = u_ptr + batch * time * channels + channel
    v_row = v_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    a_u, b, a_v, a_o, p, q = load_params(a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, channel, mask)
    u_entry = tl.load(u_first_ptr + here, mask=mask, other=0.0)
    v_entry = tl.load(v_first_ptr + here, mask=mask, other=0.0)
    h_entry = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    u_bound = tl.load(u_bound_ptr + here, mask=mask, other=0.0)
    v_bound = tl.load(v_bound_ptr + here, mask=mask, other=0.0)
    h_bound = tl.load(h_bound_ptr + here, mask=mask, other=0.0)
    row = tl.arange(0, TILE)[:, None]
    most = 0
    worst = 0.0
    for first in range(0, time, TILE):
        t = tl.cast(first, tl.int64) + row
        inside = (t < time) & mask[None, :]
        x_u, x_v, x_o = load_inputs(
            x_u_row[None, :], x_v_row[None, :], x_o_row[None, :], t * x_stride_time, inside, COMPUTE,
        )
        cut = False
        if HAS_RESET:
            cut = tl.load(reset_row + t, mask=t < time, other=0) != 0
        u = tl.zeros_like(x_u)
        v = tl.zeros_like(x_u)
        h = tl.zeros_like(x_u)
        next_u, next_v, next_h = step(u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q)
        u = tl.where(finite(next_u), next_u, 0.0)
        v = tl.where(finite(next_v), next_v, 0.0)
        h = tl.where(finite(next_h), next_h, 0.0)
        u = tl.where(u > u_bound, u_bound, tl.where(u < -u_bound, -u_bound, u))
        v = tl.where(v > v_bound, v_bound, tl.where(v < -v_bound, -v_bound, v))
        h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
        iterations = 0
        update = float("inf")
        while (iterations < limit) & (update > tol):
            u_before, v_before, h_before = previous(u, v, h, u_entry, v_entry, h_entry, cut, HAS_RESET, TILE)
            (
                next_u, next_v, next_h, j_u_u, j_u_v, j_u_h, j_v_u, j_v_v, j_v_h, j_h_u, j_h_v, j_h_h,
            ) = linearised(u_before, v_before, h_before, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q)
            if HAS_RESET:
                j_u_u = tl.where(cut, 0.0, j_u_u)
                j_u_v = tl.where(cut, 0.0, j_u_v)
                j_u_h = tl.where(cut, 0.0, j_u_h)
                j_v_u = tl.where(cut, 0.0, j_v_u)
                j_v_v = tl.where(cut, 0.0, j_v_v)
                j_v_h = tl.where(cut, 0.0, j_v_h)
                j_h_u = tl.where(cut, 0.0, j_h_u)
                j_h_v = tl.where(cut, 0.0, j_h_v)
                j_h_h = tl.where(cut, 0.0, j_h_h)
            (
                _m_u_u, _m_u_v, _m_u_h, _m_v_u, _m_v_v, _m_v_h, _m_h_u, _m_h_v, _m_h_h, d_u, d_v, d_h,
            ) = tl.associative_scan(
                (j_u_u, j_u_v, j_u_h, j_v_u, j_v_v, j_v_h, j_h_u, j_h_v, j_h_h, next_u - u, next_v - v, next_h - h), 0,
                compose,
            )
            update = 0.0
            u += d_u
            update = tl.maximum(update, largest_update(u, d_u, inside))
            u = tl.where(finite(u), u, tl.where(finite(next_u), next_u, 0.0))
            u = tl.where(u > u_bound, u_bound, tl.where(u < -u_bound, -u_bound, u))
            v += d_v
            update = tl.maximum(update, largest_update(v, d_v, inside))
            v = tl.where(finite(v), v, tl.where(finite(next_v), next_v, 0.0))
            v = tl.where(v > v_bound, v_bound, tl.where(v < -v_bound, -v_bound, v))
            h += d_h
            update = tl.maximum(update, largest_update(h, d_h, inside))
            h = tl.where(finite(h), h, tl.where(finite(next_h), next_h, 0.0))
            h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))
            iterations += 1
        sweeps = 0
        while (sweeps < TILE) & (update > tol):
            u_before, v_before, h_before = previous(u, v, h, u_entry, v_entry, h_entry, cut, HAS_RESET, TILE)
            next_u, next_v, next_h = step(u_before, v_before, h_before, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q)
            update = 0.0
            moved = relative_change(next_u, u, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            u = next_u
            moved = relative_change(next_v, v, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            v = next_v
            moved = relative_change(next_h, h, inside)
            update = tl.where(moved > 0.0, float("inf"), update)
            h = next_h
            sweeps += 1
        most = tl.maximum(most, iterations + sweeps)
        worst = tl.maximum(worst, tl.where(sweeps < TILE, update, 0.0))
        tl.store(u_row[None, :] + t * channels, u.to(u_row.dtype.element_ty), mask=inside)
        tl.store(v_row[None, :] + t * channels, v.to(v_row.dtype.element_ty), mask=inside)
        tl.store(h_row[None, :] + t * channels, h.to(h_row.dtype.element_ty), mask=inside)
        last = tl.minimum(first + TILE, time) - 1 - first
        u_entry = tl.sum(tl.where(row == last, u, 0.0), 0)
        v_entry = tl.sum(tl.where(row == last, v, 0.0), 0)
        h_entry = tl.sum(tl.where(row == last, h, 0.0), 0)
    tl.store(u_final_ptr + here, u_entry, mask=mask)
    tl.store(v_final_ptr + here, v_entry, mask=mask)
    tl.store(h_final_ptr + here, h_entry, mask=mask)
    tl.store(iterations_ptr + program, most)
    tl.store(update_ptr + program, worst)


@triton.jit
def segments_kernel(
    x_u_ptr, x_v_ptr, x_o_ptr, a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, u_first_ptr, v_first_ptr, h_first_ptr,
    u_ptr, v_ptr, h_ptr, u_check_ptr, v_check_ptr, h_check_ptr, reset_ptr, u_used_ptr, v_used_ptr, h_used_ptr,
    u_end_ptr, v_end_ptr, h_end_ptr, m_u_u_ptr, m_u_v_ptr, m_u_h_ptr, m_v_u_ptr, m_v_v_ptr, m_v_h_ptr, m_h_u_ptr,
    m_h_v_ptr, m_h_h_ptr, u_entry_ptr, v_entry_ptr, h_entry_ptr, walked_ptr, rounds_ptr, batches, length, checks, time,
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
    x_u_row = x_u_ptr + batch * x_stride_batch + channel
    x_v_row = x_v_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    u_row = u_ptr + batch * time * channels + channel
    v_row = v_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    a_u, b, a_v, a_o, p, q = load_params(a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, channel, mask)
    u_check_row = u_check_ptr + batch * checks * channels + channel
    v_check_row = v_check_ptr + batch * checks * channels + channel
    h_check_row = h_check_ptr + batch * checks * channels + channel
    at = piece.to(tl.int64) * batches * channels + here
    moved = 1.0
    if AGAIN:
        moved = 0.0
        u_entry = tl.load(u_entry_ptr + at, mask=mask, other=0.0)
        u_used = tl.load(u_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(u_entry, u_used, mask))
        v_entry = tl.load(v_entry_ptr + at, mask=mask, other=0.0)
        v_used = tl.load(v_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(v_entry, v_used, mask))
        h_entry = tl.load(h_entry_ptr + at, mask=mask, other=0.0)
        h_used = tl.load(h_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(h_entry, h_used, mask))
    else:
        u_entry = tl.load(u_first_ptr + here, mask=mask & (piece == 0), other=0.0)
        v_entry = tl.load(v_first_ptr + here, mask=mask & (piece == 0), other=0.0)
        h_entry = tl.load(h_first_ptr + here, mask=mask & (piece == 0), other=0.0)
    if moved > tol:
        tl.store(u_used_ptr + at, u_entry, mask=mask)
        tl.store(v_used_ptr + at, v_entry, mask=mask)
        tl.store(h_used_ptr + at, h_entry, mask=mask)
        u = u_entry
        v = v_entry
        h = h_entry
        m_u_u = tl.zeros_like(u_entry) + 1.0
        m_u_v = tl.zeros_like(u_entry) + 0.0
        m_u_h = tl.zeros_like(u_entry) + 0.0
        m_v_u = tl.zeros_like(u_entry) + 0.0
        m_v_v = tl.zeros_like(u_entry) + 1.0
        m_v_h = tl.zeros_like(u_entry) + 0.0
        m_h_u = tl.zeros_like(u_entry) + 0.0
        m_h_v = tl.zeros_like(u_entry) + 0.0
        m_h_h = tl.zeros_like(u_entry) + 1.0
        u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, t, met = walk_piece(
            u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, x_u_row, x_v_row, x_o_row, a_u, b,
            a_v, a_o, p, q, u_row, v_row, h_row, u_check_row, v_check_row, h_check_row, reset_row, start, stop,
            x_stride_time, channels, mask, tol, HAS_RESET, True, AGAIN, COMPUTE,
        )
        if met == 0:
            tl.store(u_end_ptr + at, u, mask=mask)
            tl.store(v_end_ptr + at, v, mask=mask)
            tl.store(h_end_ptr + at, h, mask=mask)
            tl.store(m_u_u_ptr + at, m_u_u, mask=mask)
            tl.store(m_u_v_ptr + at, m_u_v, mask=mask)
            tl.store(m_u_h_ptr + at, m_u_h, mask=mask)
            tl.store(m_v_u_ptr + at, m_v_u, mask=mask)
            tl.store(m_v_v_ptr + at, m_v_v, mask=mask)
            tl.store(m_v_h_ptr + at, m_v_h, mask=mask)
            tl.store(m_h_u_ptr + at, m_h_u, mask=mask)
            tl.store(m_h_v_ptr + at, m_h_v, mask=mask)
            tl.store(m_h_h_ptr + at, m_h_h, mask=mask)
        if AGAIN:
            walked = tl.load(walked_ptr + program) + (t - start).to(tl.int32)
            tl.store(walked_ptr + program, walked)
            tl.store(rounds_ptr + program, tl.load(rounds_ptr + program) + 1)


@triton.jit
def segments_join_kernel(
    u_first_ptr, v_first_ptr, h_first_ptr, u_bound_ptr, v_bound_ptr, h_bound_ptr, u_used_ptr, v_used_ptr, h_used_ptr,
    u_end_ptr, v_end_ptr, h_end_ptr, m_u_u_ptr, m_u_v_ptr, m_u_h_ptr, m_v_u_ptr, m_v_v_ptr, m_v_h_ptr, m_h_u_ptr,
    m_h_v_ptr, m_h_h_ptr, u_entry_ptr, v_entry_ptr, h_entry_ptr, pieces, batches, channels, BLOCK: tl.constexpr,
):
    """The entries of the pieces from the first to the last: s'_{p+1} = y_p + M_p (s'_p - s_p)."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    u = tl.load(u_first_ptr + here, mask=mask, other=0.0)
    v = tl.load(v_first_ptr + here, mask=mask, other=0.0)
    h = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    u_bound = tl.load(u_bound_ptr + here, mask=mask, other=0.0)
    v_bound = tl.load(v_bound_ptr + here, mask=mask, other=0.0)
    h_bound = tl.load(h_bound_ptr + here, mask=mask, other=0.0)
    for piece in range(0, pieces):
        at = tl.cast(piece, tl.int64) * batches * channels + here
        tl.store(u_entry_ptr + at, u, mask=mask)
        d_u = u - tl.load(u_used_ptr + at, mask=mask, other=0.0)
        tl.store(v_entry_ptr + at, v, mask=mask)
        d_v = v - tl.load(v_used_ptr + at, mask=mask, other=0.0)
        tl.store(h_entry_ptr + at, h, mask=mask)
        d_h = h - tl.load(h_used_ptr + at, mask=mask, other=0.0)
        m_u_u = tl.load(m_u_u_ptr + at, mask=mask, other=0.0)
        m_u_v = tl.load(m_u_v_ptr + at, mask=mask, other=0.0)
        m_u_h = tl.load(m_u_h_ptr + at, mask=mask, other=0.0)
        m_v_u = tl.load(m_v_u_ptr + at, mask=mask, other=0.0)
        m_v_v = tl.load(m_v_v_ptr + at, mask=mask, other=0.0)
        m_v_h = tl.load(m_v_h_ptr + at, mask=mask, other=0.0)
        m_h_u = tl.load(m_h_u_ptr + at, mask=mask, other=0.0)
        m_h_v = tl.load(m_h_v_ptr + at, mask=mask, other=0.0)
        m_h_h = tl.load(m_h_h_ptr + at, mask=mask, other=0.0)
        u_end = tl.load(u_end_ptr + at, mask=mask, other=0.0)
        step_u = m_u_u * d_u + m_u_v * d_v + m_u_h * d_h
        u = u_end + tl.where(finite(step_u), step_u, 0.0)
        u = tl.where(u > u_bound, u_bound, tl.where(u < -u_bound, -u_bound, u))
        v_end = tl.load(v_end_ptr + at, mask=mask, other=0.0)
        step_v = m_v_u * d_u + m_v_v * d_v + m_v_h * d_h
        v = v_end + tl.where(finite(step_v), step_v, 0.0)
        v = tl.where(v > v_bound, v_bound, tl.where(v < -v_bound, -v_bound, v))
        h_end = tl.load(h_end_ptr + at, mask=mask, other=0.0)
        step_h = m_h_u * d_u + m_h_v * d_v + m_h_h * d_h
        h = h_end + tl.where(finite(step_h), step_h, 0.0)
        h = tl.where(h > h_bound, h_bound, tl.where(h < -h_bound, -h_bound, h))


@triton.jit
def segments_finish_kernel(
    x_u_ptr, x_v_ptr, x_o_ptr, a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, u_first_ptr, v_first_ptr, h_first_ptr,
    u_ptr, v_ptr, h_ptr, u_check_ptr, v_check_ptr, h_check_ptr, reset_ptr, u_used_ptr, v_used_ptr, h_used_ptr,
    u_end_ptr, v_end_ptr, h_end_ptr, m_u_u_ptr, m_u_v_ptr, m_u_h_ptr, m_v_u_ptr, m_v_v_ptr, m_v_h_ptr, m_h_u_ptr,
    m_h_v_ptr, m_h_h_ptr, u_final_ptr, v_final_ptr, h_final_ptr, last_walked_ptr, last_rounds_ptr, update_ptr, pieces,
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
    x_u_row = x_u_ptr + batch * x_stride_batch + channel
    x_v_row = x_v_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    u_row = u_ptr + batch * time * channels + channel
    v_row = v_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    a_u, b, a_v, a_o, p, q = load_params(a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, channel, mask)
    u_check_row = u_check_ptr + batch * checks * channels + channel
    v_check_row = v_check_ptr + batch * checks * channels + channel
    h_check_row = h_check_ptr + batch * checks * channels + channel
    u_entry = tl.load(u_first_ptr + here, mask=mask, other=0.0)
    v_entry = tl.load(v_first_ptr + here, mask=mask, other=0.0)
    h_entry = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    walked = 0
    pieces_walked = 0
    worst = 0.0
    for piece in range(0, pieces):
        start = tl.cast(piece, tl.int64) * length
        stop = tl.minimum(start + length, time)
        at = tl.cast(piece, tl.int64) * batches * channels + here
        moved = 0.0
        u_used = tl.load(u_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(u_entry, u_used, mask))
        v_used = tl.load(v_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(v_entry, v_used, mask))
        h_used = tl.load(h_used_ptr + at, mask=mask, other=0.0)
        moved = tl.maximum(moved, relative_change(h_entry, h_used, mask))
        u_end = tl.load(u_end_ptr + at, mask=mask, other=0.0)
        v_end = tl.load(v_end_ptr + at, mask=mask, other=0.0)
        h_end = tl.load(h_end_ptr + at, mask=mask, other=0.0)
        if moved > tol:
            u = u_entry
            v = v_entry
            h = h_entry
            m_u_u = tl.zeros_like(u_entry) + 1.0
            m_u_v = tl.zeros_like(u_entry) + 0.0
            m_u_h = tl.zeros_like(u_entry) + 0.0
            m_v_u = tl.zeros_like(u_entry) + 0.0
            m_v_v = tl.zeros_like(u_entry) + 1.0
            m_v_h = tl.zeros_like(u_entry) + 0.0
            m_h_u = tl.zeros_like(u_entry) + 0.0
            m_h_v = tl.zeros_like(u_entry) + 0.0
            m_h_h = tl.zeros_like(u_entry) + 1.0
            (
                u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, t, met,
            ) = walk_piece(
                u, v, h, m_u_u, m_u_v, m_u_h, m_v_u, m_v_v, m_v_h, m_h_u, m_h_v, m_h_h, x_u_row, x_v_row, x_o_row, a_u,
                b, a_v, a_o, p, q, u_row, v_row, h_row, u_check_row, v_check_row, h_check_row, reset_row, start, stop,
                x_stride_time, channels, mask, tol, HAS_RESET, True, True, COMPUTE,
            )
            u_end = tl.where(met == 0, u, u_end)
            v_end = tl.where(met == 0, v, v_end)
            h_end = tl.where(met == 0, h, h_end)
            walked += (t - start).to(tl.int32)
            pieces_walked += 1
        else:
            worst = tl.maximum(worst, moved)
        u_entry = u_end
        v_entry = v_end
        h_entry = h_end
    tl.store(u_final_ptr + here, u_entry, mask=mask)
    tl.store(v_final_ptr + here, v_entry, mask=mask)
    tl.store(h_final_ptr + here, h_entry, mask=mask)
    tl.store(last_walked_ptr + program, walked)
    tl.store(last_rounds_ptr + program, pieces_walked)
    tl.store(update_ptr + program, worst)


@triton.jit
def load_step(
    x_u_row, x_v_row, x_o_row, u_row, v_row, h_row, u_first, v_first, h_first, g_u_row, g_v_row, g_h_row, reset_row, t,
    valid, x_stride_time, channels, mask, HAS_G_U: tl.constexpr, HAS_G_V: tl.constexpr, HAS_G_H: tl.constexpr,
    HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Inputs, the state before the step (zero after a reset), cotangents of the state, and whether a reset cuts."""
    x_u, x_v, x_o = load_inputs(x_u_row, x_v_row, x_o_row, t * x_stride_time, mask & valid, COMPUTE)
    u = tl.load(u_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    u = tl.where(t > 0, u, u_first)
    v = tl.load(v_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    v = tl.where(t > 0, v, v_first)
    h = tl.load(h_row + (t - 1) * channels, mask=mask & valid & (t > 0), other=0.0).to(COMPUTE)
    h = tl.where(t > 0, h, h_first)
    g_u = tl.zeros_like(u)
    if HAS_G_U:
        g_u = tl.load(g_u_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    g_v = tl.zeros_like(v)
    if HAS_G_V:
        g_v = tl.load(g_v_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    g_h = tl.zeros_like(h)
    if HAS_G_H:
        g_h = tl.load(g_h_row + t * channels, mask=mask & valid, other=0.0).to(COMPUTE)
    cut = False
    if HAS_RESET:
        cut = tl.load(reset_row + t, mask=valid, other=0) != 0
        u = tl.where(cut, 0.0, u)
        v = tl.where(cut, 0.0, v)
        h = tl.where(cut, 0.0, h)
    return x_u, x_v, x_o, u, v, h, g_u, g_v, g_h, cut


@triton.jit
def retreat(
    carry_u, carry_v, carry_h, sum_a_u, lost_a_u, sum_b, lost_b, sum_a_v, lost_a_v, sum_a_o, lost_a_o, sum_p, lost_p,
    sum_q, lost_q, x_u, x_v, x_o, u, v, h, g_u, g_v, g_h, cut, a_u, b, a_v, a_o, p, q, to_x_u_row, to_x_v_row,
    to_x_o_row, t, valid, channels, mask, HAS_RESET: tl.constexpr,
):
    """One step back: stores the gradients of the inputs, adds those of the params, returns the carry before it."""
    to_u, to_v, to_h, to_x_u, to_x_v, to_x_o, to_a_u, to_b, to_a_v, to_a_o, to_p, to_q = pullback(
        u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q, g_u + carry_u, g_v + carry_v, g_h + carry_h,
    )
    tl.store(to_x_u_row + t * channels, to_x_u.to(to_x_u_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_v_row + t * channels, to_x_v.to(to_x_v_row.dtype.element_ty), mask=mask & valid)
    tl.store(to_x_o_row + t * channels, to_x_o.to(to_x_o_row.dtype.element_ty), mask=mask & valid)
    sum_a_u, lost_a_u = add_compensated(sum_a_u, lost_a_u, tl.where(valid, to_a_u, 0.0))
    sum_b, lost_b = add_compensated(sum_b, lost_b, tl.where(valid, to_b, 0.0))
    sum_a_v, lost_a_v = add_compensated(sum_a_v, lost_a_v, tl.where(valid, to_a_v, 0.0))
    sum_a_o, lost_a_o = add_compensated(sum_a_o, lost_a_o, tl.where(valid, to_a_o, 0.0))
    sum_p, lost_p = add_compensated(sum_p, lost_p, tl.where(valid, to_p, 0.0))
    sum_q, lost_q = add_compensated(sum_q, lost_q, tl.where(valid, to_q, 0.0))
    if HAS_RESET:
        to_u = tl.where(cut, 0.0, to_u)
    carry_u = tl.where(valid, to_u, carry_u)
    if HAS_RESET:
        to_v = tl.where(cut, 0.0, to_v)
    carry_v = tl.where(valid, to_v, carry_v)
    if HAS_RESET:
        to_h = tl.where(cut, 0.0, to_h)
    carry_h = tl.where(valid, to_h, carry_h)
    return (
        carry_u, carry_v, carry_h, sum_a_u, lost_a_u, sum_b, lost_b, sum_a_v, lost_a_v, sum_a_o, lost_a_o, sum_p,
        lost_p, sum_q, lost_q,
    )


@triton.jit
def backward_kernel(
    x_u_ptr, x_v_ptr, x_o_ptr, a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, u_first_ptr, v_first_ptr, h_first_ptr,
    u_ptr, v_ptr, h_ptr, g_u_ptr, g_v_ptr, g_h_ptr, reset_ptr, carry_u_ptr, carry_v_ptr, carry_h_ptr, to_x_u_ptr,
    to_x_v_ptr, to_x_o_ptr, to_a_u_ptr, to_b_ptr, to_a_v_ptr, to_a_o_ptr, to_p_ptr, to_q_ptr, to_u_first_ptr,
    to_v_first_ptr, to_h_first_ptr, batches, length, time, channels, x_stride_batch, x_stride_time,
    HAS_G_U: tl.constexpr, HAS_G_V: tl.constexpr, HAS_G_H: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
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
    x_u_row = x_u_ptr + batch * x_stride_batch + channel
    x_v_row = x_v_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    u_row = u_ptr + batch * time * channels + channel
    v_row = v_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    g_u_row = g_u_ptr + batch * time * channels + channel
    g_v_row = g_v_ptr + batch * time * channels + channel
    g_h_row = g_h_ptr + batch * time * channels + channel
    to_x_u_row = to_x_u_ptr + batch * time * channels + channel
    to_x_v_row = to_x_v_ptr + batch * time * channels + channel
    to_x_o_row = to_x_o_ptr + batch * time * channels + channel
    a_u, b, a_v, a_o, p, q = load_params(a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, channel, mask)
    u_first = tl.load(u_first_ptr + here, mask=mask, other=0.0)
    v_first = tl.load(v_first_ptr + here, mask=mask, other=0.0)
    h_first = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    at = piece.to(tl.int64) * batches * channels + here
    carry_u = tl.load(carry_u_ptr + at, mask=mask, other=0.0)
    carry_v = tl.load(carry_v_ptr + at, mask=mask, other=0.0)
    carry_h = tl.load(carry_h_ptr + at, mask=mask, other=0.0)
    sum_a_u = tl.zeros_like(carry_u)
    lost_a_u = tl.zeros_like(carry_u)
    sum_b = tl.zeros_like(carry_u)
    lost_b = tl.zeros_like(carry_u)
    sum_a_v = tl.zeros_like(carry_u)
    lost_a_v = tl.zeros_like(carry_u)
    sum_a_o = tl.zeros_like(carry_u)
    lost_a_o = tl.zeros_like(carry_u)
    sum_p = tl.zeros_like(carry_u)
    lost_p = tl.zeros_like(carry_u)
    sum_q = tl.zeros_like(carry_u)
    lost_q = tl.zeros_like(carry_u)
    x_u_0, x_v_0, x_o_0, u_0, v_0, h_0, g_u_0, g_v_0, g_h_0, cut_0 = load_step(
        x_u_row, x_v_row, x_o_row, u_row, v_row, h_row, u_first, v_first, h_first, g_u_row, g_v_row, g_h_row, reset_row,
        stop - 1, stop - 1 >= start, x_stride_time, channels, mask, HAS_G_U, HAS_G_V, HAS_G_H, HAS_RESET, COMPUTE,
    )
    x_u_1, x_v_1, x_o_1, u_1, v_1, h_1, g_u_1, g_v_1, g_h_1, cut_1 = load_step(
        x_u_row, x_v_row, x_o_row, u_row, v_row, h_row, u_first, v_first, h_first, g_u_row, g_v_row, g_h_row, reset_row,
        stop - 2, stop - 2 >= start, x_stride_time, channels, mask, HAS_G_U, HAS_G_V, HAS_G_H, HAS_RESET, COMPUTE,
    )
    t = stop - 1
    while t >= start:
        (
            x_u_ahead_0, x_v_ahead_0, x_o_ahead_0, u_ahead_0, v_ahead_0, h_ahead_0, g_u_ahead_0, g_v_ahead_0,
            g_h_ahead_0, cut_ahead_0,
        ) = load_step(
            x_u_row, x_v_row, x_o_row, u_row, v_row, h_row, u_first, v_first, h_first, g_u_row, g_v_row, g_h_row,
            reset_row, t - 2, t - 2 >= start, x_stride_time, channels, mask, HAS_G_U, HAS_G_V, HAS_G_H, HAS_RESET,
            COMPUTE,
        )
        (
            x_u_ahead_1, x_v_ahead_1, x_o_ahead_1, u_ahead_1, v_ahead_1, h_ahead_1, g_u_ahead_1, g_v_ahead_1,
            g_h_ahead_1, cut_ahead_1,
        ) = load_step(
            x_u_row, x_v_row, x_o_row, u_row, v_row, h_row, u_first, v_first, h_first, g_u_row, g_v_row, g_h_row,
            reset_row, t - 3, t - 3 >= start, x_stride_time, channels, mask, HAS_G_U, HAS_G_V, HAS_G_H, HAS_RESET,
            COMPUTE,
        )
        (
            carry_u, carry_v, carry_h, sum_a_u, lost_a_u, sum_b, lost_b, sum_a_v, lost_a_v, sum_a_o, lost_a_o, sum_p,
            lost_p, sum_q, lost_q,
        ) = retreat(
            carry_u, carry_v, carry_h, sum_a_u, lost_a_u, sum_b, lost_b, sum_a_v, lost_a_v, sum_a_o, lost_a_o, sum_p,
            lost_p, sum_q, lost_q, x_u_0, x_v_0, x_o_0, u_0, v_0, h_0, g_u_0, g_v_0, g_h_0, cut_0, a_u, b, a_v, a_o, p,
            q, to_x_u_row, to_x_v_row, to_x_o_row, t, t >= start, channels, mask, HAS_RESET,
        )
        (
            carry_u, carry_v, carry_h, sum_a_u, lost_a_u, sum_b, lost_b, sum_a_v, lost_a_v, sum_a_o, lost_a_o, sum_p,
            lost_p, sum_q, lost_q,
        ) = retreat(
            carry_u, carry_v, carry_h, sum_a_u, lost_a_u, sum_b, lost_b, sum_a_v, lost_a_v, sum_a_o, lost_a_o, sum_p,
            lost_p, sum_q, lost_q, x_u_1, x_v_1, x_o_1, u_1, v_1, h_1, g_u_1, g_v_1, g_h_1, cut_1, a_u, b, a_v, a_o, p,
            q, to_x_u_row, to_x_v_row, to_x_o_row, t - 1, t - 1 >= start, channels, mask, HAS_RESET,
        )
        x_u_0 = x_u_ahead_0
        x_v_0 = x_v_ahead_0
        x_o_0 = x_o_ahead_0
        u_0 = u_ahead_0
        v_0 = v_ahead_0
        h_0 = h_ahead_0
        g_u_0 = g_u_ahead_0
        g_v_0 = g_v_ahead_0
        g_h_0 = g_h_ahead_0
        cut_0 = cut_ahead_0
        x_u_1 = x_u_ahead_1
        x_v_1 = x_v_ahead_1
        x_o_1 = x_o_ahead_1
        u_1 = u_ahead_1
        v_1 = v_ahead_1
        h_1 = h_ahead_1
        g_u_1 = g_u_ahead_1
        g_v_1 = g_v_ahead_1
        g_h_1 = g_h_ahead_1
        cut_1 = cut_ahead_1
        t -= 2
    tl.store(to_a_u_ptr + at, sum_a_u, mask=mask)
    tl.store(to_b_ptr + at, sum_b, mask=mask)
    tl.store(to_a_v_ptr + at, sum_a_v, mask=mask)
    tl.store(to_a_o_ptr + at, sum_a_o, mask=mask)
    tl.store(to_p_ptr + at, sum_p, mask=mask)
    tl.store(to_q_ptr + at, sum_q, mask=mask)
    tl.store(to_u_first_ptr + here, carry_u, mask=mask & (piece == 0))
    tl.store(to_v_first_ptr + here, carry_v, mask=mask & (piece == 0))
    tl.store(to_h_first_ptr + here, carry_h, mask=mask & (piece == 0))


@triton.jit
def backward_maps_kernel(
    x_u_ptr, x_v_ptr, x_o_ptr, a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, u_first_ptr, v_first_ptr, h_first_ptr,
    u_ptr, v_ptr, h_ptr, g_u_ptr, g_v_ptr, g_h_ptr, reset_ptr, m_u_u_ptr, m_u_v_ptr, m_u_h_ptr, m_v_u_ptr, m_v_v_ptr,
    m_v_h_ptr, m_h_u_ptr, m_h_v_ptr, m_h_h_ptr, d_u_ptr, d_v_ptr, d_h_ptr, steps_ptr, batches, length, time, channels,
    x_stride_batch, x_stride_time, HAS_G_U: tl.constexpr, HAS_G_V: tl.constexpr, HAS_G_H: tl.constexpr,
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
    x_u_row = x_u_ptr + batch * x_stride_batch + channel
    x_v_row = x_v_ptr + batch * x_stride_batch + channel
    x_o_row = x_o_ptr + batch * x_stride_batch + channel
    u_row = u_ptr + batch * time * channels + channel
    v_row = v_ptr + batch * time * channels + channel
    h_row = h_ptr + batch * time * channels + channel
    g_u_row = g_u_ptr + batch * time * channels + channel
    g_v_row = g_v_ptr + batch * time * channels + channel
    g_h_row = g_h_ptr + batch * time * channels + channel
    a_u, b, a_v, a_o, p, q = load_params(a_u_ptr, b_ptr, a_v_ptr, a_o_ptr, p_ptr, q_ptr, channel, mask)
    u_first = tl.load(u_first_ptr + here, mask=mask, other=0.0)
    v_first = tl.load(v_first_ptr + here, mask=mask, other=0.0)
    h_first = tl.load(h_first_ptr + here, mask=mask, other=0.0)
    m_u_u = tl.zeros_like(u_first) + 1.0
    m_u_v = tl.zeros_like(u_first) + 0.0
    m_u_h = tl.zeros_like(u_first) + 0.0
    m_v_u = tl.zeros_like(u_first) + 0.0
    m_v_v = tl.zeros_like(u_first) + 1.0
    m_v_h = tl.zeros_like(u_first) + 0.0
    m_h_u = tl.zeros_like(u_first) + 0.0
    m_h_v = tl.zeros_like(u_first) + 0.0
    m_h_h = tl.zeros_like(u_first) + 1.0
    d_u = tl.zeros_like(u_first)
    d_v = tl.zeros_like(v_first)
    d_h = tl.zeros_like(h_first)
    x_u_0, x_v_0, x_o_0, u_0, v_0, h_0, g_u_0, g_v_0, g_h_0, cut_0 = load_step(
        x_u_row, x_v_row, x_o_row, u_row, v_row, h_row, u_first, v_first, h_first, g_u_row, g_v_row, g_h_row, reset_row,
        start, start < stop, x_stride_time, channels, mask, HAS_G_U, HAS_G_V, HAS_G_H, HAS_RESET, COMPUTE,
    )
    t = start
    inside = 1.0
    while (t < stop) & (inside > TINY):
        (
            x_u_ahead_0, x_v_ahead_0, x_o_ahead_0, u_ahead_0, v_ahead_0, h_ahead_0, g_u_ahead_0, g_v_ahead_0,
            g_h_ahead_0, cut_ahead_0,
        ) = load_step(
            x_u_row, x_v_row, x_o_row, u_row, v_row, h_row, u_first, v_first, h_first, g_u_row, g_v_row, g_h_row,
            reset_row, t + 1, t + 1 < stop, x_stride_time, channels, mask, HAS_G_U, HAS_G_V, HAS_G_H, HAS_RESET,
            COMPUTE,
        )
        (
            _next_u, _next_v, _next_h, j_u_u, j_u_v, j_u_h, j_v_u, j_v_v, j_v_h, j_h_u, j_h_v, j_h_h,
        ) = linearised(u_0, v_0, h_0, x_u_0, x_v_0, x_o_0, a_u, b, a_v, a_o, p, q)
        new_m_u_u = m_u_u * j_u_u + m_u_h * j_u_h
        new_m_u_v = m_u_u * j_v_u + m_u_v * j_v_v + m_u_h * j_v_h
        new_m_u_h = m_u_u * j_h_u + m_u_v * j_h_v + m_u_h * j_h_h
        new_m_v_u = m_v_u * j_u_u + m_v_h * j_u_h
        new_m_v_v = m_v_u * j_v_u + m_v_v * j_v_v + m_v_h * j_v_h
        new_m_v_h = m_v_u * j_h_u + m_v_v * j_h_v + m_v_h * j_h_h
        new_m_h_u = m_h_u * j_u_u + m_h_h * j_u_h
        new_m_h_v = m_h_u * j_v_u + m_h_v * j_v_v + m_h_h * j_v_h
        new_m_h_h = m_h_u * j_h_u + m_h_v * j_h_v + m_h_h * j_h_h
        inside = 0.0
        if HAS_RESET:
            new_m_u_u = tl.where(cut_0, 0.0, new_m_u_u)
        m_u_u = tl.zeros_like(m_u_u) + new_m_u_u
        inside = tl.maximum(inside, largest_size(m_u_u, mask))
        if HAS_RESET:
            new_m_u_v = tl.where(cut_0, 0.0, new_m_u_v)
        m_u_v = tl.zeros_like(m_u_v) + new_m_u_v
        inside = tl.maximum(inside, largest_size(m_u_v, mask))
        if HAS_RESET:
            new_m_u_h = tl.where(cut_0, 0.0, new_m_u_h)
        m_u_h = tl.zeros_like(m_u_h) + new_m_u_h
        inside = tl.maximum(inside, largest_size(m_u_h, mask))
        if HAS_RESET:
            new_m_v_u = tl.where(cut_0, 0.0, new_m_v_u)
        m_v_u = tl.zeros_like(m_v_u) + new_m_v_u
        inside = tl.maximum(inside, largest_size(m_v_u, mask))
        if HAS_RESET:
            new_m_v_v = tl.where(cut_0, 0.0, new_m_v_v)
        m_v_v = tl.zeros_like(m_v_v) + new_m_v_v
        inside = tl.maximum(inside, largest_size(m_v_v, mask))
        if HAS_RESET:
            new_m_v_h = tl.where(cut_0, 0.0, new_m_v_h)
        m_v_h = tl.zeros_like(m_v_h) + new_m_v_h
        inside = tl.maximum(inside, largest_size(m_v_h, mask))
        if HAS_RESET:
            new_m_h_u = tl.where(cut_0, 0.0, new_m_h_u)
        m_h_u = tl.zeros_like(m_h_u) + new_m_h_u
        inside = tl.maximum(inside, largest_size(m_h_u, mask))
        if HAS_RESET:
            new_m_h_v = tl.where(cut_0, 0.0, new_m_h_v)
        m_h_v = tl.zeros_like(m_h_v) + new_m_h_v
        inside = tl.maximum(inside, largest_size(m_h_v, mask))
        if HAS_RESET:
            new_m_h_h = tl.where(cut_0, 0.0, new_m_h_h)
        m_h_h = tl.zeros_like(m_h_h) + new_m_h_h
        inside = tl.maximum(inside, largest_size(m_h_h, mask))
        d_u += m_u_u * g_u_0
        d_u += m_u_v * g_v_0
        d_u += m_u_h * g_h_0
        d_v += m_v_u * g_u_0
        d_v += m_v_v * g_v_0
        d_v += m_v_h * g_h_0
        d_h += m_h_u * g_u_0
        d_h += m_h_v * g_v_0
        d_h += m_h_h * g_h_0
        x_u_0 = x_u_ahead_0
        x_v_0 = x_v_ahead_0
        x_o_0 = x_o_ahead_0
        u_0 = u_ahead_0
        v_0 = v_ahead_0
        h_0 = h_ahead_0
        g_u_0 = g_u_ahead_0
        g_v_0 = g_v_ahead_0
        g_h_0 = g_h_ahead_0
        cut_0 = cut_ahead_0
        t += 1
    at = piece.to(tl.int64) * batches * channels + here
    tl.store(m_u_u_ptr + at, m_u_u, mask=mask)
    tl.store(m_u_v_ptr + at, m_u_v, mask=mask)
    tl.store(m_u_h_ptr + at, m_u_h, mask=mask)
    tl.store(m_v_u_ptr + at, m_v_u, mask=mask)
    tl.store(m_v_v_ptr + at, m_v_v, mask=mask)
    tl.store(m_v_h_ptr + at, m_v_h, mask=mask)
    tl.store(m_h_u_ptr + at, m_h_u, mask=mask)
    tl.store(m_h_v_ptr + at, m_h_v, mask=mask)
    tl.store(m_h_h_ptr + at, m_h_h, mask=mask)
    tl.store(d_u_ptr + at, d_u, mask=mask)
    tl.store(d_v_ptr + at, d_v, mask=mask)
    tl.store(d_h_ptr + at, d_h, mask=mask)
    tl.store(steps_ptr + program, (t - start).to(tl.int32))


@triton.jit
def backward_join_kernel(
    m_u_u_ptr, m_u_v_ptr, m_u_h_ptr, m_v_u_ptr, m_v_v_ptr, m_v_h_ptr, m_h_u_ptr, m_h_v_ptr, m_h_h_ptr, d_u_ptr, d_v_ptr,
    d_h_ptr, g_u_final_ptr, g_v_final_ptr, g_h_final_ptr, carry_u_ptr, carry_v_ptr, carry_h_ptr, pieces, batches,
    channels, BLOCK: tl.constexpr,
):
    """The carry at the end of every piece, from the last piece to the first."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    batch = (program // blocks).to(tl.int64)
    here = batch * channels + channel
    carry_u = tl.load(g_u_final_ptr + here, mask=mask, other=0.0)
    carry_v = tl.load(g_v_final_ptr + here, mask=mask, other=0.0)
    carry_h = tl.load(g_h_final_ptr + here, mask=mask, other=0.0)
    for back in range(0, pieces):
        at = (tl.cast(pieces - 1, tl.int64) - back) * batches * channels + here
        tl.store(carry_u_ptr + at, carry_u, mask=mask)
        tl.store(carry_v_ptr + at, carry_v, mask=mask)
        tl.store(carry_h_ptr + at, carry_h, mask=mask)
        m_u_u = tl.load(m_u_u_ptr + at, mask=mask, other=0.0)
        m_u_v = tl.load(m_u_v_ptr + at, mask=mask, other=0.0)
        m_u_h = tl.load(m_u_h_ptr + at, mask=mask, other=0.0)
        m_v_u = tl.load(m_v_u_ptr + at, mask=mask, other=0.0)
        m_v_v = tl.load(m_v_v_ptr + at, mask=mask, other=0.0)
        m_v_h = tl.load(m_v_h_ptr + at, mask=mask, other=0.0)
        m_h_u = tl.load(m_h_u_ptr + at, mask=mask, other=0.0)
        m_h_v = tl.load(m_h_v_ptr + at, mask=mask, other=0.0)
        m_h_h = tl.load(m_h_h_ptr + at, mask=mask, other=0.0)
        d_u = tl.load(d_u_ptr + at, mask=mask, other=0.0)
        d_v = tl.load(d_v_ptr + at, mask=mask, other=0.0)
        d_h = tl.load(d_h_ptr + at, mask=mask, other=0.0)
        new_carry_u = m_u_u * carry_u + m_u_v * carry_v + m_u_h * carry_h + d_u
        new_carry_v = m_v_u * carry_u + m_v_v * carry_v + m_v_h * carry_h + d_v
        new_carry_h = m_h_u * carry_u + m_h_v * carry_v + m_h_h * carry_h + d_h
        carry_u = new_carry_u
        carry_v = new_carry_v
        carry_h = new_carry_h
