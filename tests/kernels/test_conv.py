"""The causal convolution against the sum that defines it: values, gradients, carried state, resets."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import ArgumentError, causal_conv

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64, another order of at most a few hundred additions


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def by_definition(x, weight, bias, state, reset):
    """y_t = b + Σ_k w_{K−1−k} x_{t−k} over the positions of the same sequence; and the state that continues it."""
    batch, time, channel = x.shape
    reach = weight.shape[1] - 1
    padded = torch.cat((state, x), 1)
    sequence = torch.zeros(batch, reach + time, dtype=torch.long)
    if reset is not None:
        sequence[:, reach:] = reset.cumsum(1)
    y = []
    for t in range(time):
        total = bias.expand(batch, channel)
        for k in range(reach + 1):
            same = sequence[:, reach + t] == sequence[:, reach + t - k]
            total = total + same[:, None] * weight[:, reach - k] * padded[:, reach + t - k]
        y.append(total)
    kept = sequence[:, time:] == sequence[:, -1:]
    return torch.stack(y, 1), padded[:, time:] * kept[..., None]


def random_arguments(time, taps, resets, batch=2, channel=3):
    x, weight = random(batch, time, channel), random(channel, taps)
    bias, state = random(channel), random(batch, taps - 1, channel)
    generator = torch.Generator().manual_seed(time)
    reset = torch.rand((batch, time), generator=generator) < 0.3 if resets else None
    return x, weight, bias, state, reset


def values_and_gradients(function, x, weight, bias, state, reset):
    outputs = function(x, weight, bias, state, reset)
    generator = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(h.shape, generator=generator, dtype=h.dtype) for h in outputs]
    return (*outputs, *torch.autograd.grad(outputs, (x, weight, bias, state), cotangents, allow_unused=True))


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 17])
def test_it_is_the_sum_that_defines_it(time, taps, resets):
    arguments = random_arguments(time, taps, resets)
    got = values_and_gradients(causal_conv, *arguments)
    expected = values_and_gradients(by_definition, *arguments)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, torch.zeros_like(value) if other is None else other, **CLOSE)


def test_pieces_that_fit_the_cache_join(monkeypatch):
    """The same with time cut into pieces of 5 steps inside."""
    arguments = random_arguments(23, 4, True)
    whole = values_and_gradients(causal_conv, *arguments)
    monkeypatch.setattr("paralm_kernels.conv._CHUNK", 5 * 2 * 3)
    for value, other in zip(values_and_gradients(causal_conv, *arguments), whole, strict=True):
        torch.testing.assert_close(value, other, **CLOSE)


@pytest.mark.parametrize("cuts", [(1,), (2, 3, 4), (7, 8, 16)])
def test_whole_is_pieces_through_the_state(cuts):
    x, weight, bias, state, reset = random_arguments(17, 4, True)

    def in_pieces(x, weight, bias, state, reset):
        parts = []
        for start, stop in zip((0, *cuts), (*cuts, 17), strict=True):
            y, state = causal_conv(x[:, start:stop], weight, bias, state, reset[:, start:stop])
            parts.append(y)
        return torch.cat(parts, 1), state

    got = values_and_gradients(in_pieces, x, weight, bias, state, reset)
    for value, other in zip(got, values_and_gradients(causal_conv, x, weight, bias, state, reset), strict=True):
        torch.testing.assert_close(value, other, **CLOSE)


def test_it_is_torch_conv1d_with_the_same_weight():
    x, weight, bias, _, _ = random_arguments(12, 4, False)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3).transpose(1, 2)
    torch.testing.assert_close(causal_conv(x, weight, bias)[0], expected, **CLOSE)
    without = causal_conv(x, weight)[0]
    torch.testing.assert_close(without, expected - bias, **CLOSE)


def test_a_reset_cuts_even_what_is_not_finite():
    x, weight, bias, state, _ = random_arguments(9, 4, False)
    with torch.no_grad():
        x[:, 4], state[:, 0] = float("inf"), float("nan")
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 0] = reset[:, 5] = True
    y, tail = causal_conv(x, weight, bias, state, reset)
    assert torch.isfinite(y[:, :4]).all()
    assert torch.isfinite(y[:, 5:]).all()
    assert torch.isfinite(tail).all()


def test_the_state_is_not_changed_in_place():
    x, weight, bias, state, reset = random_arguments(2, 4, True)
    before = state.detach().clone()
    _, after = causal_conv(x, weight, bias, state, reset)
    torch.testing.assert_close(state.detach(), before, rtol=0, atol=0)
    assert after.data_ptr() != state.data_ptr()


def test_bfloat16_is_summed_in_float32():
    x, weight, bias, state, reset = random_arguments(40, 4, True)
    low = [value.detach().bfloat16() for value in (x, weight, bias, state)]
    y, tail = causal_conv(*low, reset)
    exact, _ = causal_conv(*(value.double() for value in low), reset)
    assert y.dtype == tail.dtype == torch.bfloat16
    # one rounding to bfloat16 (8 bits) at the end, nothing lost before
    torch.testing.assert_close(y.double(), exact, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.rand(2, 3)}, "x is (2, 3), expected (batch, time, channel)"),
        ({"x": torch.rand(2, 0, 3)}, "none of them 0"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.long)}, "x must be a floating-point tensor, got torch.int64"),
        ({"weight": torch.rand(4, 4)}, "weight is (4, 4), expected (3, taps) for x (2, 5, 3)"),
        ({"bias": torch.rand(4)}, "bias is (4,), expected (3,) (channel,) of x (2, 5, 3)"),
        ({"state": torch.rand(2, 4, 3)}, "state is (2, 4, 3), expected (2, 3, 3) (batch, taps - 1, channel)"),
        ({"reset": torch.zeros(2, 5)}, "reset must be a bool tensor (batch, time), got torch.float32"),
        ({"reset": [[False] * 5] * 2}, "reset must be a bool tensor (batch, time), got list"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, "reset is (2, 4), expected (2, 5)"),
        ({"weight": torch.rand(3, 4).double()}, "float64 does not mix"),
        ({"bias": torch.rand(3, device="meta")}, "bias is on meta but causal_conv: x is on cpu"),
    ],
)
def test_mismatches_name_both_sides(change, says):
    arguments = {"x": torch.rand(2, 5, 3), "weight": torch.rand(3, 4), **change}
    with pytest.raises(ArgumentError) as caught:
        causal_conv(**arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
