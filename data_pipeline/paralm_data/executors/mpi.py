"""Tasks on MPI ranks: rank 0 gives them out, and works too; the others ask for the next one when they are free.

Every rank calls :func:`paralm_data.prepare` with the same arguments. Rank 0 looks for messages between two steps of its
own task, so no rank is spent on waiting. A rank that is lost ends the job, as MPI has it: the same command goes on.
"""

from __future__ import annotations

import os
import time
import traceback
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from paralm_data.errors import DataError
from paralm_data.executors import Event, Executor, Task
from paralm_data.progress import Delta

IDLE_SECONDS = 0.002  # between looks for a message; MPI's own waiting would keep a processor busy
_TO_LEADER, _TO_FOLLOWER = 7101, 7102


class MPIExecutor(Executor):
    """On the ranks of COMM_WORLD; ``workers``: at most so many of them, default all."""

    def __init__(self, workers: int | None) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"data.executor: mpi needs mpi4py and an MPI ({first}); install paralm[mpi]") from None
        self._any = MPI.ANY_SOURCE
        self._world = MPI.COMM_WORLD.Dup()
        size = self._world.Get_size()
        started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if size == 1 and started > 1 and "OMPI_COMM_WORLD_SIZE" not in os.environ:
            raise DataError(
                f"srun started {started} tasks, and MPI sees one: srun needs --mpi=pmix (or what your MPI was built "
                "with), or use mpirun in the allocation"
            )
        self.workers = min(workers or size, size)
        self.leads = self._world.Get_rank() == 0
        self._closed = False

    def run(self, tasks: Sequence[Task]) -> Generator[Event, None, None]:
        waiting = deque(range(len(tasks)))
        free = list(range(self.workers - 1, 0, -1))
        given: dict[int, int] = {}  # rank → index
        mine: tuple[int, Generator[Delta, None, dict[str, Any]]] | None = None
        while waiting or given or mine is not None:
            while waiting and free:
                rank, index = free.pop(), waiting.popleft()
                self._world.send(("task", tasks[index]), dest=rank, tag=_TO_FOLLOWER)
                given[rank] = index
            if mine is None and waiting:
                index = waiting.popleft()
                mine = index, tasks[index].run()
            if mine is not None:
                index, running = mine
                try:
                    yield Event(index, next(running))
                except StopIteration as end:
                    mine = None
                    yield Event(index, Delta(), end.value)
            elif given and not self._world.iprobe(source=self._any, tag=_TO_LEADER):
                time.sleep(IDLE_SECONDS)
            while given and self._world.iprobe(source=self._any, tag=_TO_LEADER):
                rank, kind, value = self._world.recv(source=self._any, tag=_TO_LEADER)
                index = given[rank]
                if kind == "delta":
                    yield Event(index, value)
                    continue
                del given[rank]
                free.append(rank)
                if kind == "result":
                    yield Event(index, Delta(), value)
                elif isinstance(value, DataError):
                    raise value
                else:
                    raise RuntimeError(f"rank {rank} failed:\n{value}")

    def follow(self) -> None:
        rank = self._world.Get_rank()
        while True:
            while not self._world.iprobe(source=0, tag=_TO_FOLLOWER):
                time.sleep(IDLE_SECONDS)
            kind, value = self._world.recv(source=0, tag=_TO_FOLLOWER)
            if kind == "end":
                self._closed = True
                if value is not None:
                    raise DataError(value)
                return
            running = value.run()
            try:
                while True:
                    self._world.send((rank, "delta", next(running)), dest=0, tag=_TO_LEADER)
                    if self._world.iprobe(source=0, tag=_TO_FOLLOWER):
                        break  # an end in the middle of a task: the leader has failed
            except StopIteration as end:
                self._world.send((rank, "result", end.value), dest=0, tag=_TO_LEADER)
            except DataError as error:
                self._world.send((rank, "error", error), dest=0, tag=_TO_LEADER)
            except Exception:
                self._world.send((rank, "error", traceback.format_exc()), dest=0, tag=_TO_LEADER)

    def close(self, error: BaseException | None = None) -> None:
        if self._closed or not self.leads:
            return
        self._closed = True
        why = None if error is None else " ".join(str(error).split()) or type(error).__name__
        for rank in range(1, self._world.Get_size()):
            self._world.send(("end", why), dest=rank, tag=_TO_FOLLOWER)
