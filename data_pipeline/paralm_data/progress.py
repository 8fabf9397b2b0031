"""How far a long job is: plain numbers, a few times a second, for whoever shows them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """So far in ``stage``: documents, bytes of text, tokens, seconds. ``done``: the stage has ended."""

    stage: str
    documents: int
    bytes: int
    tokens: int
    seconds: float
    done: bool = False

    @property
    def mb_per_s(self) -> float:
        """Megabytes (10⁶) of text a second."""
        return self.bytes / 1e6 / max(self.seconds, 1e-9)

    @property
    def documents_per_s(self) -> float:
        """Documents a second."""
        return self.documents / max(self.seconds, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)


class Meter:
    """Counts one stage and reports it at its beginning, every EVERY seconds at most, and at its end."""

    EVERY = 0.2

    def __init__(self, stage: str, report: Callable[[Progress], None] | None) -> None:
        self._stage, self._report = stage, report
        self._start = self._last = time.monotonic()
        self._documents = self._bytes = self._tokens = 0
        self._tell(False)

    def add(self, documents: int, n_bytes: int, tokens: int = 0) -> None:
        """More is done."""
        self._documents += documents
        self._bytes += n_bytes
        self._tokens += tokens
        if time.monotonic() - self._last >= self.EVERY:
            self._tell(False)

    def done(self) -> None:
        """The stage has ended."""
        self._tell(True)

    def _tell(self, done: bool) -> None:
        self._last = time.monotonic()
        if self._report is not None:
            seconds = self._last - self._start
            self._report(Progress(self._stage, self._documents, self._bytes, self._tokens, seconds, done))
