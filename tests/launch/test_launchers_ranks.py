"""Every launcher trains the same run: real torchrun, real mpirun, on this machine's loopback.

One undisturbed run in this process is the reference; everything else must have its losses.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from paralm.training.watch import read_note
from tests.conftest import settings
from tests.launch.launching import STEPS, Start, finish, losses, outside_the_loopback, ranks_of, wait_for_step


@pytest.mark.slow
def test_torchrun_starts_lost_ranks_again_and_the_run_is_the_same(
    start: Start, reference: list[float], tmp_path: Path
) -> None:
    """A rank is stopped, so that it answers nobody: the others name it, end, and the run goes on and ends well."""
    process = start("launcher.kind=torchrun", "launcher.ranks=2", "parallel.collective_timeout=6")
    wait_for_step(process, tmp_path / "tiny", 3)
    first = {rank.pid for rank in ranks_of(process)}
    note = read_note(tmp_path / "tiny" / "ranks" / "note_00001.json")
    assert note is not None
    os.kill(note.pid, signal.SIGSTOP)
    output = finish(process)
    assert f"rank 1 ({note.host}) has not finished step" in output
    assert "start 1 of at most 3, from the newest checkpoint" in output
    assert "Traceback" not in output
    assert f"{STEPS} steps" in output
    assert losses(tmp_path / "tiny") == pytest.approx(reference, rel=1e-5)
    assert not any(psutil.pid_exists(pid) for pid in first)
    assert not (tmp_path / "tiny" / "launches").exists()


@pytest.mark.slow
def test_mpirun_from_outside_passes_a_signal_on_and_mpirun_from_inside_continues(
    start: Start, reference: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    outside = start("launcher.kind=mpi", "launcher.ranks=2")
    wait_for_step(outside, run, 2)
    outside.send_signal(signal.SIGTERM)
    output = finish(outside, code=75)
    assert "error: stopped by SIGTERM at step" in output
    assert "Traceback" not in output
    mpirun = str(Path(sys.executable).parent / "mpirun")
    inside = start("launcher.kind=mpi", prefix=(mpirun, "-n", "2", "--allow-run-as-root", "--oversubscribe"))
    output = finish(inside)
    assert output.count(f"training: {STEPS} steps") == 1, "one of the ranks speaks"
    assert losses(run) == pytest.approx(reference, rel=1e-5)


@pytest.mark.slow
def test_ranks_end_with_a_killed_launcher_and_the_next_one_continues(
    start: Start, reference: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    first = start("launcher.kind=torchrun", "launcher.ranks=2")
    wait_for_step(first, run, 3)
    ranks = ranks_of(first)
    assert len(ranks) == 2
    assert not outside_the_loopback([psutil.Process(first.pid), *ranks])
    first.kill()
    first.wait()
    _, left = psutil.wait_procs(ranks, timeout=20)
    assert left == []
    finish(start("launcher.kind=torchrun", "launcher.ranks=1"))
    assert losses(run) == pytest.approx(reference, rel=1e-5)
    assert not (run / "launches").exists(), "what the killed one left is gone, too"


def test_an_error_of_the_user_is_one_line_and_is_not_tried_again(start: Start, tmp_path: Path) -> None:
    output = finish(start("launcher.kind=torchrun", "launcher.ranks=2", "data.dir=nowhere"), code=2)
    assert output.strip() == "error: nowhere/tokenizer.model: missing; run 'paralm data prepare' first"
    assert not (tmp_path / "tiny").exists(), "nothing is left of a start that was refused"


def test_ranks_that_always_die_end_the_run_with_one_line(start: Start, tmp_path: Path) -> None:
    module = tmp_path / "dies.py"
    module.write_text("import os, sys\nif 'paralm_launch.launchers.worker' in sys.orig_argv: os.kill(os.getpid(), 9)\n")
    output = finish(
        start("launcher.kind=torchrun", "launcher.ranks=1", "launcher.max_failures=1", f"imports=[{module}]"), code=4
    )
    assert "error: rank 0 was ended by SIGKILL; the ranks were started 2 times" in output
    assert "Traceback" not in output


def test_rows_and_results_arrive_in_the_launcher(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    """As from a local run: the rows in order, the lines, and the result itself."""
    from paralm_launch.launchers import get_launcher

    from paralm.config import Config

    made: dict[str, Any] = settings(corpus, prepared, tmp_path, training={"max_steps": 2})
    made["launcher"] = {"kind": "torchrun", "ranks": 1}
    rows: list[dict[str, Any]] = []
    before = signal.getsignal(signal.SIGTERM)
    result = get_launcher("torchrun")(Config.model_validate(made), rows.append, lambda line: None)
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("validation", 2)]
    assert (result.step, result.loss, result.run_dir) == (2, rows[1]["loss"], tmp_path / "tiny")
    assert signal.getsignal(signal.SIGTERM) is before
