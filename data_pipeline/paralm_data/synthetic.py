"""Synthetic tasks: examples that are computed, not read, each a pure function of (task, seed, split, index).

A task is a class with settings (a dataclass) and one method that turns random words into tokens and labels for many
examples at once. Example i of a split has a random stream of its own: the counter-based generator Philox (Salmon et
al. 2011) with a key made of (task, seed, split) and i in its counter. So any example can be made by anyone at any
time, and the splits are different streams. They are not disjoint sets: there are only 8 bit strings of length 3.

A row of a batch is one example, padded at its end. Labels stand where the answer is due (not shifted): the label of
position t is what the model must say having read tokens 0 … t, and IGNORE wherever nothing is asked.

>>> task = make_task({"task": "parity", "max_len": 40})
>>> batch = SyntheticLoader(task, seq_len=40, global_batch_size=64, seed=0).batch(7)
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from paralm_data.errors import DataError
from paralm_data.loader import IGNORE, Batch, StepLoader
from paralm_data.tokenizer import Tokenizer

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Split = Literal["train", "held_out", "test"]
KEY = "data.synthetic"  # where a task stands in a configuration, for messages
_BUILT_IN = ("paralm_data.tracking_tasks", "paralm_data.mqar", "paralm_data.passkey_task")
_FORMAT = 1  # raise when a task's examples change: runs made before must not go on with others


@dataclass(frozen=True)
class Size:
    """How large an example is: ``length`` in tokens; ``items`` where a task counts something else too (pairs)."""

    length: int
    items: int = 0

    def __str__(self) -> str:
        return f"{self.length}:{self.items}" if self.items else str(self.length)


@dataclass(frozen=True, eq=False)
class Examples:
    """``tokens``, ``labels``: int64 (n, width), padded behind each example's end; ``lengths``: int64 (n,)."""

    tokens: Ints
    labels: Ints
    lengths: Ints


class Task(ABC):
    """A family of examples. ``settings`` is an instance of the class's ``Settings``, whose checks raise DataError.

    A task with text states its ``tokenizer`` (made by the task itself, always the same one); the others are ids only.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Any]]
    vocab_size: int
    pad_id: int
    classes: int  # how many answers are possible at a labelled position; guessing is right once in as many times
    max_len: int  # tokens of the longest example that is trained on
    tokenizer: Tokenizer | None = None

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    # -- what a task defines ---------------------------------------------------------------------------------

    @abstractmethod
    def training_sizes(self, words: Words) -> list[Size]:
        """A size as it is trained on for each of ``words``, which are uniform (n,)."""

    @abstractmethod
    def fill(self, draw: Draws, sizes: Sequence[Size]) -> tuple[Ints, Ints]:
        """Tokens and labels (n, width) of examples of these sizes; what is behind an example's end is cut off later."""

    @abstractmethod
    def sizes(self, text: str, words: Words) -> list[Size]:
        """The sizes that ``text`` means for examples to be tested: ``64``, or a range ``40-256``, drawn uniformly by
        ``words``. DataError, one line, where it means none or one that the task cannot have."""

    @abstractmethod
    def test_sizes(self) -> list[str]:
        """Sizes worth testing, small ones first: inside the trained ones, and far past them."""

    # -- what follows from it --------------------------------------------------------------------------------

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1.0 / self.classes

    @property
    def spec(self) -> dict[str, Any]:
        """The task and all of its settings, as ``data.synthetic`` has them."""
        return {"task": self.name, **dataclasses.asdict(self.settings)}

    @property
    def fingerprint(self) -> str:
        """A digest of what its examples follow from."""
        text = json.dumps([_FORMAT, self.spec], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def examples(
        self, seed: int, split: Split, index: Ints, size: str | None = None, width: int | None = None
    ) -> Examples:
        """Examples ``index`` (n,) of a split; any subset gives the same examples as all of them.

        ``size``: as for :meth:`sizes`; default: as it is trained on. ``width``: of the arrays, at least the longest
        length; default: the longest.
        """
        index = np.asarray(index, dtype=np.int64)
        draw = Draws(index, self.name, seed, split, size or "")
        lead = draw.words(1)[:, 0]
        sizes = self.training_sizes(lead) if size is None else self.sizes(size, lead)
        lengths = np.array([s.length for s in sizes], dtype=np.int64)
        width = int(lengths.max(initial=0)) if width is None else width
        tokens = np.full((len(index), width), self.pad_id, dtype=np.int64)
        labels = np.full((len(index), width), IGNORE, dtype=np.int64)
        if len(index):
            made, answers = self.fill(draw, sizes)
            inside = np.arange(made.shape[1]) < lengths[:, None]
            tokens[:, : made.shape[1]] = np.where(inside, made, self.pad_id)
            labels[:, : made.shape[1]] = np.where(inside, answers, IGNORE)
        return Examples(tokens, labels, lengths)


class Draws:
    """The random streams of many examples.

    Every call has numbers of its own, whatever was asked for before, and asking for more of them changes none: what an
    example is made from does not depend on the examples beside it.
    """

    def __init__(self, index: Ints, *key: int | str) -> None:
        digest = hashlib.blake2b("\0".join(map(str, key)).encode("utf-8"), digest_size=16).digest()
        self._key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self._index, self._calls = index.tolist(), 0

    def words(self, count: int) -> Words:
        """(n, count) uniform 64-bit words."""
        found = np.empty((len(self._index), count), dtype=np.uint64)
        for row, index in enumerate(self._index):
            counter = np.array([0, index, self._calls, 0], dtype=np.uint64)
            found[row] = np.random.Philox(key=self._key, counter=counter).random_raw(count)
        self._calls += 1
        return found

    def below(self, limit: int | Ints, count: int) -> Ints:
        """(n, count) integers uniform in 0 … limit − 1; ``limit`` may be (n, 1), one a stream."""
        return below(self.words(count), limit)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(n, count) numbers uniform in (0, 1), neither end included."""
        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def some(self, pool: int, count: int) -> Ints:
        """(n, count) different integers of 0 … pool − 1, every ordered choice equally likely."""
        words = self.words(pool)
        first = np.argpartition(words, count - 1, axis=1)[:, :count]
        order = np.argsort(np.take_along_axis(words, first, axis=1), axis=1)
        return np.take_along_axis(first, order, axis=1).astype(np.int64)


def below(words: Words, limit: int | Ints) -> Ints:
    """Integers uniform in 0 … limit − 1 out of uniform words (their upper half; off by limit/2³² at most)."""
    return (((words >> np.uint64(32)) * np.asarray(limit).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


# -- tasks by name -------------------------------------------------------------------------------------------

_tasks: dict[str, type[Task]] = {}


def register_task(task: type[Task]) -> type[Task]:
    """Class decorator: make a task available as ``data.synthetic.task``. DataError if the name is taken."""
    taken = _tasks.get(task.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (task.__module__, task.__qualname__):
        raise DataError(f"{KEY}.task: the name '{task.name}' is taken by {taken.__module__}.{taken.__qualname__}")
    _tasks[task.name] = task
    return task


def tasks() -> dict[str, type[Task]]:
    """Every task by name."""
    for module in _BUILT_IN:
        importlib.import_module(module)
    return dict(sorted(_tasks.items()))


def task_class(name: object) -> type[Task]:
    """The task of that name; DataError naming the nearest one otherwise."""
    found = tasks()
    if not isinstance(name, str) or name not in found:
        near = difflib.get_close_matches(str(name), found, n=1, cutoff=0.5)
        hint = f"; nearest: {near[0]}" if near else ""
        given = f"no task '{name}'" if name is not None else "missing"
        raise DataError(f"{KEY}.task: {given}{hint} (tasks: {', '.join(found)})")
    return found[name]


def make_task(spec: Mapping[str, Any]) -> Task:
    """The task that ``data.synthetic`` describes: ``{"task": NAME, **settings}``. DataError, one line, otherwise."""
    keys = dict(spec)
    kind = task_class(keys.pop("task", None))
    check_keys(kind, keys)
    return kind(kind.Settings(**keys))


def check_keys(kind: type[Task], keys: Mapping[str, Any]) -> None:
    """DataError, one line, naming the nearest, where a task has no such setting."""
    valid = [field.name for field in dataclasses.fields(kind.Settings)]
    for key in keys:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
            hint = f"; nearest: {KEY}.{near[0]}" if near else ""
            raise DataError(f"{KEY}.{key}: task '{kind.name}' has no such setting{hint} (valid: {', '.join(valid)})")


# -- batches -------------------------------------------------------------------------------------------------


class SyntheticLoader(StepLoader):
    """Batches of a task, with the interface of :class:`paralm_data.Loader`.

    Row r of step s is example s·G + r of the split, whatever the number of ranks. There are no epochs: no example
    comes twice. Of rows that ranks share, each computes the whole and keeps its part. Raises DataError when ``seq_len``
    does not hold the longest example.
    """

    def __init__(
        self,
        task: Task,
        seq_len: int,
        global_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        split: Split = "train",
        part: slice | None = None,
    ) -> None:
        super().__init__(seq_len, global_batch_size, seed, rank, world_size, part)
        check_width(task, seq_len)
        self.task, self.split = task, split

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of ``step`` (from 0)."""
        self._check_step(step)
        rows = np.arange(self._rows.start, self._rows.stop, dtype=np.int64)
        found = self.task.examples(self.seed, self.split, step * self.global_batch_size + rows, width=self.seq_len)
        tokens, labels = (torch.from_numpy(ids)[:, self.part].contiguous() for ids in (found.tokens, found.labels))
        reset = torch.zeros(tokens.shape, dtype=torch.bool)
        if self.part.start == 0:
            reset[:, 0] = True
        return Batch(
            step=step,
            rows=rows,
            tokens=tokens,
            labels=labels,
            reset=reset,
            continues=torch.zeros(len(rows), dtype=torch.bool),
            epoch=0.0,
        )

    def _identity(self) -> dict[str, Any]:
        return {"task": self.task.fingerprint, "split": self.split}


def check_width(task: Task, seq_len: int) -> None:
    """DataError, one line, when rows of ``seq_len`` do not hold the longest example."""
    if seq_len < task.max_len:
        raise DataError(
            f"training.seq_len: {seq_len} does not hold the longest example of task '{task.name}', {task.max_len} "
            f"tokens; raise it to {task.max_len}, or make the task's examples shorter"
        )
