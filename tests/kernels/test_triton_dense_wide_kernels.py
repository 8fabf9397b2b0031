"""The dense recurrences' kernels of large heads under Triton's interpreter, as test_triton_dense_kernels.py; by hand:
TRITON_INTERPRET=1 python -m pytest THIS FILE

Heads count as large from 9 columns on, and a program has 8 of them. A step a launch, or all steps in one launch whose
programs run at the same time and wait for each other.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from paralm_kernels import dense_rnn, dense_torch, reference_dense_rnn
from paralm_kernels.dense_cells import KINDS

from tests.kernels.test_dense_rnn import assert_same, attached, outcome, score

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_dense.py runs this file with TRITON_INTERPRET=1", allow_module_level=True)

from paralm_kernels import triton_dense, triton_dense_wide

from tests.kernels.test_triton_dense_kernels import arguments, assert_close_to_float64, resets
from tests.kernels.together import at_the_same_time

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a kernel overflows and selects
CHIP = triton_dense_wide.Chip(132, 60_000)


@pytest.fixture(autouse=True)
def large_from_9_columns_on(monkeypatch):
    monkeypatch.setattr(triton_dense, "LARGEST", dict.fromkeys(triton_dense.LARGEST, 8))
    monkeypatch.setattr(triton_dense_wide, "_BLOCKS_N", {"cuda": (8,)})
    monkeypatch.setattr(dense_torch, "PIECE", 4)  # several launches of the backward kernel
    triton_dense_wide.sizes.cache_clear()
    yield
    triton_dense_wide.sizes.cache_clear()


@pytest.fixture
def together(monkeypatch):
    monkeypatch.setattr(triton_dense_wide, "_together", lambda on: True)
    with at_the_same_time():
        yield


def seen(monkeypatch):
    """Every launch's grid, first pair, first step and the one after its last."""
    launches, launch = [], triton_dense_wide.Wide._launch

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(**given):
                launches.append((grid, given["group"], given["start"], given["stop"]))
                self.kernel[grid](**given)

            return run

    monkeypatch.setattr(
        triton_dense_wide.Wide, "_launch", lambda self, kernel, *rest: launch(self, Kernel(kernel), *rest)
    )
    return launches


@pytest.mark.parametrize("kind", KINDS)
def test_programs_that_wait_for_each_other_are_the_reference(kind, together, monkeypatch):
    launches = seen(monkeypatch)
    inputs, weight, bias, state = arguments(kind, 3, 7, 1, 20)
    given = (kind, inputs, weight, bias, state, resets(3, 7))
    expected = outcome(reference_dense_rnn, *given)
    assert_same(outcome(dense_rnn, *given, method="triton"), expected)
    assert launches == [((3, 1), 0, 0, 7), ((3, 1), 0, 0, 4), ((3, 1), 0, 0, 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_a_launch_is_the_reference(kind, monkeypatch):
    launches = seen(monkeypatch)
    inputs, weight, bias, state = arguments(kind, 2, 3, 1, 12)
    given = (kind, inputs, weight, bias, state, resets(2, 3))
    assert_same(outcome(dense_rnn, *given, method="triton"), outcome(reference_dense_rnn, *given))
    assert launches == [((2, 1), 0, t, t + 1) for t in (0, 1, 2, 0, 1, 2, 3)]


@pytest.mark.parametrize("kind", ["gru", "slstm"])
def test_without_bias_state_and_resets(kind, together):
    inputs, weight, _, _ = arguments(kind, 2, 3, 1, 12)
    given = (kind, inputs, weight, None, None)
    assert_same(outcome(dense_rnn, *given, method="triton"), outcome(reference_dense_rnn, *given))


def test_more_heads_and_rows_than_a_device_has_room_for(together, monkeypatch):
    """Two of four pairs of a head and a block of rows at once."""
    launches = seen(monkeypatch)
    monkeypatch.setattr(triton_dense_wide, "chip", lambda device: replace(CHIP, multiprocessors=5))
    inputs, weight, bias, state = arguments("lstm", 17, 3, 2, 12)
    given = ("lstm", inputs, weight, bias, state, resets(17, 3))
    assert_same(outcome(dense_rnn, *given, method="triton"), outcome(reference_dense_rnn, *given))
    assert launches == [((2, 2), group, 0, steps) for steps in (3, 4) for group in (0, 2)]


@pytest.mark.parametrize(("chunks", "held", "stage"), [(3, 0, 3), (3, 0, 1), (1, 2, 1)])
def test_tiles_of_a_warps_columns(chunks, held, stage, together, monkeypatch):
    """Several of them, whose h or δ is read at once or one after the other, and some held in registers."""
    monkeypatch.setattr(triton_dense_wide, "_BLOCKS_N", {"cuda": (128,)})
    monkeypatch.setattr(triton_dense_wide, "_SUMS", 1 << 20)
    monkeypatch.setattr(triton_dense_wide, "_fitting", lambda *_: (16, chunks, held, stage, 0))
    inputs, weight, bias, state = arguments("gru", 2, 2, 1, 260)
    given = ("gru", inputs, weight / 4, bias, state)
    assert_same(outcome(dense_rnn, *given, method="triton"), outcome(reference_dense_rnn, *given))


@pytest.mark.parametrize("kind", ["gru", "slstm"])
def test_without_gradients_only_the_last_state_is_kept(kind, together):
    inputs, weight, bias, state = arguments(kind, 3, 3, 1, 12)
    expected = reference_dense_rnn(kind, inputs, weight, bias, state, resets(3, 3))
    with torch.no_grad():
        y, end = dense_rnn(kind, inputs, weight, bias, state, resets(3, 3), method="triton")
    assert_same([y, *end], [expected[0], *expected[1]])


def test_pieces_are_the_whole(together):
    inputs, weight, bias, state = arguments("lstm", 2, 5, 1, 12)
    whole = outcome(dense_rnn, "lstm", inputs, weight, bias, state, method="triton")
    given = attached(inputs, weight, bias, *state)
    first, end = dense_rnn("lstm", given[0][:, :3], *given[1:3], tuple(given[3:]), method="triton")
    second, end = dense_rnn("lstm", given[0][:, 3:], *given[1:3], end, method="triton")
    y = torch.cat((first, second), 1)
    assert_same([y, *end, *torch.autograd.grad(score(y, *end), given)], whole)


def test_outputs_or_states_alone_have_gradients(together):
    inputs, weight, bias, state = arguments("slstm", 2, 3, 1, 12)
    results = []
    for run, options in ((dense_rnn, {"method": "triton"}), (reference_dense_rnn, {})):
        given = attached(inputs, weight, bias, *state)
        y, end = run("slstm", *given[:3], tuple(given[3:]), **options)
        results.append([])
        for part in (y, end[-1]):
            grads = torch.autograd.grad(score(part), given, retain_graph=True, allow_unused=True)
            results[-1] += [torch.zeros_like(v) if g is None else g for g, v in zip(grads, given, strict=True)]
    assert_same(*results)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"])
def test_low_precision(kind, dtype, close, together):
    """As of small heads: h and δ are exchanged in the dtype of the products, states are float32."""
    assert_close_to_float64(kind, close, resets(3, 5), *arguments(kind, 3, 5, 1, 12, dtype=dtype))
