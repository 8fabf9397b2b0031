"""Saving: asynchronous and synchronous checkpoints are the same, and bad storage costs nothing that was written."""

from __future__ import annotations

import errno
import os
import random
import resource
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file

from paralm.config import Config
from paralm.errors import RunError, StoppedError
from paralm.training import checkpoint as ckpt
from paralm.training import saving, tensor_file
from paralm.training.checkpoint_writer import CheckpointWrite, HostBuffer, Plan, record_file
from paralm.training.loop import train
from paralm.training.saving import Saver
from paralm.training.session import Session
from tests.conftest import quiet


@pytest.fixture(name="make")
def asynchronous(make: Any) -> Any:
    """As ``make``; asynchronous unless told."""

    def made(name: str, **sections: Any) -> Config:
        sections["checkpoint"] = {"asynchronous": True, **sections.get("checkpoint", {})}
        found: Config = make(name, **sections)
        return found

    return made


def leftovers(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step_*"))


# -- the file ------------------------------------------------------------------------------------------------


def test_a_streamed_file_is_a_safetensors_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.arange(3, dtype=torch.int64),
        "larger than a piece": torch.randn(3, tensor_file.PIECE // 8, generator=generator),
        "bf16": torch.randn(5, 7, generator=generator).bfloat16().T,  # not contiguous
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
    }
    specs = [tensor_file.TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
    specs = tensor_file.by_alignment(specs)
    path = tmp_path / "x.safetensors"
    with tensor_file.TensorFileWriter(path, specs, {"format": "pt"}) as writer:
        for spec in specs:
            writer.append(tensors[spec.key])
        digest = writer.finish()
    assert (digest, writer.size) == (tensor_file.sha256_file(path), path.stat().st_size)
    theirs, ours = load_file(path), tensor_file.TensorFile(path)
    assert set(theirs) == set(tensors) == set(ours.specs)
    for key, value in tensors.items():
        assert torch.equal(theirs[key], value)
        assert torch.equal(ours.tensor(key), value)
        if value.numel() >= 3:
            assert torch.equal(ours.read(key, 1, 3), value.reshape(-1)[1:3])
        assert torch.equal(torch.cat([torch.empty(0, dtype=value.dtype), *ours.pieces(key)]), value.reshape(-1))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    spec = tensor_file.TensorSpec("a", torch.float32, (4,))
    with tensor_file.TensorFileWriter(tmp_path / "a", [spec]) as writer:
        writer.append(torch.ones(3))
        with pytest.raises(ValueError, match="the header promises"):
            writer.finish()
    assert not list(tmp_path.iterdir())


def test_the_buffer_keeps_its_memory_and_its_copies_are_copies() -> None:
    buffer = HostBuffer(pin=False)
    tensors = [torch.randn(1000, 3), torch.arange(7), torch.randn(65).bfloat16(), torch.empty(0), torch.tensor(3.0)]
    buffer.reserve(t.numel() * t.element_size() for t in tensors)
    size = buffer.nbytes
    for _ in range(3):
        buffer.clear()
        copies = [buffer.copy(t) for t in tensors]
        assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True))
        assert buffer.nbytes == size
        places = {c.untyped_storage().data_ptr() for c in copies if c.numel()}
        assert len(places) == 1  # one piece of memory, nothing fresh
        tensors[0].add_(1)
        assert not torch.equal(copies[0], tensors[0])
    buffer.copy(torch.zeros(size))  # more than was reserved: it grows
    assert buffer.nbytes > size


def test_the_buffer_is_little_larger_than_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 billion parameters on 8 ranks at stage 2: whole matrices, with both moments of AdamW."""
    empty = torch.empty
    monkeypatch.setattr(
        "paralm.training.checkpoint_writer.torch.empty", lambda size, dtype, pin_memory: empty(size, device="meta")
    )
    block = [4096 * 4096] * 4 + [4096 * 11008] * 3 + [4096]
    sizes = [4 * numel for numel in block * 4 for _ in range(3)]
    buffer = HostBuffer(pin=True)
    buffer.reserve(sizes)
    pinned = sum(1 << (chunk.numel() - 1).bit_length() for chunk in buffer._chunks)
    assert sum(sizes) <= pinned <= 1.08 * sum(sizes)


# -- several ranks -------------------------------------------------------------------------------------------


def plan(checkpoints: Path, rank: int, world_size: int, step: int = 1, **other: Any) -> Plan:
    return Plan(
        **{
            "checkpoints": checkpoints,
            "step": step,
            "attempt": 1,
            "count": step,
            "rank": rank,
            "world_size": world_size,
            "patience": 30.0,
            "superseded": lambda: False,
            "meta": {"step": step, "parameters": {"w": {"shape": [world_size, 10]}}},
            "before_manifest": lambda: None,
            "retention": lambda: ckpt.apply_retention(checkpoints, 2, 0, step),
            **other,
        }
    )


def part(rank: int) -> list[tuple[str, str, int, torch.Tensor]]:
    return [("master", "w", 10 * rank, torch.arange(10.0) + 10 * rank)]


def begin(checkpoints: Path, world_size: int, **other: Any) -> list[CheckpointWrite]:
    """All ranks' writes, as threads of this process; rank 0's first, so that it has to wait."""
    return [CheckpointWrite(plan(checkpoints, r, world_size, **other), part(r), {}) for r in range(world_size)]


def test_ranks_finish_a_checkpoint_without_a_collective(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        writes = begin(tmp_path, 4, step=step)
        assert all(write.join(30) for write in writes)
        assert [write.problem for write in writes] == [None] * 4
        assert (tmp_path / ckpt.LATEST).read_text() == ckpt.step_name(step) + "\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    files = sorted(p.name for p in (tmp_path / "step_00000003").iterdir())
    assert files == ["manifest.json", *(ckpt.rank_file(rank) for rank in range(4))]
    found = ckpt.open_step(tmp_path, 3).verify()
    assert torch.equal(found.tensor("w"), torch.arange(40.0).view(4, 10))


@pytest.mark.parametrize("until", ["retention", "ever"])
def test_latest_that_cannot_be_written_makes_no_checkpoint_less_and_ends_no_retention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: str
) -> None:
    (first,) = begin(tmp_path, 1, step=1)
    assert first.join(30)
    original = ckpt.write_atomically

    def full_disk(path: Path, text: str) -> None:
        if path.name == ckpt.LATEST and (until == "ever" or (tmp_path / ckpt.step_name(1)).exists()):
            raise OSError(28, "No space left on device")
        original(path, text)

    monkeypatch.setattr(ckpt, "write_atomically", full_disk)
    (write,) = begin(tmp_path, 1, step=2, retention=lambda: ckpt.apply_retention(tmp_path, 1, 0, 2))
    assert write.join(30)
    assert write.problem is None
    assert ckpt.steps(tmp_path) == [2]
    said: list[str] = []
    session: Any = SimpleNamespace(rank=0, warn=said.append)
    saver = Saver(session)
    saver.write = write
    saver.report()
    if until == "retention":
        assert not said
        assert (tmp_path / ckpt.LATEST).read_text() == ckpt.step_name(2) + "\n"
    else:
        (line,) = said
        assert line.startswith("checkpoint of step 2 written, but 'latest'")
        assert "No space left" in line


@pytest.mark.parametrize("stale", ["step_00000001/manifest.json", "step_00000001"])
def test_an_old_checkpoint_that_cannot_be_looked_at_makes_no_new_one_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: str
) -> None:
    """As where another node has removed it a moment ago."""
    (first,) = begin(tmp_path, 1, step=1)
    assert first.join(30)
    original = Path.stat

    def on_nfs(path: Path, **options: Any) -> os.stat_result:
        if path == tmp_path / stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return original(path, **options)

    monkeypatch.setattr(Path, "stat", on_nfs)
    (write,) = begin(tmp_path, 1, step=2)
    assert write.join(30)
    assert write.problem is None
    assert (tmp_path / ckpt.LATEST).read_text() == ckpt.step_name(2) + "\n"
    ckpt.Checkpoint(tmp_path / ckpt.step_name(2)).verify()


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_retention(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder's handle is stale for good: the others go, one line says so, and a later start passes it over."""
    config = make("a", training={"max_steps": 6}, checkpoint={"every": 1, "keep_last": 1, "asynchronous": False})
    stale = config.run_dir / "checkpoints" / ckpt.step_name(2)
    original, unlink = Path.stat, Path.unlink
    seen: list[int] = []

    def refuse(path: Path) -> None:
        if 3 in seen and path.is_relative_to(stale):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    def stat(path: Path, **options: Any) -> os.stat_result:
        refuse(path)
        return original(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(Path, "unlink", lambda path, **options: [refuse(path), unlink(path, **options)])
    said: list[str] = []
    train(config, lambda row: seen.append(row["step"]), said.append)
    line = "warning: checkpoint of step 2 is old and cannot be removed, it stays"
    assert said == [f"{line}: {stale}/manifest.json: Stale file handle"]
    there = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step_*"))
    assert there == [ckpt.step_name(2), ckpt.step_name(6)]
    assert train(config, say=said.append).step == 6


def test_until_all_have_written_there_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, look = [], CheckpointWrite._progress
    monkeypatch.setattr(CheckpointWrite, "_progress", lambda write: looks.append(1) or look(write))
    first = CheckpointWrite(plan(tmp_path, 0, 2, patience=300.0), part(0), {})
    assert first.written.wait(30)
    assert not first.finished.wait(0.3)
    assert looks == [1]  # at the sizes of all files, in 15 s: at 256 ranks each is 512 questions to the file system
    assert ckpt.steps(tmp_path) == []
    assert not (tmp_path / ckpt.LATEST).exists()
    second = CheckpointWrite(plan(tmp_path, 1, 2), part(1), {})
    assert first.join(30)
    assert second.join(30)
    assert ckpt.steps(tmp_path) == [1]


def test_a_rank_that_dies_is_waited_for_as_long_as_was_agreed(tmp_path: Path) -> None:
    begin(tmp_path, 1, meta={"step": 1, "parameters": {}})[0].join(30)
    alone = CheckpointWrite(plan(tmp_path, 0, 2, step=2, patience=0.3), part(0), {})
    assert alone.join(30)
    assert alone.problem is not None
    assert "rank 1 wrote nothing" in alone.problem
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["latest", "step_00000001"]


def test_another_ranks_failure_is_everyones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ckpt.write_rank_file

    def fails_on_rank_1(directory: Path, rank: int, *args: Any) -> ckpt.RankFile:
        if rank == 1:
            directory.mkdir(parents=True, exist_ok=True)
            raise OSError(28, "No space left on device")
        return original(directory, rank, *args)

    monkeypatch.setattr(ckpt, "write_rank_file", fails_on_rank_1)
    writes = begin(tmp_path, 2)
    assert all(write.join(30) for write in writes)
    for write in writes:
        assert write.problem is not None
        assert write.problem.startswith("rank 1: ")
        assert "No space left" in write.problem
    assert not ckpt.steps(tmp_path)


def test_a_superseded_attempt_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    (write,) = begin(tmp_path, 1, superseded=lambda: True)
    assert write.join(30)
    assert write.superseded
    assert not list(tmp_path.iterdir())


def test_a_crash_at_any_point_leaves_the_old_checkpoints_and_is_cleaned_up(tmp_path: Path) -> None:
    """Whatever of a write is left: the newest whole checkpoint is the one before, and the next start removes it."""
    begin(tmp_path, 1, meta={"step": 1, "parameters": {"w": {"shape": [1, 10]}}})[0].join(30)
    folder = plan(tmp_path, 0, 2, step=2).folder
    ckpt.write_rank_file(folder, 0, part(0), {})
    (folder / record_file(0)).write_text("{}")
    (folder / f".{ckpt.rank_file(1)}.tmp").write_bytes(b"half")
    ckpt.write_manifest(folder, [], {"step": 2, "parameters": {}})  # even a manifest: it has not its name yet
    (tmp_path / ckpt.step_name(3)).mkdir()  # a removal that was cut short
    assert ckpt.steps(tmp_path) == [1]
    found = ckpt.newest_whole(tmp_path, quiet)
    assert found is not None
    assert found.step == 1
    ckpt.remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [False, True])
def test_asynchronous_checkpoints_are_the_synchronous_ones(
    make: Any, monkeypatch: pytest.MonkeyPatch, lanes: bool
) -> None:
    """Although each is written only after the step that follows it has changed every weight."""
    sections: dict[str, Any] = {"model": {"dropout": 0.1}, "training": {"max_steps": 6, "carry_state": lanes}}
    if lanes:
        sections["data"] = {"order": "lanes"}
    runs = []
    taken = [0]
    original = tensor_file.create

    def late(path: Path) -> BinaryIO:
        step = int(path.parent.name.removeprefix(".step_").partition(".")[0])
        while taken[0] < min(step + 1, 6):
            time.sleep(0.002)
        return original(path)

    def on_progress(row: dict[str, Any]) -> None:
        taken[0] = row["step"]

    for asynchronous in (True, False):
        monkeypatch.setattr(tensor_file, "create", late if asynchronous else original)
        config = make(
            f"run_{asynchronous}", **sections, checkpoint={"asynchronous": asynchronous, "every": 1, "keep_last": 9}
        )
        train(config, on_progress, quiet)
        assert not leftovers(config.run_dir)
        runs.append(config.run_dir / "checkpoints")
    for step in range(1, 7):
        ours, theirs = (ckpt.open_step(folder, step).verify() for folder in runs)
        assert ours.manifest == theirs.manifest  # the files' hashes included


def test_the_loop_goes_on_while_the_storage_is_slow(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fsync held up, the step after the save is taken; the next save waits, and says so; the last is whole."""
    config = make("slow", training={"max_steps": 4}, checkpoint={"every": 2})
    original, settle, hold = tensor_file.flush, Saver._settle, threading.Event()
    seen: list[int] = []

    def slow(file: BinaryIO) -> None:
        hold.wait(60)
        original(file)

    def on_progress(row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            seen.append(row["step"])
            if row["step"] == 3:  # reached although the checkpoint of step 2 is not on the disk
                assert ckpt.steps(config.run_dir / "checkpoints") == []

    def waits(self: Saver) -> bool:
        if self.write is not None and self.session.step == 4:
            threading.Timer(0.3, hold.set).start()
        return settle(self)

    monkeypatch.setattr(tensor_file, "flush", slow)
    monkeypatch.setattr(Saver, "_settle", waits)
    monkeypatch.setattr(saving, "_SLOW", 0.1)
    said: list[str] = []
    train(config, on_progress, said.append)
    assert seen == [1, 2, 3, 4]
    assert ckpt.steps(config.run_dir / "checkpoints") == [2, 4]
    (line,) = said
    assert "step 4 waited" in line
    assert "checkpoint of step 2" in line


class FullDisk:
    """A file on a disk with room for ``room`` more bytes; what does not fit raises ENOSPC, as a write does."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: memoryview) -> int:
        if self._room == 0 and len(data):
            raise OSError(28, "No space left on device")
        taken = self._file.write(data[: self._room])
        self._room -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_said_and_costs_nothing_that_was_written(
    make: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng = random.Random(seed)
    config = make(
        "full", training={"max_steps": 8}, checkpoint={"asynchronous": asynchronous, "every": 1, "keep_last": 3}
    )
    original, files = tensor_file.create, [0]

    def create(path: Path) -> Any:
        files[0] += 1
        file = original(path)
        return FullDisk(file, rng.randrange(200_000)) if 3 <= files[0] <= 6 else file

    monkeypatch.setattr(tensor_file, "create", create)
    said: list[str] = []
    train(config, say=said.append)
    assert len(said) == 4, said
    for step, line in zip((3, 4, 5, 6), said, strict=True):
        assert f"checkpoint of step {step} not written" in line
        assert "No space left" in line
    assert ckpt.steps(config.run_dir / "checkpoints") == [2, 7, 8]
    assert not leftovers(config.run_dir)
    for step in (2, 7, 8):
        ckpt.open_step(config.run_dir / "checkpoints", step).verify()


def test_a_real_limit_of_the_system_is_a_full_disk_too(make: Any) -> None:
    """RLIMIT_FSIZE: the kernel itself refuses the write in the middle of a rank's file."""
    config = make("limit", training={"max_steps": 3}, checkpoint={"every": 2})
    session = Session.open(config, quiet)
    try:
        assert session.save()
        size = (config.run_dir / "checkpoints" / ckpt.step_name(0) / ckpt.rank_file(0)).stat().st_size
        said: list[str] = []
        session.say = said.append
        session.step = 1
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        try:
            assert not session.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in said[0]
        assert session.save()
        assert ckpt.steps(config.run_dir / "checkpoints") == [0, 1]
    finally:
        session.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_stops_by_configuration_when_permission_is_denied(
    make: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    keep = {"asynchronous": asynchronous, "every": 2, "on_failure": "stop"}
    config = make("denied", training={"max_steps": 40}, checkpoint=keep)
    original = tensor_file.create

    def create(path: Path) -> BinaryIO:
        if ckpt.step_name(4) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(tensor_file, "create", create)
    steps: list[int] = []
    said: list[str] = []
    with pytest.raises(RunError, match=r"checkpoint of step 4 not written.*Permission denied.*on_failure"):
        train(config, lambda row: steps.append(row["step"]), said.append)
    assert steps[-1] <= 6  # at the latest when the next one is due; as a rule with the step in hand
    assert ckpt.steps(config.run_dir / "checkpoints") == [2]
    monkeypatch.undo()
    train(make("denied", training={"max_steps": 40}, checkpoint={**keep, "every": 50}), say=quiet)
    assert ckpt.newest_whole(config.run_dir / "checkpoints", quiet).step == 40  # type: ignore[union-attr]


def test_the_last_checkpoint_must_be_written(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("last", training={"max_steps": 2})

    def create(path: Path) -> BinaryIO:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "create", create)
    with pytest.raises(RunError, match="the last checkpoint could not be written"):
        train(config, say=quiet)


def test_a_stop_waits_for_the_checkpoint_it_promises(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("stopped", training={"stop_after_seconds": 1e-9})
    original = tensor_file.flush

    def slow(file: BinaryIO) -> None:
        time.sleep(0.5)
        original(file)

    monkeypatch.setattr(tensor_file, "flush", slow)
    with pytest.raises(StoppedError, match="saved; the same command continues"):
        train(config, say=quiet)
    assert ckpt.steps(config.run_dir / "checkpoints") == [1]


def test_closing_finishes_what_is_being_written(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error elsewhere ends the session; the checkpoint on its way is of good steps, and is kept."""
    config = make("closed")
    original = tensor_file.flush

    def slow(file: BinaryIO) -> None:
        time.sleep(0.5)
        original(file)

    monkeypatch.setattr(tensor_file, "flush", slow)
    session = Session.open(config, quiet)
    session.step = 3
    assert session.save(wait=False)
    assert ckpt.steps(config.run_dir / "checkpoints") == []
    session.close()
    assert ckpt.steps(config.run_dir / "checkpoints") == [3]


def test_a_later_attempt_keeps_the_run_from_a_write_on_its_way(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("attempts")
    hold, original = threading.Event(), tensor_file.flush

    def slow(file: BinaryIO) -> None:
        hold.wait(60)
        original(file)

    monkeypatch.setattr(tensor_file, "flush", slow)
    said: list[str] = []
    session = Session.open(config, said.append)
    try:
        session.step = 3
        assert session.save(wait=False)
        session.folder.begin_attempt()
        hold.set()
        session.step = 4
        assert not session.save()
    finally:
        session.close()
    assert ckpt.steps(config.run_dir / "checkpoints") == []
    assert not leftovers(config.run_dir)
    assert said == []
