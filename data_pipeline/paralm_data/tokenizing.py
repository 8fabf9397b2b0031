"""Documents into stores: encoded in batches of a few megabytes, so memory does not grow with the corpus."""

from __future__ import annotations

from collections.abc import Iterable

from paralm_data.progress import Meter
from paralm_data.specs import Document
from paralm_data.store_writer import StoreWriter
from paralm_data.tokenizer import Tokenizer

BATCH_BYTES = 4 << 20  # of text, encoded at once


def tokenize(
    stream: Iterable[tuple[StoreWriter | None, Document]], model: Tokenizer, threads: int, meter: Meter
) -> None:
    """Encode documents in batches and give each to its writer, in order; None: read only to be counted."""
    batch: list[tuple[StoreWriter, Document, int]] = []
    size = 0
    for writer, document in stream:
        if writer is None:
            continue
        n_bytes = len(document.text.encode("utf-8"))
        batch.append((writer, document, n_bytes))
        size += n_bytes
        if size >= BATCH_BYTES:
            _write_batch(batch, model, threads, meter)
            batch, size = [], 0
    _write_batch(batch, model, threads, meter)


def _write_batch(batch: list[tuple[StoreWriter, Document, int]], model: Tokenizer, threads: int, meter: Meter) -> None:
    ids = model.encode_arrays([document.text for _, document, _ in batch], threads)
    for writer in {id(w): w for w, _, _ in batch}.values():
        mine = [(i, n) for (w, _, n), i in zip(batch, ids) if w is writer]
        writer.add([i for i, _ in mine], [n for _, n in mine])
    meter.add(len(batch), sum(n for _, _, n in batch), sum(map(len, ids)) + 2 * len(batch))
