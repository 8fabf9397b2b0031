"""Perplexity, bits per byte and word perplexity of a store, and the cheap version of it for use during training.

    nats per token = Σ loss / tokens        token perplexity = exp(Σ loss / tokens)
    bits per byte  = Σ loss / (ln 2 · UTF-8 bytes of the text)       word perplexity = exp(Σ loss / words)

A document's predictions are its tokens and its end (EOS), each made once with all before it in the document read; the
end counts among the tokens and its loss in every sum, but it is no byte and no word of the text. Words are what
``str.split`` finds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from paralm_data import Tokenizer, TokenStore
from pydantic import BaseModel
from torch import nn

from paralm.errors import UserError
from paralm.evaluation.bootstrap import Interval, ratio_interval_by_moments, ratio_intervals
from paralm.evaluation.result import Result
from paralm.evaluation.scoring import BUCKETS, Scores, check_sizes, score
from paralm.evaluation.stream import select_documents
from paralm.evaluation.text import count_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Bucket(BaseModel):
    """Predictions at positions ``first`` … ``last`` of their documents; the token after BOS is at 1."""

    first: int
    last: int
    tokens: int
    nats_per_token: float
    interval: Interval | None = None  # 95 %, over the documents that reach so far; None for fewer than two


class Documents(BaseModel):
    """Sums of each scored document, in columns; ``index`` is its place in the store."""

    index: list[int]
    nats: list[float]
    tokens: list[int]
    n_bytes: list[int]
    words: list[int]


class PerplexityResult(Result):
    """What one store says of one checkpoint. Intervals: 95 %, by bootstrap over documents; None for one document."""

    kind: ClassVar[str] = "perplexity"

    set: str = "held_out"
    tokens: int
    n_bytes: int
    words: int | None  # None: the tokenizer does not give the text back, so there are no words to count
    n_documents: int
    of_documents: int  # in the store
    reset_every: int | None
    nats_per_token: float
    nats_per_token_interval: Interval | None
    token_perplexity: float
    token_perplexity_interval: Interval | None
    bits_per_byte: float
    bits_per_byte_interval: Interval | None
    word_perplexity: float | None
    word_perplexity_interval: Interval | None
    by_position: list[Bucket]
    documents: Documents

    @property
    def name(self) -> str:
        """``perplexity`` for the held-out split, ``perplexity_SET`` for another set."""
        return self.kind if self.set == "held_out" else f"{self.kind}_{self.set}"

    def scalars(self) -> dict[str, float]:
        """For TensorBoard."""
        found = {
            "nats_per_token": self.nats_per_token,
            "token_perplexity": self.token_perplexity,
            "bits_per_byte": self.bits_per_byte,
        }
        return found if self.word_perplexity is None else {**found, "word_perplexity": self.word_perplexity}

    def figures(self) -> dict[str, Figure]:
        """The loss by position."""
        return {"by_position": self._by_position()}

    def _by_position(self) -> Figure:
        from paralm.evaluation import figures  # here: ranks that validate while training need no matplotlib

        figure, axes = figures.new("position in the document (tokens)", "loss (nats per token)")
        middle = [math.sqrt(b.first * b.last) for b in self.by_position]
        axes.plot(middle, [b.nats_per_token for b in self.by_position], marker="o", color=figures.BLUE)
        sure = [(x, *b.interval) for x, b in zip(middle, self.by_position) if b.interval is not None]
        at, low, high = [[point[i] for point in sure] for i in range(3)]
        axes.fill_between(at, low, high, color=figures.BLUE, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        if self.train_seq_len:
            figures.mark(axes, self.train_seq_len, "training length")
        axes.set_title(f"Loss by position, {self.set.replace('_', '-')} documents")
        return figure


def perplexity(
    model: nn.Module,
    store: TokenStore,
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
    rows: int = 16,
    chunk: int = 512,
    *,
    device: torch.device | str | None = None,
    reset_every: int | None = None,
    set_name: str = "held_out",
    train_seq_len: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Stream up to ``max_tokens`` tokens of a store's documents, whole, with carried state; score each token once.

    ``rows`` documents side by side, ``chunk`` tokens at a time: neither changes the result beyond rounding. Works
    at any document length in constant memory when the model's state is bounded; for one whose state grows
    (attention), ``reset_every=N`` bounds it. ``seed``: of the bootstrap. ``device``: default: the model's.

    Raises UserError, one line, for sizes below 1, a vocabulary larger than the model's, or a loss that is not
    finite; DataError, one line, for a store of another tokenizer.
    """
    check_sizes(max_tokens=max_tokens, rows=rows, chunk=chunk, reset_every=reset_every)
    store.check_tokenizer(tokenizer)
    size = getattr(model, "n_tokens", store.vocab_size)
    if store.vocab_size > size:
        raise UserError(f"{store.path}: has a vocabulary of {store.vocab_size}, the model one of {size}")
    sums = score_documents(
        model,
        store,
        tokenizer,
        select_documents(store, max_tokens),
        rows=rows,
        chunk=chunk,
        device=device,
        reset_every=reset_every,
        on_progress=on_progress,
    )
    return summarize(sums, store.n_documents, reset_every, set_name, train_seq_len, seed)


def score_documents(
    model: nn.Module,
    store: TokenStore,
    tokenizer: Tokenizer,
    documents: NDArray[np.int64],
    *,
    rows: int,
    chunk: int,
    device: torch.device | str | None = None,
    reset_every: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DocumentSums:
    """The sums of some documents. Raises UserError, one line, for a loss that is not finite."""
    scores = score(
        model,
        store,
        documents,
        rows=rows,
        chunk=chunk,
        device=device,
        reset_every=reset_every,
        on_progress=on_progress,
    )
    bad = np.flatnonzero(~np.isfinite(scores.loss))
    if len(bad):
        raise UserError(
            f"{store.path}: the model's loss on document {int(documents[bad[0]])} is {float(scores.loss[bad[0]])}; "
            "its weights may have diverged: evaluate an earlier checkpoint"
        )
    return DocumentSums.of(scores, documents, store.doc_bytes[documents], count_words(store, tokenizer, documents))


@dataclass(frozen=True)
class DocumentSums:
    """What a result is made of: sums of each document, in columns, and by position over all. Those of disjoint parts
    of a store add up (:meth:`join`). ``words``: None if the tokenizer does not give the text back."""

    index: NDArray[np.int64]
    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    words: NDArray[np.int64] | None
    buckets: NDArray[np.float64]  # (BUCKETS, 6): Σ L, Σ n, Σ L², Σ L n, Σ n² over documents, and how many reach it
    detailed: bool  # whether the last four columns were summed

    @classmethod
    def of(
        cls,
        scores: Scores,
        documents: NDArray[np.int64],
        n_bytes: NDArray[np.int64],
        words: NDArray[np.int64] | None,
    ) -> DocumentSums:
        """From the scores of these documents."""
        buckets = np.zeros((BUCKETS, 6))
        buckets[:, 0], buckets[:, 1] = scores.bucket_loss, scores.bucket_tokens
        loss, weight = scores.document_bucket_loss, scores.document_bucket_tokens.astype(np.float64)
        detailed = len(loss) == len(documents)
        if detailed:
            sums = (np.square(loss), loss * weight, np.square(weight), weight > 0)
            buckets[:, 2:] = np.stack([column.sum(axis=0) for column in sums], axis=1)
        return cls(documents, scores.loss, scores.tokens, n_bytes, words, buckets, detailed)

    @classmethod
    def join(cls, parts: Sequence[DocumentSums]) -> DocumentSums:
        """Of all parts together, documents in their order in the store."""
        index = np.concatenate([part.index for part in parts])
        order = np.argsort(index, kind="stable")
        words = [part.words for part in parts if part.words is not None]
        return cls(
            index[order],
            np.concatenate([part.nats for part in parts])[order],
            np.concatenate([part.tokens for part in parts])[order],
            np.concatenate([part.n_bytes for part in parts])[order],
            np.concatenate(words)[order] if len(words) == len(parts) else None,
            np.sum([part.buckets for part in parts], axis=0),
            all(part.detailed for part in parts),
        )


def summarize(
    sums: DocumentSums,
    of_documents: int,
    reset_every: int | None,
    set_name: str,
    train_seq_len: int | None,
    seed: int = 0,
) -> PerplexityResult:
    """Perplexities and their intervals from sums; ``of_documents``: how many the store has."""
    nats, tokens, total_bytes = float(sums.nats.sum()), int(sums.tokens.sum()), int(sums.n_bytes.sum())
    per_token = nats / tokens
    total_words = int(sums.words.sum()) if sums.words is not None else 0
    counts: list[NDArray[Any]] = [sums.tokens, sums.n_bytes * math.log(2), np.zeros_like(sums.n_bytes)]
    if sums.words is not None:
        counts[2] = sums.words
    by_token, by_byte, by_word = ratio_intervals(sums.nats, counts, seed)
    return PerplexityResult(
        set=set_name,
        train_seq_len=train_seq_len,
        tokens=tokens,
        n_bytes=total_bytes,
        words=total_words if sums.words is not None else None,
        n_documents=len(sums.index),
        of_documents=of_documents,
        reset_every=reset_every,
        nats_per_token=per_token,
        nats_per_token_interval=by_token,
        token_perplexity=_exp(per_token),
        token_perplexity_interval=_exp_interval(by_token),
        bits_per_byte=bits_per_byte(nats, total_bytes),
        bits_per_byte_interval=by_byte,
        word_perplexity=_exp(nats / total_words) if total_words else None,
        word_perplexity_interval=_exp_interval(by_word),
        by_position=[
            Bucket(
                first=1 << b,
                last=(2 << b) - 1,
                tokens=int(row[1]),
                nats_per_token=float(row[0] / row[1]),
                interval=ratio_interval_by_moments(row) if sums.detailed else None,
            )
            for b, row in enumerate(sums.buckets)
            if row[1]
        ],
        documents=Documents(
            index=sums.index.tolist(),
            nats=sums.nats.tolist(),
            tokens=sums.tokens.tolist(),
            n_bytes=sums.n_bytes.tolist(),
            words=sums.words.tolist() if sums.words is not None else [],
        ),
    )


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Σ loss / (ln 2 · bytes); infinite for no bytes."""
    return nats / math.log(2) / n_bytes if n_bytes else math.inf


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _exp_interval(interval: Interval | None) -> Interval | None:
    return None if interval is None else (_exp(interval[0]), _exp(interval[1]))


@dataclass(frozen=True)
class ValidationSums:
    """What a rank adds to the sums over all ranks."""

    loss_sum: float  # nats
    tokens: int  # predictions
    n_bytes: int  # UTF-8 bytes of the documents' text
    documents: int


def validate(
    model: nn.Module,
    store: TokenStore,
    max_tokens: int,
    rows: int,
    chunk: int,
    *,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    reset_every: int | None = None,
) -> ValidationSums:
    """This rank's part of a validation on at most ``max_tokens`` tokens of a store; the caller adds up the ranks.

    Whatever the number of ranks, together they score the same documents, each by one rank, so the sums over ranks
    are equal up to rounding. A rank that has none left returns zeros. No communication takes place here. Arguments
    as for :func:`perplexity`; a loss that is not finite is returned as it is.
    """
    check_sizes(max_tokens=max_tokens, rows=rows, chunk=chunk, reset_every=reset_every)
    mine = _documents_of(store, max_tokens, rank, world_size)
    if not len(mine):
        return ValidationSums(0.0, 0, 0, 0)
    scores = score(model, store, mine, rows=rows, chunk=chunk, device=device, reset_every=reset_every)
    n_bytes = int(store.doc_bytes[mine].sum())
    return ValidationSums(float(scores.loss.sum()), int(scores.tokens.sum()), n_bytes, len(mine))


@lru_cache(maxsize=32)
def _documents_of(store: TokenStore, max_tokens: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """A rank's documents of a validation set; found once, for all lengths are looked at."""
    return split_documents(store, select_documents(store, max_tokens), world_size)[rank]


def split_documents(store: TokenStore, documents: NDArray[np.int64], parts: int) -> list[NDArray[np.int64]]:
    """The documents in ``parts`` disjoint parts of about equal numbers of tokens: the longest first, each to the
    part that has the fewest."""
    lengths = {int(d): store.bounds(int(d))[1] - store.bounds(int(d))[0] for d in documents}
    found: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for document in sorted(lengths, key=lambda d: (-lengths[d], d)):
        load, part = heapq.heappop(loads)
        found[part].append(document)
        heapq.heappush(loads, (load + lengths[document], part))
    return [np.array(sorted(mine), dtype=np.int64) for mine in found]
