"""What a plan says a rank holds is what a process holds: peaks of real training steps, within 15 %."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paralm.config import Config
from paralm.models import build_model
from paralm.planning.memory import Memory, gradient_bytes, memory, optimizer_costs, sizes_of
from paralm.planning.trace import trace

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 1024
MIXERS = {
    "paragru": {"name": "paragru"},
    "mamba2": {"name": "mamba2", "d_state": 32, "head_dim": 32, "chunk_size": 64},
    "attention": {"name": "attention"},
}


def configuration(mixer: str, ranks: int, stage: int = 1, **training: Any) -> Config:
    rows = training.pop("micro_batch_size", 3)
    shape = {"seq_len": 256, "micro_batch_size": rows, "global_batch_size": rows * ranks, **training}
    return Config.model_validate(
        {
            "model": {"d_model": 160, "n_layers": 5, "mixer": MIXERS[mixer]},
            "training": shape,
            "parallel": {"zero_stage": stage},
        }
    )


def planned(config: Config, ranks: int) -> Memory:
    model = build_model(config.model, VOCABULARY, 0, "meta")
    traced = trace(config, VOCABULARY, "cpu", gradient_bytes(config, "cpu"))
    costs = optimizer_costs(config, model, ranks, "cpu")
    return memory(config, traced, sizes_of(model), costs, ranks, "cpu")


def measured(config: Config, ranks: int) -> list[dict[str, int]]:
    """Of every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.paralm.planning_worker", config.model_dump_json(), str(VOCABULARY), "2"]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    for worker in workers:
        out, error = worker.communicate(timeout=240)
        assert worker.returncode == 0, error[-2000:]
        found.append(json.loads(out.strip().splitlines()[-1]))
    return found


CASES = [
    ("paragru", 1, 1, {}),
    ("paragru", 1, 1, {"activation_checkpointing": True}),
    ("paragru", 1, 1, {"activation_checkpointing": 3}),
    ("mamba2", 1, 1, {}),
    ("attention", 1, 1, {}),
    ("attention", 1, 1, {"activation_checkpointing": True}),
    ("paragru", 1, 1, {"precision": "bf16"}),
    ("paragru", 2, 1, {}),
    ("mamba2", 2, 2, {}),
    ("paragru", 1, 3, {}),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize(
    ("mixer", "ranks", "stage", "training"),
    CASES,
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_the_peak_of_training_is_the_planned_one(mixer: str, ranks: int, stage: int, training: dict[str, Any]) -> None:
    config = configuration(mixer, ranks, stage, **training)
    plan = planned(config, ranks).peak.total
    for found in (rank["bytes"] for rank in measured(config, ranks)):
        assert plan == pytest.approx(found, rel=0.15), f"planned {plan / 1e6:.1f} MB, measured {found / 1e6:.1f} MB"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (1, 2), (3, 1)])
def test_the_host_holds_what_is_planned_of_an_offloaded_optimizer(stage: int, ranks: int) -> None:
    config = configuration("paragru", ranks, stage, precision="bf16")
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"offload_optimizer": "cpu"})})
    plan = planned(config, ranks).host
    for found in (rank["host"] for rank in measured(config, ranks)):
        assert plan == pytest.approx(found, rel=0.06), f"planned {plan / 1e6:.1f} MB, measured {found / 1e6:.1f} MB"
