"""What starts, steps and saves of hundreds of ranks and hundreds of thousands of steps cost: calls, files and bytes."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from paralm_data import Ahead, TokenStore
from paralm_launch.launchers.parent import Launch

from paralm.config import DataConfig
from paralm.config_files import dump_yaml, frozen_differences
from paralm.errors import CheckpointError, RunError, UserError
from paralm.evaluation import perplexity
from paralm.training import checkpoint as ckpt
from paralm.training import tensor_file, verification
from paralm.training.control import Control
from paralm.training.loop import train
from paralm.training.metrics import cut_metrics, last_rows, read_metrics
from paralm.training.rendezvous import meet
from paralm.training.run_folder import RunFolder
from paralm.training.session import Session, check_sources
from paralm.training.verification import first_on_node
from tests.conftest import quiet


@pytest.mark.parametrize("hosts", [["a"] * 8, ["a"] * 4 + ["b"] * 4, list("abababab"), list("abcdefgh")])
def test_the_data_is_read_whole_once_a_node(monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> None:
    """At every start, and every rank on its own, 256 ranks read 10 TB 256 times."""
    found = []
    for rank in range(8):
        monkeypatch.setattr(verification, "gather", lambda host: hosts)
        found.append(first_on_node(rank))
    assert [host for host, first in zip(hosts, found, strict=True) if first] == sorted(set(hosts))


@pytest.mark.parametrize(("verify", "first", "read"), [("full", True, 2), ("full", False, 0), ("size", True, 0)])
def test_a_rank_reads_each_store_whole_only_if_it_is_told_to(
    make: Any, monkeypatch: pytest.MonkeyPatch, verify: str, first: bool, read: int
) -> None:
    config = make(f"{verify}-{first}", data={"verify": verify})
    verified: list[str] = []
    monkeypatch.setattr(TokenStore, "verify", lambda store: verified.append(store.path.name))
    monkeypatch.setattr("paralm.training.session.first_on_node", lambda rank: first)
    said: list[str] = []
    Session.open(config, said.append).close()
    assert len(set(verified)) == len(verified) == read
    assert said == []


def metrics(path: Path, steps: int) -> list[bytes]:
    """A row a step, and a validation every tenth, as a run writes them; their lines."""
    lines = []
    for step in range(1, steps + 1):
        lines.append(json.dumps({"kind": "train", "step": step, "loss": 1 / step, "newton": {"a": 3.0}}))
        if step % 10 == 0:
            lines.append(json.dumps({"kind": "validation", "set": "held_out", "step": step, "loss": 2 / step}))
    path.write_text("".join(line + "\n" for line in lines))
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("block", [7, 100, 1 << 16])
def test_of_the_metrics_a_restart_reads_what_it_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Of 500,000 steps in 700 MB every restart made objects of all: 23 s and 5.7 GB."""
    monkeypatch.setattr("paralm.training.metrics._BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    lines = metrics(path, 1000)
    with path.open("a") as file:
        file.write('{"kind": "train", "ste')
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr("paralm.training.metrics.json.loads", lambda line: parsed.append(line) or loads(line))
    cut_metrics(path, 990)
    assert path.read_bytes().splitlines(keepends=True) == lines[:-11]
    assert len(parsed) == 12  # ten steps and their validation, and the last row that stays
    cut_metrics(path, 990, validates=True)
    assert path.read_bytes().splitlines(keepends=True) == lines[:-12]
    assert next(row["step"] for _, row in last_rows(path)) == 990
    assert len(parsed) == 15
    assert [row["step"] for _, row in last_rows(path)] == [row["step"] for row in reversed(read_metrics(path))]
    cut_metrics(path, 0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [3, 995])
def test_a_damaged_row_is_named_by_a_restart(tmp_path: Path, line: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = metrics(path, 1000)
    lines[line - 1] = lines[line - 1][:20] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=rf"metrics\.jsonl:{line}: not a JSON object"):
        cut_metrics(path, 850)
    assert path.read_bytes() == b"".join(lines)


def with_seal(content: dict[str, Any]) -> str:
    """The text of version 0.1: everything indented, the seal among the keys."""
    digest = hashlib.sha256(json.dumps(content, indent=1, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True)


@pytest.mark.parametrize("text", [with_seal, ckpt.seal])
@pytest.mark.parametrize("last", [{}, {"zero_stage": 3}])
def test_every_flipped_byte_of_a_sealed_text_is_found_however_it_is_laid_out(
    tmp_path: Path, text: Callable[[dict[str, Any]], str], last: dict[str, Any]
) -> None:
    content = {"format": 1, "files": [{"name": "a", "sha256": "0" * 64}], "parameters": {"b": {"sha256": "1" * 64}}}
    path = tmp_path / "manifest.json"
    path.write_text(text({**content, **last}))
    whole = path.read_bytes()
    found = ckpt.read_sealed(path, 1)
    assert len(found.pop("sha256")) == 64
    assert found == {**content, **last}
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            ckpt.read_sealed(path, 1)


def test_a_rank_reads_the_manifest_it_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 ranks at ZeRO-3 it has ten megabytes."""
    reads: list[Path] = []
    read = ckpt.read_sealed
    ckpt.write_manifest(tmp_path, [], {"step": 3, "parameters": {}})
    asked = iter([("verify", tmp_path), ("chosen", tmp_path)])
    monkeypatch.setattr(ckpt, "read_sealed", lambda path, form: reads.append(path) or read(path, form))
    monkeypatch.setattr(verification, "broadcast", lambda value: next(asked))
    monkeypatch.setattr(verification, "gather", lambda value: [value])
    found = verification.choose_together(7, 256, lambda find_damage: None)
    assert found is not None
    assert found.step == 3
    assert len(reads) == 1


class Clock(threading.Event):
    """Ends after three waits, which it notes instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return len(self.waits) > 3


@pytest.mark.parametrize(("ranks", "most"), [(1, 2), (8, 16), (256, 64), (2048, 64)])
def test_ranks_look_for_requests_so_often_together(tmp_path: Path, ranks: int, most: int) -> None:
    """Two files, twice a second and for weeks: 256 ranks put 1,000 questions a second to a shared file system."""
    control = Control(tmp_path, tmp_path, 3, 60.0, ranks)
    control._done = clock = Clock()  # type: ignore[assignment]
    control._watch()
    assert [ranks / seconds for seconds in clock.waits] == [most] * 4
    control._file.close()


@pytest.mark.parametrize("nodes", [1, 32])
def test_the_launchers_of_many_nodes_look_as_often_as_that_of_one(
    make: Any, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    config = make("launched", launcher={"nodes": nodes, "rendezvous": "node-1:29500"})
    launch = Launch(config, lambda row: None, lambda line: None)
    launch._done = clock = Clock()  # type: ignore[assignment]
    launch._follow()
    assert [nodes / seconds for seconds in clock.waits] == pytest.approx([10.0] * 4)
    launch.exchange.remove()


class Asked:
    """A store that counts the questions."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.questions = store, 0

    def __getattr__(self, name: str) -> Any:
        self.questions += 1
        return getattr(self.store, name)


def test_ranks_meet_with_a_few_questions_each() -> None:
    """One a rank from each is 65,536 to one process at 256 ranks, again and again until the last has come."""
    store = dist.HashStore()
    for rank in range(256):
        store.set(f"here/{rank}", f"node-{rank // 8} GPU-{rank}")
    asked = Asked(store)
    meet(asked, 17, 256, 60.0, "GPU-17")  # type: ignore[arg-type]
    assert asked.questions == 3


def test_a_validations_documents_are_chosen_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the lengths of all, of which a held-out set of a large corpus has a hundred million, on every rank."""
    chosen: list[int] = []
    scored: list[list[int]] = []
    select = perplexity.select_documents
    monkeypatch.setattr(perplexity, "select_documents", lambda *which: chosen.append(1) or select(*which))

    def score(model: Any, store: Any, documents: Any, **options: Any) -> Any:
        scored.append(documents.tolist())
        return SimpleNamespace(loss=np.zeros(1), tokens=np.ones(1))

    monkeypatch.setattr(perplexity, "score", score)
    store = TokenStore.open(prepared / "train", verify="size")
    for _ in range(3):
        for rank in range(2):
            perplexity.validate(torch.nn.Identity(), store, 4000, 4, 64, rank=rank, world_size=2)
    assert len(chosen) == 2
    assert scored == scored[:2] * 3
    assert sorted(scored[0] + scored[1]) == select(store, 4000).tolist()


def of_many_ranks(folder: Path, ranks: int, names: int, numel: int) -> ckpt.Checkpoint:
    """Every rank has ``numel`` elements of every parameter, as at ZeRO-3."""
    files = []
    for rank in range(ranks):
        values = torch.arange(float(numel)) + rank * numel
        fragments = [(kind, f"p{i}", rank * numel, values + i) for i in range(names) for kind in ("master", "exp_avg")]
        files.append(ckpt.write_rank_file(folder, rank, fragments, {}))
    parameters = {f"p{i}": {"shape": [ranks, numel]} for i in range(names)}
    ckpt.write_manifest(folder, files, {"step": 1, "parameters": parameters})
    return ckpt.Checkpoint(folder)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensor files that are opened for data, as often as they are."""
    names: list[str] = []
    monkeypatch.setattr(tensor_file, "FileIO", lambda path: names.append(path.name) or FileIO(path))
    return names


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("kept", [512, 5])
def test_a_whole_model_opens_each_file_of_many_ranks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], kept: int
) -> None:
    """Once for each piece of each parameter that would be 131,072 of 256 ranks and 512 parameters."""
    monkeypatch.setattr(ckpt, "_KEPT", kept)
    ranks, names, before = 12, 7, descriptors()
    checkpoint = of_many_ranks(tmp_path, ranks, names, 3)
    with checkpoint.kept_open():
        for i in range(names):
            assert torch.equal(checkpoint.tensor(f"p{i}").flatten(), torch.arange(36.0) + i)
        assert descriptors() == before + min(kept, ranks)
    assert descriptors() == before
    assert set(opened) == {ckpt.rank_file(rank) for rank in range(ranks)}
    assert len(opened) == (ranks if kept > ranks else ranks * names)


def test_a_rank_of_fewer_opens_the_files_that_its_part_lies_in(tmp_path: Path, opened: list[str]) -> None:
    checkpoint = of_many_ranks(tmp_path, 16, 3, 6)
    for rank in range(12):  # 8 elements each
        opened.clear()
        with checkpoint.kept_open():
            for i in range(3):
                assert torch.equal(checkpoint.read("exp_avg", f"p{i}", 8 * rank, 8), torch.arange(8.0) + 8 * rank + i)
        assert len(opened) == 2


def test_a_start_does_not_look_into_every_checkpoint_that_was_kept(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, on each of 256 ranks, that were 256,000 questions of 500."""
    config = make("kept")
    folder = RunFolder(config.run_dir)
    assert not ckpt.has_steps(folder.checkpoints)
    for step in range(50):
        (folder.checkpoints / ckpt.step_name(step)).mkdir(parents=True)
    assert not ckpt.has_steps(folder.checkpoints)
    for step in range(50):
        (folder.checkpoints / ckpt.step_name(step) / ckpt.MANIFEST).touch()
    folder.config_file.write_text(dump_yaml(config))
    asked: list[str] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: asked.append(str(path)) or stat(path, **how))
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(str(path)) or posixpath.lexists(path))
    folder.check_same_run(config, frozen_differences)
    check_sources(config)
    assert ckpt.has_steps(folder.checkpoints)
    assert sum(ckpt.MANIFEST in path for path in asked) == 3


def test_training_reads_each_steps_data_ahead_of_it(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold, a batch of eight windows takes 50 ms of a local disk, and of 256 ranks all wait for the slowest."""
    asked: list[int] = []
    monkeypatch.setattr(Ahead, "read", lambda ahead, loader, step: asked.append(step))
    train(make("ahead", training={"max_steps": 4}), say=quiet)
    assert asked == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"imports": ["absent.py"]}, "imports: absent.py: no such file"),
        (
            {"data": DataConfig(dir=Path("/absent"))},
            "/absent/tokenizer.model: missing; run 'paralm",
        ),
    ],
)
def test_what_one_node_lacks_is_told_to_the_others(
    make: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], line: str
) -> None:
    told: list[str] = []

    def start(timeout: float, refusal: Exception) -> None:
        told.append(str(refusal))
        raise refusal

    monkeypatch.setattr("paralm.training.session.start_distributed", start)
    with pytest.raises(UserError):
        Session.open(make("lacking").model_copy(update=changes))
    assert len(told) == 1
    assert told[0].startswith(line)
