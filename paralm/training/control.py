"""What reaches a running rank from outside: requests to stop, requests for a stack dump, and silence.

SIGTERM, SIGINT and SIGUSR1 ask the run to save and leave after the step in hand; a second SIGINT ends it at
once. So does a stop file, which a launcher writes where its ranks have another parent or another machine;
SIGINT is then the launcher's alone. SIGUSR2, or a new ``stacks/request`` file (which reaches ranks on other
nodes), writes every thread's stack to ``stacks/rank_00000.txt``; so does a step that takes longer than
``training.hang_timeout``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from paralm.training.checkpoint import write_atomically

_POLL_SECONDS = 0.5  # between a rank's looks for requests
_LOOKS = 64  # a second, of all ranks together: each is a question to the server of a shared file system

stop_file: Path | None = None  # a launcher's worker sets it: a file that holds a signal's number asks for a stop


class Control:
    """Signal handlers and watchdog of one rank; a context manager that puts the old handlers back."""

    def __init__(self, stacks: Path, ranks: Path, rank: int, hang_timeout: float, world_size: int = 1) -> None:
        self.stop_signal: int | None = None
        # Of many ranks the first to see a stop file tells all of them, by the step's last collective.
        self.period = max(_POLL_SECONDS, world_size / _LOOKS)
        self._hang_timeout = hang_timeout
        self._request = stacks / "request"
        self._previous: dict[int, Any] = {}
        self._done = threading.Event()
        stacks.mkdir(parents=True, exist_ok=True)
        ranks.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = (stacks / f"rank_{rank:05d}.txt").open("a", encoding="utf-8")
        self._rank_file = ranks / f"rank_{rank:05d}.json"
        self._about = json.dumps({"rank": rank, "pid": os.getpid(), "host": socket.gethostname()})
        write_atomically(self._rank_file, self._about)
        self._watcher = threading.Thread(target=self._watch, name="paralm-control", daemon=True)

    def __enter__(self) -> Control:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_stop)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1,))  # one that a launcher held comes now
        self._read_stop_file()  # a request from before this rank was so far
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._done.set()
        self._watcher.join(timeout=2 * _POLL_SECONDS)
        with contextlib.suppress(OSError):  # storage may refuse as late as here what was dumped into it
            self._file.close()
        with contextlib.suppress(OSError):
            if self._rank_file.read_text(encoding="utf-8") == self._about:  # not one that a later attempt has made
                self._rank_file.unlink()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop_signal is not None:
            raise KeyboardInterrupt
        self.stop_signal = number

    def alive(self) -> None:
        """Called once a step: the next ``hang_timeout`` seconds without a call dump the stacks.

        The timer is a C thread without the interpreter lock, so it fires even when native code hangs.
        """
        faulthandler.dump_traceback_later(self._hang_timeout, repeat=True, file=self._file)

    def _read_stop_file(self) -> None:
        if stop_file is not None and self.stop_signal is None:
            with contextlib.suppress(OSError, ValueError):  # not there, or not yet whole
                self.stop_signal = int(stop_file.read_text(encoding="utf-8"))

    def _modified(self) -> float | None:
        try:
            return self._request.stat().st_mtime
        except OSError:
            return None

    def _watch(self) -> None:
        seen = self._modified()
        while not self._done.wait(self.period):
            self._read_stop_file()
            now = self._modified()
            if now is not None and now != seen:  # later or, where the clock was set back, earlier
                seen = now
                with contextlib.suppress(OSError):  # a full disk takes none; requests to stop are read all the same
                    os.write(self._file.fileno(), b"--- stacks, as requested\n")
                faulthandler.dump_traceback(file=self._file, all_threads=True)


def request_stacks(stacks: Path) -> None:
    """Ask every live rank of a run, on whatever node, for its stacks."""
    stacks.mkdir(parents=True, exist_ok=True)
    (stacks / "request").write_text("", encoding="utf-8")
    os.utime(stacks / "request")
