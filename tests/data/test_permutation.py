"""The permutation is a bijection, random access, keyed, uniform and the same for ever."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paralm_data import Permutation, random_permutation

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure


@relaxed
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_every_element_is_met_once(n: int, seed: int, epoch: int) -> None:
    images = random_permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))


@relaxed
@given(n=st.integers(1, 2**50), index=st.lists(st.integers(0, 2**50), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_an_element_does_not_depend_on_its_company(n: int, index: list[int], seed: int) -> None:
    places = np.array([i % n for i in index])
    order = Permutation(n, seed)
    together = order(places)
    assert [int(order(places[i : i + 1])[0]) for i in range(len(places))] == together.tolist()
    assert together.min() >= 0
    assert together.max() < n


def test_the_order_is_the_same_for_ever() -> None:
    # A change of these numbers would reshuffle every run that is continued.
    assert random_permutation(10, 0, 0, "windows")(np.arange(10)).tolist() == [2, 1, 7, 3, 0, 8, 4, 5, 6, 9]
    large = random_permutation(10**12, 7, 3, "windows")(np.arange(3)).tolist()
    assert large == [
        623937070649,
        202515951586,
        104221420724,
    ]


def test_seed_epoch_and_purpose_each_matter() -> None:
    orders = {
        tuple(random_permutation(1000, *key)(np.arange(1000)).tolist())
        for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    }
    assert len(orders) == 4


@pytest.mark.parametrize("n", [2, 3, 4])
def test_small_permutations_are_all_met(n: int) -> None:
    # Over 2400 keys each of n! orders is expected 2400/n! times; six standard deviations are allowed.
    counts = Counter(tuple(Permutation(n, "uniform", key)(np.arange(n)).tolist()) for key in range(2400))
    expected = 2400 / [1, 1, 2, 6, 24][n]
    for order in counts.values():
        assert abs(order - expected) < 6 * expected**0.5
    assert len(counts) == [1, 1, 2, 6, 24][n]


def test_neighbours_are_scattered() -> None:
    # The mean distance of two random places is n/3; its standard error over n pairs is about 0.24 n/√n.
    n = 100_000
    images = random_permutation(n, 1, 0)(np.arange(n))
    distance = np.abs(np.diff(images)).mean()
    assert abs(distance - n / 3) < 6 * 0.24 * n / n**0.5


def test_what_is_not_an_index_is_refused() -> None:
    with pytest.raises(IndexError):
        Permutation(5, 0)(np.array([5]))
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, 0)
