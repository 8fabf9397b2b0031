"""Whole documents, any number and length, as rectangles of tokens at constant memory.

``rows`` lanes lie side by side and advance ``chunk`` tokens at a time. A lane whose document ends takes the next one
at once, with a reset, so lanes stay full; the state of each lane is carried from one rectangle to the next. A document
BOS t₁ … tₙ EOS is fed as BOS t₁ … tₙ and asked for t₁ … tₙ EOS: every token but BOS is predicted exactly once, with
everything before it in its document read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from paralm_data import IGNORE, TokenStore, random_permutation

Ints = NDArray[np.int64]


def select_documents(store: TokenStore, max_tokens: int | None = None) -> Ints:
    """Documents of a store to evaluate, ascending: an arbitrary but fixed part of at most ``max_tokens`` tokens.

    Documents are visited in a random order that depends on the store's size alone, and each that still fits is
    taken; a document is never cut. If none fits, the shortest is taken. ``None`` takes all.
    """
    lengths = np.diff(store.doc_ends, prepend=np.int64(0))
    if max_tokens is None or store.n_tokens <= max_tokens:
        return np.arange(store.n_documents, dtype=np.int64)
    shortest = int(lengths.min())
    if shortest > max_tokens:
        return np.array([int(lengths.argmin())], dtype=np.int64)
    order = random_permutation(store.n_documents, 0, 0, "evaluation")
    left, taken = max_tokens, []
    for start in range(0, store.n_documents, 1 << 16):
        indices = order(np.arange(start, min(start + (1 << 16), store.n_documents), dtype=np.int64))
        indices = indices[lengths[indices] <= left]  # few, when little is left
        for index, length in zip(indices.tolist(), lengths[indices].tolist()):
            if length <= left:
                taken.append(index)
                left -= length
        if left < shortest:
            break
    return np.array(sorted(taken), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Piece:
    """Predictions ``start`` … ``stop`` − 1 of a document (0 predicts the token after BOS), read from a fresh state."""

    slot: int  # the document's place in the selection
    document: int  # its index in the store
    start: int
    stop: int


def pieces(store: TokenStore, documents: Iterable[int], reset_every: int | None = None) -> list[Piece]:
    """The documents as pieces, longest first so that lanes end together; whole unless ``reset_every`` is given.

    ``reset_every=N`` forgets after every N predictions, as harnesses do that cut text into windows: the first
    prediction of a window has read one token, the last one N.
    """
    found = []
    for slot, document in enumerate(documents):
        start, end = store.bounds(int(document))
        count = end - start - 1
        step = reset_every or count
        found += [Piece(slot, int(document), at, min(at + step, count)) for at in range(0, count, step)]
    return sorted(found, key=lambda p: (p.start - p.stop, p.document, p.start))


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` predictions of one document in a rectangle, from (``row``, ``column``) to the right."""

    row: int
    column: int
    length: int
    slot: int
    position: int  # of the first predicted token in its document; the token after BOS has position 1


@dataclass(frozen=True, slots=True)
class Rectangle:
    """One forward's worth of tokens, ``(rows, width)``."""

    tokens: Ints
    labels: Ints  # the next token, IGNORE where a lane has run out
    reset: NDArray[np.bool_]
    segments: list[Segment]
    keep: Ints | None  # rows of the *previous* rectangle that go on, in order; None: all of them

    @property
    def predictions(self) -> int:
        """Labels that count."""
        return sum(segment.length for segment in self.segments)


class _Lane:
    """Where one row is: in which piece, how far, and from where to read."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store
        self.piece: Piece | None = None
        self.at = 0  # predictions of the piece made so far, counted in the document
        self._base = 0  # where the document begins in the store

    def take(self, queue: deque[Piece]) -> None:
        if self.piece is None and queue:
            self.piece = queue.popleft()
            self.at = self.piece.start
            self._base, _ = self._store.bounds(self.piece.document)

    def fill(self, row: int, out: Rectangle, queue: deque[Piece]) -> int:
        """Write this lane's next tokens into row ``row``; returns how many there were."""
        column, width = 0, out.tokens.shape[1]
        while column < width and self.piece is not None:
            piece, fresh = self.piece, self.at == self.piece.start
            length = min(width - column, piece.stop - self.at)
            read = self._store.tokens[self._base + self.at : self._base + self.at + length + 1].astype(np.int64)
            out.tokens[row, column : column + length] = read[:-1]
            out.labels[row, column : column + length] = read[1:]
            out.reset[row, column] = fresh
            out.segments.append(Segment(row, column, length, piece.slot, self.at + 1))
            self.at += length
            column += length
            if self.at == piece.stop:
                self.piece = None
                self.take(queue)
        return column


def rectangles(store: TokenStore, work: Sequence[Piece], rows: int, chunk: int) -> Iterator[Rectangle]:
    """Stream the pieces. Memory: one rectangle and the list of pieces, whatever the documents' lengths.

    Before it uses a rectangle the caller takes the rows ``keep`` of its carried state: lanes that have run out of
    documents are dropped, so the last documents do not drag idle rows along.
    """
    queue = deque(work)
    lanes = [_Lane(store) for _ in range(min(rows, len(work)))]
    for lane in lanes:
        lane.take(queue)
    keep: Ints | None = None
    while lanes:
        shape = (len(lanes), chunk)
        tokens, labels, reset = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64), np.zeros(shape, np.bool_)
        whole = Rectangle(tokens, labels, reset, [], keep)
        width = max([lane.fill(row, whole, queue) for row, lane in enumerate(lanes)])
        yield replace(whole, tokens=tokens[:, :width], labels=labels[:, :width], reset=reset[:, :width])
        alive = [row for row, lane in enumerate(lanes) if lane.piece is not None]
        keep = None if len(alive) == len(lanes) else np.array(alive, dtype=np.int64)
        lanes = [lanes[row] for row in alive]
