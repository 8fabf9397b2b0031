"""The dense recurrences' kernels on a real GPU, against the loop in float64 on the CPU; `make gpu-check` runs this."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import ArgumentError, dense_rnn
from paralm_kernels.dense_cells import KINDS

from tests.kernels.test_dense_rnn import outcome

triton_dense = pytest.importorskip("paralm_kernels.triton_dense")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHAPES = [(1, 33, 1, 16), (3, 65, 2, 40), (16, 257, 4, 64), (37, 130, 3, 128)]
"""(batch, time, heads, d_head): fewer rows than a program has, padding, several pieces, several blocks, the largest."""


def case(kind, shape, dtype):
    """Arguments in float64 that `dtype` holds exactly, with R of a spectral radius of about a half."""
    batch, time, heads, d_head = shape
    cell, draws = KINDS[kind], torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=draws, dtype=torch.float64) * scale).to(dtype).double()

    inputs = normal(batch, time, len(cell.gates), heads, d_head)
    weight = normal(len(cell.gates), heads, d_head, d_head, scale=0.5 / d_head**0.5)
    bias = normal(len(cell.biases), heads, d_head)
    state = [normal(batch, heads, d_head) for _ in cell.state]
    if kind == "slstm":
        state[2] = state[2].abs() + 0.5
    reset = torch.rand(batch, time, generator=draws) < 0.05
    return inputs, weight, bias, tuple(state), reset


def on_gpu(dtype, inputs, weight, bias, state, reset):
    wide = torch.promote_types(dtype, torch.float32)
    narrow = (part.to("cuda", dtype) for part in (inputs, weight, bias))
    return *narrow, tuple(part.to("cuda", wide) for part in state), reset.cuda()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_the_kernels_are_the_loop(kind, shape, dtype, close):
    given = case(kind, shape, dtype)
    moved = on_gpu(dtype, *given)
    if shape[3] > triton_dense.largest(*moved[:2]):
        pytest.skip("R does not fit")
    expected = outcome(dense_rnn, kind, *given, method="torch")
    got = outcome(dense_rnn, kind, *moved, method="triton")
    for a, b in zip(got, expected, strict=True):
        error = (a.cpu().double() - b).abs().max()
        assert error <= close * b.abs().max().clamp(min=1), f"{error:.2g} of {b.abs().max():.2g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "d_head"), [(torch.float64, 32), (torch.float32, 100)])
def test_auto_takes_the_loop_where_the_kernels_do_not_fit(kind, dtype, d_head):
    given = case(kind, (2, 20, 2, d_head), dtype)
    expected = outcome(dense_rnn, kind, *given, method="torch")
    moved = on_gpu(dtype, *given)
    for a, b in zip(outcome(dense_rnn, kind, *moved), expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)
    with pytest.raises(ArgumentError, match="method 'triton' takes d_head up to"):
        dense_rnn(kind, *moved, method="triton")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_every_time(kind):
    moved = on_gpu(torch.bfloat16, *case(kind, (37, 130, 3, 64), torch.bfloat16))
    first, again = (outcome(dense_rnn, kind, *moved, method="triton") for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_newton_on_a_gpu_is_the_loop(kind):
    given = case(kind, (2, 100, 2, 16), torch.float32)
    expected = outcome(dense_rnn, kind, *given, method="torch")
    for a, b in zip(outcome(dense_rnn, kind, *on_gpu(torch.float32, *given), method="newton"), expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1)
