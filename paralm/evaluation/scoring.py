"""Token losses of whole documents, streamed with carried state: the sums that every perplexity is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from paralm_data import TokenStore
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paralm.errors import UserError
from paralm.evaluation.stream import Rectangle, Segment, pieces, rectangles

BUCKETS = 48  # of positions, [2ᵇ, 2ᵇ⁺¹): no document reaches 2⁴⁸ tokens
DETAILED = 1 << 17  # documents whose sums by position are kept one by one (100 MB); of more, only those of all


def scoring_version(vocab_size: int, n_tokens: int) -> int:
    """Of what a score is, of models with so many rows for so many tokens: results of another are measured again. Raise
    it with what changes scores, for the models whose scores change.

    2: probabilities are over the tokens alone; they were over the padding, too.
    """
    return 2 if vocab_size > n_tokens else 1


@dataclass(frozen=True)
class Scores:
    """Sums in float64 over the scored documents, one entry a document, and over all by position."""

    loss: NDArray[np.float64]  # nats, (documents,)
    tokens: NDArray[np.int64]  # predictions, (documents,): the document's tokens without BOS
    bucket_loss: NDArray[np.float64]  # nats, (BUCKETS,): positions 2ᵇ … 2ᵇ⁺¹ − 1, the token after BOS is at 1
    bucket_tokens: NDArray[np.int64]
    document_bucket_loss: NDArray[np.float64]  # (documents, BUCKETS), or (0, BUCKETS) where it would be large
    document_bucket_tokens: NDArray[np.int64]


def score(
    model: nn.Module,
    store: TokenStore,
    documents: Sequence[int] | NDArray[np.int64],
    *,
    rows: int,
    chunk: int,
    device: torch.device | str | None = None,
    reset_every: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score each token of ``documents`` but their BOS once, in evaluation mode and without gradients.

    ``model``: a LanguageModel, or the engine around one, whose forward gives ``token_losses`` and ``state``.
    ``device``: where tokens go; default: the model's parameters' device. ``reset_every``: forget after every so many
    tokens of a document (see :func:`paralm.evaluation.stream.pieces`). ``on_progress(done, total)`` in tokens.

    The sums do not depend on ``rows`` and ``chunk`` beyond rounding. Memory does not depend on the documents'
    lengths, for mixers whose state is bounded. How often the model is called depends on the documents: where ranks
    need each other in a forward (ZeRO-3), ``model`` is a :class:`paralm.training.lockstep.Lockstep`.
    """
    check_sizes(rows=rows, chunk=chunk, reset_every=reset_every)
    where = device if device is not None else next(model.parameters()).device
    work = pieces(store, documents, reset_every)
    total, done = sum(p.stop - p.start for p in work), 0
    count, detailed = len(documents), len(documents) if len(documents) <= DETAILED else 0
    sums = Scores(
        np.zeros(count),
        np.zeros(count, np.int64),
        np.zeros(BUCKETS),
        np.zeros(BUCKETS, np.int64),
        np.zeros((detailed, BUCKETS)),
        np.zeros((detailed, BUCKETS), np.int64),
    )
    # A rectangle's losses are read after the next one was launched, so that a device does not wait for the host.
    waiting: tuple[list[Segment], Tensor] | None = None
    state: Any = None
    with evaluating(model), torch.no_grad():
        for part in rectangles(store, work, rows, chunk):
            losses, state = _forward(model, part, state, where)
            if waiting is not None:
                _add(sums, *waiting)
            waiting = (part.segments, losses)
            done += part.predictions
            if on_progress is not None:
                on_progress(done, total)
        if waiting is not None:
            _add(sums, *waiting)
    return sums


def _forward(model: nn.Module, part: Rectangle, state: Any, device: torch.device | str) -> tuple[Tensor, Any]:
    """Token losses (rows, width) and the new state."""
    if part.keep is not None:
        keep = torch.from_numpy(part.keep).to(device)
        state = pytree.tree_map(lambda leaf: leaf.index_select(0, keep), state)
    output = model(
        torch.from_numpy(part.tokens).to(device),
        labels=torch.from_numpy(part.labels).to(device),
        state=state,
        reset=torch.from_numpy(part.reset).to(device),
        return_token_losses=True,
    )
    return output.token_losses, output.state


def _add(sums: Scores, segments: list[Segment], losses: Tensor) -> None:
    values = losses.to("cpu", torch.float64).numpy()
    for piece in segments:
        run = values[piece.row, piece.column : piece.column + piece.length]
        sums.loss[piece.slot] += run.sum()
        sums.tokens[piece.slot] += piece.length
        at = 0
        while at < piece.length:
            bucket = (piece.position + at).bit_length() - 1
            upto = min(piece.length, (2 << bucket) - piece.position)
            found = run[at:upto].sum()
            sums.bucket_loss[bucket] += found
            sums.bucket_tokens[bucket] += upto - at
            if len(sums.document_bucket_loss):
                sums.document_bucket_loss[piece.slot, bucket] += found
                sums.document_bucket_tokens[piece.slot, bucket] += upto - at
            at = upto


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, whatever it was before outside."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def check_sizes(**sizes: int | None) -> None:
    """UserError, one line, for a size below 1 (None is no size)."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
