"""The last reading of a shard: its kept documents as tokens, in batches, so memory does not grow with the shard."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paralm_data.errors import DataError
from paralm_data.progress import Delta
from paralm_data.reading import Reading
from paralm_data.scratch import Files
from paralm_data.store_writer import pack
from paralm_data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20  # of text, encoded at once


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    found = Tokenizer.load(path)
    if found.sha256 != sha256:
        raise DataError(f"{path}: replaced while it was used")
    return found


@dataclass(frozen=True)
class Tokenize(Reading):
    """A task: the documents of a shard whose fate is in ``stores`` (fate → name) as tokens.

    For each name, ``.NAME.tokens``, ``.NAME.lengths`` (tokens of each document, with BOS and EOS) and ``.NAME.bytes``
    (UTF-8 bytes of each document's text), all uint64 but the tokens. ``threads``: of sentencepiece; they decide
    nothing.
    """

    stores: dict[int, str]
    model: Path
    sha256: str
    threads: int = 1

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Result: of each store's files (``tokens``, ``lengths``, ``bytes``) the number of entries and the SHA-256."""
        model = _tokenizer(self.model, self.sha256)
        batch = _Batch()
        with Files(self.marker) as files:
            told = {name: {what: _Told() for what in ("tokens", "lengths", "bytes")} for name in self.stores.values()}
            for fate, text, n_bytes in self.texts(self.stores):
                batch.add(self.stores[fate], text, n_bytes)
                if batch.size >= BATCH_BYTES:
                    yield self._write(batch, model, files, told)
                    batch = _Batch()
            yield self._write(batch, model, files, told)
            return files.finish(
                {
                    name: {what: [file.count, file.digest.hexdigest()] for what, file in parts.items()}
                    for name, parts in told.items()
                }
            )

    def _write(self, batch: _Batch, model: Tokenizer, files: Files, told: dict[str, dict[str, _Told]]) -> Delta:
        ids = model.encode_arrays(batch.texts, self.threads)
        tokens_in_all = 0
        for name in dict.fromkeys(batch.names):
            mine = [i for i, own in enumerate(batch.names) if own == name]
            tokens, lengths = pack([ids[i] for i in mine], model, self.shard.label)
            sizes = np.array([batch.bytes[i] for i in mine], "<u8")
            for what, entries in (("tokens", tokens), ("lengths", lengths.astype("<u8")), ("bytes", sizes)):
                files.write(f".{name}.{what}", entries)
                told[name][what].add(entries)
            tokens_in_all += len(tokens)
        return Delta(len(batch.texts), batch.size, tokens_in_all, batch.size)


@dataclass
class _Told:
    """What was written to a file."""

    count: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, entries: NDArray[Any]) -> None:
        self.count += len(entries)
        self.digest.update(entries.data)


@dataclass
class _Batch:
    """Documents that are encoded together."""

    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    size: int = 0

    def add(self, name: str, text: str, n_bytes: int) -> None:
        self.texts.append(text)
        self.names.append(name)
        self.bytes.append(n_bytes)
        self.size += n_bytes
