"""Tasks on a Ray cluster: one Ray task for one of ours, a processor each.

The process must be connected (`ray.init`) when the first task is run; every node must see the same files under the same
paths, relative ones from this process's folder. Ray runs a task again when its worker or node is lost.
"""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from paralm_data.errors import DataError, reason
from paralm_data.executors import ATTEMPTS, Event, Executor, Task, lost
from paralm_data.progress import Delta

POLL_SECONDS = 0.5


def _remote(task: Task, folder: str) -> tuple[str, Any, Delta]:
    """On a worker: ("result", dict, all it did) or ("error", DataError or a traceback, …)."""
    try:
        os.chdir(folder)
    except OSError as error:
        return "error", DataError(f"{folder}: not on this node ({reason(error)}); it must be shared"), Delta()
    total = Delta()
    running = task.run()
    try:
        while True:
            total = total.plus(next(running))
    except StopIteration as end:
        return "result", end.value, total
    except DataError as error:
        return "error", error, total
    except Exception:
        return "error", traceback.format_exc(), total


class RayExecutor(Executor):
    """At most ``workers`` tasks at a time; default: the processors of the cluster."""

    def __init__(self, workers: int | None, connect: Callable[[], None] | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise DataError("data.executor: ray needs Ray; install paralm[ray]")
        self._workers, self._connect = workers, connect
        self._ray: Any = None

    def _start(self) -> int:
        """Be connected; returns how many tasks may run at a time."""
        if self._ray is None:
            import ray

            if not ray.is_initialized() and self._connect is not None:
                self._connect()
            if not ray.is_initialized():
                raise DataError("data.executor: ray needs a cluster: call ray.init() before prepare()")
            self._ray = ray
        return self._workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def run(self, tasks: Sequence[Task]) -> Generator[Event, None, None]:
        if not tasks:
            return
        workers = self._start()
        remote = self._ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(_remote)
        folder = os.getcwd()
        running: dict[Any, int] = {}
        following = iter(range(len(tasks)))
        try:
            while True:
                while len(running) < workers and (index := next(following, None)) is not None:
                    running[remote.options(name=f"paralm {tasks[index].label}").remote(tasks[index], folder)] = index
                if not running:
                    return
                ready, _ = self._ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
                for reference in ready:
                    index = running.pop(reference)
                    yield from self._event(tasks[index], index, reference)
        finally:
            for reference in running:
                self._ray.cancel(reference, force=True)

    def _event(self, task: Task, index: int, reference: Any) -> Iterator[Event]:
        try:
            kind, value, delta = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise lost(task, f"Ray lost it ({type(error).__name__}: {reason(error)})") from None
        if kind == "result":
            yield Event(index, delta, value)
        elif isinstance(value, DataError):
            raise value
        else:
            raise RuntimeError(f"a worker failed:\n{value}")
