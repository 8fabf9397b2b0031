"""Batches out of several stores, each drawn as often as its weight says.

The rows of all steps are one stream: row r of step s is its element s·G + r. :class:`~paralm_data.quota.Quota` says
which source an element is from, never more than one row off the weights, and the element is that source's next window,
in the order that :class:`~paralm_data.orders.Windows` would read it alone: every window once an epoch, each epoch in an
order of its own, counted for each source by itself. With fixed weights a batch is a function of (seed, step), and the
next step is all the state there is.

Learned weights change between rounds of ``every`` steps: a batch is then a function of (seed, step, the rewards of the
rounds before), and what rounds have left behind is part of the state. Neither depends on the number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paralm_data.bandits import Bandit
from paralm_data.errors import DataError
from paralm_data.loader import Batch, StepLoader, labelled
from paralm_data.orders import Rows, Spans, Windows, width
from paralm_data.permutation import random_permutation
from paralm_data.quota import RESOLUTION, Quota, shares
from paralm_data.store import TokenStore


@dataclass(frozen=True, eq=False)
class MixtureSource:
    """A store with its weight (relative to the others'), read ``max_epochs`` times at most; None: any number."""

    name: str
    store: TokenStore
    weight: float = 1.0
    max_epochs: float | None = None


def temperature_weights(sizes: Sequence[int], temperature: float) -> list[float]:
    """p_i ∝ n_i^(1/T): in proportion to the sizes at T = 1, towards equal weights as T grows."""
    if not temperature > 0:
        raise DataError(f"the temperature is {temperature}; it must be above 0")
    largest = max(sizes)
    raw = [(size / largest) ** (1 / temperature) for size in sizes]
    return [value / math.fsum(raw) for value in raw]


def random_windows(store: TokenStore, seq_len: int, rows: int, seed: int, *purpose: int | str) -> Batch:
    """``rows`` windows of a store (all, if it has fewer) that (seed, purpose) draws, without one twice."""
    order = Windows(store, seq_len, rows, seed)
    rows = min(rows, order.n_samples)
    draw = random_permutation(order.n_samples, seed, 0, "\0".join(map(str, purpose)))
    raw = order.read(draw(np.arange(rows, dtype=np.int64)))
    found = Rows(raw, np.full(rows, seq_len, np.int64), np.zeros(rows, np.bool_), 0.0)
    return labelled(found, store.manifest, 0, np.arange(rows, dtype=np.int64))


class MixtureLoader(StepLoader):
    """Reads ``sources`` in windows of ``seq_len`` tokens, each as its weight says, or as ``bandit`` learns.

    With a bandit: weights change every ``every`` steps, when :meth:`learn` is told the reward of the arm that
    :meth:`due` named. Raises DataError for sources that cannot be mixed, or an argument out of range.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        seq_len: int,
        global_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        bandit: Bandit | None = None,
        every: int = 1,
        part: slice | None = None,
    ) -> None:
        super().__init__(seq_len, global_batch_size, seed, rank, world_size, part)
        _check_sources(sources)
        if every < 1:
            raise DataError(f"the weights' interval is {every} steps; it must be at least 1")
        if bandit is not None and bandit.arms != len(sources):
            raise DataError(f"{len(sources)} sources for a bandit of {bandit.arms} arms")
        self.sources, self.bandit, self.every = list(sources), bandit, every
        self._windows = [Windows(source.store, seq_len, global_batch_size, seed, self.part) for source in sources]
        self.n_samples = [windows.n_samples for windows in self._windows]
        self._limits = [
            None if source.max_epochs is None else math.floor(source.max_epochs * count)
            for source, count in zip(sources, self.n_samples, strict=True)
        ]
        self._start = 0  # the round's first step; with fixed weights there is one round
        self._drawn = [0] * len(sources)  # rows of each source before it
        self._quota = Quota(shares([source.weight for source in sources]))
        self._measured = bandit is None or not bandit.initial
        if bandit is not None and self._measured:
            self._begin(0, [0] * len(sources))

    # -- batches ---------------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of ``step``; with a bandit, of a step of the present round."""
        self._check_step(step)
        if not self.knows(step):
            raise DataError(
                f"step {step}: its weights are not known here; a learned mixture knows those of the steps from "
                f"{self._start} on, until step {self._start + self.every} is reached"
            )
        sources, drawn = self._draw(step)
        steps = width(self.part)
        tokens = np.empty((len(sources), steps + 1), self.sources[0].store.tokens.dtype)
        for source, mine, samples in drawn:
            tokens[mine] = self._windows[source].read(samples)
        raw = Rows(
            tokens=tokens,
            valid=np.full(len(tokens), steps, np.int64),
            continues=np.zeros(len(tokens), np.bool_),
            epoch=step * self.global_batch_size / sum(self.n_samples),
        )
        return labelled(raw, self.sources[0].store.manifest, step, self._numbers, sources)

    def _draw(self, step: int) -> tuple[NDArray[np.int64], list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]]:
        """The source of each row of ``step``; and of each source that has any: which they are, and their windows."""
        first = (step - self._start) * self.global_batch_size
        sources, places = self._quota.draw(first + self._rows.start, len(self._rows))
        found = []
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            first_window = self._drawn[source] + int(places[mine[0]])
            found.append((source, mine, self._windows[source].samples(first_window, len(mine))))
        return sources, found

    def spans(self, step: int) -> list[tuple[TokenStore, Spans]]:
        if not self.knows(step):
            return []
        _, drawn = self._draw(step)
        return [(self.sources[source].store, self._windows[source].spans_of(samples)) for source, _, samples in drawn]

    def knows(self, step: int) -> bool:
        """Whether the weights of ``step`` are known."""
        return self.bandit is None or (self._measured and self._start <= step < self.known_until)

    @property
    def known_until(self) -> int:
        """The first step after the present round, with a bandit."""
        return self._start + self.every

    def counts(self, step: int) -> list[int]:
        """Rows of each source in the first ``step`` steps (with a bandit: up to the present round's last)."""
        rows = self._quota.counts((step - self._start) * self.global_batch_size)
        return [before + now for before, now in zip(self._drawn, rows, strict=True)]

    @property
    def weights(self) -> list[float]:
        """Of each source, as they are drawn now: whole numbers of 2⁻¹⁶, summing to 1."""
        return [part / RESOLUTION for part in self._quota.parts]

    def report(self, step: int) -> dict[str, dict[str, float]]:
        """For each source by name: what was drawn of it in the first ``step`` steps, its weight, and what is learned.

        ``tokens``, ``epochs``, and ``weight`` in the step that comes; with a bandit ``probability`` and, once measured,
        the last ``reward``.
        """
        found: dict[str, dict[str, float]] = {}
        chances = self.bandit.probabilities() if self.bandit is not None else None
        for i, (source, rows) in enumerate(zip(self.sources, self.counts(step), strict=True)):
            row = {"tokens": rows * self.seq_len, "epochs": rows / self.n_samples[i], "weight": self.weights[i]}
            if self.bandit is not None and chances is not None:
                row["probability"] = chances[i]
                reward = self.bandit.rewards[i]
                row |= {} if reward is None else {"reward": reward}
            found[source.name] = row
        return found

    def check_budget(self, steps: int) -> None:
        """DataError, one line, if ``steps`` steps cannot be filled without reading a source more often than it may."""
        if self.bandit is None:
            self._check_fixed(steps)
            return
        if any(limit is None for limit in self._limits):
            return
        # A source retires with less than this many windows left (_begin), and a round begins after the last step, too.
        round_ = self.every * self.global_batch_size + len(self.sources)
        there = sum(max(0, limit - round_) for limit in self._limits if limit is not None)
        wanted = steps * self.global_batch_size
        if there < wanted:
            raise DataError(
                f"data.mixture: {steps} steps draw {wanted:,} windows, and the sources have {there:,} within their "
                f"max_epochs; lower training.max_steps to {there // self.global_batch_size}, or raise max_epochs"
            )

    def _check_fixed(self, steps: int) -> None:
        for i, (source, limit) in enumerate(zip(self.sources, self._limits, strict=True)):
            rows = self._quota.counts(steps * self.global_batch_size)[i]
            if limit is None or rows <= limit:
                continue
            low, high = 0, steps  # the last number of steps that fits lies in [low, high)
            while high - low > 1:
                middle = (low + high) // 2
                fits = self._quota.counts(middle * self.global_batch_size)[i] <= limit
                low, high = (middle, high) if fits else (low, middle)
            raise DataError(
                f"data.mixture.sources.{source.name}: {steps} steps read it {rows / self.n_samples[i]:.3g} times, and "
                f"it may be read {source.max_epochs:g} times; lower training.max_steps to {low}, lower its weight, or "
                "raise its max_epochs (with at_end: repeat)"
            )

    # -- learning --------------------------------------------------------------------------------------------

    @property
    def unmeasured(self) -> bool:
        """Whether every arm's reward is to be measured (:meth:`begin`) before the first batch."""
        return not self._measured

    def begin(self, rewards: Sequence[float]) -> None:
        """The rewards of all arms, where :attr:`unmeasured`."""
        assert self.bandit is not None
        self.bandit.start(list(rewards))
        self._measured = True
        self._begin(self._start, [0] * len(self.sources))

    def due(self, step: int) -> int | None:
        """The arm whose reward is asked for when ``step`` steps are finished, or None within a round."""
        if self.bandit is None or step != self._start + self.every:
            return None
        text = repr((self.seed, "mixture", self._start)).encode()
        uniform = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") / 2**64
        return self.bandit.choose(uniform)

    def learn(self, step: int, reward: float | None) -> None:
        """End the round with the reward of the arm that ``due(step)`` named, None if it could not be measured."""
        arm = self.due(step)
        assert self.bandit is not None
        assert arm is not None
        rows = self.every * self.global_batch_size
        drawn, owed = self.counts(step), self._quota.owing(rows)
        self.bandit.update(arm, reward)
        self._drawn = drawn
        self._begin(step, owed)

    def _begin(self, step: int, owed: list[int]) -> None:
        """Begin a round with the bandit's weights; sources that might not last through it retire."""
        bandit = self.bandit
        assert bandit is not None
        rows = self.every * self.global_batch_size
        while True:
            if not bandit.alive:
                raise DataError(
                    f"data.mixture: every source has been read as often as it may before step {step + 1}; "
                    "raise max_epochs"
                )
            parts = shares(bandit.probabilities())
            short = [
                arm
                for arm, limit in enumerate(self._limits)
                if limit is not None
                and parts[arm]
                and self._drawn[arm] + -(-rows * parts[arm] // RESOLUTION) + len(parts) > limit
            ]
            if not short:
                break
            owed = [0] * len(parts)  # who is owed by one that has gone is owed nothing
            for arm in short:
                bandit.retired[arm] = True
        self._start, self._quota = step, Quota(parts, owed)

    # -- state -----------------------------------------------------------------------------------------------

    def start_at(self, step: int) -> None:
        super().start_at(step)
        if self.bandit is not None:
            self._start = step
            if self._measured:
                self._begin(step, [0] * len(self.sources))

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        if self.bandit is not None:
            found["learned"] = {
                "start": self._start,
                "drawn": self._drawn,
                "parts": self._quota.parts,
                "owed": self._quota.owed,
                "measured": self._measured,
                "bandit": self.bandit.state(),
            }
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.bandit is None:
            super().load_state_dict(state)
            return
        learned = state.get("learned")
        if not isinstance(learned, dict):
            raise DataError("the loader's saved state has no 'learned'; its mixture was of fixed weights")
        super().load_state_dict({**state, "learned": self.state_dict()["learned"]})
        self.bandit.load(learned["bandit"])
        self._start, self._drawn, self._measured = learned["start"], list(learned["drawn"]), learned["measured"]
        self._quota = Quota(learned["parts"], learned["owed"])

    def _identity(self) -> dict[str, Any]:
        kind = None if self.bandit is None else [type(self.bandit).__name__, self.every]
        return {
            "order": "windows",
            "store": [[source.name, source.store.manifest.fingerprint, source.max_epochs] for source in self.sources],
            "weights": kind if kind is not None else self._quota.parts,
        }


def _check_sources(sources: Sequence[MixtureSource]) -> None:
    if not sources:
        raise DataError("a mixture needs at least one source")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise DataError(f"two sources of the mixture are named '{max(names, key=names.count)}'")
    first = sources[0]
    for source in sources:
        if not (source.weight >= 0 and math.isfinite(source.weight)):
            raise DataError(f"source '{source.name}' has weight {source.weight}; it must be 0 or more")
        if source.max_epochs is not None and not source.max_epochs > 0:
            raise DataError(f"source '{source.name}' has max_epochs {source.max_epochs}; it must be above 0")
        if source.store.tokenizer_sha256 != first.store.tokenizer_sha256:
            raise DataError(
                f"sources '{first.name}' and '{source.name}' were made with different tokenizers "
                f"({first.store.tokenizer_sha256[:12]}… and {source.store.tokenizer_sha256[:12]}…); a mixture has one"
            )
    if not any(source.weight > 0 for source in sources):
        raise DataError("every source of the mixture has weight 0")
