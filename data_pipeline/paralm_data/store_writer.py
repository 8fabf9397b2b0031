"""Writing a token store: into a folder with a temporary name, made durable, then renamed. A reader sees all or none."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paralm_data.atomic import sync_folder, write_file
from paralm_data.errors import DataError, reason
from paralm_data.manifest import DOC_BYTES, DOC_ENDS, NAME, TOKENS, FileEntry, Manifest
from paralm_data.store import TokenStore
from paralm_data.tokenizer import Tokenizer

TEMPORARY = ".tmp-"  # what the temporary folder's name has after the store's


class _HashedFile:
    """A file whose size and SHA-256 are known when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> FileEntry:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return FileEntry(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a disk that was full is so still: what was buffered is given up
            self._file.close()


def dtype_of(tokenizer: Tokenizer) -> str:
    """Of a store's tokens."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def pack(
    documents: Sequence[Sequence[int] | NDArray[Any]], tokenizer: Tokenizer, name: str
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(n,) tokens of the store's dtype, each document between BOS and EOS, and (documents,) the length of each with
    both. Raises DataError, which says ``name``, for an id outside the vocabulary or one that only bounds documents.
    """
    bos, eos, size = tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size
    lengths = np.fromiter((len(ids) + 2 for ids in documents), np.int64, len(documents))
    ends = np.cumsum(lengths)
    flat = np.empty(int(ends[-1]), np.int32)
    flat[ends - lengths], flat[ends - 1] = bos, eos
    for ids, start, length in zip(documents, (ends - lengths).tolist(), lengths.tolist()):
        flat[start + 1 : start + length - 1] = ids
    if flat.min() < 0 or flat.max() >= size:
        wrong = flat[(flat < 0) | (flat >= size)][0]
        raise DataError(f"{name}: id {wrong} is outside the vocabulary of {size}")
    for what, key in (("BOS", bos), ("EOS", eos)):
        if np.count_nonzero(flat == key) != len(documents):
            raise DataError(f"{name}: {what} (id {key}) occurs inside a document; it only bounds documents")
    return flat.astype(f"<{np.dtype(dtype_of(tokenizer)).str[1:]}"), lengths


class StoreWriter:
    """Writes the store ``path``: :meth:`add` documents, then :meth:`finish`. As a context manager it cleans up.

    Raises DataError if ``path`` exists, an id is outside the vocabulary, or nothing was added. Memory is bounded by
    what one :meth:`add` is given.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, source: dict[str, Any] | None = None) -> None:
        self.path, self._tokenizer, self._source = Path(path), tokenizer, source or {}
        if self.path.exists():
            raise DataError(f"{self.path}: exists already; a token store is never overwritten")
        self._dtype = dtype_of(tokenizer)
        self._end = 0  # of the last document
        self._folder = self.path.with_name(f".{self.path.name}{TEMPORARY}{secrets.token_hex(8)}")
        try:
            self._folder.mkdir(parents=True)
            self._files = {name: _HashedFile(self._folder / name) for name in (TOKENS, DOC_ENDS, DOC_BYTES)}
        except OSError as error:
            raise DataError(f"{self._folder}: cannot be written ({reason(error)})") from error
        self.n_tokens = self.n_documents = self.n_bytes = 0

    def add(self, documents: Sequence[Sequence[int] | NDArray[Any]], n_bytes: Sequence[int]) -> None:
        """Append documents: the ids of each (without BOS and EOS) and the UTF-8 bytes of each one's text."""
        if not documents:
            return
        tokens, lengths = pack(documents, self._tokenizer, str(self.path))
        self.append(tokens)
        self.append_documents(lengths, np.asarray(n_bytes, np.uint64))

    def append(self, tokens: NDArray[Any]) -> None:
        """Append what :func:`pack` gave, or a part of it; :meth:`append_documents` says how long the documents are."""
        self._write(TOKENS, tokens)
        self.n_tokens += len(tokens)

    def append_documents(self, lengths: NDArray[Any], n_bytes: NDArray[Any]) -> None:
        """Append documents whose tokens were, or will be, appended: tokens and UTF-8 bytes of each."""
        ends = self._end + np.cumsum(lengths.astype(np.int64))
        self._write(DOC_ENDS, ends.astype("<u8"))
        self._write(DOC_BYTES, n_bytes.astype("<u8"))
        self._end = int(ends[-1]) if len(ends) else self._end
        self.n_documents += len(lengths)
        self.n_bytes += int(n_bytes.sum())

    def finish(self) -> TokenStore:
        """Make everything durable, rename it into place and open it (sizes checked)."""
        if not self.n_documents:
            self.abandon()
            raise DataError(f"{self.path}: no documents to store")
        if self._end != self.n_tokens:
            self.abandon()
            raise DataError(f"{self.path}: documents of {self._end} tokens were announced, {self.n_tokens} were given")
        try:
            manifest = Manifest(
                tokenizer_sha256=self._tokenizer.sha256,
                vocab_size=self._tokenizer.vocab_size,
                bos_id=self._tokenizer.bos_id,
                eos_id=self._tokenizer.eos_id,
                dtype=self._dtype,
                n_tokens=self.n_tokens,
                n_documents=self.n_documents,
                n_bytes=self.n_bytes,
                files={name: file.close() for name, file in self._files.items()},
                source=self._source,
            )
            write_file(self._folder / NAME, manifest.to_json())
            self._folder.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.abandon()
            raise DataError(f"{self.path}: cannot be written ({reason(error)})") from error
        return TokenStore.open(self.path, verify="size")

    def abandon(self) -> None:
        """Remove what was written. Harmless after :meth:`finish`."""
        for file in self._files.values():
            file.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _write(self, name: str, array: NDArray[Any]) -> None:
        try:
            self._files[name].write(array)
        except OSError as error:
            raise DataError(f"{self._folder / name}: cannot be written ({reason(error)})") from error
