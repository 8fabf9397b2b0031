"""Training as a whole, in process: what is recorded, what is skipped, what continues, what is refused."""

from __future__ import annotations

import errno
import math
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paralm_launch.pipeline import check_start

from paralm.config import Config
from paralm.errors import CheckpointError, ConfigError, DivergedError, RunError, StoppedError
from paralm.export import export
from paralm.models import LanguageModel
from paralm.training import checkpoint as ckpt
from paralm.training import loop
from paralm.training.load import load_model
from paralm.training.loop import Profiler, train
from paralm.training.metrics import MetricsWriter, read_metrics
from paralm.training.optimizers import OPTIMIZERS
from paralm.training.run_folder import RunFolder
from paralm.training.session import Session
from paralm.training.together import broadcast
from tests.conftest import quiet


def rows(config: Config, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == kind]


def test_a_run_learns_and_its_folder_holds_what_it_should(make: Any) -> None:
    config = make("a", training={"max_steps": 30, "validate_every": 10}, optimizer={"lr": 1e-2})
    seen: list[dict[str, Any]] = []
    result = train(config, seen.append, quiet)
    assert result.step == 30
    train_rows = rows(config)
    assert [row["step"] for row in train_rows] == list(range(1, 31))
    assert train_rows[-1]["loss"] < train_rows[0]["loss"] - 0.3
    # An untrained model knows nothing: logits of variance 1 cost half a nat more than equal ones.
    assert abs(train_rows[0]["loss"] - math.log(320)) < 1
    for key in ("tokens_per_s", "grad_norm", "lr", "memory_bytes", "time_data", "time_forward_backward", "time_step"):
        assert train_rows[-1][key] >= 0
    assert train_rows[-1]["tokens"] == 30 * 4 * 32
    assert any("iterations" in key for key in train_rows[-1]["newton"])
    validation = rows(config, "validation")
    assert [(row["step"], row["set"]) for row in validation] == [(10, "held_out"), (20, "held_out"), (30, "held_out")]
    assert validation[-1]["bits_per_byte"] < validation[0]["bits_per_byte"]
    assert len([row for row in seen if row["kind"] == "train"]) == 30
    assert ckpt.steps(config.run_dir / "checkpoints") == [25, 30]
    for name in ("config.yaml", "environment.json", "tensorboard", "attempts/000001.json"):
        assert (config.run_dir / name).exists()


def test_stopped_and_continued_equals_uninterrupted_with_dropout(make: Any) -> None:
    whole = make("whole", model={"dropout": 0.2})
    train(whole, say=quiet)
    for limit in (1e-9, 1e-9, None):  # a spent allowance stops the run after one more step
        part = make("part", model={"dropout": 0.2}, training={"stop_after_seconds": limit})
        if limit is None:
            train(part, say=quiet)
        else:
            with pytest.raises(StoppedError, match="the same command continues"):
                train(part, say=quiet)
    assert [row["loss"] for row in rows(part)] == [row["loss"] for row in rows(whole)]
    assert [row["grad_norm"] for row in rows(part)] == [row["grad_norm"] for row in rows(whole)]


@pytest.mark.parametrize(("dropout", "micro", "says"), [(0.2, 4, True), (0.0, 4, False), (0.2, 2, False)])
def test_a_run_that_goes_on_with_other_draws_says_so(make: Any, dropout: float, micro: int, says: bool) -> None:
    whole = make("whole", model={"dropout": dropout}, training={"max_steps": 2})
    train(whole, say=quiet)
    section = {"model": {"dropout": dropout}, "training": {"max_steps": 2, "stop_after_seconds": 1e-9}}
    with pytest.raises(StoppedError):
        train(make("part", **section), say=quiet)
    section["training"] = {"max_steps": 2, "micro_batch_size": micro}
    said: list[str] = []
    train(part := make("part", **section), say=said.append)
    exact = [row["loss"] for row in rows(part)] == pytest.approx([row["loss"] for row in rows(whole)], rel=1e-6)
    assert exact != says
    assert any("training.micro_batch_size 2 before, 4 now: model.dropout draws other" in line for line in said) == says


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_deterministic_runs_are_equal_to_the_last_bit(make: Any, optimizer: str) -> None:
    found = []
    for name in ("one", "two"):
        config = make(name, run={"deterministic": True}, model={"dropout": 0.1}, optimizer={"name": optimizer})
        try:
            train(config, say=quiet)
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
        found.append([(row["loss"], row.get("grad_norm")) for row in read_metrics(config.run_dir / "metrics.jsonl")])
    assert found[0] == found[1]
    assert len(found[0]) == 13


def test_metrics_that_cannot_be_written_are_said_once_and_end_nothing(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MetricsWriter.write

    def write(self: MetricsWriter, row: dict[str, Any]) -> None:
        if row["step"] in (3, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, row)

    monkeypatch.setattr(MetricsWriter, "write", write)
    said: list[str] = []
    config = make("a", training={"max_steps": 6})
    assert train(config, say=said.append).step == 6
    assert [row["step"] for row in rows(config)] == [1, 2, 5, 6]
    assert [line for line in said if "metrics.jsonl" in line and "No space left" in line] == said


def test_tensorboard_that_cannot_be_finished_hides_no_result(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: MetricsWriter) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsWriter, "close", close)
    said: list[str] = []
    assert train(make("a", training={"max_steps": 2}), say=said.append).step == 2
    assert [line for line in said if "No space left" in line] == said
    assert len(said) == 1


def test_a_finished_run_has_nothing_left_to_do(make: Any) -> None:
    config = make("a", training={"max_steps": 3})
    train(config, say=quiet)
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    assert train(config, say=quiet).loss is None
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before


def poison(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Make the loss of the given forward calls in training NaN, but not its gradient: only the loss tells."""
    original, calls = LanguageModel.forward, [0]

    def forward(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self.training:
            calls[0] += 1
            if calls[0] in bad:
                output = output._replace(loss=output.loss + math.nan)
        return output

    monkeypatch.setattr(LanguageModel, "forward", forward)


def test_a_bad_step_drops_the_carried_states_and_the_next_is_good(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("a", data={"order": "lanes"}, training={"max_steps": 4, "carry_state": True})
    original, calls = LanguageModel.forward, [0]

    def forward(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        calls[0] += self.training
        if self.training and calls[0] == 3:
            spoilt = torch.utils._pytree.tree_map(lambda leaf: leaf * math.nan, output.state)
            output = output._replace(loss=output.loss * math.nan, state=spoilt)
        return output

    monkeypatch.setattr(LanguageModel, "forward", forward)
    train(config, say=quiet)
    assert [row["skipped"] for row in rows(config)] == [False, True, False, False]


def test_a_recurrence_that_was_not_solved_makes_a_bad_step(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("a", training={"max_steps": 2})
    original, calls = LanguageModel.forward, [0]

    def forward(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        calls[0] += 1
        update = math.nan if calls[0] == 1 else 1e-9
        return output._replace(stats={**output.stats, "layer_00/newton_last_update": update})

    monkeypatch.setattr(LanguageModel, "forward", forward)
    train(config, say=quiet)
    assert [row["skipped"] for row in rows(config)] == [True, False]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_step_is_skipped_and_counted_and_touches_nothing(
    make: Any, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    config = make("a", training={"max_steps": 3, "precision": precision}, checkpoint={"every": 1, "keep_last": 9})
    poison(monkeypatch, {4})  # one micro-batch of the second step
    train(config, say=quiet)
    assert [row["skipped"] for row in rows(config)] == [False, True, False]
    assert rows(config)[-1]["bad_steps"] == 1
    first, second, third = (ckpt.open_step(config.run_dir / "checkpoints", step) for step in (1, 2, 3))
    for name in first.shapes:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(first.tensor(name, kind), second.tensor(name, kind))
    assert any(not torch.equal(second.tensor(name), third.tensor(name)) for name in first.shapes)
    assert third.manifest["optimizer"]["scalars"]["step"] == 2


def test_many_bad_steps_in_a_row_stop_with_the_last_good_checkpoint(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("a", training={"max_steps": 20, "max_bad_steps": 3}, checkpoint={"every": 2})
    poison(monkeypatch, set(range(11, 100)))
    with pytest.raises(DivergedError, match="3 steps in a row") as caught:
        train(config, say=quiet)
    assert "\n" not in str(caught.value)
    assert f"training.fork_from={config.run_dir}" in str(caught.value)  # this run's own rate cannot change any more
    last = rows(config)[-1]
    assert (last["step"], last["bad_steps"], last["loss"]) == (8, 3, "nan")
    assert ckpt.newest_whole(config.run_dir / "checkpoints", quiet).step == 6  # type: ignore[union-attr]


def test_clamp_holds_on_the_recurrent_weights_of_a_trained_model(make: Any) -> None:
    config = make("a", optimizer={"lr": 0.5}, training={"max_steps": 8})
    train(config, say=quiet)
    loaded = load_model(config.run_dir)
    clamped = [group for group in loaded.model.parameter_groups() if group["clamp"]]
    assert clamped
    for group in clamped:
        largest = max(float(p.detach().abs().max()) for p in group["params"])
        assert largest == group["clamp"]


def test_keys_that_must_not_change_are_refused_with_both_values(make: Any) -> None:
    config = make("a", training={"max_steps": 2})
    train(config, say=quiet)
    before = sorted(p for p in config.run_dir.rglob("*"))
    with pytest.raises(RunError, match=r"model\.d_model.*32.*64"):
        train(make("a", training={"max_steps": 2}, model={"d_model": 64}), say=quiet)
    assert sorted(p for p in config.run_dir.rglob("*")) == before


@pytest.mark.parametrize(
    ("told", "read", "message"),
    [
        ({"optimizer": {"lr": 0.5}}, {}, "rank 0 on .*: optimizer.lr is 0.003, of rank 0 0.5"),
        ({"checkpoint": {"every": 7}, "run": {"root": "/there"}, "data": {"dir": "/there"}}, {}, "checkpoint.every is"),
        ({"run": {"root": "/there"}, "parallel": {"nvme_path": "/disk"}}, {"store": "other"}, "data's store is"),
        ({}, {"modules": {"/there/own.py": "1f"}}, "the SHA-256 of a file of imports is None, of rank 0 '1f'"),
    ],
)
def test_a_rank_that_was_told_or_reads_something_else_is_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], read: dict[str, Any], message: str
) -> None:
    def of_rank_0(value: Any) -> Any:
        if isinstance(value, tuple) and isinstance(value[0], Config):
            modules = read.pop("modules", value[2])
            return make("a", **told), {**value[1], **read}, modules
        return broadcast(value)

    monkeypatch.setattr("paralm.training.session.broadcast", of_rank_0)
    with pytest.raises(RunError, match=message):
        train(make("a"), say=quiet)


def test_init_from_takes_weights_only_and_fork_from_everything(make: Any) -> None:
    parent = make("parent", training={"max_steps": 6}, checkpoint={"every": 3})
    train(parent, say=quiet)
    child = make("child", training={"max_steps": 1, "init_from": str(parent.run_dir)}, optimizer={"lr": 1e-9})
    train(child, say=quiet)
    weights = ckpt.open_step(parent.run_dir / "checkpoints", 6)
    inherited = ckpt.open_step(child.run_dir / "checkpoints", 1)
    for name in weights.shapes:
        torch.testing.assert_close(inherited.tensor(name), weights.tensor(name), rtol=0, atol=1e-6)
    assert inherited.manifest["optimizer"]["scalars"]["step"] == 1
    fork = make("fork", training={"max_steps": 6, "fork_from": f"{parent.run_dir}@3"}, checkpoint={"every": 3})
    train(fork, say=quiet)
    assert [row["step"] for row in rows(fork)] == [4, 5, 6]
    assert [row["loss"] for row in rows(fork)] == [row["loss"] for row in rows(parent)][3:]
    with pytest.raises(CheckpointError, match="there are: 3, 6"):
        train(make("other", training={"fork_from": f"{parent.run_dir}@4"}), say=quiet)
    with pytest.raises(CheckpointError, match="the model sections must agree"):
        train(make("wide", model={"d_model": 64}, training={"init_from": str(parent.run_dir)}), say=quiet)


def test_a_fork_says_where_its_learning_rate_leaves_that_of_the_run_before(make: Any) -> None:
    """A decay of a fifth of max_steps, meant for the steps that are left, begins before the fork."""
    stable = {"schedule": {"kind": "wsd", "warmup": 1, "decay": 0}, "lr": 1e-3}
    parent = make("parent", training={"max_steps": 3}, optimizer=stable)
    train(parent, say=quiet)
    told: dict[float, list[str]] = {0.5: [], 1: []}
    for decay, lines in told.items():
        schedule = {**stable["schedule"], "decay": decay}  # of 4 steps: 2, and 1
        training = {"max_steps": 4, "fork_from": str(parent.run_dir)}
        train(make(f"fork-{decay}", training=training, optimizer={**stable, "schedule": schedule}), say=lines.append)
    change = f"the next learning rate is 0.0005; in {parent.run_dir} it was 0.001"
    assert [line for line in told[0.5] if "learning rate" in line] == [change]
    assert not [line for line in told[1] if "learning rate" in line]


def test_a_run_goes_on_without_the_run_it_began_from(make: Any) -> None:
    """With other rows a step: a fork counts on from the tokens there were."""
    parent = make("parent", training={"max_steps": 2})
    train(parent, say=quiet)
    wide = {"max_steps": 4, "global_batch_size": 8}
    for key in ("init_from", "fork_from"):
        with pytest.raises(StoppedError):
            train(make(key, training={**wide, key: str(parent.run_dir), "stop_after_seconds": 1e-9}), say=quiet)
    parent.run_dir.rename(parent.run_dir.with_name("gone"))
    for key, tokens in (("init_from", 4 * 8 * 32), ("fork_from", 2 * 4 * 32 + 2 * 8 * 32)):
        config = make(key, training={**wide, key: str(parent.run_dir)})
        check_start(config)
        result = train(config, say=quiet)
        assert (result.step, result.tokens, rows(config)[-1]["tokens"]) == (4, tokens, tokens)
        with pytest.raises(RunError, match="parent: no such run folder"):
            train(make("new", training={"max_steps": 4, key: str(parent.run_dir)}), say=quiet)


def test_init_from_takes_an_export(make: Any) -> None:
    parent = make("parent", training={"max_steps": 2})
    train(parent, say=quiet)
    exported = export(parent.run_dir, parent.run_dir.parent / "exported", max_shard_size=20_000).path
    child = make("child", training={"max_steps": 1, "init_from": str(exported)}, optimizer={"lr": 1e-9})
    train(child, say=quiet)
    weights = ckpt.open_step(parent.run_dir / "checkpoints", 2)
    inherited = ckpt.open_step(child.run_dir / "checkpoints", 1)
    for name in weights.shapes:
        torch.testing.assert_close(inherited.tensor(name), weights.tensor(name), rtol=0, atol=1e-6)
    for damaged, section, text in (
        (False, {"init_from": f"{exported}@2"}, "an export has no steps"),
        (True, {"init_from": str(exported)}, "damaged export"),
    ):
        if damaged:
            shard = sorted(exported.glob("*.safetensors"))[1]
            shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        with pytest.raises(CheckpointError, match=text):
            train(make("x", training=section), say=quiet)
    export(parent.run_dir, exported, force=True)
    with pytest.raises(CheckpointError, match="the model sections must agree"):
        train(make("wide", model={"d_model": 64}, training={"init_from": str(exported)}), say=quiet)


def test_a_later_attempt_ends_an_earlier_one_before_it_writes(make: Any) -> None:
    config = make("a")
    session = Session.open(config, quiet)
    try:
        assert session.save()
        session.folder.begin_attempt()
        session.step = 7
        assert not session.save()
        assert ckpt.steps(config.run_dir / "checkpoints") == [0]
    finally:
        session.close()


def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("a", training={"max_steps": 3}, checkpoint={"every": 1})
    original, calls = ckpt.write_rank_file, [0]

    def full_disk(*args: Any, **kwargs: Any) -> ckpt.RankFile:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(ckpt, "write_rank_file", full_disk)
    said: list[str] = []
    train(config, say=said.append)
    assert [line for line in said if "No space left" in line and "step 2" in line]
    assert ckpt.steps(config.run_dir / "checkpoints") == [1, 3]


def test_a_profile_of_given_steps_is_written(make: Any) -> None:
    config = make("a", training={"max_steps": 3, "profile_steps": [2, 2]})
    train(config, say=quiet)
    (trace,) = (config.run_dir / "profile").iterdir()
    assert trace.stat().st_size > 10_000


@pytest.mark.parametrize("limit", [16384, -8], ids=["full disk", "full at the last bytes"])
def test_a_profile_that_is_not_whole_is_not_called_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    export = torch.profiler.profile.export_chrome_trace

    def full_disk(profile: Any, path: str) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit > 0 else soft, hard))  # torch says nothing of it
        try:
            export(profile, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if limit < 0:
            os.truncate(path, os.stat(path).st_size + limit)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full_disk)
    said: list[str] = []
    session: Any = SimpleNamespace(
        config=Config.model_validate({"training": {"profile_steps": [1, 1]}}),
        folder=RunFolder(tmp_path),
        rank=0,
        say=lambda line: said.append(f"said: {line}"),
        warn=lambda line: said.append(f"warned: {line}"),
    )
    with Profiler(session) as profiler:
        profiler.before(0)
        for _ in range(30):
            torch.ones(2) + 1
    (line,) = said
    assert line.startswith("warned: ")
    assert "steps_1_1.json: the profile could not be written whole" in line
    assert not list((tmp_path / "profile").iterdir())


def test_products_of_float32_are_whole_whatever_the_environment_says(make: Any) -> None:
    """As in NVIDIA's containers, whose TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is this setting."""
    config = make("a", training={"max_steps": 1})
    for computes in (lambda: train(config, say=quiet), lambda: load_model(config.run_dir)):
        torch.set_float32_matmul_precision("high")
        computes()
        assert torch.get_float32_matmul_precision() == "highest"


def test_load_model_gives_the_checkpoint_of_the_step_asked_for(make: Any) -> None:
    config = make("a", training={"max_steps": 4}, checkpoint={"every": 2})
    train(config, say=quiet)
    loaded = load_model(f"{config.run_dir}@2")
    assert loaded.step == 2
    assert not loaded.model.training
    source = ckpt.open_step(config.run_dir / "checkpoints", 2)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, source.tensor(name))
    with pytest.raises(RunError, match="no such run folder"):
        load_model(config.run_dir / "nowhere")
    moved = config.run_dir.rename(config.run_dir.parent / "me@host")
    assert load_model(moved).step == 4
    assert load_model(f"{moved}@2").step == 2


def test_carried_states_survive_a_restart(make: Any) -> None:
    lanes: dict[str, Any] = {"data": {"order": "lanes"}}
    whole = make("whole", **lanes, training={"carry_state": True})
    train(whole, say=quiet)
    with pytest.raises(StoppedError):
        train(make("part", **lanes, training={"carry_state": True, "stop_after_seconds": 1e-9}), say=quiet)
    part = make("part", **lanes, training={"carry_state": True})
    train(part, say=quiet)
    assert [row["loss"] for row in rows(part)] == [row["loss"] for row in rows(whole)]
    fresh = make("fresh", **lanes)
    train(fresh, say=quiet)
    assert rows(fresh)[0]["loss"] == rows(whole)[0]["loss"]
    assert rows(fresh)[1]["loss"] != rows(whole)[1]["loss"]


def test_a_state_that_grows_cannot_be_carried(make: Any) -> None:
    config = make(
        "a",
        data={"order": "lanes"},
        training={"carry_state": True},
        model={"mixer": {"name": "attention", "n_heads": 2}},
    )
    with pytest.raises(ConfigError, match="grows with the sequence"):
        train(config, say=quiet)


def test_a_stop_before_a_validation_loses_it_not(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("whole", training={"max_steps": 6, "validate_every": 2})
    train(whole, say=quiet)
    part = make("part", training={"max_steps": 6, "validate_every": 2})
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_stop_request", lambda session, control: 15 * (session.step + 1 == 4))
        with pytest.raises(StoppedError):
            train(part, say=quiet)

    def killed(row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after the validation that was owed, before a checkpoint
        train(part, killed, quiet)
    train(part, say=quiet)
    for kind in ("train", "validation"):
        kept = [[(row["step"], row["loss"]) for row in rows(config, kind)] for config in (part, whole)]
        assert kept[0] == kept[1]


def test_every_validation_set_is_scored(make: Any, corpus: Path, prepared: Path) -> None:
    import shutil

    config = make(
        "a", training={"max_steps": 1}, data={"validation": {"other": {"kind": "text", "paths": [str(corpus)]}}}
    )
    data = config.run_dir.parent / "data"
    shutil.copytree(prepared, data)
    shutil.copytree(prepared / "held_out", data / "validation" / "other")
    config.data.dir = data
    train(config, say=quiet)
    first, second = rows(config, "validation")
    assert (first["set"], second["set"]) == ("held_out", "other")
    assert first["loss"] == second["loss"]  # the same text under two names
