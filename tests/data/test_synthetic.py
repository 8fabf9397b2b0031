"""Synthetic tasks: every label against a definition written another way; streams, ranks and resuming."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from paralm_data import IGNORE, DataError, SyntheticLoader, Task, make_task, register_task, tasks
from paralm_data.groups import GROUPS, get_group
from paralm_data.synthetic import Draws, Size

SPECS: list[dict[str, Any]] = [
    {"task": "parity"},
    {"task": "parity", "labels": "every", "min_len": 1, "max_len": 12},
    {"task": "cycle_navigation", "modulus": 7, "labels": "every"},
    {"task": "modular_arithmetic", "labels": "every"},
    {"task": "modular_arithmetic", "operators": "+-", "modulus": 3, "min_len": 1, "max_len": 20},
    {"task": "modular_arithmetic", "brackets": True, "min_len": 1, "max_len": 30},
    {"task": "modular_arithmetic", "brackets": True, "operators": "+-", "modulus": 11},
    {"task": "words", "group": "A5"},
    {"task": "words", "group": "S3", "labels": "last"},
    {"task": "mqar", "vocab": 64, "mixture": ["16:2", "32:8"]},
    {"task": "mqar", "vocab": 40, "mixture": ["24:6"], "filler": False, "power": 1.0},
]
BUILT_IN = {spec["task"] for spec in SPECS}


def named(spec: dict[str, Any]) -> str:
    return "-".join(str(value) for value in spec.values())


every_task = pytest.mark.parametrize("spec", SPECS, ids=named)


# -- the tasks' definitions, one example at a time -----------------------------------------------------------


def parity_answers(task: Task, tokens: list[int]) -> list[int]:
    return [tokens[: t + 1].count(1) % 2 for t in range(len(tokens))]


def cycle_answers(task: Task, tokens: list[int]) -> list[int]:
    moves = {task.classes: -1, task.classes + 1: 0, task.classes + 2: 1}
    place, found = 0, []
    for token in tokens:
        place = (place + moves[token]) % task.classes
        found.append(place)
    return found


def arithmetic_answers(task: Task, tokens: list[int]) -> list[int]:
    """Python's own parser and integers."""
    names = {task.classes + i: symbol for i, symbol in enumerate("+-*()")}
    text = [names.get(token, str(token)) for token in tokens]
    if task.settings.brackets:
        return [IGNORE] * (len(tokens) - 1) + [eval("".join(text)) % task.classes]
    return [eval("".join(text[: t + 1])) % task.classes if t % 2 == 0 else IGNORE for t in range(len(tokens))]


def word_answers(task: Task, tokens: list[int]) -> list[int]:
    """Things moved about: position i holds what came there."""
    degree, even = GROUPS[task.settings.group]
    elements = [p for p in itertools.permutations(range(degree)) if not (even and determinant(p) < 0)]
    where, found = list(range(degree)), []  # where thing i is now
    for token in tokens:
        where = [elements[token][place] for place in where]
        found.append(elements.index(tuple(where)))
    return found


def determinant(permutation: tuple[int, ...]) -> float:
    return float(np.linalg.det(np.eye(len(permutation))[list(permutation)]))


def recall_answers(task: Task, tokens: list[int], pairs: int) -> list[int]:
    book = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]))
    assert len(book) == pairs
    assert len(set(book.values())) == pairs
    half = task.settings.vocab // 2
    assert all(0 < key < half <= value < task.settings.vocab for key, value in book.items())
    return [IGNORE] * (2 * pairs) + [book.get(token, IGNORE) for token in tokens[2 * pairs :]]


ANSWERS: dict[str, Callable[[Task, list[int]], list[int]]] = {
    "parity": parity_answers,
    "cycle_navigation": cycle_answers,
    "modular_arithmetic": arithmetic_answers,
    "words": word_answers,
}


@every_task
def test_labels_are_the_definition(spec: dict[str, Any]) -> None:
    task = make_task(spec)
    found = task.examples(3, "train", np.arange(150))
    lengths = set()
    for tokens, labels, length in zip(found.tokens.tolist(), found.labels.tolist(), found.lengths.tolist()):
        assert set(tokens[length:]) <= {task.pad_id}
        assert set(labels[length:]) <= {IGNORE}
        tokens, labels = tokens[:length], labels[:length]
        assert 0 <= min(tokens) <= max(tokens) < task.vocab_size
        lengths.add(length)
        if task.name == "mqar":
            asked = [t for t, label in enumerate(labels) if label != IGNORE]
            pairs = len(asked)
            assert (length, pairs) in {tuple(map(int, text.split(":"))) for text in task.settings.mixture}
            expected = recall_answers(task, tokens, pairs)
            assert [labels[t] for t in asked] == [expected[t] for t in asked]
            assert sorted(tokens[t] for t in asked) == sorted(tokens[0 : 2 * pairs : 2])  # each key once
            assert all((t - 2 * pairs) % 2 == 0 for t in asked)
            continue
        expected = ANSWERS[task.name](task, tokens)
        if task.settings.labels == "last":
            expected = [IGNORE] * (length - 1) + expected[-1:]
        assert labels == expected
    assert max(lengths) <= task.max_len
    if task.name != "mqar":
        low, high = task.settings.min_len, task.settings.max_len
        assert lengths <= set(range(low - (low % 2 == 0), high + 1))
        assert len(lengths) > min(8, (high - low) // 3)


def test_every_built_in_task_is_tested_here() -> None:
    others = {name for name, task in tasks().items() if task.__module__.startswith("paralm_data.")} - BUILT_IN
    assert others <= {"passkey"}, "a task without a definition in this file"


def test_nested_expressions_have_the_grammar() -> None:
    """Depth, brackets and every operator occur; lengths 1 to 4 are the four leaves."""
    task = make_task({"task": "modular_arithmetic", "brackets": True, "min_len": 1, "max_len": 40})
    plus, minus, times, opening, closing = range(5, 10)
    shapes = {1: "d", 2: "-d", 3: "(d)", 4: "(-d)"}
    for length, shape in shapes.items():
        tokens = task.examples(0, "test", np.arange(50), size=str(length)).tokens
        kinds = ["d" if t < 5 else "+-*()"[t - 5] for t in tokens[0]]
        assert "".join(kinds) == shape
        assert set(tokens[:, shape.index("d")]) == set(range(5))
    tokens = task.examples(0, "test", np.arange(200), size="40").tokens
    assert {plus, minus, times, opening, closing} <= set(tokens.ravel().tolist())
    assert ((tokens == opening).sum(1) == (tokens == closing).sum(1)).all()
    # The left part's length is uniform: of (A o B) with 9 tokens it is 1 … 5.
    nine = task.examples(0, "test", np.arange(2000), size="9").tokens
    depth = np.cumsum((nine == opening).astype(int) - (nine == closing), axis=1)
    binary = np.isin(nine, [plus, minus, times]) & (depth == 1) & ~np.isin(np.roll(nine, 1, axis=1), [opening])
    behind_operator = np.isin(np.roll(nine, 1, axis=1), [plus, minus, times])
    left = (binary & ~behind_operator).argmax(axis=1) - 1
    counts = np.bincount(left, minlength=6)[1:6]
    assert counts.min() > 330, counts


# -- groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("S3", 6), ("S4", 24), ("A5", 60), ("S5", 120)])
def test_groups(name: str, order: int) -> None:
    group = get_group(name)
    table, degree = group.table, group.elements.shape[1]
    assert group.order == order == len({tuple(e) for e in group.elements.tolist()})
    assert (np.sort(group.elements, axis=1) == np.arange(degree)).all()
    assert table.min() >= 0
    assert table.max() < order  # closed
    assert (np.sort(table, axis=0) == np.arange(order)[:, None]).all()
    assert (np.sort(table, axis=1) == np.arange(order)).all()
    assert (table[0] == np.arange(order)).all()
    assert (table[:, 0] == np.arange(order)).all()
    assert (table == 0).sum() == order  # an inverse each
    assert (table[table] == table[:, table]).all()  # associative: (a·b)·c = a·(b·c) for all a, b, c
    things = np.arange(degree)
    for a, b in itertools.product(range(0, order, 7), range(0, order, 5)):
        moved = group.elements[b][group.elements[a][things]]  # first a, then b
        assert (moved == group.elements[table[a, b]]).all()
    if name != "S3":
        assert (table != table.T).any()


def test_a5_is_every_even_permutation() -> None:
    assert all(determinant(tuple(p)) > 0 for p in get_group("A5").elements.tolist())


# -- streams, ranks, resuming --------------------------------------------------------------------------------


@every_task
def test_an_example_does_not_depend_on_its_neighbours(spec: dict[str, Any]) -> None:
    task = make_task(spec)
    whole = task.examples(5, "train", np.arange(40), width=task.max_len)
    some = np.array([31, 2, 17])
    part = task.examples(5, "train", some, width=task.max_len)
    one = task.examples(5, "train", np.array([2]))
    assert np.array_equal(part.tokens, whole.tokens[some])
    assert np.array_equal(part.labels, whole.labels[some])
    assert np.array_equal(one.tokens[0], whole.tokens[2, : one.tokens.shape[1]])
    assert task.examples(5, "train", np.arange(0)).tokens.shape == (0, 0)


@every_task
def test_seeds_and_splits_are_different_streams(spec: dict[str, Any]) -> None:
    task = make_task(spec)
    size = task.test_sizes()[-1]
    streams = [("train", 0), ("held_out", 0), ("test", 0), ("train", 1)]
    found = {key: task.examples(key[1], key[0], np.arange(64), size=size).tokens for key in streams}  # type: ignore[arg-type]
    for a, b in itertools.combinations(streams, 2):
        rows = {tuple(row) for row in found[a].tolist()} & {tuple(row) for row in found[b].tolist()}
        assert not rows, f"{a} and {b} share an example of size {size}"
    assert len({tuple(row) for row in found["train", 0].tolist()}) == 64


def test_the_examples_of_a_task_stay_what_they_are() -> None:
    """A run is resumed on another machine or numpy with the same examples: three of them, written down."""
    draw = Draws(np.array([0, 1]), "key")
    assert draw.words(1)[:, 0].tolist() != draw.words(1)[:, 0].tolist()
    parity = make_task({"task": "parity"}).examples(0, "train", np.arange(2))
    assert parity.lengths.tolist() == PARITY_LENGTHS
    assert "".join(map(str, parity.tokens[0, : parity.lengths[0]])) == PARITY_BITS
    words = make_task({"task": "words", "group": "A5", "min_len": 6, "max_len": 6}).examples(0, "train", np.arange(1))
    assert words.tokens.tolist() == [A5_WORD]


PARITY_LENGTHS = [16, 5]
PARITY_BITS = "0001110011110111"
A5_WORD = [1, 38, 9, 11, 25, 24]


def test_answers_are_balanced() -> None:
    """No answer is likelier than the others, so chance is 1/classes."""
    for spec in ({"task": "parity"}, {"task": "cycle_navigation"}, {"task": "words", "group": "S3", "labels": "last"}):
        task = make_task(spec)
        labels = task.examples(1, "held_out", np.arange(3000)).labels
        counts = np.bincount(labels[labels != IGNORE], minlength=task.classes)
        expected = 3000 / task.classes
        assert (abs(counts - expected) < 5 * np.sqrt(expected)).all(), (spec, counts)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_see_the_global_batch(world_size: int) -> None:
    task = make_task({"task": "words", "group": "S4"})
    whole = SyntheticLoader(task, 48, 7, seed=2).batch(9)
    parts = [SyntheticLoader(task, 48, 7, seed=2, rank=r, world_size=world_size).batch(9) for r in range(world_size)]
    assert np.concatenate([p.rows for p in parts]).tolist() == list(range(7))
    for key in ("tokens", "labels", "reset"):
        assert torch.equal(torch.cat([getattr(p, key) for p in parts]), getattr(whole, key))
        cut = [SyntheticLoader(task, 48, 7, seed=2, part=slice(*ends)).batch(9) for ends in ((0, 9), (9, 48))]
        assert torch.equal(torch.cat([getattr(p, key) for p in cut], 1), getattr(whole, key))
    assert whole.tokens.shape == (7, 48)
    assert whole.tokens.dtype == whole.labels.dtype == torch.int64
    assert whole.reset.nonzero().tolist() == [[row, 0] for row in range(7)]
    assert not whole.continues.any()


def test_a_batch_is_random_access_and_resumable() -> None:
    task = make_task({"task": "cycle_navigation"})
    loader = SyntheticLoader(task, 40, 6, seed=4)
    run = [next(loader) for _ in range(5)]
    other = SyntheticLoader(task, 40, 6, seed=4, rank=1, world_size=2)
    other.load_state_dict(loader.state_dict())
    assert other.step == 5
    assert torch.equal(other.batch(3).tokens, run[3].tokens[3:])
    assert torch.equal(next(other).tokens, loader.batch(5).tokens[3:])
    ids = task.examples(4, "train", np.arange(6, 12), width=40).tokens
    assert torch.equal(run[1].tokens, torch.from_numpy(ids))


def test_another_task_does_not_go_on() -> None:
    state = SyntheticLoader(make_task({"task": "parity"}), 40, 6).state_dict()
    for spec in ({"task": "parity", "max_len": 39}, {"task": "cycle_navigation"}):
        with pytest.raises(DataError, match="saved state has task"):
            SyntheticLoader(make_task(spec), 40, 6).load_state_dict(state)
    with pytest.raises(DataError, match="saved state has seed"):
        SyntheticLoader(make_task({"task": "parity"}), 40, 6, seed=1).load_state_dict(state)


# -- sizes ---------------------------------------------------------------------------------------------------


@every_task
def test_test_sizes_reach_past_training(spec: dict[str, Any]) -> None:
    task = make_task(spec)
    widths = [int(task.examples(0, "test", np.arange(8), size=size).lengths.max()) for size in task.test_sizes()]
    assert max(widths) >= 4 * task.max_len
    assert min(widths) <= task.max_len


def test_a_range_is_uniform() -> None:
    lengths = make_task({"task": "parity"}).examples(0, "test", np.arange(4000), size="40-49").lengths
    counts = np.bincount(lengths)[40:]
    assert counts.sum() == 4000
    assert len(counts) == 10
    assert counts.min() > 330


def test_mqar_asks_early_more_often_than_late() -> None:
    """Weights (i + 1)^(a − 1): with a = 0.01 about 1/i, with a = 1 uniform."""
    for power, share in ((0.01, 0.52), (1.0, 0.125)):
        task = make_task({"task": "mqar", "vocab": 64, "mixture": ["66:1"], "power": power})
        labels = task.examples(0, "train", np.arange(1500)).labels
        early = (labels[:, 2:10] != IGNORE).sum() / 1500  # the first 4 of 32 places
        weights = np.arange(1, 33) ** (power - 1.0)
        assert abs(early - weights[:4].sum() / weights.sum()) < 0.05
        assert abs(early - share) < 0.06


# -- what is refused -----------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "data.synthetic.task: missing"),
    ({"task": "partiy"}, "nearest: parity"),
    ({"task": "parity", "max_length": 9}, "nearest: data.synthetic.max_len"),
    ({"task": "parity", "min_len": 0}, "data.synthetic.min_len: must be at least 1, got 0"),
    ({"task": "parity", "min_len": 9, "max_len": 8}, "data.synthetic.max_len: must be at least min_len, 9, got 8"),
    ({"task": "parity", "labels": "first"}, "data.synthetic.labels"),
    ({"task": "cycle_navigation", "modulus": 1}, "data.synthetic.modulus"),
    ({"task": "modular_arithmetic", "operators": "+/"}, "data.synthetic.operators"),
    ({"task": "modular_arithmetic", "brackets": True, "labels": "every"}, "data.synthetic.labels"),
    ({"task": "words", "group": "S6"}, "S3, S4, A5, S5"),
    ({"task": "mqar", "mixture": []}, "data.synthetic.mixture"),
    ({"task": "mqar", "mixture": ["64-4"]}, "LENGTH:PAIRS"),
    ({"task": "mqar", "mixture": ["64:17"]}, "at least four times the pairs"),
    ({"task": "mqar", "mixture": ["64:16"], "vocab": 32}, "raise vocab"),
]


@pytest.mark.parametrize(("spec", "piece"), BAD, ids=[piece[-24:] for _, piece in BAD])
def test_refused_in_one_line(spec: dict[str, Any], piece: str) -> None:
    with pytest.raises(DataError) as error:
        make_task(spec)
    assert piece in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["", "0", "9-3", "x", "64:4"])
def test_a_size_that_is_none(size: str) -> None:
    with pytest.raises(DataError, match=f"size '{size}'"):
        make_task({"task": "parity"}).examples(0, "test", np.arange(1), size=size)


def test_rows_too_short() -> None:
    with pytest.raises(DataError, match=r"training\.seq_len: 39 does not hold .* 40"):
        SyntheticLoader(make_task({"task": "parity"}), 39, 4)


def test_a_task_of_ones_own() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class EchoSettings:
        length: int = 4

    @register_task
    class Echo(Task):
        name, Settings = "test_echo", EchoSettings
        vocab_size, pad_id, classes, max_len = 5, 4, 4, 4

        def training_sizes(self, words: Any) -> list[Size]:
            return [Size(self.settings.length)] * len(words)

        def sizes(self, text: str, words: Any) -> list[Size]:
            return [Size(int(text))] * len(words)

        def test_sizes(self) -> list[str]:
            return ["4", "8"]

        def fill(self, draw: Draws, sizes: Any) -> Any:
            tokens = draw.below(4, max(s.length for s in sizes))
            return tokens, tokens

    batch = SyntheticLoader(make_task({"task": "test_echo"}), 6, 2).batch(0)
    assert batch.tokens[:, 4:].eq(4).all()
    assert torch.equal(batch.tokens[:, :4], batch.labels[:, :4])
    with pytest.raises(DataError, match="taken by"):

        @register_task
        class Other(Echo):
            pass
