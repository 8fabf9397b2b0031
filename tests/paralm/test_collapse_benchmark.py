"""What the benchmark of collapse sets beside one another: runs trained on, and the control, on the same streams."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from paralm.evaluation.collapse_result import CollapseResult, build_result
from tests.paralm.test_collapse import EDGES, T, cells_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import collapse as benchmark
finally:
    sys.path.remove(str(BENCHMARKS))


def result(rise: float, noise: float = 0.0) -> CollapseResult:
    """Of a model whose loss rises past twice the training length; ``noise``: of each stream's rise."""
    cells = cells_of(rise, 1.0)
    draws = np.random.default_rng(5).normal(0, noise, len(cells["natural"]["nats"]))
    past = np.where(np.asarray(EDGES[1:]) > 2 * T, 1, 0)
    nats = np.asarray(cells["natural"]["nats"]) + draws[:, None] * past * np.asarray(cells["natural"]["tokens"])
    return build_result({**cells, "natural": {**cells["natural"], "nats": nats.tolist()}}, EDGES, T, "held_out")


def test_the_difference_from_the_control_is_of_the_same_streams() -> None:
    """What the text is like, and what a stream's rise has in both, cancels."""
    found = benchmark.against(result(0.2), result(0.5))
    assert found["rise_at_the_end"] == pytest.approx(-0.3)
    assert found["rise_at_the_end_interval"] == pytest.approx((-0.3, -0.3))
    assert found["loss_past"] == pytest.approx(-0.3)
    spread = benchmark.against(result(0.2, noise=0.1), result(0.5))
    low, high = spread["rise_at_the_end_interval"]
    assert low < spread["rise_at_the_end"] < high
    assert 0.02 < high - low < 0.3  # about 4 standard errors of 0.1 / √8


def test_the_rises_mean_is_the_verdicts() -> None:
    found = result(0.2, noise=0.1)
    rises = benchmark.end_rises(found, found.plain)
    assert rises.shape == (8,)
    assert rises.mean() == pytest.approx(found.plain.verdict.rise[-1])


def test_other_streams_are_refused() -> None:
    with pytest.raises(SystemExit, match="read on other streams"):
        benchmark.against(result(0.2), result(0.5).model_copy(update={"set": "train"}))


def test_the_control_was_trained_and_read_as_the_others() -> None:
    """In the committed result."""
    content = json.loads(benchmark.RESULT.read_text())
    base, *further = content["runs"]
    control = base + benchmark.CONTROL
    assert control in further
    for key in ("steps", "tokens", "train_seq_len", "edges", "streams"):
        assert len({str(content["runs"][name][key]) for name in further}) == 1, key
    assert (content["runs"][control]["carry_state"], content["runs"][control]["initial_state"]) == (False, "zero")
    assert content["against_plain"].keys() == set(further) - {control}
