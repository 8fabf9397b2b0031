"""Passkey retrieval as a task to train on (``data.synthetic: {task: passkey}``); see :mod:`paralm_data.passkey`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from paralm_data.errors import DataError
from paralm_data.loader import IGNORE
from paralm_data.passkey import TrainingSamples, is_evaluation_length, texts
from paralm_data.synthetic import KEY, Draws, Ints, Size, Task, Words, register_task
from paralm_data.tokenizer import Tokenizer
from paralm_data.tokenizer_training import train_model

_TEXTS = 400  # that the tokenizer is trained on: many more than there are words in them


@lru_cache(maxsize=4)
def _tokenizer(vocab_size: int) -> Tokenizer:
    proto = train_model(list(texts(0, _TEXTS)), vocab_size, "bpe")
    return Tokenizer(proto, f"the passkey task's tokenizer of {vocab_size}")


@dataclass(frozen=True)
class PasskeySettings:
    """``max_length``, ``min_length``: tokens of a prompt, up to the key; the minimum's default is the shortest that
    every template fits. ``digits``: of a key. ``loss``: ``answer``, ``key`` or ``all``. ``vocab_size``: of the task's
    own tokenizer, which splits digits."""

    max_length: int = 250
    min_length: int | None = None
    digits: int = 5
    loss: str = "key"
    vocab_size: int = 512


@register_task
class PasskeyTask(Task):
    """A key is stated in a filler and asked for at its end. A size is a document's: prompt, key and EOS."""

    name: ClassVar[str] = "passkey"
    Settings: ClassVar[type[PasskeySettings]] = PasskeySettings
    settings: PasskeySettings

    def __init__(self, settings: PasskeySettings) -> None:
        super().__init__(settings)
        try:
            self.tokenizer = _tokenizer(settings.vocab_size)
        except DataError:
            raise DataError(
                f"{KEY}.vocab_size: the task's texts have no tokenizer of {settings.vocab_size}; give 262 to 1363"
            ) from None
        try:
            self.samples = TrainingSamples(
                self.tokenizer, settings.max_length, settings.min_length, settings.digits, settings.loss
            )
        except DataError as error:
            raise DataError(f"data.synthetic: {error}") from None
        self.vocab_size, self.pad_id = self.tokenizer.vocab_size, self.tokenizer.eos_id
        self.classes = 10
        self.max_len = settings.max_length + self.samples.end

    @property
    def fingerprint(self) -> str:
        """Of the settings and of the tokenizer's bytes, which another release of sentencepiece may make otherwise."""
        assert self.tokenizer is not None
        return hashlib.sha256(f"{super().fingerprint} {self.tokenizer.sha256}".encode()).hexdigest()

    def training_sizes(self, words: Words) -> list[Size]:
        """Prompts of each of the split's lengths alike."""
        return [Size(self.samples.length(int(word)) + self.samples.end) for word in words]

    def fill(self, draw: Draws, sizes: Sequence[Size]) -> tuple[Ints, Ints]:
        """One document a row."""
        width = max(size.length for size in sizes)
        tokens = np.full((len(sizes), width), self.pad_id, np.int64)
        labels = np.full((len(sizes), width), IGNORE, np.int64)
        for row, (word, size) in enumerate(zip(draw.words(1)[:, 0].tolist(), sizes, strict=True)):
            found = self.samples.sample(word, size.length - self.samples.end)
            tokens[row, : size.length], labels[row, : size.length] = found.tokens, found.labels
        return tokens, labels

    def sizes(self, text: str, words: Words) -> list[Size]:
        """Documents of ``text`` tokens, or of a range ``FIRST-LAST``; the prompts are the training split's."""
        first, dash, last = text.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise DataError(f"size '{text}': give a number of tokens, or a range FIRST-LAST")
        low, high = int(first), int(last or first)
        fitting = [
            n
            for n in range(max(low, self.samples.min_length + self.samples.end), high + 1)
            if not is_evaluation_length(n - self.samples.end)
        ]
        if not fitting:
            raise DataError(
                f"size '{text}': no document of the training split has so many tokens: at least "
                f"{self.samples.min_length + self.samples.end}, and a prompt that is no multiple of 8"
            )
        return [Size(fitting[int(word) % len(fitting)]) for word in words]

    def test_sizes(self) -> list[str]:
        """Inside the trained lengths, and twice and four times as long; `paralm eval passkey` has the whole grid."""
        least, most = self.samples.min_length + self.samples.end, self.max_len
        return [f"{least}-{most}", f"{most + 1}-{2 * most}", f"{2 * most + 1}-{4 * most}"]
