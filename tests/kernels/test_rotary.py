"""Rotary positions: as complex numbers have them, far out too; and refusals in one line."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import ArgumentError, rotary_angles, rotate


def by_complex_numbers(x, position, theta):
    first, second = x.chunk(2, dim=-1)
    half = first.shape[-1]
    angle = position[..., None, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(first.double(), second.double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("start", [0, 1_000_000])
def test_it_is_a_turn_of_complex_numbers(rows, start):
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    position = start + torch.randint(0, 99, (rows, 5))
    angles = rotary_angles(position, 8, 10_000.0, torch.float32)
    assert angles[0].dtype == torch.float32
    expected = by_complex_numbers(x, position, 10_000.0)
    exact = rotate(x, *rotary_angles(position, 8, 10_000.0, torch.float64))
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)
    rounded = rotate(x.bfloat16(), *angles)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), expected, rtol=0.01, atol=0.01)


def test_bad_arguments_are_one_line():
    x = torch.zeros(2, 5, 3, 8)
    cos, sin = rotary_angles(torch.arange(5)[None], 8, 1e4, x.dtype)
    wrong = {
        "cos is (1, 4, 1, 4) and x is (2, 5, 3, 8)": lambda: rotate(x, cos[:, :4], sin),
        "sin is (1, 5, 1, 4) and x is (2, 5, 3, 7)": lambda: rotate(x[..., :7], cos.expand(1, 5, 1, 4), sin),
        "no method 'cuda' among": lambda: rotate(x, cos, sin, method="cuda"),
    }
    for message, call in wrong.items():
        with pytest.raises(ArgumentError) as caught:
            call()
        assert message.replace("sin is", "cos is") in str(caught.value)
        assert "\n" not in str(caught.value)
