"""Ranks are found in the environment of whatever started the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paralm_launch import discovery
from paralm_launch.discovery import first_host, from_slurm, mpi_size

from paralm.errors import RunError

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08],cpu1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("a-b[3]", "a-b3"),
        ("rack1-n[001-064]-ib", "rack1-n001-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_no_node_list_is_one_line() -> None:
    with pytest.raises(RunError, match="set MASTER_ADDR"):
        first_host("")


def test_a_task_of_srun_is_a_rank() -> None:
    place = from_slurm(STEP)
    assert place is not None
    assert place.environment() == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20000 + 41 + 14),
    }
    own = from_slurm({**STEP, "MASTER_ADDR": "elsewhere", "MASTER_PORT": "29400"})
    assert own is not None
    assert (own.master_addr, own.master_port) == ("elsewhere", 29400)


def test_steps_of_one_job_meet_at_different_ports() -> None:
    ports = {place.master_port for i in range(9) if (place := from_slurm({**STEP, "SLURM_STEP_ID": str(i)}))}
    assert len(ports) == 9


def test_a_batch_script_by_itself_is_no_rank() -> None:
    batch = {key: value for key, value in STEP.items() if not key.startswith("SLURM_STEP")}
    assert from_slurm({**batch, "SLURM_NTASKS": "8"}) is None


def test_mpirun_inside_a_slurm_job_is_mpis() -> None:
    assert from_slurm({**STEP, "OMPI_COMM_WORLD_SIZE": "4"}) is None
    assert mpi_size({"PMI_SIZE": "4"}) == 4
    assert mpi_size(STEP) == 0


def test_what_torchrun_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {**STEP, "RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    discovery.settle()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], "MASTER_ADDR" in os.environ) == ("1", "3", False)
    assert discovery.is_rank()


def test_ranks_under_a_real_mpirun_agree_on_one_address(tmp_path: Path) -> None:
    code = (
        "import os; from paralm_launch.discovery import settle; settle(); "
        "e = os.environ; print(e['RANK'], e['WORLD_SIZE'], e['LOCAL_RANK'], e['MASTER_ADDR'] + ':' + e['MASTER_PORT'])"
    )
    mpirun = Path(sys.executable).parent / "mpirun"
    command = [str(mpirun), "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    rows = sorted(line.split() for line in done.stdout.splitlines())
    assert [row[:3] for row in rows] == [["0", "3", "0"], ["1", "3", "1"], ["2", "3", "2"]]
    assert len({row[3] for row in rows}) == 1
    assert rows[0][3].startswith("127.0.0.1:")
