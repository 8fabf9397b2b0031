"""The registered cells are the equations they name, written here a second time, one number after the other."""

from __future__ import annotations

import math

import pytest
import torch
from paralm_kernels import NotConverged, SLSTMDiagonal, cells, get_cell, solve
from paralm_kernels.cell_library.slstm_diagonal import coordinate, log_normaliser
from paralm_kernels.laws import by, deviation, outcome, random_case, reference


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mgu(h, x_f, x_h, a_f, a_h):
    f = sigmoid(a_f * h + x_f)
    return ((1 - f) * h + f * math.tanh(a_h * f * h + x_h),)


def tanh(h, x, a):
    return (math.tanh(a * h + x),)


def fastslow(u, v, h, x_u, x_v, x_o, a_u, b, a_v, a_o, p, q):
    u = math.tanh(a_u * u + b * h + x_u)
    g = sigmoid(a_v * v + x_v)
    v = (1 - g) * v + g * u
    return u, v, sigmoid(a_o * h + x_o) * math.tanh(p * u + q * v)


def paragru(h, x_z, x_r, x_h, a_z, a_r, a_h):
    z, r = sigmoid(a_z * h + x_z), sigmoid(a_r * h + x_r)
    return ((1 - z) * h + z * math.tanh(a_h * h * r + x_h),)


def paralstm(c, h, x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o):
    f = sigmoid(a_f * h + x_f + p_f * c)
    c = f * c + (1 - f) * math.tanh(a_c * h + x_c)
    return c, sigmoid(a_o * h + x_o + p_o * c) * math.tanh(c)


@pytest.mark.parametrize("equations", [mgu, tanh, fastslow, paragru, paralstm], ids=lambda f: f.__name__)
def test_the_step_is_the_equations(equations):
    cell = get_cell(equations.__name__)
    case = random_case(cell, batch=1, time=9, channel=1, weights=2.0, resets=0.0)
    state = [float(s) for s in case.state]
    states = solve(cell, case.inputs, case.params, case.state).states
    for t in range(9):
        state = equations(*state, *(float(x[0, t, 0]) for x in case.inputs), *(float(p) for p in case.params))
        assert [float(h[0, t, 0]) for h in states] == pytest.approx(list(state), rel=1e-12, abs=1e-12)


def textbook_slstm(inputs, params):
    """xLSTM's sLSTM with its stabiliser, from m = −∞, c = n = 0: (batch, time, channel) of h, n e^m and c/n."""
    x_i, x_f, x_z, x_o = inputs
    r_i, r_f, r_z, r_o = params
    h = c = n = torch.zeros_like(x_i[:, 0])
    m = torch.full_like(h, -math.inf)
    result = []
    for t in range(x_i.shape[1]):
        i, log_f = x_i[:, t] + r_i * h, torch.nn.functional.logsigmoid(x_f[:, t] + r_f * h)
        z, o = torch.tanh(x_z[:, t] + r_z * h), torch.sigmoid(x_o[:, t] + r_o * h)
        later = torch.maximum(log_f + m, i)
        keep, take = torch.exp(log_f + m - later), torch.exp(i - later)
        c, n, m = keep * c + take * z, keep * n + take, later
        h = o * c / n
        result.append((h, m + torch.log(n), c / n))
    return tuple(torch.stack(part, 1) for part in zip(*result, strict=True))


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0, -200.0, -5000.0])
def test_the_slstm_is_the_textbooks_from_minus_infinity_in_values_and_gradients(shift):
    """Whatever the size of the input gate: it is relative, and nothing over- or underflows."""
    case = random_case(SLSTMDiagonal(), time=40, weights=1.0, resets=0.0)
    shifted = tuple(
        (3 * x + (shift if k == 0 else 0.0)).requires_grad_() for k, x in enumerate(case.inputs)
    )  # the first input is the input gate's
    params = tuple(p.clone().requires_grad_() for p in case.params)
    leaves = (*shifted, *params)
    s, y, h = solve(SLSTMDiagonal(), shifted, params).states
    expected_h, expected_log_n, expected_y = textbook_slstm(shifted, params)
    torch.testing.assert_close(h, expected_h, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y, expected_y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_normaliser(s), expected_log_n, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(h, leaves, case.grad_states[2])
    for x, wanted in zip(got, torch.autograd.grad(expected_h, leaves, case.grad_states[2]), strict=True):
        torch.testing.assert_close(x, wanted, rtol=1e-8, atol=1e-10 * float(wanted.abs().max()))


def test_a_fresh_slstm_takes_its_first_input_whole_and_passes_no_gradient_back():
    inputs = [torch.randn(1, 3, 4, dtype=torch.float64) for _ in range(4)]
    state = tuple(torch.zeros(1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    zero = (torch.zeros(4, dtype=torch.float64),) * 4
    s, y, _ = solve(SLSTMDiagonal(), inputs, zero, state).states
    torch.testing.assert_close(y[:, 0], torch.tanh(inputs[2][:, 0]), rtol=1e-15, atol=0)
    torch.testing.assert_close(log_normaliser(s)[:, 0], inputs[0][:, 0], rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(y.sum(), state, allow_unused=True, materialize_grads=True)[:2]:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_coordinate_of_the_normaliser_is_smooth_and_has_an_inverse():
    log_n = torch.cat((torch.linspace(-900, 900, 3001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    log_n.requires_grad_()
    s = coordinate(log_n)
    assert bool((s > 0).all())
    torch.testing.assert_close(log_normaliser(s), log_n, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(s.sum(), log_n)
    assert float(slope[-1]) == 1.0
    torch.testing.assert_close(slope, torch.where(log_n >= 0, 1.0, (1 - log_n.clamp(max=0)) ** -2))


def test_the_slstm_stays_finite_in_float32_at_any_input_gate():
    for shift in (-1e5, -300.0, 300.0, 1e5):
        inputs = [torch.randn(2, 50, 3) for _ in range(4)]
        inputs[0] = (inputs[0] + shift).requires_grad_()
        params = tuple(torch.rand(3) for _ in range(4))
        result = solve(SLSTMDiagonal(), inputs, params)
        assert all(torch.isfinite(h).all() for h in result.states)
        (gradient,) = torch.autograd.grad(result.states[2].sum(), inputs[0])
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("time", [300, 2048])
def test_newton_solves_the_slstm_over_long_sequences(time):
    """One tile: the guess f(0, x) is far off, the Picard sweeps mend it."""
    case = random_case(SLSTMDiagonal(), batch=1, time=time, channel=2, weights=1.0, resets=0.005)
    worst, where = deviation(outcome(case, by("newton", tile=time)), outcome(case, by("sequential")), 1e-10)
    assert worst <= 1, where


def test_picard_sweeps_save_newton_iterations_of_the_slstm():
    class Cold(SLSTMDiagonal):
        picard = 0

    case = random_case(SLSTMDiagonal(), time=512, channel=8, weights=1.0, resets=0.0)
    arguments = (case.inputs, case.params)
    warm = solve(SLSTMDiagonal(), *arguments, method="newton", tile=512).info.iterations
    try:
        cold = solve(Cold(), *arguments, method="newton", tile=512).info.iterations
    except NotConverged:
        cold = 1_000_000
    assert warm < cold


def test_every_registered_cell_says_where_it_comes_from():
    for name, cell in cells().items():
        module = __import__(type(cell).__module__, fromlist=["_"])
        assert "=" in module.__doc__, name
        assert "arXiv" in module.__doc__ or "Elman" in module.__doc__ or "Our own" in module.__doc__, name


def test_three_components_with_a_full_jacobian_need_no_further_code():
    case = random_case(get_cell("fastslow"), time=50, weights=2.0)
    expected = outcome(case, reference)
    for method in ("sequential", "newton"):
        worst, where = deviation(outcome(case, by(method)), expected, 1e-10)
        assert worst <= 1, where
