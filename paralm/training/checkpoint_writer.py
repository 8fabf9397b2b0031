"""One checkpoint in the making: a thread on every rank, which need no collective to finish it together.

Every rank's thread writes its file into the checkpoint's own hidden folder and then a small record of it. Rank 0's
thread waits for all the records, writes the manifest, and only then gives the folder its name, moves ``latest`` and
applies retention. Whatever goes wrong on whichever rank, and whenever a rank dies, nothing but that folder is lost.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from paralm_data.atomic import write_file

from paralm.errors import CheckpointError
from paralm.training import checkpoint as ckpt

_CHUNK = 1 << 30  # bytes, of many matrices; like all pieces a power of two, to which pinned memory is rounded up
_ALIGNED = 64
_LOOKS = 20  # at what all ranks have written, in the time after which rank 0 gives up
_GRACE = 10.0  # seconds without progress of the others after which a session that ends gives up


class HostBuffer:
    """Host memory that is kept: copies into it cost a memory copy, and no page is touched for the first time.

    Copying into fresh memory each time stalls the loop for most of the time that writing takes; copying into pages
    that are there, for little more than one percent of it.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._chunks: list[torch.Tensor] = []
        self._used: list[int] = []  # bytes of each chunk that are taken

    @property
    def nbytes(self) -> int:
        return sum(chunk.numel() for chunk in self._chunks)

    def reserve(self, sizes: Iterable[int]) -> None:
        """Make room for tensors of these sizes in bytes, in this order, and touch it. Forgets what is in it."""
        sizes = list(sizes)
        left = sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)
        self.clear()
        for size in sizes:
            self._place(size, min(_CHUNK, 1 << max(1, left).bit_length() - 1))
            left -= -(-size // _ALIGNED) * _ALIGNED
        self.clear()

    def clear(self) -> None:
        """Forget what is in it; the memory stays."""
        self._used = [0] * len(self._chunks)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's values, in the buffer. From a device: valid once the device is synchronised."""
        source = tensor.detach()
        place = self._place(source.numel() * source.dtype.itemsize, 0)
        target = place.view(source.dtype).view(source.shape)
        return target.copy_(source, non_blocking=self._pin)

    def _place(self, size: int, least: int) -> torch.Tensor:
        """In the first chunk that has room, so that little stays free behind large tensors."""
        taken = -(-size // _ALIGNED) * _ALIGNED
        room = (at for at, chunk in enumerate(self._chunks) if self._used[at] + taken <= chunk.numel())
        at = next(room, len(self._chunks))
        if at == len(self._chunks):
            whole = max(1 << max(1, taken - 1).bit_length(), least, 1 << 16)
            self._chunks.append(torch.empty(whole, dtype=torch.uint8, pin_memory=self._pin).zero_())
            self._used.append(0)
        begin = self._used[at]
        self._used[at] += taken
        return self._chunks[at][begin : begin + size]


@dataclass(frozen=True)
class Plan:
    """What is to be written, and where. ``meta`` and what follows it matter to rank 0 only."""

    checkpoints: Path
    step: int
    attempt: int
    count: int  # of this attempt's saves
    rank: int
    world_size: int
    patience: float  # seconds without any progress of a rank after which rank 0 gives up
    superseded: Callable[[], bool]
    meta: dict[str, Any]
    before_manifest: Callable[[], None]  # what must be on the disk before the checkpoint is; may raise OSError
    retention: Callable[[], object]

    @property
    def folder(self) -> Path:
        return ckpt.writing_folder(self.checkpoints, self.step, self.attempt, self.count)


def record_file(rank: int) -> str:
    return f"record_{rank:05d}.json"


class CheckpointWrite:
    """A checkpoint that is being written. After :attr:`finished`, :attr:`problem` says why it was not, or is None."""

    def __init__(
        self,
        plan: Plan,
        fragments: Iterable[tuple[str, str, int, torch.Tensor]],
        own: dict[str, torch.Tensor],
    ) -> None:
        """``fragments`` and ``own`` as for :func:`paralm.training.checkpoint.write_rank_file`, and unchanged until
        :attr:`written`.
        """
        self.plan = plan
        self.problem: str | None = None
        self.remark: str | None = None  # why ``latest`` does not name the checkpoint, which is whole
        self.superseded = False
        self.seconds = 0.0
        self.written = threading.Event()  # this rank's file, or its failure
        self.finished = threading.Event()  # all of this rank's work; on rank 0: the checkpoint's fate
        self._fragments, self._own = fragments, own
        self._given_up: str | None = None
        self._patience = plan.patience
        self._thread = threading.Thread(target=self._run, name="paralm-checkpoint", daemon=True)
        self._started = time.monotonic()
        self._thread.start()

    def give_up(self, reason: str) -> None:
        """Rank 0: wait for no more records."""
        self._given_up = reason

    def hurry(self) -> None:
        """Rank 0: be less patient, the session ends."""
        self._patience = min(self._patience, _GRACE)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread; whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- in the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.problem = self._guarded(self._write)
            self.written.set()
            if self.plan.rank == 0 and self.problem is None:
                self.problem = self._guarded(self._complete)
            if self.plan.rank == 0 and self.problem is not None:
                shutil.rmtree(self.plan.folder, ignore_errors=True)
        finally:
            self.seconds = time.monotonic() - self._started
            self.written.set()
            self.finished.set()

    def _guarded(self, work: Callable[[], str | None]) -> str | None:
        try:
            return work()
        except OSError as error:
            return f"rank {self.plan.rank}: {error}"
        except Exception as error:  # a thread's exception would go unnoticed, and everyone would wait for it
            return f"rank {self.plan.rank}: {type(error).__name__}: {error}"

    def _write(self) -> str | None:
        plan = self.plan
        problem = None
        try:
            record: dict[str, Any] = asdict(ckpt.write_rank_file(plan.folder, plan.rank, self._fragments, self._own))
        except OSError as error:
            problem = f"rank {plan.rank}: {error}"
            record = {"problem": problem}
        finally:
            self._fragments, self._own = (), {}
        content = json.dumps({"attempt": plan.attempt, **record}).encode()
        try:
            write_file(plan.folder / record_file(plan.rank), content)
        except OSError as error:
            problem = problem or f"rank {plan.rank}: {error}"
        return problem

    def _complete(self) -> str | None:
        """Rank 0: the records, the manifest, the name, ``latest``, retention. Returns why not, or None."""
        plan = self.plan
        if not plan.superseded():  # a later attempt's folder is not ours to tidy up
            with contextlib.suppress(OSError):  # an old folder that cannot be looked at is no reason to write none
                ckpt.remove_unfinished(plan.checkpoints, but=plan.folder)
        files: list[ckpt.RankFile] = []
        for rank in range(plan.world_size):
            record = self._record(rank)
            if isinstance(record, str):
                return record
            files.append(record)
        for rank in range(plan.world_size):
            (plan.folder / record_file(rank)).unlink()
        plan.before_manifest()
        ckpt.write_manifest(plan.folder, files, plan.meta)
        if plan.superseded():  # as late as can be: a later attempt has the run now
            self.superseded = True
            return "a later attempt at this run has begun"
        refused = ckpt.install(plan.folder, plan.checkpoints, plan.step)
        with contextlib.suppress(OSError, CheckpointError):  # nor is it one to call a whole checkpoint not written
            plan.retention()
        if refused:  # by a disk that was full until now, perhaps
            self.remark = ckpt.name_latest(plan.checkpoints, plan.step)
        return None

    def _record(self, rank: int) -> ckpt.RankFile | str:
        path = self.plan.folder / record_file(rank)
        pause, last, since, looked = 0.002, -1, time.monotonic(), -math.inf
        while True:
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                break
            except FileNotFoundError:
                pass
            if self._given_up is not None:
                return self._given_up
            now = time.monotonic()
            if now - looked > self._patience / _LOOKS:  # seldom: the size of a file in work is asked of who writes it
                looked = now
                if (progress := self._progress()) != last:
                    last, since = progress, now
                if now - since > self._patience:
                    return f"rank {rank} wrote nothing for {self._patience:.0f} s"
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        if "problem" in record:
            return str(record["problem"])
        fragments = [(kind, name, offset, numel) for kind, name, offset, numel in record["fragments"]]
        return ckpt.RankFile(record["name"], record["size"], record["sha256"], fragments)

    def _progress(self) -> int:
        """Grows while anyone writes."""
        total = 0
        try:
            with os.scandir(self.plan.folder) as entries:
                for entry in entries:
                    total += 1 + entry.stat().st_size
        except OSError:
            return -1
        return total
