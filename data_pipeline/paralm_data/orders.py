"""The two orders in which a store is read: shuffled windows, and lanes of consecutive segments.

An order answers one question, as a pure function of its arguments: which tokens does row r of step s hold? It knows
neither ranks nor tensors. Both use permutations that are functions of (seed, epoch).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from paralm_data.errors import DataError
from paralm_data.permutation import random_permutation
from paralm_data.store import TokenStore

T = TypeVar("T")


class Recent:
    """The last few results of pure functions; only time depends on it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._kept[key] = make()
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        value: T = self._kept[key]
        return value


@dataclass(frozen=True, eq=False)
class Rows:
    """Raw rows: ``tokens`` (rows, seq_len + 1) in the store's dtype; of row r the first ``valid[r]`` are inputs.

    ``continues`` (rows,) bool: the row goes on where the same row of the step before ended.
    """

    tokens: NDArray[Any]
    valid: NDArray[np.int64]
    continues: NDArray[np.bool_]
    epoch: float


class Windows:
    """Sample i is tokens [i·seq_len, (i+1)·seq_len + 1); each epoch takes all of them once, in an order of its own.

    Epochs follow each other without a gap, so a batch may hold the end of one and the beginning of the next. At the
    store's end fewer than seq_len + 1 tokens are no window.
    """

    BLOCK = 4096  # indices permuted at once: a call for a few rows costs as much as one for thousands

    def __init__(self, store: TokenStore, seq_len: int, batch_size: int, seed: int) -> None:
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self.n_samples = (store.n_tokens - 1) // seq_len
        if self.n_samples < 1:
            raise DataError(
                f"{store.path}: {store.n_tokens} tokens are less than one window of seq_len + 1 = {seq_len + 1}; "
                "give more text or lower training.seq_len"
            )
        self.steps_per_epoch = self.n_samples / batch_size
        self._windows = np.lib.stride_tricks.sliding_window_view(store.tokens, seq_len + 1)
        self._recent = Recent(4)

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """(count,) window numbers of consecutive places, counted over all epochs."""
        parts = []
        while count > 0:
            epoch, place = divmod(first, self.n_samples)
            block, offset = divmod(place, self.BLOCK)
            part = self._block(epoch, block)[offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def rows(self, step: int, rows: range) -> Rows:
        """Rows ``rows`` of the global batch of ``step``."""
        first = step * self._batch_size
        samples = self.samples(first + rows.start, len(rows))
        return Rows(
            tokens=self._windows[samples * self._seq_len],
            valid=np.full(len(rows), self._seq_len, np.int64),
            continues=np.zeros(len(rows), np.bool_),
            epoch=first / self.n_samples,
        )

    def _block(self, epoch: int, block: int) -> NDArray[np.int64]:
        def make() -> NDArray[np.int64]:
            order = random_permutation(self.n_samples, self._seed, epoch, "windows")
            start = block * self.BLOCK
            return order(np.arange(start, min(start + self.BLOCK, self.n_samples)))

        return self._recent.get((epoch, block), make)


class DocumentStream:
    """All documents of a store end to end, in an order of each epoch's own; any part of it can be read.

    Where a document lies in the stream follows from the lengths of all before it. Only the place of every 64th is
    kept (an eighth of a byte a document); the 63 between are computed when they are needed.
    """

    BLOCK = 64
    CHUNK = 1 << 20  # documents whose lengths are summed at once

    def __init__(self, store: TokenStore, seed: int, cached: int) -> None:
        self._store, self._seed = store, seed
        self._epochs, self._blocks = Recent(2), Recent(cached)

    def read(self, epoch: int, position: int, out: NDArray[Any]) -> None:
        """Fill ``out`` with the stream's tokens from ``position`` on."""
        tokens, filled = self._store.tokens, 0
        block = int(np.searchsorted(self._coarse(epoch), position, side="right")) - 1
        while filled < len(out):
            sources, starts, ends = self._block(epoch, block)
            at = int(np.searchsorted(ends, position, side="right"))
            while at < len(ends) and filled < len(out):
                count = min(int(ends[at]) - position, len(out) - filled)
                source = int(sources[at]) + position - int(starts[at])
                out[filled : filled + count] = tokens[source : source + count]
                filled, position, at = filled + count, position + count, at + 1
            block += 1

    def _places(self, epoch: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the documents at places [start, stop): where each begins in the store, and its length."""
        order = random_permutation(self._store.n_documents, self._seed, epoch, "documents")
        documents = order(np.arange(start, stop))
        ends = self._store.doc_ends
        begins = np.where(documents > 0, ends[np.maximum(documents, 1) - 1], 0)
        return begins, ends[documents] - begins

    def _coarse(self, epoch: int) -> NDArray[np.int64]:
        """Where in the stream each block of documents begins."""

        def make() -> NDArray[np.int64]:
            sums = []
            for start in range(0, self._store.n_documents, self.CHUNK):
                _, lengths = self._places(epoch, start, min(start + self.CHUNK, self._store.n_documents))
                sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), self.BLOCK)))
            lengths = np.concatenate(sums)
            return np.cumsum(lengths) - lengths

        return self._epochs.get(epoch, make)

    def _block(self, epoch: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of a block's documents: where each begins in the store; where each begins and ends in the stream."""

        def make() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
            start = block * self.BLOCK
            sources, lengths = self._places(epoch, start, min(start + self.BLOCK, self._store.n_documents))
            ends = int(self._coarse(epoch)[block]) + np.cumsum(lengths)
            return sources, ends - lengths, ends

        return self._blocks.get((epoch, block), make)


class Lanes:
    """The epoch's document stream, cut into as many equal lanes as a batch has rows; step s reads segment s of each.

    Row r of step s+1 goes on where row r of step s ended, so a state can be carried; a new epoch starts over. Lane r is
    stream positions [⌊r·n/G⌋, ⌊(r+1)·n/G⌋): every token is an input once an epoch, and the last segment of a lane is
    filled up with padding.
    """

    def __init__(self, store: TokenStore, seq_len: int, batch_size: int, seed: int) -> None:
        self._seq_len, self._batch_size, self._n = seq_len, batch_size, store.n_tokens
        longest = -(-self._n // batch_size)
        self._steps = -(-longest // seq_len)
        self.steps_per_epoch = float(self._steps)
        self._dtype = store.tokens.dtype
        self._stream = DocumentStream(store, seed, cached=max(64, 4 * batch_size))

    def rows(self, step: int, rows: range) -> Rows:
        """Rows ``rows`` of the global batch of ``step``."""
        epoch, segment = divmod(step, self._steps)
        tokens = np.zeros((len(rows), self._seq_len + 1), self._dtype)
        valid = np.zeros(len(rows), np.int64)
        for index, row in enumerate(rows):
            start = self._n * row // self._batch_size + segment * self._seq_len
            end = self._n * (row + 1) // self._batch_size
            valid[index] = min(max(end - start, 0), self._seq_len)
            if valid[index]:
                count = min(int(valid[index]) + 1, self._n - start)  # one more: the last input's label
                self._stream.read(epoch, start, tokens[index, :count])
        continues = np.full(len(rows), segment > 0, np.bool_)
        return Rows(tokens, valid, continues, epoch=step / self._steps)


ORDERS: dict[str, Callable[[TokenStore, int, int, int], Windows | Lanes]] = {"windows": Windows, "lanes": Lanes}
