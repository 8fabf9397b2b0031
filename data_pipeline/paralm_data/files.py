"""Finding input files and reading them, compressed or not, with every failure named after its file."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from paralm_data.errors import DataError, reason

CHUNK = 1 << 20
COMPRESSED = (".gz", ".zst")


def find_files(entries: tuple[str, ...], suffixes: tuple[str, ...] | None) -> list[Path]:
    """The files that ``entries`` (files, folders, globs) name, each once: entries in order, each one's files sorted.

    In a folder, every file below it, also by links, that ends with one of ``suffixes`` (None: any) and has no hidden
    part. Raises DataError for an entry, or a link in a folder, that leads to no file.
    """
    found: dict[Path, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        try:
            if path.is_file():
                files = [path]
            elif path.is_dir():
                files = sorted(_below(path, suffixes))
                if not files:
                    wanted = f" that ends with {' or '.join(suffixes)}" if suffixes else ""
                    raise DataError(f"{entry}: the folder has no file{wanted}")
            elif glob.has_magic(entry):
                files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
                if not files:
                    raise DataError(f"{entry}: the pattern matches no file")
            else:
                raise DataError(f"{entry}: no such file or folder")
        except OSError as error:
            raise DataError(f"{entry}: {reason(error)}") from error
        found.update(dict.fromkeys(files))
    return list(found)


def _below(folder: Path, suffixes: tuple[str, ...] | None) -> Iterator[Path]:
    """The files that are wanted, in no order, those of a folder that several links lead to once."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {reason(error)}") from error

    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        real = os.path.realpath(parent)
        if real in entered:  # by another link, or this one lies in it
            folders.clear()
            continue
        entered.add(real)
        for name in names:
            path = Path(parent, name)
            if name[0] == "." or not (suffixes is None or name.endswith(suffixes)):
                continue
            if path.is_file():
                yield path
            elif path.is_symlink():
                raise DataError(f"{path}: a link to a file that is not there")


@contextlib.contextmanager
def open_input(path: Path) -> Iterator[IO[bytes]]:
    """``path`` for reading, decompressed if it ends with .gz or .zst. Damage found while reading is a DataError."""
    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                if not raw.peek(1):
                    raise EOFError  # gzip would take it for no text; even that has a header
                with gzip.open(raw) as unzipped:
                    yield unzipped  # type: ignore[misc]
            elif path.suffix == ".zst":
                yield io.BufferedReader(_ZstdFrames(raw), CHUNK)
            else:
                yield raw
    except EOFError as error:
        raise DataError(f"{path}: the compressed file is truncated; copy or write it again") from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: the compressed file is damaged ({reason(error)})") from error
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from error


class _ZstdFrames(io.RawIOBase):
    """The decompressed bytes of one or more zstandard frames.

    The library's own stream reader takes a frame that stops early for the end of the data; here it is an EOFError.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._decompressor.decompressobj()
        self._ahead = b""  # compressed bytes after the end of a frame
        self._ready = memoryview(b"")
        self._inside = False  # a frame has begun and not ended
        self._empty = True  # no frame so far

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            data = self._ahead or self._raw.read(1 << 17)
            self._ahead = b""
            if not data:
                if self._inside or self._empty:
                    raise EOFError
                return 0
            self._ready = memoryview(self._frame.decompress(data))
            self._inside, self._empty = not self._frame.eof, False
            if self._frame.eof:
                self._ahead = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
