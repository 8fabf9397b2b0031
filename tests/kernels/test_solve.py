"""`solve` against the plain loop over `Cell.step` under autograd: every cell, method, length, reset and dtype.

Tolerances: float64 to 1e-10, states relative to 1 + |h|, gradients to their largest element. float32 states element by
element within 8·2⁻²⁴·κ, κ_t = 1 + |J_t| κ_{t−1}: a few roundings a step, amplified as the recurrence does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from paralm_kernels import ArgumentError, Cell, CellError, ParaGRU, ParaLSTM, solve, step
from paralm_kernels.laws import (
    FLOAT32_GRADIENTS,
    TOLERANCE,
    ULPS,
    amplification,
    by,
    decoded,
    deviation,
    in_pieces,
    outcome,
    plain_loop,
    random_case,
    reference,
)

METHODS = ("sequential", "newton")
LENGTHS = (1, 2, 3, 5, 8, 13, 31, 32, 64, 97, 128, 251)


def assert_same(got, expected, tolerance=TOLERANCE):
    worst, where = deviation(got, expected, tolerance)
    assert worst <= 1, f"{where}: {worst:.2g} times what is allowed"


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("weights", [0.5, 4.0])
def test_every_method_is_the_plain_loop_in_values_and_gradients(cell, time, weights):
    """Powers of two and primes, resets at random places (for odd lengths), random initial states."""
    case = random_case(cell, time=time, weights=weights, resets=0.1 * (time % 2), seed=time)
    expected = outcome(case, reference)
    for method in METHODS:
        assert_same(outcome(case, by(method)), expected)


@pytest.mark.parametrize(("time", "resets"), [(1024, 0.0), (2039, 0.01), (4093, 0.01), (4096, 0.0)])
def test_newton_is_sequential_over_long_sequences(cell, time, resets):
    """Recurrent weights up to ±4, where three fixed iterations are wrong by 1e17."""
    case = random_case(cell, batch=1, time=time, channel=2, weights=4.0, resets=resets, seed=1)
    assert_same(outcome(case, by("newton")), outcome(case, by("sequential")))


@pytest.mark.slow
def test_sequential_is_the_plain_loop_over_4096_steps(cell):
    case = random_case(cell, batch=1, time=4096, channel=2, weights=4.0, resets=0.001, seed=2)
    assert_same(outcome(case, by("sequential")), outcome(case, reference))


@pytest.mark.parametrize("method", METHODS)
def test_many_channels_take_the_walk_of_the_adjoint(cell, method):
    """Wide enough for the loop over time instead of odd–even reduction, in several chunks of time."""
    case = random_case(cell, batch=2, time=37, channel=300, weights=2.0, resets=0.05)
    assert_same(outcome(case, by(method)), outcome(case, reference))


def test_chunks_of_the_adjoint_join(cell, monkeypatch):
    """The same with the adjoint cut into chunks of 4 steps."""
    case = random_case(cell, time=31, weights=2.0, resets=0.2)
    monkeypatch.setattr("paralm_kernels.adjoint._CHUNK", 4 * 2 * 3)
    assert_same(outcome(case, by("sequential")), outcome(case, reference))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cuts", [(1,), (16,), (3, 4, 29), (5, 6, 7, 8, 32)])
def test_whole_is_pieces(cell, method, cuts):
    """Ragged splits, the state carried with its gradient, resets in every row."""
    case = random_case(cell, time=33, weights=2.0, resets=0.1, seed=4)
    assert_same(outcome(case, in_pieces(cuts, method)), outcome(case, by(method)))


def test_decoding_is_solving(cell):
    case = random_case(cell, time=19, weights=2.0)
    assert_same(outcome(case, decoded), outcome(case, by("auto")))


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (F.relu, 0.0),
        (lambda h: h.clamp(0, 1), 0.0),
        (F.softplus, 1000.0),
        (F.elu, 1000.0),
        (lambda h: h.detach() * h, 2.0),
    ],
)
def test_the_gradient_of_a_decode_step_is_the_cells(function, x):
    class Made(Cell):
        name = "made"
        state = ("h",)
        inputs = ("x",)

        def step(self, state, inputs, params):
            return (function(state[0] + inputs[0]),)

    h, x = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), x)
    (expected,) = torch.autograd.grad(solve(Made(), (x[:, None],), (), (h,)).final, h)
    (got,) = torch.autograd.grad(step(Made(), (h,), (x,), ()), h)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [0, 1, 7, 12])
def test_a_reset_is_a_fresh_start(cell, method, at):
    """Nothing before the reset reaches what comes after, not even a NaN; and no gradient goes back."""
    case = random_case(cell, time=13, weights=2.0, resets=0.0)
    reset = torch.zeros(2, 13, dtype=torch.bool)
    reset[:, at] = True
    inputs = tuple(x.clone().requires_grad_() for x in case.inputs)
    state = tuple(s.clone().requires_grad_() for s in case.state)
    whole = solve(case.cell, inputs, case.params, state, reset, method)
    fresh = solve(case.cell, tuple(x[:, at:] for x in case.inputs), case.params, method=method)
    for a, b in zip(whole.states, fresh.states, strict=True):
        torch.testing.assert_close(a[:, at:], b, rtol=1e-12, atol=1e-12)
    sum(h[:, at:].sum() for h in whole.states).backward()
    for x in inputs:
        assert not x.grad[:, :at].any()
    for s in state:
        assert not s.grad.any()
    if method == "sequential":
        broken = tuple(torch.full_like(s, float("nan")) for s in case.state)
        poisoned = solve(case.cell, case.inputs, case.params, broken, reset, method)
        assert all(torch.isfinite(h[:, at:]).all() for h in poisoned.states)


def test_gradients_flow_through_states_and_final_separately(cell):
    case = random_case(cell, time=9, weights=2.0)
    for only in ("grad_states", "grad_final"):
        other = "grad_final" if only == "grad_states" else "grad_states"
        part = replace(case, **{other: tuple(torch.zeros_like(g) for g in getattr(case, other))})
        assert_same(outcome(part, by("sequential")), outcome(part, reference))
    final = solve(cell, tuple(x.requires_grad_() for x in case.inputs), case.params).final
    final[0].sum().backward()  # the states' cotangent is absent, not zero
    assert any(x.grad is not None and x.grad[:, -1].any() for x in case.inputs)


def test_only_some_arguments_want_a_gradient(cell):
    case = random_case(cell, time=9)
    params = tuple(p.clone().requires_grad_() for p in case.params)
    sum(h.sum() for h in solve(cell, case.inputs, params, case.state, case.reset).states).backward()
    expected, _ = plain_loop(cell, case.inputs, params, case.state, case.reset)
    grads = torch.autograd.grad(sum(h.sum() for h in expected), params)
    for p, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert not solve(cell, case.inputs, case.params).states[0].requires_grad


def test_gradcheck(cell):
    case = random_case(cell, batch=1, time=4, channel=2)
    leaves = tuple(x.requires_grad_() for x in (*case.inputs, *case.params, *case.state))
    n, m = len(cell.inputs), len(cell.inputs) + len(cell.params)

    def run(*tensors):
        result = solve(cell, tensors[:n], tensors[n:m], tensors[m:])
        return (*result.states, *result.final)

    assert torch.autograd.gradcheck(run, leaves)


def test_a_second_derivative_is_refused():
    case = random_case(ParaGRU(), time=3)
    x = tuple(v.requires_grad_() for v in case.inputs)
    cotangent = torch.ones(2, 3, 3, dtype=torch.float64, requires_grad=True)
    states = solve(case.cell, x, case.params).states
    (grad,) = torch.autograd.grad(states, x[:1], cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(solve(case.cell, x, case.params).states[0].sum(), x[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # the gradient of a sum is a constant
        grad.sum().backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("weights", "time"), [(0.5, 257), (1.0, 64), (4.0, 127)])
def test_float32_stays_within_rounding_of_float64(cell, method, weights, time):
    single = random_case(cell, time=time, channel=4, weights=weights, resets=0.02).to(torch.float32)
    exact = single.to(torch.float64)
    got, expected = outcome(single, by(method)), outcome(exact, reference)
    bound = ULPS * amplification(exact)
    for name in cell.state:
        value = expected.values[f"states[{name}]"]
        error = (got.values[f"states[{name}]"] - value).abs() / (bound * value.abs().max().clamp(min=1))
        assert float(error.max()) <= 1, name
    if weights <= 1:
        got, expected = replace(got, values={}), replace(expected, values={})
        assert_same(got, expected, FLOAT32_GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_is_computed_in_float32(cell, method, dtype):
    """States come back rounded once; the carried state and the gradients of float32 parameters are float32."""
    case = random_case(cell, time=300, weights=0.5, resets=0.01)
    inputs = tuple(x.to(dtype).requires_grad_() for x in case.inputs)
    params = tuple(p.float().requires_grad_() for p in case.params)
    result = solve(cell, inputs, params, reset=case.reset, method=method)
    sum(h.float().sum() for h in result.states).backward()
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact_params = tuple(p.detach().double().requires_grad_() for p in params)
    exact = solve(cell, exact_inputs, exact_params, reset=case.reset)
    sum(h.sum() for h in exact.states).backward()
    half_ulp = torch.finfo(dtype).eps
    for h, value in zip(result.states, exact.states, strict=True):
        assert h.dtype == dtype
        torch.testing.assert_close(h.double(), value, rtol=half_ulp, atol=1e-5)
    assert all(h.dtype == torch.float32 for h in result.final)
    for p, value in zip(params, exact_params, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad.double(), value.grad, rtol=1e-4, atol=1e-3)
    for x, value in zip(inputs, exact_inputs, strict=True):
        torch.testing.assert_close(x.grad.double(), value.grad, rtol=half_ulp, atol=1e-3)


def test_float64_stays_float64_everywhere(cell):
    case = random_case(cell, time=5)
    result = solve(cell, case.inputs, case.params, case.state)
    assert {h.dtype for h in (*result.states, *result.final)} == {torch.float64}
    assert {h.dtype for h in step(cell, case.state, tuple(x[:, 0] for x in case.inputs), case.params)} == {
        torch.float64
    }


def test_views_and_expanded_tensors_are_taken_as_they_are():
    """Inputs as slices of one projection, params and state expanded: no copies asked of the user."""
    wide = torch.randn(2, 11, 9, dtype=torch.float64)
    inputs, params = wide.chunk(3, -1), tuple(torch.full((1,), 0.5, dtype=torch.float64).expand(3) for _ in range(3))
    state = (torch.zeros(1, 1, dtype=torch.float64).expand(2, 3),)
    got = solve(ParaGRU(), inputs, params, state).states[0]
    expected, _ = plain_loop(ParaGRU(), inputs, params, state, None)
    torch.testing.assert_close(got, expected[0])


def test_arguments_are_not_changed(cell):
    case = random_case(cell, time=12, resets=0.3)
    before = [x.clone() for x in (*case.inputs, *case.params, *case.state)]
    outcome(case, by("sequential"))
    outcome(case, by("newton"))
    for x, y in zip((*case.inputs, *case.params, *case.state), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_inside_activation_checkpointing(cell):
    case = random_case(cell, time=9)
    inputs = tuple(x.requires_grad_() for x in case.inputs)

    def run(*tensors):
        return solve(cell, tensors, case.params, case.state, case.reset).states[0]

    plain = torch.autograd.grad(run(*inputs).sum(), inputs, allow_unused=True)
    again = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(again.sum(), inputs, allow_unused=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_same_call_gives_the_same_bits(cell):
    case = random_case(cell, batch=3, time=70, channel=50).to(torch.float32)
    first, second = outcome(case, by("auto")), outcome(case, by("auto"))
    for name, value in (first.values | first.grads).items():
        assert torch.equal(value, (second.values | second.grads)[name]), name


def test_auto_takes_newton_where_it_is_faster_and_never_fails_to_converge():
    case = random_case(ParaGRU(), batch=1, time=1024, channel=4, weights=0.5)
    result = solve(case.cell, case.inputs, case.params)
    assert result.info.method == "newton"
    assert solve(case.cell, case.inputs, case.params, max_iter=1).info.method == "sequential"
    assert solve(case.cell, tuple(x[:, :16] for x in case.inputs), case.params).info.method == "sequential"


def given(cell=None, **changes):
    """Arguments of a small ParaGRU solve, some replaced."""
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "cell": cell or ParaGRU(),
        "inputs": tuple(torch.randn((2, 5, 3), generator=generator) for _ in range(3)),
        "params": tuple(torch.randn(3, generator=generator) for _ in range(3)),
        "state": (torch.randn((2, 3), generator=generator),),
    }
    return {**arguments, **changes}


def replaced(name, index, value):
    values = list(given()[name])
    values[index] = value
    return {name: tuple(values)}


WRONG = [
    ({"inputs": torch.rand(2, 5, 3)}, "inputs must be a tuple of tensors (x_z, x_r, x_h), got Tensor"),
    ({"inputs": (torch.rand(2, 5, 3),) * 2}, "inputs: cell 'paragru' takes 3 (x_z, x_r, x_h), got 2"),
    ({"params": ()}, "params: cell 'paragru' takes 3 (a_z, a_r, a_h), got 0"),
    ({"state": (torch.rand(2, 3),) * 2}, "state: cell 'paragru' takes 1 (h), got 2"),
    (replaced("inputs", 1, None), "inputs['x_r'] must be a tensor, got NoneType"),
    (replaced("inputs", 0, torch.rand(5, 3)), "inputs['x_z'] is (5, 3), expected (batch, time, channel)"),
    (replaced("inputs", 0, torch.rand(2, 0, 3)), "inputs['x_z'] is (2, 0, 3)"),
    (replaced("inputs", 2, torch.rand(2, 6, 3)), "inputs['x_h'] is (2, 6, 3), expected (2, 5, 3) as inputs['x_z']"),
    (replaced("inputs", 1, torch.rand(2, 5, 3).bfloat16()), "inputs['x_r'] is torch.bfloat16 but inputs['x_z'] is"),
    (replaced("inputs", 1, torch.ones(2, 5, 3).long()), "inputs['x_r'] is torch.int64; expected one of torch.float16"),
    (
        replaced("params", 1, torch.rand(4)),
        "params['a_r'] is (4,), expected (3,) (channel,) as inputs['x_z'] (2, 5, 3)",
    ),
    (replaced("state", 0, torch.rand(3, 3)), "state['h'] is (3, 3), expected (2, 3) (batch, channel)"),
    (replaced("state", 0, torch.rand(2, 3).double()), "state are torch.float64 but inputs are torch.float32"),
    ({"params": tuple(torch.rand(3).double() for _ in range(3))}, "params are torch.float64 but inputs are"),
    (replaced("params", 2, torch.rand(3, device="meta")), "params['a_h'] is on meta but inputs['x_z'] is on cpu"),
    ({"reset": torch.zeros(2, 5)}, "reset must be a bool tensor (batch, time), got torch.float32"),
    ({"reset": [[False] * 5] * 2}, "reset must be a bool tensor (batch, time), got list"),
    ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, "reset is (2, 4), expected (2, 5)"),
    ({"method": "newtn"}, "method is 'newtn'; expected one of auto, sequential, newton"),
    ({"on_failure": "ignore"}, "on_failure is 'ignore'; expected 'raise' or 'sequential'"),
    ({"max_iter": 0}, "max_iter is 0; expected at least 1"),
    ({"tile": 0}, "tile is 0; expected at least 1"),
    ({"tile": 2.5}, "tile is 2.5; expected at least 1 (a whole number)"),
    ({"max_iter": "3"}, "max_iter is '3'; expected at least 1 (a whole number)"),
    ({"tol": "1e-3"}, "tol is '1e-3'; expected a number above 0"),
    ({"tol": 0.0}, "tol is 0.0; expected a number above 0"),
    ({"tol": float("nan")}, "tol is nan; expected a number above 0"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_bad_arguments_are_one_line_that_names_them(changes, says):
    with pytest.raises(ArgumentError) as caught:
        solve(**given(**changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_in_place_of_a_cell_is_named():
    with pytest.raises(CellError, match="expected a Cell instance, got type"):
        solve(**given(cell=ParaGRU))


@pytest.mark.parametrize(
    ("name", "position", "says"),
    [
        ("inputs", (1, 3, 2), "inputs['x_z'] is nan at (batch 1, time 3, channel 2)"),
        ("params", (1,), "params['a_z'] is nan at (channel 1)"),
        ("state", (0, 2), "state['h'] is nan at (batch 0, channel 2)"),
    ],
)
def test_the_first_position_that_is_not_finite_is_reported_when_asked(name, position, says):
    arguments = given()
    arguments[name][0][position] = float("nan")
    with pytest.raises(ArgumentError) as caught:
        solve(**arguments, check_finite=True)
    assert says in str(caught.value)
    solve(**arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": (torch.rand(2, 5, 3),) * 3}, "inputs['x_f'] is (2, 5, 3), expected (batch, channel)"),
        (
            {"inputs": (torch.rand(2, 3), torch.rand(2, 4), torch.rand(2, 3))},
            "inputs['x_c'] is (2, 4), expected (2, 3)",
        ),
        ({"state": (torch.rand(2, 3),)}, "state: cell 'paralstm' takes 2 (c, h), got 1"),
        ({"state": (torch.rand(2, 3), torch.rand(1, 3))}, "state['h'] is (1, 3), expected (2, 3)"),
        ({"params": (torch.rand(2),) * 5}, "params['a_f'] is (2,), expected (3,)"),
    ],
)
def test_the_decode_step_checks_its_arguments_too(changes, says):
    arguments = {
        "state": (torch.rand(2, 3),) * 2,
        "inputs": (torch.rand(2, 3),) * 3,
        "params": (torch.rand(3),) * 5,
    }
    with pytest.raises(ArgumentError) as caught:
        step(ParaLSTM(), **{**arguments, **changes})
    assert says in str(caught.value)


def test_the_readme_cell_needs_no_further_code():
    class TanhRNN(Cell):
        name = "tanh_rnn"
        state = ("h",)
        inputs = ("x",)
        params = ("a",)

        def step(self, state, inputs, params):
            return (torch.tanh(params[0] * state[0] + inputs[0]),)

    case = random_case(TanhRNN(), time=40, weights=4.0)
    expected = outcome(case, reference)
    for method in METHODS:
        assert_same(outcome(case, by(method)), expected)
