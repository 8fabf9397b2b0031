"""The grid of ranks: data × time. Ranks of one row of the grid read the same sequences, each its own steps of them.

Rank r of W, with t time shards, is time rank r mod t of data rank r div t: the shards of a sequence are neighbours,
which are mostly on one node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from paralm_kernels import TimeShards

from paralm.errors import ConfigError
from paralm.training.rendezvous import group_timeout

if TYPE_CHECKING:
    from paralm.config import Config
    from paralm.models.lm import LanguageModel


@dataclass(frozen=True)
class Grid:
    """Where a rank stands."""

    rank: int
    world_size: int
    time: int = 1
    """Ranks that share a sequence."""

    @property
    def data_rank(self) -> int:
        """Which rows of a global batch."""
        return self.rank // self.time

    @property
    def data_size(self) -> int:
        """Ranks that read different rows."""
        return self.world_size // self.time

    @property
    def time_rank(self) -> int:
        """Which steps of the rows."""
        return self.rank % self.time

    def steps(self, seq_len: int) -> slice:
        """This rank's steps of a row."""
        return slice(seq_len * self.time_rank // self.time, seq_len * (self.time_rank + 1) // self.time)

    def reads(self, seq_len: int) -> dict[str, Any]:
        """Which rows of a global batch this rank reads, and which steps of them: what its loader is told."""
        return {"rank": self.data_rank, "world_size": self.data_size, "part": self.steps(seq_len)}

    def shards(self, timeout: float) -> TimeShards | None:
        """The group of the ranks that share this rank's sequences; every rank must call it. None: there is none.

        timeout: seconds, ``parallel.collective_timeout``.
        """
        if self.time == 1:
            return None
        mine = None
        for first in range(0, self.world_size, self.time):
            group = dist.new_group(list(range(first, first + self.time)), timeout=group_timeout(timeout))
            if first == self.data_rank * self.time:
                mine = group
        return TimeShards(mine)


def check_ranks(config: Config, world_size: int) -> None:
    """Refuses, in one line, time shards that do not divide the ranks."""
    if world_size % config.parallel.time:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ConfigError(
            f"parallel.time: {config.parallel.time} time shards do not divide {world_size} ranks; use one of: {fitting}"
        )


def check_grid(config: Config, model: LanguageModel) -> None:
    """Refuses, in one line, what cannot be cut over ``parallel.time`` ranks; ``model`` may be on the meta device."""
    time, training = config.parallel.time, config.training
    if time == 1:
        return
    for layer, mixer in enumerate(model.mixers):
        name = f"layer {layer}, {type(mixer).__name__}"
        if not mixer.bounded_state:
            raise ConfigError(f"parallel.time: {name}: its state grows with the sequence; use parallel.time: 1")
        if not mixer.joins_shards and config.parallel.zero_stage == 3:
            raise ConfigError(
                f"parallel.time: {name}: its ranks take turns over micro-batches, while ZeRO-3 gathers its weights on "
                "all of them at once; use zero_stage 1 or 2"
            )
        if not mixer.joins_shards and training.activation_checkpointing:
            raise ConfigError(
                f"parallel.time: {name}: its ranks take turns, which a second forward in the backward pass would not "
                "keep to; use activation_checkpointing: false"
            )
        reach = getattr(mixer.config, "d_conv", 1) - 1
        if mixer.joins_shards and training.seq_len // time < reach:
            raise ConfigError(
                f"parallel.time: {time} parts of training.seq_len {training.seq_len} are as short as "
                f"{training.seq_len // time} steps, and {name} looks back {reach}; use at most "
                f"{training.seq_len // max(1, reach)} time shards"
            )
    if training.seq_len < time:
        raise ConfigError(f"parallel.time: {time} is more than training.seq_len {training.seq_len}")
    for key, given in (("carry_state", training.carry_state), ("initial_state", training.initial_state != "zero")):
        if given:
            raise ConfigError(
                f"training.{key}: a state from another step belongs to the first time shard, and is not handed there "
                "from the last; use parallel.time: 1"
            )
    mixture = config.data.mixture
    if mixture is not None and mixture.target is not None:
        raise ConfigError("data.mixture.target: learned weights take gradients of whole windows; use parallel.time: 1")
