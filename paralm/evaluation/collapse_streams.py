"""What the collapse evaluation reads, and what it keeps of it: losses by stream and bucket, and states at its edges.

Texts, as streams of ``length`` tokens:

    natural    documents in a fixed random order, end to end, cut into streams that do not overlap; the state is carried
               over the ends of documents, as over everything else (`paralm eval perplexity` resets it there)
    repeat     the first tokens of each natural stream (as many as the training length), again and again
    newlines   the tokens of a line end, again and again; one stream

A stream advances from edge to edge (:func:`paralm.evaluation.collapse_rule.bucket_edges`) in pieces of ``chunk``
tokens; what is kept does not depend on it beyond rounding. Memory is that of the states at the last few edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from paralm_data import IGNORE, Tokenizer, TokenStore
from paralm_data.orders import DocumentStream

from paralm.errors import UserError
from paralm.evaluation.collapse_rule import PER_OCTAVE
from paralm.evaluation.scoring import evaluating
from paralm.evaluation.state_statistics import state_statistics
from paralm.models import LanguageModel

Ints = NDArray[np.int64]
Progress = Callable[[int, int], None]

TEXTS = ("natural", "repeat", "newlines")


class Streams:
    """Token streams of one kind: :meth:`read` gives any part of them. Raises UserError, one line."""

    def __init__(
        self, store: TokenStore, tokenizer: Tokenizer | None, kind: str, streams: int, length: int, passage: int
    ) -> None:
        self.kind, self.length, self.passage = kind, length, passage
        self.streams = 1 if kind == "newlines" else streams
        self.bos, self.eos = store.manifest.bos_id, store.manifest.eos_id
        if streams * length >= store.n_tokens:
            raise UserError(
                f"{store.path}: {store.n_tokens:,} tokens are too few for {streams} streams of {length:,} tokens; "
                f"give length={store.n_tokens // streams - 1} or fewer streams"
            )
        self._documents = DocumentStream(store, seed=0)
        if kind == "newlines":
            assert tokenizer is not None
            self._line = np.asarray(tokenizer.encode("\n"), np.int64)
            if not len(self._line):
                raise UserError("the tokenizer has no token for a line end; leave 'newlines' out of texts")

    def read(self, begin: int, end: int) -> tuple[Ints, Ints]:
        """Tokens ``begin`` … ``end`` − 1 of every stream, and the token after each (IGNORE after an end of document,
        where whatever comes next is no prediction)."""
        if self.kind == "natural":
            tokens = self._natural(begin, end + 1)
        elif self.kind == "repeat":
            tokens = self._natural(0, self.passage)[:, np.arange(begin, end + 1) % self.passage]
        else:
            at = np.arange(begin, end + 1)
            tokens = np.where(at == 0, self.bos, self._line[(at - 1) % len(self._line)])[None]
        labels = tokens[:, 1:].copy()
        labels[tokens[:, :-1] == self.eos] = IGNORE
        return tokens[:, :-1], labels

    def _natural(self, begin: int, end: int) -> Ints:
        starts = np.arange(self.streams, dtype=np.int64) * self.length + begin
        flat = self._documents.read(0, starts, np.full(self.streams, end - begin, np.int64))
        return flat.reshape(self.streams, end - begin).astype(np.int64)


class Sums:
    """Losses of every stream in every bucket, in float64."""

    def __init__(self, streams: int, edges: list[int]) -> None:
        self.edges = np.asarray(edges)
        self.nats = np.zeros((streams, len(edges) - 1))
        self.tokens = np.zeros((streams, len(edges) - 1), np.int64)

    def add(self, streams: Ints, begin: Ints, losses: NDArray[np.float64], counted: NDArray[np.bool_]) -> None:
        """``losses`` (rows, width) of predictions that have read ``begin`` + 1, ``begin`` + 2, … tokens."""
        read = begin[:, None] + np.arange(losses.shape[1]) + 1
        bucket = np.searchsorted(self.edges, read, side="left") - 1
        rows = np.broadcast_to(streams[:, None], bucket.shape)
        np.add.at(self.nats, (rows[counted], bucket[counted]), losses[counted])
        np.add.at(self.tokens, (rows[counted], bucket[counted]), 1)

    def result(self) -> dict[str, Any]:
        """JSON-able."""
        return {"nats": self.nats.tolist(), "tokens": self.tokens.tolist()}


def _losses(model: LanguageModel, tokens: Ints, labels: Ints, state: Any) -> tuple[NDArray[np.float64], Any]:
    device = model.head_weight.device
    output = model(
        torch.from_numpy(np.ascontiguousarray(tokens)).to(device),
        labels=torch.from_numpy(np.ascontiguousarray(labels)).to(device),
        state=state,
        return_token_losses=True,
    )
    assert output.token_losses is not None
    return output.token_losses.to("cpu", torch.float64).numpy(), output.state


def read_carried(
    model: LanguageModel, streams: Streams, edges: list[int], chunk: int, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Read every stream from its start with carried state: sums, and at each edge the state's statistics.

    The cosine is to the state an octave earlier. Returns ``{"nats", "tokens": streams × buckets, "states": one list of
    statistics a bucket's end}``, JSON-able.
    """
    sums, states, kept = Sums(streams.streams, edges), [], []
    everyone = np.arange(streams.streams, dtype=np.int64)
    state: Any = None
    with evaluating(model), torch.no_grad():
        for begin, end in itertools.pairwise(edges):
            for at, upto in _pieces(begin, end, chunk):
                tokens, labels = streams.read(at, upto)
                losses, state = _losses(model, tokens, labels, state)
                sums.add(everyone, np.full_like(everyone, at), losses, labels != IGNORE)
                if on_progress is not None:
                    on_progress(upto, edges[-1])
            kept.append(state)
            earlier = kept[-1 - PER_OCTAVE] if len(kept) > PER_OCTAVE else None
            states.append([found.model_dump() for found in state_statistics(model, state, earlier)])
            kept = kept[-PER_OCTAVE:]
    return {**sums.result(), "states": states}


def read_afresh(
    model: LanguageModel,
    streams: Streams,
    edges: list[int],
    window: int,
    chunk: int,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The same predictions, each from a state that is between half a window and a window old.

    Windows of ``window`` tokens begin half a window after each other, from a fresh state; the first is scored whole,
    of the others the last half. So the first ``window`` predictions are those of :func:`read_carried`.
    """
    sums = Sums(streams.streams, edges)
    everyone, length = np.arange(streams.streams, dtype=np.int64), edges[-1]
    with evaluating(model), torch.no_grad():
        for begin, first, end in _windows(window, length):
            state: Any = None
            for at, upto in _pieces(begin, end, chunk):
                tokens, labels = streams.read(at, upto)
                losses, state = _losses(model, tokens, labels, state)
                scored = (labels != IGNORE) & (np.arange(at, upto) >= first)
                sums.add(everyone, np.full_like(everyone, at), losses, scored)
            if on_progress is not None:
                on_progress(end, length)
    return sums.result()


def _pieces(begin: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + chunk, end)) for at in range(begin, end, chunk))


def _windows(window: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first scored, end) of each window."""
    yield 0, 0, min(window, length)
    half = max(1, window // 2)
    for first in range(window, length, half):
        yield first + half - window, first, min(first + half, length)
