"""What a run folder keeps of its jobs, so that every later command finds them by the run or by an id.

jobs/000002-train.json    who was asked (slurm or ray), the id, the folder, what it waits for
                 .sbatch  the script, as submitted (of Ray: .sh)
                 .yaml    the configuration, as submitted: what is edited afterwards does not reach the job
                 .log     what it says; of an array: -0.log, -1.log, …
                 .events  a line at each start, requeue and end, from the script itself
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from paralm.errors import RunError
from paralm.training.session import parse_run

Backend = Literal["slurm", "ray"]


@dataclass(frozen=True)
class Job:
    """One job of a run."""

    run: Path
    number: int
    name: str  # prepare, train, evaluate-…
    backend: Backend
    id: str
    tasks: int  # of an array; 1: none
    after: tuple[str, ...]  # ids of jobs that must have ended well
    folder: str  # where the command ran
    submitted: str
    address: str | None = None  # of Ray's Jobs API

    @property
    def stem(self) -> str:
        return stem(self.number, self.name)

    def file(self, suffix: str) -> Path:
        return self.run / "jobs" / f"{self.stem}{suffix}"

    def logs(self) -> list[Path]:
        """The files it writes its words to; of an array those that are there."""
        if self.tasks == 1:
            return [self.file(".log")]
        return sorted(
            self.file(".log").parent.glob(f"{self.stem}-*.log"), key=lambda path: int(path.stem.split("-")[-1])
        )

    def events(self) -> list[str]:
        try:
            return self.file(".events").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []


def stem(number: int, name: str) -> str:
    """How the files of a job are called."""
    return f"{number:06d}-{name}"


def next_number(run: Path) -> int:
    """Of the next job of a run."""
    taken = [path.name[:6] for path in (run / "jobs").glob("[0-9]*-*")]
    return max((int(text) for text in taken if text.isdigit()), default=0) + 1


def write(job: Job) -> None:
    """Record a job that was submitted."""
    values = {key: value for key, value in asdict(job).items() if key != "run"}
    unfinished = job.file(".tmp")
    unfinished.write_text(json.dumps(values, indent=1), encoding="utf-8")
    unfinished.rename(job.file(".json"))


def read(path: Path) -> Job | None:
    """A record, or None where the file holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**values, "run": path.parent.parent, "after": tuple(values["after"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def jobs_of(run: Path) -> list[Job]:
    """All of a run, in the order they were submitted."""
    return [job for path in sorted((run / "jobs").glob("*.json")) if (job := read(path)) is not None]


def runs_below(root: Path) -> list[Path]:
    """Runs that have jobs, of a folder of runs; the newest last."""
    with contextlib.suppress(OSError):
        return sorted((path.parent for path in root.glob("*/jobs")), key=lambda run: (run / "jobs").stat().st_mtime)
    return []


def find(text: str, root: Path) -> list[Job]:
    """The jobs that a run's folder or name, or a job's id, means. Raises RunError, one line, for anything else."""
    for run in (Path(text), root / text):
        if (run / "jobs").is_dir():
            return jobs_of(run)
    found = [job for run in runs_below(root) for job in jobs_of(run) if job.id == text]
    if found:
        return found
    if Path(text).is_dir() or (root / text).is_dir():
        parse_run(text, root)
        raise RunError(f"{text}: no job of it was submitted; 'paralm submit slurm CONFIG' does that")
    raise RunError(f"{text}: no run, and no job of the runs in {root}/ has that id (--root says where else they are)")


def of_runs(texts: Sequence[str], root: Path) -> list[Job]:
    """The jobs of several runs and ids, each once, in order; without any, those of every run below ``root``."""
    found: dict[tuple[Path, int], Job] = {}
    given = [find(text, root) for text in texts] or [jobs_of(run) for run in runs_below(root)]
    for job in (job for jobs in given for job in jobs):
        found[job.run.resolve(), job.number] = job
    return list(found.values())
