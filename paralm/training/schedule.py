"""Learning-rate schedules as pure functions of the step, so that there is no schedule state to lose.

``cosine``: linear warm-up, then half a cosine down to ``min_ratio``. ``wsd`` (warm-up, stable, decay;
arXiv 2404.06395): linear warm-up, constant, linear decay over the last part. ``constant``: warm-up only.
"""

from __future__ import annotations

import math
from pathlib import Path

from paralm.config import Config, ScheduleConfig
from paralm.config_optimizer import schedule_steps
from paralm.errors import RunError
from paralm.training.run_folder import RunFolder


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of ``step`` (0-based: the step about to be taken)."""
    return config.optimizer.lr * lr_factor(config.optimizer.schedule, step, config.training.max_steps)


def rate_change(run: Path, config: Config, step: int) -> str | None:
    """One line where the learning rate of a fork's first ``step`` is not the one ``run`` would have taken: a decay that
    was meant to begin with the fork may begin in its middle. None where it is, or ``run`` no longer says."""
    try:
        old = RunFolder(run).saved_config()
    except RunError:  # of another version: it can be gone on from all the same
        return None
    if old is None:
        return None
    before, after = learning_rate(old, step), learning_rate(config, step)
    return None if before == after else f"the next learning rate is {after:.4g}; in {run} it was {before:.4g}"


def lr_factor(schedule: ScheduleConfig, step: int, max_steps: int) -> float:
    """The learning rate of ``step`` (0-based: the step about to be taken) over its peak."""
    warmup = schedule_steps(schedule.warmup, max_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    low = schedule.min_ratio
    if schedule.kind == "cosine":
        progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = schedule_steps(schedule.decay, max_steps)
    progress = min(1.0, max(0.0, (step - (max_steps - decay)) / max(1, decay)))
    return 1 - (1 - low) * progress
