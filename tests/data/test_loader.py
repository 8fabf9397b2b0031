"""Batches against a reference that is slow and obviously right, and the laws of order, ranks and resuming."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paralm_data import IGNORE, Batch, DataError, Loader, TokenStore, random_permutation
from paralm_data.orders import DocumentStream, Windows

MakeStore = Callable[[list[list[int]]], TokenStore]
shared = settings(  # a busy machine is no failure
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
documents = st.lists(st.lists(st.integers(4, 399), max_size=30), min_size=2, max_size=150)


def reference(stream: list[int], start: int, length: int, end: int, bos: int, eos: int) -> Any:
    """(tokens, labels, reset) of one row, position by position: inputs are stream[start:end], padded to length."""
    tokens, labels, reset = [], [], []
    for position in range(start, start + length):
        if position >= end:
            tokens.append(eos)
            labels.append(IGNORE)
            reset.append(False)
            continue
        token = stream[position]
        tokens.append(token)
        reset.append(token == bos)
        labels.append(IGNORE if token == eos else stream[position + 1])
    return tokens, labels, reset


def assert_row(batch: Batch, index: int, expected: Any) -> None:
    for mine, theirs in zip((batch.tokens, batch.labels, batch.reset), expected):
        assert mine[index].tolist() == theirs


def assert_equal(one: Batch, two: Batch) -> None:
    assert one.step == two.step
    assert one.epoch == two.epoch
    assert np.array_equal(one.rows, two.rows)
    for key in ("tokens", "labels", "reset", "continues"):
        assert torch.equal(getattr(one, key), getattr(two, key))


def test_one_window_by_hand(make_store: MakeStore) -> None:
    batch = Loader(make_store([[11, 12], [13], [14]]), seq_len=9, global_batch_size=1).batch(0)
    assert batch.tokens.tolist() == [[1, 11, 12, 2, 1, 13, 2, 1, 14]]
    assert batch.labels.tolist() == [[11, 12, 2, IGNORE, 13, 2, IGNORE, 14, 2]]
    assert batch.reset.nonzero()[:, 1].tolist() == [0, 4, 7]
    assert batch.continues.tolist() == [False]


def test_two_lanes_by_hand(make_store: MakeStore) -> None:
    store = make_store([[11, 12, 13, 14]])  # 1 11 12 | 13 14 2
    first, second, again = (Loader(store, 2, 2, order="lanes").batch(step) for step in range(3))
    assert first.tokens.tolist() == [[1, 11], [13, 14]]
    assert first.labels.tolist() == [[11, 12], [14, 2]]
    assert second.tokens.tolist() == [[12, 2], [2, 2]]  # the second of each is padding
    assert second.labels.tolist() == [[13, IGNORE], [IGNORE, IGNORE]]
    assert [b.continues.tolist() for b in (first, second, again)] == [[False] * 2, [True] * 2, [False] * 2]
    assert [b.reset.sum().item() for b in (first, second, again)] == [1, 0, 1]
    assert [b.epoch for b in (first, second, again)] == [0.0, 0.5, 1.0]


@shared
@given(texts=documents, seq_len=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 2**62))
def test_windows_against_the_reference(
    make_store: MakeStore, texts: list[list[int]], seq_len: int, batch: int, seed: int
) -> None:
    store = make_store(texts)
    stream, count = store.tokens.tolist(), (store.n_tokens - 1) // seq_len
    if count < 1:
        return
    loader = Loader(store, seq_len, batch, seed)
    bos, eos = store.manifest.bos_id, store.manifest.eos_id
    for step in range(3 * count // batch + 1):
        got = loader.batch(step)
        assert got.epoch == step * batch / count
        for row in range(batch):
            epoch, place = divmod(step * batch + row, count)
            order = random_permutation(count, seed, epoch, "windows")
            start = int(order(np.array([place]))[0]) * seq_len
            assert_row(got, row, reference(stream, start, seq_len, len(stream), bos, eos))
        assert not got.continues.any()


@shared
@given(texts=documents, seq_len=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 2**62))
def test_lanes_against_the_reference(
    make_store: MakeStore, texts: list[list[int]], seq_len: int, batch: int, seed: int
) -> None:
    store = make_store(texts)
    loader = Loader(store, seq_len, batch, seed, order="lanes")
    steps, n = int(loader.steps_per_epoch), store.n_tokens
    for step in range(2 * steps + 1):
        epoch, segment = divmod(step, steps)
        order = random_permutation(store.n_documents, seed, epoch, "documents")(np.arange(store.n_documents))
        stream = np.concatenate([store.document(int(i)) for i in order]).tolist()
        got = loader.batch(step)
        assert got.continues.tolist() == [segment > 0] * batch
        for row in range(batch):
            start, end = n * row // batch + segment * seq_len, n * (row + 1) // batch
            expected = reference(stream, start, seq_len, end, store.manifest.bos_id, store.manifest.eos_id)
            assert_row(got, row, expected)


@pytest.mark.parametrize(("count", "batch"), [(1000, 7), (9000, 64), (5, 8), (4096, 32), (4097, 1)])
def test_windows_takes_every_window_once_an_epoch(make_store: MakeStore, count: int, batch: int) -> None:
    store = make_store([[5] * (count - 1)])
    order = Windows(store, 1, batch, seed=3)
    assert order.n_samples == count
    epochs = [order.samples(epoch * count, count).tolist() for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert epochs[0] != epochs[1] != epochs[2]
    stepwise = np.concatenate([order.samples(step * batch, batch) for step in range(2 * count // batch)])
    assert stepwise.tolist() == (epochs[0] + epochs[1])[: len(stepwise)]


@pytest.mark.parametrize("batch", [1, 3, 8, 500])
@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_lanes_takes_every_token_once_an_epoch_and_predicts_all_but_the_first_of_each(
    make_store: MakeStore, batch: int, seq_len: int
) -> None:
    store = make_store([[5 + i % 300] * (i % 13) for i in range(100)])
    loader = Loader(store, seq_len, batch, order="lanes")
    met: Counter[int] = Counter()
    predicted: Counter[int] = Counter()
    padding = 0
    for _ in range(int(loader.steps_per_epoch)):
        got = next(loader)
        met.update(got.tokens.flatten().tolist())
        predicted.update(got.labels[got.labels != IGNORE].tolist())
        padding += int(((got.labels == IGNORE) & (got.tokens == 2)).sum())
    padding -= store.n_documents
    assert met == Counter(store.tokens.tolist()) + Counter({2: padding})
    assert predicted == Counter(t for t in store.tokens.tolist() if t != 1)
    assert padding < (seq_len + 1) * batch


def test_a_lane_goes_on_where_it_ended(make_store: MakeStore) -> None:
    store = make_store([[4 + (7 * i + j) % 390 for j in range(i % 50)] for i in range(200)])
    loader = Loader(store, 16, 5, order="lanes")
    before = next(loader)
    for _ in range(int(loader.steps_per_epoch) - 2):  # the last step has padding
        now = next(loader)
        assert now.continues.all()
        known = before.labels[:, -1] != IGNORE
        assert torch.equal(before.labels[known, -1], now.tokens[known, 0])
        assert torch.equal(now.reset[~known, 0], torch.ones(int((~known).sum()), dtype=torch.bool))
        before = now
    next(loader)
    assert not next(loader).continues.any()


@shared
@given(
    order=st.sampled_from(["windows", "lanes"]), world=st.integers(1, 12), batch=st.integers(1, 10),
    step=st.integers(0, 50), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_ranks_rows_are_the_batch(prepared: Any, order: str, world: int, batch: int, step: int, seed: int) -> None:
    whole = Loader(prepared.train, 32, batch, seed, order).batch(step)
    parts = [Loader(prepared.train, 32, batch, seed, order, rank, world).batch(step) for rank in range(world)]
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(batch))
    for key in ("tokens", "labels", "reset", "continues"):
        assert torch.equal(torch.cat([getattr(part, key) for part in parts]), getattr(whole, key))
    assert max(len(part.rows) for part in parts) - min(len(part.rows) for part in parts) <= 1
    assert {part.epoch for part in parts} == {whole.epoch}


@shared
@given(
    texts=documents, order=st.sampled_from(["windows", "lanes"]), seq_len=st.integers(1, 40), batch=st.integers(1, 9),
    step=st.integers(0, 20), cuts=st.lists(st.integers(1, 39), max_size=4, unique=True),
)  # fmt: skip
def test_parts_of_the_steps_are_the_rows(
    make_store: MakeStore, texts: list[list[int]], order: str, seq_len: int, batch: int, step: int, cuts: list[int]
) -> None:
    """Labels at a cut, padding that begins in any part, rows that are over before one: nothing depends on the cuts."""
    store = make_store([*texts, list(range(4, 50))])
    bounds = [0, *sorted(cut for cut in cuts if cut < seq_len), seq_len]
    whole = Loader(store, seq_len, batch, 3, order).batch(step)
    loaders = [Loader(store, seq_len, batch, 3, order, part=slice(*ends)) for ends in itertools.pairwise(bounds)]
    parts = [loader.batch(step) for loader in loaders]
    for key in ("tokens", "labels", "reset"):
        assert torch.equal(torch.cat([getattr(part, key) for part in parts], 1), getattr(whole, key))
    assert all(torch.equal(part.continues, whole.continues) for part in parts)
    for loader, part in zip(loaders, parts):
        raw = loader._order.rows(step, range(batch)).tokens
        assert raw.shape == (batch, part.tokens.shape[1] + 1), "no more is read than the rank holds, and a label"
        assert loader.state_dict() == Loader(store, seq_len, batch, 3, order).state_dict()


@pytest.mark.parametrize("order", ["windows", "lanes"])
def test_resumed_is_uninterrupted_on_any_world_size(prepared: Any, order: str) -> None:
    uninterrupted = Loader(prepared.train, 16, 6, 1, order)
    expected = [next(uninterrupted) for _ in range(40)]
    before = [Loader(prepared.train, 16, 6, 1, order, rank, 2) for rank in range(2)]
    for loader in before:
        for _ in range(17):
            next(loader)
    saved = json.loads(json.dumps(before[0].state_dict()))
    assert saved == before[1].state_dict()
    after = [Loader(prepared.train, 16, 6, 1, order, rank, 4) for rank in range(4)]
    for loader in after:
        loader.load_state_dict(saved)
    for step in range(17, 40):
        parts = [next(loader) for loader in after]
        assert torch.equal(torch.cat([part.tokens for part in parts]), expected[step].tokens)
        assert torch.equal(torch.cat([part.labels for part in parts]), expected[step].labels)


@pytest.mark.parametrize("order", ["windows", "lanes"])
def test_a_batch_does_not_depend_on_what_was_read_before(prepared: Any, order: str) -> None:
    one, two = (Loader(prepared.train, 16, 6, 1, order) for _ in range(2))
    steps = [0, 300, 5, 5, 1000, 4, 301, 0]
    for step in steps:
        assert_equal(one.batch(step), Loader(prepared.train, 16, 6, 1, order).batch(step))
    for step in sorted(steps):
        assert_equal(one.batch(step), two.batch(step))
    assert one.step == 0


def test_seeds_and_epochs_differ(prepared: Any) -> None:
    for order in ("windows", "lanes"):
        one, two = (Loader(prepared.train, 16, 4, seed, order) for seed in (0, 1))
        again = int(-(-one.steps_per_epoch // 1))
        assert not torch.equal(one.batch(0).tokens, two.batch(0).tokens)
        assert not torch.equal(one.batch(0).tokens, one.batch(again).tokens)


def test_shapes_and_types(prepared: Any) -> None:
    batch = Loader(prepared.train, 16, 3, order="windows").batch(0)
    assert batch.tokens.shape == batch.labels.shape == batch.reset.shape == (3, 16)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.reset.dtype == batch.continues.dtype == torch.bool
    assert batch.tokens.is_contiguous()
    assert batch.labels.is_contiguous()
    empty = Loader(prepared.train, 16, 3, rank=0, world_size=4).batch(0)
    assert empty.tokens.shape == empty.labels.shape == empty.reset.shape == (0, 16)
    assert len(empty.rows) == len(empty.continues) == 0


def test_a_state_of_another_loader_is_refused_with_both_values(prepared: Any) -> None:
    state = Loader(prepared.train, 16, 4, 7).state_dict()
    others = {
        "store": Loader(prepared.held_out, 16, 4, 7),
        "seed": Loader(prepared.train, 16, 4, 8),
        "order": Loader(prepared.train, 16, 4, 7, "lanes"),
        "seq_len": Loader(prepared.train, 17, 4, 7),
        "global_batch_size": Loader(prepared.train, 16, 5, 7),
    }
    assert set(others) | {"step"} == set(state)
    for key, loader in others.items():
        with pytest.raises(DataError) as caught:
            loader.load_state_dict({**state, "step": 3})
        assert key in str(caught.value)
        assert repr(state[key]) in str(caught.value)
        assert repr(loader.state_dict()[key]) in str(caught.value)
        assert loader.step == 0


@pytest.mark.parametrize("step", [-1, "3", 1.5, None])
def test_a_state_without_a_step_is_refused(prepared: Any, step: object) -> None:
    loader = Loader(prepared.train, 16, 4)
    with pytest.raises(DataError, match="step"):
        loader.load_state_dict({**loader.state_dict(), "step": step})
    with pytest.raises(DataError, match="has no 'seed'"):
        loader.load_state_dict({"step": 1})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"order": "random"}, "data.order is 'random'"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": 10**9}, "less than one window"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"world_size": 0}, "world_size is 0"),
        ({"part": slice(8, 17)}, r"part is slice\(8, 17, None\); it must be consecutive steps of range\(16\)"),
        ({"part": slice(8, 8)}, "part is"),
        ({"part": slice(0, 8, 2)}, "part is"),
    ],
)
def test_arguments_out_of_range(prepared: Any, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        Loader(prepared.train, **{"seq_len": 16, "global_batch_size": 4, **arguments})
    with pytest.raises(DataError, match="from 0"):
        Loader(prepared.train, 16, 4).batch(-1)


@shared
@given(
    texts=documents, seed=st.integers(0, 99), block=st.integers(1, 40),
    spans=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1))),
)  # fmt: skip
def test_any_part_of_the_document_stream(
    make_store: MakeStore, texts: list[list[int]], seed: int, block: int, spans: list[tuple[float, float]]
) -> None:
    store = make_store(texts)
    order = random_permutation(store.n_documents, seed, 4, "documents")(np.arange(store.n_documents))
    whole = np.concatenate([store.document(int(i)) for i in order])
    stream = DocumentStream(store, seed)
    stream.BLOCK, stream.CHUNK = block, 3 * block  # type: ignore[misc]
    cuts = np.array([sorted((int(a * store.n_tokens), int(b * store.n_tokens))) for a, b in spans], np.int64)
    cuts = cuts.reshape(-1, 2)
    expected = [whole[start:stop] for start, stop in cuts]
    got = stream.read(4, cuts[:, 0], cuts[:, 1] - cuts[:, 0])
    assert np.array_equal(got, np.concatenate([whole[:0], *expected]))
