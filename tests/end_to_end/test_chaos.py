"""A handful of random kills; ``make chaos`` does many, over every launcher and changing world sizes."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import settings
from tools import chaos


@pytest.mark.slow
def test_a_run_under_random_kills_is_the_run_that_nobody_touched(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    """Whatever is hit, in whatever moment: the same losses to the last bit, and no process is left."""
    made: dict[str, Any] = settings(
        corpus, prepared, tmp_path / "runs", model={"dropout": 0.1}, training={"max_steps": 40}, checkpoint={"every": 4}
    )
    path = tmp_path / "chaos.yaml"
    path.write_text(yaml.safe_dump(made))
    (tmp_path / "runs").mkdir()
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    outcome = chaos.campaign(path, tmp_path / "runs", seed=seed, kills=4, each=0, quotas={"torchrun": 0}, elastic=False)
    print(chaos.table(outcome))
    assert outcome.problems == []
    assert len(outcome.kills) >= 4
    assert outcome.runs
    assert all(run["equal"] and run["exact"] for run in outcome.runs)


def test_the_comparison_sees_a_changed_bit_and_a_missing_step(tmp_path: Path) -> None:
    reference = {1: (2.5, 0.5, 1e-3), 2: (2.25, 0.5, 1e-3)}
    row = '{"kind": "train", "step": %d, "loss": %r, "grad_norm": 0.5, "lr": 0.001}\n'
    for name, rows, exact, equal in (
        ("same", [(1, 2.5), (2, 2.25)], True, True),
        ("bit", [(1, 2.5), (2, 2.2500000000000004)], True, False),
        ("close", [(1, 2.5), (2, 2.2500000000000004)], False, True),
        ("far", [(1, 2.5), (2, 2.2501)], False, False),
        ("short", [(1, 2.5)], True, False),
        ("twice", [(1, 2.5), (2, 2.25), (2, 2.25)], True, False),
    ):
        outcome = chaos.Outcome(0)
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(row % pair for pair in rows))
        chaos.compare(tmp_path / name, reference, exact, outcome)
        assert (outcome.problems == []) is equal, name
