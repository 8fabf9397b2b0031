"""Who does what where processes share a folder and nothing else: one winner a claim, heartbeats, and silence."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from paralm_data.executors import claims
from paralm_data.executors.claims import Member, Watch, is_taken, take
from paralm_data.executors.shared import Claimed
from paralm_data.progress import Delta

from tests.data.test_shared_executor import wait_for


def race(workers: list[Path], markers: list[Path]) -> list[list[Path]]:
    """What each worker gets, when all ask for all at the same time."""
    barrier = threading.Barrier(len(workers))
    won: list[list[Path]] = [[] for _ in workers]

    def ask(number: int) -> None:
        barrier.wait()
        won[number] += [marker for marker in markers if take(marker, workers[number], Watch())]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_a_claim_has_one_winner_also_after_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "workers"
    folder.mkdir()
    workers = [folder / f"w{number}" for number in range(6)]
    for worker in workers:
        worker.write_bytes(b"0")
    markers = [tmp_path / "stage" / f"{number}.json" for number in range(100)]
    alive = workers
    for _ in range(3):
        won = race(alive, markers)
        taken = Counter(marker for each in won for marker in each)
        assert set(taken.values()) == {1}
        assert len(taken) == len(markers)
        assert all(take(marker, worker, Watch()) for worker, each in zip(alive, won) for marker in each), "given again"
        alive[0].unlink()
        free = {marker for marker in markers if not is_taken(marker, Watch())}
        assert free == set(won[0])
        nobodys = tmp_path / "stage" / "nobodys.json"
        assert not any(take(marker, alive[0], Watch()) for marker in (*free, nobodys)), "who is gone gets nothing"
        markers, alive = sorted(free) or markers[:10], alive[1:]


def test_only_silence_that_was_heard_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    worker = tmp_path / "worker"
    worker.write_bytes(b"0")
    watch = Watch()
    for _ in range(1000):  # it beats now and then
        clock[0] += 1.0
        if clock[0] % (claims.SILENT_SECONDS - 1) == 0:
            worker.write_bytes(str(clock[0]).encode())
        assert watch.lives(worker)
    worker.write_bytes(b"last")
    clock[0] += 1.0
    assert watch.lives(worker)
    clock[0] += 1e6  # the one that watches was suspended
    assert watch.lives(worker)
    for _ in range(int(claims.SILENT_SECONDS) - 5):
        clock[0] += 1.0
        assert watch.lives(worker)
    for _ in range(10):
        clock[0] += 1.0
        alive = watch.lives(worker)
    assert not alive
    assert not worker.exists(), "so everyone knows"


def test_a_heartbeat_beats_ends_with_its_parent_and_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    member = Member(tmp_path / "workers")
    first = member.path.read_bytes()
    wait_for(lambda: member.path.read_bytes() != first)
    assert member.is_known()
    member._heart.terminate()  # the whole group is told; it waits for its parent's end
    time.sleep(0.2)
    assert member.is_known()
    member.leave()
    assert not member.path.exists()
    other = Member(tmp_path / "workers")
    other.path.unlink()
    assert not other.is_known()
    assert other._heart.wait(timeout=20) == 0
    assert not other.path.exists()
    other.leave()


def test_what_is_done_is_not_claimed(tmp_path: Path) -> None:
    """Every process meets every task, and a claim of one that another has takes five more questions."""
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "second").write_bytes(b"0")
    task = _Once(tmp_path / "stage" / "task.json")
    task.marker.parent.mkdir()
    task.marker.write_text("{}")
    assert list(Claimed(task, tmp_path / "workers" / "second").run()) == []
    assert list(task.marker.parent.iterdir()) == [task.marker]


def test_what_a_worker_that_left_has_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has ended its task, and left, between a look at the marker and the claim that follows from it."""
    workers = tmp_path / "workers"
    workers.mkdir()
    for name in ("first", "second"):
        (workers / name).write_bytes(b"0")
    task = _Once(tmp_path / "stage" / "task.json")
    assert list(Claimed(task, workers / "first").run()) == [Delta(1)]
    assert list(Claimed(task, workers / "second").run()) == []
    (workers / "first").unlink()
    task.marker.unlink()

    def take_late(marker: Path, worker: Path, watch: Watch) -> bool:
        marker.write_text("{}")
        return take(marker, worker, watch)

    with monkeypatch.context() as patch:
        patch.setattr("paralm_data.executors.shared.take", take_late)
        assert list(Claimed(task, workers / "second").run()) == []
    task.marker.unlink()
    assert list(Claimed(task, workers / "second").run()) == [Delta(1)]


class _Once:
    label, weight = "once", 1.0

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        yield Delta(1)
        self.marker.write_text("{}")
        return {}
