"""Look after jobs: their states, what they say, their end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from paralm.errors import RunError
from paralm_launch.cluster import ray_jobs, slurm
from paralm_launch.cluster.records import Job
from paralm_launch.cluster.slurm import Status

_POLL_SECONDS = 1.0
_LOOK_SECONDS = 5  # between two questions to SLURM, which every user of the cluster asks


def look(jobs: Sequence[Job]) -> list[tuple[Job, list[Status]]]:
    """Each job with its states, of an array one a task; what the cluster has forgotten is told by the run folder."""
    known = slurm.statuses([job.id for job in jobs if job.backend == "slurm"])
    return [
        (job, known.get(job.id) or [from_events(job)] if job.backend == "slurm" else [_of_ray(job)]) for job in jobs
    ]


def _of_ray(job: Job) -> Status:
    assert job.address is not None
    try:
        found = ray_jobs.status(job.address, job.id)
    except ray_jobs.Unreachable:
        return from_events(job, "its cluster does not answer")
    return found or from_events(job, "its cluster does not know it")


def from_events(job: Job, reason: str = "SLURM has forgotten it") -> Status:
    """What the job's own notes say of its end: COMPLETED, FAILED, or UNKNOWN where they do not."""
    last = job.events()[-1] if job.events() else ""
    if " end code=" not in last or job.tasks > 1:
        return Status("UNKNOWN", reason=reason)
    code = last.rpartition("=")[2]
    return Status("COMPLETED") if code == "0" else Status("FAILED", reason=f"exit code {code}")


def is_active(job: Job, status: Status) -> bool:
    return status.active if job.backend == "slurm" else ray_jobs.is_active(status)


def follow(job: Job, say: Callable[[str], None], lines: int) -> list[Status]:
    """Say what the job has written (the last ``lines`` of each file), then what it writes, until it is over."""
    tail = _Tail(job, lines)
    waited = ""
    while True:
        (_, found), *_ = look([job])
        active = any(is_active(job, status) for status in found)
        tail.show(say)
        if not active:
            return found
        pending = found[0].reason if all(status.state == "PENDING" for status in found) else ""
        if pending and pending != waited:
            say(f"job {job.id} is pending: {pending}")
        waited = pending
        for _ in range(_LOOK_SECONDS):  # the cluster is asked seldom, the files often
            time.sleep(_POLL_SECONDS)
            tail.show(say)


def follow_ray(job: Job, say: Callable[[str], None], patience: float) -> Status | None:
    """As :func:`follow`, through a cluster that does not answer for up to ``patience`` seconds. None: the cluster that
    answers knows the job no more. Raises Unreachable.
    """
    assert job.address is not None
    tail = _Tail(job, 0)
    silent_since: float | None = None
    while True:
        try:
            found = ray_jobs.status(job.address, job.id)
            silent_since = None
        except ray_jobs.Unreachable as error:
            if silent_since is None:
                silent_since = time.monotonic()
                say(f"{error}; waiting for it")
            if time.monotonic() - silent_since > patience:
                raise
            time.sleep(_POLL_SECONDS)
            continue
        tail.show(say)
        if found is None or not ray_jobs.is_active(found):
            return found
        time.sleep(_POLL_SECONDS)


def show(job: Job, say: Callable[[str], None], lines: int) -> None:
    """Say the last ``lines`` lines of each of the job's files."""
    if not any(path.exists() for path in job.logs()):
        hint = f"paralm status {shlex.quote(str(job.run))}"
        raise RunError(f"{job.run}: job {job.id} ({job.name}) has said nothing yet; see {hint}")
    _Tail(job, lines).show(say)


def cancel(jobs: Sequence[Job]) -> list[Job]:
    """Ask those of the jobs that are not over to save and end; returns them. Those that wait for others go first."""
    active = [job for job, found in look(jobs) if any(is_active(job, status) for status in found)]
    slurm.cancel(job.id for job in reversed(active) if job.backend == "slurm")
    for job in active:
        if job.backend == "ray" and job.address is not None:
            ray_jobs.stop(job.address, job.id)
    return active


class _Tail:
    """What is new in a job's files. Of several, each line says whose it is."""

    def __init__(self, job: Job, lines: int) -> None:
        self._job, self._lines = job, lines
        self._read: dict[Path, int] = {}

    def show(self, say: Callable[[str], None]) -> None:
        for path in self._job.logs():
            for line in self._new(path):
                say(line if self._job.tasks == 1 else f"{path.stem.rpartition('-')[2]}: {line}")

    def _new(self, path: Path) -> list[str]:
        try:
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        first = path not in self._read
        self._read[path] = self._read.get(path, 0) + len(whole)
        found = whole.decode("utf-8", "replace").splitlines()
        return found[-self._lines :] if first and self._lines else found
