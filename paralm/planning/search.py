"""Which of the ways to spread a run is fastest: all of a grid are planned, those that fit with room are kept.

The grid is ZeRO stage × micro-batch × time shards; in each, as few blocks run again in the backward as fit
(``activation_checkpointing: auto``). The work of a step stays: global batch, sequence, model, optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from paralm.errors import ConfigError
from paralm.planning.cost import with_room
from paralm.planning.run import Changes, Planner, RunPlan

STAGES = (0, 1, 2, 3)
ROOM = 0.1
"""Of the memory that a plan may fill, what is left free: a plan is no measurement."""
NEAR = 0.05
"""Steps that differ by less are called equal: no plan is that good. Of equals the lower stage has fewer collectives."""
CHOSEN = (
    "parallel.zero_stage",
    "parallel.time",
    "training.micro_batch_size",
    "training.activation_checkpointing",
)
"""What a search decides."""


@dataclass(frozen=True)
class Found:
    """``plans``: those that fit with room, fastest first. ``tried``: how many there were."""

    plans: list[RunPlan]
    tried: int

    @property
    def best(self) -> RunPlan | None:
        """Of those near the fastest: the lowest ZeRO stage, the fewest time shards, then the fastest."""
        near = [plan for plan in self.plans if plan.time.step <= (1 + NEAR) * self.plans[0].time.step]
        return min(near, key=_order) if near else None


def _order(plan: RunPlan) -> tuple[float, ...]:
    parallel = plan.config.parallel
    return parallel.zero_stage, parallel.time, round(plan.time.step, 6), plan.memory.peak.total


def search(
    planner: Planner, times: Iterable[int] = (1,), micro_batches: Iterable[int] | None = None, room: float = ROOM
) -> Found:
    """Plan the grid on the planner's GPUs.

    ``times``: numbers of time shards; what a mixer or the ranks cannot be cut into is left out. ``micro_batches``:
    default: powers of two, as long as each makes fewer micro-batches a step and the one before fitted somewhere.
    ``room``: part of the fillable memory that stays free.
    """
    planner = planner.on(device=with_room(planner.device, room))
    plans, tried = list[RunPlan](), 0
    for time in times:
        for micro in micro_batches or _micro_batches(planner, time):
            fitting = [plan for stage in STAGES if (plan := _plan(planner, (stage, time, micro))) is not None]
            plans, tried = plans + fitting, tried + len(STAGES)
            if not fitting:
                break
    return Found(sorted(plans, key=lambda plan: (round(plan.time.step, 6), _order(plan))), tried)


def _micro_batches(planner: Planner, time: int) -> Iterator[int]:
    micro, before = 1, 0
    while planner.gpus % time == 0:
        rows = -(-planner.config.training.global_batch_size // (planner.gpus // time))
        count = -(-rows // micro)
        if count == before or micro > rows:
            return
        yield micro
        micro, before = 2 * micro, count


def _plan(planner: Planner, asked: tuple[int, int, int]) -> RunPlan | None:
    """None: it cannot be, or does not fit. Mixers that take turns over time do so at no stage 3, and with no block that
    runs again."""
    for again in ("auto", False):
        changes: Changes = dict(zip(CHOSEN, (*asked, again), strict=True))
        try:
            if planner.hopeless(changes):
                return None
            found = planner.plan(changes)
        except ConfigError:
            continue
        return found if found.fits else None
    return None
