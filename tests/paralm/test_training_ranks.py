"""The same global batch on any number of ranks: equal losses, and checkpoints that any grid continues from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import settings

_DRIVER = """
import json, sys
from paralm.config import Config
from paralm.errors import StoppedError
from paralm.training.loop import train
for text in open(sys.argv[1]):
    try:
        train(Config.model_validate(json.loads(text)), say=lambda line: None)
    except StoppedError:
        pass
"""


def run_ranks(world_size: int, configs: list[dict[str, Any]], folder: Path) -> None:
    """Train the configurations one after the other on ``world_size`` gloo ranks: one spawn for all."""
    driver, cases = folder / "driver.py", folder / f"cases_{world_size}.jsonl"
    driver.write_text(_DRIVER)
    cases.write_text("".join(json.dumps(config) + "\n" for config in configs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(driver), str(cases)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_losses_do_not_depend_on_the_ranks_and_any_grid_continues_any_other(
    corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    """Batch 5 divides by neither 2 nor 3; lanes carry their states; a run moves over grids 1 → 3 → 2."""

    def config(name: str, stage: int = 1, **training: Any) -> dict[str, Any]:
        lanes = {"order": "lanes"} if "lanes" in name else {}
        training = {"max_steps": 6, "global_batch_size": 5, "carry_state": bool(lanes), **training}
        made = settings(corpus, prepared, tmp_path, data=lanes, training=training, parallel={"zero_stage": stage})
        made["run"]["name"] = name
        made["checkpoint"] = {"every": 1}
        return made

    def stop(name: str) -> dict[str, Any]:
        return config(name, stop_after_seconds=1e-9)  # one step, then saved

    run_ranks(1, [config("w1_lanes"), config("w1"), stop("moving_lanes"), stop("moving_lanes")], tmp_path)
    run_ranks(3, [config("w3_lanes", stage=2), config("w3"), stop("moving_lanes"), stop("moving_lanes")], tmp_path)
    run_ranks(2, [config("w2_lanes"), config("w2", stage=2), config("moving_lanes")], tmp_path)
    for kind, names in (("", ("w2", "w3")), ("_lanes", ("w2_lanes", "w3_lanes", "moving_lanes"))):
        reference = losses(tmp_path / f"w1{kind}")
        assert len(reference) == 7  # six steps and a validation
        for name in names:
            # fp32: the sums over ranks are in another order, and six updates amplify it
            assert losses(tmp_path / name) == pytest.approx(reference, rel=1e-5), name
