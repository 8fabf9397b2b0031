"""The convolution's fused kernels under Triton's interpreter: test_triton_chunkwise.py runs this file, with
TRITON_INTERPRET=1, in a process of its own."""

from __future__ import annotations

import os

import pytest
import torch
from paralm_kernels import causal_conv

from .test_conv import CLOSE, by_definition, random_arguments, values_and_gradients

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_chunkwise.py runs this file with TRITON_INTERPRET=1", allow_module_level=True)

from paralm_kernels import triton_conv


def fused(*arguments):
    return causal_conv(*arguments, method="triton")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs over time and channels in short sequences; of nine steps they have two blocks each backward."""
    monkeypatch.setattr(triton_conv, "BLOCK_TIME", 4)
    monkeypatch.setattr(triton_conv, "BACK_TIME", 4)
    monkeypatch.setattr(triton_conv, "BLOCK_CHANNELS", 2)
    monkeypatch.setattr(triton_conv, "PROGRAMS", 6)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 2, 3, 9])
def test_they_are_the_sum_that_defines_it(time, taps, resets):
    arguments = random_arguments(time, taps, resets)
    got = values_and_gradients(fused, *arguments)
    expected = values_and_gradients(by_definition, *arguments)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, torch.zeros_like(value) if other is None else other, **CLOSE)


@pytest.mark.parametrize("outputs", [[0], [1]])
def test_a_cotangent_of_one_output_alone(outputs):
    arguments = random_arguments(6, 4, True)
    leaves = arguments[:4]

    def gradients(function):
        found = [function(*arguments)[index] for index in outputs]
        return torch.autograd.grad(sum(h.sin().sum() for h in found), leaves, allow_unused=True)

    for value, other in zip(gradients(fused), gradients(by_definition), strict=True):
        torch.testing.assert_close(value, torch.zeros_like(value) if other is None else other, **CLOSE)


def test_a_gradient_that_is_one_number_everywhere():
    """As of a plain sum, which has no memory for each."""
    arguments = random_arguments(6, 4, True)
    for value, other in zip(
        torch.autograd.grad(fused(*arguments)[0].sum(), arguments[:4]),
        torch.autograd.grad(by_definition(*arguments)[0].sum(), arguments[:4]),
        strict=True,
    ):
        torch.testing.assert_close(value, other, **CLOSE)


def test_steps_further_apart_than_32_bits_count():
    """Memory of which most is never touched, so there is none behind it."""
    near, weight = torch.randn(1, 3, 4).bfloat16(), torch.randn(4, 2)
    far = torch.empty((1 << 31) + 4, dtype=torch.bfloat16).as_strided((1, 3, 4), (4, 1 << 30, 1)).copy_(near)
    results = []
    for x in (near, far):
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight)]
        y, _ = fused(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_projection_in_low_precision(dtype):
    """x is a slice, read where it lies; sums are in float32; no bias, no state."""
    wide = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for method in ("torch", "triton"):
        x = wide.clone().requires_grad_()
        leaf = weight.clone().requires_grad_()
        y, state = causal_conv(x[..., 3:8], leaf, method=method)
        y.float().sin().sum().backward()
        results.append((y, state, x.grad, leaf.grad))
    tolerance = 1e-6 if dtype == torch.float32 else 0.06  # y in bf16 may round the other way, and its sine with it
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
