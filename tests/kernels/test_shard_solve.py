"""A cell's recurrence over time shards equals the loop over time, for every registered cell; ranks are threads here
(tests/paralm/test_time_shards.py has processes)."""

from __future__ import annotations

import pytest
from paralm_kernels import Cell, time_shards_solve
from paralm_kernels.laws import deviation, outcome, random_case, reference

from .shard_threads import solve_on_shards


@pytest.mark.parametrize("method", ["sequential", "newton"])
@pytest.mark.parametrize("weights", [0.3, 1.5])
def test_parts_are_the_whole(cell: Cell, method: str, weights: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts whose ends are guessed first, and shorter ones."""
    monkeypatch.setattr(time_shards_solve, "_FIRST", 16)
    for seed, cuts in enumerate(([40, 3, 61], [1, 17, 16, 30], [64])):
        case = random_case(cell, batch=2, time=sum(cuts), channel=3, weights=weights, resets=0.02, seed=seed)
        got, every = solve_on_shards(case, cuts, method)
        worst, where = deviation(got, outcome(case, reference), 1e-9)
        assert worst <= 1, (cuts, where, worst)
        assert all(2 <= info.iterations <= len(cuts) + 1 for info in every), "a guess, then at most a round a rank"


def test_a_cell_that_forgets_needs_one_round_and_few_steps_again(cell: Cell) -> None:
    """Weights near zero: what was guessed from the last steps is right."""
    case = random_case(cell, batch=1, time=3000, channel=2, weights=0.0, resets=0.01, seed=1)
    _, every = solve_on_shards(case, [1000, 1000, 1000], "sequential")
    for info in every:
        assert info.iterations == 2
        assert info.rewalked <= 2 * time_shards_solve._FIRST / 1000, "the guess, and a first look at whether it met"
