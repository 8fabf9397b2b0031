"""Which source each row of a stream is drawn from, so that every source is always within one row of its share.

The chairman assignment (Tijdeman, Discrete Mathematics 32, 1980): of K sources with weights λ_i that sum to one, the
n-th row goes to the one that must have it first, among those that may: with x_i the rows i had before,

    may:   n λ_i − x_i ≥ 1/(2K−2)
    must:  at the first N with N λ_i − x_i ≥ 1 − 1/(2K−2)

and then |x_i − n λ_i| ≤ 1 − 1/(2K−2) after every row, for every source. Weights are whole numbers of RESOLUTION-ths
(:func:`shares`) and the arithmetic is of integers, so the order is the same on every machine, and it has a period: any
row is found without those before it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESOLUTION = 1 << 16


def shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to RESOLUTION, as near as can be to ``weights`` (finite, none negative, one positive).

    By largest remainders, ties to the first; a positive weight gets at least 1, a weight of 0 gets 0.
    """
    total = math.fsum(weights)
    exact = [weight / total * RESOLUTION for weight in weights]
    found = [max(math.floor(value), int(value > 0)) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: max(0, RESOLUTION - sum(found))]:
        found[i] += 1
    while sum(found) > RESOLUTION:  # many sources were lifted to 1
        found[max(range(len(found)), key=lambda i: found[i])] -= 1
    return found


class Quota:
    """The stream of rows under ``parts``, one whole number a source, from row 0 on.

    ``owed``: what sources have to get from before, in RESOLUTION-ths of a row, summing to 0; with it there is no period
    and rows are computed one after the other up to the one asked for. With weights that changed on the way no source
    is ever more than one row ahead; one may be up to K − 1 rows behind.
    """

    def __init__(self, parts: Sequence[int], owed: Sequence[int] | None = None) -> None:
        if sum(parts) != RESOLUTION or min(parts) < 0:
            raise ValueError(f"shares {list(parts)} are not of {RESOLUTION}")
        self.parts = [int(part) for part in parts]
        self.owed = [0] * len(parts) if owed is None else [int(value) for value in owed]
        self.period: int | None = None if any(self.owed) else RESOLUTION // math.gcd(*self.parts)
        active = sum(part > 0 for part in self.parts)
        self._scale = max(1, 2 * active - 2)  # 2K − 2
        self._had = [0] * len(parts)
        self._waiting: list[tuple[int, int]] = []  # (row from which it may, source)
        self._ready: list[tuple[int, int]] = []  # (row by which it must, source)
        for source, part in enumerate(self.parts):
            if part:
                heapq.heappush(self._waiting, (self._row(source, 1), source))
        self._sources = np.empty(0, np.int16 if len(parts) < 2**15 else np.int64)
        self._ordinals = np.empty(0, np.int64)
        self._known = 0

    def _row(self, source: int, numerator: int) -> int:
        """The first row n (from 1) with n λ − x ≥ numerator / (2K − 2), of a source that has had x."""
        wanted = numerator * RESOLUTION + self._scale * (self._had[source] * RESOLUTION - self.owed[source])
        return -(-wanted // (self._scale * self.parts[source]))

    def _grow(self, rows: int) -> None:
        """Know the first ``rows`` rows."""
        if rows <= self._known:
            return
        rows = max(rows, min(2 * self._known, self._known + 4096))
        rows = rows if self.period is None else min(rows, self.period)
        if rows > len(self._sources):
            size = max(rows, 2 * len(self._sources))
            self._sources, self._ordinals = np.resize(self._sources, size), np.resize(self._ordinals, size)
        waiting, ready = self._waiting, self._ready
        for row in range(self._known + 1, rows + 1):
            while waiting and waiting[0][0] <= row:
                source = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (self._row(source, self._scale - 1), source))
            source = heapq.heappop(ready)[1] if ready else heapq.heappop(waiting)[1]
            self._sources[row - 1], self._ordinals[row - 1] = source, self._had[source]
            self._had[source] += 1
            heapq.heappush(waiting, (self._row(source, 1), source))
        self._known = rows

    def draw(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of rows ``first`` … ``first + count − 1``: the source, and how many rows of it came before; each (count,)."""
        if self.period is None:
            self._grow(first + count)
            rows = slice(first, first + count)
            return self._sources[rows].astype(np.int64), self._ordinals[rows].copy()
        places = np.arange(first, first + count, dtype=np.int64)
        turns, places = places // self.period, places % self.period
        self._grow(int(places.max()) + 1 if count else 0)
        sources = self._sources[places].astype(np.int64)
        each = np.array([part * self.period // RESOLUTION for part in self.parts], np.int64)
        return sources, self._ordinals[places] + turns * each[sources]

    def counts(self, rows: int) -> list[int]:
        """How many of the first ``rows`` rows are each source's."""
        turns, rest = (0, rows) if self.period is None else divmod(rows, self.period)
        self._grow(rest)
        tail = np.bincount(self._sources[:rest].astype(np.int64), minlength=len(self.parts))
        each = [0] * len(self.parts) if not turns else [part * self.period // RESOLUTION for part in self.parts]  # type: ignore[operator]
        return [turns * e + int(t) for e, t in zip(each, tail, strict=True)]

    def owing(self, rows: int) -> list[int]:
        """What each source is owed after ``rows`` rows, in RESOLUTION-ths of a row."""
        had = self.counts(rows)
        return [o + rows * p - x * RESOLUTION for o, p, x in zip(self.owed, self.parts, had, strict=True)]
