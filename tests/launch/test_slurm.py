"""A real SLURM of two nodes: training by 'paralm submit slurm' and by hand, on Ray, in a pipeline with an evaluation
array, through preemption, cancellation and two time limits. Each run must have the losses of an undisturbed one.

Where there is no SLURM these tests are skipped, but not under CI=true: there that is a failure.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from paralm_launch.cluster import records

from paralm import resources
from tests.conftest import settings
from tests.launch.launching import STEPS, losses
from tests.launch.slurm_cluster import SlurmCluster, missing

# In the first two starts of a job, every rank waits in its step after the first FREE until it is asked to stop.
HELD = """
import os, time
from pathlib import Path
from paralm.training import control
from paralm.training.step import Stepper

HERE, START, RANK = Path(__file__).parent, int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ.get("RANK")
run, enter = Stepper.run, control.Control.__enter__
current, steps = [], []

def held(self, *args, **kwargs):
    steps.append(1)
    if START < 2 and len(steps) > FREE:
        (HERE / f"waits-{START}-{RANK}").touch()
        deadline = time.monotonic() + 150
        while current[-1].stop_signal is None and time.monotonic() < deadline:
            time.sleep(0.05)
        (HERE / f"asked-{START}-{RANK}-{current[-1].stop_signal}").touch()
    return run(self, *args, **kwargs)

def entered(self):
    current.append(self)
    return enter(self)

Stepper.run, control.Control.__enter__ = held, entered
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    reason = missing()
    if reason is not None:
        assert os.environ.get("CI") != "true", f"{reason}; .ci/run installs them"
        pytest.skip(reason)
    home = tmp_path_factory.mktemp("home")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as made:
        made.environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1"}
        made.environment["RAY_worker_niceness"] = "0"  # of 15, Ray's default, a busy machine leaves nothing
        made.environment["PATH"] = f"{Path(sys.executable).parent}:{made.environment['PATH']}"
        yield made


def write_run(folder: Path, corpus: Path, prepared: Path | None, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    sections.setdefault("training", {"max_steps": STEPS})
    made = settings(corpus, prepared, folder, checkpoint={"every": 4}, **sections)
    made["cluster"] = {"cpus_per_rank": 1, "prepare": {"cpus": 1}, "evaluate": {"cpus": 1}, **made.get("cluster", {})}
    (folder / "run.yaml").write_text(yaml.safe_dump(made))
    return folder


def paralm(cluster: SlurmCluster, folder: Path, *arguments: str) -> str:
    return cluster.run(sys.executable, "-m", "paralm_launch", *arguments, cwd=folder).stdout


def submitted(folder: Path) -> dict[str, records.Job]:
    return {job.name: job for job in records.jobs_of(folder / "tiny")}


@pytest.fixture(scope="module")
def limited(
    cluster: SlurmCluster, corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A job of two ranks and one minute, which its third start makes thirty; the other tests go on beside it."""
    longer = '[ "${SLURM_RESTART_COUNT:-0}" -lt 2 ] || scontrol update "JobId=$SLURM_JOB_ID" TimeLimit=30'
    asked = {"time": "1", "signal_seconds": 40, "ranks_per_node": 2, "sbatch": ["--nodelist=node1"], "setup": [longer]}
    folder = write_run(tmp_path_factory.mktemp("limited"), corpus, prepared, cluster=asked)
    (folder / "held.py").write_text(HELD.replace("FREE", "0"))
    paralm(cluster, folder, "submit", "slurm", "run.yaml", "imports=[held.py]")
    return folder, submitted(folder)["train"].id


def test_two_nodes_by_submit_and_by_hand_at_the_same_time(
    cluster: SlurmCluster,
    limited: tuple[Path, str],
    corpus: Path,
    prepared: Path,
    reference: list[float],
    tmp_path: Path,
) -> None:
    write_run(tmp_path, corpus, prepared, cluster={"nodes": 2})
    refused = cluster.run(
        *(sys.executable, "-m", "paralm_launch", "submit", "slurm", "run.yaml", "cluster.partition=nope"),
        cwd=tmp_path,
        check=False,
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: SLURM: invalid partition specified: nope")
    assert refused.stderr.count("\n") == 1
    shutil.copy(resources.find("slurm/train.sbatch"), tmp_path)
    text = (tmp_path / "train.sbatch").read_text().replace("#SBATCH --gpus-per-node", "##SBATCH --gpus-per-node")
    (tmp_path / "train.sbatch").write_text(text.replace("--cpus-per-task=64", "--cpus-per-task=1 "))
    by_hand = cluster.run(
        "sbatch", "--parsable", "train.sbatch", "run.yaml", "run.name=hand", cwd=tmp_path
    ).stdout.strip()
    said = paralm(cluster, tmp_path, "submit", "slurm", "run.yaml", "--follow")
    job = submitted(tmp_path)["train"]
    assert f"submitted: train, job {job.id}" in said
    assert f"training: {STEPS} steps" in said
    assert said.endswith(f"job {job.id} (train): COMPLETED\n")
    cluster.wait(by_hand, log=tmp_path / f"paralm-{by_hand}.log")
    for name in ("tiny", "hand"):
        assert losses(tmp_path / name) == pytest.approx(reference, rel=1e-5)
        assert (tmp_path / name / "checkpoints" / f"step_{STEPS:08d}").is_dir()
    for name in (job.id, by_hand):
        assert cluster.left_over(name) == []
        assert not list(Path("/tmp").glob(f"paralm-{name}.*"))
    shown = paralm(cluster, tmp_path, "status", job.id, "--root", ".")
    assert f"step {STEPS} of {STEPS}" in shown
    assert "COMPLETED" in shown
    assert "training: 40 steps" in paralm(cluster, tmp_path, "logs", "tiny", "--root", ".")


def test_prepare_train_and_an_evaluation_array_one_after_the_other(
    cluster: SlurmCluster, corpus: Path, tmp_path: Path
) -> None:
    write_run(
        tmp_path,
        corpus,
        None,
        training={"max_steps": 3},
        cluster={"evaluate": {"cpus": 1, "tasks": 2, "what": ["perplexity max_tokens=4000 parts=4"]}},
    )
    said = paralm(cluster, tmp_path, "submit", "slurm", "run.yaml", "--pipeline")
    jobs = submitted(tmp_path)
    assert list(jobs) == ["prepare", "train", "evaluate-perplexity"]
    assert f"evaluate-perplexity, job {jobs['evaluate-perplexity'].id}, 2 tasks, after {jobs['train'].id}" in said
    assert cluster.state(jobs["train"].id) == "PENDING"
    cluster.wait(jobs["evaluate-perplexity"].id, log=jobs["train"].file(".log"))
    ends = [job.events()[-1] for job in jobs.values()]
    assert all(end.endswith("end code=0") for end in ends)
    starts = [
        next(line for line in jobs[name].events() if " start " in line) for name in ("train", "evaluate-perplexity")
    ]
    assert ends[0][:24] <= starts[0][:24]
    assert ends[1][:24] <= starts[1][:24]
    logs = [path.read_text() for path in jobs["evaluate-perplexity"].logs()]
    assert len(logs) == 2
    assert all("pieces measured" in log and " 0 pieces measured" not in log for log in logs), "each task did its share"
    assert sum("report:" in log for log in logs) >= 1
    assert (tmp_path / "tiny" / "eval" / "perplexity.json").is_file()


def test_preparation_and_evaluation_begin_again_after_the_limit(cluster: SlurmCluster, tmp_path: Path) -> None:
    """With a command in place of paralm that the first start never ends. SLURM's own TERM, which follows a requeue,
    always finds scontrol at work here."""
    start = "${SLURM_RESTART_COUNT:-0}"
    scontrol = shutil.which("scontrol", path=cluster.environment["PATH"])
    for name, lines in {
        "paralm": (f'echo "{start} $*" >>calls', f"[ {start} -gt 0 ] || exec sleep 100"),
        "scontrol": (f'{scontrol} "$@"; code=$?', "kill -TERM $$", "exit $code"),
    }.items():
        (tmp_path / name).write_text("\n".join(("#!/bin/bash", *lines, "")))
        (tmp_path / name).chmod(0o755)
    first = ("--parsable", f"--export=ALL,PATH={tmp_path}:{cluster.environment['PATH']}", "--cpus-per-task=1")
    jobs = []
    array = ("--array=0-1",)
    for more, name, arguments in (
        ((), "prepare", ("x.yaml",)),
        (array, "prepare", ("y.yaml",)),
        (array, "eval", ("capacity", "runs/x")),
    ):
        text = resources.find(f"slurm/{name}.sbatch").read_text()
        text = text.replace("#SBATCH --gpus-per-node", "##SBATCH --gpus-per-node")
        (tmp_path / name).write_text(text.replace("events=/dev/null", "events=events"))
        jobs.append(cluster.run("sbatch", *first, *more, name, *arguments, cwd=tmp_path).stdout.strip())
    calls = tmp_path / "calls"
    wait_for(lambda: calls.exists() and len(calls.read_text().splitlines()) == 5)
    for job in jobs:
        cluster.run("scancel", "--signal=USR1", "--batch", job)
    for job in jobs:
        cluster.wait_until_requeued(job)
        cluster.wait(job)
    kinds = Counter(tuple(line.split()[2:4]) for line in (tmp_path / "events").read_text().splitlines())
    assert kinds == {(f"restarts={n}", kind): 5 for n, kind in ((0, "start"), (0, "requeue"), (1, "start"), (1, "end"))}
    assert sorted(calls.read_text().splitlines()) == [
        *["0 data prepare x.yaml data.executor=local data.workers=1"],
        *["0 data prepare y.yaml data.executor=shared data.workers=1"] * 2,
        *["0 eval capacity runs/x --part array"] * 2,
        *["1 data prepare x.yaml data.executor=local data.workers=1"],
        *["1 data prepare y.yaml data.executor=shared data.workers=1"] * 2,
        *["1 eval capacity runs/x --part array"] * 2,
    ]


def test_ray_in_an_allocation_begins_and_ends_with_the_job(
    cluster: SlurmCluster,
    corpus: Path,
    prepared: Path,
    reference: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_run(tmp_path, corpus, prepared, cluster={"nodes": 2, "start": "ray"})
    monkeypatch.setitem(cluster.environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as a Ray of one machine has it
    paralm(cluster, tmp_path, "submit", "slurm", "run.yaml")
    job = submitted(tmp_path)["train"]
    cluster.wait(job.id, log=job.file(".log"), patience=400)
    assert losses(tmp_path / "tiny") == pytest.approx(reference, rel=1e-5)
    assert cluster.left_over(job.id) == []
    assert not list(Path("/tmp").glob(f"paralm-{job.id}.*"))


def test_preempted_it_goes_on_and_cancelled_it_stays_so(
    cluster: SlurmCluster, corpus: Path, prepared: Path, reference: list[float], tmp_path: Path
) -> None:
    """Both save first. Another submission of the cancelled run goes on to the end."""
    write_run(tmp_path, corpus, prepared, cluster={"sbatch": ["--nodelist=node2"]})
    (tmp_path / "held.py").write_text(HELD.replace("FREE", "2"))
    paralm(cluster, tmp_path, "submit", "slurm", "run.yaml", "imports=[held.py]")
    first = submitted(tmp_path)["train"]
    wait_for((tmp_path / "waits-0-0").exists)
    urgent = ("sbatch", "--parsable", "--partition=urgent", "--nodelist=node2", "--exclusive", "--wrap=sleep 1")
    cluster.run(*urgent, cwd=tmp_path)
    wait_for((tmp_path / "waits-1-0").exists)
    assert cluster.restarts(first.id) == 1
    seen = len(losses(tmp_path / "tiny"))
    assert f"cancelled: {first.id} (train of tiny)" in paralm(cluster, tmp_path, "cancel", "tiny", "--root", ".")
    cluster.wait(first.id, "CANCELLED")
    assert cluster.left_over(first.id) == []
    assert len(losses(tmp_path / "tiny")) == seen + 1, "the step in hand was finished and saved"
    assert (tmp_path / "tiny" / "checkpoints" / f"step_{seen + 1:08d}").is_dir()
    time.sleep(2)
    assert cluster.state(first.id) == "CANCELLED", "it does not queue itself again"
    paralm(cluster, tmp_path, "submit", "slurm", "run.yaml")
    second = records.jobs_of(tmp_path / "tiny")[-1]
    cluster.wait(second.id, log=second.file(".log"))
    assert losses(tmp_path / "tiny") == pytest.approx(reference, rel=1e-5)


def test_a_job_that_meets_its_time_limit_twice_has_the_losses_of_an_undisturbed_run(
    cluster: SlurmCluster, limited: tuple[Path, str], reference: list[float]
) -> None:
    folder, job = limited
    said = paralm(cluster, folder, "logs", job, "--follow", "--root", ".")
    assert said.count("error: stopped by SIGUSR1 at step") == 2
    assert f"training: {STEPS} steps" in said
    assert said.endswith(f"job {job} (train): COMPLETED\n")
    assert cluster.restarts(job) == 2
    events = submitted(folder)["train"].events()
    kinds = [line.split()[3] for line in events]
    assert kinds == ["start", "requeue", "start", "requeue", "start", "end"]
    asked = sorted(path.name for path in folder.glob("asked-*"))
    assert asked == ["asked-0-0-10", "asked-0-1-10", "asked-1-0-10", "asked-1-1-10"], "USR1, at every rank, twice"
    assert losses(folder / "tiny") == pytest.approx(reference, rel=1e-5)
    assert "requeued 2×" in paralm(cluster, folder, "status", "tiny", "--root", ".")


def wait_for(condition: Callable[[], bool], patience: float = 400.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
