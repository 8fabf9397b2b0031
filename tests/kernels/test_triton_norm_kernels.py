"""The kernels of norms and gates under Triton's interpreter: test_triton_chunkwise.py runs this file, with
TRITON_INTERPRET=1, in a process of its own."""

from __future__ import annotations

import os

import pytest
import torch
from paralm_kernels import gated_norm, rotary_angles, rotate, swiglu
from torch.utils.checkpoint import checkpoint

from .test_norm import every_form, random_case, values_and_gradients
from .test_norm import run as run_case

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_chunkwise.py runs this file with TRITON_INTERPRET=1", allow_module_level=True)

from paralm_kernels import triton_norm

CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several programs, and several rounds of each, over few rows; tiles of two rows."""
    monkeypatch.setattr(triton_norm, "TILE", 32)
    monkeypatch.setattr(triton_norm, "PROGRAMS", 6)
    monkeypatch.setattr(triton_norm, "_GLU", {"ROWS": 2, "BLOCK": 4})


@every_form
@pytest.mark.parametrize(("rows", "channels"), [((1, 1), 12), ((3, 7), 12), ((2, 2), 48)])
def test_they_are_the_composite(form, rows, channels):
    case = random_case(form, rows, channels=channels)
    for value, other in zip(values_and_gradients(*case, "triton"), values_and_gradients(*case, "torch"), strict=True):
        torch.testing.assert_close(value, other, **CLOSE)


def test_without_eps_rows_that_are_not_there_give_nothing():
    """Of a tile of two rows, the last of three and the one after it."""
    x, v, weight, d = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 12), (3, 12), 12, 3))
    leaves = [leaf.requires_grad_() for leaf in (x, v, weight, d)]
    results = []
    for method in ("torch", "triton"):
        y = gated_norm(x, weight, 0.0, skip=(d, v), method=method)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_gradient_that_is_one_number_everywhere():
    """As of a plain sum, which has no memory for each."""
    x, weight = torch.randn(3, 12, dtype=torch.float64).requires_grad_(), torch.randn(12, dtype=torch.float64)
    angles = rotary_angles(torch.arange(3)[None], 12, 100.0, torch.float64)
    calls = (
        lambda method: gated_norm(x, weight, 1e-5, method=method),
        lambda method: swiglu(x, method=method),
        lambda method: rotate(x[None, :, None], *angles, method=method),
    )
    for call in calls:
        one, other = (torch.autograd.grad(call(method).sum(), x)[0] for method in ("torch", "triton"))
        torch.testing.assert_close(one, other, **CLOSE)


def test_rows_further_apart_than_32_bits_count():
    """Memory of which most is never touched, so there is none behind it."""
    near = torch.randn(3, 12).bfloat16()
    far = torch.empty((1 << 31) + 12, dtype=torch.bfloat16).as_strided((3, 12), (1 << 30, 1)).copy_(near)
    angles, weight = rotary_angles(torch.arange(3)[None], 12, 100.0, torch.float32), torch.ones(12)
    calls = (
        lambda x: gated_norm(x, weight, 1e-5, x, skip=(weight, x), method="triton"),
        lambda x: swiglu(x, method="triton"),
        lambda x: rotate(x[None, :, None], *angles, method="triton"),
    )
    for call in calls:
        results = []
        for x in (near, far):
            leaf = x.detach().requires_grad_()
            y = call(leaf)
            results.append([y, *torch.autograd.grad(y, leaf, torch.ones_like(y))])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@every_form
def test_low_precision_is_rounded_where_it_is_stored(form):
    leaves, options = random_case(form, (40,), torch.bfloat16)
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    got, exact = values_and_gradients(leaves, options, "triton"), values_and_gradients(wide, options, "torch")
    for value, other, leaf in zip(got, exact, [leaves["weight"], *leaves.values()], strict=True):
        assert value.dtype == leaf.dtype
        assert (value.double() - other).abs().max() <= 2.0**-6 * other.abs().max()  # the interpreter truncates


@every_form
def test_groups_too_wide_for_a_program_of_every_form(form, monkeypatch):
    monkeypatch.setattr(triton_norm, "NARROW", 3)
    leaves, options = random_case(form)
    if options.pop("centred", False):
        assert values_and_gradients(leaves, options | {"centred": True}, "auto")
    for value, other in zip(
        values_and_gradients(leaves, options, "triton"), values_and_gradients(leaves, options, "torch"), strict=True
    ):
        torch.testing.assert_close(value, other, **CLOSE)


@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_one_of_the_stream_and_the_weights_is_wide(kinds):
    x = torch.randn(70, 12).to(kinds[0]).requires_grad_()
    weight = torch.randn(12).to(kinds[1]).requires_grad_()
    results = []
    for method in ("torch", "triton"):
        y = gated_norm(x, weight, 1e-5, method=method)
        results.append([y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2), (2, 3, 14), (5, 40)])
def test_swiglu(shape):
    wide = torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float64, requires_grad=True)
    results = []
    for method in ("torch", "triton"):
        y = swiglu(wide[..., 1 : 1 + shape[-1]], method=method)
        results.append([y, *torch.autograd.grad(y.sin().sum(), wide)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(("shape", "rows"), [((1, 1, 1, 2), 1), ((2, 7, 3, 6), 1), ((2, 7, 3, 6), 2)])
def test_rotate_a_part_of_a_projection_and_a_gradient_that_lies_otherwise(shape, rows):
    batch, time, heads, width = shape
    wide = torch.randn(batch, time, heads + 2, width, dtype=torch.float64, requires_grad=True)
    angles = rotary_angles(torch.randint(0, 99, (rows, time)), width, 100.0, torch.float64)
    results = []
    for method in ("torch", "triton"):
        y = rotate(wide[:, :, 1 : 1 + heads], *angles, method=method)
        cotangent = (
            torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(batch, heads, time, width).transpose(1, 2)
        )
        results.append([y, *torch.autograd.grad(y, wide, cotangent)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_under_activation_checkpointing():
    """Which gives what was kept once."""
    leaves, options = random_case({"gate": True, "gate_first": True, "skip": 4})

    def run(*inputs):
        y = run_case(dict(zip(leaves, inputs, strict=True)), options, "triton")
        return swiglu(rotate(y[..., None, :], *angles, method="triton")[..., 0, :], method="triton")

    angles = rotary_angles(torch.arange(5)[None], 12, 100.0, torch.float64)
    found = []
    for call in (run, lambda *inputs: checkpoint(run, *inputs, use_reentrant=False)):
        y = call(*leaves.values())
        found.append([y, *torch.autograd.grad(y.sin().sum(), list(leaves.values()))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_nothing_in_nothing_out_and_no_second_derivative():
    weight = torch.ones(4, requires_grad=True)
    for method in ("auto", "triton"):
        assert gated_norm(torch.ones(0, 4), weight, 1e-5, method=method).shape == (0, 4)
        assert swiglu(torch.ones(2, 0, 4), method=method).shape == (2, 0, 2)
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(gated_norm(x, weight, 1e-5, method="triton").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
