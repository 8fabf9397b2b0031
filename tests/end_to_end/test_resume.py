"""Resumed = uninterrupted, to the last bit: runs killed with SIGKILL, stopped by signals, forked, on other grids."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from paralm.training.metrics import read_metrics
from tests.conftest import settings

STEPS = 14


def losses(run: Path) -> dict[int, tuple[Any, ...]]:
    """Step → what must not depend on how the run got there."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert len({row["step"] for row in rows}) == len(rows), "a step is logged twice"
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in rows}


def start(config: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    path = folder / f"{config['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "paralm_launch", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected, output
    return output


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b'"kind": "train"') >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"ended before step {step}:\n{process.communicate()[0]}")


VARIANTS: dict[str, dict[str, Any]] = {
    # dropout, so that the generators' states matter
    "windows": {"model": {"dropout": 0.1}, "training": {"max_steps": STEPS}},
    # carried states, so that they matter too; bf16, where master weights differ from the weights
    "lanes": {
        "data": {"order": "lanes"},
        "training": {"max_steps": STEPS, "carry_state": True, "precision": "bf16"},
        "model": {"mixer": {"name": "paralstm", "n_heads": 2}},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_started_again_equals_uninterrupted(
    variant: str, corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    rng = random.Random(os.urandom(8))
    kills = sorted(rng.sample(range(1, STEPS), 2))
    print(f"kills at steps {kills}")

    def config(name: str) -> dict[str, Any]:
        made = settings(corpus, prepared, tmp_path, **VARIANTS[variant])
        made["run"]["name"] = name
        made["checkpoint"] = {"every": 3}
        return made

    whole = start(config("whole"), tmp_path)
    finish(whole)
    for kill in kills:
        broken = start(config("broken"), tmp_path)
        wait_for_step(broken, tmp_path / "broken", kill)
        broken.send_signal(signal.SIGKILL)
        broken.wait(timeout=60)
    finish(start(config("broken"), tmp_path))
    reference = losses(tmp_path / "whole")
    assert set(reference) == set(range(1, STEPS + 1))
    assert losses(tmp_path / "broken") == reference


@pytest.mark.slow
def test_a_signal_saves_and_leaves_and_the_same_command_continues(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    def config(name: str) -> dict[str, Any]:
        made = settings(corpus, prepared, tmp_path, training={"max_steps": 60}, checkpoint={"every": 1000})
        made["run"]["name"] = name
        return made

    finish(start(config("whole"), tmp_path))
    stopped = start(config("stopped"), tmp_path)
    wait_for_step(stopped, tmp_path / "stopped", 3)
    stopped.send_signal(signal.SIGTERM)
    output = finish(stopped, expected=75)
    assert "SIGTERM" in output
    assert "Traceback" not in output
    finish(start(config("stopped"), tmp_path))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
