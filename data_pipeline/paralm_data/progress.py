"""How far a long job is: plain numbers, a few times a second, for whoever shows them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Delta(NamedTuple):
    """What a task has done since it last said so. ``work``: in the unit of the stage's total."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    work: float = 0.0

    def plus(self, other: Delta) -> Delta:
        """Both together."""
        return Delta(
            self.documents + other.documents, self.bytes + other.bytes, self.tokens + other.tokens,
            self.work + other.work,
        )  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """So far in ``stage``: documents, bytes of text, tokens, seconds. ``done``: the stage has ended.

    ``fraction``: of the stage's work, None where its size is not known. ``before``: the fraction that was there when
    the stage began, of an earlier attempt; documents, bytes and tokens count what is done now.
    """

    stage: str
    documents: int
    bytes: int
    tokens: int
    seconds: float
    done: bool = False
    fraction: float | None = None
    before: float = 0.0

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

    @property
    def eta(self) -> float | None:
        """Seconds to the stage's end at the pace so far; None where that is not known."""
        if self.fraction is None or self.fraction <= self.before:
            return None
        return self.seconds * (1.0 - self.fraction) / (self.fraction - self.before)


class Meter:
    """Counts one stage and reports it at its beginning, every EVERY seconds at most, and at its end.

    ``work``: the size of the stage, in the unit of ``Delta.work``; ``before``: how much of it was done earlier.
    """

    EVERY = 0.2

    def __init__(
        self, stage: str, report: Callable[[Progress], None] | None, work: float | None = None, before: float = 0.0
    ) -> None:
        self._stage, self._report = stage, report
        self._total, self._before, self._work = work, before, before
        self._start = self._last = time.monotonic()
        self._documents = self._bytes = self._tokens = 0
        self._tell(False)

    def add(self, documents: int, n_bytes: int, tokens: int = 0, work: float = 0.0) -> None:
        """More is done."""
        self._documents += documents
        self._bytes += n_bytes
        self._tokens += tokens
        self._work += work
        if time.monotonic() - self._last >= self.EVERY:
            self._tell(False)

    def done(self) -> None:
        """The stage has ended."""
        if self._total is not None:
            self._work = self._total
        self._tell(True)

    def _tell(self, done: bool) -> None:
        self._last = time.monotonic()
        if self._report is None:
            return
        fraction = min(1.0, self._work / self._total) if self._total else None
        before = min(1.0, self._before / self._total) if self._total else 0.0
        seconds = self._last - self._start
        self._report(Progress(self._stage, self._documents, self._bytes, self._tokens, seconds, done, fraction, before))
