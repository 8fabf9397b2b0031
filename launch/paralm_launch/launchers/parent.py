"""The launcher's side of a launch: shows what rank 0 says, passes signals on, returns what the ranks returned."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from paralm.config import Config
from paralm.errors import RunError
from paralm_launch.launchers.exchange import LOST, Exchange, restore_error, restore_result

if TYPE_CHECKING:
    from paralm.training.loop import TrainResult

_ERROR_GRACE = 20.0  # seconds that ranks have to notice another's error
_POLL_SECONDS = 0.1  # between two looks into the run folder, of all nodes' launchers together
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Crash(RuntimeError):
    """A rank ended with an error that nobody foresaw; its traceback is the message."""


class Launch:
    """A context manager around the processes of one launch.

    SIGTERM, SIGINT and SIGUSR1 ask all ranks to save and leave; a second SIGINT, or ``launcher.stop_grace`` seconds
    without an end, ends them at once. Whatever happens, no rank is left when it closes: ``end`` is called to make
    sure of it.
    """

    def __init__(
        self,
        config: Config,
        on_progress: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
        end: Callable[[], None] | None = None,
    ) -> None:
        self.config, self._on_progress, self.say = config, on_progress, say
        self.end = end or self.end_children
        self.exchange = Exchange.create(config)
        self.stopping = 0
        self._position = 0
        self._done = threading.Event()
        self._grace: threading.Timer | None = None
        self._previous: dict[int, Any] = {}
        self._tail = threading.Thread(target=self._follow, name="paralm-launch", daemon=True)

    def __enter__(self) -> Launch:
        self.take_signals()
        self._tail.start()
        return self

    def take_signals(self) -> None:
        """Let this launch answer the signals; again, after something else has taken them."""
        if threading.current_thread() is threading.main_thread():
            for number in _STOPS:
                before = signal.signal(number, self._on_stop)
                self._previous.setdefault(number, before)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1,))  # one that was held is answered now

    def __exit__(self, *error: object) -> None:
        if self._grace is not None:
            self._grace.cancel()
        self.end()
        self._done.set()
        self._tail.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.exchange.remove()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stopping:
            self.end()
            raise KeyboardInterrupt
        if self.stopping:
            return
        self.stopping = number
        self.exchange.ask_to_stop(number)
        self._grace = threading.Timer(self.config.launcher.stop_grace, self.end)
        self._grace.daemon = True
        self._grace.start()

    def _follow(self) -> None:
        failed_since: float | None = None
        while not self._done.wait(_POLL_SECONDS * self.config.launcher.nodes):
            self._show()
            if failed_since is None and any(o.get("error", "StoppedError") != "StoppedError" for o in self._outcomes()):
                failed_since = time.monotonic()
            if failed_since is not None and time.monotonic() - failed_since > _ERROR_GRACE:
                # One rank has ended in an error that all share in the end; the others may wait for it for very long.
                failed_since = math.inf
                self.end()
        self._show()

    def _outcomes(self) -> list[dict[str, Any]]:
        try:
            return self.exchange.outcomes()
        except (OSError, ValueError):  # being written, or being removed
            return []

    def _show(self) -> None:
        found, self._position = self.exchange.read_progress(self._position)
        for entry in found:
            if "row" in entry:
                self._on_progress(entry["row"])
            else:
                self.say(entry["say"])

    def children(self) -> list[psutil.Process]:
        """The processes of this launch below this one."""
        mine = str(self.exchange.path)
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if mine in process.cmdline():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end_children(self) -> None:
        """End what is left of them, at once."""
        for process in self.children():
            try:
                process.kill()
            except psutil.Error:
                continue

    def over(self) -> bool:
        """Whether another start could change anything."""
        return bool(self.exchange.outcomes()) or bool(self.stopping)

    def result(self, reason: str) -> TrainResult:
        """What the ranks returned, or raise what they raised. ``reason``: why there are no ranks, where they do not
        say it themselves.
        """
        outcomes = self.exchange.outcomes()
        if outcomes and "result" not in outcomes[0]:
            raise restore_error(outcomes[0])
        if outcomes:
            return restore_result(outcomes[0])
        failures = self.exchange.failures()
        crashes = [failure for failure in failures if failure["trace"]]
        if crashes and not self.stopping:
            raise Crash(f"rank {crashes[-1]['rank']} of the training ended with\n{crashes[-1]['trace']}")
        words = [f["line"] for f in failures if not f["line"].startswith(LOST)]
        why = words[-1] if words else reason
        if self.stopping:
            name = signal.Signals(self.stopping).name
            raise RunError(f"{name}: the ranks did not save and leave in time ({why}); the newest checkpoint stands")
        starts = self.exchange.starts()
        raise self._lost(
            f"{why}; the ranks were started {starts} times (launcher.max_failures is "
            f"{self.config.launcher.max_failures}); the same command continues"
        )

    @staticmethod
    def _lost(line: str) -> Exception:
        from paralm.training.rendezvous import LostRanksError

        return LostRanksError(line)


def worker_command(exchange: Exchange) -> list[str]:
    """The command that is one rank."""
    return [sys.executable, "-m", "paralm_launch.launchers.worker", str(exchange.path)]


def number_of_ranks(config: Config) -> int:
    """``launcher.ranks``, or one a GPU of this machine, or one."""
    if config.launcher.ranks is not None:
        return config.launcher.ranks
    import torch

    return config.launcher.nodes * max(1, torch.cuda.device_count())


def ended_by(code: int) -> str:
    """``ended by SIGKILL`` or ``ended with code 1``."""
    if code < 0:
        try:
            return f"ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"ended by signal {-code}"
    return f"ended with code {code}"


def worker_environment() -> dict[str, str]:
    """This process's environment for ranks: without what made this process itself one of a group."""
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
    return {key: value for key, value in os.environ.items() if key not in ours}
