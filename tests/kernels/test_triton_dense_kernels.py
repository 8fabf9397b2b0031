"""The dense recurrences' kernels under Triton's interpreter, which must be on before Triton is imported:
test_triton_dense.py runs this file in a process of its own; by hand: TRITON_INTERPRET=1 python -m pytest THIS FILE

Yardstick: the reference in float64, to 1e-10.
"""

from __future__ import annotations

import os

import pytest
import torch
from paralm_kernels import dense_rnn, dense_torch, reference_dense_rnn
from paralm_kernels.dense_cells import KINDS

from tests.kernels.test_dense_rnn import assert_same, attached, normal, outcome, score

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_dense.py runs this file with TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a kernel overflows and selects
NAMES = list(KINDS)


def arguments(kind, batch=3, time=7, heads=2, d_head=5, dtype=torch.float64):
    """(inputs, weight, bias, state); a normaliser is positive, the rest normal."""
    cell = KINDS[kind]
    shape = (heads, d_head)
    state = [normal(batch, *shape, seed=3 + i) for i in range(len(cell.state))]
    if kind == "slstm":
        state[2] = state[2].abs() + 0.5
    inputs = normal(batch, time, len(cell.gates), *shape)
    weight = normal(len(cell.gates), *shape, d_head, seed=1) * (2 / d_head**0.5)
    bias = normal(len(cell.biases), *shape, seed=2)
    narrow = (inputs.to(dtype), weight.to(dtype), bias.to(dtype))
    return *narrow, tuple(part.to(torch.promote_types(dtype, torch.float32)) for part in state)


def resets(batch, time):
    reset = torch.zeros(batch, time, dtype=torch.bool)
    reset[0, 0] = reset[-1, time // 2] = reset[-1, time // 2 + 1] = True
    return reset


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    ("shape", "biased", "carried", "cut"),
    [
        ((3, 7, 2, 5), True, True, True),
        ((3, 7, 2, 5), False, False, False),
        ((17, 3, 1, 16), True, False, True),  # one row more than a program has; d_head without padding
        ((1, 4, 1, 17), False, True, False),
    ],
)
def test_kernels_are_the_reference(kind, shape, biased, carried, cut, monkeypatch):
    monkeypatch.setattr(dense_torch, "PIECE", 3)  # several launches of the backward kernel
    inputs, weight, bias, state = arguments(kind, *shape)
    given = (kind, inputs, weight, bias if biased else None, state if carried else None)
    reset = resets(*shape[:2]) if cut else None
    expected = outcome(reference_dense_rnn, *given, reset)
    got = outcome(dense_rnn, *given, reset, method="triton")
    assert all(value.isfinite().all() for value in got)
    assert_same(got, expected)


@pytest.mark.parametrize("kind", NAMES)
def test_without_gradients_only_the_last_state_is_kept(kind):
    inputs, weight, bias, state = arguments(kind)
    expected = reference_dense_rnn(kind, inputs, weight, bias, state, resets(3, 7))
    with torch.no_grad():
        y, end = dense_rnn(kind, inputs, weight, bias, state, resets(3, 7), method="triton")
    assert_same([y, *end], [expected[0], *expected[1]])


@pytest.mark.parametrize("kind", NAMES)
def test_pieces_are_the_whole(kind):
    inputs, weight, bias, state = arguments(kind)

    def halves(kind, inputs, weight, bias, state, **options):
        first, state = dense_rnn(kind, inputs[:, :4], weight, bias, state, **options)
        second, state = dense_rnn(kind, inputs[:, 4:], weight, bias, state, **options)
        return torch.cat((first, second), 1), state

    whole = outcome(dense_rnn, kind, inputs, weight, bias, state, method="triton")
    given = attached(inputs, weight, bias, *state)
    y, end = halves(kind, *given[:3], tuple(given[3:]), method="triton")
    assert_same([y, *end, *torch.autograd.grad(score(y, *end), given)], whole)


@pytest.mark.parametrize("kind", NAMES)
def test_outputs_or_states_alone_have_gradients(kind):
    """What no gradient comes to is None in the backward pass, and no tensor of zeros."""
    inputs, weight, bias, state = arguments(kind, time=4)
    results = []
    for run, options in ((dense_rnn, {"method": "triton"}), (reference_dense_rnn, {})):
        given = attached(inputs, weight, bias, *state)
        y, end = run(kind, *given[:3], tuple(given[3:]), **options)
        results.append([])
        for part in (y, end[-1]):
            grads = torch.autograd.grad(score(part), given, retain_graph=True, allow_unused=True)
            results[-1] += [torch.zeros_like(v) if g is None else g for g, v in zip(grads, given, strict=True)]
    assert_same(*results)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_low_precision(kind, dtype, close):
    """Against float64 on the same rounded arguments: float32 to rounding, 16 bits to theirs (products are of rounded h
    and δ; states, sums and the state that is handed on are float32). Weights that do not amplify an error over time."""
    assert_close_to_float64(kind, close, resets(3, 7), *arguments(kind, dtype=dtype))


def assert_close_to_float64(kind, close, reset, inputs, weight, bias, state):
    weight = weight / 4
    got = outcome(dense_rnn, kind, inputs, weight, bias, state, reset, method="triton")
    wide = [part.double() for part in (inputs, weight, bias)]
    expected = outcome(reference_dense_rnn, kind, *wide, tuple(part.double() for part in state), reset)
    assert got[0].dtype == inputs.dtype
    assert all(part.dtype == torch.float32 for part in got[1 : 1 + len(state)])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= close * b.abs().max().clamp(min=1), (a - b).abs().max() / b.abs().max()


def test_slstm_far_out():
    """Exponential gates that overflow float32 many times over: finite, and the reference's."""
    inputs, weight, bias, _ = arguments("slstm", dtype=torch.float32)
    inputs = inputs.clone()
    inputs[0, :, 0] += 1000
    inputs[1, :, 0] -= 1000
    inputs[:, ::2, 1] -= 1000
    got = outcome(dense_rnn, "slstm", inputs, weight, bias, None, resets(3, 7), method="triton")
    assert all(value.isfinite().all() for value in got)
    expected = outcome(reference_dense_rnn, "slstm", *(p.double() for p in (inputs, weight, bias)), None, resets(3, 7))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


def test_weights_are_rounded_no_further_than_the_inputs():
    """float32 inputs with bfloat16 weights: products in float32."""
    inputs, weight, bias, state = arguments("lstm", dtype=torch.float32)
    weight = weight.bfloat16()
    got = outcome(dense_rnn, "lstm", inputs, weight, bias, state, method="triton")
    expected = outcome(dense_rnn, "lstm", inputs, weight, bias, state, method="torch")
    assert got[4].dtype == torch.bfloat16
    assert_same([*got[:4], *got[5:]], [*expected[:4], *expected[5:]], 1e-5)


def test_strided_arguments():
    """Inputs as a slice of a wider projection, weights as a transpose: copied, never misread."""
    inputs, weight, bias, state = arguments("lstm")
    wide = torch.cat((inputs, inputs), -1)[..., :5]
    assert not wide.is_contiguous()
    turned = weight.mT.contiguous().mT
    y, _ = dense_rnn("lstm", wide, turned, bias, state, method="triton")
    y.requires_grad_(False)
    torch.testing.assert_close(y, reference_dense_rnn("lstm", inputs, weight, bias, state)[0], rtol=1e-10, atol=1e-10)
    assert_same(
        outcome(lambda k, x, *rest, **o: dense_rnn(k, torch.cat((x, x), -1)[..., :5], *rest, **o), "lstm", inputs,
                weight, bias, state, method="triton"),
        outcome(reference_dense_rnn, "lstm", inputs, weight, bias, state),
    )  # fmt: skip
