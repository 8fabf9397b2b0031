"""Each ZeRO stage by itself, in one process: bad steps, offloading, what is refused, and never a whole model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from paralm.config import Config
from paralm.errors import ConfigError, StoppedError
from paralm.models import LanguageModel
from paralm.registry import MIXERS
from paralm.training.engine import deepspeed_config
from paralm.training.load import load_model
from paralm.training.loop import train
from paralm.training.metrics import read_metrics
from tests.conftest import settings


@pytest.fixture
def make(corpus: Path, prepared: Path, tmp_path: Path) -> Any:
    def make(name: str, parallel: dict[str, Any], **sections: Any) -> Config:
        if parallel.get("zero_stage") == 3:
            parallel = {**parallel, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
        base = settings(corpus, prepared, tmp_path, parallel=parallel, **sections)
        base["run"]["name"] = name
        return Config.model_validate(base)

    return make


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == "train"]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return dict(load_model(config.run_dir, dtype=torch.float32).model.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_nan_in_one_micro_batch_skips_the_update_and_nothing_else(
    make: Any, stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is skipped whole: the weights after steps 1 and 2, of which 2 is bad, are those after step 1."""
    training = {"precision": precision, "max_steps": 1}
    good = make("good", {"zero_stage": stage}, training=training, optimizer={"schedule": {"kind": "constant"}})
    train(good, say=print)
    original, calls = LanguageModel.forward, [0]

    def forward(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        calls[0] += self.training
        if self.training and calls[0] == 4:  # the second micro-batch of the second step
            output = output._replace(loss=output.loss + math.nan)
        return output

    monkeypatch.setattr(LanguageModel, "forward", forward)
    training["max_steps"] = 2
    bad = make("bad", {"zero_stage": stage}, training=training, optimizer={"schedule": {"kind": "constant"}})
    train(bad, say=print)
    rows = [row for row in read_metrics(bad.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["skipped"] for row in rows] == [False, True]
    before, after = weights(good), weights(bad)
    assert all(torch.equal(before[name], after[name]) for name in before)


NVME = pytest.mark.skipif(
    os.environ.get("PARALM_TEST_NVME") != "1",
    reason="DeepSpeed compiles async_io for minutes and needs libaio; PARALM_TEST_NVME=1 runs it",
)


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
        pytest.param({"zero_stage": 3, "offload_optimizer": "nvme"}, marks=NVME),
        pytest.param({"zero_stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"}, marks=NVME),
    ],
    ids=lambda parallel: "-".join(map(str, parallel.values())),
)
def test_offloading_changes_no_loss_and_resumes(make: Any, parallel: dict[str, Any], tmp_path: Path) -> None:
    if "nvme" in parallel.values():
        parallel = {**parallel, "nvme_path": str(tmp_path)}
    plain = make("plain", {"zero_stage": parallel["zero_stage"]}, training={"max_steps": 4})
    train(plain, say=print)
    with pytest.raises(StoppedError):
        train(make("away", parallel, training={"max_steps": 4, "stop_after_seconds": 1e-9}), say=print)
    away = make("away", parallel, training={"max_steps": 4})
    train(away, say=print)
    # the fused kernel on the host rounds the same update in another order
    assert losses(away) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("name", MIXERS.names())
def test_every_mixer_trains_the_same_when_its_weights_are_cut(make: Any, name: str) -> None:
    """Stage 3 gathers a module's parameters when the module runs: a mixer that reads them elsewhere would fail here."""
    found = []
    for stage in (1, 3):
        config = make(
            f"{name}_{stage}",
            {"zero_stage": stage},
            model={"mixer": {"name": name}},
            training={"max_steps": 2, "validate_tokens": 64, "activation_checkpointing": stage == 3},
        )
        train(config, say=print)
        found.append(losses(config))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_activation_checkpointing_changes_no_loss(make: Any, stage: int) -> None:
    """It runs each block again in the backward, with the same arithmetic: equal to the last bit, dropout included."""
    found = []
    for blocks in (False, 1, True):
        training = {"max_steps": 4, "activation_checkpointing": blocks}
        config = make(f"blocks_{blocks}", {"zero_stage": stage}, model={"dropout": 0.1}, training=training)
        train(config, say=print)
        found.append(losses(config))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_fused_update_resumes_to_the_last_bit(make: Any, stage: int) -> None:
    keys: dict[str, Any] = {"optimizer": {"fused": True}}
    whole = make("whole", {"zero_stage": stage}, training={"max_steps": 4}, **keys)
    train(whole, say=print)
    with pytest.raises(StoppedError):
        train(make("cut", {"zero_stage": stage}, training={"max_steps": 4, "stop_after_seconds": 1e-9}, **keys))
    cut = make("cut", {"zero_stage": stage}, training={"max_steps": 4}, **keys)
    train(cut, say=print)
    assert losses(cut) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_blocks_train_the_same_and_resume_to_the_last_bit(make: Any, stage: int) -> None:
    found = {}
    for name, more in (("plain", {}), ("whole", {"compile": True}), ("cut", {"compile": True})):
        shape = {"max_steps": 4, **more}
        if name == "cut":
            with pytest.raises(StoppedError):
                train(make(name, {"zero_stage": stage}, training={**shape, "stop_after_seconds": 1e-9}), say=print)
            torch._dynamo.reset()
        config = make(name, {"zero_stage": stage}, training=shape)
        train(config, say=print)
        found[name] = losses(config)
    assert found["whole"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["cut"] == found["whole"]


@pytest.mark.parametrize(("free", "blocks"), [(1 << 40, 0), (0, 2)])
def test_activation_checkpointing_by_the_plan(
    make: Any, monkeypatch: pytest.MonkeyPatch, free: int, blocks: int
) -> None:
    """`auto` is settled when the run starts, from the memory there is, and said."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    said: list[str] = []
    for name, setting in (("auto", "auto"), ("number", blocks)):
        train(make(name, {}, training={"max_steps": 2, "activation_checkpointing": setting}), say=said.append)
    assert losses(make("auto", {})) == losses(make("number", {}))
    assert [line for line in said if "activation_checkpointing" in line] == [
        f"training.activation_checkpointing: auto: {blocks} of 2 blocks run again in the backward"
    ]


def test_nvme_is_refused_in_one_line_where_it_cannot_work(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    parallel = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(tmp_path / "absent")}
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ConfigError, match="libaio"):
        train(make("a", parallel), say=print)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    with pytest.raises(ConfigError, match=r"parallel\.nvme_path: .*absent is no folder"):
        train(make("a", parallel), say=print)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer needs zero_stage"),
        ({"zero_stage": 2, "offload_optimizer": "nvme"}, "offload_optimizer: nvme needs zero_stage 3"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "offload_parameters needs zero_stage 3"),
        ({"zero_stage": 3, "offload_parameters": "nvme"}, "needs nvme_path"),
        ({"zero_stage": 4}, "less than or equal to 3"),
    ],
)
def test_impossible_combinations_are_refused_before_anything(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"parallel": parallel})


def test_the_generated_configuration_says_what_was_asked_for(tmp_path: Path) -> None:
    parallel = {"zero_stage": 3, "offload_parameters": "cpu", "overlap_comm": True, "bucket_size": 1 << 21}
    config = Config.model_validate({"parallel": parallel, "training": {"precision": "bf16"}})
    generated = deepspeed_config(config, 8, 10**9)
    zero = generated["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (3, True, 1 << 21)
    assert zero["offload_param"]["device"] == "cpu"
    assert generated["bf16"]["enabled"]
    assert generated["data_types"]["grad_accum_dtype"] == "fp32"


_PEAK = """
import json, os, sys
from paralm.config import Config
from paralm.training.engine import build_engine
from paralm.training.rendezvous import start_distributed
start_distributed(60.0)
config = Config.model_validate(json.loads(sys.argv[1]))
engine, _ = build_engine(config, 1000, int(sys.argv[2]))
held = sum(p.numel() for p in engine.module.parameters())
parts = sum(p.ds_tensor.numel() for p in engine.module.parameters())
whole = sum(p.ds_numel for p in engine.module.parameters())
os.write(1, (json.dumps([held, parts, whole]) + "\\n").encode())  # at once: the ranks share the pipe
"""


def test_at_stage_3_no_rank_has_the_model(tmp_path: Path) -> None:
    """After building, a rank of two holds no whole parameter, and half of the elements."""
    driver = tmp_path / "driver.py"
    driver.write_text(_PEAK)
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    config = json.dumps({"model": {"d_model": 64}, "parallel": {"zero_stage": 3, "deepspeed": raw}})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(driver)]
    done = subprocess.run(
        [*command, config, "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == 2
    for held, parts, whole in found:
        assert held == 0
        assert whole / 2 <= parts < whole / 2 * 1.01
