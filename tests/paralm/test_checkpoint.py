"""Checkpoints: any slice reads back whatever grid wrote it, and no damage goes unnoticed."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from paralm.config import Config
from paralm.errors import CheckpointError, StoppedError
from paralm.training import checkpoint as ckpt
from paralm.training.loop import train
from paralm.training.metrics import read_metrics
from tests.conftest import settings

SHAPES = {"a.weight": (7, 5), "b": (11,), "scalar": ()}


def values(kind: str, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind) * 100 + len(name))
    return torch.randn(torch.Size(SHAPES[name]).numel(), generator=generator)


def write(checkpoints: Path, step: int, world_size: int) -> Path:
    """A checkpoint whose fragments are cut at ``world_size`` equal parts of the flattened whole, as ZeRO does."""
    directory = ckpt.writing_folder(checkpoints, step, 1, 1)
    total = sum(torch.Size(s).numel() for s in SHAPES.values())
    bounds = [total * r // world_size for r in range(world_size + 1)]
    files = []
    for rank in range(world_size):
        fragments, begin = [], 0
        for name, shape in SHAPES.items():
            count = torch.Size(shape).numel()
            low, high = max(begin, bounds[rank]), min(begin + count, bounds[rank + 1])
            if low < high:
                for kind in ("master", "exp_avg"):
                    part = values(kind, name)[low - begin : high - begin]
                    fragments.append((kind, name, low - begin, part))
            begin += count
        own = {"rng/torch": torch.arange(5, dtype=torch.uint8) + rank}
        files.append(ckpt.write_rank_file(directory, rank, fragments, own))
    meta = {"step": step, "parameters": {n: {"shape": list(s)} for n, s in SHAPES.items()}}
    ckpt.write_manifest(directory, files, meta)
    ckpt.install(directory, checkpoints, step)
    return checkpoints / ckpt.step_name(step)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_any_slice_reads_back_whatever_the_world_size(tmp_path: Path, world_size: int) -> None:
    checkpoint = ckpt.Checkpoint(write(tmp_path, 3, world_size)).verify()
    for name in SHAPES:
        for kind in ("master", "exp_avg"):
            whole = values(kind, name)
            assert torch.equal(checkpoint.tensor(name, kind).flatten(), whole)
            for low in range(len(whole) + 1):
                for high in range(low, len(whole) + 1):
                    assert torch.equal(checkpoint.read(kind, name, low, high - low), whole[low:high])
    assert checkpoint.rank_tensors(world_size - 1, "rng")["torch"].tolist() == [world_size - 1 + i for i in range(5)]


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    directory = write(tmp_path, 1, 2)
    rng = random.Random(0)
    for path in sorted(directory.iterdir()):
        whole = path.read_bytes()
        for trial in range(100):
            at = rng.randrange(len(whole))
            if trial % 2:
                damaged = whole[:at]
            else:
                damaged = whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                ckpt.Checkpoint(directory).verify()
            assert path.name in str(caught.value)
            assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    ckpt.Checkpoint(directory).verify()


def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, 2)
    (tmp_path / ckpt.step_name(3) / ckpt.rank_file(1)).write_bytes(b"short")
    (tmp_path / ckpt.step_name(2) / ckpt.rank_file(0)).unlink()
    said: list[str] = []
    found = ckpt.newest_whole(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 2, said
    assert "rank_00001" in said[0]
    assert "rank_00000" in said[1]
    (tmp_path / ckpt.step_name(1) / ckpt.rank_file(0)).write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        ckpt.newest_whole(tmp_path, said.append)


def test_without_a_manifest_there_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1, 1)
    unfinished = tmp_path / ckpt.step_name(2)
    ckpt.write_rank_file(unfinished, 0, [("master", "b", 0, values("master", "b"))], {})
    assert ckpt.steps(tmp_path) == [1]
    with pytest.raises(CheckpointError, match="there are: 1"):
        ckpt.open_step(tmp_path, 2)
    ckpt.remove_unfinished(tmp_path)
    assert not unfinished.exists()
    assert ckpt.steps(tmp_path) == [1]


def test_a_parameter_that_is_not_whole_is_found(tmp_path: Path) -> None:
    directory = tmp_path / ckpt.step_name(1)
    file = ckpt.write_rank_file(directory, 0, [("master", "b", 2, values("master", "b")[2:])], {})
    ckpt.write_manifest(directory, [file], {"step": 1, "parameters": {"b": {"shape": [11]}}})
    with pytest.raises(CheckpointError, match="fragments of b"):
        ckpt.Checkpoint(directory).verify()


def test_retention_keeps_the_last_and_the_multiples(tmp_path: Path) -> None:
    for step in range(1, 9):
        write(tmp_path, step, 1)
    removed = ckpt.apply_retention(tmp_path, keep_last=2, keep_every=3, step=8)
    assert removed == [1, 2, 4, 5]
    assert ckpt.steps(tmp_path) == [3, 6, 7, 8]
    assert (tmp_path / ckpt.LATEST).read_text().strip() == ckpt.step_name(8)


def test_retention_never_removes_the_newest_for_the_sake_of_later_ones_of_another_course(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):  # 30 and 40 were found damaged; the run went on from 10 and has just saved 20
        write(tmp_path, step, 1)
    assert ckpt.apply_retention(tmp_path, keep_last=1, keep_every=0, step=20) == [10]
    assert ckpt.steps(tmp_path) == [20, 30, 40]


def test_lost_manifests_are_not_taken_for_a_new_run(tmp_path: Path) -> None:
    directory = write(tmp_path, 5, 1)
    (directory / ckpt.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="names a checkpoint"):
        ckpt.newest_whole(tmp_path, lambda _: None)
    assert (directory / ckpt.rank_file(0)).exists()


@pytest.fixture(scope="module")
def trained(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A configuration and the folder of its run, cut short: it has checkpoints of steps 2 and 4 and one step to do."""
    root = tmp_path_factory.mktemp("trained")
    made = settings(corpus, prepared, root, training={"max_steps": 5}, checkpoint={"every": 2})

    def cut_short(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise EOFError

    with pytest.raises(EOFError):
        train(Config.model_validate(made), cut_short, lambda line: None)
    return made, root / "tiny"


def damaged(path: Path, rng: random.Random) -> str:
    """Flip one random bit of a file, or truncate it, in place; says what was done."""
    whole = path.read_bytes()
    at = rng.randrange(len(whole))
    if rng.random() < 0.5:
        path.write_bytes(whole[:at])
        return f"{path.name} truncated to {at} bytes"
    path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
    return f"{path.name} altered at byte {at}"


def test_two_hundred_random_damages_are_each_found_before_training(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """By the function that training calls, which passes the damaged one over and takes the one before."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng = random.Random(seed)
    _, run = trained
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", checkpoints)
    files = sorted((checkpoints / ckpt.step_name(4)).iterdir())
    assert len(files) == 2  # the manifest and the rank's file
    for trial in range(200):
        path = files[trial % 2]
        whole = path.read_bytes()
        what = damaged(path, rng)
        said: list[str] = []
        found = ckpt.newest_whole(checkpoints, said.append)
        assert found is not None
        assert found.step == 2, what
        assert len(said) == 1, what
        assert path.name in said[0]
        path.write_bytes(whole)
    whole_again = ckpt.newest_whole(checkpoints, lambda line: None)
    assert whole_again is not None
    assert whole_again.step == 4


def test_training_goes_on_from_the_newest_whole_one_and_says_what_is_damaged(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    made, run = trained
    rng = random.Random(2)
    reference: list[Any] = []
    for trial in range(4):
        root = tmp_path / str(trial)
        shutil.copytree(run.parent, root)
        config = Config.model_validate({**made, "run": {**made["run"], "root": str(root)}})
        if trial:  # the first is not damaged: what the others must come to
            files = sorted((root / "tiny" / "checkpoints" / ckpt.step_name(4)).iterdir())
            damaged(files[trial % 2], rng)
        said: list[str] = []
        rows: list[dict[str, Any]] = []
        train(config, rows.append, said.append)
        assert [row["step"] for row in rows if row["kind"] == "train"] == ([3, 4, 5] if trial else [5])
        assert [line for line in said if "damaged checkpoint passed over" in line] == said[: int(trial > 0)]
        # Step 4 was saved again over the damaged one; retention has kept two whole ones.
        there = {step: ckpt.open_step(root / "tiny" / "checkpoints", step).verify() for step in (4, 5)}
        files_of_5 = there[5].manifest["files"]
        reference = reference or files_of_5
        assert files_of_5 == reference  # bit for bit what the undamaged run came to


def test_a_damaged_checkpoint_that_was_passed_over_takes_no_good_ones_place(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    made, run = trained
    shutil.copytree(run.parent, tmp_path / "runs")
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    damaged(checkpoints / ckpt.step_name(4) / ckpt.rank_file(0), random.Random(2))
    root = {**made["run"], "root": str(tmp_path / "runs")}
    train(Config.model_validate({**made, "run": root, "checkpoint": {"every": 3}}), say=lambda line: None)
    assert ckpt.steps(checkpoints) == [3, 5]


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_that_was_passed_over_and_can_be_read_again_leaves_no_step_out_of_the_metrics(
    trained: tuple[dict[str, Any], Path], tmp_path: Path, saved: bool
) -> None:
    made, run = trained
    shutil.copytree(run.parent, tmp_path / "runs")
    made = {**made, "run": {**made["run"], "root": str(tmp_path / "runs")}}
    folder = tmp_path / "runs" / "tiny"
    file = folder / "checkpoints" / ckpt.step_name(4) / ckpt.rank_file(0)
    file.rename(tmp_path / "away")  # a stale handle, for a moment

    def cut_short(row: dict[str, Any]) -> None:
        if not saved:
            raise EOFError

    at_once = {**made, "training": {**made["training"], "stop_after_seconds": 1e-9}}
    with pytest.raises(StoppedError if saved else EOFError):
        train(Config.model_validate(at_once), cut_short, lambda line: None)
    (tmp_path / "away").rename(file)
    train(Config.model_validate(made), say=lambda line: None)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert ckpt.steps(folder / "checkpoints") == [4, 5]
    assert not (file.parent / ckpt.PASSED_OVER).exists()  # it is the new one
