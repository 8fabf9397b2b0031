"""Asking a model for what its prompts hide: the shared text is read once, the rest for each sample.

The state after the text before the needle is kept (a snapshot, nothing but the state's tensors) and repeated over the
batch; so is the state before a question, where one context is asked several. Snapshots lie at multiples of ``chunk``
tokens, so what was read in which call does not depend on which cells were measured before: results are equal to the
bit however an evaluation was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paralm.evaluation.needles import Prompts
from paralm.evaluation.scoring import evaluating


@dataclass
class Asked:
    """How the samples of a cell answered one question. Arrays over samples."""

    right: np.ndarray  # (samples, key tokens) bool: the likeliest token is the key's, the key before it given
    generated: np.ndarray  # (samples,) bool: the key stands in what was generated greedily
    nats: np.ndarray  # (samples,) of the whole key, the key before each token given; NaN where not finite


@dataclass
class Reader:
    """Reads prompts with a model, ``chunk`` tokens a call.

    ``vocab_size``: the tokenizer's; padding of the model's is never an answer. ``extra``: tokens generated beyond the
    key's. ``snapshots``: whether shared text is read once, or each prompt whole. ``tokens``: how many tokens the
    model has read so far, the answers' not counted.
    """

    model: Any
    chunk: int
    vocab_size: int
    extra: int = 0
    snapshots: bool = True
    tokens: int = 0
    _kept: tuple[str, int, Any] = field(default=("", 0, None), repr=False)  # text, position, state of one row

    def ask(self, prompts: Prompts, rows: int, on_progress: Callable[[int, int], None] | None = None) -> list[Asked]:
        """Every question of a cell, in order; ``rows`` samples side by side."""
        found: list[list[Asked]] = [[] for _ in range(prompts.queries)]
        with evaluating(self.model), torch.no_grad():
            start, shared = (prompts.prefix, self._shared(prompts)) if self.snapshots else (0, None)
            for first in range(0, prompts.samples, rows):
                part = slice(first, min(first + rows, prompts.samples))
                count = part.stop - part.start
                for queries in [range(prompts.queries)] if self.snapshots else [[q] for q in range(prompts.queries)]:
                    state = self._read(prompts, part, start, prompts.context, _repeated(shared, count))
                    for query in queries:
                        question, answer = prompts.questions[query, part], prompts.answers[query, part]
                        found[query].append(self._answers(question, answer, state))
                if on_progress is not None:
                    on_progress(part.stop, prompts.samples)
        return [_joined(parts) for parts in found]

    # -- reading -------------------------------------------------------------------------------------------------

    def _shared(self, prompts: Prompts) -> Any:
        """The state of one row after the shared text; on the way there the last multiple of ``chunk`` is kept."""
        whole = prompts.prefix // self.chunk * self.chunk
        text, at, state = self._kept
        if text != prompts.text or at > whole:
            at, state = 0, None
        one = slice(0, 1)
        state = self._read(prompts, one, at, whole, state)
        self._kept = (prompts.text, whole, state)
        return self._read(prompts, one, whole, prompts.prefix, state)

    def _read(self, prompts: Prompts, rows: slice, start: int, stop: int, state: Any) -> Any:
        for at in range(start, stop, self.chunk):
            state = self._step(prompts.read(rows, at, min(at + self.chunk, stop)), state).state
        return state

    def _step(self, tokens: np.ndarray | Tensor, state: Any, last: bool = True) -> Any:
        ids = torch.as_tensor(tokens).to(self._device())
        self.tokens += ids.numel()
        return self.model(ids, state=state, last_logits=last)

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    # -- answering -----------------------------------------------------------------------------------------------

    def _answers(self, question: np.ndarray, answer: np.ndarray, state: Any) -> Asked:
        """``question``: (rows, tokens), ``answer``: (rows, key tokens); ``state``: after the context."""
        for at in range(0, question.shape[1] - 1, self.chunk):
            state = self._step(question[:, at : min(at + self.chunk, question.shape[1] - 1)], state).state
        last, key = torch.as_tensor(question[:, -1:]), torch.as_tensor(answer)
        before = self.tokens + last.numel()
        forced = self._step(torch.cat((last, key[:, :-1]), dim=1), state, last=False).logits[..., : self.vocab_size]
        finite = torch.isfinite(forced).all(-1).cpu()
        right = (forced.argmax(-1).cpu() == key) & finite
        chosen = forced.double().log_softmax(-1).cpu().gather(-1, key[..., None])[..., 0]
        nats = torch.where(finite, -chosen, torch.nan).sum(-1)
        produced, token = list[Tensor](), last
        for _ in range(key.shape[1] + self.extra):
            output = self._step(token, state)
            logits, state = output.logits[:, -1, : self.vocab_size], output.state
            token = torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), -1).cpu()[:, None]
            produced.append(token)
            token = token.clamp(min=0)  # of a row that is lost something must be read
        self.tokens = before
        generated = torch.cat(produced, dim=1).unfold(1, key.shape[1], 1)
        hit = (generated == key[:, None]).all(-1).any(-1)
        return Asked(right.numpy(), hit.numpy(), nats.numpy())


def _repeated(state: Any, rows: int) -> Any:
    """A state of one row as one of ``rows`` equal rows; None, the state before anything was read, stays."""
    return None if state is None else pytree.tree_map(lambda leaf: leaf.repeat(rows, *[1] * (leaf.ndim - 1)), state)


def _joined(parts: list[Asked]) -> Asked:
    return Asked(
        np.concatenate([part.right for part in parts]),
        np.concatenate([part.generated for part in parts]),
        np.concatenate([part.nats for part in parts]),
    )
