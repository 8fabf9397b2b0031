# mypy: ignore-errors
"""The norms and gates of norm.py in Triton: one kernel forward, one backward, for ROWS rows and one group of channels
at a time; statistics, products and sums in COMPUTE. And the rotation of rotary.py.

Every big tensor is read once in each direction, and backward makes anew what it needs. A tensor's rows are `_stride`
numbers apart; results are contiguous. GATE: 0 none, 1 after the norm, 2 before it.
"""

import triton
import triton.language as tl


@triton.jit
def activation(g, SIGMOID: tl.constexpr):
    """SiLU or the sigmoid, and its derivative."""
    s = tl.sigmoid(g)
    if SIGMOID:
        return s, s * (1 - s)
    else:
        return g * s, s * (1 + g * (1 - s))


@triton.jit
def rows_of(ptr, stride, row, channel, inside, COMPUTE: tl.constexpr):
    """Some rows of some channels, zero outside."""
    return tl.load(ptr + row[:, None] * stride + channel[None, :], mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def put_rows(ptr, value, row, channel, inside, SIZE: tl.constexpr):
    """Stores rows of a contiguous tensor."""
    tl.store(ptr + row[:, None] * SIZE + channel[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def normed(u, inside, GROUP: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr):
    """(u − mean) rstd, the mean only where CENTRED; and rstd."""
    if CENTRED:
        u = tl.where(inside, u - (tl.sum(u, 1) / GROUP)[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(u * u, 1) / GROUP + EPS)
    return u * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x_ptr, gate_ptr, weight_ptr, skip_ptr, v_ptr, y_ptr, rows, x_stride, gate_stride, v_stride,
    EPS: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, CENTRED: tl.constexpr, SKIP: tl.constexpr,
    COMPUTE: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of ROWS rows. SKIP: channels that share a number of skip, 0 for none."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * GROUP + at
    inside = (row < rows)[:, None] & (at < GROUP)[None, :]
    w = tl.load(weight_ptr + channel, mask=at < GROUP, other=0.0).to(COMPUTE)
    u = rows_of(x_ptr, x_stride, row, channel, inside, COMPUTE)
    if SKIP > 0:
        d = tl.load(skip_ptr + channel // SKIP, mask=at < GROUP, other=0.0).to(COMPUTE)
        u += d[None, :] * rows_of(v_ptr, v_stride, row, channel, inside, COMPUTE)
    if GATE == 2:
        a, _ = activation(rows_of(gate_ptr, gate_stride, row, channel, inside, COMPUTE), SIGMOID)
        u *= a
    n, _ = normed(u, inside, GROUP, EPS, CENTRED)
    y = n * w[None, :]
    if GATE == 1:
        a, _ = activation(rows_of(gate_ptr, gate_stride, row, channel, inside, COMPUTE), SIGMOID)
        y *= a
    put_rows(y_ptr, y, row, channel, inside, SIZE)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    x_ptr, gate_ptr, weight_ptr, skip_ptr, v_ptr, grad_ptr, to_x_ptr, to_gate_ptr, to_v_ptr, to_weight_ptr, to_skip_ptr,
    rows, x_stride, gate_stride, v_stride, grad_stride,
    EPS: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, CENTRED: tl.constexpr, SKIP: tl.constexpr,
    COMPUTE: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of x, gate and v; to_weight and to_skip (program, channel): sums over the program's rows."""
    at = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * GROUP + at
    w = tl.load(weight_ptr + channel, mask=at < GROUP, other=0.0).to(COMPUTE)
    to_weight, to_skip = tl.zeros((ROWS, BLOCK), COMPUTE), tl.zeros((ROWS, BLOCK), COMPUTE)
    if SKIP > 0:
        d = tl.load(skip_ptr + channel // SKIP, mask=at < GROUP, other=0.0).to(COMPUTE)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (at < GROUP)[None, :]
        x = rows_of(x_ptr, x_stride, row, channel, inside, COMPUTE)
        if SKIP > 0:
            v = rows_of(v_ptr, v_stride, row, channel, inside, COMPUTE)
            x += d[None, :] * v
        u = x
        if GATE > 0:
            a, slope = activation(rows_of(gate_ptr, gate_stride, row, channel, inside, COMPUTE), SIGMOID)
        if GATE == 2:
            u = x * a
        n, rstd = normed(u, inside, GROUP, EPS, CENTRED)
        grad = rows_of(grad_ptr, grad_stride, row, channel, inside, COMPUTE)
        if GATE == 1:
            put_rows(to_gate_ptr, grad * n * w[None, :] * slope, row, channel, inside, SIZE)
            grad *= a
        to_weight += tl.where(inside, grad * n, 0.0)  # of a row that is not there n may be 0 / 0, without eps
        grad *= w[None, :]
        along = tl.sum(grad * n, 1) / GROUP
        back = grad - n * along[:, None]
        if CENTRED:
            back -= (tl.sum(grad, 1) / GROUP)[:, None]
        back *= rstd[:, None]
        if GATE == 2:
            put_rows(to_gate_ptr, back * x * slope, row, channel, inside, SIZE)
            back *= a
        put_rows(to_x_ptr, back, row, channel, inside, SIZE)
        if SKIP > 0:
            put_rows(to_v_ptr, back * d[None, :], row, channel, inside, SIZE)
            to_skip += tl.where(inside, back * v, 0.0)
    sums = tl.program_id(0).to(tl.int64) * SIZE + channel
    tl.store(to_weight_ptr + sums, tl.sum(to_weight, 0), mask=at < GROUP)
    if SKIP > 0:
        tl.store(to_skip_ptr + sums, tl.sum(to_skip, 0), mask=at < GROUP)


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    x_ptr, y_ptr, rows, stride, COMPUTE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """SiLU(a) ⊙ b of rows [a, b]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < SIZE)[None, :]
    a, _ = activation(rows_of(x_ptr, stride, row, channel, inside, COMPUTE), False)
    put_rows(y_ptr, a * rows_of(x_ptr, stride, row, SIZE + channel, inside, COMPUTE), row, channel, inside, SIZE)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    x_ptr, grad_ptr, to_x_ptr, rows, stride, grad_stride, COMPUTE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a and b, laid as [a, b]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < SIZE)[None, :]
    grad = rows_of(grad_ptr, grad_stride, row, channel, inside, COMPUTE)
    a, slope = activation(rows_of(x_ptr, stride, row, channel, inside, COMPUTE), False)
    up = rows_of(x_ptr, stride, row, SIZE + channel, inside, COMPUTE)
    put_rows(to_x_ptr, grad * up * slope, row, channel, inside, 2 * SIZE)
    put_rows(to_x_ptr, grad * a, row, SIZE + channel, inside, 2 * SIZE)


@triton.jit(do_not_specialize=["rows", "time", "heads"])
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, rows, time, heads, x_batch, x_time, x_head, angle_batch,
    BACK: tl.constexpr, COMPUTE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads turned by their tokens' angles, or BACK; rows: of (batch, time, head)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < HALF)[None, :]
    token = row // heads
    batch, step = token // time, token % time
    start = batch * x_batch + step * x_time + row % heads * x_head
    angle = batch * angle_batch + step * HALF
    cos = tl.load(cos_ptr + angle[:, None] + at[None, :], mask=inside, other=0.0).to(COMPUTE)
    sin = tl.load(sin_ptr + angle[:, None] + at[None, :], mask=inside, other=0.0).to(COMPUTE)
    if BACK:
        sin = -sin
    first = tl.load(x_ptr + start[:, None] + at[None, :], mask=inside, other=0.0).to(COMPUTE)
    second = tl.load(x_ptr + start[:, None] + HALF + at[None, :], mask=inside, other=0.0).to(COMPUTE)
    put_rows(y_ptr, first * cos - second * sin, row, at, inside, 2 * HALF)
    put_rows(y_ptr, second * cos + first * sin, row, HALF + at, inside, 2 * HALF)
