# mypy: ignore-errors
"""The dense recurrences' cells (dense_cells.py) in Triton: what the kernels of small heads and of large ones share.

Everything is elementwise over tiles but `product`. States and gradients that a kind does not have are any tiles.
"""

import triton
import triton.language as tl

from . import triton_math as tm


@triton.jit
def product(a, b, total, DOT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a · b, of operands in DOT, summed in COMPUTE. The interpreter multiplies bfloat16 as if it were whole
    numbers: there, PRECISION "wide", the rounded operands are widened first, which changes nothing else."""
    if PRECISION == "wide":
        return total + tl.dot(a.to(DOT).to(COMPUTE), b.to(COMPUTE), out_dtype=COMPUTE)
    else:
        return total + tl.dot(a.to(DOT), b, input_precision=PRECISION, out_dtype=COMPUTE)


@triton.jit
def four_of(at, step, mask, COUNT: tl.constexpr):
    """COUNT, 1 to 4, tiles that lie `step` apart; the first again where there are fewer than four."""
    first = tl.load(at, mask=mask, other=0.0)
    second, third, fourth = first, first, first
    if COUNT > 1:
        second = tl.load(at + step, mask=mask, other=0.0)
    if COUNT > 2:
        third = tl.load(at + 2 * step, mask=mask, other=0.0)
    if COUNT > 3:
        fourth = tl.load(at + 3 * step, mask=mask, other=0.0)
    return first, second, third, fourth


@triton.jit
def store_four(at, step, first, second, third, fourth, mask, COUNT: tl.constexpr):
    """The first COUNT, 1 to 4, of the tiles, `step` apart, in the dtype of the memory."""
    tl.store(at, first.to(at.dtype.element_ty), mask=mask)
    if COUNT > 1:
        tl.store(at + step, second.to(at.dtype.element_ty), mask=mask)
    if COUNT > 2:
        tl.store(at + 2 * step, third.to(at.dtype.element_ty), mask=mask)
    if COUNT > 3:
        tl.store(at + 3 * step, fourth.to(at.dtype.element_ty), mask=mask)


@triton.jit
def log_sigmoid(x):
    """log σ(x), exact in both tails."""
    return tm.minimum(x, tl.zeros_like(x)) - tm.log1p(tm.exp(-tl.abs(x)))


@triton.jit
def factors(i, f, n, m, KIND: tl.constexpr):
    """What multiplies c and what multiplies the candidate, and the next n and m, of an LSTM or an sLSTM."""
    if KIND == "lstm":
        return tm.sigmoid(f), tm.sigmoid(i), n, m
    else:
        past = log_sigmoid(f) + m
        m = tl.where(past >= i, past, i)
        forget, write = tm.exp(past - m), tm.exp(i - m)
        return forget, write, forget * n + write, m


@triton.jit
def hidden(o, c, n, KIND: tl.constexpr):
    """h of σ(o) and the next c and n, of an LSTM or an sLSTM."""
    return o * tm.tanh(c) if KIND == "lstm" else o * c / n


@triton.jit
def cut_state(cut, h, c, n, m, FIRST_M: tl.constexpr, KIND: tl.constexpr):
    """The state with the initial one, of which m is FIRST_M, where `cut` is true; or its gradients with zeros."""
    h = tl.where(cut, 0.0, h)
    if KIND == "lstm" or KIND == "slstm":
        c = tl.where(cut, 0.0, c)
    if KIND == "slstm":
        n = tl.where(cut, 0.0, n)
        m = tl.where(cut, FIRST_M, m)
    return h, c, n, m


@triton.jit
def pull(gh, gc, gn, gm, row0, row1, row2, row3, before0, before1, before2, KIND: tl.constexpr):
    """A step's transpose: gradients of its rows (four, whatever the kind), of h without the recurrent product's, and of
    c, n, m before it, from those after it; before: the state it starts from, lstm c; gru h; slstm c, n, m."""
    direct = tl.zeros_like(gh)
    if KIND == "elman":
        h = tm.tanh(row0)
        to0 = gh * (1.0 - h * h)
        return to0, to0, to0, to0, direct, gc, gn, gm
    elif KIND == "gru":
        r, z = tm.sigmoid(row0), tm.sigmoid(row1)
        candidate = tm.tanh(row3 + r * row2)
        to3 = gh * (1.0 - z) * (1.0 - candidate * candidate)
        to2 = to3 * r
        to0 = to2 * row2 * (1.0 - r)
        to1 = gh * (before0 - candidate) * z * (1.0 - z)
        return to0, to1, to2, to3, gh * z, gc, gn, gm
    elif KIND == "lstm":
        i, f, z = tm.sigmoid(row0), tm.sigmoid(row1), tm.tanh(row2)
        tanh_c = tm.tanh(f * before0 + i * z)
        o = tm.sigmoid(row3)
        to3 = gh * o
        gc += to3 * (1.0 - tanh_c * tanh_c)
        to3 = to3 * tanh_c * (1.0 - o)
        to1 = gc * f
        to2 = gc * i
        to0 = to2 * z * (1.0 - i)
        return to0, to1 * before0 * (1.0 - f), to2 * (1.0 - z * z), to3, direct, to1, gn, gm
    else:
        z, o = tm.tanh(row2), tm.sigmoid(row3)
        excess = log_sigmoid(row1) + before2 - row0
        forget, write = tm.exp(tl.where(excess < 0, excess, 0.0)), tm.exp(tl.where(excess < 0, 0.0, -excess))
        after = forget * before1 + write
        h = o * (forget * before0 + write * z) / after
        gc += gh * o / after
        gn -= gh * h / after
        by_forget, by_write = (gc * before0 + gn * before1) * forget, (gc * z + gn) * write
        g_past = tl.where(excess < 0, by_forget, gm - by_write)
        to2 = gc * write * (1.0 - z * z)
        to3 = gh * h * (1.0 - o)
        return gm - g_past, g_past * tm.sigmoid(-row1), to2, to3, direct, gc * forget, gn * forget, g_past
