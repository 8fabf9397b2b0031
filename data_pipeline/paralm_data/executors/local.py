"""Processes on this machine, each started afresh (`python -m paralm_data.executors.worker`): no forks of threads.

A worker ends when this process does, however that happens. One that dies is replaced, and its task given again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from paralm_data.errors import DataError
from paralm_data.executors import ATTEMPTS, Event, Executor, Task, in_this_process, lost
from paralm_data.progress import Delta

# Where this package is; -P, below: not the working folder, which may hold modules of any name.
_SOURCES = str(Path(__file__).resolve().parent.parent.parent)

# glibc's allocator otherwise keeps what large arrays leave behind: blocks of this size go back when they are freed.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_ARENA_MAX": "2"}


class _Worker:
    """A process and the pipe to it."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        alive, self._mine = os.pipe()  # its reading end sees our end
        environment = {**_MEMORY, **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([_SOURCES, *filter(None, [environment.get("PYTHONPATH")])])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "paralm_data.executors.worker", str(theirs.fileno()), str(alive)],
                pass_fds=(theirs.fileno(), alive),
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us to answer
            )
        finally:
            theirs.close()
            os.close(alive)
        self.index: int | None = None

    def give(self, index: int, task: Task) -> None:
        self.index = index
        self.connection.send((index, task))

    def end(self) -> str:
        """Kill it if it lives; how it ended, in words."""
        os.close(self._mine)
        self.connection.close()
        try:
            code = self.process.wait(timeout=1.0 if self.process.poll() is None else None)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if code < 0:
            return f"the worker was ended by {signal.Signals(-code).name}"
        return f"the worker ended with code {code}"


class LocalExecutor(Executor):
    """At most ``workers`` processes; one task, or one worker, needs none beside this one."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task]) -> Generator[Event, None, None]:
        if min(self.workers, len(tasks)) < 2:
            yield from in_this_process(tasks)
            return
        waiting, attempts = deque(range(len(tasks))), [0] * len(tasks)
        finished = 0
        try:
            while finished < len(tasks):
                self._feed(tasks, waiting)
                busy = {w.connection: w for w in self._workers if w.index is not None}
                if not busy:
                    continue  # every one died between its last task and the next
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    worker = busy[ready]
                    assert worker.index is not None
                    index = worker.index
                    try:
                        kind, value = ready.recv()
                    except (EOFError, OSError):
                        how = self._remove(worker)
                        attempts[index] += 1
                        if attempts[index] >= ATTEMPTS:
                            raise lost(tasks[index], how) from None
                        waiting.appendleft(index)
                        continue
                    yield from self._event(index, worker, kind, value)
                    finished += kind == "result"
        finally:
            # Whatever still works is of no use to anyone; what it has done is kept by its marker.
            for worker in [w for w in self._workers if w.index is not None]:
                worker.process.kill()
                self._remove(worker)

    def threads(self, tasks: int) -> int:
        return max(1, self.workers // max(1, tasks))

    def _feed(self, tasks: Sequence[Task], waiting: deque[int]) -> None:
        for worker in [w for w in self._workers if w.index is None and w.process.poll() is not None]:
            self._remove(worker)  # it died while it had nothing to do
        while waiting and len(self._workers) < self.workers and all(w.index is not None for w in self._workers):
            self._workers.append(worker := _Worker())
            worker.give(waiting[0], tasks[waiting[0]])
            waiting.popleft()
        for worker in [w for w in self._workers if w.index is None]:
            if not waiting:
                return
            try:
                worker.give(waiting[0], tasks[waiting[0]])
                waiting.popleft()
            except OSError:  # it died just now
                self._remove(worker)

    @staticmethod
    def _event(index: int, worker: _Worker, kind: str, value: Any) -> Iterator[Event]:
        if kind == "delta":
            yield Event(index, value)
            return
        worker.index = None
        if kind == "result":
            yield Event(index, Delta(), value)
        elif isinstance(value, DataError):
            raise value
        else:
            raise RuntimeError(f"a worker failed:\n{value}")

    def _remove(self, worker: _Worker) -> str:
        self._workers.remove(worker)
        return worker.end()

    def close(self, error: BaseException | None = None) -> None:
        for worker in list(self._workers):
            self._remove(worker)
