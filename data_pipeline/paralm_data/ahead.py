"""Reading ahead: what the next batch lies in, into the system's memory while the step before it is computed.

A store is mapped, and a map reads a page when it is touched: a batch of random windows waits for one read of the
storage after another, in the loop's time, and of hundreds of ranks all wait for the slowest. Here the same bytes are
read from the files in a thread, and the map then finds them. Nothing else follows from it: what cannot be read ahead is
left to the batch itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from pathlib import Path

from paralm_data.loader import StepLoader
from paralm_data.manifest import TOKENS

PIECE = 1 << 20  # bytes read at once

_Bytes = list[tuple[Path, int, int]]  # file, first byte, how many


class Ahead:
    """One thread, one batch at a time. :meth:`close` ends it."""

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[_Bytes | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None  # a daemon: a read of storage that hangs may never end
        self._files: dict[Path, int] = {}

    def read(self, loader: StepLoader, step: int) -> None:
        """Begin to read what the batch of ``step`` lies in; not while the one before is still being read."""
        if not self._idle.is_set():
            return
        wanted: _Bytes = []
        for store, (starts, lengths) in loader.spans(step):
            size = store.tokens.dtype.itemsize
            file = store.path / TOKENS
            wanted += [(file, at * size, count * size) for at, count in zip(starts.tolist(), lengths.tolist())]
        if not wanted:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="paralm-ahead", daemon=True)
            self._thread.start()
        self._idle.clear()
        self._wanted.put(wanted)

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing is being read; whether that came about."""
        return self._idle.wait(timeout)

    def close(self) -> None:
        """End the thread when it has done what it does."""
        self._wanted.put(None)

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            for place in wanted:
                with contextlib.suppress(OSError):  # the batch meets it too, and says so
                    self._touch(*place)
            self._idle.set()
        for file in self._files.values():
            os.close(file)

    def _touch(self, path: Path, first: int, count: int) -> None:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        for at in range(first, first + count, PIECE):
            os.pread(self._files[path], min(PIECE, first + count - at), at)
