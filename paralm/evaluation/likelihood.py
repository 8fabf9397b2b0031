"""Log-likelihoods of continuations and of whole texts, each context read once and its state used again.

A context with several continuations (multiple choice) is read once: its state is kept and repeated over the
continuations. Contexts and continuations go in batches sorted by length; what fills up a row of a batch comes after
its last token, where nothing is read any more, so that it cannot change a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from paralm_data import Tokenizer, TokenStore
from torch import Tensor

from paralm.batching import join_rows, logits_width, read_prompts, signature, take_rows
from paralm.errors import UserError
from paralm.evaluation.scoring import check_sizes, evaluating, score
from paralm.generation import check_finite

if TYPE_CHECKING:
    from paralm.models import LanguageModel
    from paralm.models.mixers.base import State

Ids = Sequence[int]


class Likelihood(NamedTuple):
    """Of a continuation: Σ ln p in nats, and whether each of its tokens was the likeliest one."""

    logprob: float
    greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context (BOS first) and of what comes after it.

    White space at the context's end goes to the continuation, as lm_eval has it: there it is part of a word's first
    token. The two are encoded as one text and cut at the boundary, which gives the tokens that training saw; where
    one token would span the boundary, each is encoded by itself, so that the continuation's bytes, all of them and no
    others, are what is scored.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before, whole = tokenizer.encode(kept), tokenizer.encode(kept + continuation)
    if whole[: len(before)] != before:
        return [tokenizer.bos_id, *before], tokenizer.encode(continuation)
    return [tokenizer.bos_id, *before], whole[len(before) :]


def continuation_likelihoods(
    model: LanguageModel,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    rows: int = 16,
    chunk: int = 512,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """ln p(continuation | context) of pairs of ids, in evaluation mode and without gradients.

    ``rows`` sequences side by side, ``chunk`` tokens at a time: neither changes a result beyond rounding. Memory: the
    states of ``rows`` contexts and of ``rows`` continuations. ``on_progress(done, total)`` in pairs. A continuation
    without tokens is certain: (0, True).

    Raises UserError, one line, for a context without tokens, an id outside the vocabulary, sizes below 1, or a
    likelihood that is not finite.
    """
    check_sizes(rows=rows, chunk=chunk)
    _check_pairs(model, pairs)
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(index)
    contexts = sorted(by_context, key=lambda ids: (-len(ids), ids))
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(pairs)
    done = 0
    with evaluating(model), torch.no_grad():
        for at in range(0, len(contexts), rows):
            batch = contexts[at : at + rows]
            logits, states = read_prompts(model, batch, chunk=chunk)
            jobs: list[_Job] = []
            for row, context in enumerate(batch):
                own = [i for i in by_context[context] if len(pairs[i][1])]
                first, greedy = _of(logits[row : row + 1].expand(len(own), -1), [pairs[i][1][0] for i in own])
                for index, value, likeliest in zip(own, first, greedy, strict=True):
                    jobs.append(_Job(index, pairs[index][1], states[row], value, likeliest))
                done += len(by_context[context])
            for job in _finish(model, jobs, rows, chunk):
                found[job.index] = Likelihood(job.logprob, job.greedy)
            if on_progress is not None:
                on_progress(done, len(pairs))
    return found


class _Job:
    """A continuation whose first token is scored, and the state before it."""

    def __init__(self, index: int, ids: Ids, state: State, logprob: float, greedy: bool) -> None:
        self.index, self.ids, self.state, self.logprob, self.greedy = index, ids, state, logprob, greedy


def _finish(model: LanguageModel, jobs: list[_Job], rows: int, chunk: int) -> list[_Job]:
    """Score the second and further tokens of every continuation."""
    # Contexts of equal shape of state go together: of all mixers but attention, any.
    order = sorted((j for j in jobs if len(j.ids) > 1), key=lambda j: (str(signature(j.state)), -len(j.ids), j.index))
    at = 0
    while at < len(order):
        kind = signature(order[at].state)
        batch = [j for j in order[at : at + rows] if signature(j.state) == kind]
        at += len(batch)
        state = join_rows([j.state for j in batch])
        width = logits_width(model, len(batch), chunk)
        for start in range(0, len(batch[0].ids) - 1, width):
            stay = [row for row, j in enumerate(batch) if len(j.ids) - 1 > start]  # the longest are first
            if len(stay) < len(batch):
                batch, state = batch[: len(stay)], take_rows(state, stay)
            state = _score_piece(model, batch, state, start, width)
    return jobs


def _score_piece(model: LanguageModel, batch: list[_Job], state: State, start: int, width: int) -> State:
    """Read tokens ``start`` … of each continuation and score the next ones; rows are filled up behind their end."""
    widest = min(width, len(batch[0].ids) - 1 - start)
    read = [list(j.ids[start : min(start + widest, len(j.ids) - 1)]) for j in batch]
    tokens = torch.tensor([ids + ids[-1:] * (widest - len(ids)) for ids in read], device=model.head_weight.device)
    output = model(tokens, state=state)
    for row, job in enumerate(batch):
        count = len(read[row])
        values, greedy = _of(output.logits[row, :count], job.ids[start + 1 : start + 1 + count])
        job.logprob += float(np.sum(np.array(values, dtype=np.float64)))
        job.greedy = job.greedy and all(greedy)
    return output.state


def _of(logits: Tensor, tokens: Ids) -> tuple[list[float], list[bool]]:
    """ln p of each token under its row of ``logits`` (positions, vocab), and whether it is the likeliest.

    UserError where one is not finite: comparing NaN with NaN picks an answer too, often enough the right one.
    """
    if not len(tokens):
        return [], []
    ids = torch.tensor(list(tokens), device=logits.device)
    values = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
    check_finite(values)
    return values.tolist(), (logits.argmax(1) == ids).tolist()


def _check_pairs(model: LanguageModel, pairs: Iterable[tuple[Ids, Ids]]) -> None:
    for context, continuation in pairs:
        if not len(context):
            raise UserError("a context has no tokens; begin with the tokenizer's bos_id")
        for ids in (context, continuation):
            if len(ids) and not 0 <= min(ids) <= max(ids) < model.n_tokens:
                wrong = next(i for i in ids if not 0 <= i < model.n_tokens)
                raise UserError(f"token {wrong} is outside the model's vocabulary of {model.n_tokens}")


class _Texts:
    """Texts in memory where a token store is expected: what :mod:`paralm.evaluation.stream` reads of one."""

    def __init__(self, texts: Sequence[Ids]) -> None:
        self.tokens: NDArray[np.int64] = np.array([i for ids in texts for i in ids], dtype=np.int64)
        self._ends = np.cumsum([0, *map(len, texts)])

    def bounds(self, document: int) -> tuple[int, int]:
        return int(self._ends[document]), int(self._ends[document + 1])


def text_likelihoods(
    model: LanguageModel,
    texts: Sequence[Ids],
    *,
    rows: int = 16,
    chunk: int = 512,
    reset_every: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Σ ln p of every token but the first of each text, in nats, with all before it read: state is carried, no windows.

    ``texts``: ids; begin each with BOS. ``reset_every``: forget after every so many predictions, exactly as
    :func:`paralm.evaluation.perplexity.perplexity` does. ``on_progress(done, total)`` in tokens.
    """
    found = [0.0] * len(texts)
    slots = [index for index, ids in enumerate(texts) if len(ids) > 1]
    _check_pairs(model, ((texts[i], ()) for i in slots))
    if slots:
        store = cast(TokenStore, _Texts([texts[i] for i in slots]))
        scores = score(
            model,
            store,
            range(len(slots)),
            rows=rows,
            chunk=chunk,
            reset_every=reset_every,
            on_progress=on_progress,
        )
        for index, loss in zip(slots, scores.loss.tolist(), strict=True):
            found[index] = -loss
    return found
