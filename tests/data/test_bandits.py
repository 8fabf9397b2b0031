"""EXP3 and UCB1 of FLAD: their updates by hand, what their state keeps, and which source they come to prefer."""

from __future__ import annotations

import json
import math
import random

import pytest
from paralm_data import Bandit, DataError, Exp3, Ucb1


def test_exp3_by_hand() -> None:
    bandit = Exp3(2)
    assert bandit.probabilities() == [0.5, 0.5]  # E_1 = min(1/2, sqrt(ln 2 / 2)) = 1/2
    bandit.update(0, 0.4)
    assert bandit.estimates == [0.8, 0.0]  # 0.4 / (1/2)
    # E_2 = sqrt(ln 2 / 4) = 0.4162773, E_1 = 1/2: (1 − 2 E_2) e^0.4 / (e^0.4 + 1) + E_2
    assert bandit.probabilities() == pytest.approx([0.5165248, 0.4834752], abs=1e-7)
    bandit.update(1, -0.2)
    assert bandit.estimates == pytest.approx([0.8, -0.4136717], abs=1e-7)  # −0.2 / 0.4834752
    # E_3 = sqrt(ln 2 / 6) = 0.3398890: (1 − 2 E_3) / (1 + e^(−0.4162773 · 1.2136717)) + E_3
    assert bandit.probabilities() == pytest.approx([0.5396070, 0.4603930], abs=1e-7)
    assert bandit.choose(0.5396) == 0
    assert bandit.choose(0.5397) == 1


def test_ucb1_by_hand() -> None:
    bandit = Ucb1(2, beta=0.1)
    bandit.start([0.1, 0.3])
    # t = 2, n = (1, 1): the bonus is sqrt(2 ln 2) = 1.1774100 for both
    assert bandit.indices() == pytest.approx([1.2774100, 1.4774100], abs=1e-7)
    assert bandit.probabilities() == [0.0, 1.0]
    bandit.update(1, 0.5)
    assert bandit.means == pytest.approx([0.1, 0.32])  # 0.9 · 0.3 + 0.1 · 0.5
    # t = 3, n = (1, 2): sqrt(2 ln 3) = 1.4823038, sqrt(ln 3) = 1.0481470
    assert bandit.indices() == pytest.approx([1.5823038, 1.3681470], abs=1e-7)
    assert bandit.choose(0.0) == 0


def test_exploration_falls_and_never_below_the_uniform_draw_of_few_rounds() -> None:
    assert Exp3.exploration(3, 0) == Exp3.exploration(3, 1) == 1 / 3
    assert Exp3.exploration(3, 100) == pytest.approx(math.sqrt(math.log(3) / 300))


@pytest.mark.parametrize("bandit", [Exp3(4), Ucb1(4)])
def test_probabilities_sum_to_one_and_leave_out_the_retired(bandit: Bandit) -> None:
    draw = random.Random(1)
    bandit.start([draw.uniform(-1, 1) for _ in range(4)])
    for round_ in range(60):
        found = bandit.probabilities()
        assert math.fsum(found) == pytest.approx(1, abs=1e-12)
        assert all((value == 0) >= gone for value, gone in zip(found, bandit.retired))
        arm = bandit.choose(draw.random())
        assert not bandit.retired[arm]
        bandit.update(arm, draw.uniform(-1, 1))
        if round_ in (20, 35, 50):
            bandit.retired[bandit.alive[0]] = True
    assert bandit.alive == [3]
    assert bandit.probabilities() == [0, 0, 0, 1]


def test_long_after_one_arm_won_no_number_overflows() -> None:
    bandit = Exp3(3)
    for _ in range(20_000):
        bandit.update(0, 1.0)
    assert bandit.probabilities()[0] > 0.98
    bandit.estimates[0] = 1e300
    assert math.fsum(bandit.probabilities()) == pytest.approx(1)


@pytest.mark.parametrize("kind", [Exp3, Ucb1])
def test_a_saved_bandit_goes_on_as_the_one_that_was_not(kind: type[Bandit]) -> None:
    draw = random.Random(2)
    uninterrupted = kind(3)  # type: ignore[call-arg]
    uninterrupted.start([draw.uniform(-1, 1) for _ in range(3)])
    rewards = [draw.uniform(-1, 1) for _ in range(50)]
    for reward in rewards[:20]:
        uninterrupted.update(uninterrupted.choose(0.6), reward)
    resumed = kind(3)  # type: ignore[call-arg]
    resumed.load(json.loads(json.dumps(uninterrupted.state())))
    for reward in rewards[20:]:
        for bandit in (uninterrupted, resumed):
            bandit.update(bandit.choose(0.6), reward)
    assert resumed.state() == uninterrupted.state()


def test_a_reward_that_could_not_be_measured_teaches_nothing() -> None:
    for bandit in (Exp3(2), Ucb1(2)):
        bandit.start([0.2, 0.1])
        before = bandit.state()
        bandit.update(0, None)
        assert bandit.state() == {**before, "rounds": 1}


@pytest.mark.parametrize(("kind", "share"), [(Exp3, 0.6), (Ucb1, 0.7)])
def test_the_source_that_agrees_wins_and_the_one_that_opposes_loses(kind: type[Bandit], share: float) -> None:
    """Losses |w − c|²/2 of three sources and a target: one pulls as the target does, one away, one to the side."""
    draw = random.Random(3)
    target, centres = [10.0, 0.0], [[0.0, 10.0], [10.0, 0.5], [-10.0, 0.0]]
    weights, played = [0.0, 0.0], [0, 0, 0]

    def gradient(centre: list[float]) -> list[float]:
        return [w - c + draw.gauss(0, 1) for w, c in zip(weights, centre)]

    def reward(arm: int) -> float:
        one, two = gradient(centres[arm]), gradient(target)
        return sum(a * b for a, b in zip(one, two)) / math.hypot(*one) / math.hypot(*two)

    bandit = kind(3)  # type: ignore[call-arg]
    bandit.start([reward(arm) for arm in range(3)])
    for _ in range(400):
        chances = bandit.probabilities()
        arm = bandit.choose(draw.random())
        found = reward(arm)
        bandit.update(arm, found)
        played[arm] += 1
        weights = [w - 0.002 * sum(p * (w - c[i]) for p, c in zip(chances, centres)) for i, w in enumerate(weights)]
    assert played[1] > share * 400
    assert played[2] < 0.15 * 400
    chances = bandit.probabilities()
    assert max(chances) == chances[1]
    assert min(chances) == chances[2]


def test_bandits_that_cannot_be() -> None:
    with pytest.raises(DataError, match="1 source has nothing"):
        Exp3(1)
    with pytest.raises(DataError, match="beta is 0"):
        Ucb1(2, beta=0)
    with pytest.raises(DataError, match="another kind or number"):
        Ucb1(2).load(Exp3(2).state())
    with pytest.raises(DataError, match="another kind or number"):
        Exp3(2).load(Exp3(3).state())
