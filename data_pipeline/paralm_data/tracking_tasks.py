"""Tasks of state tracking: parity, cycle navigation, modular arithmetic, and word problems of groups.

Parity, cycle navigation and both kinds of modular arithmetic are those of Delétang et al. 2022 (arXiv 2207.02098),
the word problems those of Merrill et al. 2024 (arXiv 2404.08819). Lengths are uniform in min_len … max_len; 3 to 40 in
training and 40 to 256 in testing are those of Beck et al. 2024 (arXiv 2405.04517). ``labels: last`` asks for the answer
at an example's last token only, as published; ``every`` asks for the running answer wherever there is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from paralm_data.errors import DataError
from paralm_data.groups import Group, get_group
from paralm_data.loader import IGNORE
from paralm_data.synthetic import KEY, Draws, Ints, Size, Task, Words, below, register_task

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
MAX_MODULUS = 1024


@dataclass(frozen=True)
class LengthSettings:
    """``min_len``, ``max_len``: tokens of an example that is trained on, both included. ``labels``: where an answer
    is due, at the last token or at every one that has an answer."""

    min_len: int = 3
    max_len: int = 40
    labels: Literal["last", "every"] = "last"

    def __post_init__(self) -> None:
        require(self.min_len >= 1, "min_len", self.min_len, "must be at least 1")
        require(self.max_len >= self.min_len, "max_len", self.max_len, f"must be at least min_len, {self.min_len}")
        require(self.labels in ("last", "every"), "labels", self.labels, "must be 'last' or 'every'")


def require(condition: bool, key: str, value: object, what: str) -> None:
    """DataError, one line, unless ``condition`` holds."""
    if not condition:
        raise DataError(f"{KEY}.{key}: {what}, got {value}")


class LengthTask(Task):
    """A task whose examples have a length and nothing else. ``odd``: lengths are odd (an even one is made smaller)."""

    odd: ClassVar[bool] = False
    settings: Any

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.max_len = self._possible(settings.max_len)

    def _possible(self, length: int) -> int:
        return length - 1 if self.odd and length % 2 == 0 else length

    def _between(self, low: int, high: int, words: Words) -> list[Size]:
        return [Size(max(1, self._possible(low + int(step)))) for step in below(words, high - low + 1)]

    def training_sizes(self, words: Words) -> list[Size]:
        return self._between(self.settings.min_len, self.settings.max_len, words)

    def sizes(self, text: str, words: Words) -> list[Size]:
        found = _RANGE.fullmatch(text)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= low <= high:
            raise DataError(f"size '{text}' of task '{self.name}': give a length such as 64, or a range such as 40-256")
        return self._between(low, high, words)

    def test_sizes(self) -> list[str]:
        longest = self.settings.max_len
        lengths = sorted({max(self.settings.min_len, longest // 2), longest, *(longest * k for k in (2, 3, 4, 8, 16))})
        return [*map(str, lengths[:-1]), f"{longest}-{round(6.4 * longest)}", str(lengths[-1])]

    def _asked(self, answers: Ints, sizes: Sequence[Size]) -> Ints:
        """The running answers (n, width) as labels: all of them, or each example's last."""
        if self.settings.labels == "every":
            return answers
        last = np.array([size.length for size in sizes], dtype=np.int64) - 1
        return np.where(np.arange(answers.shape[1]) == last[:, None], answers, IGNORE)


def _width(sizes: Sequence[Size]) -> int:
    return max(size.length for size in sizes)


@register_task
class Parity(LengthTask):
    """Bits; the answer is whether the number of ones so far is odd. Tokens: 0, 1, padding."""

    name = "parity"
    Settings = LengthSettings
    vocab_size, pad_id, classes = 3, 2, 2

    def fill(self, draw: Draws, sizes: Sequence[Size]) -> tuple[Ints, Ints]:
        bits = draw.below(2, _width(sizes))
        return bits, self._asked(np.bitwise_xor.accumulate(bits, axis=1), sizes)


@dataclass(frozen=True)
class ModulusSettings(LengthSettings):
    """``modulus``: how many numbers there are."""

    modulus: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(2 <= self.modulus <= MAX_MODULUS, "modulus", self.modulus, f"must be 2 to {MAX_MODULUS}")


@register_task
class CycleNavigation(LengthTask):
    """Steps on a circle of ``modulus`` places, from place 0; the answer is the place.

    Tokens: places 0 … modulus − 1 (answers only), then back, stay, forth, padding.
    """

    name = "cycle_navigation"
    Settings = ModulusSettings

    def __init__(self, settings: ModulusSettings) -> None:
        super().__init__(settings)
        self.classes = settings.modulus
        self.pad_id = settings.modulus + 3
        self.vocab_size = self.pad_id + 1

    def fill(self, draw: Draws, sizes: Sequence[Size]) -> tuple[Ints, Ints]:
        steps = draw.below(3, _width(sizes))
        places = np.cumsum(steps - 1, axis=1) % self.classes
        return steps + self.classes, self._asked(places, sizes)


@dataclass(frozen=True)
class ArithmeticSettings(ModulusSettings):
    """``brackets``: nested expressions in brackets, or one flat expression. ``operators``: of + - *."""

    brackets: bool = False
    operators: str = "+-*"

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = not self.operators or set(self.operators) - set("+-*") or len(set(self.operators)) < len(self.operators)
        require(not wrong, "operators", f"'{self.operators}'", "must be one or more of + - *, each once")
        nested = self.brackets and self.labels == "every"
        require(not nested, "labels", "'every'", "a nested expression has one answer, so it must be 'last'")


@register_task
class ModularArithmetic(LengthTask):
    """An expression in numbers 0 … modulus − 1; the answer is its value modulo ``modulus``.

    Without brackets: numbers and operators take turns, * binds closer than + and −, lengths are odd; with ``labels:
    every`` each number is asked for the value of the expression up to it. With brackets the grammar of the released
    code: an expression of length 1 is ``d``, of 2 ``-d``, of 3 ``(d)``, of 4 ``(-d)``; a longer one is ``(A o B)`` with
    A's length uniform in 1 … length − 4 and B's what is left. Operators are uniform. (The released code leaves * out
    with brackets unless asked; the paper's example has it, so it is in unless ``operators: +-``.)

    Tokens: the numbers, then + - * ( ) and padding.
    """

    name = "modular_arithmetic"
    Settings = ArithmeticSettings

    def __init__(self, settings: ArithmeticSettings) -> None:
        self.odd = not settings.brackets  # type: ignore[misc]
        super().__init__(settings)
        self.classes = settings.modulus
        self.plus, self.minus, self.times = (settings.modulus + i for i in range(3))
        self.opening, self.closing, self.pad_id = (settings.modulus + i for i in (3, 4, 5))
        self.vocab_size = self.pad_id + 1
        names = {"+": self.plus, "-": self.minus, "*": self.times}
        self._operators = np.array([names[o] for o in settings.operators], dtype=np.int64)

    def fill(self, draw: Draws, sizes: Sequence[Size]) -> tuple[Ints, Ints]:
        if self.settings.brackets:
            return self._nested(draw, sizes)
        width = _width(sizes)
        numbers = draw.below(self.classes, width)
        operators = self._operators[draw.below(len(self._operators), width)]
        tokens = np.where(np.arange(width) % 2 == 0, numbers, operators)
        return tokens, self._asked(self._flat_values(tokens), sizes)

    def _flat_values(self, tokens: Ints) -> Ints:
        """(n, width): at each number the value up to it, IGNORE at operators."""
        values = np.full_like(tokens, IGNORE)
        total = np.zeros(len(tokens), dtype=np.int64)  # of the terms that are over
        term = tokens[:, 0].copy()  # the one that * may go on
        values[:, 0] = term
        for at in range(2, tokens.shape[1], 2):
            operator, number = tokens[:, at - 1], tokens[:, at]
            goes_on = operator == self.times
            total = np.where(goes_on, total, total + term) % self.classes
            signed = np.where(operator == self.minus, -number, number)
            term = np.where(goes_on, term * number, signed) % self.classes
            values[:, at] = (total + term) % self.classes
        return values

    def _nested(self, draw: Draws, sizes: Sequence[Size]) -> tuple[Ints, Ints]:
        """All expressions at once: from the outside in to make them, from the inside out to value them.

        A part of an expression is known by its first token's place, which no other part begins at; so that place's
        random words are its own, and its value is kept there.
        """
        lengths = np.array([size.length for size in sizes], dtype=np.int64)
        width = int(lengths.max())
        number, operator = draw.below(self.classes, width), draw.below(len(self._operators), width)
        split = draw.words(width)
        tokens = np.full((len(lengths), width), self.pad_id, dtype=np.int64)
        value = np.zeros((len(lengths), width), dtype=np.int64)
        row, start, length = np.arange(len(lengths)), np.zeros_like(lengths), lengths
        levels = []
        while len(row):
            self._leaves(tokens, value, number, row, start, length)
            inner = length > 4
            row, start, length = row[inner], start[inner], length[inner]
            left = 1 + below(split[row, start], length - 4)
            middle = start + 1 + left
            chosen = self._operators[operator[row, start]]
            tokens[row, start], tokens[row, start + length - 1] = self.opening, self.closing
            tokens[row, middle] = chosen
            levels.append((row, start, middle, chosen))
            row, start, length = (
                np.concatenate(pair) for pair in ((row, row), (start + 1, middle + 1), (left, length - left - 3))
            )
        for row, start, middle, chosen in reversed(levels):
            a, b = value[row, start + 1], value[row, middle + 1]
            result = np.where(chosen == self.times, a * b, np.where(chosen == self.minus, a - b, a + b))
            value[row, start] = result % self.classes
        return tokens, self._asked(np.repeat(value[:, :1], width, axis=1), sizes)

    def _leaves(self, tokens: Ints, value: Ints, number: Ints, row: Ints, start: Ints, length: Ints) -> None:
        """Write the parts of 1 to 4 tokens, ``d -d (d) (-d)``, and their values."""
        for size, before in ((1, ()), (2, (self.minus,)), (3, (self.opening,)), (4, (self.opening, self.minus))):
            rows, starts = row[length == size], start[length == size]
            digit = number[rows, starts]
            for offset, token in enumerate(before):
                tokens[rows, starts + offset] = token
            tokens[rows, starts + len(before)] = digit
            if self.opening in before:
                tokens[rows, starts + size - 1] = self.closing
            value[rows, starts] = (-digit if self.minus in before else digit) % self.classes


@dataclass(frozen=True)
class WordSettings(LengthSettings):
    """``group``: S3, S4, A5 or S5. The running product is asked for at every step, as published."""

    labels: Literal["last", "every"] = "every"
    group: str = "S3"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            get_group(self.group)
        except DataError as error:
            raise DataError(f"{KEY}.group: {error}") from None


@register_task
class GroupWords(LengthTask):
    """Elements of a group; the answer is their product so far, first to last. Tokens: the elements, padding."""

    name = "words"
    Settings = WordSettings

    def __init__(self, settings: WordSettings) -> None:
        super().__init__(settings)
        self.group: Group = get_group(settings.group)
        self.classes = self.pad_id = self.group.order
        self.vocab_size = self.group.order + 1

    def fill(self, draw: Draws, sizes: Sequence[Size]) -> tuple[Ints, Ints]:
        word = draw.below(self.group.order, _width(sizes))
        return word, self._asked(self.group.running_product(word), sizes)
