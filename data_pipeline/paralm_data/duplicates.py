"""Which documents are duplicates, decided over keys on disk in memory that does not grow with the corpus.

Documents are ordered as in the source. A document is dropped if an earlier one has one of its keys: the digest of its
text (an exact duplicate), or a band of its MinHash signature (a near-duplicate). That is a function of the source
alone, and no two documents that are kept share a key. The keys' range is cut into partitions of
about PARTITION keys, and each is decided by itself (:class:`Partition`), from files that have the keys of several
shards (:class:`Merge`); what all of them decided of GROUP shards is gathered in one file (:class:`Gather`), in which
each shard finds its own (:class:`Choose`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paralm_data.progress import Delta
from paralm_data.scanning import BAD, DUPLICATE, EMPTY, HELD_OUT, KEPT, KEY, NEAR_DUPLICATE, ROW, RULE, first_of_each
from paralm_data.scratch import Files, blocks, map_array

PARTITION = 1 << 20  # keys decided at once: about 50 MB
MERGED = 1 << 21  # keys in one file, at most, of several shards: about 150 MB while it is made
GROUP = 64  # shards
_SHARD = 32  # bits of a record's number in its shard, with the bit that says which kind of key


class Keys(NamedTuple):
    """A file of keys: the marker it lies beside, where its sorted runs begin, and the shard that its records count
    from."""

    marker: Path
    runs: list[int]
    shard: int

    def read(self) -> NDArray[Any]:
        """(n,) KEY, mapped. DataError if the file is not as it was written."""
        return map_array(self.marker.with_suffix(".keys"), KEY, self.runs[-1])


def groups_of(files: Sequence[Keys]) -> list[list[Keys]]:
    """Consecutive files of shards, together of at most MERGED keys; one that has more is alone."""
    found: list[list[Keys]] = []
    size = 0
    for file in files:
        if not found or size + file.runs[-1] > MERGED:
            found.append([])
            size = 0
        found[-1].append(file)
        size += file.runs[-1]
    return found


@dataclass(frozen=True)
class Merge:
    """A task: the keys of consecutive shards in one file, sorted by their first halves. If each partition looked in
    all shards, files would be opened shards times partitions times.
    """

    files: tuple[Keys, ...]
    folder: Path

    @property
    def label(self) -> str:
        return f"keys, shards from {self.files[0].shard + 1} on"

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.files[0].shard:08d}.json"

    @property
    def weight(self) -> float:
        return 1.0

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Result: how many."""
        found = []
        for file in self.files:
            part = np.array(file.read())
            part["record"] += np.uint64((file.shard - self.files[0].shard) << _SHARD)
            found.append(part)
            yield Delta()
        keys = np.concatenate(found)
        found.clear()
        with Files(self.marker) as files:
            files.write(".keys", keys[np.argsort(keys["high"], kind="stable")].tobytes())
            return files.finish({"keys": len(keys)})


@lru_cache(maxsize=2)
def _files_of(plan: Path) -> list[Keys]:
    return [Keys(Path(marker), runs, shard) for marker, runs, shard in json.loads(plan.read_bytes())]


@dataclass(frozen=True)
class Partition:
    """A task: of the keys in the ``number``-th of ``count`` equal ranges, which records are not their key's first.

    ``plan``: a JSON file with all files of keys, in order. ``.later`` has shard << 32 | record << 1 | (1 for a band),
    sorted.
    """

    plan: Path
    number: int
    count: int
    folder: Path

    @property
    def label(self) -> str:
        return f"duplicates, part {self.number + 1} of {self.count}"

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.number:06d}.json"

    @property
    def weight(self) -> float:
        return 1.0

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Result: how many."""
        found = []
        for file in _files_of(self.plan):
            mapped = file.read()
            for start, stop in itertools.pairwise(file.runs):
                high = mapped["high"][start:stop]
                first, last = (int(np.searchsorted(high, np.uint64(b))) if b < 1 << 64 else stop - start
                               for b in (self._bound(self.number), self._bound(self.number + 1)))  # fmt: skip
                part = np.array(mapped[start + first : start + last])
                part["record"] += np.uint64(file.shard << _SHARD)
                found.append(part)
            yield Delta()
        keys = np.concatenate(found) if found else np.empty(0, KEY)
        found.clear()
        return _finish(self.marker, _later(keys))

    def _bound(self, number: int) -> int:
        return (number << 64) // self.count


def _finish(marker: Path, later: NDArray[np.uint64]) -> dict[str, Any]:
    """Write ``.later``, sorted and each once; the task's result."""
    later = np.unique(later)
    with Files(marker) as files:
        files.write(".later", later.astype("<u8").tobytes())
        return files.finish({"later": len(later)})


def _later(keys: NDArray[Any]) -> NDArray[np.uint64]:
    """Records that are not their key's first. Most keys are alone in their first half, and need no further look."""
    order = np.argsort(keys["high"])
    high = keys["high"][order]
    same = np.zeros(len(keys) + 1, np.bool_)
    same[1:-1] = high[1:] == high[:-1]
    return first_of_each(keys[order[same[1:] | same[:-1]]])[1]


@dataclass(frozen=True)
class Gather:
    """A task: ``.later`` of the shards ``first`` to ``end`` - 1, out of those of all ``count`` partitions, which lie in
    ``partitions``. If each shard looked in all of them, files would be opened shards times partitions times.
    """

    partitions: Path
    count: int
    first: int
    end: int
    folder: Path

    @property
    def label(self) -> str:
        return f"duplicates, shards from {self.first + 1} on"

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.first:08d}.json"

    @property
    def weight(self) -> float:
        return 1.0

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Result: how many."""
        found = []
        for number in range(self.count):
            later = map_array(self.partitions / f"{number:06d}.later", "<u8")
            found.append(np.array(_of_shards(later, self.first, self.end)))
            yield Delta()
        return _finish(self.marker, np.concatenate(found))


def _of_shards(later: NDArray[np.uint64], first: int, end: int) -> NDArray[np.uint64]:
    """What a ``.later`` file has of the shards ``first`` to ``end`` - 1."""
    a, b = np.searchsorted(later, np.array([first << _SHARD, end << _SHARD], np.uint64))
    return later[a:b]


@dataclass(frozen=True)
class Choose:
    """A task: the fate of every record of a shard, in ``.fates``, a byte each.

    ``scan``: the marker of the shard's scan. ``later``: a file with its records that are not the first of their keys;
    none: nothing is dropped. ``held_out``: the fraction, None for a set that is kept whole.
    """

    scan: Path
    shard: int
    name: str
    later: Path | None
    held_out: float | None
    folder: Path

    @property
    def label(self) -> str:
        return self.name

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.shard:08d}.json"

    @property
    def weight(self) -> float:
        return 1.0

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Result: counts by fate, bytes of train and held-out text, the least position of a kept document, and a
        digest of the fates."""
        dropped = self._dropped()
        counts, sizes, at = np.zeros(7, np.int64), np.zeros(7, np.int64), 0
        least, told = 1.0, hashlib.sha256()
        with Files(self.marker) as files:
            for rows in blocks(self.scan.with_suffix(".rows"), ROW, 1 << 18):
                fates = rows["fate"].copy()
                for kind, records in dropped.items():
                    instead_of = (KEPT, NEAR_DUPLICATE) if kind == DUPLICATE else (KEPT,)
                    here = records[slice(*np.searchsorted(records, (at, at + len(rows))))] - at
                    fates[here[np.isin(fates[here], instead_of)]] = kind
                kept = fates == KEPT
                positions = rows["position"].astype(np.float64) / 2.0**64  # exactly what split.position gives
                if kept.any():
                    least = min(least, float(positions[kept].min()))
                if self.held_out is not None:
                    fates[kept & (positions < self.held_out)] = HELD_OUT
                counts += np.bincount(fates, minlength=7)
                sizes += np.bincount(fates, rows["bytes"].astype(np.float64), minlength=7).astype(np.int64)
                told.update(fates.tobytes())
                files.write(".fates", fates.tobytes())
                at += len(rows)
                yield Delta()
            return files.finish(
                {
                    "train": int(counts[KEPT]), "held_out": int(counts[HELD_OUT]), "empty": int(counts[EMPTY]),
                    "bad": int(counts[BAD]), "rules": int(counts[RULE]), "duplicates": int(counts[DUPLICATE]),
                    "near_duplicates": int(counts[NEAR_DUPLICATE]), "train_bytes": int(sizes[KEPT]),
                    "held_out_bytes": int(sizes[HELD_OUT]), "least_position": least, "digest": told.hexdigest()[:20],
                }
            )  # fmt: skip

    def _dropped(self) -> dict[int, NDArray[np.int64]]:
        """Fate → records of this shard that have it, ascending; an exact duplicate of some has the bands of others,
        too."""
        if self.later is None:
            return {}
        own = _of_shards(map_array(self.later, "<u8"), self.shard, self.shard + 1).astype(np.int64)
        own &= (1 << _SHARD) - 1
        return {DUPLICATE: own[own & 1 == 0] >> 1, NEAR_DUPLICATE: own[own & 1 == 1] >> 1}


def fates_of(marker: Path) -> NDArray[np.uint8]:
    """What :class:`Choose` decided of each record of a shard, mapped; none where there is no file."""
    path = marker.with_suffix(".fates")
    return map_array(path, np.uint8, None if path.exists() else 0)
