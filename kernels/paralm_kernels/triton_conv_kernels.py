# mypy: ignore-errors
"""The short causal convolution in Triton: a tile of steps and channels a program, its taps as shifted loads.

Positions before the sequence are in `state` (batch, taps − 1, channel). `ids` (batch, time) counts the resets up to a
step: two positions are of one sequence where it is the same, and the state is of sequence 0. x and its gradient have
strides over batch and time of their own, as a part of a projection has; everything else is contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def shifted(
    x_ptr, state_ptr, ids_ptr, own, batch, t, back: tl.constexpr, channel, inside, channels, time, stride_batch,
    stride_time, REACH: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The inputs `back` steps before each of some steps (rows), zero where those are of another sequence."""
    then = t - back
    row = x_ptr + batch * stride_batch + then[:, None].to(tl.int64) * stride_time + channel[None, :]
    x = tl.load(row, mask=inside & (then >= 0)[:, None], other=0.0).to(COMPUTE)
    if back > 0:
        before = inside & (then < 0)[:, None]
        row = state_ptr + (batch * REACH + REACH + then[:, None]) * channels + channel[None, :]
        x += tl.load(row, mask=before, other=0.0).to(COMPUTE)
        if HAS_RESET:
            past = tl.load(ids_ptr + batch * time + then, mask=(then >= 0) & (then < time), other=0)
            x = tl.where((past == own)[:, None], x, 0.0)
    return x


@triton.jit(do_not_specialize=["time", "steps"])
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, ids_ptr, y_ptr, time, steps, channels, stride_batch, stride_time,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (batch, time, channel); steps: blocks of time."""
    batch = (tl.program_id(0) // steps).to(tl.int64)
    t = tl.program_id(0) % steps * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < time)[:, None] & (channel < channels)[None, :]
    own = t
    if HAS_RESET:
        own = tl.load(ids_ptr + batch * time + t, mask=t < time, other=0)
    y = tl.zeros((BLOCK_T, BLOCK_C), COMPUTE)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(COMPUTE)[None, :]
    for back in tl.static_range(TAPS):
        x = shifted(
            x_ptr, state_ptr, ids_ptr, own, batch, t, back, channel, inside, channels, time, stride_batch, stride_time,
            TAPS - 1, HAS_RESET, COMPUTE,
        )  # fmt: skip
        tap = tl.load(weight_ptr + channel * TAPS + (TAPS - 1 - back), mask=channel < channels, other=0.0)
        y += x * tap.to(COMPUTE)[None, :]
    at = (batch * time + t[:, None]) * channels + channel[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["time", "steps", "blocks"])
def conv_backward_kernel(
    x_ptr, weight_ptr, state_ptr, ids_ptr, grad_ptr, to_x_ptr, to_weight_ptr, to_bias_ptr, time, steps, blocks,
    channels, stride_batch, stride_time, TAPS: tl.constexpr, HAS_RESET: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_TAPS: tl.constexpr,
):  # fmt: skip
    """to_x (batch, time, channel), without what the new state's gradient adds; to_weight (program, TAPS, channel) and
    to_bias (program, channel): sums over the program's steps. steps: programs over time; blocks: of time, of each."""
    program = tl.program_id(0)
    batch = (program // steps).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < channels
    place = tl.arange(0, BLOCK_TAPS)
    to_weight, to_bias = tl.zeros((BLOCK_TAPS, BLOCK_C), COMPUTE), tl.zeros((BLOCK_C,), COMPUTE)
    for block in range(0, blocks):
        t = (program % steps * blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < time)[:, None] & there[None, :]
        own = t
        if HAS_RESET:
            own = tl.load(ids_ptr + batch * time + t, mask=t < time, other=0)
        at = (batch * time + t[:, None]) * channels + channel[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        to_x = tl.zeros((BLOCK_T, BLOCK_C), COMPUTE)
        for back in tl.static_range(TAPS):
            x = shifted(
                x_ptr, state_ptr, ids_ptr, own, batch, t, back, channel, inside, channels, time, stride_batch,
                stride_time, TAPS - 1, HAS_RESET, COMPUTE,
            )  # fmt: skip
            to_weight += tl.where((place == TAPS - 1 - back)[:, None], tl.sum(grad * x, 0)[None, :], 0.0)
            later = t + back
            ahead = (later < time)[:, None] & there[None, :]
            if HAS_RESET:
                ids = tl.load(ids_ptr + batch * time + later, mask=later < time, other=-1)
                ahead = ahead & (ids == own)[:, None]
            passed = tl.load(grad_ptr + at + back * channels, mask=ahead & inside, other=0.0).to(COMPUTE)
            tap = tl.load(weight_ptr + channel * TAPS + (TAPS - 1 - back), mask=there, other=0.0)
            to_x += passed * tap.to(COMPUTE)[None, :]
        tl.store(to_x_ptr + at, to_x.to(to_x_ptr.dtype.element_ty), mask=inside)
        to_bias += tl.sum(grad, 0)
    sums = (program.to(tl.int64) * TAPS + place[:, None]) * channels + channel[None, :]
    tl.store(to_weight_ptr + sums, to_weight, mask=(place < TAPS)[:, None] & there[None, :])
    tl.store(to_bias_ptr + program.to(tl.int64) * channels + channel, to_bias, mask=there)
