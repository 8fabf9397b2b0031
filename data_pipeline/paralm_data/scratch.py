"""Work in progress: files with what a task has done, and a marker that says it is whole.

A task's files lie in a folder of its stage, under a name that stands for everything the task is made from; so the same
task finds its marker again after an interruption, and another one (a file was replaced, an option was changed) does
not. The marker is JSON, written last and by a rename, when the other files are durable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paralm_data.atomic import sync_folder
from paralm_data.errors import DataError, reason

NAME = ".work"  # in the prepared folder, gone when that is whole
VERSION = 3  # of the files that tasks leave
BLOCK = 1 << 20  # bytes read or written at once
READERS = 16  # threads


def key_of(*values: Any) -> str:
    """Stands for JSON-able values, and for what tasks make of them in this release."""
    return hashlib.sha256(json.dumps([VERSION, *values], sort_keys=True).encode()).hexdigest()[:20]


def read_marker(path: Path) -> dict[str, Any] | None:
    """The result that a task left, None if it has not ended."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}); remove it, and its task is done again") from error
    return found if isinstance(found, dict) else None


def read_markers(paths: Sequence[Path]) -> list[dict[str, Any] | None]:
    """:func:`read_marker` of each, several at a time: on a network's file system the time of one is waiting."""
    if len(paths) < READERS:
        return [read_marker(path) for path in paths]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read_marker, paths))


class Files:
    """The files of one task, written under temporary names; :meth:`finish` renames them, the marker last."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker
        self._open: dict[str, Any] = {}
        self._token = secrets.token_hex(8)  # the same task may run elsewhere, after all
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{marker.parent}: cannot be written ({reason(error)})") from error

    def path(self, ending: str) -> Path:
        """Where the file with this ending will be."""
        return self.marker.with_suffix(ending)

    def write(self, ending: str, data: bytes | memoryview | NDArray[Any]) -> None:
        """Append to a file; the first time it begins."""
        try:
            if ending not in self._open:
                self._open[ending] = self._temporary(ending).open("w+b")
            self._open[ending].write(data.data if isinstance(data, np.ndarray) else data)
        except OSError as error:
            raise DataError(f"{self.path(ending)}: cannot be written ({reason(error)})") from error

    def overwrite(self, ending: str, at: int, data: bytes) -> None:
        """Replace bytes of what was written."""
        file = self._open[ending]
        try:
            file.seek(at)
            file.write(data)
            file.seek(0, os.SEEK_END)
        except OSError as error:  # a seek writes what was buffered
            raise DataError(f"{self.path(ending)}: cannot be written ({reason(error)})") from error

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Make everything durable, in place, and say so."""
        try:
            self.write(self.marker.suffix, json.dumps(result).encode())
            for ending, file in self._open.items():  # the marker is the last
                file.flush()
                os.fsync(file.fileno())
                file.close()
                if ending == self.marker.suffix:
                    sync_folder(self.marker.parent)
                self._temporary(ending).replace(self.path(ending))
            sync_folder(self.marker.parent)
        except OSError as error:
            raise DataError(f"{self.marker}: cannot be written ({reason(error)})") from error
        return result

    def abandon(self) -> None:
        """Remove what was written. Harmless after :meth:`finish`."""
        for ending, file in self._open.items():
            with contextlib.suppress(OSError):  # a disk that was full is so still: what was buffered is given up
                file.close()
            self._temporary(ending).unlink(missing_ok=True)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.abandon()

    def _temporary(self, ending: str) -> Path:
        return self.marker.with_name(f".{self.marker.stem}{ending}.tmp-{self._token}")


def read_array(path: Path, dtype: Any, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Elements ``start`` to ``stop`` of a file of numbers, in memory; none where there is no file."""
    dtype = np.dtype(dtype)
    try:
        with path.open("rb") as file:
            file.seek(start * dtype.itemsize)
            count = -1 if stop is None else stop - start
            return np.fromfile(file, dtype, count)
    except FileNotFoundError:
        return np.empty(0, dtype)
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from error


def map_array(path: Path, dtype: Any, count: int | None = None) -> NDArray[Any]:
    """A file of numbers, mapped. DataError if it has not the ``count`` that were written; of 0 there may be no file."""
    dtype = np.dtype(dtype)
    try:
        empty = count == 0 or path.stat().st_size == 0
        found = np.empty(0, dtype) if empty else np.asarray(np.memmap(path, dtype, mode="r"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be mapped ({reason(error)})") from error
    if count is not None and len(found) != count:
        raise DataError(
            f"{path}: damaged: {len(found)} entries, and {count} were written; remove {path.parent} and the same "
            "command makes them again"
        )
    return found


def blocks(path: Path, dtype: Any, elements: int = BLOCK) -> Iterator[NDArray[Any]]:
    """A file of numbers, a block at a time; nothing where there is no file."""
    at = 0
    while len(found := read_array(path, dtype, at, at + elements)):
        yield found
        at += len(found)
