"""The configuration's section ``cluster``: what ``paralm submit`` asks a cluster for. Nothing of a run depends on it.

A lab writes its site's settings once, in a file of its own with this section, and gives it as ``--site FILE`` (or in
the variable PARALM_SITE); a run's configuration goes over it.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from paralm.config_base import Section

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def seconds_of(time: str) -> int:
    """A time limit as SLURM reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ValueError for anything else."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"'{time}' is no time; give 24:00:00 (in quotes), 2-12 (days-hours) or 90 (minutes)")
    days, *rest = (int(part) if part is not None else None for part in match.groups())
    first, second, third = rest[0] or 0, rest[1] or 0, rest[2]
    if days is not None:
        return ((days * 24 + first) * 60 + second) * 60 + (third or 0)
    return first * 60 + second if third is None else (first * 60 + second) * 60 + third


class JobConfig(Section):
    """What a job asks SLURM for; without a value, the site's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = Field(default=None, description="features that nodes must have, such as a100|h100")
    gres: str | None = Field(default=None, description="generic resources of a node, in place of gpus_per_node")
    memory: str | None = Field(default=None, description="of a node, such as 200G; 0: all of it")
    time: str | None = Field(default=None, description="limit: 'H:M:S', 'D-H' or minutes, in quotes")
    sbatch: list[str] = Field(default_factory=list, description="further options of sbatch, such as --exclusive")

    @field_validator("time")
    @classmethod
    def _is_time(cls, time: str | None) -> str | None:
        if time is not None:
            seconds_of(time)
        return time

    @field_validator("sbatch")
    @classmethod
    def _are_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"'{option}' is no option of sbatch; one such as --exclusive")
        return options


class ArrayJobConfig(JobConfig):
    """A job that may be an array."""

    tasks: PositiveInt = Field(default=1, description="more than one: a job array, which shares the work")
    at_once: PositiveInt | None = Field(default=None, description="tasks of an array that may run at a time")


class PrepareJobConfig(ArrayJobConfig):
    """``paralm data prepare`` as a job. What is not given here is as in ``cluster``."""

    cpus: PositiveInt = Field(default=8, description="of a task, or of each node; a process each")
    nodes: PositiveInt = Field(default=1, description="more than one: MPI ranks on all of them, in place of an array")

    @model_validator(mode="after")
    def _one_of_both(self) -> PrepareJobConfig:
        if self.nodes > 1 and self.tasks > 1:
            raise ValueError(
                f"nodes {self.nodes} are MPI ranks of one job, and tasks {self.tasks} an array of jobs of one node "
                "each; give one of them"
            )
        return self


class EvaluateJobConfig(ArrayJobConfig):
    """Evaluations as jobs; a report is one task. What is not given here is as in ``cluster``."""

    cpus: PositiveInt = Field(default=4, description="of a task")
    gpus: NonNegativeInt | None = Field(default=None, description="of a task; default: 1 where training has any")
    what: list[str] = Field(
        default_factory=lambda: ["report"],
        description="report, or an evaluation with its settings, such as 'passkey lengths=[512,4096]'",
    )

    @field_validator("what")
    @classmethod
    def _something(cls, what: list[str]) -> list[str]:
        if not what or not all(text.split() for text in what):
            raise ValueError("name at least one: report, or an evaluation with its settings")
        return what


class ClusterConfig(JobConfig):
    """Jobs on a cluster: of training, and what holds for all."""

    start: Literal["torchrun", "ray"] = Field(
        default="torchrun", description="what starts the ranks in an allocation: an agent a node, or a Ray cluster"
    )
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    ranks_per_node: PositiveInt | None = Field(default=None, description="default: one a GPU, otherwise one")
    cpus_per_rank: PositiveInt = 4
    signal_seconds: PositiveInt = Field(default=300, description="before the time limit: save, and queue again")
    requeues: NonNegativeInt = Field(default=1000, description="how often a job may queue itself again")
    setup: list[str] = Field(
        default_factory=list,
        description="lines of the script that put paralm on its PATH; default: the environment that submits",
    )
    scratch: str = Field(
        default="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}", description="a disk of each node, as the shell reads it"
    )
    ray: str | None = Field(default=None, description="http://HOST:PORT of a Ray cluster's Jobs API (its dashboard)")
    prepare: PrepareJobConfig = Field(default_factory=PrepareJobConfig)
    evaluate: EvaluateJobConfig = Field(default_factory=EvaluateJobConfig)

    @property
    def ranks(self) -> int:
        """Of a training job, on all nodes."""
        return self.nodes * (self.ranks_per_node or max(1, self.gpus_per_node))

    @model_validator(mode="after")
    def _possible(self) -> ClusterConfig:
        if self.gres is not None and self.gpus_per_node:
            raise ValueError("gres and gpus_per_node both say which GPUs; give one")
        if self.gres is not None and "gpu" in self.gres and self.ranks_per_node is None:
            raise ValueError(f"gres '{self.gres}' needs ranks_per_node, one a GPU")
        for job in (self, self.prepare, self.evaluate):
            time = job.time or self.time
            if time is not None and seconds_of(time) <= self.signal_seconds:
                raise ValueError(f"time '{time}' leaves nothing before signal_seconds {self.signal_seconds}")
        if re.search(r"[\s'\"`;&|<>()]", re.sub(r"\$\{[^}]*\}+", "", self.scratch)):
            raise ValueError(f"scratch '{self.scratch}' must be one word, without quotes")
        return self
