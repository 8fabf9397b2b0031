"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): which value came with this key?

    k₁ v₁ k₂ v₂ … k_P v_P | · · k₂ · · · k₁ · …          labels: at each key behind the bar its value, else nothing

Keys are different ids of 1 … vocab/2 − 1, values different ids of vocab/2 … vocab − 1. Behind the pairs each key comes
once more, on one of the (length − 2P)/2 even places; a place i (from 0) is chosen with a weight of (i + 1)^(a − 1),
without replacement, so with a = 0.01 most questions come soon. The places in between hold random ids.

Training mixes sizes, all equally often: training on the long ones alone fails (arXiv 2312.04927).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from paralm_data.errors import DataError
from paralm_data.loader import IGNORE
from paralm_data.synthetic import Draws, Ints, Size, Task, Words, below, register_task
from paralm_data.tracking_tasks import require

MIXTURE = ("64:4", "128:8", "256:16", "256:32", "256:64")
TESTED = (*MIXTURE, "512:64", "512:128", "1024:128", "1024:256")


@dataclass(frozen=True)
class MQARSettings:
    """``vocab``: how many ids. ``mixture``: what is trained on, LENGTH:PAIRS each. ``power``: a in the module's text.
    ``filler``: random ids between the questions, or id 0."""

    vocab: int = 8192
    mixture: list[str] = field(default_factory=lambda: list(MIXTURE))
    power: float = 0.01
    filler: bool = True

    def __post_init__(self) -> None:
        require(8 <= self.vocab <= 2**20, "vocab", self.vocab, f"must be 8 to {2**20}")
        require(len(self.mixture) > 0, "mixture", "[]", "must have a size such as '64:4'")
        require(self.power > 0, "power", self.power, "must be above 0")
        for text in self.mixture:
            parse_size(text, self.vocab, "data.synthetic.mixture")


def parse_size(text: str, vocab: int, where: str) -> Size:
    """``LENGTH:PAIRS``; DataError, one line, where it is none or does not fit."""
    length, colon, pairs = str(text).partition(":")
    if not colon or not length.isdigit() or not pairs.isdigit():
        raise DataError(f"{where}: '{text}' is no size; give LENGTH:PAIRS, such as '256:16'")
    size = Size(int(length), int(pairs))
    if size.items < 1 or size.length % 2 or 4 * size.items > size.length:
        raise DataError(f"{where}: '{text}': the length must be even and at least four times the pairs, of which 1")
    if size.items >= vocab // 2:
        raise DataError(f"{where}: '{text}': a vocabulary of {vocab} has {vocab // 2 - 1} keys; raise vocab")
    return size


@register_task
class MQAR(Task):
    """Pairs of keys and values, then keys alone; the answer at each of these is its value. Id 0 is padding."""

    name = "mqar"
    Settings = MQARSettings
    pad_id = 0
    settings: MQARSettings

    def __init__(self, settings: MQARSettings) -> None:
        super().__init__(settings)
        self.vocab_size = settings.vocab
        self.classes = settings.vocab - settings.vocab // 2
        self._mixture = [parse_size(text, settings.vocab, "data.synthetic.mixture") for text in settings.mixture]
        self.max_len = max(size.length for size in self._mixture)

    def training_sizes(self, words: Words) -> list[Size]:
        return [self._mixture[i] for i in below(words, len(self._mixture))]

    def sizes(self, text: str, words: Words) -> list[Size]:
        return [parse_size(text, self.settings.vocab, f"size of task '{self.name}'")] * len(words)

    def test_sizes(self) -> list[str]:
        known = [t for t in TESTED if int(t.split(":")[1]) < self.settings.vocab // 2]
        found = {*self.settings.mixture, *known}
        return sorted(found, key=lambda text: tuple(map(int, text.split(":"))))

    def fill(self, draw: Draws, sizes: Sequence[Size]) -> tuple[Ints, Ints]:
        settings, half = self.settings, self.settings.vocab // 2
        count, width, most = len(sizes), max(s.length for s in sizes), max(s.items for s in sizes)
        keys = 1 + draw.some(half - 1, most)
        values = half + draw.some(settings.vocab - half, most)
        # The largest of log(u)/w: a weighted choice without replacement (Efraimidis and Spirakis 2006).
        luck = np.log(draw.uniform(width // 2))
        tokens = draw.below(settings.vocab, width) if settings.filler else np.zeros((count, width), np.int64)
        labels = np.full((count, width), IGNORE, dtype=np.int64)
        for size in sorted(set(sizes), key=lambda s: (s.length, s.items)):
            rows = np.array([i for i, s in enumerate(sizes) if s == size])
            pairs, places = size.items, (size.length - 2 * size.items) // 2
            tokens[rows, 0 : 2 * pairs : 2] = keys[rows, :pairs]
            tokens[rows, 1 : 2 * pairs : 2] = values[rows, :pairs]
            weights = np.arange(1, places + 1) ** (settings.power - 1.0)
            chosen = np.argsort(-luck[rows, :places] / weights, axis=1, kind="stable")[:, :pairs]
            at = 2 * pairs + 2 * chosen
            tokens[rows[:, None], at] = keys[rows, :pairs]
            labels[rows[:, None], at] = values[rows, :pairs]
        return tokens, labels
