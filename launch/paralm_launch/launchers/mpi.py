"""``launcher.kind: mpi``: ranks under mpirun.

``mpirun -n 4 paralm train CONFIG launcher.kind=mpi`` is four ranks already, and each trains in its own process.
``paralm train CONFIG launcher.kind=mpi`` starts mpirun itself, and again when ranks are lost.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralm.config import Config
from paralm.errors import RunError
from paralm_launch import discovery
from paralm_launch.launchers import register_launcher
from paralm_launch.launchers.parent import Launch, ended_by, number_of_ranks, worker_command, worker_environment

if TYPE_CHECKING:
    from paralm.training.loop import TrainResult


def find_mpirun(key: str = "launcher.kind") -> str:
    """Its path. RunError, which names the configuration's ``key`` that asks for it, if there is none."""
    beside = Path(sys.executable).parent / "mpirun"  # a wheel's
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise RunError(f"{key}: mpi needs mpirun; install an MPI, or paralm[mpi]")
    return found


def mpirun_command(config: Config, worker: list[str], mpirun: str) -> list[str]:
    """The whole command line. Ranks are not bound to cores: torch's threads need more than one."""
    command = [mpirun, "-n", str(number_of_ranks(config)), "--bind-to", "none", "--oversubscribe"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")  # in a container; mpirun refuses root otherwise
    if config.launcher.hosts is not None:
        command += ["--host", config.launcher.hosts]
    return [*command, *config.launcher.mpirun, *worker]


@register_launcher("mpi")
def mpi(config: Config, on_progress: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> TrainResult:
    """Train in this process if it is a rank, otherwise on ``launcher.ranks`` processes under mpirun."""
    if discovery.is_rank():
        from paralm.training.loop import train

        return train(config, on_progress=on_progress, say=say)
    mpirun = find_mpirun()
    with Launch(config, on_progress, say) as launch:
        command = mpirun_command(config, worker_command(launch.exchange), mpirun)
        reason = ""
        for _ in range(config.launcher.max_failures + 1):
            # A session of its own: Ctrl-C is answered by this process, which lets the ranks save.
            process = subprocess.Popen(
                [*launcher_guard(), *command],
                env=worker_environment(),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
                stderr=subprocess.PIPE,
                text=True,
            )
            _, complaint = process.communicate()
            reason = f"mpirun {ended_by(process.returncode)}{first_line(complaint)}"
            launch.end_children()
            if launch.over():
                break
        return launch.result(reason)


def launcher_guard() -> list[str]:
    """A prefix that makes a command end when this process does, however that happens."""
    return [sys.executable, "-m", "paralm_launch.launchers.guard"]


def _has_descriptor(stream: Any) -> bool:
    try:
        return stream.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def first_line(text: str) -> str:
    """mpirun's first words, which are framed by dashes."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return f": {lines[0]}" if lines else ""
