"""One optimizer step over the global batch: micro-batches, token weighting, the finite check, carried states.

The loss of a step is Σ (token losses over all ranks) / (unmasked tokens over all ranks), whatever the split:
DeepSpeed averages over ranks and micro-batches, so each micro-batch's *sum* is scaled by
ranks · micro-batches / tokens. A rank short of rows runs fully masked ones, which add exactly nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from paralm_data import IGNORE, Batch
from torch.utils import _pytree as pytree

from paralm.config import Config
from paralm.training.engine import grad_accum_steps
from paralm.training.grid import Grid
from paralm.training.initial_states import StateNoise
from paralm.training.optimizers import Partitioned

# A solve stops below about 1e-6 of 1 + |h|; a last update above this is a trajectory that was not found.
UNSOLVED = 1e-3


@dataclass
class StepResult:
    """What one step did; sums are over all ranks."""

    loss: float  # nats per unmasked token
    aux: float  # auxiliary losses (z-loss), per unmasked token
    tokens: int  # unmasked tokens
    grad_norm: float
    bad: bool  # the update was skipped: a non-finite loss or gradient, or a solve out of bounds
    spike: bool  # the update was skipped: the loss stood out (optimizer.skip_spikes)
    stop_signal: int  # a signal some rank received, 0 for none
    seconds: dict[str, float]
    newton: dict[str, float] = field(default_factory=dict)


class SpikeGuard:
    """Finds losses that lie more than ``sigmas`` standard deviations above the mean of the last ``window``.

    A spike enters the window too, so that a lasting rise is soon no spike any more. With fewer losses than half the
    window nothing is one. Every rank sees the same losses, so every rank decides alike.
    """

    def __init__(self, sigmas: float, window: int) -> None:
        self.sigmas, self.losses = sigmas, deque[float](maxlen=window)

    def found(self, loss: torch.Tensor) -> bool:
        """Whether ``loss`` (a scalar, waited for only when the guard is on) is a spike."""
        if not self.sigmas or 2 * len(self.losses) < (self.losses.maxlen or 0):
            return False
        mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
        return float(loss) > mean + self.sigmas * deviation

    def note(self, loss: float) -> None:
        if self.sigmas:
            self.losses.append(loss)

    def state(self) -> list[float]:
        return list(self.losses)

    def load(self, losses: list[float]) -> None:
        self.losses.extend(losses)


class Stepper:
    """Takes optimizer steps with a DeepSpeed engine."""

    def __init__(self, engine: Any, optimizer: Partitioned, config: Config, device: torch.device, grid: Grid) -> None:
        self.engine, self.optimizer, self.device, self.grid = engine, optimizer, device, grid
        self.world_size = grid.world_size
        self.spikes = SpikeGuard(config.optimizer.skip_spikes.sigmas, config.optimizer.skip_spikes.window)
        self.micro = config.training.micro_batch_size
        self.micros = grad_accum_steps(config, grid.world_size)
        self.consecutive = config.training.carry_state  # rows go on where the same rows of the step before ended
        self.carry = self.consecutive or config.training.initial_state == "passed"
        self.noise: StateNoise | None = None
        if config.training.initial_state == "noise":
            self.noise = StateNoise(engine.module, config.run.seed, device)
        self.carried: list[Any] = [None] * self.micros

    def _micro_batches(self, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(tokens, labels, reset) of each micro-batch; a fully masked row where this rank has none left."""
        reset = batch.reset
        if self.consecutive:
            reset = reset.clone()
            reset[:, 0] |= ~torch.as_tensor(batch.continues)
        pieces = []
        for index in range(self.micros):
            rows = slice(index * self.micro, (index + 1) * self.micro)
            tokens, labels, starts = batch.tokens[rows], batch.labels[rows], reset[rows]
            if len(tokens) == 0:
                width = batch.tokens.shape[1]
                tokens = torch.zeros((1, width), dtype=torch.int64)
                labels = torch.full((1, width), IGNORE, dtype=torch.int64)
                starts = torch.zeros((1, width), dtype=torch.bool)
            pieces.append((tokens.to(self.device), labels.to(self.device), starts.to(self.device)))
        return pieces

    def _sum(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Sum over ranks of a few scalars, in float64."""
        vector = torch.stack([v.detach().to(self.device, torch.float64) for v in values])
        dist.all_reduce(vector)
        return vector

    def run(self, batch: Batch, step: int, lr: float, stop_signal: Callable[[], int], timed: bool) -> StepResult:
        """Forward, backward and update for this rank's rows of a global batch; ``step`` steps were finished before.

        ``stop_signal`` is asked last of all; the ranks agree on the largest answer. ``timed`` waits for the device
        between the phases, so that their times mean something.
        """
        start = time.perf_counter()
        pieces = self._micro_batches(batch)
        tokens = self._sum([sum(((labels != IGNORE).sum() for _, labels, _ in pieces), torch.tensor(0))])[0]
        scale = self.world_size * self.micros / tokens.clamp(min=1)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        aux_sum = torch.zeros_like(loss_sum)
        stats: dict[str, Any] = {}
        for index, (ids, labels, reset) in enumerate(pieces):
            rows = batch.rows[index * self.micro : (index + 1) * self.micro]
            start_state = self.carried[index] if self.noise is None else self.noise.draw(step, rows.tolist())
            output = self.engine(ids, labels=labels, state=start_state, reset=reset)
            if self.noise is not None and len(rows):
                self.noise.add(output.state)
            if self.carry:
                self.carried[index] = pytree.tree_map(torch.Tensor.detach, output.state)
            total = output.loss + output.aux
            # A loss that is not finite, or a recurrence that was not solved, makes the whole gradient NaN, on every
            # rank after the reduction, and the engine then skips the update: one decision, taken without waiting for
            # the device.
            good = torch.isfinite(total.detach()) & _solved(output.stats, self.device)
            factor = torch.where(good, scale, torch.nan).to(total.dtype)
            self.engine.backward(total * factor)
            loss_sum += output.loss.detach()
            aux_sum += output.aux.detach()
            _merge(stats, output.stats)
            if index + 1 < len(pieces):
                self.engine.step()
        self._wait(timed)
        middle = time.perf_counter()
        sums = self._sum([loss_sum, aux_sum]) / tokens.clamp(min=1)
        spike = self.spikes.found(sums[0])
        self.optimizer.skip, self.optimizer.steps_taken = spike, step
        self.engine.step()
        self._wait(timed)
        end = time.perf_counter()
        names = sorted(stats)  # the same on every rank: they come from the model's layers
        largest = torch.tensor([float(stop_signal()), *(float(stats[name]) for name in names)], dtype=torch.float64)
        dist.all_reduce(largest := largest.to(self.device), op=dist.ReduceOp.MAX)
        stop, *values = largest.tolist()
        loss = float(sums[0])
        norm = self.engine.get_global_grad_norm()
        bad = bool(self.engine.optimizer.overflow)
        if not bad:
            self.spikes.note(loss)
        if self.noise is not None:
            self.noise.finish(dist.all_reduce, not bad)
        if bad and self.carry:
            self.carried = [None] * self.micros  # one bad state would make every later step a bad one
        return StepResult(
            loss=loss,
            aux=float(sums[1]),
            tokens=int(tokens),
            grad_norm=float(norm) if norm is not None else float("nan"),
            bad=bad,
            spike=spike and not bad,
            stop_signal=int(stop),
            seconds={"forward_backward": middle - start, "step": end - middle},
            newton=dict(zip(names, values, strict=True)),
        )

    def _wait(self, timed: bool) -> None:
        if timed and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def carried_rows(self, rows: int) -> list[torch.Tensor] | None:
        """The carried states' leaves, this rank's ``rows`` rows in order; None when there are none yet."""
        if not self.carry or rows == 0 or self.carried[0] is None:
            return None
        used = -(-rows // self.micro)
        flat = [pytree.tree_leaves(state) for state in self.carried[:used]]
        return [torch.cat(leaves) for leaves in zip(*flat, strict=True)]

    def set_carried(self, leaves: list[torch.Tensor], template: Any) -> None:
        """Put back what :meth:`carried_rows` gave; ``template``: a state of the model's structure."""
        spec = pytree.tree_structure(template)
        for index in range(self.micros):
            rows = slice(index * self.micro, (index + 1) * self.micro)
            part = [leaf[rows].to(self.device) for leaf in leaves]
            self.carried[index] = pytree.tree_unflatten(part, spec) if len(part[0]) else None


def _solved(stats: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Whether every layer's recurrence was solved, as a flag on the device (a NaN update counts as not)."""
    updates = [torch.as_tensor(v, device=device).double() for k, v in stats.items() if k.endswith("newton_last_update")]
    return torch.stack(updates).le(UNSOLVED).all() if updates else torch.ones((), dtype=torch.bool, device=device)


def _merge(into: dict[str, Any], stats: dict[str, Any]) -> None:
    """The largest of each statistic over the micro-batches."""
    for key, value in stats.items():
        old = into.get(key)
        new = value.detach() if torch.is_tensor(value) else torch.tensor(float(value))
        into[key] = new if old is None else torch.maximum(old, new)
