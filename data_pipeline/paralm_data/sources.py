"""Text in: files, jsonl, parquet, any `datasets` dataset, or the standard library, as a stream of documents.

A source is a list of shards (:func:`shards`), each read by itself (:meth:`Shard.documents`): the unit of parallel
work. :func:`documents` is all of them, in order. Nothing is skipped silently: a record that cannot be read is a
DataError that names file and line (or row).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paralm_data import stdlib
from paralm_data.errors import DataError, reason
from paralm_data.files import find_files, open_input
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
    path: Path | None = None

    def documents(self) -> Iterator[Document]:
        """Its documents, in a fixed order."""
        return _READERS[self.spec.kind](self.spec, self.path)


def shards(spec: SourceSpec) -> list[Shard]:
    """The parts of a source in a fixed order. Raises DataError for a path that leads to no file."""
    if spec.kind in SUFFIXES:
        return [Shard(spec, path) for path in find_files(spec.paths, SUFFIXES[spec.kind])]
    return [Shard(spec)]


def documents(spec: SourceSpec) -> Iterator[Document]:
    """Every document of a source, at most ``max_documents``, in a fixed order. Paths are checked at once."""
    stream = itertools.chain.from_iterable(shard.documents() for shard in shards(spec))
    return itertools.islice(stream, spec.max_documents)


def _read_text(spec: SourceSpec, path: Path | None) -> Iterator[Document]:
    assert path is not None
    with open_input(path) as stream:
        data = stream.read()
    try:
        yield Document(data.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from error


def _read_jsonl(spec: SourceSpec, path: Path | None) -> Iterator[Document]:
    assert path is not None
    with open_input(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text (byte 0x{line[error.start]:02x})") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not a JSON record ({reason(error)})") from error
            yield Document(_text_of(record, spec.text_key, where), where)


def _read_parquet(spec: SourceSpec, path: Path | None) -> Iterator[Document]:
    import pyarrow as pa  # arrow takes half a second to import, and most sources do without
    import pyarrow.parquet as pq

    assert path is not None
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if spec.text_key not in names:
                raise DataError(f"{path}: no column '{spec.text_key}' (text_key); it has: {', '.join(names)}")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[spec.text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield Document(_checked(value, spec.text_key, f"{path}:row {row}"), f"{path}:row {row}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the parquet file is damaged or unreadable ({reason(error)})") from error


def _read_dataset(spec: SourceSpec, path: Path | None) -> Iterator[Document]:
    name = f"{spec.dataset}[{spec.split}]"
    records = iter(_open_dataset(spec, name))
    for index in itertools.count():
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # whatever the dataset's own reader raises, it is this dataset's fault
            raise DataError(f"{name}:{index}: the dataset cannot be read ({reason(error)})") from error
        where = f"{name}:{index}"
        yield Document(_text_of(record, spec.text_key, where), where)


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


def _text_of(record: Any, key: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: the record is a {type(record).__name__}, not an object with a '{key}'")
    if key not in record:
        raise DataError(f"{where}: no '{key}' (text_key); the record has: {', '.join(map(str, record)) or 'nothing'}")
    return _checked(record[key], key, where)


def _checked(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' is a {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: '{key}' has half a surrogate pair at character {error.start}") from error
    return value


def _read_stdlib(spec: SourceSpec, path: Path | None) -> Iterator[Document]:
    return stdlib.documents()


_READERS: dict[str, Callable[[SourceSpec, Path | None], Iterator[Document]]] = {
    "python-stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "datasets": _read_dataset,
}
