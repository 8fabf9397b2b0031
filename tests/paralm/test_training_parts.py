"""The parts of training that need no model: schedules, metrics, the run folder, signals and stack dumps."""

from __future__ import annotations

import errno
import faulthandler
import itertools
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paralm.config import Config, OptimizerConfig, ScheduleConfig
from paralm.errors import ConfigError, RunError
from paralm.planning.cost import DEVICES
from paralm.training import rng
from paralm.training.control import Control, request_stacks
from paralm.training.engine import deepspeed_config, grad_accum_steps
from paralm.training.metrics import MetricsWriter, cut_metrics, peak_flops, read_metrics
from paralm.training.optimizers import build_optimizer
from paralm.training.run_folder import RunFolder
from paralm.training.schedule import lr_factor
from paralm.training.watch import Watch, note_path, read_note


def test_cosine_rises_linearly_and_ends_at_its_minimum() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup=0.1, min_ratio=0.1)
    factors = [lr_factor(schedule, step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.55)  # half way down: the mean of 1 and 0.1
    assert factors[100] == pytest.approx(0.1)


def test_wsd_holds_and_then_decays_linearly() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup=5, decay=0.2, min_ratio=0.0)
    factors = [lr_factor(schedule, step, 100) for step in range(101)]
    assert factors[4:81] == [1.0] * 77
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0.0


@pytest.mark.parametrize("steps", [2, 3, 15, 100])
def test_wsd_of_halves_is_possible_however_they_are_rounded_and_never_jumps(steps: int) -> None:
    schedule: dict[str, Any] = {"kind": "wsd", "warmup": 0.5, "decay": 0.5}
    config = Config.model_validate({"training": {"max_steps": steps}, "optimizer": {"schedule": schedule}})
    factors = [lr_factor(config.optimizer.schedule, step, steps) for step in range(steps + 1)]
    assert max(factors) == 1
    assert max(abs(a - b) for a, b in itertools.pairwise(factors)) <= 1.001 / round(steps / 2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_peak_of_a_run_is_the_plans_in_the_runs_precision(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    names = {"h100": "NVIDIA H100 80GB HBM3", "a100": "NVIDIA A100-SXM4-80GB", "mi300x": "AMD Instinct MI300X"}
    for name, device in DEVICES.items():
        full = names.get(name, f"NVIDIA {name.upper()}")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, full=full: full)
        assert peak_flops(torch.device("cuda"), precision) == getattr(device, precision), full
    assert peak_flops(torch.device("cpu"), precision) is None


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"), [("AMD Instinct MI250X", 191.5e12, 47.85e12), ("NVIDIA H200 NVL", 835.5e12, 60e12)]
)
def test_the_peak_is_of_one_device_as_torch_sees_it(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16: float, fp32: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert [peak_flops(torch.device("cuda"), precision) for precision in ("bf16", "fp32")] == [bf16, fp32]


def test_clamp_holds_after_every_update_and_only_in_its_group() -> None:
    free, bound = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.full((5,), 0.49))
    groups = [
        {"params": [free], "weight_decay": False, "clamp": None},
        {"params": [bound], "weight_decay": False, "clamp": 0.5},
    ]
    optimizer = build_optimizer(groups, OptimizerConfig(lr=0.1))
    for _ in range(3):
        free.grad, bound.grad = -torch.ones(5), -torch.ones(5)
        optimizer.step()
        assert bound.max() <= 0.5
    assert bound.tolist() == [0.5] * 5
    assert free.min() > 1.2


def test_rng_round_trip_restores_every_generator() -> None:
    rng.seed_all(3, "a")
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    state = rng.capture()

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(()).item()]  # noqa: NPY002

    first = draw()
    rng.seed_all(4, "b")
    assert draw() != first
    rng.restore(state)
    assert draw() == first


def test_metrics_are_cut_at_the_checkpoint_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tb", 0)
    for step in range(1, 6):
        writer.write({"kind": "train", "step": step, "loss": step / 3, "newton": {"layer_0": 4.0}})
    writer.write({"kind": "validation", "set": "held_out", "step": 5, "loss": float("nan")})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "ste')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 5]
    assert read_metrics(path)[-1]["loss"] == "nan"
    cut_metrics(path, 3)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["loss"] == 1 / 3  # floats survive to the last bit


@pytest.mark.parametrize("stale", [False, True])
def test_a_row_that_the_storage_refuses_is_left_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: bool
) -> None:
    """``stale``: nor can what there is of it be cut off at once."""

    def truncate(*arguments: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tb", 0)
    writer.write({"kind": "train", "step": 1, "loss": 1.0})
    real = writer._file

    class Full:
        """Takes half of a row, as a full disk does."""

        def write(self, text: str) -> None:
            real.write(text[: len(text) // 2])
            real.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            real.close()

        @property
        def closed(self) -> bool:
            return real.closed

    writer._file = Full()  # type: ignore[assignment]
    with monkeypatch.context() as patched:
        if stale:
            patched.setattr(os, "truncate", truncate)
        with pytest.raises(OSError, match="No space left"):
            writer.write({"kind": "train", "step": 2, "loss": 2.0})
    writer.write({"kind": "train", "step": 3, "loss": 3.0})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_tensorboard_goes_on_after_a_disk_that_was_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer.record_writer import RecordWriter

    original, full = RecordWriter.write, [False]

    def write(self: RecordWriter, data: bytes) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)  # of TensorBoard's thread
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tb", 0)
    refused = set()
    for step in range(1, 10):
        full[0] = 3 <= step <= 5
        try:
            writer.write({"kind": "train", "step": step, "loss": 1.0})
            writer._board.flush()
        except OSError:
            refused.add(step)
    writer.close()
    assert {3, 4, 5} <= refused <= {3, 4, 5, 6}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {1, 2, 7, 8, 9} <= {event.step for event in events.Scalars("train/loss")}


def test_a_damaged_metrics_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_tensorboard_is_purged_from_the_step_a_run_continues_at(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop, value in ((1, 9, 1.0), (5, 7, 2.0)):
        writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tb", start - 1)
        for step in range(start, stop):
            writer.write({"kind": "train", "step": step, "loss": value})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        *((s, 1.0) for s in range(1, 5)),
        (5, 2.0),
        (6, 2.0),
    ]


def test_a_later_attempt_supersedes_an_earlier_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = folder.begin_attempt()
    assert not folder.superseded(first)
    second = folder.begin_attempt()
    assert second == first + 1
    assert folder.superseded(first)
    assert not folder.superseded(second)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"torch", "deepspeed"} <= set(environment["packages"])


def test_a_folder_that_ranks_do_not_share_is_found(tmp_path: Path) -> None:
    writer, reader = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    for folder in (writer, reader):
        folder.path.mkdir()
    box: list[object] = []

    def from_rank_0(value: object) -> object:
        box.append(value)
        return value

    assert writer.prove_shared(0, from_rank_0) is None
    problem = reader.prove_shared(1, lambda _: box[0], patience=0.3)
    assert problem is not None
    assert "run.root must be shared" in problem
    writer.end_proof()
    assert list(writer.path.iterdir()) == []


def test_of_two_attempts_at_once_neither_removes_what_the_other_made(tmp_path: Path) -> None:
    one, two = RunFolder(tmp_path), RunFolder(tmp_path)
    for folder in (one, two):
        assert folder.prove_shared(0, lambda value: value) is None
    one.end_proof()
    assert len(list(tmp_path.glob(".shared-*"))) == 1  # the other ranks of the second may look for it yet
    two.end_proof()
    first, second = (Watch(tmp_path, 0, 1, 60.0) for _ in range(2))
    with second:
        with first:
            first.note("step", 1)
            second.note("step", 2)
        note = read_note(note_path(tmp_path / "ranks", 0))
        assert note is not None
        assert note.step == 2
    assert not note_path(tmp_path / "ranks", 0).exists()
    about = tmp_path / "ranks" / "rank_00000.json"
    with Control(tmp_path / "stacks", tmp_path / "ranks", 0, hang_timeout=60):
        about.write_text("the later attempt's")
    assert about.read_text() == "the later attempt's"


def test_signals_are_noted_and_handlers_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Control(tmp_path / "stacks", tmp_path / "ranks", 0, hang_timeout=60) as control:
        assert json.loads((tmp_path / "ranks" / "rank_00000.json").read_text())["pid"] == os.getpid()
        assert control.stop_signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert control.stop_signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "ranks" / "rank_00000.json").exists()


def test_a_held_sigusr1_is_answered_as_soon_as_there_is_an_answer(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # of this process another thread might take it
        with Control(tmp_path / "stacks", tmp_path / "ranks", 0, hang_timeout=60) as control:
            assert control.stop_signal == signal.SIGUSR1
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1,))
        signal.signal(signal.SIGUSR1, before)


def test_stacks_are_dumped_on_request_by_file_by_signal_and_on_a_hang(tmp_path: Path) -> None:
    dump = tmp_path / "stacks" / "rank_00000.txt"

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 20
        while dump.read_text().count("wait_for") < count:
            assert time.monotonic() < deadline, dump.read_text()
            time.sleep(0.05)

    with Control(tmp_path / "stacks", tmp_path / "ranks", 0, hang_timeout=0.5) as control:
        os.kill(os.getpid(), signal.SIGUSR2)
        threading.Event().wait(0.1)
        assert "test_stacks_are_dumped" in dump.read_text()
        request_stacks(tmp_path / "stacks")
        wait_for(1)
        seen = dump.read_text().count("wait_for")
        control.alive()
        wait_for(seen + 1)
        assert "Timeout" in dump.read_text()


def test_stacks_are_dumped_on_a_request_although_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paralm.training.control._POLL_SECONDS", 0.01)
    request = tmp_path / "stacks" / "request"
    request_stacks(tmp_path / "stacks")
    os.utime(request, (2e9, 2e9))
    dumped = threading.Event()
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda **options: dumped.set())
    with Control(tmp_path / "stacks", tmp_path / "ranks", 0, hang_timeout=60):
        time.sleep(0.05)
        assert not dumped.is_set()  # it is of an attempt before
        for ago in range(1000):  # the first may come before the thread looks
            os.utime(request, (2e9 - ago, 2e9 - ago))
            if dumped.wait(0.02):
                break
    assert dumped.is_set()


def test_stacks_that_a_full_disk_refuses_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paralm.training.control._POLL_SECONDS", 0.01)
    monkeypatch.setattr("paralm.training.control.stop_file", tmp_path / "stop")
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank_00000.txt").symlink_to("/dev/full")
    with Control(tmp_path / "stacks", tmp_path / "ranks", 0, hang_timeout=60) as control:
        dumped, deadline = threading.Event(), time.monotonic() + 20
        monkeypatch.setattr(faulthandler, "dump_traceback", lambda **options: dumped.set())
        while not dumped.wait(0.02):  # the first request may come before the thread looks
            assert time.monotonic() < deadline
            request_stacks(tmp_path / "stacks")
        (tmp_path / "stop").write_text(str(int(signal.SIGTERM)))
        while control.stop_signal is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "steps"), [(16, 4, 1, 4), (16, 4, 2, 2), (5, 2, 2, 2), (3, 8, 4, 1)]
)
def test_accumulation_is_derived_from_the_global_batch(batch: int, micro: int, world: int, steps: int) -> None:
    config = Config.model_validate({"training": {"global_batch_size": batch, "micro_batch_size": micro}})
    assert grad_accum_steps(config, world) == steps
    generated = deepspeed_config(config, world, 1000)
    assert generated["gradient_accumulation_steps"] == steps
    assert generated["train_batch_size"] == micro * steps * world


def test_raw_deepspeed_keys_are_laid_over_ours_but_not_those_we_own() -> None:
    config = Config.model_validate({"parallel": {"deepspeed": {"zero_optimization": {"overlap_comm": True}, "x": 1}}})
    generated = deepspeed_config(config, 1, 1000)
    assert generated["zero_optimization"]["overlap_comm"] is True
    assert generated["zero_optimization"]["stage"] == 1
    assert generated["x"] == 1
    config = Config.model_validate({"parallel": {"deepspeed": {"zero_optimization": {"stage": 3}}}})
    with pytest.raises(ConfigError, match=r"parallel\.deepspeed\.zero_optimization\.stage"):
        deepspeed_config(config, 1, 1000)
