"""Safetensors files as streams: written and hashed in one pass, read by pieces, never mapped, never copied whole.

The format: eight bytes (little endian) that count the header's, a JSON header ``{key: {dtype, shape, data_offsets}}``
padded with blanks, then the data without gaps. Writing streams it so that a file of any size needs one piece in
memory; reading with plain reads, not a memory map, so that nothing read stays resident.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

PIECE = 4 << 20
"""Bytes written and hashed at a time: few enough to be in the cache still when they are hashed."""

_MAX_HEADER = 100_000_000  # as the reference implementation has it
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def create(path: Path) -> BinaryIO:
    """A new file, unbuffered: what is written is handed to the system at once."""
    return path.open("wb", buffering=0)


def flush(file: BinaryIO) -> None:
    """Return when the file's content is on the disk."""
    os.fsync(file.fileno())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header(specs: Sequence[TensorSpec], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes before the data, which lie in the order of ``specs``."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        entries[spec.key] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    return len(text).to_bytes(8, "little") + text


class TensorFileWriter:
    """Writes ``path``: under a temporary name first; :meth:`finish` makes it durable and gives it its name.

    A context manager: left without :meth:`finish`, nothing remains.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: dict[str, str] | None = None) -> None:
        """``specs``: of the tensors, in the order in which they are going to be appended. Raises OSError."""
        self.path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._hash = hashlib.sha256()
        self._begin = header(specs, metadata)
        self._expected = len(self._begin) + sum(spec.nbytes for spec in specs)
        self.size = 0
        self._file = create(self._temporary)

    def __enter__(self) -> TensorFileWriter:
        self._write(memoryview(self._begin))
        return self

    def append(self, tensor: torch.Tensor) -> None:
        """The next tensor, or the next elements of the one that was begun. Any device. Raises OSError."""
        flat = tensor.detach().reshape(-1)
        step = max(1, PIECE // flat.dtype.itemsize)
        for low in range(0, flat.numel(), step):
            part = flat[low : low + step].to("cpu").contiguous()
            self._write(part.view(torch.uint8).numpy().data)

    def _write(self, data: memoryview) -> None:
        self._hash.update(data)
        self.size += len(data)
        while len(data):
            data = data[self._file.write(data) :]  # a system may take less than it was given

    def finish(self) -> str:
        """Put the file on the disk and in its place; returns its SHA-256. Raises OSError."""
        if self.size != self._expected:
            raise ValueError(f"{self.path}: {self.size} bytes appended, the header promises {self._expected}")
        flush(self._file)
        self._file.close()
        self._temporary.replace(self.path)
        return self._hash.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def by_alignment(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Wide elements first, so that every tensor begins at a multiple of its element's size, as readers like it."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


class TensorFile:
    """A safetensors file, read by slices."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises OSError, or ValueError for what is no such file."""
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError("no safetensors header")
            entries = json.loads(file.read(length))
        self._data = 8 + length
        self._begin: dict[str, int] = {}
        self.specs: dict[str, TensorSpec] = {}
        try:
            for key, entry in entries.items():
                if key != "__metadata__":
                    spec = TensorSpec(key, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
                    begin, end = entry["data_offsets"]
                    if end - begin != spec.nbytes or not 0 <= begin <= end <= size - self._data:
                        raise ValueError(f"the place of '{key}' lies outside the file")
                    self.specs[key], self._begin[key] = spec, begin
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a damaged safetensors header ({type(error).__name__}: {error})") from None

    def open(self) -> FileIO:
        """To read from, more than once."""
        return FileIO(self.path)

    def read(self, key: str, start: int = 0, stop: int | None = None, opened: FileIO | None = None) -> torch.Tensor:
        """Elements ``[start, stop)`` of a flattened tensor, 1-D. Raises KeyError, OSError, ValueError (truncated)."""
        spec = self.specs[key]
        count = torch.Size(spec.shape).numel()
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise ValueError(f"elements {start} to {stop} of '{key}', which has {count}")
        out = torch.empty(stop - start, dtype=spec.dtype)
        if stop == start:
            return out
        left = out.view(torch.uint8).numpy().data
        with contextlib.nullcontext(opened) if opened is not None else self.open() as file:
            file.seek(self._data + self._begin[key] + start * spec.dtype.itemsize)
            while len(left):
                got = file.readinto(left)
                if not got:
                    raise ValueError(f"it ends within '{key}'")
                left = left[got:]
        return out

    def tensor(self, key: str) -> torch.Tensor:
        """A whole tensor in its shape."""
        return self.read(key).view(self.specs[key].shape)

    def pieces(self, key: str) -> Iterator[torch.Tensor]:
        """A flattened tensor, ``PIECE`` bytes at a time."""
        count, step = torch.Size(self.specs[key].shape).numel(), max(1, PIECE // self.specs[key].dtype.itemsize)
        for low in range(0, count, step):
            yield self.read(key, low, min(low + step, count))
