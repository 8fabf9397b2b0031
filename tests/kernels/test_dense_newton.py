"""The quasi-Newton solve of the dense recurrences: the loop's numbers at any weights, and it says so when it fails."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import ArgumentError, NotConverged, dense_newton, dense_rnn
from paralm_kernels.dense_cells import KINDS

from tests.kernels.test_dense_rnn import arguments, assert_same, outcome

NAMES = list(KINDS)
TIME = 40


def case(kind, scale, dtype=torch.float64):
    """R with a spectral radius of about `scale` per gate."""
    inputs, weight, bias, state = arguments(kind, TIME, dtype)
    reset = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    reset[0, 7] = reset[0, 8] = reset[2, 33] = True
    return inputs, weight * (scale / weight.shape[-1] ** 0.5), bias, state, reset


@pytest.fixture
def iterations(monkeypatch):
    """A list that gets an element for each iteration."""
    seen, linearise = [], dense_newton._DenseTile.linearise

    def counted(self, h):
        seen.append(self.start)
        return linearise(self, h)

    monkeypatch.setattr(dense_newton._DenseTile, "linearise", counted)
    return seen


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("tile", [None, 16, 1])
def test_the_loops_numbers(kind, scale, tile):
    """Values, final state and gradients, resets and a carried state; tiles that do not divide the sequence."""
    inputs, weight, bias, state, reset = case(kind, scale)
    got = outcome(dense_rnn, kind, inputs, weight, bias, state, reset, method="newton", tile=tile)
    assert_same(got, outcome(dense_rnn, kind, inputs, weight, bias, state, reset, method="torch"))
    fresh = outcome(dense_rnn, kind, inputs, weight, None, None, None, method="newton", tile=tile)
    assert_same(fresh, outcome(dense_rnn, kind, inputs, weight, None, None, None, method="torch"))


@pytest.mark.parametrize("kind", NAMES)
def test_without_gradients_and_in_float32(kind):
    inputs, weight, bias, state, reset = case(kind, 0.5, torch.float32)
    state = tuple(part.float() for part in state)
    with torch.no_grad():
        y, end = dense_rnn(kind, inputs, weight, bias, state, reset, method="newton")
        expected_y, expected = dense_rnn(kind, inputs, weight, bias, state, reset, method="torch")
    assert y.dtype == torch.float32
    assert_same([y, *end], [expected_y, *expected], 1e-5)


@pytest.mark.parametrize("kind", NAMES)
def test_far_fewer_iterations_than_steps_at_small_weights(kind, iterations):
    """It is a parallel solve; and at large weights it stays within its bound, and is exact there."""
    inputs, weight, bias, state, _ = case(kind, 0.1)
    dense_rnn(kind, inputs, weight, bias, state, method="newton")
    assert len(iterations) <= 10
    iterations.clear()
    dense_rnn(kind, inputs, 40 * weight, bias, state, method="newton")
    assert 10 < len(iterations) <= 2 * TIME + 2


@pytest.mark.parametrize("kind", NAMES)
def test_a_diagonal_matrix_is_newtons_method(kind, iterations):
    """Nothing is left out of the Jacobian then, and the convergence is quadratic."""
    inputs, weight, bias, state, _ = case(kind, 1.0)
    weight = weight * torch.eye(weight.shape[-1])
    got = dense_rnn(kind, inputs, weight, bias, state, method="newton")
    assert len(iterations) <= 8
    expected = dense_rnn(kind, inputs, weight, bias, state, method="torch")
    assert_same([got[0], *got[1]], [expected[0], *expected[1]])


def test_a_slow_rate_is_seen(iterations):
    """Two channels that read only each other: each iteration leaves 0.95 of the error, so that an update of the
    tolerance leaves twenty times as much to come."""
    weight = torch.tensor([[0.0, 0.95], [0.95, 0.0]], dtype=torch.float64).view(1, 1, 2, 2)
    inputs = torch.full((1, 400, 1, 1, 2), 0.002, dtype=torch.float64)
    tol = 1e-5
    y, _ = dense_rnn("elman", inputs, weight, method="newton", tol=tol)
    expected, _ = dense_rnn("elman", inputs, weight, method="torch")
    assert len(iterations) > 50
    assert (y - expected).abs().max() <= 1.1 * tol


def test_slstm_far_out():
    """Gates that overflow float32 many times over; the state carried on is the loop's, m too. A number near 1000 has
    an error of 3e-5 in float32, and differences of them are what the gates see."""
    inputs, weight, bias, _, reset = case("slstm", 0.5, torch.float32)
    inputs = inputs.clone()
    inputs[0, :, 0] += 1000
    inputs[1, :, 0] -= 1000
    inputs[:, ::2, 1] -= 1000
    got = outcome(dense_rnn, "slstm", inputs, weight, bias, None, reset, method="newton")
    expected = outcome(dense_rnn, "slstm", inputs, weight, bias, None, reset, method="torch")
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= 2e-4 * b.abs().max().clamp(min=1)


def test_too_few_iterations_are_said_or_walked():
    inputs, weight, bias, state, reset = case("lstm", 4.0)
    message = r"dense 'lstm' did not converge within max_iter=3 iterations in steps 0\.\.39"
    with pytest.raises(NotConverged, match=message):
        dense_rnn("lstm", inputs, weight, bias, state, reset, method="newton", max_iter=3)
    got = outcome(
        dense_rnn, "lstm", inputs, weight, bias, state, reset, method="newton", max_iter=3, on_failure="sequential"
    )
    assert_same(got, outcome(dense_rnn, "lstm", inputs, weight, bias, state, reset, method="torch"), 0.0)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"max_iter": 0}, ["max_iter is 0", "at least 1"]),
        ({"tile": 0}, ["tile is 0", "at least 1"]),
        ({"tile": 2.5}, ["tile is 2.5", "whole number"]),
        ({"tol": "1e-3"}, ["tol is '1e-3'", "above 0"]),
        ({"tol": 0.0}, ["tol is 0.0", "above 0"]),
        ({"on_failure": "ignore"}, ["on_failure is 'ignore'", "'sequential'"]),
    ],
)
def test_bad_options_are_one_line(options, parts):
    inputs, weight, bias, state, _ = case("elman", 1.0)
    with pytest.raises(ArgumentError) as caught:
        dense_rnn("elman", inputs, weight, bias, state, method="newton", **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
