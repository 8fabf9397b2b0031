"""A tokenizer's training text: the pieces with the smallest keys of all the train text, found shard by shard.

Keys are uniform (:func:`paralm_data.tokenizer_training.keyed_pieces`), so the share of them that lies below a bound is
known before a shard is read: each shard writes the pieces below one bound, a little more than is asked for in all, and
the smallest of those are the sample. It is the same for every bound that gives enough, so for every number of shards.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paralm_data.progress import Delta
from paralm_data.reading import Reading
from paralm_data.scanning import KEPT, STEP_BYTES
from paralm_data.scratch import Files, map_array, read_marker
from paralm_data.split import digest
from paralm_data.tokenizer_training import PIECE, Sample, keyed_pieces

EVERY_KEY = 1 << 64
_PIECES = np.dtype([("key", "<u8"), ("bytes", "<u8")])


def bound_for(limit: int, total: int) -> int:
    """Below which keys lie about ``limit`` of ``total`` bytes, and enough more that fewer are hardly ever found."""
    wanted = limit + limit // 4 + 64 * PIECE
    return EVERY_KEY if wanted >= total else (EVERY_KEY * wanted) // total


@dataclass(frozen=True)
class Draw(Reading):
    """A task: the pieces of a shard's train documents whose keys are below ``bound``."""

    bound: int

    def run(self) -> Generator[Delta, None, dict[str, Any]]:
        """Result: the number of pieces, and of their bytes."""
        count = drawn = documents = size = 0
        with Files(self.marker) as files:
            for _, text, n_bytes in self.texts({KEPT}):
                for key, piece in keyed_pieces(digest(text), text):
                    if key < self.bound:
                        encoded = piece.encode("utf-8")
                        files.write(".pieces", np.array([(key, len(encoded))], _PIECES).tobytes())
                        files.write(".texts", encoded)
                        count, drawn = count + 1, drawn + len(encoded)
                documents, size = documents + 1, size + n_bytes
                if size >= STEP_BYTES:
                    yield Delta(documents, size, 0, size)
                    documents = size = 0
            yield Delta(documents, size, 0, size)
            return files.finish({"pieces": count, "bytes": drawn})


def sample_of(drawn: Iterable[Draw], limit: int) -> Sample:
    """The sample of ``limit`` bytes of what was drawn."""
    sample = Sample(limit)
    for task in drawn:
        _add_drawn(sample, task.marker)
    return sample


def _add_drawn(sample: Sample, marker: Path) -> None:
    """Offer what a shard drew."""
    drawn = read_marker(marker) or {}
    texts = map_array(marker.with_suffix(".texts"), np.uint8, drawn["bytes"])
    at = 0
    for key, size in map_array(marker.with_suffix(".pieces"), _PIECES, drawn["pieces"]).tolist():
        sample.add_piece(key, texts[at : at + size].tobytes())
        at += size
