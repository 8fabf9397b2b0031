"""The two orders in which a store is read: shuffled windows, and lanes of consecutive segments.

An order answers one question, as a pure function of its arguments: which tokens does row r of step s hold? It knows
neither ranks nor tensors. Both use permutations that are functions of (seed, epoch). Of rows longer than a rank wants
it reads a ``part``, a slice of positions; the rows stay what they are.
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


def width(part: slice) -> int:
    """Positions of a slice with both ends."""
    return int(part.stop) - int(part.start)


def _runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, … of each, as many as its length, end to end."""
    ends = lengths.cumsum()
    found = (starts + lengths - ends).repeat(lengths)
    found += np.arange(len(found))
    return found


Spans = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Where in a store's tokens parts of a batch begin, and how many tokens they have; each (n,)."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Raw rows: ``tokens`` (rows, steps + 1) in the store's dtype; of row r the first ``valid[r]`` are inputs.

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

    def __init__(self, store: TokenStore, seq_len: int, batch_size: int, seed: int, part: slice | None = None) -> None:
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self._part = part or slice(0, seq_len)
        self.n_samples = (store.n_tokens - 1) // seq_len
        if self.n_samples < 1:
            raise DataError(
                f"{store.path}: {store.n_tokens} tokens are less than one window of seq_len + 1 = {seq_len + 1}; "
                "give more text or lower training.seq_len"
            )
        self.steps_per_epoch = self.n_samples / batch_size
        self._windows = np.lib.stride_tricks.sliding_window_view(
            store.tokens[self._part.start :], width(self._part) + 1
        )
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
        """(n,) window numbers → (n, steps + 1) ids."""
        windows: NDArray[Any] = self._windows[samples * self._seq_len]
        return windows

    def spans_of(self, samples: NDArray[np.int64]) -> Spans:
        """(n,) window numbers → where they lie."""
        return samples * self._seq_len + self._part.start, np.full(len(samples), width(self._part) + 1)

    def spans(self, step: int, rows: range) -> Spans:
        """Where the rows lie that :meth:`rows` reads."""
        return self.spans_of(self.samples(step * self._batch_size + rows.start, len(rows)))

    def rows(self, step: int, rows: range) -> Rows:
        """Rows ``rows`` of the global batch of ``step``."""
        first = step * self._batch_size
        samples = self.samples(first + rows.start, len(rows))
        return Rows(
            tokens=self.read(samples),
            valid=np.full(len(rows), width(self._part), np.int64),
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
    GROUP = 8  # blocks whose documents are permuted at once: a call for one costs nearly as much
    CHUNK = 1 << 20  # documents whose lengths are summed at once

    def __init__(self, store: TokenStore, seed: int) -> None:
        self._store, self._seed = store, seed
        self._tokens: NDArray[Any] = np.asarray(store.tokens)
        self._epochs, self._blocks, self._tables = Recent(2), Recent(64), Recent(2)
        self._groups = Recent(64)

    def read(self, epoch: int, positions: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[Any]:
        """``counts[i]`` tokens of the stream from ``positions[i]`` on, for every i, end to end."""
        return self._tokens.take(_runs(*self.spans(epoch, positions, counts)))

    def spans(self, epoch: int, positions: NDArray[np.int64], counts: NDArray[np.int64]) -> Spans:
        """Where in the store the tokens lie that :meth:`read` gives, in their order."""
        some = counts > 0
        if not some.all():
            positions, counts = positions[some], counts[some]
        stops = positions + counts
        begins, ends, shifts = self._near(epoch, positions, stops)
        firsts = begins.searchsorted(positions, side="right") - 1
        each = begins.searchsorted(stops, side="left") - firsts  # documents of each part
        met = _runs(firsts, each)
        begin = np.maximum(begins[met], positions.repeat(each))
        lengths = np.minimum(ends[met], stops.repeat(each)) - begin
        return begin + shifts[met], lengths

    def _near(
        self, epoch: int, positions: NDArray[np.int64], stops: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of the documents in all blocks that [positions, stops) touch, in the stream's order: where in the stream each
        begins and ends, and from there to its place in the store. The same for many steps."""
        coarse = self._coarse(epoch)
        first, last = coarse.searchsorted((positions, stops - 1), side="right") - 1
        wide = last - first > 1
        blocks = sorted({*first.tolist(), *last.tolist(), *(_runs(first, last - first).tolist() if wide.any() else ())})

        def make() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
            found = [self._block(epoch, block) for block in blocks]
            bounds = [bound for bound, _ in found]
            return (
                np.concatenate([_NONE, *(bound[:-1] for bound in bounds)]),
                np.concatenate([_NONE, *(bound[1:] for bound in bounds)]),
                np.concatenate([_NONE, *(shift for _, shift in found)]),
            )

        self._blocks.size = self._groups.size = max(64, 2 * len(blocks))
        return self._tables.get((epoch, *blocks), make)

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
            group, within = divmod(block, self.GROUP)
            part = slice(within * self.BLOCK, (within + 1) * self.BLOCK)
            sources, lengths = (values[part] for values in self._group(epoch, group))
            bounds = self._coarse(epoch)[block] + np.concatenate(([0], np.cumsum(lengths)))
            return bounds, sources - bounds[:-1]

        return self._blocks.get((epoch, block), make)

    def _group(self, epoch: int, group: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        size = self.GROUP * self.BLOCK
        stop = min((group + 1) * size, self._store.n_documents)
        return self._groups.get((epoch, group), lambda: self._places(epoch, group * size, stop))


class Lanes:
    """The epoch's document stream, cut into as many equal lanes as a batch has rows; step s reads segment s of each.

    Row r of step s+1 goes on where row r of step s ended, so a state can be carried; a new epoch starts over. Lane r is
    stream positions [⌊r·n/G⌋, ⌊(r+1)·n/G⌋): every token is an input once an epoch, and the last segment of a lane is
    filled up with padding.
    """

    def __init__(self, store: TokenStore, seq_len: int, batch_size: int, seed: int, part: slice | None = None) -> None:
        self._seq_len, self._batch_size, self._n = seq_len, batch_size, store.n_tokens
        self._part = part or slice(0, seq_len)
        longest = -(-self._n // batch_size)
        self._steps = -(-longest // seq_len)
        self.steps_per_epoch = float(self._steps)
        self._dtype = store.tokens.dtype
        self._stream = DocumentStream(store, seed)
        self._recent = Recent(1)

    def _parts(self, segment: int, rows: range) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each row: where in the stream it begins, its inputs, and the tokens that are read for them."""
        begins, ends = self._recent.get((rows.start, rows.stop), lambda: self._lanes(rows))
        starts, steps = begins + segment * self._seq_len + self._part.start, width(self._part)
        valid = np.minimum(np.maximum(ends - starts, 0), steps)
        counts = np.minimum(valid + (valid > 0), self._n - starts)  # one more: the last input's label
        return starts, valid, np.maximum(counts, 0)

    def spans(self, step: int, rows: range) -> Spans:
        """Where the rows lie that :meth:`rows` reads."""
        epoch, segment = divmod(step, self._steps)
        starts, _, counts = self._parts(segment, rows)
        return self._stream.spans(epoch, starts, counts)

    def rows(self, step: int, rows: range) -> Rows:
        """Rows ``rows`` of the global batch of ``step``."""
        epoch, segment = divmod(step, self._steps)
        starts, valid, counts = self._parts(segment, rows)
        steps = width(self._part)
        flat = self._stream.read(epoch, starts, counts)
        if len(flat) == len(rows) * (steps + 1):
            tokens = flat.reshape(len(rows), steps + 1)
        else:
            tokens = np.zeros((len(rows), steps + 1), self._dtype)
            tokens[np.arange(steps + 1) < counts[:, None]] = flat
        continues = np.full(len(rows), segment > 0, np.bool_)
        return Rows(tokens, valid, continues, epoch=step / self._steps)

    def _lanes(self, rows: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where in the stream each row's lane begins and ends."""
        bounds = self._n * np.arange(rows.start, rows.stop + 1, dtype=np.int64) // self._batch_size
        return bounds[:-1], bounds[1:]


Order = Callable[[TokenStore, int, int, int, slice | None], Windows | Lanes]
ORDERS: dict[str, Order] = {"windows": Windows, "lanes": Lanes}
