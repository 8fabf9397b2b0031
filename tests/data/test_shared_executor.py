"""Processes that share a folder and nothing else: the same bytes, each part made once, whoever dies, stops, is late."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from paralm_data import DataError, SourceSpec, TokenStore, prepare_mixture
from paralm_data.executors import claims
from paralm_data.holding import locked
from paralm_data.preparation import Execution

from tests.conftest import tree
from tests.data.conftest import sentences
from tests.data.test_executors import SPEC, Counting, environment, kill_below, run
from tests.data.test_executors import big as big
from tests.data.test_executors import expected as expected

SCRIPT = """
import sys
from pathlib import Path
from tests.data.test_shared_executor import part
part(*map(Path, sys.argv[1:3]), *map(float, sys.argv[3:6]))
"""


def part(folder: Path, out: Path, silent: float, pause: float, together: float) -> None:
    """One of several that prepare ``folder``; so many begin ``together``. Each task that it does is a line in
    ``out.NAME``, after a pause.
    """
    from paralm_data.duplicates import Choose, Partition
    from paralm_data.sampling import Draw
    from paralm_data.scanning import Scan
    from paralm_data.tokenizing import Tokenize

    claims.SILENT_SECONDS, claims.BEAT_SECONDS, claims.POLL_SECONDS = silent, silent / 20, 0.05

    def noted(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(self: Any) -> Any:
            time.sleep(pause)
            result = yield from original(self)
            with out.with_name(f"{out.name}.{os.getpid()}").open("a") as file:
                file.write(f"{self.marker}\n")
            return result

        return run

    for kind in (Choose, Partition, Draw, Scan, Tokenize):
        kind.run = noted(kind.run)  # type: ignore[method-assign]
    out.with_name(f"ready.{os.getpid()}").touch()
    wait_for(lambda: len(list(out.parent.glob("ready.*"))) >= together)
    run(folder, out, "shared", 1)


class Parts:
    """Processes that prepare one folder."""

    def __init__(self, folder: Path, out: Path, silent: float = 60.0, pause: float = 0.0, together: int = 1) -> None:
        how = [str(value) for value in (silent, pause, together)]
        self._command = [sys.executable, "-c", SCRIPT, str(folder), str(out), *how]
        self.out = out
        self.alive: list[subprocess.Popen[str]] = []

    def start(self, count: int = 1) -> subprocess.Popen[str]:
        for _ in range(count):
            self.alive.append(subprocess.Popen(self._command, env=environment(), stderr=subprocess.PIPE, text=True))
        return self.alive[-1]

    def end(self, patience: float = 240.0) -> list[tuple[int, str]]:
        """The codes of all, and what they said."""
        said = [process.communicate(timeout=patience)[1] for process in self.alive]
        print(*said, sep="\n")  # where a test fails
        return [(process.returncode, text) for process, text in zip(self.alive, said)]

    def markers(self) -> list[str]:
        """Of the tasks that were done, by all together."""
        return [line for path in self.out.parent.glob(f"{self.out.name}.*") for line in path.read_text().splitlines()]


def wait_for(condition: Callable[[], bool], patience: float = 120.0) -> None:
    limit = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_however_many_share_the_work_it_is_done_once(
    big: Path, expected: dict[str, str], tmp_path: Path, count: int
) -> None:
    parts = Parts(big, tmp_path / "out", pause=0.03, together=count)
    parts.start(count)
    assert [code for code, _ in parts.end()] == [0] * count
    assert tree(tmp_path / "out") == expected
    done = Counter(parts.markers())
    assert max(done.values()) == 1, "no task was done twice"
    kinds = Counter(Path(marker).parent.name.partition("-")[0] for marker in done)
    assert kinds["scan"] == kinds["choose"] == kinds["tokenize"] > 10
    assert len(list(tmp_path.glob("out.*"))) >= min(count, 2), "they did share it"
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "seed"), [(1, 0), (2, 1), (4, 2)])
def test_killed_at_random_nothing_is_lost_and_nothing_is_there_twice(
    big: Path, expected: dict[str, str], tmp_path: Path, count: int, seed: int
) -> None:
    """By hash, and by the number of documents."""
    draw = random.Random(seed)
    parts = Parts(big, tmp_path / "out", pause=0.01)
    parts.start(count)
    done = 0
    for _ in range(5):
        done += draw.randint(1, 15)
        wait_for(lambda: len(parts.markers()) >= done or (tmp_path / "out" / "train").exists())  # noqa: B023
        time.sleep(draw.uniform(0.0, 0.05))
        victim = draw.choice(parts.alive)
        below = psutil.Process(victim.pid).children(recursive=True) if victim.poll() is None else []
        victim.kill()
        victim.communicate()
        parts.alive.remove(victim)
        parts.start()
        assert psutil.wait_procs(below, timeout=20)[1] == [], "nothing of it stays"
    assert [code for code, _ in parts.end()] == [0] * count
    assert tree(tmp_path / "out") == expected
    counts = json.loads((tmp_path / "out" / "preparation.json").read_text())
    found = [TokenStore.open(tmp_path / "out" / name, verify="full").n_documents for name in ("train", "held_out")]
    assert sum(found) == counts["kept"]
    again = [marker for marker, times in Counter(parts.markers()).items() if times > 1]
    assert again == [], "what has a marker is not done again"


def test_what_the_dead_have_claimed_goes_to_the_others_at_once(
    big: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Its silence is not waited for: it would take ten minutes."""
    parts = Parts(big, tmp_path / "out", silent=600.0, pause=0.1)
    first = parts.start()
    wait_for(lambda: any((tmp_path / "out" / ".work").glob("scan-*/*.claim-0")))
    parts.start()
    wait_for(lambda: len(list((tmp_path / "out" / ".work" / "workers").iterdir())) == 2)
    first.send_signal(signal.SIGUSR1)  # the time limit
    assert first.wait(timeout=20) == -signal.SIGUSR1
    assert parts.end(60.0)[1][0] == 0
    assert tree(tmp_path / "out") == expected


def test_a_worker_of_ones_own_that_dies_is_replaced(
    big: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim is that of this process, and its task is given again."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr("paralm_data.progress.Meter.EVERY", 0.0)
    killed: list[int] = []

    def kill_one(_: Any) -> None:
        killed.extend(kill_below("paralm_data.executors.worker") if not killed else [])

    assert tree(run(big, tmp_path / "out", "shared", 2, progress=kill_one).path) == expected
    assert killed


def test_one_that_was_taken_for_dead_begins_again(big: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """It is stopped with its heartbeat, as a node is that hangs; the other does everything; then it goes on."""
    parts = Parts(big, tmp_path / "out", silent=1.0, pause=0.05)
    first = parts.start()
    wait_for(lambda: any((tmp_path / "out" / ".work").glob("scan-*/*.json")))
    stopped = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in stopped:
        process.suspend()
    second = parts.start()
    try:
        assert second.wait(timeout=120) == 0
        assert tree(tmp_path / "out") == expected
    finally:
        for process in stopped:
            process.resume()
    assert [code for code, _ in parts.end()] == [0, 0]
    assert tree(tmp_path / "out") == expected
    assert not (tmp_path / "out" / ".work").exists()


def test_the_error_of_one_is_the_error_of_all_and_of_no_later_one(
    big: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in big.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join([*lines[:139], '{"text": 3}\n', lines[139]]))
    parts = Parts(folder, tmp_path / "out", pause=0.2)
    parts.start(2)
    for code, said in parts.end():
        assert code == 1
        assert said.splitlines()[-1].endswith("a.jsonl:140: 'text' is a int, not text")
    (folder / "a.jsonl").write_text("".join(lines))
    parts = Parts(folder, tmp_path / "out")
    parts.start(2)
    assert [code for code, _ in parts.end()] == [0, 0]
    found = tree(tmp_path / "out")
    assert {name: found[name] for name in found if name.endswith(".bin")} == {
        name: expected[name] for name in expected if name.endswith(".bin")
    }


def test_a_note_of_an_error_ends_the_work_at_hand(
    big: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.0)
    work = tmp_path / "out" / ".work"

    def note(_: Any) -> None:
        (work / "failed-other").write_text("x.jsonl:7: no text")

    with pytest.raises(DataError, match=r"^x\.jsonl:7: no text$"):
        run(big, tmp_path / "out", "shared", 1, progress=note)
    assert not list(work.glob("*/*.json"))
    assert [path.name for path in work.glob("failed-*")] == ["failed-other"], "who was told does not tell"
    assert tree(run(big, tmp_path / "out", "shared", 1).path) == expected, "an older one says nothing of this one"


def test_a_folder_is_held_by_one_kind_of_preparation(big: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(DataError, match="another process is preparing it"):
        run(big, tmp_path / "out", "shared", 1)
    with locked(tmp_path / "out", shared=True), pytest.raises(DataError, match="another process is preparing it"):
        run(big, tmp_path / "out", "local", 1)
    assert not (tmp_path / "out" / ".work").exists()


def test_what_is_there_is_left_alone(big: Path, tmp_path: Path) -> None:
    assert not run(big, tmp_path / "out", "shared", 2).skipped
    before = tree(tmp_path / "out")
    (tmp_path / "out" / ".work" / "workers").mkdir(parents=True)  # of one that was killed at its end
    assert run(big, tmp_path / "out", "shared", 2).skipped
    assert tree(tmp_path / "out") == before
    assert not (tmp_path / "out" / ".work").exists()


def test_between_the_two_splits_the_tokens_of_both_are_kept(
    big: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is late, or begins again, finds one split made and the other not."""
    from paralm_data import preparation

    original = preparation.StoreWriter

    def fails(path: Path, *arguments: Any) -> Any:
        if path.name == "held_out":
            raise KeyboardInterrupt
        return original(path, *arguments)

    monkeypatch.setattr(preparation, "StoreWriter", fails)
    with pytest.raises(KeyboardInterrupt):
        run(big, tmp_path / "out", "local", 1)
    assert (tmp_path / "out" / "train").exists()
    monkeypatch.setattr(preparation, "StoreWriter", original)
    again = Counting()
    run(big, tmp_path / "out", again, 1, validation={})
    assert again.ran == {}
    assert tree(run(big, tmp_path / "out", "local", 1).path) == expected


def test_a_mixture_is_shared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.05)
    sources: dict[str, SourceSpec | Path] = {}
    for name, seeds in (("one", range(80)), ("two", range(200, 250))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": sentences(seed, 1 + seed % 30)}) + "\n" for seed in seeds))
        sources[name] = SourceSpec("jsonl", paths=(str(path),))

    def make(out: str, executor: str) -> None:
        prepare_mixture(sources, SPEC, tmp_path / out, 0.2, execution=Execution(executor, 1, shard_bytes=8_000))

    make("expected", "local")
    errors: list[BaseException] = []

    def share() -> None:
        try:
            make("out", "shared")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=share) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert not list((tmp_path / "out").rglob(".work"))


def test_a_heartbeat_that_cannot_beat_is_one_line(big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heartbeat.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(claims, "_HEARTBEAT", tmp_path / "heartbeat.py")
    with pytest.raises(DataError, match="the heartbeat of this process ended with code 3, 3 times"):
        run(big, tmp_path / "out", "shared", 1)
