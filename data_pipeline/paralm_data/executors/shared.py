"""Processes of any machines that see the prepared folder: started in any number, anywhere, at any time; no server.

Every one makes the same call of :func:`paralm_data.prepare`, with local workers of its own, and walks through the same
stages. What has no marker is claimed (:mod:`paralm_data.executors.claims`) and done; what others have claimed is waited
for, and taken over when they are gone. One process alone does everything; one that comes late finds what is done. An
error of one ends all: it leaves a note.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from paralm_data.atomic import write_file
from paralm_data.errors import DataError
from paralm_data.executors import ATTEMPTS, Event, Executor, Task, claims
from paralm_data.executors.claims import Member, Watch, is_taken, take
from paralm_data.executors.local import LocalExecutor
from paralm_data.holding import locked, remove_unfinished
from paralm_data.progress import Delta
from paralm_data.scratch import NAME as SCRATCH
from paralm_data.scratch import read_marker

T = TypeVar("T")
_OTHERS = {"claimed": "by another worker"}  # the result of a task that is not done here


class _DismissedError(Exception):
    """The others took this process for dead, or its heartbeat ended with a ``code`` and they will."""

    def __init__(self, code: int = 0) -> None:
        super().__init__(code)
        self.code = code


class _ToldError(DataError):
    """The error of another worker."""


@dataclass(frozen=True)
class Claimed:
    """A task, if it is still to be done and no other worker has claimed it; otherwise nothing."""

    task: Task
    worker: Path

    @property
    def label(self) -> str:
        return self.task.label

    @property
    def marker(self) -> Path:
        return self.task.marker

    @property
    def weight(self) -> float:
        return self.task.weight

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Result: the task's, or _OTHERS."""
        found = read_marker(self.marker)  # first: every process meets every task, and most are done when it does
        if found is not None:
            return found
        mine = take(self.marker, self.worker, Watch())
        found = read_marker(self.marker)  # also of a claim of one's own: it may be a second, after a worker that left
        if found is None:
            found = (yield from self.task.run()) if mine else _OTHERS
        return found


class SharedExecutor(Executor):
    """``workers`` processes of this machine, beside those of others that prepare the same folder."""

    def __init__(self, workers: int) -> None:
        self._local = LocalExecutor(workers)
        self._watch = Watch()
        self._member: Member | None = None
        self._home = Path()  # what is there of the folder that all work on
        self._scratches: list[Path] = []
        self._notes: set[Path] = set()  # those that were there before
        self._looked = 0.0

    def threads(self, tasks: int) -> int:
        return self._local.threads(tasks)

    def close(self, error: BaseException | None = None) -> None:
        self._local.close(error)

    # -- taking part ------------------------------------------------------------------------------------------------

    def make(self, folder: Path, left: Callable[[], bool], work: Callable[[bool], T]) -> T:
        if self._member is not None:  # a part of what is being made
            with locked(folder, shared=True):
                return work(left())
        failed = 0
        while left() or (folder / SCRATCH).exists():
            try:
                with locked(folder, shared=True):
                    return self._take_part(folder, left, work)
            except _DismissedError as error:
                failed += error.code != 0
                if failed == ATTEMPTS:
                    raise DataError(
                        f"{folder}: the heartbeat of this process ended with code {error.code}, {ATTEMPTS} times; if "
                        "memory ran out, give fewer data.workers"
                    ) from None
        return work(False)

    def _take_part(self, folder: Path, left: Callable[[], bool], work: Callable[[bool], T]) -> T:
        self._home, self._scratches = folder / SCRATCH, [folder / SCRATCH]
        self._notes = set(self._home.glob("failed-*"))
        member = self._member = Member(self._home / "workers")
        try:
            result = work(left())  # asked again: what is made from here on is made before the others
        except BaseException as error:
            if isinstance(error, Exception) and not member.is_known():
                raise _DismissedError(member.heartbeat_code) from error
            if isinstance(error, DataError) and not isinstance(error, _ToldError):
                with contextlib.suppress(OSError):
                    note = str(error).encode("utf-8", "backslashreplace")
                    write_file(self._home / f"failed-{member.path.name}", note)
            raise
        finally:
            self._member = None
            member.leave()
        self._remove_scratch(member.path.parent)
        return result

    def _remove_scratch(self, workers: Path) -> None:
        """Wait until the others have left, and remove what is needed no more; one that stays will do it."""
        limit = time.monotonic() + 2 * claims.SILENT_SECONDS
        while any(self._watch.lives(worker) for worker in workers.glob("*")):
            if time.monotonic() > limit:
                return
            time.sleep(claims.POLL_SECONDS)
        for scratch in self._scratches:
            shutil.rmtree(scratch, ignore_errors=True)

    def clear(self, scratch: Path) -> None:
        self._scratches.append(scratch)  # others may read it still

    def _check(self, now: bool = False) -> Member:
        """Now and then: raises what ends this process's part."""
        assert self._member is not None
        if now or time.monotonic() - self._looked >= claims.POLL_SECONDS:
            self._looked = time.monotonic()
            if not self._member.is_known():
                raise _DismissedError
            for note in set(self._home.glob("failed-*")) - self._notes:
                with contextlib.suppress(OSError):
                    raise _ToldError(note.read_text(encoding="utf-8"))
        return self._member

    # -- doing ------------------------------------------------------------------------------------------------------

    def run(self, tasks: Sequence[Task]) -> Generator[Event, None, None]:
        start = random.SystemRandom().randrange(max(1, len(tasks)))  # so that not all begin with the same
        left = [*range(start, len(tasks)), *range(start)]
        while left:
            worker = self._check().path
            claimed, others = [Claimed(tasks[index], worker) for index in left], []
            with contextlib.closing(self._local.run(claimed)) as events:
                for task, delta, result in events:
                    self._check()
                    if result == _OTHERS:
                        others.append(left[task])
                    else:
                        yield Event(left[task], delta, result)
            left = others
            if left:
                left = yield from self._await(tasks, left)

    def _await(self, tasks: Sequence[Task], waiting: list[int]) -> Generator[Event, None, list[int]]:
        """Look what becomes of tasks that others have claimed, until one of them is to be done here; returns those."""
        while waiting:
            still: list[int] = []
            free: list[int] = []
            for index in waiting:
                self._check()
                result = read_marker(tasks[index].marker)
                if result is not None:
                    yield Event(index, Delta(), result)
                else:
                    (still if is_taken(tasks[index].marker, self._watch) else free).append(index)
            if free:
                return [*free, *still]
            waiting = still
            if waiting:
                time.sleep(claims.POLL_SECONDS)
        return []

    def alone(self, folder: Path, name: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
        claim = folder / SCRATCH / f"{name}.json"
        while not done():
            if take(claim, self._check().path, self._watch):
                if not done():
                    self._check(now=True)  # suspended since it took this, another may be writing there
                    remove_unfinished(folder, tasks=False)
                    work()
                return
            time.sleep(claims.POLL_SECONDS)
