"""The public laws hold for every cell here, and say so when a cell breaks one."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import Cell, CellError, ParaGRU
from paralm_kernels.laws import amplification, check_cell, deviation, kernels_run, outcome, random_case, reference


@pytest.mark.parametrize("weights", [1.0, 4.0])
def test_every_cell_obeys_every_law(cell, weights):
    results = check_cell(cell, weights=weights)
    assert len(results) == 10 + kernels_run()
    for result in results:
        assert result.ok, result
        assert 0 <= result.worst <= 1


def test_a_step_that_cannot_be_derived_is_the_only_result():
    class Mixing(Cell):
        name = "mixing"
        state = ("h",)
        inputs = ("x",)

        def step(self, state, inputs, params):
            return (state[0] - state[0].mean(-1, keepdim=True) + inputs[0],)

    (result,) = check_cell(Mixing())
    assert not result.ok
    assert "aten.mean is not elementwise" in result.detail


def test_kernels_that_cannot_be_generated_are_found(monkeypatch):
    def refuse(cell):
        raise CellError(f"cell {cell.name!r}: erf has no form in Triton")

    monkeypatch.setattr("paralm_kernels.laws.generate", refuse)
    (broken,) = (result for result in check_cell(ParaGRU()) if not result.ok)
    assert broken.name == "fused kernels are generated"
    assert "erf has no form" in broken.detail


def test_a_wrong_box_is_found():
    class Shrunk(ParaGRU):
        def box(self, state):
            return (0.01,)

    broken = {result.name for result in check_cell(Shrunk()) if not result.ok}
    assert "states stay in the box" in broken


@pytest.mark.parametrize(
    ("bound", "says"),
    [
        (
            lambda h: torch.ones(5),
            "box bounds h by a tensor of shape (5,), which does not broadcast to the state's (2, 3)",
        ),
        (lambda h: -h.abs(), "box bounds |h| by a negative number"),
    ],
)
def test_a_box_that_is_none_is_named(bound, says):
    class Boxed(ParaGRU):
        def box(self, state):
            return (bound(state[0]),)

    broken = {result.name: result.detail for result in check_cell(Boxed()) if not result.ok}
    assert says in broken["states stay in the box"]
    assert not any("must match the size" in detail for detail in broken.values())


def test_a_step_that_hides_a_dependence_from_autograd_is_told_so():
    class Hidden(ParaGRU):
        def step(self, state, inputs, params):
            with torch.no_grad():
                gate = torch.sigmoid(state[0])
            return (gate * torch.tanh(inputs[0]),)

    (broken,) = (result for result in check_cell(Hidden()) if not result.ok)
    assert broken.name == "gradients = finite differences"
    assert "is not the difference quotient: step must be differentiable, without detach, no_grad" in broken.detail


def test_a_step_that_depends_on_more_than_its_arguments_is_found():
    class Growing(Cell):
        name = "growing"
        state = ("h",)
        inputs = ("x",)
        calls = 0

        def step(self, state, inputs, params):
            Growing.calls += 1
            return (0.5 * state[0] + inputs[0] * Growing.calls,)

    broken = [result for result in check_cell(Growing()) if not result.ok]
    assert "sequential = the plain loop under autograd" in {result.name for result in broken}
    assert all(result.worst > 1 for result in broken)


def test_deviation_is_relative_and_sees_what_is_not_finite():
    case = random_case(ParaGRU(), time=4)
    expected = outcome(case, reference)
    got = outcome(case, reference)
    assert deviation(got, expected, 1e-10) == (0.0, "all equal")
    got.values["states[h]"][0, 0, 0] += 1e-9
    worst, where = deviation(got, expected, 1e-10)
    assert 5 < worst <= 10
    assert where == "states[h]"
    got.grads["params[a_r]"][0] = float("nan")
    assert deviation(got, expected, 1e-10) == (float("inf"), "gradient of params[a_r]")


def test_amplification_of_a_linear_cell_is_the_geometric_sum():
    class Linear(Cell):
        name = "linear"
        state = ("h",)
        inputs = ("x",)

        def step(self, state, inputs, params):
            return (0.5 * state[0] + inputs[0],)

    case = random_case(Linear(), batch=1, time=5, channel=1, resets=0.0)
    expected = torch.tensor([1, 1.5, 1.75, 1.875, 1.9375], dtype=torch.float64)
    torch.testing.assert_close(amplification(case)[0, :, 0], expected)


def test_a_step_may_return_a_parameter_as_it_is():
    class Pinned(Cell):
        name = "pinned"
        state = ("h", "c")
        inputs = ("x",)
        params = ("p",)

        def step(self, state, inputs, params):
            return state[1] + inputs[0], params[0]

    assert [result for result in check_cell(Pinned()) if not result.ok] == []
