"""SLURM's commands: sbatch, squeue, sacct, scancel; what they print, and what they refuse in one line."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paralm.errors import RunError

# States in which a job can still do something; in every other it is over.
ACTIVE = frozenset(
    [
        "PENDING",
        "RUNNING",
        "CONFIGURING",
        "COMPLETING",
        "SUSPENDED",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESIZING",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
    ]
)
_SQUEUE = "%F|%K|%T|%M|%l|%N|%r"
_SACCT = "JobID,State,Elapsed,Timelimit,NodeList,ExitCode"


@dataclass(frozen=True)
class Status:
    """Of a job, or of one task of an array."""

    state: str  # SLURM's word, such as RUNNING
    elapsed: str = ""
    limit: str = ""
    nodes: str = ""
    reason: str = ""  # why it is pending, or how it ended
    task: int | None = None

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


class _UnknownJobError(RunError):
    """SLURM knows no job of an id that it was asked for."""


def submit(script: Path, after: Sequence[str] = ()) -> str:
    """Hand a script to sbatch and return the job's id. Raises RunError, one line, with SLURM's words.

    Submitted from within a job, it gets nothing of that one: sbatch would pass on whose array's task, say, this is.
    """
    options = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    environment = dict(os.environ)
    if "SLURM_JOB_ID" in environment:
        kept = ("SLURM_CONF", "SLURM_CLUSTERS")
        environment = {key: value for key, value in environment.items() if key[:6] != "SLURM_" or key in kept}
    printed = _call("sbatch", "--parsable", *options, str(script), environment=environment)
    return printed.strip().split(";")[0]  # ID;CLUSTER on a federation


def statuses(ids: Sequence[str]) -> dict[str, list[Status]]:
    """What SLURM knows of jobs, by id; an array has one of each task. A job it has forgotten is not there."""
    if not ids:
        return {}
    found: dict[str, list[Status]] = {}
    try:
        found = _queued(",".join(ids))
    except _UnknownJobError:  # refuses the list, for one of them or for all
        for job in ids if len(ids) > 1 else ():
            with contextlib.suppress(_UnknownJobError):
                found.update(_queued(job))
    lost = [job for job in ids if job not in found]
    if lost:
        with contextlib.suppress(RunError):  # a site without accounting
            found.update(parse_sacct(_call("sacct", "-n", "-P", "-X", "-j", ",".join(lost), "-o", _SACCT)))
    return found


def _queued(jobs: str) -> dict[str, list[Status]]:
    return parse_squeue(_call("squeue", "-h", "-r", "-t", "all", "-j", jobs, "-o", _SQUEUE))


def parse_squeue(text: str) -> dict[str, list[Status]]:
    """Lines of ``%F|%K|%T|%M|%l|%N|%r``."""
    found: dict[str, list[Status]] = {}
    for line in text.splitlines():
        job, task, state, elapsed, limit, nodes, reason = line.split("|", 6)
        reason = "" if reason in ("None", "(null)") else reason
        number = int(task) if task.isdigit() else None
        found.setdefault(job, []).append(Status(state, elapsed, limit, nodes, reason, number))
    return found


def parse_sacct(text: str) -> dict[str, list[Status]]:
    """Lines of ``JobID|State|Elapsed|Timelimit|NodeList|ExitCode``; an id is 12, 12_3 or 12_[4-7]."""
    found: dict[str, list[Status]] = {}
    for line in text.splitlines():
        name, state, elapsed, limit, nodes, code = line.split("|", 5)
        job, _, task = name.partition("_")
        number = int(task) if task.isdigit() else None
        ended = "" if code in ("0:0", "") else f"exit code {code.split(':')[0]}"
        nodes = "" if nodes == "None assigned" else nodes
        found.setdefault(job, []).append(Status(state.split()[0], elapsed, limit, nodes, ended, number))
    return found


def cancel(ids: Iterable[str]) -> None:
    """End jobs; each gets SIGTERM, saves, and has the site's KillWait for it. Ended ones are left alone."""
    ids = list(ids)
    if ids:
        _call("scancel", *ids)


def _call(program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run one of SLURM's programs and return what it printed. Raises RunError, one line, with its words."""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, timeout=300, env=environment
        )
    except FileNotFoundError:
        raise RunError(f"{program}: not found; this needs SLURM's commands on the PATH, as on a login node") from None
    except subprocess.TimeoutExpired:
        raise RunError(
            f"{program} has not answered for five minutes; is SLURM's controller up? ('scontrol ping')"
        ) from None
    if done.returncode == 0:
        return done.stdout
    kind = _UnknownJobError if "Invalid job id" in done.stderr else RunError
    raise kind(f"SLURM: {complaint(program, done.stderr) or f'{program} ended with code {done.returncode}'}")


def complaint(program: str, text: str) -> str:
    """What a program of SLURM said on stderr, as one line without its name."""
    lines = [re.sub(rf"^{program}: (error: )?", "", line).strip().rstrip(".") for line in text.splitlines()]
    found = "; ".join(dict.fromkeys(line for line in lines if line))
    hints = {
        "partition": "cluster.partition",
        "account": "cluster.account and cluster.partition",
        "qos": "cluster.qos",
        "feature": "cluster.constraint",
        "generic resource": "cluster.gres or cluster.gpus_per_node",
        "node configuration": "cluster.nodes, cpus_per_rank, gpus_per_node and memory",
        "time limit": "cluster.time",
    }
    hint = next((key for word, key in hints.items() if word in found.lower()), None)
    return f"{found} ({hint})" if hint else found
