"""`paralm data prepare` with every executor: one preparation, the same bytes, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from paralm_launch import cli, preparing

from paralm.config import Config
from tests.conftest import tree, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two jsonl files with two bad records, and a configuration."""
    folder = tmp_path_factory.mktemp("prepare")
    texts = [path.read_text() for path in sorted(write_corpus(folder / "text", 120).iterdir())]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join([*lines[:70], "no json"]) + "\n")
    (folder / "b.jsonl").write_text("\n".join([*lines[70:], '{"text": null}']) + "\n")
    config = {
        "run": {"name": "tiny", "root": str(folder / "runs")},
        "data": {
            "source": {"kind": "jsonl", "paths": [str(folder / "a.jsonl"), str(folder / "b.jsonl")]},
            "tokenizer": {"vocab_size": 320}, "held_out_fraction": 0.1, "shard_bytes": 20_000, "max_bad_records": 2,
            "steps": {"normalize": "nfc", "length": {"min_characters": 5}},
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """What one process makes."""
    out = folder / "expected"
    assert cli.run(["data", "prepare", str(folder / "run.yaml"), "data.workers=1", f"data.dir={out}"]) == 0
    return tree(out)


def command(folder: Path, out: Path, *more: str) -> list[str]:
    whole = [sys.executable, "-m", "paralm_launch", "data", "prepare", str(folder / "run.yaml"), f"data.dir={out}"]
    return [*whole, *more]


def run(arguments: list[str], code: int = 0) -> tuple[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_processes_say_how_fast_and_what_was_left_out(
    folder: Path, expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.run(["data", "prepare", str(folder / "run.yaml"), "data.workers=2", f"data.dir={out}"]) == 0
    assert tree(out) == expected
    said = capsys.readouterr().out
    assert f"data: 2 bad records were left out → {out}/quarantine.jsonl" in said
    last = [line for line in said.splitlines() if line.startswith("tokenizing: ")][-1]
    for rate in ("documents/s", "MB/s", "tokens/s"):
        assert rate in last
    listed = [json.loads(line)["place"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert listed == [f"{folder}/a.jsonl:71", f"{folder}/b.jsonl:51"]


def test_one_bad_record_too_many_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", str(folder / "run.yaml"), "data.max_bad_records=1", f"data.dir={tmp_path / 'out'}"]
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}/b.jsonl:51: 'text' is a NoneType, not text; at least 2 bad records, and")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_mpirun_from_outside_and_ranks_of_ones_own(folder: Path, expected: dict[str, str], tmp_path: Path) -> None:
    output, _ = run(command(folder, tmp_path / "one", "data.executor=mpi", "data.workers=2"))
    assert tree(tmp_path / "one") == expected
    assert output.count("data: prepared") == 1
    assert "already prepared" not in output
    assert "\x1b" not in output
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", "2", "--allow-run-as-root", "--oversubscribe"]
    output, _ = run([*mpirun, *command(folder, tmp_path / "two", "data.executor=mpi")])
    assert tree(tmp_path / "two") == expected
    assert output.count("data: prepared") == 1, "one rank speaks"
    output, _ = run([*mpirun, *command(folder, tmp_path / "two", "data.executor=mpi")])
    assert output.count("data: already prepared") == 1


@pytest.mark.slow
def test_a_killed_mpirun_leaves_no_rank_and_the_next_one_goes_on(
    folder: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    whole = command(folder, tmp_path / "out", "data.executor=mpi", "data.workers=2")
    process = subprocess.Popen(whole, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (tmp_path / "out" / ".work").exists() and time.monotonic() < limit:
        time.sleep(0.005)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 3
    process.kill()
    process.wait()
    assert psutil.wait_procs(below, timeout=30)[1] == []
    run(whole)
    assert tree(tmp_path / "out") == expected


def test_processes_that_share_the_folder_may_be_tasks_of_srun(
    folder: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node1"}
    whole = command(folder, tmp_path / "out", "data.executor=shared", "data.workers=2")
    tasks = [
        subprocess.Popen(whole, env={**environment, "SLURM_PROCID": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert all("prepared, vocabulary 320" in text for text in said)
    assert tree(tmp_path / "out") == expected


@pytest.mark.slow
def test_an_error_under_mpirun_is_one_line(folder: Path, tmp_path: Path) -> None:
    _, error = run(
        command(folder, tmp_path / "out", "data.executor=mpi", "data.workers=2", "data.max_bad_records=0"), code=2
    )
    assert error.startswith(f"error: {folder}/")
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob(".prepare-*"))


@pytest.mark.slow
def test_a_ray_cluster_of_ones_own(folder: Path, expected: dict[str, str], tmp_path: Path) -> None:
    run(command(folder, tmp_path / "out", "data.executor=ray", "data.workers=2"))
    assert tree(tmp_path / "out") == expected


def test_a_group_of_ranks_without_the_executor_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["data", "prepare", str(folder / "run.yaml"), f"data.dir={tmp_path / 'out'}"]) == 2
    assert "this command is for one process" in capsys.readouterr().err


def test_which_processes_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate({"data": {"executor": "mpi"}})
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert preparing.needs_mpirun(config)
    assert not preparing.needs_mpirun(Config())
    for name, value in (("OMPI_COMM_WORLD_SIZE", "1"), ("PMI_SIZE", "2"), ("SLURM_STEP_NUM_TASKS", "4")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not preparing.needs_mpirun(config)


def test_steps_are_those_of_the_configuration() -> None:
    from paralm_data import StepsSpec

    assert preparing.steps_of(Config()) == StepsSpec()
    asked: dict[str, Any] = {
        "normalize": "nfkc", "length": {"max_characters": 9}, "language": {"keep": ["en"]}, "quality": ["c4"],
        "exact_duplicates": "keep", "minhash": {"enabled": True, "bands": 3}, "shuffle": "shards",
    }  # fmt: skip
    assert preparing.steps_of(Config.model_validate({"data": {"steps": asked}})).as_dict() == asked


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.executor=slurm", "data.executor"),
        ("data.workers=0", "data.workers"),
        ("data.steps.quality=[gofer]", "data.steps.quality"),
        ("data.steps.length={min_characters: 9, max_characters: 3}", "max_characters 3 is below min_characters 9"),
        ("data.steps.minhashes=1", "data.steps.minhashes"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert cli.run(["data", "prepare", str(folder / "run.yaml"), override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
