"""The first reading of a shard: bad records, documents that break a rule, and the keys that duplicates share.

For each record of the shard, in order, ``.rows`` has its fate so far, the bytes of its (normalised) text, and the first
half of the text's digest. ``.keys`` has, for each document that is kept so far, the digest and the band keys, with the
record's number: in runs of at most RUN keys, each sorted. Within a run a key's later documents are dropped at once; of
equal keys in different runs and shards, the partitions (:mod:`paralm_data.duplicates`) decide.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paralm_data import minhash
from paralm_data.errors import DataError
from paralm_data.progress import Delta
from paralm_data.readers import Record
from paralm_data.rules import broken_rule
from paralm_data.scratch import Files
from paralm_data.sources import Shard
from paralm_data.split import digest
from paralm_data.steps import StepsSpec

KEPT, HELD_OUT, EMPTY, BAD, RULE, DUPLICATE, NEAR_DUPLICATE = range(7)
"""Fates of a record; the first two are kept (a held-out one is told from a train document when all is decided)."""

ROW = np.dtype([("fate", "u1"), ("bytes", "<u8"), ("position", "<u8")])
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("record", "<u8")])  # record: number << 1, and 1 for a band's key
RUN = 1 << 18  # keys
STEP_BYTES = 1 << 20  # of text, between two words about progress


@dataclass(frozen=True)
class Scan:
    """A task; see the module. ``limit``: bad records that are allowed in all, so in this shard too. ``whole``: no rule
    and no removal of duplicates, as for a validation set. ``folder``: of the stage, whose name stands for the steps.
    """

    shard: Shard
    steps: StepsSpec
    whole: bool
    limit: int
    folder: Path

    @property
    def label(self) -> str:
        return self.shard.label

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.shard.key}.json"

    @property
    def weight(self) -> float:
        return float(self.shard.weight)

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Result: counts of records, of broken rules and of bad records, and where the runs of keys begin."""
        with Files(self.marker) as files:
            rows, keys = _Rows(files), _Keys(files)
            rules: Counter[str] = Counter()
            bad: list[Record] = []
            told = work = 0.0
            documents = size = 0
            for record in self.shard.records(self.steps.max_document_bytes):
                if record.problem is not None:
                    bad.append(record)
                    if len(bad) > self.limit:
                        raise too_many((self.shard.place(record), record.problem), len(bad), self.limit)
                    rows.add(BAD, 0, 0)
                    continue
                text = self._steps(record.text)
                fate, n_bytes, key = self._judge(text, rules)
                if fate == KEPT and not self.whole:
                    self._add_keys(keys, text, key, rows.count)
                rows.add(fate, n_bytes, int.from_bytes(key[:8], "big"))
                documents, size = documents + 1, size + n_bytes
                if size >= STEP_BYTES:
                    work = self._work(record.part, record.input)
                    yield Delta(documents, size, 0, work - told)
                    documents, size, told = 0, 0, work
            rows.flush()
            keys.flush(rows)
            if bad:
                files.write(".bad", json.dumps(bad).encode())
            yield Delta(documents, size)
            return files.finish({"records": rows.count, "rules": rules, "bad": len(bad), "runs": keys.runs})

    def _steps(self, text: str) -> str:
        return text if self.whole else self.steps.normalized(text)

    def _judge(self, text: str, rules: Counter[str]) -> tuple[int, int, bytes]:
        if not text:
            return EMPTY, 0, bytes(16)
        broken = None if self.whole else broken_rule(text, self.steps)
        if broken is not None:
            rules[broken] += 1
            return RULE, 0, bytes(16)
        return KEPT, len(text.encode("utf-8")), digest(text)

    def _add_keys(self, keys: _Keys, text: str, key: bytes, number: int) -> None:
        if self.steps.exact_duplicates == "drop":
            keys.add(key, number << 1)
        if self.steps.minhash.enabled:
            for band in minhash.band_keys(text, self.steps.minhash):
                keys.add(band, number << 1 | 1)

    def _work(self, part: int, share: float) -> float:
        parts = self.shard.parts
        return sum(p.weight for p in parts[:part]) + share * parts[part].weight


def too_many(last: tuple[str, str], count: int, limit: int) -> DataError:
    """The error of a bad record that is one too many."""
    place, problem = last
    if not limit:
        return DataError(f"{place}: {problem}")
    return DataError(f"{place}: {problem}; at least {count} bad records, and data.max_bad_records allows {limit}")


class _Rows:
    """``.rows``, a block at a time."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._fates, self._bytes, self._positions = array("B"), array("Q"), array("Q")
        self.count = 0

    def add(self, fate: int, n_bytes: int, position: int) -> None:
        self._fates.append(fate)
        self._bytes.append(n_bytes)
        self._positions.append(position)
        self.count += 1
        if len(self._fates) >= 1 << 16:
            self.flush()

    def flush(self) -> None:
        block = np.empty(len(self._fates), ROW)
        block["fate"] = np.frombuffer(self._fates, np.uint8) if self._fates else 0
        block["bytes"] = np.frombuffer(self._bytes, np.uint64) if self._fates else 0
        block["position"] = np.frombuffer(self._positions, np.uint64) if self._fates else 0
        self._files.write(".rows", block.tobytes())
        self._fates, self._bytes, self._positions = array("B"), array("Q"), array("Q")

    def drop(self, number: int, fate: int) -> None:
        """Change what was flushed."""
        self._files.overwrite(".rows", number * ROW.itemsize, bytes([fate]))


class _Keys:
    """``.keys``, in sorted runs."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._high, self._low, self._records = array("Q"), array("Q"), array("Q")
        self._dropped: dict[int, int] = {}
        self.runs = [0]  # where each begins, and the last one ends

    def add(self, key: bytes, record: int) -> None:
        self._high.append(int.from_bytes(key[:8], "big"))
        self._low.append(int.from_bytes(key[8:], "big"))
        self._records.append(record)
        if len(self._high) >= RUN:
            self._sort()

    def _sort(self) -> None:
        if not self._high:
            return
        run = np.empty(len(self._high), KEY)
        for name, values in (("high", self._high), ("low", self._low), ("record", self._records)):
            run[name] = np.frombuffer(values, np.uint64)
        self._high, self._low, self._records = array("Q"), array("Q"), array("Q")
        run, later = first_of_each(run)
        for record in later.tolist():
            fate = NEAR_DUPLICATE if record & 1 else DUPLICATE
            self._dropped[record >> 1] = min(fate, self._dropped.get(record >> 1, fate))
        self._files.write(".keys", run.tobytes())
        self.runs.append(self.runs[-1] + len(run))

    def flush(self, rows: _Rows) -> None:
        self._sort()
        for number, fate in self._dropped.items():
            rows.drop(number, fate)


def first_of_each(keys: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """Of KEY entries: those with the lowest record of their key, sorted by key; and the records of the others."""
    order = np.lexsort((keys["record"], keys["low"], keys["high"]))
    keys = keys[order]
    again = np.zeros(len(keys), np.bool_)
    again[1:] = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
    return keys[~again], keys["record"][again]


def bad_records(scan: Scan) -> Iterator[tuple[str, str]]:
    """(place, problem) of each bad record that a scan met. The places are looked for here: to count the lines before a
    part of a file, the scans' workers would each read all that is before it.
    """
    path = scan.marker.with_suffix(".bad")
    if path.exists():
        for record in itertools.starmap(Record, json.loads(path.read_bytes())):
            assert record.problem is not None
            yield scan.shard.place(record), record.problem
