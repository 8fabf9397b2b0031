"""Hand the jobs of a configuration to a cluster, and record them in the run folder."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from paralm.config import Config
from paralm.errors import RunError, UserError
from paralm.training import checkpoint
from paralm_launch.cluster import ray_jobs, records, slurm, watch
from paralm_launch.cluster.plan import Planned
from paralm_launch.cluster.records import Job

_WRITERS = {"prepare", "train", "pipeline"}  # jobs that write what the others read


def refuse_second(planned: Sequence[Planned]) -> None:
    """Refuse what a job of the run that is not over does already: two would write the same. Raises RunError."""
    names = {plan.name for plan in planned}
    run = planned[0].run
    for job, found in watch.look(records.jobs_of(run)):
        same = job.name in names or (job.name in _WRITERS and names & _WRITERS)
        if same and any(watch.is_active(job, status) for status in found):
            raise RunError(
                f"{run}: job {job.id} ({job.name}) is {found[0].state}; cancel it ('paralm cancel {run}') or wait"
            )


def to_slurm(planned: Sequence[Planned]) -> list[Job]:
    """Submit jobs, each after those it waits for; all of them or none. Raises RunError, one line."""
    made: list[Job] = []
    written: list[Path] = []
    try:
        for plan in planned:
            written += _write(plan)
            after = tuple(made[index].id for index in plan.after)
            made.append(_job(plan, slurm.submit(plan.file(plan.ending), after), after))
            records.write(made[-1])
            written.append(made[-1].file(".json"))
    except BaseException:
        with contextlib.suppress(UserError):
            slurm.cancel(job.id for job in made)
        _remove(written)
        raise
    return made


def to_ray(plan: Planned, config: Config, address: str) -> Job:
    """Submit one Ray job. Raises RunError, one line."""
    written = _write(plan)
    name = f"paralm-{plan.run.name}-{records.stem(plan.number, plan.name)}-{time.time_ns() // 10**6 % 10**8:08d}"
    try:
        script = shlex.quote(str(plan.file(plan.ending)))
        run = str(plan.run.absolute())
        submitted = ray_jobs.submit(address, name, f"bash {script}", config.launcher.stop_grace, run)
    except BaseException:
        _remove(written)
        raise
    job = _job(plan, submitted, (), address)
    records.write(job)
    return job


def _job(plan: Planned, job: str, after: tuple[str, ...], address: str | None = None) -> Job:
    backend: records.Backend = "slurm" if address is None else "ray"
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return Job(plan.run, plan.number, plan.name, backend, job, plan.tasks, after, os.getcwd(), when, address)


def _write(plan: Planned) -> list[Path]:
    """The script and the configuration, beside the record to be."""
    path = plan.file(plan.ending)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(plan.script)
        if plan.config is not None:
            plan.file(".yaml").write_text(plan.config, encoding="utf-8")
    except FileExistsError:
        raise RunError(f"{path}: another submission of this run is under way") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    return [path, *([plan.file(".yaml")] if plan.config is not None else [])]


def _remove(written: Sequence[Path]) -> None:
    """A submission that was refused leaves nothing."""
    for path in written:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        written[0].parent.rmdir()
        written[0].parent.parent.rmdir()


def keep_on_ray(
    plan: Callable[[], Planned], config: Config, address: str, say: Callable[[str], None], patience: float
) -> None:
    """Submit, show what the job says, and submit it again when it was preempted or its cluster was lost, until it is
    done. ``patience``: seconds to wait for a cluster that does not answer. Raises RunError when it ends otherwise.
    """
    step, fruitless = -1, 0
    while True:
        job = _patiently(lambda: to_ray(plan(), config, address), say, patience)
        say(f"job {job.id} → {job.run}")
        found = watch.follow_ray(job, say, patience)
        if found is not None and found.state == "SUCCEEDED":
            return
        if found is not None and found.state == "STOPPED":
            raise RunError(f"job {job.id} was stopped; the same command continues")
        # 75: it saved and left. 4: ranks were lost. Without a word: its cluster, or the process itself, was killed.
        if found is not None and found.reason not in ("exit code 75", "exit code 4") and _said_why(job):
            raise RunError(f"job {job.id} is {found.state}, {found.reason}; see 'paralm logs {job.run}'")
        why = found.reason if found is not None else "its cluster is gone"
        reached = max(checkpoint.steps(job.run / "checkpoints"), default=0)
        step, fruitless = reached, 0 if reached > step else fruitless + 1
        if fruitless > config.launcher.max_failures:
            raise RunError(f"job {job.id}: {why}; {fruitless} jobs have saved nothing new; see 'paralm logs {job.run}'")
        say(f"job {job.id}: {why}; submitted again")


def _said_why(job: Job) -> bool:
    return any(" end code=" in f" {line}" for line in job.events()[-1:])


def _patiently(work: Callable[[], Job], say: Callable[[str], None], patience: float) -> Job:
    deadline = time.monotonic() + patience
    while True:
        try:
            return work()
        except ray_jobs.Unreachable as error:
            if time.monotonic() > deadline:
                raise
            say(f"{error}; trying again")
            time.sleep(min(10.0, max(1.0, patience / 20)))
