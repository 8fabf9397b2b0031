"""Reading the records of one file, or of a part of it, good and bad."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from paralm_data import stdlib
from paralm_data.errors import DataError, reason
from paralm_data.files import CHUNK, COMPRESSED, open_input
from paralm_data.specs import SourceSpec


@dataclass(frozen=True)
class Part:
    """A file, or bytes (jsonl) or row groups (parquet) ``start`` to ``end`` of it; no path: a source without files."""

    path: Path | None = None
    start: int = 0
    end: int | None = None
    size: int = 0  # of the file, in bytes
    modified: int = 0  # nanoseconds since 1970
    fraction: float = 1.0  # of the file

    @property
    def weight(self) -> int:
        """Bytes of it, about."""
        return round(self.size * self.fraction)


class Record(NamedTuple):
    """``text``, or the ``problem`` with it. ``part``: of the shard; ``number``: its line in the part (from 1), its row
    in the file (from 1) or its index in the dataset; ``input``: the share of the part that has been read with it.
    """

    part: int
    number: int
    text: str
    problem: str | None = None
    input: float = 0.0
    origin: str | None = None


class Flags(Protocol):
    """A truth value of each record of a shard, in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[bool]: ...


Skip = Flags | None
_Reader = Callable[[SourceSpec, Part, int, "int | None", Iterator[bool]], Iterator[Record]]


def read(spec: SourceSpec, part: Part, number: int, max_bytes: int | None, wanted: Iterator[bool]) -> Iterator[Record]:
    """The records of a part; ``number``: its own in its shard. ``wanted`` is asked once a record, in order."""
    return _READERS[spec.kind](spec, part, number, max_bytes, wanted)


def wanted_of(skip: Skip, label: str, again: str) -> Iterator[bool]:
    """Whether the text of the next record is asked for; every one where nothing is said. DataError when asked about
    more records than ``skip`` has, which are those that were there when it was made; ``again``: its advice.
    """
    if skip is None:
        yield from itertools.repeat(True)
        return
    for one in skip:
        yield not one
    more = f"it has more than the {len(skip)} records it had before"
    raise DataError(f"{label}: changed while it was prepared: {more}; {again}")


def _read_text(
    spec: SourceSpec, part: Part, number: int, max_bytes: int | None, wanted: Iterator[bool]
) -> Iterator[Record]:
    assert part.path is not None
    if not next(wanted):
        yield Record(number, 1, "", input=1.0)
        return
    with open_input(part.path) as stream:
        data = stream.read() if max_bytes is None else stream.read(max_bytes + 1)
    if max_bytes is not None and len(data) > max_bytes:
        yield Record(number, 1, "", _too_long(max_bytes), 1.0)
        return
    try:
        yield Record(number, 1, data.decode("utf-8"), input=1.0)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Record(number, line, "", _not_utf8(data, error), 1.0)


def _read_jsonl(
    spec: SourceSpec, part: Part, number: int, max_bytes: int | None, wanted: Iterator[bool]
) -> Iterator[Record]:
    assert part.path is not None
    with open_input(part.path) as stream:
        at = part.start
        if part.start:
            stream.seek(part.start - 1)
            at += _skip_line(stream) - 1
        # Of a compressed file, the bytes that are read say nothing about the share of it.
        weight = math.inf if part.path.suffix in COMPRESSED else max(1, part.weight)
        end, begin = part.end, part.start
        for line_number in itertools.count(1):
            if end is not None and at >= end:
                return
            line = stream.readline() if max_bytes is None else stream.readline(max_bytes + 1)
            if not line:
                return
            at += len(line)
            done = min(1.0, (at - begin) / weight)
            if max_bytes is not None and len(line) > max_bytes and not line.endswith(b"\n"):
                at += _skip_line(stream)
                next(wanted)
                yield Record(number, line_number, "", _too_long(max_bytes), done)
            elif not line.isspace():
                if not next(wanted):
                    yield Record(number, line_number, "", input=done)
                    continue
                text, problem = _parse(line, spec.text_key, first=line_number == 1 and not begin)
                yield Record(number, line_number, text, problem, done)


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line; returns how many bytes that were."""
    skipped = 0
    while True:
        piece = stream.readline(CHUNK)
        skipped += len(piece)
        if not piece or piece.endswith(b"\n"):
            return skipped


def _parse(line: bytes, key: str, first: bool) -> tuple[str, str | None]:
    try:
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return "", _not_utf8(line, error)
    except (ValueError, RecursionError) as error:
        return "", f"not a JSON record ({reason(error)})"
    return _text_of(record, key)


def _read_parquet(
    spec: SourceSpec, part: Part, number: int, max_bytes: int | None, wanted: Iterator[bool]
) -> Iterator[Record]:
    import pyarrow as pa  # arrow takes half a second to import, and most sources do without
    import pyarrow.parquet as pq

    assert part.path is not None
    try:
        with pq.ParquetFile(part.path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if spec.text_key not in names:
                raise DataError(f"{part.path}: no column '{spec.text_key}' (text_key); it has: {', '.join(names)}")
            there = file.num_row_groups  # none, where no table was written
            groups = list(range(part.start, there if part.end is None else min(part.end, there)))
            row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
            first, rows = row, max(1, sum(file.metadata.row_group(i).num_rows for i in groups))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[spec.text_key]):
                for value in batch.column(0):
                    row += 1
                    done = (row - first) / rows
                    if not next(wanted):
                        yield Record(number, row, "", input=done)
                        continue
                    try:
                        text, problem = _checked(value.as_py(), spec.text_key)
                    except UnicodeDecodeError as error:
                        text, problem = "", _not_utf8(error.object, error)
                    yield Record(number, row, *_bounded(text, problem, max_bytes), done)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{part.path}: the parquet file is damaged or unreadable ({reason(error)})") from error


def row_groups(path: Path) -> int:
    """How many row groups a parquet file has, 1 at least."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return max(1, file.num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: the parquet file is damaged or unreadable ({reason(error)})") from error


def _read_dataset(
    spec: SourceSpec, part: Part, number: int, max_bytes: int | None, wanted: Iterator[bool]
) -> Iterator[Record]:
    name = f"{spec.dataset}[{spec.split}]"
    records = iter(_open_dataset(spec, name))
    for index in itertools.count():
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # whatever the dataset's own reader raises, it is this dataset's fault
            raise DataError(f"{name}:{index}: the dataset cannot be read ({reason(error)})") from error
        if next(wanted):
            text, problem = _bounded(*_text_of(record, spec.text_key), max_bytes)
            yield Record(number, index, text, problem)
        else:
            yield Record(number, index, "")


def part_of_dataset(spec: SourceSpec) -> Part:
    """A dataset as one part; of a local one, with the size of its files in all and the time of the newest."""
    if spec.dataset is None:
        return Part()
    local = Path(spec.dataset).expanduser()
    try:
        found = [path.stat() for path in (local, *local.rglob("*")) if path.is_file()]
    except OSError as error:
        raise DataError(f"{local}: {reason(error)}") from error
    return Part(size=sum(f.st_size for f in found), modified=max((f.st_mtime_ns for f in found), default=0))


def _open_dataset(spec: SourceSpec, name: str) -> Iterable[Any]:
    """A dataset of the `datasets` library: saved with ``save_to_disk``, a local folder or script, or on the hub."""
    import datasets  # takes seconds to import, and most sources do without

    assert spec.dataset is not None
    local = Path(spec.dataset).expanduser()
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(local))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if spec.split not in saved:
                raise DataError(f"{spec.dataset}: no split '{spec.split}'; it has: {', '.join(saved)}")
            return saved[spec.split]
        target = str(local) if local.exists() else spec.dataset
        return datasets.load_dataset(target, name=spec.subset, split=spec.split, streaming=spec.streaming)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, with messages of many lines
        raise DataError(f"{name}: the dataset cannot be opened ({reason(error)})") from error


def _read_stdlib(
    spec: SourceSpec, part: Part, number: int, max_bytes: int | None, wanted: Iterator[bool]
) -> Iterator[Record]:
    for index, document in enumerate(stdlib.documents(part=spec.subset)):
        text, problem = _bounded(document.text, None, max_bytes) if next(wanted) else ("", None)
        yield Record(number, index, text, problem, origin=document.origin)


def place(spec: SourceSpec, part: Part, record: Record) -> str:
    """Where a record is, in words; of a jsonl file that was cut, the lines before the part are counted."""
    if record.origin is not None:
        return record.origin
    if spec.kind == "text":
        return str(part.path) if record.problem is None else f"{part.path}:{record.number}"
    if spec.kind == "parquet":
        return f"{part.path}:row {record.number}"
    if spec.kind == "jsonl":
        return f"{part.path}:{lines_before(part) + record.number if part.start else record.number}"
    return f"{spec.dataset}[{spec.split}]:{record.number}"


@lru_cache(maxsize=64)
def lines_before(part: Part) -> int:
    """Lines of a file that begin before the part does. A later part of the file that was asked about last is counted
    from that one on, so asking in order reads a file once.
    """
    global _counted
    assert part.path is not None
    file = (part.path, part.size, part.modified)
    last, at, newlines = _counted
    if last != file or at >= part.start:
        at = newlines = 0
    with open_input(part.path) as stream:
        stream.seek(at)
        # Every line but the first begins after a newline, none of them after the part's last byte before it.
        while at < part.start - 1 and (data := stream.read(min(CHUNK, part.start - 1 - at))):
            at += len(data)
            newlines += data.count(b"\n")
    _counted = (file, at, newlines)
    return newlines + (part.start > 0)


_counted: tuple[tuple[Path, int, int] | None, int, int] = (None, 0, 0)  # a file, bytes of it, newlines in those


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte 0x{data[error.start]:02x})"


def _too_long(max_bytes: int) -> str:
    return f"longer than {max_bytes} bytes (data.steps.max_document_bytes)"


def _bounded(text: str, problem: str | None, max_bytes: int | None) -> tuple[str, str | None]:
    # UTF-8 needs a byte a character at least and four at most, so most texts need not be encoded to be measured.
    if max_bytes is None or 4 * len(text) <= max_bytes or len(text.encode("utf-8")) <= max_bytes:
        return text, problem
    return "", _too_long(max_bytes)


def _text_of(record: Any, key: str) -> tuple[str, str | None]:
    if not isinstance(record, dict):
        return "", f"the record is a {type(record).__name__}, not an object with a '{key}'"
    if key not in record:
        return "", f"no '{key}' (text_key); the record has: {', '.join(map(str, record)) or 'nothing'}"
    return _checked(record[key], key)


def _checked(value: Any, key: str) -> tuple[str, str | None]:
    if not isinstance(value, str):
        return "", f"'{key}' is a {type(value).__name__}, not text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return "", f"'{key}' has half a surrogate pair at character {error.start}"
    return value, None


_READERS: dict[str, _Reader] = {
    "python-stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "datasets": _read_dataset,
}
