"""Text in: files, jsonl, parquet, any `datasets` dataset, or the standard library, as shards of documents.

A source is a list of shards (:func:`shards`), each read by itself: the unit of parallel work. A shard is files, or a
range of a large one: bytes of a jsonl file that is not compressed (a line belongs to the range it begins in), row
groups of a parquet file. :func:`documents` is all of them, in order. Nothing is skipped silently: a record that cannot
be read is a DataError that names file and line (or row); :meth:`Shard.records` gives it with its problem instead.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from paralm_data import readers, stdlib
from paralm_data.errors import DataError, reason
from paralm_data.files import COMPRESSED, find_files
from paralm_data.readers import Part, Record
from paralm_data.specs import Document, SourceSpec

SUFFIXES: dict[str, tuple[str, ...] | None] = {
    "text": None,
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
}


@dataclass(frozen=True)
class Shard:
    """A part of a source that is read from beginning to end by one worker; picklable."""

    spec: SourceSpec
    parts: tuple[Part, ...] = (Part(),)

    @property
    def weight(self) -> int:
        """Bytes of input, at least 1; for what has no size, 1."""
        return max(1, sum(part.weight for part in self.parts))

    @cached_property
    def key(self) -> str:
        """Stands for what is read: another one when a file has another size or time, or another interpreter's
        standard library is read. Every stage asks for it again, and a source may be a list of many files."""
        parts = [[str(p.path), p.start, p.end, p.size, p.modified] for p in self.parts]
        told = [self.spec.as_dict(), parts, [sys.version, str(stdlib.root())] if self.parts[0].path is None else None]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]

    @property
    def label(self) -> str:
        """For messages."""
        first = self.parts[0]
        if first.path is None:
            return self.spec.dataset or self.spec.kind
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"{first.path}{f' from byte {first.start}' if first.start and self.spec.kind == 'jsonl' else ''}{more}"

    @property
    def again(self) -> str:
        """How what has changed is read anew, for messages. Nothing tells that a dataset which is no file here has."""
        same = self.parts[0].path is None and not self.parts[0].modified
        return f"{'remove .work in the folder it is prepared in and ' if same else ''}the same command reads it anew"

    def records(self, max_bytes: int | None = None, skip: readers.Skip = None) -> Iterator[Record]:
        """Its records in a fixed order, good and bad; ``max_bytes``: a longer one is bad. The text of the records that
        ``skip`` is true for is not read. DataError for a file that is damaged as a whole.
        """
        wanted = readers.wanted_of(skip, self.label, self.again)
        found = itertools.chain.from_iterable(
            readers.read(self.spec, part, number, max_bytes, wanted) for number, part in enumerate(self.parts)
        )
        return itertools.islice(found, self.spec.max_documents)

    def documents(self) -> Iterator[Document]:
        """Its documents, in a fixed order."""
        for record in self.records():
            if record.problem is not None:
                raise DataError(f"{self.place(record)}: {record.problem}")
            yield Document(record.text, record.origin or self.place(record))

    def place(self, record: Record) -> str:
        """Where a record is: ``file``, ``file:line``, ``file:row N``, ``dataset[split]:index``."""
        return readers.place(self.spec, self.parts[record.part], record)


def shards(spec: SourceSpec, shard_bytes: int | None = None) -> list[Shard]:
    """The parts of a source in a fixed order: one a file, or of about ``shard_bytes`` each, where large files are cut
    and small ones joined. Raises DataError for a path that leads to no file.
    """
    if spec.kind not in SUFFIXES:
        return [Shard(spec, (readers.part_of_dataset(spec),))]
    files = find_files(spec.paths, SUFFIXES[spec.kind])
    if shard_bytes is None:
        return [Shard(spec, (_whole(path),)) for path in files]
    parts = [part for path in files for part in _cut(spec.kind, _whole(path), shard_bytes)]
    if spec.max_documents is not None:
        return [Shard(spec, tuple(map(_whole, files)))]  # the first so many of all: one after another
    return [Shard(spec, tuple(group)) for group in _groups(parts, shard_bytes)]


def documents(spec: SourceSpec) -> Iterator[Document]:
    """Every document of a source, at most ``max_documents``, in a fixed order. Paths are checked at once."""
    stream = itertools.chain.from_iterable(shard.documents() for shard in shards(spec))
    return itertools.islice(stream, spec.max_documents)


def check_apart(source: SourceSpec, name: str, validation: SourceSpec) -> None:
    """DataError, one line, if validation set ``name`` is read from where the source is: it would be trained on."""
    common = _common(source, validation)
    if common is not None:
        raise DataError(
            f"validation set '{name}': {common} is read by the source, too: it would be trained on, and scored as text "
            "that was not; leave it out of one of them (the source's held-out part is a validation set already), or "
            "give a copy of it, to score what was trained on"
        )


def _common(one: SourceSpec, other: SourceSpec) -> str | None:
    """What two sources both read, in words, or None. Another field of the same records is other text."""
    if one.kind == other.kind == "python-stdlib":
        same = one.subset is None or other.subset is None or one.subset == other.subset
        return "the standard library" if same else None
    if one.kind == other.kind and one.kind != "text" and one.text_key != other.text_key:
        return None
    if one.kind == other.kind == "datasets":
        same = (one.dataset, one.subset, one.split) == (other.dataset, other.subset, other.split)
        return f"{one.dataset}[{one.split}]" if same else None
    if one.kind not in SUFFIXES or other.kind not in SUFFIXES:
        return None
    known: dict[tuple[int, int], list[Path]] = {}
    for path, size, modified in _files(one):
        known.setdefault((size, modified), []).append(path)
    for path, size, modified in _files(other):
        if any(path == there or path.samefile(there) for there in known.get((size, modified), [])):
            return str(path)
    return None


def _files(spec: SourceSpec) -> Iterator[tuple[Path, int, int]]:
    """Path, size and time of each file of a source."""
    for path in find_files(spec.paths, SUFFIXES[spec.kind]):
        part = _whole(path)
        yield path, part.size, part.modified


def _whole(path: Path) -> Part:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from error
    return Part(path, size=found.st_size, modified=found.st_mtime_ns)


def _cut(kind: str, part: Part, shard_bytes: int) -> list[Part]:
    """A file in parts of about ``shard_bytes``, where it can be cut; a function of its size (its row groups) alone."""
    pieces = round(part.size / shard_bytes)
    assert part.path is not None
    if pieces < 2 or kind == "text" or part.path.suffix in COMPRESSED:
        return [part]
    last = readers.row_groups(part.path) if kind == "parquet" else part.size
    pieces = min(pieces, last)
    bounds = [last * i // pieces for i in range(pieces + 1)]
    return [replace(part, start=a, end=b, fraction=(b - a) / last) for a, b in itertools.pairwise(bounds)]


def _groups(parts: list[Part], shard_bytes: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + part.weight > shard_bytes:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.weight
    if group:
        yield group
