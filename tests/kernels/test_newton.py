"""Newton: exact whatever the tile, bounded by its length, stopped by the update, and never silently wrong."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import Cell, NotConverged, ParaGRU, ParaLSTM, solve
from paralm_kernels.laws import by, deviation, outcome, random_case, reference


def largest_error(case, **options):
    got = outcome(case, by("newton", **options))
    return deviation(got, outcome(case, by("sequential")), 1e-10)


@pytest.mark.parametrize("tile", [1, 2, 3, 8, 32, 33, 500])
def test_any_tile_gives_the_states(cell, tile):
    """Tiles of one (the plain loop), that do not divide the length, and longer than it; float64, 1e-10."""
    case = random_case(cell, time=33, weights=4.0, resets=0.1)
    worst, where = largest_error(case, tile=tile)
    assert worst <= 1, where


@pytest.mark.parametrize("time", [1, 2, 5, 9])
def test_after_k_iterations_the_first_k_steps_are_exact(cell, time):
    """So a tile needs at most its length, and one more iteration to see that nothing changes."""
    case = random_case(cell, time=time, weights=4.0, resets=0.0)
    result = solve(cell, case.inputs, case.params, case.state, method="newton", max_iter=time + 1)
    assert 1 <= result.info.iterations <= time + 1
    assert result.info.last_update <= 1e-12
    assert result.info.method == "newton"


def test_too_few_iterations_raise_in_one_line_that_says_what_to_do(cell):
    case = random_case(cell, time=64, weights=4.0)
    with pytest.raises(NotConverged) as caught:
        solve(cell, case.inputs, case.params, case.state, method="newton", max_iter=1)
    text = str(caught.value)
    assert "\n" not in text
    assert f"cell {cell.name!r} did not converge within max_iter=1 iterations in steps 0..63" in text
    assert "raise max_iter, use a smaller tile, or pass on_failure='sequential'" in text


def test_three_iterations_are_not_enough_for_large_weights():
    """Where a fixed three iterations are wrong by orders of magnitude, three must be refused and the default right."""
    case = random_case(ParaGRU(), time=512, channel=32, weights=4.0, resets=0.0)
    with pytest.raises(NotConverged):
        solve(case.cell, case.inputs, case.params, method="newton", max_iter=3, tile=512)
    worst, where = largest_error(case, tile=512)
    assert worst <= 1, where


def test_falling_back_gives_the_sequential_states_bit_for_bit(cell):
    case = random_case(cell, time=64, weights=4.0)
    arguments = (cell, case.inputs, case.params, case.state, case.reset)
    fallen = solve(*arguments, method="newton", max_iter=1, on_failure="sequential")
    exact = solve(*arguments, method="sequential")
    assert fallen.info.method == "sequential"
    for a, b in zip(fallen.states, exact.states, strict=True):
        assert torch.equal(a, b)


def test_it_stops_on_the_update_not_on_the_residual():
    """Gates near 0.0025 over 4096 steps: a residual below the tolerance says little of the error, an update does.

    With 1e-3 a stop on the residual would leave 2e-6. The update that meets it is followed by one of about its square,
    1e-6, which is then the size of the error before the last step, and its square after it.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn((1, 4096, 4), generator=generator, dtype=torch.float64) for _ in range(3)]
    inputs[0] -= 6.0
    params = tuple(torch.rand(4, generator=generator, dtype=torch.float64) - 0.5 for _ in range(3))
    got = solve(ParaGRU(), inputs, params, method="newton", tile=4096, tol=1e-3)
    exact = solve(ParaGRU(), inputs, params, method="sequential")
    assert got.info.last_update <= 1e-3
    assert float((got.states[0] - exact.states[0]).abs().max()) < 1e-9


def test_float32_settles_to_the_last_bit(cell):
    """The δ-form ends with an update of exactly zero; the affine form would stop at eps times products of J."""
    case = random_case(cell, time=127, channel=4, weights=4.0).to(torch.float32)
    got = solve(cell, case.inputs, case.params, case.state, case.reset, method="newton", tol=1e-30)
    assert got.info.last_update == 0.0


def test_the_tolerance_is_relative_for_large_states():
    """An accumulator without bounds: absolute 1e-6 is below the spacing of float32 at 1e5 and would never be met."""

    class Accumulator(Cell):
        name = "accumulator"
        state = ("h",)
        inputs = ("x",)
        params = ("a",)

        def step(self, state, inputs, params):
            return (state[0] + torch.nn.functional.softplus(inputs[0] + params[0] * torch.tanh(state[0])),)

    inputs = (200 + torch.randn(1, 1000, 3),)
    params = (torch.rand(3),)
    got = solve(Accumulator(), inputs, params, method="newton", tile=250)
    exact = solve(Accumulator(), inputs, params, method="sequential")
    torch.testing.assert_close(got.states[0], exact.states[0], rtol=1e-6, atol=0)


def test_the_box_keeps_wild_iterates_away():
    """Clamping to the cell's invariant box saves iterations and changes nothing else."""

    class Unboxed(ParaLSTM):
        def box(self, state):
            return None

    case = random_case(ParaLSTM(), time=256, channel=16, weights=4.0, resets=0.0, seed=3)
    arguments = (case.inputs, case.params, case.state)
    boxed = solve(ParaLSTM(), *arguments, method="newton", tile=256)
    free = solve(Unboxed(), *arguments, method="newton", tile=256)
    assert boxed.info.iterations < free.info.iterations
    for a, b in zip(boxed.states, free.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("large", [1.0, 50.0])
def test_initial_states_outside_the_unit_box(cell, large):
    case = random_case(cell, time=40, weights=2.0, resets=0.05)
    state = tuple(large * s for s in case.state)
    got = solve(cell, case.inputs, case.params, state, case.reset, method="newton")
    exact = solve(cell, case.inputs, case.params, state, case.reset, method="sequential")
    for a, b in zip(got.states, exact.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def exponential_gates(sweeps):
    """An sLSTM without its stabiliser: exponential input gate, normaliser, output their ratio."""

    class ExponentialGates(Cell):
        name = "exponential_gates"
        state = ("c", "n", "h")
        inputs = ("x_i", "x_f", "x_z")
        params = ("r_i", "r_f", "r_z")
        picard = sweeps

        def step(self, state, inputs, params):
            (c, n, h), (x_i, x_f, x_z), (r_i, r_f, r_z) = state, inputs, params
            i = torch.exp(x_i + r_i * h)
            f = torch.sigmoid(x_f + r_f * h)
            c, n = f * c + i * torch.tanh(x_z + r_z * h), f * n + i
            return c, n, c / (n + 1.0)

    return ExponentialGates()


@pytest.mark.parametrize("sweeps", [0, 3])
def test_picard_sweeps_before_newton_change_the_way_not_the_solution(sweeps):
    case = random_case(exponential_gates(sweeps), time=300, channel=4, weights=1.0)
    worst, where = largest_error(case, tile=100)
    assert worst <= 1, where
    worst, where = deviation(outcome(case, by("newton")), outcome(case, reference), 1e-10)
    assert worst <= 1, where


def test_an_iterate_that_overflows_starts_again_from_the_guess():
    """Steps that square the state: the linearised solve overflows long before the true states do."""

    class Squares(Cell):
        name = "squares"
        state = ("h",)
        inputs = ("x",)

        def step(self, state, inputs, params):
            return (30.0 * torch.sin(5.0 * state[0]) * state[0] / (1 + 0.2 * state[0] * state[0]) + inputs[0],)

    case = random_case(Squares(), time=64, resets=0.0)
    got = solve(case.cell, case.inputs, case.params, case.state, method="newton")
    exact = solve(case.cell, case.inputs, case.params, case.state, method="sequential")
    torch.testing.assert_close(got.states[0], exact.states[0], rtol=1e-10, atol=1e-10)


def test_states_that_are_not_finite_are_not_called_converged():
    case = random_case(ParaGRU(), time=20)
    case.inputs[2][0, 7] = float("nan")
    with pytest.raises(NotConverged, match="largest update nan"):
        solve(case.cell, case.inputs, case.params, method="newton")
