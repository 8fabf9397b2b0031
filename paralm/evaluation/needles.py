"""Prompts of the passkey and needle tasks as token ids: which text hides what where, for one (length, depth).

A prompt is an instruction, a haystack of filler with the needle in it, and a question; it has exactly ``length`` tokens
up to the value to be answered. Of one length, the text before the first needle is the same for every sample and depth
up to there, so a model reads it once; everything from the needle on belongs to the sample.

The needle family is that of RULER (Hsieh et al. 2024, arXiv 2404.06654, appendix B): named values of seven digits in
repeated noise (single-1) or prose (single-2), UUID values in prose (single-3), three other needles beside the asked
one (multi-key), four needles that are all asked for (multi-query). The wording is our own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paralm_data import Tokenizer, TokenStore
from paralm_data.passkey import Filler, Ints, Phrasing, Stream, Values, Wording, ids_after, noise, phrasings

from paralm.errors import UserError

HAYSTACKS = ("noise", "prose", "needles")
NAMED = Phrasing(
    "Some records are hidden in the text below. Remember them: they are asked for at the end.\n",
    "Record: the number of the {name} is {value}.\n",
    "\nWhat is the number of the {name}? The number of the {name} is ",
)
_FIRST = (
    "amber", "brass", "calm", "dusty", "early", "faded", "golden", "hollow", "iron", "jade", "keen", "light", "marble",
    "narrow", "old", "pale", "quiet", "red", "silver", "tall", "upper", "velvet", "warm", "young",
)  # fmt: skip
_SECOND = (
    "anchor", "basket", "candle", "desk", "engine", "flute", "garden", "hammer", "island", "jacket", "kettle", "ladder",
    "mirror", "needle", "oven", "pencil", "quilt", "ribbon", "saddle", "table", "urn", "violin", "wagon", "yard",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is hidden in what. ``named``: values have names, by which they are asked for."""

    haystack: str = "noise"
    value: str = "digits"
    digits: int = 7
    named: bool = True
    distractors: int = 0  # needles that are not asked for
    queries: int = 1  # needles that are


TASKS: dict[str, Task] = {
    "passkey": Task(digits=5, named=False),
    "niah_noise": Task(),
    "niah_prose": Task("prose"),
    "niah_uuid": Task("prose", "uuid"),
    "niah_multikey": Task("prose", distractors=3),
    "niah_multiquery": Task("prose", queries=4),
}


class Names:
    """Names that all have ``n_tokens`` tokens: two words, or UUIDs (``kind``)."""

    def __init__(self, tokenizer: Tokenizer, kind: str) -> None:
        self._uuids = Values(tokenizer, "uuid") if kind == "uuid" else None
        by_length: dict[int, list[Ints]] = defaultdict(list)
        if self._uuids is None:
            for first, second in product(_FIRST, _SECOND):
                ids = ids_after(tokenizer, f"{first} {second}", "the ")
                by_length[len(ids)].append(ids)
            self._ids = np.array(max(by_length.values(), key=len))
        self.n_tokens = self._uuids.n_tokens if self._uuids is not None else self._ids.shape[1]

    def draw(self, stream: Stream, count: int, taken: Sequence[Ints] = ()) -> list[Ints]:
        """``count`` names, none twice and none that is ``taken``. UserError, one line, if there are not so many."""
        used, found = {name.tobytes() for name in taken}, list[Ints]()
        if self._uuids is None:
            free = len({ids.tobytes() for ids in self._ids} - used)
            if count > free:
                raise UserError(
                    f"queries: {count} names are wanted and {free} are left of {len(self._ids)}; "
                    "give fewer queries or distractors"
                )
        while len(found) < count:
            ids = self._uuids.draw(stream)[1] if self._uuids is not None else self._ids[stream.below(len(self._ids))]
            if ids.tobytes() not in used:
                used.add(ids.tobytes())
                found.append(ids)
        return found


@dataclass(frozen=True)
class _Piece:
    """Tokens from ``start`` on: of every sample (n, len), of all of them (len,), or of the filler from ``at``."""

    start: int
    stop: int
    ids: Ints | None = None
    at: int = 0


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one cell: ``samples`` contexts, each asked ``queries`` questions.

    A context has ``context`` tokens, a prompt ``length`` = context + question; the first ``prefix`` are the same for
    all samples. ``needles``: where each asked needle begins; ``distances``: tokens between its end and the question's
    begin. ``questions``: (queries, samples, tokens); ``answers``: (queries, samples, key tokens); ``keys``: their
    texts, [query][sample]. ``text``: names what the prefix is cut from, for whoever keeps its states.
    """

    length: int
    depth: float
    prefix: int
    needles: list[int]
    distances: list[int]
    questions: Ints
    answers: Ints
    keys: list[list[str]]
    text: str
    _pieces: list[_Piece]
    _filler: Filler

    @property
    def samples(self) -> int:
        return self.answers.shape[1]

    @property
    def queries(self) -> int:
        return self.answers.shape[0]

    @property
    def context(self) -> int:
        return self.length - self.questions.shape[2]

    def read(self, rows: slice, start: int, stop: int) -> Ints:
        """Tokens ``start`` … ``stop`` − 1 of the contexts of ``rows``, (rows, stop − start)."""
        out = np.empty((len(range(self.samples)[rows]), stop - start), np.int64)
        for piece in self._pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low >= high:
                continue
            inside = slice(low - piece.start, high - piece.start)
            if piece.ids is None:
                found = self._filler.tokens(piece.at + inside.start, piece.at + inside.stop)
            else:
                found = piece.ids[inside] if piece.ids.ndim == 1 else piece.ids[rows, inside]
            out[:, low - start : high - start] = found
        return out

    def prompt(self, sample: int, query: int = 0) -> Ints:
        """One whole prompt, (length,)."""
        context = self.read(slice(sample, sample + 1), 0, self.context)[0]
        return np.concatenate([context, self.questions[query, sample]])


class Builder:
    """Makes the prompts of a task with a tokenizer.

    ``prose``: a store whose documents, or a text whose tokens, are the filler of ``haystack: prose``. ``template``:
    which of evaluation's templates (``passkey`` only). ``reach``: the longest length that will be asked for.
    Raises UserError, one line, if something does not fit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        task: Task,
        *,
        name: str,
        reach: int,
        seed: int = 0,
        template: int = 0,
        prose: TokenStore | Path | None = None,
    ) -> None:
        self.tokenizer, self.task, self.name, self.seed = tokenizer, task, name, seed
        known = phrasings("evaluation")
        if not 0 <= template < len(known):
            raise UserError(f"template: {template} is none of 0 … {len(known) - 1}")
        self.wording = Wording(tokenizer, NAMED if task.named else known[template])
        self.values = Values(tokenizer, task.value, task.digits, "evaluation")
        self.names = Names(tokenizer, "uuid" if task.haystack == "needles" else "words") if task.named else None
        value = np.zeros((1, self.values.n_tokens), np.int64)
        name_ids = np.zeros((1, self.names.n_tokens), np.int64) if self.names is not None else None
        self.needle_tokens = self.wording.needle(value, name_ids).shape[1]
        self.question_tokens = self.wording.question(value, name_ids).shape[1]
        self.filler = self._fill(reach, prose)

    @property
    def shortest(self) -> int:
        """Tokens of a prompt without filler."""
        needles = self.task.queries + self.task.distractors
        return len(self.wording.instruction) + needles * self.needle_tokens + self.question_tokens

    def _fill(self, reach: int, prose: TokenStore | Path | None) -> Filler:
        if self.task.haystack == "noise":
            return noise(self.tokenizer)
        if self.task.haystack == "needles":
            return Filler.of([self._line("line", index)[0] for index in range(reach // self.needle_tokens + 1)])
        if prose is None:
            raise UserError(f"task '{self.name}' hides its needle in prose: name a set of the run, or a text file")
        ids = stored_text(prose, reach) if isinstance(prose, TokenStore) else file_text(self.tokenizer, prose, reach)
        if len(ids) == 0:
            raise UserError(f"{prose if isinstance(prose, Path) else prose.path}: has no text to hide a needle in")
        return Filler(ids, _line_ends(ids, self.tokenizer))

    def _line(self, *address: str | int) -> tuple[Ints, Ints | None]:
        """A needle that is the same for all samples, and its name."""
        stream = Stream("needle", self.name, self.seed, *address)
        names = self.names.draw(stream, 1) if self.names is not None else None
        value = self.values.draw(stream)[1]
        return self.wording.needle(value[None], np.stack(names) if names else None)[0], names[0] if names else None

    def prompts(self, length: int, depth: float, samples: int) -> Prompts:
        """The cell's prompts, a function of (seed, length, depth, sample) and the task.

        ``depth``: of the first needle, as a fraction of the filler, cut back to the end of a line; further needles are
        spread evenly between it and the end. Raises UserError, one line, if ``length`` is too short.
        """
        room = length - self.shortest
        if room < 0:
            raise UserError(
                f"lengths: {length} is too short: with this tokenizer task '{self.name}' needs {self.shortest} tokens"
            )
        task, place = self.task, lambda fraction: self.filler.line_end(round(fraction * room), room)
        others = [self._line("distractor", length, index) for index in range(task.distractors)]
        taken = [name for _, name in others if name is not None]
        asked = self._asked(length, depth, samples, taken)
        inserts = [(place((j + 0.5) / task.distractors), ids, -1) for j, (ids, _) in enumerate(others)]
        for query in range(task.queries):
            inserts.append((place(depth + (1 - depth) * query / task.queries), asked[0][query], query))
        inserts.sort(key=lambda insert: insert[0])
        pieces = [_Piece(0, len(self.wording.instruction), self.wording.instruction)]
        filled, needles = 0, [0] * task.queries
        for at, ids, query in inserts:
            pieces.append(_Piece(pieces[-1].stop, pieces[-1].stop + at - filled, None, filled))
            start, filled = pieces[-1].stop, at
            pieces.append(_Piece(start, start + self.needle_tokens, ids))
            if query >= 0:
                needles[query] = start
        pieces.append(_Piece(pieces[-1].stop, pieces[-1].stop + room - filled, None, filled))
        context = pieces[-1].stop
        return Prompts(
            length=length,
            depth=depth,
            prefix=min(needles),
            needles=needles,
            distances=[context - start - self.needle_tokens for start in needles],
            questions=asked[1],
            answers=asked[2],
            keys=asked[3],
            text=f"{self.name} {self.seed} {length if task.distractors else 'any'}",
            _pieces=[piece for piece in pieces if piece.stop > piece.start],
            _filler=self.filler,
        )

    def _asked(
        self, length: int, depth: float, samples: int, taken: Sequence[Ints]
    ) -> tuple[Ints, Ints, Ints, list[list[str]]]:
        """Needles, questions and answers, each (queries, samples, tokens), and the values' texts."""
        keys: list[list[str]] = [[] for _ in range(self.task.queries)]
        values: list[list[Ints]] = [[] for _ in range(self.task.queries)]
        names: list[list[Ints]] = [[] for _ in range(self.task.queries)]
        for sample in range(samples):
            stream = Stream("asked", self.name, self.seed, length, float(depth), sample)
            own = self.names.draw(stream, self.task.queries, taken) if self.names is not None else None
            for query in range(self.task.queries):
                text, ids = self.values.draw(stream)
                keys[query].append(text)
                values[query].append(ids)
                if own is not None:
                    names[query].append(own[query])
        answers = np.stack([np.stack(of) for of in values])
        named = [np.stack(of) if of else None for of in names]
        needles = np.stack([self.wording.needle(v, n) for v, n in zip(answers, named, strict=True)])
        questions = np.stack([self.wording.question(v, n) for v, n in zip(answers, named, strict=True)])
        return needles, questions, answers, keys


def stored_text(store: TokenStore, tokens: int) -> Ints:
    """At least ``tokens`` ids of a store's documents from its beginning (or all), without BOS and EOS."""
    found, total, document = [np.empty(0, np.int64)], 0, 0
    while total < tokens and document < store.n_documents:
        found.append(store.document(document)[1:-1].astype(np.int64))
        total += len(found[-1])
        document += 1
    return np.concatenate(found)


def file_text(tokenizer: Tokenizer, path: Path, tokens: int) -> Ints:
    """At least ``tokens`` ids of a text file from its beginning (or all)."""
    found, total = [np.empty(0, np.int64)], 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                found.append(ids_after(tokenizer, line))
                total += len(found[-1])
                if total >= tokens:
                    break
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return np.concatenate(found)


def _line_ends(ids: Ints, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Where a line of a text ends: after a token that has a line break in it, and at the end."""
    breaks = np.array([b"\n" in tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)])
    ends = np.flatnonzero(breaks[ids]) + 1
    return ends if len(ends) and ends[-1] == len(ids) else np.append(ends, len(ids))


def chosen(name: str, **changes: str | int | None) -> Task:
    """The task of that name, with what is given in place of its own. Raises UserError, one line."""
    changed: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    task = replace(TASKS[name], **changed)
    if not task.named and (task.distractors or task.queries > 1 or task.haystack == "needles"):
        raise UserError(f"task '{name}' has one nameless key: distractors, queries and needles need a task with names")
    return task
