"""Passkey retrieval: a key is stated in a long filler, and asked for at the end.

    BOS instruction  filler …  needle (states the key twice)  … filler  question → key

Prompts are built from token ids: every piece of text is tokenized once, and a prompt has exactly as many tokens as
asked for, up to the first token of the key. This module has the wording, the keys and the training split; what it
offers needs a tokenizer and numbers only, and is a function of its arguments alone, the same on every machine.

Training never sees what evaluation asks. The two splits are disjoint in

* keys: by BLAKE2b of the key's text, a quarter of all keys is evaluation's;
* templates: no sentence that states or asks for a key in one split stands in the other (their words do), nor an
  instruction;
* lengths: evaluation's prompts have a multiple of 8 tokens, training's never.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from paralm_data.errors import DataError
from paralm_data.loader import IGNORE
from paralm_data.tokenizer import Tokenizer

Ints = NDArray[np.int64]
Split = Literal["train", "evaluation"]
LOSSES = ("answer", "key", "all")
LENGTH_STEP = 8
EVALUATION_KEYS = 0.25
VALUE = "value"

NOUNS = ("pass key", "door code", "vault number", "gate key", "secret code", "locker number", "radio code", "safe key")
STATEMENTS = (
    "The {noun} is {value}. Remember it: {value} is the {noun}.\n",
    "Note that {value} is the {noun}; again, the {noun} is {value}.\n",
    "Here is the {noun}: {value}. Remember that the {noun} is {value}.\n",
    "You will need {value} as the {noun}. Note it: the {noun} is {value}.\n",
)
QUESTIONS = (
    "\nWhat is the {noun}? The {noun} is ",
    "\nWhich number is the {noun}? It is ",
    "\nName the {noun}. Answer: it is ",
    "\nNow answer: what is the {noun}? Answer: ",
)
INSTRUCTIONS = (
    "A fact is hidden in the text below. Find it and remember it: it is asked for at the end.\n",
    "In the text below a fact is hidden. Remember it, since the end asks for it.\n",
    "Read the text below to its end and find the hidden fact that is asked for there.\n",
    "The text below hides a fact. Find it: at the end it is asked for.\n",
)
NOISE = (
    "The river runs slowly past the old mill.\n",
    "A cold wind moves over the hills.\n",
    "Birds rest on the wall of the garden.\n",
    "The road goes on to the north.\n",
    "Some stones lie under the bridge.\n",
    "In the evening the light grows soft.\n",
    "Leaves fall on the water and drift away.\n",
    "The door of the barn stands open.\n",
    "Far away a bell rings in the fog.\n",
    "The trees along the road are tall.\n",
    "Rain falls on the roof of the mill.\n",
    "Clouds move past and there they go.\n",
)


def is_evaluation_key(key: str) -> bool:
    """Whether a key belongs to evaluation, by its text alone."""
    return hashlib.blake2b(key.encode("utf-8"), digest_size=8, person=b"passkey").digest()[0] < 256 * EVALUATION_KEYS


def is_evaluation_length(length: int) -> bool:
    """Whether prompts of so many tokens belong to evaluation."""
    return length % LENGTH_STEP == 0


class Stream:
    """Random numbers that are a function of an address, such as ("passkey", seed, length, sample)."""

    def __init__(self, *address: int | float | str) -> None:
        self._address = "\0".join(map(str, address)).encode("utf-8")
        self._block = 0
        self._words: list[int] = []

    def word(self) -> int:
        """64 random bits."""
        if not self._words:
            digest = hashlib.blake2b(self._address, salt=self._block.to_bytes(16, "little")).digest()
            self._words = np.frombuffer(digest, "<u8").tolist()
            self._block += 1
        return self._words.pop()

    def below(self, count: int) -> int:
        """Uniform in 0 … count − 1, to within count/2⁶⁴."""
        return self.word() % count


def ids_after(tokenizer: Tokenizer, text: str, before: str = "\n") -> Ints:
    """Ids of ``text`` as it stands after ``before``: without what some tokenizers put in front of every text."""
    whole, start = tokenizer.encode(before + text), tokenizer.encode(before)
    return np.array(whole[len(start) :] if whole[: len(start)] == start else tokenizer.encode(text), np.int64)


class Values:
    """Keys or other secrets that all have ``n_tokens`` tokens.

    ``kind``: ``digits`` (``digits`` decimal digits, leading zeros too) or ``uuid`` (version 4). Where the tokenizer
    splits digits a key of k digits has k tokens. Elsewhere values differ in length: the most frequent one is taken,
    and values of another are not drawn. ``chance``: that a uniform guess over all values of that form (and length) is
    right; a guesser knows nothing of the splits. Raises DataError, one line, where no value has a length of its own.
    """

    def __init__(self, tokenizer: Tokenizer, kind: str = "digits", digits: int = 5, split: Split | None = None) -> None:
        if kind not in ("digits", "uuid"):
            raise DataError(f"values of kind '{kind}'; it must be 'digits' or 'uuid'")
        if kind == "digits" and not 1 <= digits <= 18:
            raise DataError(f"digits is {digits}; it must be 1 to 18")
        self.kind, self.digits, self.split, self._tokenizer = kind, digits, split, tokenizer
        self._digit_ids = self._split_digits() if kind == "digits" else None
        accepted = 1.0
        if self._digit_ids is not None:
            self.n_tokens = digits
        else:
            probes = Counter(len(self._ids(self._text(Stream("probe", kind, i)))) for i in range(512))
            self.n_tokens, most = max(probes.items(), key=lambda item: (item[1], -item[0]))
            accepted = most / 512
        if self.n_tokens == 0:
            raise DataError(f"{tokenizer.name}: encodes keys to nothing, so there is nothing to ask for")
        self.chance = 1 / (accepted * (10.0**digits if kind == "digits" else 2.0**122))
        self.one_token_a_digit = self._digit_ids is not None

    def draw(self, stream: Stream) -> tuple[str, Ints]:
        """A value of the split, and its ids (n_tokens,)."""
        for _ in range(100_000):
            text = self._text(stream)
            if self.split is not None and is_evaluation_key(text) != (self.split == "evaluation"):
                continue
            ids = self._ids(text)
            if len(ids) == self.n_tokens:
                return text, ids
        raise DataError(
            f"{self._tokenizer.name}: no {self.kind} value of {self.n_tokens} tokens belongs to the "
            f"{self.split} split; ask for more digits"
        )

    def _text(self, stream: Stream) -> str:
        if self.kind == "digits":
            return f"{stream.below(10**self.digits):0{self.digits}d}"
        text = f"{stream.word():016x}{stream.word():016x}"
        variant = "89ab"[int(text[16], 16) % 4]
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"

    def _ids(self, text: str) -> Ints:
        if self._digit_ids is not None:
            return self._digit_ids[[int(digit) for digit in text]]
        return ids_after(self._tokenizer, text, "is ")

    def _split_digits(self) -> Ints | None:
        """The id of each digit, if every number is spelled with those."""
        each = [ids_after(self._tokenizer, str(digit), "is ") for digit in range(10)]
        if any(len(ids) != 1 for ids in each):
            return None
        ids = np.concatenate(each)
        probes = [self._text(Stream("probe", "digits", i)) for i in range(64)]
        whole = [ids_after(self._tokenizer, text, "is ").tolist() for text in probes]
        same = all(found == ids[[int(d) for d in text]].tolist() for text, found in zip(probes, whole, strict=True))
        return ids if same else None


@dataclass(frozen=True)
class Phrasing:
    """The three texts of a task; ``{value}`` (and ``{name}``, if values have names) stand where those go."""

    instruction: str
    needle: str
    question: str


def phrasings(split: Split) -> list[Phrasing]:
    """The templates of a split, in a fixed order; evaluation's first one is the usual one."""
    found = []
    for noun, statement, question in product(range(len(NOUNS)), range(len(STATEMENTS)), range(len(QUESTIONS))):
        # A noun meets a quarter of the statements, and of the questions, in evaluation only.
        kept = {(noun + statement) % 4 == 0, (noun + question) % 4 == 0}
        if kept != {split == "evaluation"}:
            continue
        for number, instruction in enumerate(INSTRUCTIONS):
            if (number == 0) == (split == "evaluation"):
                found.append(
                    Phrasing(
                        instruction,
                        STATEMENTS[statement].replace("{noun}", NOUNS[noun]),
                        QUESTIONS[question].replace("{noun}", NOUNS[noun]),
                    )
                )
    return found


class Wording:
    """A phrasing in tokens. ``instruction``: BOS first, (n,)."""

    def __init__(self, tokenizer: Tokenizer, phrasing: Phrasing) -> None:
        self.phrasing = phrasing
        self.instruction = np.concatenate([[tokenizer.bos_id], ids_after(tokenizer, phrasing.instruction)])
        self._needle = _slots(tokenizer, phrasing.needle)
        self._question = _slots(tokenizer, phrasing.question)

    def needle(self, values: Ints, names: Ints | None = None) -> Ints:
        """``values``: (n, k), ``names``: (n, m) → (n, tokens of the needle)."""
        return _filled(self._needle, values, names)

    def question(self, values: Ints, names: Ints | None = None) -> Ints:
        """As :meth:`needle`; what follows it is the value, which is not in it."""
        return _filled(self._question, values, names)

    def stated(self, n_value: int, n_name: int = 0) -> list[int]:
        """Where in a needle each statement of the value begins, for values and names of so many tokens."""
        sizes, places, at = {"value": n_value, "name": n_name}, [], 0
        for part in self._needle:
            if part is VALUE:
                places.append(at)
            at += sizes[part] if isinstance(part, str) else len(part)
        return places


def _slots(tokenizer: Tokenizer, text: str) -> list[Ints | str]:
    """The text's pieces in tokens, with the names of slots between them."""
    parts = re.split(r"\{(value|name)\}", text)
    found: list[Ints | str] = []
    for index, part in enumerate(parts):
        if index % 2:
            found.append(VALUE if part == VALUE else part)
        elif part:
            found.append(ids_after(tokenizer, part))
    return found


def _filled(parts: Sequence[Ints | str], values: Ints, names: Ints | None) -> Ints:
    slots = {"value": values, "name": names}
    columns = []
    for part in parts:
        ids = slots[part] if isinstance(part, str) else part
        if ids is None:
            raise ValueError("the phrasing has names, and none were given")
        columns.append(np.broadcast_to(ids, (len(values), ids.shape[-1])))
    return np.concatenate(columns, axis=1)


class Filler:
    """An endless text of ids: ``ids`` (n,) again and again, with the places where a line ends, ``ends`` (ascending, the
    last one n)."""

    def __init__(self, ids: Ints, ends: Ints) -> None:
        if len(ids) == 0:
            raise DataError("the filler has no tokens")
        self.ids, self.ends = ids, ends

    @classmethod
    def of(cls, pieces: Sequence[Ints]) -> Filler:
        """Lines, one after another."""
        return cls(np.concatenate([*pieces, np.empty(0, np.int64)]), np.cumsum([len(piece) for piece in pieces]))

    def tokens(self, start: int, stop: int) -> Ints:
        """Tokens ``start`` … ``stop`` − 1."""
        return self.ids[np.arange(start, stop) % len(self.ids)].astype(np.int64)

    def line_end(self, position: int, limit: int) -> int:
        """Where a needle that should begin at ``position`` of a filler of ``limit`` tokens begins: at the last end of
        a line before it, or at either end of the filler."""
        if position in (0, limit):
            return position
        period = len(self.ids)
        rounds, inside = divmod(position, period)
        index = int(np.searchsorted(self.ends, inside, side="right"))
        return rounds * period + (int(self.ends[index - 1]) if index else 0)


def noise(tokenizer: Tokenizer) -> Filler:
    """The noise sentences in their order."""
    return Filler.of([ids_after(tokenizer, line) for line in NOISE])


@dataclass(frozen=True)
class Sample:
    """One training document, BOS … key EOS; ``labels``: the next token, IGNORE where it does not count.

    ``length``: tokens of the prompt, up to the key. ``needle``: where the needle begins.
    """

    tokens: Ints
    labels: Ints
    key: str
    length: int
    needle: int


class TrainingSamples:
    """The training split: a document is a function of a random word and the length of its prompt.

    ``min_length``, ``max_length``: tokens of a prompt; the default minimum is the shortest that every template fits.
    ``loss``: which tokens are learned: ``answer`` (the key after the question), ``key`` (also the key where the needle
    repeats it) or ``all``. Raises DataError, one line, for sizes that do not fit.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, min_length: int | None = None, digits: int = 5, loss: str = "key"
    ) -> None:
        if loss not in LOSSES:
            raise DataError(f"loss is '{loss}'; it must be one of: {', '.join(LOSSES)}")
        self.tokenizer, self.loss = tokenizer, loss
        self.values = Values(tokenizer, "digits", digits, "train")
        self._wordings = [Wording(tokenizer, phrasing) for phrasing in phrasings("train")]
        self._noise = [ids_after(tokenizer, line) for line in NOISE]
        value = np.zeros((1, self.values.n_tokens), np.int64)
        least = max(len(w.instruction) + w.needle(value).shape[1] + w.question(value).shape[1] for w in self._wordings)
        self.min_length, self.max_length = least if min_length is None else min_length, max_length
        if self.min_length < least:
            raise DataError(f"min_length is {min_length}; a prompt without filler has up to {least} tokens")
        self.lengths = [n for n in range(self.min_length, max_length + 1) if not is_evaluation_length(n)]
        if not self.lengths:
            raise DataError(
                f"max_length is {max_length}; a prompt has at least {self.min_length} tokens, and no multiple of "
                f"{LENGTH_STEP}, which are evaluation's"
            )

    @property
    def end(self) -> int:
        """Tokens of a document beyond its prompt: the key and EOS."""
        return self.values.n_tokens + 1

    def length(self, word: int) -> int:
        """The length that a random word chooses, uniformly among the split's."""
        return self.lengths[word % len(self.lengths)]

    def sample(self, word: int, length: int) -> Sample:
        """The document of a random word whose prompt has ``length`` tokens: template, key, filler and depth."""
        stream = Stream("passkey-train", word)
        wording = self._wordings[stream.below(len(self._wordings))]
        key, value = self.values.draw(stream)
        needle, question = wording.needle(value[None])[0], wording.question(value[None])[0]
        room = length - len(wording.instruction) - len(needle) - len(question)
        lines = [self._noise[stream.below(len(self._noise))]]
        drawn = len(lines[0])
        while drawn < room:
            lines.append(self._noise[stream.below(len(self._noise))])
            drawn += len(lines[-1])
        filler = Filler.of(lines)
        before = filler.line_end(stream.below(room + 1), room)
        hay, start = filler.tokens(0, room), len(wording.instruction) + before
        tokens = np.concatenate(
            [wording.instruction, hay[:before], needle, hay[before:], question, value, [self.tokenizer.eos_id]]
        )
        learned = np.full(len(tokens), self.loss == "all")
        learned[length : length + len(value)] = True
        if self.loss == "key":
            second = start + wording.stated(len(value))[-1]
            learned[second : second + len(value)] = True
        labels = np.full(len(tokens), IGNORE, np.int64)
        labels[:-1] = np.where(learned[1:], tokens[1:], IGNORE)
        return Sample(tokens, labels, key, length, start)


def texts(seed: int, count: int) -> Iterator[str]:
    """Texts with the training split's words, templates and digits, to train a tokenizer on."""
    known = phrasings("train")
    for index in range(count):
        stream = Stream("passkey-text", seed, index)
        phrasing = known[stream.below(len(known))]
        key = f"{stream.below(10**9):09d}"
        lines = [NOISE[stream.below(len(NOISE))] for _ in range(4 + stream.below(12))]
        needle = phrasing.needle.replace("{value}", key)
        lines.insert(stream.below(len(lines) + 1), needle)
        yield phrasing.instruction + "".join(lines) + phrasing.question + key + "\n"
