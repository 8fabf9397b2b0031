"""What a corpus and a tokenizer are made from: plain, comparable, JSON-able values.

Their fields are those of the configuration sections ``data.source`` and ``data.tokenizer``; what is prepared records
its specs, and a later preparation with other ones is refused.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paralm_data.errors import DataError

SOURCE_KINDS = ("python-stdlib", "text", "jsonl", "parquet", "datasets")
STDLIB_PARTS = ("code", "docs", "tests")
TOKENIZER_KINDS = ("bpe", "unigram")


def known(what: str, value: str, names: tuple[str, ...]) -> None:
    """DataError, with the nearest name, for a value that is none of ``names``."""
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise DataError(f"{what} '{value}' is unknown{hint} (one of: {', '.join(names)})")


@dataclass(frozen=True)
class SourceSpec:
    """Where text comes from.

    ``kind``: ``python-stdlib``, ``text`` (one document a file), ``jsonl`` (``.gz`` and ``.zst`` too), ``parquet`` or
    ``datasets``. ``paths``: files, folders or globs. ``text_key``: the field with the text (jsonl, parquet, datasets).
    ``dataset``: a hub name or local path, with ``subset``, ``split``, ``streaming``. ``subset`` of the standard
    library: ``code``, ``docs`` or ``tests``. ``max_documents``: stop after so many. Raises DataError for an unknown
    kind or a missing field.
    """

    kind: str = "python-stdlib"
    paths: tuple[str, ...] = ()
    text_key: str = "text"
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    streaming: bool = True
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.paths, (str, Path)):
            object.__setattr__(self, "paths", (str(self.paths),))
        object.__setattr__(self, "paths", tuple(str(p) for p in self.paths))
        known("source kind", self.kind, SOURCE_KINDS)
        if self.kind in ("text", "jsonl", "parquet") and not self.paths:
            raise DataError(f"source kind '{self.kind}' needs 'paths': files, folders or globs")
        if self.kind == "datasets" and not self.dataset:
            raise DataError("source kind 'datasets' needs 'dataset', a hub name or a local path")
        if self.kind == "python-stdlib" and self.subset is not None:
            known("subset", self.subset, STDLIB_PARTS)
        if self.max_documents is not None and self.max_documents < 1:
            raise DataError(f"max_documents is {self.max_documents}; it must be at least 1")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for manifests and for comparing."""
        return {**asdict(self), "paths": list(self.paths)}


@dataclass(frozen=True)
class TokenizerSpec:
    """A sentencepiece model: trained (``kind``, ``vocab_size``, on up to ``sample_bytes``) or given (``model``)."""

    model: Path | None = None
    kind: str = "bpe"
    vocab_size: int = 4096
    sample_bytes: int = 20_000_000

    def __post_init__(self) -> None:
        if self.model is not None:
            object.__setattr__(self, "model", Path(self.model))
        known("tokenizer kind", self.kind, TOKENIZER_KINDS)
        if self.vocab_size < 300 or self.vocab_size > 2**24:
            raise DataError(
                f"vocab_size {self.vocab_size} is out of range: 300 (256 bytes and the special pieces) to {2**24}"
            )
        if self.sample_bytes < 1:
            raise DataError(f"sample_bytes is {self.sample_bytes}; it must be at least 1")


@dataclass(frozen=True)
class Document:
    """One text and where it came from (``file``, ``file:line``, ``dataset[split]:index``)."""

    text: str
    origin: str


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``key: was old, is new`` for every key whose values differ, in order; nested dicts by dotted key."""
    found: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{line}" for line in differences(a, b)]
        elif a != b:
            found.append(f"{key}: was {a!r}, is {b!r}")
    return found
