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
_NONE = np.empty(0, np.int64)


class Recent:
    """The last few results of pure functions; only time depends on it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._kept[key] = make()
            while len(self._kept) > self.size:
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

    def read(self, samples: NDArray[np.int64]) -> NDArray[Any]:
        """(n,) window numbers → (n, seq_len + 1) ids."""
        windows: NDArray[Any] = self._windows[samples * self._seq_len]
        return windows

    def rows(self, step: int, rows: range) -> Rows:
        """Rows ``rows`` of the global batch of ``step``."""
        first = step * self._batch_size
        samples = self.samples(first + rows.start, len(rows))
        return Rows(
            tokens=self.read(samples),
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

    Where a document lies in the stream follows from the lengths of all before it. Only the place of every 256th is
    kept (a quarter of a bit a document); those between are computed when they are needed.
    """

    BLOCK = 256
    CHUNK = 1 << 20  # documents whose lengths are summed at once

    def __init__(self, store: TokenStore, seed: int) -> None:
        self._store, self._seed = store, seed
        self._epochs, self._blocks = Recent(2), Recent(64)

    def read(self, epoch: int, positions: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[Any]:
        """``counts[i]`` tokens of the stream from ``positions[i]`` on, for every i, end to end."""
        self._blocks.size = max(64, 2 * len(positions))
        blocks = self._coarse(epoch).searchsorted(positions, side="right") - 1
        shifts: list[NDArray[np.int64]] = []  # of each document met: from its place in the stream to that in the store
        lengths: list[NDArray[np.int64]] = []  # and how many of its tokens are wanted
        for position, count, block in zip(positions.tolist(), counts.tolist(), blocks.tolist(), strict=True):
            stop = position + count
            while position < stop:
                bounds, shift = self._block(epoch, block)
                first, last = bounds.searchsorted((position, stop - 1), side="right").tolist()
                inside = bounds[first - 1 : last + 1].copy()  # where those documents begin, and where the last ends
                inside[0] = position
                inside[-1] = min(int(inside[-1]), stop)
                shifts.append(shift[first - 1 : last])
                lengths.append(inside[1:] - inside[:-1])
                position, block = int(inside[-1]), block + 1
        places = np.repeat(np.concatenate([_NONE, *shifts]), np.concatenate([_NONE, *lengths]))
        places += np.arange(len(places))
        places += np.repeat(positions - (np.cumsum(counts) - counts), counts)
        return self._store.tokens.take(places)

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

    def _block(self, epoch: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of a block of k documents: (k + 1,) where in the stream they begin and the last ends; (k,) shifts."""

        def make() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            start = block * self.BLOCK
            sources, lengths = self._places(epoch, start, min(start + self.BLOCK, self._store.n_documents))
            bounds = self._coarse(epoch)[block] + np.concatenate(([0], np.cumsum(lengths)))
            return bounds, sources - bounds[:-1]

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
        self._stream = DocumentStream(store, seed)

    def rows(self, step: int, rows: range) -> Rows:
        """Rows ``rows`` of the global batch of ``step``."""
        epoch, segment = divmod(step, self._steps)
        lanes = np.arange(rows.start, rows.stop, dtype=np.int64)
        starts = self._n * lanes // self._batch_size + segment * self._seq_len
        ends = self._n * (lanes + 1) // self._batch_size
        valid = np.clip(ends - starts, 0, self._seq_len)
        counts = np.where(valid > 0, np.minimum(valid + 1, self._n - starts), 0)  # one more: the last input's label
        flat, width = self._stream.read(epoch, starts, counts), self._seq_len + 1
        if len(flat) == len(rows) * width:
            tokens = flat.reshape(len(rows), width)
        else:
            tokens = np.zeros((len(rows), width), self._dtype)
            tokens[np.arange(width) < counts[:, None]] = flat
        continues = np.full(len(rows), segment > 0, np.bool_)
        return Rows(tokens, valid, continues, epoch=step / self._steps)


ORDERS: dict[str, Callable[[TokenStore, int, int, int], Windows | Lanes]] = {"windows": Windows, "lanes": Lanes}
