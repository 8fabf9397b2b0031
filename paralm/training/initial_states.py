"""What rows start from when not from zeros: noise fitted to the states that rows end in.

A model that has only ever started from zero knows no state but those within its training length of zero, and may
collapse beyond (arXiv 2507.02782). Of every leaf that a mixer names as free, and every head of it, the mean and the
mean square of its elements at the ends of rows are followed from step to step, over all ranks:

    μ ← (1 − a) μ + a μ_step,  q ← (1 − a) q + a q_step      a = RATE, 1 in the first step
    h_0 = μ + √(q − μ²) ε                                    ε normal, a function of (run.seed, step, row) alone

so a run that is continued, on any number of ranks, draws what it would have drawn. Other leaves (convolutions,
counters) start as always, and so does every row of the first step and every document within a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paralm.config import Config
from paralm.errors import ConfigError
from paralm.models import LanguageModel
from paralm.models.hybrid import mixer_names
from paralm.models.mixers.base import StateLeaf, map_leaves, named_leaves
from paralm.training import rng

RATE = 0.1


class StateNoise:
    """Moments of the free leaves' heads, and draws from them."""

    def __init__(self, model: LanguageModel, seed: int, device: torch.device) -> None:
        self.model, self.seed, self.device = model, seed, device
        found = [
            [self._heads(mixer.leaf(path), leaf) for path, leaf in named_leaves(mixer.initial_state(1, "meta"))]
            for mixer in model.mixers
        ]
        self.sizes = [heads for layer in found for heads in layer if heads]  # heads of each free leaf, in order
        if not self.sizes:
            raise ConfigError(
                f"training.initial_state: noise cannot be the state of mixer {mixer_names(model.config)}, which names "
                "no free leaf; use passed"
            )
        self.moments: Tensor | None = None  # (2, heads of all): mean and mean square, float64
        self._sums = self._none()

    def _heads(self, layout: StateLeaf, leaf: Tensor) -> int:
        return 0 if not layout.free else 1 if layout.heads is None else leaf.shape[layout.heads]

    def _none(self) -> Tensor:
        """(3, heads of all): Σ h, Σ h² and elements."""
        return torch.zeros(3, sum(self.sizes), dtype=torch.float64, device=self.device)

    def draw(self, step: int, rows: Sequence[int]) -> Any:
        """The state that global rows ``rows`` start ``step`` from; None: zeros."""
        if self.moments is None or not len(rows):
            return None
        draws = [torch.Generator().manual_seed(rng.derive(self.seed, "initial state", step, int(row))) for row in rows]
        mean, square = self.moments
        deviation = (square - mean * mean).clamp(min=0).sqrt()
        at = iter(zip(mean.cpu().split(self.sizes), deviation.cpu().split(self.sizes), strict=True))

        def drawn(layout: StateLeaf, leaf: Tensor) -> Tensor:
            if not layout.free:
                return leaf
            mu, sigma = (_along(values, layout, leaf.ndim).to(leaf.dtype) for values in next(at))
            noise = [torch.randn(leaf.shape[1:], generator=draw, dtype=leaf.dtype) for draw in draws]
            return (mu + sigma * torch.stack(noise)).to(self.device)

        layers = []
        for mixer in self.model.mixers:
            fresh = mixer.initial_state(len(rows), self.device)
            layers.append(map_leaves(lambda path, leaf, mixer=mixer: drawn(mixer.leaf(path), leaf), fresh))
        return {"layers": tuple(layers)}

    def add(self, state: Any) -> None:
        """Count the rows' last state (detached) in this step's moments."""
        found = []
        for mixer, layer in zip(self.model.mixers, state["layers"], strict=True):
            for path, leaf in named_leaves(layer):
                layout = mixer.leaf(path)
                if layout.free:
                    heads = leaf.unsqueeze(1) if layout.heads is None else leaf.movedim(layout.heads, 1)
                    wide = heads.detach().double().transpose(0, 1).flatten(1)
                    count = wide.new_full((len(wide),), wide.shape[1])
                    found.append(torch.stack((wide.sum(1), wide.square().sum(1), count)))
        self._sums += torch.cat(found, 1)

    def finish(self, reduce: Callable[[Tensor], Any], good: bool) -> None:
        """End the step: ``reduce`` sums a tensor over the ranks in place; a step that was bad leaves no trace."""
        reduce(self._sums)
        sums, self._sums = self._sums, self._none()
        now = sums[:2] / sums[2].clamp(min=1)
        if good and bool(torch.isfinite(now).all()) and bool((sums[2] > 0).all()):
            self.moments = now if self.moments is None else torch.lerp(self.moments, now, RATE)

    def state(self) -> list[list[float]] | None:
        """For a checkpoint: numbers that JSON keeps to the last bit."""
        return None if self.moments is None else self.moments.tolist()

    def load(self, state: list[list[float]] | None) -> None:
        """Go on with what :meth:`state` gave."""
        self.moments = None if state is None else torch.tensor(state, dtype=torch.float64, device=self.device)


def _along(values: Tensor, layout: StateLeaf, ndim: int) -> Tensor:
    """(heads,) so that it broadcasts to a leaf of ``ndim`` axes."""
    shape = [1] * ndim
    if layout.heads is not None:
        shape[layout.heads] = len(values)
    return values.view(shape)


def check_states(config: Config, model: LanguageModel) -> None:
    """ConfigError, one line, if rows of ``model`` (shapes are enough) cannot start from what ``training`` says."""
    training = config.training
    if (training.carry_state or training.initial_state != "zero") and not model.bounded_state:
        key = "carry_state" if training.carry_state else "initial_state"
        raise ConfigError(
            f"training.{key}: the state of mixer {mixer_names(config.model)} grows with the "
            "sequence; use a recurrent mixer"
        )
    if training.initial_state == "noise":
        StateNoise(model, config.run.seed, torch.device("meta"))  # refuses a model that has none
