"""The dense recurrences' kernels on a real GPU, against the loop in float64 on the CPU; `make gpu-check` runs this."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import ArgumentError, dense_rnn
from paralm_kernels.dense_cells import KINDS
from paralm_kernels.dense_torch import DensePlan

from tests.kernels.test_dense_rnn import outcome

triton_dense = pytest.importorskip("paralm_kernels.triton_dense")
triton_dense_wide = pytest.importorskip("paralm_kernels.triton_dense_wide")
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
    if shape[3] > triton_dense.largest(moved[1], dtype):
        pytest.skip("R does not fit")
    expected = outcome(dense_rnn, kind, *given, method="torch")
    got = outcome(dense_rnn, kind, *moved, method="triton")
    for a, b in zip(got, expected, strict=True):
        error = (a.cpu().double() - b).abs().max()
        assert error <= close * b.abs().max().clamp(min=1), f"{error:.2g} of {b.abs().max():.2g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "d_head", "reason"),
    [(torch.float64, 32, "has no float64 on a GPU"), (torch.float32, 1600, "keeps R on the chip: .* got 1600")],
)
def test_auto_takes_the_loop_where_the_kernels_do_not_fit(kind, dtype, d_head, reason):
    given = case(kind, (2, 20, 1, d_head), dtype)
    expected = outcome(dense_rnn, kind, *given, method="torch")
    moved = on_gpu(dtype, *given)
    for a, b in zip(outcome(dense_rnn, kind, *moved), expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)
    with pytest.raises(ArgumentError, match=reason):
        dense_rnn(kind, *moved, method="triton")


def wide(kind, moved):
    """Skips where R does not fit the device."""
    plan = DensePlan(KINDS[kind], torch.float32, True)
    way = triton_dense.way(plan, *moved[:2], asked=True)
    if isinstance(way, str):
        pytest.skip(way)
    assert isinstance(way, triton_dense_wide.Wide)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "dtype", "close"),
    [
        ((3, 65, 2, 160), torch.float32, 1e-5),  # padding, in columns and rows
        ((33, 300, 2, 256), torch.float32, 1e-5),  # several pieces and blocks of rows
        ((4, 300, 1, 512), torch.float32, 1e-5),
        ((16, 100, 1, 768), torch.float32, 1e-5),
        ((16, 200, 16, 256), torch.float16, 0.01),
        ((16, 600, 1, 768), torch.bfloat16, 0.05),
        ((16, 600, 1, 1024), torch.bfloat16, 0.05),
        ((5, 100, 1, 1536), torch.bfloat16, 0.05),
        ((1, 300, 1, 2048), torch.bfloat16, 0.05),  # R in shared memory and in registers
        ((20, 100, 1, 2048), torch.bfloat16, 0.05),
        ((300, 40, 1, 1024), torch.bfloat16, 0.05),  # several launches
    ],
    ids=str,
)
def test_the_kernels_of_large_heads_are_the_loop(kind, shape, dtype, close):
    given = case(kind, shape, dtype)
    moved = on_gpu(dtype, *given)
    wide(kind, moved)
    exact = [part.cuda() for part in given[:3]]
    state, reset = tuple(part.cuda() for part in given[3]), given[4].cuda()
    expected = outcome(dense_rnn, kind, *exact, state, reset, method="torch")  # in float64
    got = outcome(dense_rnn, kind, *moved, method="triton")
    for a, b in zip(got, expected, strict=True):
        error = (a.double() - b).abs().max()
        assert error <= close * b.abs().max().clamp(min=1), f"{error:.2g} of {b.abs().max():.2g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_head", [1024, 2048])
def test_large_heads_without_resets(kind, d_head):
    """Other code than with them."""
    given = case(kind, (5, 60, 1, d_head), torch.bfloat16)
    moved = on_gpu(torch.bfloat16, *given)
    wide(kind, moved)
    expected = outcome(dense_rnn, kind, *(part.cuda() for part in given[:2]), None, None, method="torch")
    for a, b in zip(outcome(dense_rnn, kind, *moved[:2], None, None, method="triton"), expected, strict=True):
        assert (a.double() - b).abs().max() <= 0.05 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 1000, 1, 1024), (32, 500, 4, 256), (1, 2000, 1, 2048)], ids=str)
def test_large_heads_give_the_same_numbers_every_time(kind, shape):
    """What a race between programs would change; also while other work comes and goes on the device."""
    moved = on_gpu(torch.bfloat16, *case(kind, shape, torch.bfloat16))
    wide(kind, moved)
    first = outcome(dense_rnn, kind, *moved, method="triton")
    side, work = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for busy in (False, False, True, True):
        if busy:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(200):
                    work = torch.nn.functional.normalize(work @ work)
        for a, b in zip(outcome(dense_rnn, kind, *moved, method="triton"), first, strict=True):
            assert torch.equal(a, b)
    torch.cuda.synchronize()


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
