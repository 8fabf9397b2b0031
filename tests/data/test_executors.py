"""A preparation gives the same bytes whoever does the work, in however many pieces, and however often it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from paralm_data import DataError, Progress, SourceSpec, TokenizerSpec, TokenStore, prepare
from paralm_data.executors import ATTEMPTS, Event, Task, local
from paralm_data.executors.local import LocalExecutor
from paralm_data.preparation import Execution, Prepared
from paralm_data.split import digest, is_held_out
from paralm_data.steps import LengthRule, MinHashRule, StepsSpec

from tests.conftest import ran_alone, tree
from tests.data.conftest import WORDS, sentences

SPEC = TokenizerSpec(vocab_size=400, sample_bytes=60_000)
STEPS = StepsSpec(normalize="nfc", length=LengthRule(30), minhash=MinHashRule(enabled=True), shuffle="shards")
SHARD_BYTES = 20_000
SCRIPT = """
import sys
from pathlib import Path
from tests.data.test_executors import run
run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
"""


def corpus_texts() -> list[str]:
    """Documents of 3 to 60 lines; some occur again, some again with one word changed, some are short or empty."""
    draw = random.Random(11)
    made = ["\n".join(" ".join(draw.choices(WORDS, k=9)) for _ in range(draw.randint(3, 60))) for _ in range(150)]
    made += draw.sample(made, 20)
    made += [text.replace(" ", " ba ", 1) for text in draw.sample(made[:150], 15) if len(text) > 1500]
    made += ["", "short", "e\u0301 decomposed " + "x " * 20, "é decomposed " + "x " * 20]
    draw.shuffle(made)
    return made


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files: a plain one of many shards, a compressed one, and one without records."""
    import gzip

    folder = tmp_path_factory.mktemp("big")
    lines = [json.dumps({"text": text}) + "\n" for text in corpus_texts()]
    (folder / "a.jsonl").write_text("".join(lines[:140]))
    for name in ("b.jsonl.gz", ".whole.jsonl.gz"):  # hidden: not of the source
        (folder / name).write_bytes(gzip.compress("".join(lines[140:]).encode(), mtime=0))
    (folder / "c.jsonl").write_text("\n")
    return folder


def run(folder: Path, out: Path, executor: str | LocalExecutor, workers: int, **changes: Any) -> Prepared:
    """The preparation that every test here makes."""
    source = SourceSpec("jsonl", paths=(str(folder),))
    asked: dict[str, Any] = {
        "steps": STEPS, "execution": Execution(executor, workers, shard_bytes=SHARD_BYTES),
        "validation": {"whole": SourceSpec("jsonl", paths=(str(folder / ".whole.jsonl.gz"),))}, **changes,
    }  # fmt: skip
    return prepare(source, SPEC, out, 0.2, **asked)


@pytest.fixture(scope="module")
def expected(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of one process."""
    return tree(run(big, tmp_path_factory.mktemp("expected") / "out", "local", 1).path)


def command(big: Path, out: Path, executor: str, workers: int) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(big), str(out), executor, str(workers)]


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "data_pipeline"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def documents_of(store: TokenStore, prepared: Prepared) -> list[str]:
    return [prepared.tokenizer.decode(store.document(i)) for i in range(store.n_documents)]


def test_nothing_is_lost_and_nothing_is_there_twice(big: Path, tmp_path: Path) -> None:
    """By count and by text, against a plain loop over the documents."""
    steps = StepsSpec(normalize="nfc", length=LengthRule(30), shuffle="shards")
    result = run(big, tmp_path / "out", "local", 2, steps=steps)
    wanted = dict.fromkeys(unicodedata.normalize("NFC", text) for text in corpus_texts())
    wanted = {text: None for text in wanted if len(text) >= 30}
    for store, held_out in ((result.train, False), (result.held_out, True)):
        found = documents_of(store, result)
        assert sorted(found) == sorted(text for text in wanted if is_held_out(digest(text), 0.2) == held_out)
        TokenStore.open(store.path, verify="full")
    counts = result.counts
    assert counts is not None
    assert (counts.read, counts.empty, counts.rules) == (len(corpus_texts()), 1, {"length": 1})
    assert counts.kept == len(wanted)
    assert counts.duplicates == len(corpus_texts()) - 2 - len(wanted)


@pytest.mark.parametrize("workers", [2, 4])
def test_processes_give_the_same_bytes(big: Path, expected: dict[str, str], tmp_path: Path, workers: int) -> None:
    assert tree(run(big, tmp_path / "out", "local", workers).path) == expected
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["source"]["steps"] == {**STEPS.as_dict(), "shard_bytes": SHARD_BYTES}


def test_how_the_input_is_cut_decides_no_document(big: Path, tmp_path: Path) -> None:
    steps = StepsSpec(minhash=MinHashRule(enabled=True))
    trees = []
    for number, shard_bytes in enumerate((3_000, 50_000, 1 << 30)):
        execution = Execution(shard_bytes=shard_bytes)
        trees.append(tree(run(big, tmp_path / str(number), "local", 1, steps=steps, execution=execution).path))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.slow
def test_ray_gives_the_same_bytes_and_survives_the_loss_of_a_worker(
    big: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ran_alone(__file__, "test_ray_gives_the_same_bytes_and_survives_the_loss_of_a_worker"):
        return
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # which lets Ray keep to the loopback
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("paralm_data.progress.Meter.EVERY", 0.0)
    import ray

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False,
        configure_logging=False, runtime_env={"env_vars": {"PYTHONPATH": environment()["PYTHONPATH"]}},
    )  # fmt: skip
    try:
        killed: list[int] = []

        def kill_one(step: Progress) -> None:
            killed.extend(kill_below("ray::paralm") if not killed else [])

        for workers in (1, 2, 4):
            out = tmp_path / str(workers)
            progress = kill_one if workers == 2 else None
            assert tree(run(big, out, "ray", workers, progress=progress).path) == expected
        assert killed
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mpi_ranks_give_the_same_bytes_also_after_a_kill(
    big: Path, expected: dict[str, str], tmp_path: Path, ranks: int
) -> None:
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), "--allow-run-as-root", "--oversubscribe"]
    whole = [*mpirun, *command(big, tmp_path / "out", "mpi", ranks)]
    if ranks == 2:
        first = subprocess.Popen(whole, env=environment(), stderr=subprocess.DEVNULL)
        wait_for(lambda: any((tmp_path / "out" / ".work").glob("scan-*/*.json")), first)
        leader = [p for p in psutil.Process(first.pid).children(recursive=True) if p.cmdline()[1:2] == ["-c"]]
        leader[0].kill()
        assert first.wait(timeout=60) != 0
    done = subprocess.run(whole, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == expected


def kill_below(word: str) -> list[int]:
    """Kill one process below this one that has ``word`` in its command line; its number, if there is one."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any(word in part for part in process.cmdline()):
                process.kill()
                return [process.pid]
    return []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    limit = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    big: Path, expected: dict[str, str], tmp_path: Path, seed: int
) -> None:
    """The driver is killed when a random number of tasks more are done; a worker is killed in between."""
    draw, out = random.Random(seed), tmp_path / "out"
    done = 0
    for _ in range(4):
        process = subprocess.Popen(command(big, out, "local", 2), env=environment())
        wanted = done + draw.randint(1, 12)
        wait_for(lambda: len(list(out.glob(".work/*/*.json"))) >= wanted, process)  # noqa: B023
        workers = [p for p in psutil.Process(process.pid).children() if "paralm_data.executors.worker" in p.cmdline()]
        if workers and draw.random() < 0.5:
            draw.choice(workers).kill()
            time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive, "workers end with their driver"
        for name in ("train", "held_out"):
            if (out / name).exists():
                TokenStore.open(out / name, verify="full")
        found = len(list(out.glob(".work/*/*.json")))
        assert found >= done or not (out / ".work").exists(), "what is done stays done"
        done = found
    subprocess.run(command(big, out, "local", 2), env=environment(), check=True, timeout=120)
    assert tree(out) == expected


class Counting(LocalExecutor):
    """Counts the tasks it ran, by kind, and stops after so many of one kind."""

    def __init__(self, kind: str = "", stop_after: int = -1) -> None:
        super().__init__(1)
        self.ran: dict[str, int] = {}
        self.kind, self.left = kind, stop_after

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        for event in super().run(tasks):
            if event.result is not None:
                name = type(tasks[event.task]).__name__
                self.ran[name] = self.ran.get(name, 0) + 1
                self.left -= name == self.kind
                if self.left == 0:
                    raise KeyboardInterrupt
            yield event


@pytest.mark.parametrize("kind", ["Scan", "Partition", "Choose", "Draw", "Tokenize"])
def test_only_what_is_missing_is_done_again(big: Path, expected: dict[str, str], tmp_path: Path, kind: str) -> None:
    whole = Counting()
    run(big, tmp_path / "whole", whole, 1)
    first, second = Counting(kind, 1), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(big, tmp_path / "out", first, 1)
    run(big, tmp_path / "out", second, 1)
    assert {name: first.ran.get(name, 0) + second.ran.get(name, 0) for name in whole.ran} == whole.ran
    assert whole.ran["Tokenize"] > 5
    assert tree(tmp_path / "out") == expected


def test_a_changed_file_is_read_again_and_the_others_are_not(big: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        texts = [sentences(1000 * (name == "b") + i, 12) for i in range(100)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    first = Counting("Tokenize", 1)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", first, 1, validation={})
    with (folder / "b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more " * 20}) + "\n")
    second = Counting()
    result = run(folder, tmp_path / "out", second, 1, validation={})
    assert second.ran["Scan"] == first.ran["Scan"] // 2
    assert any(
        "one more" in text for text in [*documents_of(result.train, result), *documents_of(result.held_out, result)]
    )


class _Poison:
    """A task that takes its worker with it."""

    label, weight = "poison.jsonl", 1.0
    marker = Path("/nonexistent")

    def run(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        yield


def test_a_task_that_always_ends_its_worker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    with LocalExecutor(2) as executor, pytest.raises(DataError) as caught:
        list(executor.run([_Poison(), _Poison()]))  # type: ignore[list-item]
    assert f"poison.jsonl: the worker was ended by SIGKILL, {ATTEMPTS} times" in str(caught.value)
    assert "\n" not in str(caught.value)


class _Nothing:
    """A task that is done at once."""

    label, weight = "nothing", 1.0
    marker = Path("/nonexistent")

    def run(self) -> Any:
        yield from ()
        return {"pid": os.getpid()}


@pytest.mark.parametrize("known", [True, False])
def test_workers_that_died_between_two_stages_are_replaced(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """All of them; ``known``: whether the system says so before they are given a task."""
    original = local.wait

    def wait(connections: list[Any]) -> list[Any]:
        assert connections, "there is no one to wait for, so it would be for ever"
        return original(connections)

    monkeypatch.setattr(local, "wait", wait)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    tasks: list[Any] = [_Nothing() for _ in range(4)]
    with LocalExecutor(2) as executor:
        assert len([event for event in executor.run(tasks) if event.result]) == 4
        dead = list(executor._workers)
        assert dead
        for worker in dead:
            worker.process.kill()
            worker.process.wait()
            if not known:
                monkeypatch.setattr(worker.process, "poll", lambda: None)
        pids = [event.result["pid"] for event in executor.run(tasks) if event.result]
        assert len(pids) == 4
        assert not {worker.process.pid for worker in dead} & set(pids)


def test_an_error_of_a_worker_is_the_error_of_the_call(big: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", ".whole.jsonl.gz"):
        (tmp_path / "in" / name).write_bytes((big / name).read_bytes())
    bad = tmp_path / "in" / "a.jsonl"
    lines = bad.read_text().splitlines(keepends=True)
    bad.write_text("".join([*lines[:77], '{"text": 3}\n', *lines[77:]]))
    with pytest.raises(DataError, match=r"a.jsonl:78: 'text' is a int, not text$"):
        run(tmp_path / "in", tmp_path / "out", "local", 2)


def test_an_unknown_executor_and_no_workers_are_one_line(big: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"executor 'slurm' is unknown \(one of: local, shared, ray, mpi\)"):
        run(big, tmp_path / "out", "slurm", 1)
    with pytest.raises(DataError, match="workers is 0"):
        run(big, tmp_path / "out", "local", 0)
    with pytest.raises(DataError, match="ray needs a cluster"):
        run(big, tmp_path / "out", "ray", 1)


def test_damaged_work_in_progress_is_found(big: Path, expected: dict[str, str], tmp_path: Path) -> None:
    class AtTheEnd(Counting):
        def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
            yield from super().run(tasks)
            if any(type(task).__name__ == "Tokenize" for task in tasks):
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(big, out, AtTheEnd(), 1)
    for ending, what in (("bytes", "entries"), ("lengths", "entries"), ("tokens", "tokens")):
        victim = max(out.glob(f".work/tokenize-*/*.train.{ending}"), key=lambda path: path.stat().st_size)
        whole = victim.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
        with pytest.raises(DataError, match=rf"\.{ending}: damaged: not the \d+ {what} that were written; remove"):
            run(big, out, "local", 1)
        if ending != "tokens":
            victim.write_bytes(whole)
    for path in victim.parent.iterdir():
        path.unlink()
    assert tree(run(big, out, "local", 1).path) == expected


def test_srun_without_mpi_is_one_line_and_not_as_many_preparations() -> None:
    code = "from paralm_data.executors import make_executor\nmake_executor('mpi')"
    started = {**environment(), "SLURM_STEP_NUM_TASKS": "4"}
    started = {key: value for key, value in started.items() if not key.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    done = subprocess.run([sys.executable, "-c", code], env=started, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("paralm_data.errors.DataError: srun started 4 tasks, and MPI sees one: srun needs --mpi=")


@pytest.mark.parametrize(("name", "module"), [("mpi", "mpi4py"), ("ray", "ray")])
def test_an_executor_that_is_not_installed_is_one_line(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"data\.executor: {name} needs .*; install paralm\[{name}\]"):
        run(big, tmp_path / "out", name, 1)
    assert not (tmp_path / "out").exists()
