"""What runs the tasks of a preparation: this process, processes on this machine or on any that share the folder, a Ray
cluster, or MPI ranks.

A task reads files and writes files, the last of them its marker; the same task gives the same bytes wherever and
however often it runs, so an executor may run it again when a worker is lost, and its order is free. That is all an
executor decides: the result of a preparation does not depend on it.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from paralm_data.errors import DataError
from paralm_data.holding import locked, remove_unfinished
from paralm_data.progress import Delta
from paralm_data.scratch import NAME as SCRATCH

T = TypeVar("T")
EXECUTORS = ("local", "shared", "ray", "mpi")
ATTEMPTS = 3  # of one task, before its loss of workers is taken for its own fault


class Task(Protocol):
    """Picklable. ``label`` names its input, for messages; ``marker`` is the JSON file with its result; ``weight`` is
    its share of the stage's work."""

    @property
    def label(self) -> str: ...
    @property
    def marker(self) -> Path: ...
    @property
    def weight(self) -> float: ...
    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Do it, saying now and then how far it is; returns what the marker holds."""
        ...


class Event(NamedTuple):
    """Of the task with this index in the list: a step on its way, or its result."""

    task: int
    delta: Delta
    result: dict[str, Any] | None = None


class Executor(ABC):
    """A context manager. Raises DataError as the tasks do, or one line about a worker that is lost again and again."""

    leads = True  # of several processes that make the same preparation, the one that gives the tasks

    @abstractmethod
    def run(self, tasks: Sequence[Task]) -> Generator[Event, None, None]:
        """Run every task, in any order; exactly one event of each has a result. Closing the generator ends it."""

    def follow(self) -> None:  # noqa: B027 - nothing to do where one process leads
        """Where this process does not lead: run what it is given, to the end. DataError if the leader fails."""

    def threads(self, tasks: int) -> int:
        """Processors that each of so many tasks may use: one, where a worker is given one."""
        return 1

    def make(self, folder: Path, left: Callable[[], bool], work: Callable[[bool], T]) -> T:
        """Do ``work``, which is told whether anything is ``left`` to make in the prepared folder, while that is held.

        DataError if another preparation holds it.
        """
        there = left()
        if not there and not (folder / SCRATCH).exists():
            return work(False)
        with locked(folder):
            remove_unfinished(folder)
            return work(there)

    def alone(self, folder: Path, name: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
        """Within :meth:`make`, see that what one process makes is ``done``: where several make ``folder``, one does the
        ``work`` of this ``name`` and the others wait.
        """
        if not done():
            work()

    def clear(self, scratch: Path) -> None:
        """Within :meth:`make`, remove work in progress that is needed no more."""
        shutil.rmtree(scratch, ignore_errors=True)

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:  # noqa: B027 - nothing to do for this process alone
        """End the workers. ``error``: why, if it is one."""


def in_this_process(tasks: Sequence[Task]) -> Generator[Event, None, None]:
    """Run tasks one after another here."""
    for index, task in enumerate(tasks):
        running = task.run()
        try:
            while True:
                yield Event(index, next(running))
        except StopIteration as end:
            yield Event(index, Delta(), end.value)


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lost(task: Task, how: str) -> DataError:
    """The error of a task that took ATTEMPTS workers with it."""
    return DataError(
        f"{task.label}: {how}, {ATTEMPTS} times; if memory ran out, give fewer data.workers. "
        "The same command goes on from what is done"
    )


def make_executor(name: str, workers: int | None = None, connect: Callable[[], None] | None = None) -> Executor:
    """An executor by name. ``workers``: tasks at a time, default all that there is. ``connect``: called before the
    first task if this process is not connected to a Ray cluster then.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1")
    if name == "local":
        from paralm_data.executors.local import LocalExecutor

        return LocalExecutor(workers or processors())
    if name == "shared":
        from paralm_data.executors.shared import SharedExecutor

        return SharedExecutor(workers or processors())
    if name == "ray":
        from paralm_data.executors.ray import RayExecutor

        return RayExecutor(workers, connect)
    if name == "mpi":
        from paralm_data.executors.mpi import MPIExecutor

        return MPIExecutor(workers)
    raise DataError(f"executor '{name}' is unknown (one of: {', '.join(EXECUTORS)})")
