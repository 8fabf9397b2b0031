"""Rewards of a learned mixture: the cosine between the gradient of a source's text and that of the target's.

    R_a = ⟨∇_a, ∇_T⟩ / (‖∇_a‖ ‖∇_T‖)        arXiv 2302.00674

Both gradients are of the mean loss over ``data.mixture.rows`` windows that (seed, step) draws, apart from those that
are trained on: measuring changes nothing of training. Every rank computes both whole, from the weights it has or (at
ZeRO-3) gathers layer by layer, by ``torch.autograd.grad``, which runs none of the hooks that reduce, cut or accumulate
gradients; so a reward does not depend on the ranks, the stage or the micro-batches but for rounding, and it is rounded
to multiples of GRID, which hides that almost always. Rank 0's is everyone's.

Cost: every ``data.mixture.every`` steps two forwards of ``rows`` windows on every rank, and two backwards through the
last block and the head (``gradient: last_block``) or the whole model (``all``); memory for two fp32 gradients of those
parameters. No dropout. The authors compare gradients of the last layer too (``reward_model_partition``, the head's).
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from paralm_data import IGNORE, Batch, MixtureLoader, TokenStore, random_windows
from torch import Tensor

from paralm.config import Config
from paralm.training.together import broadcast

GRID = 2**-10


class Alignment:
    """Measures rewards with a DeepSpeed engine; ``target``: the store whose gradient counts."""

    def __init__(self, engine: Any, config: Config, loader: MixtureLoader, target: TokenStore, device: torch.device):
        assert config.data.mixture is not None
        self.engine, self.loader, self.target, self.device = engine, loader, target, device
        self.seed, self.rows, self.micro = config.run.seed, config.data.mixture.rows, config.training.micro_batch_size
        module = engine.module
        parts = [module] if config.data.mixture.gradient == "all" else [module.layers[-1], module.norm]
        self.parameters = [parameter for part in parts for parameter in part.parameters()]

    def rewards(self, arms: list[int], step: int) -> list[float | None]:
        """Of each of ``arms`` with the weights as they are; None where a gradient is not finite. A collective."""
        training = self.engine.module.training
        self.engine.eval()
        target = self._gradient(self.target, "target", step)
        found = [_cosine(self._gradient(self.loader.sources[arm].store, str(arm), step), target) for arm in arms]
        self.engine.train(training)
        agreed: list[float | None] = broadcast(found)
        return agreed

    def _gradient(self, store: TokenStore, name: str, step: int) -> list[Tensor]:
        """Of the mean loss, in fp32, one tensor for each of the parameters."""
        batch = random_windows(store, self.loader.seq_len, self.rows, self.seed, "alignment", name, step)
        sums: list[Tensor] = []
        for first in range(0, len(batch.rows), self.micro):
            pieces = self._gradients(batch, slice(first, first + self.micro))
            if sums:
                torch._foreach_add_(sums, pieces)
            else:
                sums = pieces
        torch._foreach_div_(sums, max(1, int((batch.labels != IGNORE).sum())))
        return sums

    def _gradients(self, batch: Batch, rows: slice) -> list[Tensor]:
        tokens, labels, reset = (x[rows].to(self.device) for x in (batch.tokens, batch.labels, batch.reset))
        with torch.enable_grad():
            loss = self.engine.module(tokens, labels=labels, reset=reset).loss  # the engine's own call hooks backwards
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        return [gradient.detach().float() for gradient in found]


def _cosine(one: list[Tensor], two: list[Tensor]) -> float | None:
    """In float64, a multiple of GRID; None if it is not finite, 0 if either gradient is."""
    products = torch.zeros(3, dtype=torch.float64, device=one[0].device)
    for a, b in zip(one, two, strict=True):
        x, y = a.double().flatten(), b.double().flatten()
        products += torch.stack((x @ y, x @ x, y @ y))
    dot, first, second = products.tolist()
    if not all(map(math.isfinite, (dot, first, second))):
        return None
    if not first * second:
        return 0.0
    return round(max(-1.0, min(1.0, dot / math.sqrt(first) / math.sqrt(second))) / GRID) * GRID


class Learner:
    """Tells a learned mixture its rewards when they are due."""

    def __init__(self, loader: MixtureLoader, alignment: Alignment) -> None:
        self.loader, self.alignment = loader, alignment
        self.seconds: float | None = None
        """What the last call of :meth:`after` took, None if nothing was due."""

    def begin(self, step: int) -> None:
        """Measure every source before the first step, if the bandit wants that; a collective."""
        if self.loader.unmeasured:
            found = self.alignment.rewards(list(range(len(self.loader.sources))), step)
            self.loader.begin([reward or 0.0 for reward in found])

    def after(self, step: int) -> None:
        """Called when ``step`` steps are finished; a collective where a round ends."""
        arm = self.loader.due(step)
        self.seconds = None
        if arm is not None:
            start = time.perf_counter()
            self.loader.learn(step, self.alignment.rewards([arm], step)[0])
            self.seconds = time.perf_counter() - start
