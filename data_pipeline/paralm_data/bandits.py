"""Weights of sources learned while training: the bandits of FLAD (arXiv 2302.00674), EXP3 and UCB1.

An arm is a source, a round is a number of steps with one set of weights, and the reward R of a round's arm lies in
[−1, 1]: how well the source's gradient agrees with that of a target (their cosine). Both rules are as in the paper and
its authors' code; each has plain numbers as state, which JSON keeps to the last bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from paralm_data.errors import DataError


class Bandit(ABC):
    """``rounds`` are over; ``retired`` arms are never drawn again. Subclasses keep what they know in lists of K."""

    initial: bool
    """Whether every arm's reward is measured once before the first round."""

    def __init__(self, arms: int) -> None:
        if arms < 2:
            raise DataError(f"{arms} source has nothing to be weighed against; a learned mixture needs at least 2")
        self.arms, self.rounds, self.retired = arms, 0, [False] * arms
        self.rewards: list[float | None] = [None] * arms
        """The last reward of each arm, None before its first."""

    @abstractmethod
    def probabilities(self) -> list[float]:
        """Of the coming round, one for each arm, summing to 1; 0 for retired arms."""

    @abstractmethod
    def choose(self, uniform: float) -> int:
        """The arm whose reward the coming round asks for; ``uniform``: a number drawn from [0, 1)."""

    @abstractmethod
    def _learn(self, arm: int, reward: float) -> None: ...

    def start(self, rewards: list[float]) -> None:
        """What the arms' rewards are before the first round, where ``initial``."""
        self.rewards = [*rewards]

    def update(self, arm: int, reward: float | None) -> None:
        """End a round with the reward of ``arm``; None: it could not be measured, and nothing is learned."""
        if reward is not None:
            self._learn(arm, reward)
            self.rewards[arm] = reward
        self.rounds += 1

    @property
    def alive(self) -> list[int]:
        """Arms that are not retired."""
        return [arm for arm in range(self.arms) if not self.retired[arm]]

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-able."""
        return {key: list(v) if isinstance(v, list) else v for key, v in vars(self).items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state` gave. DataError if it is of another bandit."""
        if set(state) != set(vars(self)) or state["arms"] != self.arms:
            raise DataError("the saved state of the mixture's weights is of another kind or number of sources")
        for key, value in state.items():
            setattr(self, key, list(value) if isinstance(value, list) else value)


class Exp3(Bandit):
    """EXP3 (Auer, Cesa-Bianchi, Freund and Schapire 2002) as EXP3-FLAD has it. For K arms, in round t = 1, 2, …:

        E_t   = min(1/K, √(ln K / (K t)))                                       exploration rate
        π_t(a) = (1 − K E_t) exp(E_{t−1} R̂_{t−1}(a)) / Σ_b exp(E_{t−1} R̂_{t−1}(b)) + E_t
        R̂_t(a) = R̂_{t−1}(a) + R_{a,t} / π_t(a)                                  importance-weighted reward

    with R̂_0 = 0 and E_0 = 1/K. The arm that is rewarded is drawn from π_t (the authors reward every source that a
    batch happens to hold, and let t run ten times as fast as the batches). When arms retire, K and the sums are of
    those left.
    """

    initial = False

    def __init__(self, arms: int) -> None:
        super().__init__(arms)
        self.estimates = [0.0] * arms  # R̂

    @staticmethod
    def exploration(arms: int, round_: int) -> float:
        """E_t."""
        return 1 / arms if round_ < 1 else min(1 / arms, math.sqrt(math.log(arms) / (arms * round_)))

    def probabilities(self) -> list[float]:
        alive, found = self.alive, [0.0] * self.arms
        now, before = (self.exploration(len(alive), self.rounds + shift) for shift in (1, 0))
        largest = max(self.estimates[arm] for arm in alive)
        gibbs = [math.exp(before * (self.estimates[arm] - largest)) for arm in alive]
        total = math.fsum(gibbs)
        for arm, value in zip(alive, gibbs, strict=True):
            found[arm] = (1 - len(alive) * now) * value / total + now
        return found

    def choose(self, uniform: float) -> int:
        reached = 0.0
        for arm, probability in enumerate(self.probabilities()):
            reached += probability
            if uniform < reached:
                return arm
        return self.alive[-1]

    def _learn(self, arm: int, reward: float) -> None:
        self.estimates[arm] += reward / self.probabilities()[arm]


class Ucb1(Bandit):
    """UCB1 (Auer, Cesa-Bianchi and Fischer 2002) as UCB1-FLAD has it. In each round the arm with the largest

        R̂(a) + √(2 ln t / n_a)          n_a times it was measured, t = Σ_b n_b

    is all that is drawn, and its reward enters a moving average, R̂(a) ← (1 − β) R̂(a) + β R_a. Every arm is measured
    once before the first round, so n_a starts at 1 and R̂ with that reward. β is 0.1 in the authors' runs. Ties go to
    the first arm.
    """

    initial = True

    def __init__(self, arms: int, beta: float = 0.1) -> None:
        super().__init__(arms)
        if not 0 < beta <= 1:
            raise DataError(f"beta is {beta}; it must be above 0 and at most 1")
        self.beta = beta
        self.means = [0.0] * arms  # R̂
        self.counts = [1] * arms

    def start(self, rewards: list[float]) -> None:
        super().start(rewards)
        self.means = [*rewards]

    def indices(self) -> list[float]:
        """The upper confidence index of each arm, −∞ for retired ones."""
        total = sum(self.counts)
        return [
            -math.inf if gone else mean + math.sqrt(2 * math.log(total) / count)
            for mean, count, gone in zip(self.means, self.counts, self.retired, strict=True)
        ]

    def probabilities(self) -> list[float]:
        best = self.choose(0.0)
        return [float(arm == best) for arm in range(self.arms)]

    def choose(self, uniform: float) -> int:
        indices = self.indices()
        return indices.index(max(indices))

    def _learn(self, arm: int, reward: float) -> None:
        self.means[arm] = (1 - self.beta) * self.means[arm] + self.beta * reward
        self.counts[arm] += 1
