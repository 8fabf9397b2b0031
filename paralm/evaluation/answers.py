"""Answers of a model to a task's examples: right or not, and their loss, at every labelled position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from paralm_data import IGNORE, Task
from paralm_data.synthetic import Examples, Split
from torch import Tensor, nn

_LOGITS = 1 << 24  # that exist at one time, at most


@dataclass(frozen=True, eq=False)
class Answers:
    """Of n examples of at most ``width`` tokens. ``asked``, ``right``: bool (n, width), where there is a label, and
    where it is the likeliest token; ``loss``: float64 (n,), nats summed over an example's answers."""

    asked: NDArray[np.bool_]
    right: NDArray[np.bool_]
    loss: NDArray[np.float64]

    @property
    def whole(self) -> NDArray[np.bool_]:
        """(n,): every answer of the example is right."""
        return (self.right == self.asked).all(axis=1)


@torch.no_grad()
def answer(
    model: nn.Module,
    examples: Examples,
    *,
    vocab_size: int,
    rows: int,
    chunk: int,
    device: torch.device,
    reset_every: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """What ``model`` answers, ``rows`` examples at a time, ``chunk`` tokens of them at a time with carried state.

    Neither changes an answer beyond rounding. ``vocab_size``: the model's; with long chunks it cuts them further, so
    that few logits exist at a time. ``reset_every``: a model whose state grows forgets after so many tokens.
    """
    count, width = examples.tokens.shape
    right = np.zeros((count, width), dtype=np.bool_)
    loss = np.zeros(count, dtype=np.float64)
    asked = examples.labels != IGNORE
    for first in range(0, count, rows):
        part = slice(first, min(first + rows, count))
        lengths = examples.lengths[part]
        tokens, labels = (torch.from_numpy(a[part]).to(device) for a in (examples.tokens, examples.labels))
        state, at, end = None, 0, int(lengths.max(initial=0))
        step = max(1, min(chunk, _LOGITS // (len(tokens) * vocab_size)))
        while at < end:
            stop = min(at + step, end)
            if reset_every is not None:
                stop = min(stop, (at // reset_every + 1) * reset_every)
            starts = torch.zeros((len(tokens), stop - at), dtype=torch.bool, device=device)
            starts[:, 0] = at == 0 or (reset_every is not None and at % reset_every == 0)
            output = model(tokens[:, at:stop], state=state, reset=starts)
            state = output.state
            found, nats = _judge(output.logits, labels[:, at:stop])
            right[part, at:stop] = found.cpu().numpy()
            loss[part] += nats.cpu().numpy()
            at = stop
        if on_progress is not None:
            on_progress(part.stop, count)
    return Answers(asked, right, loss)


def _judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, time) bool: right; (rows,) float64: nats. Only positions with a label are looked at. Where a logit is not
    finite nothing is right: the likeliest of NaNs is id 0, which is the label as often as guessing is right."""
    row, time = torch.nonzero(labels != IGNORE, as_tuple=True)
    chosen, wanted = logits[row, time].double(), labels[row, time]
    right = torch.zeros_like(labels, dtype=torch.bool)
    right[row, time] = (chosen.argmax(dim=1) == wanted) & torch.isfinite(chosen).all(dim=1)
    nats = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    return right, nats.index_add_(0, row, F.cross_entropy(chosen, wanted, reduction="none"))


@dataclass(frozen=True)
class AnswerSums:
    """Sums over examples; those of several ranks add up to what one rank would find."""

    loss: float
    answers: int
    right: int
    examples: int
    whole: int


def validate_answers(
    model: nn.Module,
    task: Task,
    count: int,
    *,
    vocab_size: int,
    seed: int,
    rows: int,
    chunk: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    split: Split = "held_out",
) -> AnswerSums:
    """This rank's part of ``count`` examples of the held-out split, of sizes as they are trained on."""
    mine = np.arange(count * rank // world_size, count * (rank + 1) // world_size)
    examples = task.examples(seed, split, mine)
    found = answer(model, examples, vocab_size=vocab_size, rows=rows, chunk=chunk, device=device)
    return AnswerSums(
        float(found.loss.sum()), int(found.asked.sum()), int(found.right.sum()), len(mine), int(found.whole.sum())
    )
