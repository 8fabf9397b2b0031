"""Which share of an evaluation's cells a process measures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paralm.errors import UserError


@dataclass(frozen=True)
class Part:
    """Share ``index`` (from 1) of ``count`` of an evaluation's cells."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UserError(f"part {self.index}/{self.count}: parts are counted from 1/{self.count}")

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] | None = None) -> Part:
        """``i/n``; ``rank`` for this rank's share (RANK, WORLD_SIZE); ``array`` for a SLURM array task's.

        Raises UserError, one line.
        """
        given = os.environ if environment is None else environment
        if text == "rank":
            return cls(_number(given, "RANK", text) + 1, _number(given, "WORLD_SIZE", text))
        if text == "array":
            first = int(given.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(given.get("SLURM_ARRAY_TASK_STEP", "1") or 1)
            task = _number(given, "SLURM_ARRAY_TASK_ID", text)
            tasks = _number(given, "SLURM_ARRAY_TASK_COUNT", text)
            last = max(task, int(given.get("SLURM_ARRAY_TASK_MAX", "0") or 0))
            if (last - first) // step >= tasks:
                raise UserError(
                    f"part 'array': tasks {first} to {last} of this array are {tasks}, some left out; arrays must be "
                    "regular, such as 0-7"
                )
            return cls((task - first) // step + 1, tasks)
        index, slash, count = text.partition("/")
        if not slash or not index.isdigit() or not count.isdigit():
            raise UserError(f"part '{text}': give i/n, such as 1/4, or 'rank' or 'array'")
        return cls(int(index), int(count))

    def of(self, names: Sequence[str]) -> list[str]:
        """This part's cells: every ``count``-th, so that parts are about as dear as each other."""
        return list(names[self.index - 1 :: self.count])


def _number(environment: Mapping[str, str], name: str, part: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        what = "a SLURM job array" if part == "array" else "torchrun or srun"
        raise UserError(f"part '{part}': {name} is {value or 'not set'}; start this under {what}, or give i/n")
    return int(value)
