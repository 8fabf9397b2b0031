"""The same global batch on any number of ranks and any ZeRO stage: equal losses, and checkpoints that any continues."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paralm.training.optimizers import OPTIMIZERS
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

# Rounding alone: fp32 sums over ranks are in another order, and the updates amplify it.
SAME = 1e-5


def run_ranks(world_size: int, configs: list[dict[str, Any]], folder: Path) -> None:
    """Train the configurations one after the other on ``world_size`` gloo ranks: one torchrun for all."""
    driver, cases = folder / "driver.py", folder / f"cases_{world_size}.jsonl"
    driver.write_text(_DRIVER)
    cases.write_text("".join(json.dumps(config) + "\n" for config in configs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(driver), str(cases)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


class Grid:
    """Makes configurations of one small model; batch 5 divides by neither 2, 3 nor 4."""

    def __init__(self, corpus: Path, prepared: Path, folder: Path) -> None:
        self.corpus, self.prepared, self.folder = corpus, prepared, folder

    def config(
        self, name: str, stage: int, optimizer: str = "adamw", lanes: bool = False, noise: float = 0.0, **training: Any
    ) -> Any:
        made = settings(
            self.corpus,
            self.prepared,
            self.folder,
            data={"order": "lanes"} if lanes else {},
            training={"max_steps": 4, "global_batch_size": 5, "carry_state": lanes, **training},
            optimizer={"name": optimizer, "gradient_noise": {"eta": noise}},
            # By default nothing under 100,000 elements is partitioned, and a small model would prove nothing.
            parallel={
                "zero_stage": stage,
                "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {},
            },
            checkpoint={"every": 100},
        )
        made["run"]["name"] = name
        return made

    def stop(self, name: str, stage: int, **more: Any) -> Any:
        """One step, then saved."""
        return self.config(name, stage, stop_after_seconds=1e-9, **more)


@pytest.mark.slow
def test_losses_depend_neither_on_the_ranks_nor_on_the_stage(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    grid = Grid(corpus, prepared, tmp_path)
    cases = list(itertools.product(OPTIMIZERS, (3, 1, 2)))
    for world in (1, 2, 3, 4):
        configs = [grid.config(f"{name}_w{world}_z{stage}", stage, name) for name, stage in cases]
        if world in (1, 3):
            configs.append(grid.config(f"adamw_w{world}_z0", 0))
            configs.append(grid.config(f"noisy_w{world}", world, "muon", noise=0.01))
            configs.append(grid.config(f"lanes_w{world}", world, lanes=True))
        run_ranks(world, configs, tmp_path)
    for kind, count in {**dict.fromkeys(OPTIMIZERS, 12), "adamw": 14, "noisy": 2, "lanes": 2}.items():
        runs = sorted(path for path in tmp_path.glob(f"{kind}_w*") if path.is_dir())
        assert len(runs) == count
        reference = losses(runs[0])
        assert len(reference) == 5  # four steps and a validation
        for run in runs[1:]:
            assert losses(run) == pytest.approx(reference, rel=SAME), run.name
    kinds = [losses(tmp_path / name)[3] for name in ("adamw_w1_z1", "muon_w1_z1", "noisy_w1", "lanes_w1")]
    assert len(set(kinds)) == 4  # the noise is there, and so is everything else that was asked for


@pytest.mark.slow
def test_what_rows_start_from_depends_neither_on_the_ranks_nor_on_a_move(
    corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    """Passed states and fitted noise on one rank, on three, and moved from one to three in between."""
    grid = Grid(corpus, prepared, tmp_path)
    kinds = ("passed", "noise")
    first = [grid.stop(f"{kind}_moved", 1, initial_state=kind) for kind in kinds]
    run_ranks(1, [*first, *(grid.config(f"{kind}_one", 1, initial_state=kind) for kind in kinds)], tmp_path)
    names = [f"{kind}_{how}" for kind in kinds for how in ("three", "moved")]
    run_ranks(3, [grid.config(name, 1, initial_state=name.partition("_")[0]) for name in names], tmp_path)
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"{name.partition('_')[0]}_one"), rel=SAME)
    assert losses(tmp_path / "passed_one")[3] != losses(tmp_path / "noise_one")[3]


@pytest.mark.slow
def test_a_run_moves_over_world_sizes_and_stages(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    """4 → 2 → 1 → 3 ranks, each at another stage; three or more parameter groups; Adam's and Muon's states."""
    grid = Grid(corpus, prepared, tmp_path)
    kinds: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in OPTIMIZERS} | {"lanes": {"lanes": True}}
    order = {"adamw": (3, 1, 0, 2), "muon": (1, 3, 2, 3), "lanes": (2, 0, 3, 1)}
    stages = {kind: order.get(kind, (1, 3, 0, 2)) for kind in kinds}
    run_ranks(1, [grid.config(f"{kind}_still", 1, **more) for kind, more in kinds.items()], tmp_path)
    for leg, world in enumerate((4, 2, 1)):
        run_ranks(world, [grid.stop(kind, stages[kind][leg], **more) for kind, more in kinds.items()], tmp_path)
    run_ranks(3, [grid.config(kind, stages[kind][3], **more) for kind, more in kinds.items()], tmp_path)
    for kind in kinds:
        attempts = sorted((tmp_path / kind / "attempts").glob("*.json"))
        assert len(attempts) == 4
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / f"{kind}_still"), rel=SAME), kind
