"""Reading ahead reads what the batch lies in, nothing else, and changes nothing."""

from __future__ import annotations

import itertools
import os
import threading
from typing import Any

import numpy as np
import pytest
import torch
from paralm_data import Ahead, Bandit, Exp3, Loader, MixtureLoader, MixtureSource, Prepared, TokenStore
from paralm_data.loader import StepLoader
from paralm_data.orders import Lanes


@pytest.fixture
def ids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids that are read from files, in order."""
    found: list[int] = []
    pread = os.pread

    def noted(file: int, count: int, at: int) -> bytes:
        data = pread(file, count, at)
        found.extend(np.frombuffer(data, "<u2").tolist())
        return data

    monkeypatch.setattr("paralm_data.ahead.os.pread", noted)
    monkeypatch.setattr("paralm_data.ahead.PIECE", 10)
    return found


def read(loader: StepLoader, step: int) -> None:
    ahead = Ahead()
    ahead.read(loader, step)
    assert ahead.wait(30)
    ahead.close()


@pytest.mark.parametrize("part", [None, slice(5, 11)])
@pytest.mark.parametrize("rank", [0, 2])
def test_windows(prepared: Prepared, ids: list[int], rank: int, part: slice | None) -> None:
    loader = Loader(prepared.train, 17, 7, rank=rank, world_size=3, part=part)
    for step in (0, 5, int(loader.steps_per_epoch)):  # the last one is of two epochs
        ids.clear()
        read(loader, step)
        batch = Loader(prepared.train, 17, 7, rank=rank, world_size=3, part=part).batch(step)
        rows, steps = batch.tokens.shape
        assert np.array(ids).reshape(rows, steps + 1)[:, :-1].tolist() == batch.tokens.tolist()


@pytest.mark.parametrize("rank", [0, 2])
def test_lanes(prepared: Prepared, ids: list[int], rank: int) -> None:
    loader = Loader(prepared.train, 17, 7, order="lanes", rank=rank, world_size=3)
    order = loader._order
    assert isinstance(order, Lanes)
    last = int(loader.steps_per_epoch) - 1
    for step in (0, 5, last, last + 1):
        ids.clear()
        read(loader, step)
        raw = order.rows(step, loader._rows)
        wanted = [row[: valid + 1] for row, valid in zip(raw.tokens.tolist(), raw.valid.tolist(), strict=True) if valid]
        assert ids == list(itertools.chain.from_iterable(wanted))[: len(ids)]
        assert len(ids) >= sum(map(len, wanted)) - 1  # the stream's last token has none after it


@pytest.mark.parametrize("bandit", [None, Exp3(2)])
def test_a_mixture_as_far_as_it_is_known(prepared: Prepared, ids: list[int], bandit: Bandit | None) -> None:
    sources = [MixtureSource("a", prepared.train, 2.0), MixtureSource("b", prepared.held_out)]
    loader = MixtureLoader(sources, 9, 8, rank=1, world_size=2, bandit=bandit, every=4)
    if loader.unmeasured:
        loader.begin([0.5, 0.5])
    for step in range(6):
        ids.clear()
        read(loader, step)
        if not loader.knows(step):
            assert (step, ids) == (max(4, step), [])
            continue
        batch = loader.batch(step)
        assert batch.sources is not None
        by_source = batch.tokens[torch.from_numpy(np.argsort(batch.sources, kind="stable"))]
        assert np.array(ids).reshape(4, 10)[:, :-1].tolist() == by_source.tolist()


def test_what_cannot_be_read_ahead_is_left_to_the_batch(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("paralm_data.ahead.os.pread", fails)
    store = TokenStore.open(prepared.path / "train", verify="size")
    loader, ahead = Loader(store, 9, 4), Ahead()
    for step in range(3):
        ahead.read(loader, step)
        assert ahead.wait(30)
    assert torch.equal(loader.batch(3).tokens, Loader(prepared.train, 9, 4).batch(3).tokens)
    ahead.close()


def test_storage_that_is_slower_than_training_is_asked_for_one_batch_at_a_time(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, asked = threading.Event(), []
    monkeypatch.setattr("paralm_data.ahead.os.pread", lambda *arguments: asked.append(1) or go.wait(30))
    loader, ahead = Loader(prepared.train, 9, 4), Ahead()
    for step in range(10):
        ahead.read(loader, step)
    go.set()
    assert ahead.wait(30)
    assert len(asked) == 4
    ahead.close()
