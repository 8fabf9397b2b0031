"""Who prepares the data of a configuration: this process and others of this machine, a Ray cluster, or MPI ranks."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from paralm.config import Config
from paralm.config_files import dump_yaml
from paralm.errors import RunError
from paralm_launch import discovery
from paralm_launch.console import ProgressLine, duration, quantity

_GRACE = 10.0  # seconds that mpirun has to end its ranks

if TYPE_CHECKING:
    from paralm_data import Execution, Progress, StepsSpec


def steps_of(config: Config) -> StepsSpec:
    """``data.steps``."""
    from paralm_data import StepsSpec

    return StepsSpec.of(config.data.steps.model_dump())


def is_mpi_rank() -> bool:
    """Whether mpirun started this process, or srun as one of several tasks."""
    return discovery.mpi_size(os.environ) > 0 or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def needs_mpirun(config: Config) -> bool:
    """Whether the work is for MPI ranks, and this process is none."""
    return config.data.executor == "mpi" and not is_mpi_rank()


@contextlib.contextmanager
def execution(config: Config) -> Iterator[Execution]:
    """The executor of a configuration, open: of a Ray cluster that is there (launcher.address) or is started when
    there is work, of the MPI ranks that all call this, or of processes here.
    """
    from paralm_data import Execution
    from paralm_data.executors import make_executor

    data = config.data
    with contextlib.ExitStack() as stack:

        def connect() -> None:
            from paralm_launch.launchers import ray

            module = ray.import_ray(config)
            if ray.start(module, config, data.workers or os.cpu_count() or 1):
                stack.callback(module.shutdown)

        opened = stack.enter_context(make_executor(data.executor, data.workers, connect))
        yield Execution(opened, data.workers, data.shard_bytes, data.max_bad_records)


def under_mpirun(config: Config) -> None:
    """Run ``paralm data prepare`` on ``data.workers`` ranks of an mpirun of ours, which ends when this process does.

    Raises RunError, with what the ranks said, if it fails.
    """
    from paralm_launch.launchers.mpi import find_mpirun, first_line, launcher_guard, mpirun_command
    from paralm_launch.launchers.parent import worker_environment

    folder = config.data_dir
    folder.mkdir(parents=True, exist_ok=True)
    mine = f".prepare-{socket.gethostname()}-"
    for left in folder.glob(f"{mine}*.yaml"):
        number = left.stem.removeprefix(mine)
        if number.isdigit() and not psutil.pid_exists(int(number)):
            left.unlink(missing_ok=True)  # of one that was killed
    settings = folder / f"{mine}{os.getpid()}.yaml"
    # A rank ends with its mpirun, and that with this process, however it ends.
    worker = [*launcher_guard(), sys.executable, "-m", "paralm_launch", "data", "prepare", str(settings)]
    ranks = config.model_copy(update={"launcher": config.launcher.model_copy(update={"ranks": _ranks(config)})})
    try:
        settings.write_text(dump_yaml(config), encoding="utf-8")
        process = subprocess.Popen(
            [*launcher_guard(), *mpirun_command(ranks, worker, find_mpirun("data.executor"))],
            env=worker_environment(),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, complaint = process.communicate()
        except BaseException:
            process.terminate()  # mpirun ends ranks on other machines, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.kill()
            raise
    finally:
        with contextlib.suppress(OSError):
            settings.unlink()
    if process.returncode:
        said = [line.removeprefix("error: ") for line in complaint.splitlines() if line.startswith("error: ")]
        if said:
            raise RunError(said[0])
        raise RunError(f"mpirun ended with code {process.returncode}{first_line(complaint)}; the same command goes on")


def _ranks(config: Config) -> int:
    if config.data.workers is not None:
        return config.data.workers
    if config.launcher.hosts is not None:
        slots = [host.partition(":")[2] or "1" for host in config.launcher.hosts.split(",")]
        if all(slot.isdigit() for slot in slots):
            return sum(map(int, slots))
    allocated = os.environ.get("SLURM_NTASKS", "")
    return int(allocated) if allocated.isdigit() else len(os.sched_getaffinity(0))


def progress_line() -> ProgressLine:
    """Of a process here; of plain lines on an MPI rank, which mpirun gives a terminal that is none."""
    return ProgressLine(terminal=False if is_mpi_rank() else None)


def progress_text(progress: Progress) -> str:
    """How far it is, how fast, and how long it takes from here."""
    parts = [f"{progress.documents:,} documents"] if progress.documents else []
    if progress.bytes:
        parts.append(f"{progress.bytes / 1e6:.1f} MB")
    if progress.tokens:
        parts.append(f"{quantity(progress.tokens)} tokens")
    if progress.bytes and progress.documents:
        parts += [f"{quantity(progress.documents_per_s)} documents/s", f"{progress.mb_per_s:.1f} MB/s"]
        if progress.tokens:
            parts.append(f"{quantity(progress.tokens_per_s)} tokens/s")
    if progress.eta is not None and not progress.done:
        parts.append(f"eta {duration(progress.eta)}")
    return ", ".join(parts)


def quarantined(folder: Path) -> list[str]:
    """A line for each list of bad records in a prepared folder."""
    lines = []
    for path in sorted(folder.glob("quarantine*.jsonl")):
        with path.open("rb") as file:
            lines.append(f"{sum(1 for _ in file):,} bad records were left out → {path}")
    return lines
