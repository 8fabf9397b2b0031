# mypy: ignore-errors
"""The elementwise functions of a step in Triton, the same on every device: no vendor library below float64.

A device's fast exponential is off by |x| roundings, its logarithm by an absolute 2⁻²², and Triton has no tanh, log1p or
expm1 of its own. These are within a few units in the last place over the whole range (tested against float64; but see
sigmoid, which with tanh is most of what a step costs), do not overflow, keep the relative accuracy of small results,
and propagate NaN. In float64 the device's own exp and log are exact enough to build on. Coefficients were fitted for
this file; each comment has the error of the polynomial.
"""

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    def _on_nvidia():
        return False

else:

    @tl.core.builtin
    def _on_nvidia(_semantic=None):
        """Whether it is compiled for an NVIDIA device, which may be none that is here."""
        return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@triton.jit
def constant(value: tl.constexpr, like):
    """A number in the dtype and shape of `like` (a bare number beside a float64 tensor may become a float32)."""
    return tl.zeros_like(like) + value


@triton.jit
def spread(value, like):
    """A value of fewer dimensions in the shape of `like`."""
    return tl.zeros_like(like) + value


@triton.jit
def exp(x):
    """eˣ."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        n = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634 + 0.5), -126.0), 127.0)
        r = tl.fma(n, -0.693145751953125, x)  # ln 2 in two parts; n times the first is exact
        r = tl.fma(n, -1.42860682030941723212e-6, r)  # at most ln 2 / 2, or past the clamp, on the way to 0 or infinity
        return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def reciprocal(x):
    """1 / x; in float32 on NVIDIA the hardware's, one rounding off, without the care for numbers beyond 2¹²⁶."""
    if x.dtype == tl.float32 and _on_nvidia():
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ). In float32 three units in the last place, and |x| more where that is negative: of a gate as good
    as shut, which is added to something far larger."""
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)
    else:
        return reciprocal(1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def tanh(x):
    """The hyperbolic tangent."""
    if x.dtype == tl.float64:
        e = expm1(-2.0 * tl.abs(x))
        result = -e / (2.0 + e)
        return tl.where(x < 0, -result, result)
    else:
        u = x * x
        p = u * -0.006946991663426161 + 0.021472714841365814  # 0.03 ulp up to 0.5
        p = p * u + -0.05393378809094429
        p = p * u + 0.1333322674036026
        p = p * u + -0.3333333134651184
        large = 1.0 - 2.0 * reciprocal(1.0 + tl.exp2(x * 2.8853900817779268))
        return tl.where(tl.abs(x) < 0.5, x + x * u * p, large)


@triton.jit
def expm1(x):
    """eˣ − 1, also where that is tiny."""
    e = exp(x)
    if x.dtype == tl.float64:
        # (e − 1) x / log e: the rounding of e cancels (Kahan)
        plain = (e == 1.0) | (e <= 0.0) | (tl.abs(x) > 1.0)
        quotient = (e - 1.0) * x / tl.log(tl.where(plain, 2.0, e))
        return tl.where(e == 1.0, x, tl.where(plain, e - 1.0, quotient))
    else:
        p = x * 0.00019962186343036592 + 0.0013982197269797325  # 0.13 ulp up to 0.5
        p = p * x + 0.008333181962370872
        p = p * x + 0.04166579246520996
        p = p * x + 0.1666666716337204
        p = p * x + 0.5
        return tl.where(tl.abs(x) < 0.5, x + x * x * p, e - 1.0)


@triton.jit
def log(x):
    """The natural logarithm; relative accuracy also near 1."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        small = x < 1.1754943508222875e-38  # subnormal numbers are scaled into the normal range
        bits = tl.where(small, x * 8388608.0, x).to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F2AAAAB) >> 23  # so that the rest is in [2/3, 4/3)
        rest = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        n = exponent.to(tl.float32) - tl.where(small, 23.0, 0.0)
        f = rest - 1.0
        s = f / (2.0 + f)
        u = s * s
        p = u * 0.2222222222 + 0.2857142857  # 2 artanh(s) = 2s + s u p, |s| ≤ 1/5: 0.2 ulp
        p = p * u + 0.4
        p = p * u + 0.6666666667
        result = tl.fma(n, 0.693145751953125, tl.fma(n, 1.42860682030941723212e-6, 2.0 * s + s * u * p))
        result = tl.where(x == float("inf"), x, result)
        result = tl.where(x == 0.0, -float("inf"), result)
        return tl.where(x >= 0.0, result, float("nan"))


@triton.jit
def log1p(x):
    """log(1 + x), also where that is tiny."""
    u = 1.0 + x
    lost = tl.where(tl.abs(x) < 1e8, x - (u - 1.0), 0.0)  # what the sum rounded away
    return log(u) + lost / tl.where(u == 0.0, 1.0, u)


@triton.jit
def erf(x):
    """The error function."""
    return tl.erf(x)


@triton.jit
def sin(x):
    """The sine."""
    return tl.sin(x)


@triton.jit
def cos(x):
    """The cosine."""
    return tl.cos(x)


@triton.jit
def sqrt(x):
    """The square root."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def rsqrt(x):
    """1 / √x."""
    return 1.0 / sqrt(x)


@triton.jit
def sign(x):
    """−1, 0 or 1; NaN for NaN."""
    return tl.where(x == x, tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0), x)


@triton.jit
def power(x, exponent: tl.constexpr):
    """x to a constant power: by multiplication where it is a small whole number, else e^(exponent · log x)."""
    whole: tl.constexpr = exponent == exponent // 1 and exponent > -9 and exponent < 9
    if whole:
        result = tl.zeros_like(x) + 1.0
        for _ in tl.static_range(abs(int(exponent))):
            result = result * x
        if exponent < 0:
            result = 1.0 / result
        return result
    else:
        return exp(log(x) * exponent)


@triton.jit
def maximum(a, b):
    """The larger; NaN if either is."""
    return tl.where((a >= b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    """The smaller; NaN if either is."""
    return tl.where((a <= b) | (a != a), a, b)


@triton.jit
def relative_change(new, old, mask):
    """The largest |new − old| / (1 + |new|) as a float32 number; infinite where that is not a number."""
    change = tl.abs(new - old) / (1.0 + tl.abs(new))
    change = tl.where(change == change, change, float("inf"))
    return tl.max(tl.ravel(tl.where(mask & (new != old), change, 0.0).to(tl.float32)))


@triton.jit
def finite(x):
    """Whether x is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def add_compensated(total, lost, value):
    """total + value, and what that rounded away (Kahan): a sum over a million steps keeps its digits."""
    value = value - lost
    new = total + value
    return new, (new - total) - value


@triton.jit
def largest_size(x, mask):
    """The largest |x| as a float32 number; infinite where that is not a number."""
    size = tl.abs(x)
    size = tl.where(size == size, size, float("inf"))
    return tl.max(tl.ravel(tl.where(mask, size, 0.0).to(tl.float32)))


@triton.jit
def largest_update(new, delta, mask):
    """The largest |delta| / (1 + |new|) as a float32 number; infinite where that is not a number."""
    size = tl.abs(delta) / (1.0 + tl.abs(new))
    size = tl.where(size == size, size, float("inf"))
    return tl.max(tl.ravel(tl.where(mask, size, 0.0).to(tl.float32)))


@triton.jit
def flag_at(row, t, inside, PRESENT: tl.constexpr):
    """Whether the byte at t is set; false outside, and where there are no flags."""
    if PRESENT:
        return tl.load(row + t, mask=inside, other=0) != 0
    else:
        return inside & False


@triton.jit
def with_flag(flags, at: tl.constexpr, row, t, inside, PRESENT: tl.constexpr):
    """A whole number with the flag at t as bit `at`: many flags in one register."""
    if PRESENT:
        flags = flags | (flag_at(row, t, inside, PRESENT).to(tl.int32) << at)
    return flags


@triton.jit
def flag_of(flags, at: tl.constexpr):
    """Whether that bit is set."""
    return ((flags >> at) & 1) != 0
