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
            hint = f"paralm cancel {shlex.quote(str(run))}"
            raise RunError(f"{run}: job {job.id} ({job.name}) is {found[0].state}; cancel it ({hint}) or wait")


def to_slurm(planned: Sequence[Planned]) -> list[Job]:
    """Submit jobs, each after those it waits for; all of them or none. Raises RunError, one line."""
    made: list[Job] = []
    written: list[Path] = []
    try:
        for plan in planned:
            _write(plan, written)
            after = tuple(made[index].id for index in plan.after)
            made.append(_job(plan, slurm.submit(plan.file(plan.ending), after), after))
            written.append(made[-1].file(".json"))
            records.write(made[-1])
    except BaseException:
        with contextlib.suppress(UserError):
            slurm.cancel(job.id for job in made)
        _remove(written)
        raise
    return made


def to_ray(plan: Planned, config: Config, address: str) -> Job:
    """Submit one Ray job. Raises RunError, one line; UnansweredError where the job may be there all the same: then it
    is recorded, so that ``paralm status`` tells and ``paralm cancel`` reaches it.
    """
    return _RaySubmission(lambda: plan, config, address)()


class _RaySubmission:
    """One job on its way to Ray. Called again after an answer was lost, it asks for the job by its name first."""

    def __init__(self, plan: Callable[[], Planned], config: Config, address: str) -> None:
        self._plan, self._grace, self._address = plan, config.launcher.stop_grace, address
        self._sent: Job | None = None

    def __call__(self) -> Job:
        if self._sent is None:
            return self._begin(self._plan())
        if ray_jobs.status(self._address, self._sent.id) is None:
            self._submit(self._sent)  # by the same name: Ray takes it once
        return self._sent

    def _begin(self, plan: Planned) -> Job:
        stamp = f"{time.time_ns() // 10**6 % 10**8:08d}"
        job = _job(plan, f"paralm-{plan.run.name}-{records.stem(plan.number, plan.name)}-{stamp}", (), self._address)
        written: list[Path] = []
        try:
            _write(plan, written)
            written.append(job.file(".json"))
            records.write(job)
            self._submit(job)
        except ray_jobs.UnansweredError:
            self._sent = job
            raise
        except BaseException as error:
            if not isinstance(error, UserError):  # a signal, while it was on its way
                with contextlib.suppress(UserError):
                    ray_jobs.stop(self._address, job.id)
            _remove(written)
            raise
        return job

    def _submit(self, job: Job) -> None:
        script = shlex.quote(str(job.file(".sh").absolute()))
        ray_jobs.submit(self._address, job.id, f"bash {script}", self._grace, str(job.run.absolute()))


def _job(plan: Planned, job: str, after: tuple[str, ...], address: str | None = None) -> Job:
    backend: records.Backend = "slurm" if address is None else "ray"
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return Job(plan.run, plan.number, plan.name, backend, job, plan.tasks, after, os.getcwd(), when, address)


def _write(plan: Planned, written: list[Path]) -> None:
    """The script and the configuration, beside the record to be. ``written`` gets what is made, folders too."""
    path = plan.file(plan.ending)
    try:
        written += [folder for folder in reversed(path.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            written.append(path)
            file.write(plan.script)
        if plan.config is not None:
            written.append(plan.file(".yaml"))
            plan.file(".yaml").write_text(plan.config, encoding="utf-8")
    except FileExistsError:
        raise RunError(f"{path}: another submission of this run is under way") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None


def _remove(written: Sequence[Path]) -> None:
    """A submission that was refused leaves nothing. Folders that others have begun to fill stay."""
    for path in reversed(written):
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def keep_on_ray(
    plan: Callable[[], Planned], config: Config, address: str, say: Callable[[str], None], patience: float
) -> None:
    """Submit, show what the job says, and submit it again when it was preempted or its cluster was lost, until it is
    done. ``patience``: seconds to wait for a cluster that does not answer. Raises RunError when it ends otherwise.
    """
    logs = f"paralm logs {shlex.quote(str(config.run_dir))}"
    before = max(checkpoint.steps(config.run_dir / "checkpoints"), default=0)
    step, fruitless, idle = -1, 0, 0  # the first may save nothing for free; idle: those that did save nothing
    while True:
        job = _patiently(_RaySubmission(plan, config, address), say, patience)
        say(f"job {job.id} → {job.run}")
        found = watch.follow_ray(job, say, patience)
        if found is not None and found.state == "SUCCEEDED":
            return
        if found is not None and found.state == "STOPPED":
            raise RunError(f"job {job.id} was stopped; the same command continues")
        # 75: it saved and left. 4: ranks were lost. Without a word: its cluster, or the process itself, was killed.
        if found is not None and found.reason not in ("exit code 75", "exit code 4") and _said_why(job):
            raise RunError(f"job {job.id} is {found.state}, {found.reason}; see {logs}")
        why = found.reason if found is not None else "its cluster is gone"
        reached = max(checkpoint.steps(job.run / "checkpoints"), default=0)
        idle = 0 if reached > max(step, before) else idle + 1
        step, fruitless = reached, 0 if reached > step else fruitless + 1
        if fruitless > config.launcher.max_failures:
            raise RunError(f"job {job.id}: {why}; {idle} jobs have saved nothing new; see {logs}")
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
