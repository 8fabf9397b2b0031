"""Preparation on the nodes of a real SLURM: arrays whose tasks share the work, die and are put back, and MPI ranks; all
with the bytes that one process makes. Skipped as test_slurm.py is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from paralm_launch import cli

from paralm import resources
from tests.conftest import tree
from tests.launch.slurm_cluster import SlurmCluster
from tests.launch.test_slurm import cluster as cluster
from tests.launch.test_slurm import paralm, submitted, wait_for, write_run

pytestmark = pytest.mark.slow

DATA = {"shard_bytes": 8000, "steps": {"shuffle": "shards", "exact_duplicates": "drop"}}

# 'paralm' with tasks that take a while and are noted with the node and the array's task; a short silence is death.
SLOW = """
import os, socket, time
from pathlib import Path
from paralm_data.executors import claims
from paralm_data.scanning import Scan
from paralm_data.tokenizing import Tokenize

claims.SILENT_SECONDS, claims.BEAT_SECONDS, claims.POLL_SECONDS = 5.0, 0.2, 0.2
NAME = f"done-{os.environ['SLURM_ARRAY_TASK_ID']}-{socket.gethostname()}-{os.getpid()}"

def slow(original):
    def run(self):
        time.sleep(0.5)
        result = yield from original(self)
        with (Path(__file__).parent / NAME).open("a") as file:
            file.write(f"{self.marker}\\n")
        return result
    return run

Scan.run, Tokenize.run = slow(Scan.run), slow(Tokenize.run)
from paralm_launch.cli import main
main()
"""


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes."""
    folder = write_run(tmp_path_factory.mktemp("expected"), corpus, None, data=DATA)
    out = folder / "out"
    assert cli.run(["data", "prepare", str(folder / "run.yaml"), "data.workers=1", f"data.dir={out}"]) == 0
    return tree(out)


def slowly(folder: Path) -> str:
    """A line of a script that makes ``paralm`` slow, one process."""
    (folder / "slow.py").write_text(SLOW)
    return f'paralm() {{ exec python3 {folder}/slow.py "$@"; }}'


def done(folder: Path) -> dict[str, list[str]]:
    """What each process has done, by its name."""
    return {path.name: path.read_text().split() for path in folder.glob("done-*")}


def processes(folder: Path, task: int) -> dict[str, psutil.Process]:
    """The script of a task of the array that was submitted from a folder, its 'paralm', and the heartbeat of that. The
    clusters of other tests have tasks of that number too."""
    found = {}
    for process in psutil.process_iter():
        try:
            given = process.environ()
            mine = (given.get("SLURM_SUBMIT_DIR"), given.get("SLURM_ARRAY_TASK_ID")) == (str(folder), str(task))
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for name in ("slurm_script", "slow.py", "heartbeat.py"):
            if mine and name in line:
                found[name] = process
    return found


def test_an_array_in_a_pipeline_shares_the_work_and_a_task_whose_process_is_killed_goes_on(
    cluster: SlurmCluster, corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    asked = {"setup": [slowly(tmp_path)], "prepare": {"cpus": 1, "tasks": 3, "memory": "3500"}}
    write_run(tmp_path, corpus, None, data=DATA, training={"max_steps": 3}, cluster=asked)
    said = paralm(
        cluster, tmp_path, "submit", "slurm", "run.yaml", "--stage", "prepare", "--stage", "train",
    )  # fmt: skip
    jobs = submitted(tmp_path)
    assert f"submitted: prepare, job {jobs['prepare'].id}, 3 tasks" in said
    wait_for(lambda: len(done(tmp_path)) == 3)
    processes(tmp_path, 1)["slow.py"].kill()
    assert cluster.state(jobs["train"].id) == "PENDING"
    cluster.wait(jobs["train"].id, log=jobs["train"].file(".log"))
    assert cluster.state(jobs["prepare"].id) == "COMPLETED"
    check(tmp_path, tmp_path / "tiny" / "data", expected)
    kinds = [line.split()[3] for line in jobs["prepare"].events()]
    assert sorted(kinds) == ["end"] * 3 + ["killed"] + ["start"] * 3
    started = next(line for line in jobs["train"].events() if " start " in line)
    assert max(line[:24] for line in jobs["prepare"].events()) <= started[:24]
    assert {name.split("-")[2] for name in done(tmp_path)} == {"node1", "node2"}


def check(folder: Path, out: Path, expected: dict[str, str]) -> None:
    """The bytes are those of one process, and nothing that was done was done again."""
    assert tree(out) == expected
    markers = [marker for each in done(folder).values() for marker in each]
    assert len(markers) == len(set(markers)) >= 20


def test_by_hand_an_array_of_which_a_task_is_lost_with_all_it_had_ends_all_the_same(
    cluster: SlurmCluster, corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """As with its node: its heartbeat says no more, and the two others do not know why. One of them is requeued."""
    write_run(tmp_path, corpus, None, data=DATA)
    text = resources.find("slurm/prepare.sbatch").read_text()
    text = text.replace("--cpus-per-task=16", "--cpus-per-task=1 --mem=3500")
    (tmp_path / "prepare.sbatch").write_text(text.replace("# source /path", f"{slowly(tmp_path)}\n# source /path"))
    options = ("--parsable", "--array=0-2", "--time=10")
    job = cluster.run("sbatch", *options, "prepare.sbatch", "run.yaml", cwd=tmp_path).stdout.strip()
    wait_for(lambda: len(done(tmp_path)) == 3)
    lost = processes(tmp_path, 1)
    for name in ("heartbeat.py", "slurm_script", "slow.py"):
        lost[name].kill()
    cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_2")
    cluster.wait_until_requeued(f"{job}_2")
    for task in (0, 2):
        cluster.wait(f"{job}_{task}")
    assert cluster.restarts(f"{job}_0") == 0, "only the task that was told is put back, though its id is the array's"
    assert cluster.state(f"{job}_1") == "FAILED"
    check(tmp_path, tmp_path / "tiny" / "data", expected)
    assert cluster.left_over() == []


def test_one_task_of_an_array_is_enough(
    cluster: SlurmCluster, corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """The others begin when all is there, and find it so."""
    asked = {"prepare": {"cpus": 1, "tasks": 3, "at_once": 1}}
    write_run(tmp_path, corpus, None, data=DATA, cluster=asked)
    paralm(cluster, tmp_path, "submit", "slurm", "run.yaml", "--stage", "prepare")
    job = submitted(tmp_path)["prepare"]
    cluster.wait(job.id)
    assert tree(tmp_path / "tiny" / "data") == expected
    said = [path.read_text() for path in job.logs()]
    assert sorted("already prepared" in text for text in said) == [False, True, True]


def test_mpi_ranks_on_two_nodes(cluster: SlurmCluster, corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    sections: dict[str, Any] = {"data": DATA, "launcher": {"mpirun": ["--display", "map"]}}
    write_run(tmp_path, corpus, None, cluster={"prepare": {"cpus": 2, "nodes": 2}}, **sections)
    paralm(cluster, tmp_path, "submit", "slurm", "run.yaml", "--stage", "prepare")
    job = submitted(tmp_path)["prepare"]
    cluster.wait(job.id, log=job.file(".log"))
    assert tree(tmp_path / "tiny" / "data") == expected
    said = job.file(".log").read_text()
    assert all(f"Data for node: {node}" in said for node in ("node1", "node2")), said
    assert cluster.left_over(job.id) == []
    shutil.rmtree(tmp_path / "tiny" / "data")
