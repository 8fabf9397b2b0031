"""Mixtures: every source within one row of its weight, its windows in its own order, on any ranks, resumed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paralm_data import (
    Bandit,
    DataError,
    Exp3,
    Loader,
    MixtureLoader,
    MixtureSource,
    TokenStore,
    Ucb1,
    random_windows,
    temperature_weights,
)
from paralm_data.orders import Windows
from paralm_data.quota import RESOLUTION, Quota, shares

MakeStore = Callable[[list[list[int]]], TokenStore]
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
weights = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9)
SEQ_LEN, BATCH = 8, 6


@pytest.fixture
def sources(make_store: MakeStore) -> list[MixtureSource]:
    """Three stores of 62, 50 and 37 windows, told apart by their ids."""
    sizes, parts = (500, 400, 300), (5.0, 2.0, 1.0)
    stores = [make_store([[10 + 100 * i + j % 89 for j in range(n)]]) for i, n in enumerate(sizes)]
    return [MixtureSource(name, store, part) for name, store, part in zip("abc", stores, parts)]


# -- the stream of sources -----------------------------------------------------------------------------------


@quick
@given(weights)
def test_every_source_is_within_one_row_of_its_weight_after_every_row(values: list[float]) -> None:
    parts = shares(values)
    assert sum(parts) == RESOLUTION
    assert all(abs(p / RESOLUTION - v / sum(values)) < len(values) / RESOLUTION for p, v in zip(parts, values))
    rows, k = 3000, len(values)
    sources, ordinals = Quota(parts).draw(0, rows)
    drawn = (sources[:, None] == np.arange(k)).cumsum(0)
    off = np.abs(drawn * RESOLUTION - np.arange(1, rows + 1)[:, None] * np.array(parts))
    assert int(off.max()) <= (RESOLUTION * (2 * k - 3) / (2 * k - 2) if k > 1 else 0)
    assert np.array_equal(ordinals, drawn[np.arange(rows), sources] - 1)


@quick
@given(weights, st.integers(0, 10**9), st.integers(0, 300))
def test_any_row_is_found_without_those_before_it(values: list[float], far: int, count: int) -> None:
    quota = Quota(shares(values))
    sources, ordinals = quota.draw(far, count)
    before, after = quota.counts(far), quota.counts(far + count)
    expected = [after[i] - before[i] for i in range(len(values))]
    assert np.bincount(sources, minlength=len(values)).tolist() == expected
    for i in range(len(values)):
        assert ordinals[sources == i].tolist() == list(range(before[i], after[i]))
    assert sum(after) == far + count
    one, two = Quota(shares(values)).draw(far, count)
    assert np.array_equal(one, sources)
    assert np.array_equal(two, ordinals)


@quick
@given(st.lists(st.tuples(st.lists(st.floats(1e-3, 1), min_size=3, max_size=3), st.integers(1, 40)), max_size=12))
def test_weights_that_change_owe_what_they_did_not_give(rounds: list[tuple[list[float], int]]) -> None:
    owed, wanted, drawn = [0, 0, 0], np.zeros(3), np.zeros(3)
    for values, rows in rounds:
        quota = Quota(shares(values), owed)
        wanted += np.array(quota.parts) / RESOLUTION * rows
        drawn += quota.counts(rows)
        owed = quota.owing(rows)
        assert sum(owed) == 0
        assert np.allclose(wanted - drawn, np.array(owed) / RESOLUTION)
        assert max(drawn - wanted) < 1
        assert max(wanted - drawn) < 2


def test_shares_of_weights_far_apart() -> None:
    assert shares([1.0, 0.0, 1.0]) == [RESOLUTION // 2, 0, RESOLUTION // 2]
    assert shares([1.0, 1e-12]) == [RESOLUTION - 1, 1]
    assert sum(shares([1e-9] * 300 + [1.0])) == RESOLUTION


def test_temperature() -> None:
    assert temperature_weights([100, 300], 1.0) == pytest.approx([0.25, 0.75])
    assert temperature_weights([100, 400], 2.0) == pytest.approx([1 / 3, 2 / 3])  # square roots: 10 and 20
    assert temperature_weights([10**15, 1], 1e6) == pytest.approx([0.5, 0.5], abs=1e-4)
    with pytest.raises(DataError, match="temperature is 0"):
        temperature_weights([1, 2], 0)


# -- batches -------------------------------------------------------------------------------------------------


def test_a_mixture_of_one_is_that_store(prepared: Any) -> None:
    one, alone = (
        MixtureLoader([MixtureSource("a", prepared.train, 3.0)], 16, 6, seed=2),
        Loader(prepared.train, 16, 6, seed=2),
    )
    for step in (0, 1, 50, 900, 2):
        mine, theirs = one.batch(step), alone.batch(step)
        for key in ("tokens", "labels", "reset", "continues"):
            assert torch.equal(getattr(mine, key), getattr(theirs, key))


def test_each_source_gives_its_own_windows_in_its_own_order(sources: list[MixtureSource]) -> None:
    loader = MixtureLoader(sources, SEQ_LEN, BATCH, seed=4)
    given: list[list[list[int]]] = [[], [], []]
    for _ in range(100):
        batch = next(loader)
        assert batch.sources is not None
        assert (batch.tokens[:, 3] >= 10).all()
        for source, row in zip(batch.sources.tolist(), batch.tokens.tolist()):
            given[source].append(row)
    assert [len(rows) for rows in given] == loader.counts(100) == [375, 150, 75]  # 600 rows at 5 : 2 : 1
    for source, rows in zip(sources, given):
        order = Windows(source.store, SEQ_LEN, BATCH, seed=4)
        expected = order.read(order.samples(0, len(rows)))[:, :-1]
        assert rows == expected.tolist()
        first, second = rows[: order.n_samples], rows[order.n_samples : 2 * order.n_samples]
        if len(second) == order.n_samples:
            assert sorted(first) == sorted(second)
            assert first != second
    report = loader.report(100)
    assert report["a"] == {"tokens": 375 * SEQ_LEN, "epochs": 375 / 62, "weight": 0.625}


@pytest.mark.parametrize("world", [1, 2, 4, 5])
def test_the_ranks_rows_are_the_batch(sources: list[MixtureSource], world: int) -> None:
    whole = MixtureLoader(sources, SEQ_LEN, BATCH, seed=1)
    ranks = [MixtureLoader(sources, SEQ_LEN, BATCH, 1, rank, world) for rank in range(world)]
    cut = [MixtureLoader(sources, SEQ_LEN, BATCH, 1, part=slice(*ends)) for ends in ((0, world), (world, SEQ_LEN))]
    for step in (0, 1, 7, 1000):
        batch, parts = whole.batch(step), [rank.batch(step) for rank in ranks]
        for key in ("tokens", "labels", "reset"):
            assert torch.equal(torch.cat([getattr(part, key) for part in parts]), getattr(batch, key))
            assert torch.equal(torch.cat([getattr(part.batch(step), key) for part in cut], 1), getattr(batch, key))
        assert np.concatenate([part.sources for part in parts]).tolist() == batch.sources.tolist()  # type: ignore


def test_random_windows_are_a_function_of_their_purpose(sources: list[MixtureSource]) -> None:
    store = sources[0].store
    one, two, other = (random_windows(store, SEQ_LEN, 5, 3, "target", n) for n in (1, 1, 2))
    assert torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    whole = random_windows(store, SEQ_LEN, 1000, 3)
    assert len({tuple(row) for row in whole.tokens.tolist()}) == len(whole.tokens) == 62


# -- resuming ------------------------------------------------------------------------------------------------


def reward_of(loader: MixtureLoader, arm: int, step: int) -> float:
    """As training would measure it: a function of the arm and the step."""
    return [0.6, -0.5, 0.1][arm] + ((7 * step + arm) % 5 - 2) / 20


def advance(loaders: list[MixtureLoader], steps: int) -> list[list[list[int]]]:
    """Every step's global batch, with the weights learned on the way."""
    found = []
    for loader in loaders:
        if loader.unmeasured:
            loader.begin([reward_of(loader, arm, 0) for arm in range(3)])
    for _ in range(steps):
        found.append([row for loader in loaders for row in next(loader).tokens.tolist()])
        for loader in loaders:
            arm = loader.due(loader.step)
            if arm is not None:
                loader.learn(loader.step, reward_of(loader, arm, loader.step))
    return found


MAKE: dict[str, Callable[[], Bandit | None]] = {
    "fixed": lambda: None,
    "exp3": lambda: Exp3(3),
    "ucb1": lambda: Ucb1(3),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("stop", [1, 12, 13, 30])
def test_resumed_is_uninterrupted_on_any_world_size(sources: list[MixtureSource], kind: str, stop: int) -> None:
    def loaders(world: int) -> list[MixtureLoader]:
        return [MixtureLoader(sources, SEQ_LEN, BATCH, 1, r, world, MAKE[kind](), every=4) for r in range(world)]

    expected = advance(loaders(1), 60)
    before = loaders(2)
    assert advance(before, stop) == expected[:stop]
    saved = json.loads(json.dumps(before[0].state_dict()))
    assert saved == json.loads(json.dumps(before[1].state_dict()))
    for world in (1, 4):
        after = loaders(world)
        for loader in after:
            loader.load_state_dict(saved)
        assert advance(after, 60 - stop) == expected[stop:]
    assert len({tuple(map(tuple, batch)) for batch in expected}) == 60


@pytest.mark.parametrize("kind", ["exp3", "ucb1"])
def test_what_agrees_is_drawn_more_and_counts_are_exact(sources: list[MixtureSource], kind: str) -> None:
    loader = MixtureLoader(sources, SEQ_LEN, BATCH, 1, bandit=MAKE[kind](), every=4)
    batches = advance([loader], 400)
    drawn = np.bincount([row[3] // 100 for batch in batches for row in batch], minlength=3)
    assert drawn.tolist() == loader.counts(400)
    assert drawn[0] > drawn[2] > drawn[1]
    report = loader.report(400)
    assert report["a"]["probability"] == max(row["probability"] for row in report.values())
    assert report["b"]["reward"] < 0 < report["a"]["reward"]


def test_a_learned_mixture_knows_the_steps_of_its_round_only(sources: list[MixtureSource]) -> None:
    loader = MixtureLoader(sources, SEQ_LEN, BATCH, 1, bandit=Exp3(3), every=4)
    first = [loader.batch(step).tokens for step in (3, 0, 3)]
    assert torch.equal(first[0], first[2])
    with pytest.raises(DataError, match="step 4: its weights are not known"):
        loader.batch(4)
    advance([loader], 4)
    with pytest.raises(DataError, match="step 3: its weights"):
        loader.batch(3)
    assert loader.due(4) is None
    with pytest.raises(DataError, match="step 0: its weights"):
        MixtureLoader(sources, SEQ_LEN, BATCH, 1, bandit=Ucb1(3)).batch(0)


def test_a_fork_begins_its_rounds_where_it_starts(sources: list[MixtureSource]) -> None:
    loader = MixtureLoader(sources, SEQ_LEN, BATCH, 1, bandit=Exp3(3), every=4)
    loader.start_at(30)
    assert loader.batch(33).step == 33
    assert loader.due(34) is not None


# -- a source's end ------------------------------------------------------------------------------------------


def limited(sources: list[MixtureSource], **limits: float) -> list[MixtureSource]:
    return [MixtureSource(s.name, s.store, s.weight, limits.get(s.name)) for s in sources]


def test_more_epochs_than_allowed_are_refused_with_the_steps_that_fit(sources: list[MixtureSource]) -> None:
    loader = MixtureLoader(limited(sources, a=2.0), SEQ_LEN, BATCH)
    loader.check_budget(33)  # 198 rows, 124 of them a's, which has 62 windows
    with pytest.raises(DataError, match=r"sources\.a: 34 steps read it 2\.0\d times.* 2 times; .*max_steps to 33"):
        loader.check_budget(34)
    MixtureLoader(sources, SEQ_LEN, BATCH).check_budget(10**6)


@pytest.mark.parametrize("kind", ["exp3", "ucb1"])
def test_a_source_used_up_retires_and_the_others_go_on(sources: list[MixtureSource], kind: str) -> None:
    few = limited(sources, a=1.0)
    loader = MixtureLoader(few, SEQ_LEN, BATCH, 1, bandit=MAKE[kind](), every=2)
    loader.check_budget(10**6)
    advance([loader], 300)
    drawn = loader.counts(300)
    assert 62 - 2 * BATCH - 3 <= drawn[0] <= 62
    assert sum(drawn) == 300 * BATCH
    assert loader.report(300)["a"]["probability"] == 0
    resumed = MixtureLoader(few, SEQ_LEN, BATCH, 1, bandit=MAKE[kind](), every=2)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert advance([resumed], 20) == advance([loader], 20)


@pytest.mark.parametrize("kind", ["exp3", "ucb1"])
def test_a_learned_mixture_too_small_for_its_steps_is_refused(sources: list[MixtureSource], kind: str) -> None:
    loader = MixtureLoader(limited(sources, a=1, b=1, c=1), SEQ_LEN, BATCH, bandit=MAKE[kind](), every=2)
    loader.check_budget(17)  # 62 + 50 + 37 windows but for three times a round of 12 and a row of each source
    with pytest.raises(DataError, match=r"18 steps draw 108 windows, and the sources have 104 .*max_steps to 17"):
        loader.check_budget(18)
    advance([loader], 17)


@pytest.mark.parametrize("kind", ["exp3", "ucb1"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_what_the_budget_allows_is_drawn_to_the_end(make_store: MakeStore, kind: str, every: int) -> None:
    few = [MixtureSource(name, make_store([[10 + i] * 503]), max_epochs=1) for i, name in enumerate("abc")]
    loader = MixtureLoader(few, SEQ_LEN, BATCH, bandit=MAKE[kind](), every=every)

    def allowed(steps: int) -> bool:
        try:
            loader.check_budget(steps)
        except DataError:
            return False
        return True

    steps = max(filter(allowed, range(100)))
    assert steps > 20
    advance([loader], steps)


# -- what cannot be mixed ------------------------------------------------------------------------------------


def test_sources_that_cannot_be_mixed(sources: list[MixtureSource], prepared: Any, tmp_path: Any) -> None:
    from paralm_data import SourceSpec, TokenizerSpec, prepare

    text = tmp_path / "text.txt"
    text.write_text("other words, and another tokenizer\n" * 500)
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} " * 50)
    spec = SourceSpec("text", paths=(str(tmp_path / "*.txt"),))
    other = prepare(spec, TokenizerSpec(vocab_size=300), tmp_path / "other", 0.2).train
    mine = MixtureSource("a", prepared.train)
    cases: list[tuple[list[MixtureSource], dict[str, Any], str]] = [
        ([mine, MixtureSource("b", other)], {}, "'a' and 'b' were made with different tokenizers"),
        ([mine, mine], {}, "two sources of the mixture are named 'a'"),
        ([], {}, "at least one source"),
        ([MixtureSource("a", prepared.train, 0.0)], {}, "every source of the mixture has weight 0"),
        ([MixtureSource("a", prepared.train, -1.0)], {}, "'a' has weight -1"),
        ([MixtureSource("a", prepared.train, max_epochs=0.0)], {}, "'a' has max_epochs 0"),
        (sources, {"bandit": Exp3(2)}, "3 sources for a bandit of 2"),
        (sources, {"every": 0}, "interval is 0"),
        (sources, {"seq_len": 10**6}, "less than one window"),
    ]
    for given_sources, more, complaint in cases:
        with pytest.raises(DataError, match=complaint):
            MixtureLoader(given_sources, **{"seq_len": SEQ_LEN, "global_batch_size": BATCH, **more})


def test_a_state_of_another_mixture_is_refused(sources: list[MixtureSource]) -> None:
    fixed, learned = (MixtureLoader(sources, SEQ_LEN, BATCH, bandit=bandit) for bandit in (None, Exp3(3)))
    other = MixtureLoader([*sources[:2], MixtureSource("c", sources[2].store, 7.0)], SEQ_LEN, BATCH)
    with pytest.raises(DataError, match="weights"):
        other.load_state_dict(fixed.state_dict())
    with pytest.raises(DataError, match="fixed weights"):
        learned.load_state_dict(fixed.state_dict())
    with pytest.raises(DataError, match="store"):
        MixtureLoader(sources[:2], SEQ_LEN, BATCH).load_state_dict(fixed.state_dict())
    with pytest.raises(DataError, match="'Exp3', 1"):
        MixtureLoader(sources, SEQ_LEN, BATCH, bandit=Exp3(3), every=7).load_state_dict(learned.state_dict())
