"""The collapse rule on curves whose onset is known: found within one bucket, and nothing found where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paralm.errors import UserError
from paralm.evaluation.collapse_rule import DELTA, FACTOR, Verdict, bucket_edges, departure, judge

T = 256
LENGTH = 64 * T
EDGES = bucket_edges(T, LENGTH)
PAST = EDGES.index(T)


def curves(onset: int | None, rise: float, noise: float, streams: int, seed: int, fall: float = 0.3) -> np.ndarray:
    """Loss that falls within T and stays, and from bucket ``onset`` on lies ``rise`` higher and rises on; every stream
    has a level of its own, and ``noise`` in each bucket."""
    draws = np.random.default_rng(seed)
    index = np.arange(len(EDGES) - 1)
    shape = 3.0 + fall * np.maximum(PAST - 1 - index, 0) / PAST
    if onset is not None:
        shape = shape + np.where(index >= onset, rise * (1 + 0.5 * (index - onset)), 0.0)
    return shape + draws.normal(0, 0.5, (streams, 1)) + draws.normal(0, noise, (streams, len(index)))


@settings(max_examples=20, deadline=None)
@given(
    onset=st.integers(PAST, len(EDGES) - 3),
    rise=st.floats(0.2, 3.0),
    noise=st.floats(0.0, 0.05),
    streams=st.integers(8, 24),
    seed=st.integers(0, 1 << 30),
)
def test_a_known_onset_is_found_within_one_bucket(
    onset: int, rise: float, noise: float, streams: int, seed: int
) -> None:
    found = judge(curves(onset, rise, noise, streams, seed), EDGES, T)
    assert found.verdict == "collapse"
    assert found.onset is not None
    assert found.onset_interval is not None
    assert abs(EDGES.index(int(found.onset) - 1) - onset) <= 1
    low, high = found.onset_interval
    assert low <= found.onset <= high < math.inf


@settings(max_examples=20, deadline=None)
@given(slope=st.floats(0.0, 0.1), noise=st.floats(0.0, 0.1), streams=st.integers(8, 24), seed=st.integers(0, 1 << 30))
def test_flat_and_falling_curves_do_not_collapse(slope: float, noise: float, streams: int, seed: int) -> None:
    flat = curves(None, 0.0, noise, streams, seed) - slope * np.arange(len(EDGES) - 1)
    assert judge(flat, EDGES, T).verdict != "collapse"


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_noise_alone_is_not_called_a_collapse(noise: float) -> None:
    called = [judge(curves(None, 0, noise, 8, seed), EDGES, T).verdict == "collapse" for seed in range(40)]
    assert sum(called) == 0


def test_a_rise_that_goes_away_is_none() -> None:
    x = curves(None, 0.0, 0.01, 8, 0)
    x[:, PAST + 1 : PAST + 5] += 1.0
    found = judge(x, EDGES, T)
    assert (found.verdict, found.onset, found.onset_interval) == ("none", None, None)
    assert max(found.rise) > 0.5


def test_one_raised_bucket_at_the_end_is_no_onset() -> None:
    x = curves(None, 0.0, 0.0, 8, 0)
    x[:, -1] += 1.0
    assert judge(x, EDGES, T).onset is None


@pytest.mark.parametrize(("rise", "expected"), [(DELTA * 0.98, "none"), (DELTA * 1.02, "collapse")])
def test_delta_is_the_least_rise(rise: float, expected: str) -> None:
    x = np.full((4, len(EDGES) - 1), 2.0)
    x[:, PAST:] += rise
    assert judge(x, EDGES, T).verdict == expected


def test_a_rise_in_a_minority_of_streams_is_not_certain() -> None:
    """Three of sixteen streams rise: the mean does by far more than δ, but not every draw of streams would."""
    x = curves(None, 0.0, 0.0, 16, 0)
    x[:3, PAST:] += 3.0
    assert judge(x, EDGES, T).verdict != "collapse"
    x[:, PAST:] += 3.0
    assert judge(x, EDGES, T).verdict == "collapse"


def test_what_is_not_resolved_is_said() -> None:
    assert judge(curves(None, 0.0, 0.0, 8, 0), EDGES, T).resolution == DELTA
    loud = judge(curves(None, 0.0, 0.5, 8, 0), EDGES, T)
    assert loud.resolution > 0.3
    assert f"{loud.resolution:.3f}" in loud.sentence


def test_the_reference_is_the_least_bucket_of_the_last_three_octaves_of_training() -> None:
    x = np.full((4, len(EDGES) - 1), 2.0)
    low = EDGES.index(64)  # bucket (64, 91]
    x[:, low] = 1.9
    x[:, 2] = 0.0  # positions this early have few tokens and are no reference
    found = judge(x, EDGES, T)
    assert found.reference == low
    assert found.verdict == "collapse"  # 0.1 above the least


def test_verdicts_survive_json() -> None:
    found = judge(curves(len(EDGES) - 3, 0.06, 0.03, 8, 2), EDGES, T)
    assert Verdict.model_validate_json(found.model_dump_json()) == found


def test_edges_stand_at_the_training_length_and_half_octaves() -> None:
    assert EDGES[0] == 0
    assert EDGES[-1] == LENGTH
    assert T in EDGES
    assert EDGES[PAST + 1] == round(T * math.sqrt(2))
    assert bucket_edges(10, 25) == [0, 1, 2, 4, 5, 7, 10, 14, 20, 25]
    assert bucket_edges(10, 22)[-3:] == [10, 14, 22]  # (20, 22] is too narrow


def test_too_little_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"length is 300.*at least 512"):
        bucket_edges(T, 300)
    with pytest.raises(UserError, match="streams is 3"):
        judge(np.ones((3, len(EDGES) - 1)), EDGES, T)
    x = np.ones((4, len(EDGES) - 1))
    x[2, -1] = math.inf
    with pytest.raises(UserError, match="stream 2: the loss is not finite"):
        judge(x, EDGES, T)


NAMES = {"layer": 1, "leaf": "ssm", "head": 3, "statistic": "norm"}


def norms(grow_from: int | None, by: float) -> np.ndarray:
    """Norms that grow to 10 within T and stay, then grow by ``by`` a checkpoint from ``grow_from`` on."""
    at = np.asarray(EDGES[1:])
    x = 10.0 * np.minimum(1.0, at / T) ** 0.25
    if grow_from is not None:
        x = np.where(at > grow_from, x * by, x)
    return x * np.random.default_rng(0).uniform(0.9, 1.0, (8, 1))


def test_a_head_that_leaves_its_range_is_found_with_its_onset() -> None:
    found = departure(norms(1024, 3.0), EDGES[1:], T, **NAMES)
    assert found is not None
    assert (found.layer, found.leaf, found.head, found.statistic) == (1, "ssm", 3, "norm")
    assert found.onset == round(1024 * math.sqrt(2))
    assert found.ratio > FACTOR
    assert found.onset_interval == (found.onset, found.onset)


def test_a_head_whose_state_dies_away_is_found() -> None:
    found = departure(norms(1024, 0.1), EDGES[1:], T, **NAMES)
    assert found is not None
    assert found.ratio < 1 / FACTOR


def test_a_head_within_its_range_is_not_found() -> None:
    assert departure(norms(None, 1.0), EDGES[1:], T, **NAMES) is None
    assert departure(norms(1024, 1.8), EDGES[1:], T, **NAMES) is None
    spike = norms(None, 1.0)
    spike[:, PAST + 2] *= 100
    assert departure(spike, EDGES[1:], T, **NAMES) is None
