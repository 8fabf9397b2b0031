"""Which documents are kept and where they go, decided by their text alone.

Every decision is a function of the BLAKE2b-128 digest of a document's UTF-8 text, so it does not depend on order,
workers, file names or the rest of the corpus: a document is held out in every corpus that holds it. The digest's first
eight bytes, as a fraction of 2⁶⁴, are compared with the held-out fraction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from paralm_data.specs import Document


def digest(text: str) -> bytes:
    """16 bytes that stand for the text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def position(key: bytes) -> float:
    """Where a digest lies in [0, 1): uniform over documents."""
    return int.from_bytes(key[:8], "big") / 2**64


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether the document with this digest belongs to the held-out split."""
    return position(key) < fraction


@dataclass
class Counts:
    """What became of the records of a source."""

    read: int = 0
    bad: int = 0
    empty: int = 0
    rules: dict[str, int] = field(default_factory=dict)  # documents left out, by the rule they broke
    duplicates: int = 0
    near_duplicates: int = 0
    kept: int = 0
    least_position: float = 1.0  # the smallest held-out fraction that would hold a document out lies just above

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass
class Distinct:
    """Drops empty documents and exact duplicates (the first is kept) of a stream that fits: about 100 bytes of memory a
    document. What is larger goes through :mod:`paralm_data.duplicates`.
    """

    counts: Counts = field(default_factory=Counts)
    _seen: set[bytes] = field(default_factory=set)

    def __call__(self, documents: Iterable[Document]) -> Iterator[tuple[bytes, Document]]:
        """(digest, document) of each document that is new."""
        counts = self.counts
        for document in documents:
            counts.read += 1
            if not document.text:
                counts.empty += 1
                continue
            key = digest(document.text)
            if key in self._seen:
                counts.duplicates += 1
                continue
            self._seen.add(key)
            counts.kept += 1
            counts.least_position = min(counts.least_position, position(key))
            yield key, document
