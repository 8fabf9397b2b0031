"""The plan of a run on so many GPUs: memory, work, communication, time and cost; and what to change if it does not fit.

What to change is tried out, in this order, each by a plan of its own: activation checkpointing, a higher ZeRO stage,
a smaller micro-batch, time shards, offloading. The first that fits is named; where none does alone, they are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from paralm.config import Config
from paralm.errors import ConfigError, UserError
from paralm.models import build_model
from paralm.models.lm import LanguageModel, checkpointed_blocks, flops_per_token
from paralm.planning.checkpointing import fewest_blocks, mixed
from paralm.planning.cost import STORAGE, Device, Exchange, Time, exchange, step_time
from paralm.planning.memory import (
    Memory,
    OptimizerCosts,
    Sizes,
    gradient_bytes,
    held_always,
    memory,
    optimizer_costs,
    sizes_of,
)
from paralm.planning.trace import Trace, uniform_trace
from paralm.training.engine import grad_accum_steps
from paralm.training.grid import check_grid, check_ranks

TOKENS_PER_PARAMETER = 20
"""Of a budget that nobody gave (arXiv 2203.15556)."""

Changes = dict[str, Any]
"""Dotted keys and values."""


@dataclass(frozen=True)
class RunPlan:
    """All of one rank of ``gpus``, unless it says otherwise."""

    config: Config
    device: Device
    gpus: int
    memory: Memory
    sizes: Sizes
    traced: Trace
    exchange: Exchange
    time: Time
    micro_batches: int
    """Of a step."""
    tokens_per_step: int
    """Over all GPUs."""
    flops_per_token: float
    """Of the model, forward and backward, without what activation checkpointing does again."""
    bytes_per_token: float
    """Read and written in the device's memory, forward and backward."""
    checkpoint: int
    """Bytes, over all ranks."""

    @property
    def fits(self) -> bool:
        return self.memory.peak.total <= self.device.usable

    @property
    def mfu(self) -> float:
        """The model's FLOPs over what the devices could do in the time, in the precision that is trained in."""
        peak = self.device.bf16 if self.config.training.precision == "bf16" else self.device.fp32
        return self.flops_per_token * self.tokens_per_step / (self.time.step * self.gpus * peak)

    def value(self, key: str) -> Any:
        """Of a dotted key of two parts, as it was planned: a number where ``auto`` was asked for."""
        return value_of(self.config, key)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.device.per_node)

    @property
    def checkpoint_seconds(self) -> float:
        """Of a synchronous write by all nodes."""
        return self.checkpoint / (STORAGE * self.nodes)

    def seconds_of(self, tokens: float) -> float:
        """Of training, without saving and validating."""
        return tokens / self.tokens_per_step * self.time.step


@dataclass
class Planner:
    """Plans variants of one run; what they have in common is traced once."""

    config: Config
    vocab_size: int
    device: Device
    gpus: int
    efficiency: float
    kernels: float = 1.0
    """Of a copy's bandwidth, in fused kernels."""
    model: LanguageModel = field(init=False)
    _traces: dict[tuple[Any, ...], Trace] = field(default_factory=dict, init=False)
    _updates: dict[tuple[Any, ...], OptimizerCosts] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        per_node = self.device.per_node
        if self.gpus < 1 or (self.gpus > per_node and self.gpus % per_node):
            lower = max(per_node, self.gpus // per_node * per_node)
            raise UserError(
                f"--gpus: {self.gpus} is no number of whole nodes of {per_node}; use up to {per_node}, or a multiple "
                f"such as {lower} or {lower + per_node}"
            )
        for name in ("efficiency", "kernels"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name}: {getattr(self, name)} is not above 0 and at most 1")
        self.model = build_model(self.config.model, self.vocab_size, seed=0, device="meta")
        check_ranks(self.config, self.gpus)
        check_grid(self.config, self.model)

    def plan(self, changes: Changes | None = None) -> RunPlan:
        """Of the run with some keys changed. Raises ConfigError, one line, where that cannot be."""
        config = with_changes(self.config, changes or {})
        check_ranks(config, self.gpus)
        check_grid(config, self.model)
        data_ranks = self.gpus // config.parallel.time
        rows = -(-config.training.global_batch_size // data_ranks)
        if rows < config.training.micro_batch_size:  # no rank runs more rows at once than it has
            config = with_changes(config, {"training.micro_batch_size": rows})
        sizes, costs = sizes_of(self.model), self._update(config)
        config = self._settled(config, sizes, costs)
        training, traced = config.training, self._traced(config)
        sent = exchange(config, sizes, traced.sent, self.gpus)
        moved = sum(segment.moved for segment in _segments(traced))
        return RunPlan(
            config=config,
            device=self.device,
            gpus=self.gpus,
            memory=memory(config, traced, sizes, costs, self.gpus),
            sizes=sizes,
            traced=traced,
            exchange=sent,
            time=step_time(config, traced, sent, costs, sizes, self.device, self.gpus, self.efficiency, self.kernels),
            micro_batches=grad_accum_steps(config, self.gpus),
            tokens_per_step=training.global_batch_size * training.seq_len,
            flops_per_token=flops_per_token(self.model, training.seq_len),
            bytes_per_token=moved / traced.tokens,
            checkpoint=round(4 * sizes.total * (1 + costs.per_element)),
        )

    def hopeless(self, changes: Changes) -> bool:
        """Whether weights, gradients and optimizer alone are too large; nothing is traced for it."""
        config = with_changes(self.config, changes)
        return held_always(config, sizes_of(self.model), self._update(config), self.gpus) > self.device.usable

    def _update(self, config: Config) -> OptimizerCosts:
        key = (config.parallel.zero_stage == 0, config.parallel.offload_optimizer, self.gpus)
        if key not in self._updates:
            self._updates[key] = optimizer_costs(config, self.model, self.gpus)
        return self._updates[key]

    def _traced(self, config: Config) -> Trace:
        """Of a micro-batch; blocks of both kinds, those that run again and those that do not, are traced once."""
        training, kept = config.training, gradient_bytes(config, "gpu")

        def uniform(again: bool) -> Trace:
            key = (again, training.seq_len, training.micro_batch_size, config.parallel.time, kept)
            if key not in self._traces:
                self._traces[key] = uniform_trace(config, self.vocab_size, again, "gpu", kept)
            return self._traces[key]

        setting = training.activation_checkpointing
        assert setting != "auto"
        return mixed(uniform, checkpointed_blocks(setting, len(self.model.blocks)))

    def _settled(self, config: Config, sizes: Sizes, costs: OptimizerCosts) -> Config:
        """``activation_checkpointing: auto`` as so many blocks: the fewest that fit, or all where none do."""
        if config.training.activation_checkpointing != "auto":
            return config

        def so_many(blocks: int) -> Config:
            return with_changes(config, {"training.activation_checkpointing": blocks})

        def peak_of(blocks: int) -> int:
            return memory(config, self._traced(so_many(blocks)), sizes, costs, self.gpus).peak.total

        n = len(self.model.blocks)
        fewest = fewest_blocks(peak_of, n, self.device.usable)
        return so_many(n if fewest is None else fewest)

    def on(
        self, gpus: int | None = None, device: Device | None = None, changes: Changes | None = None, **assumed: float
    ) -> Planner:
        """The run on other GPUs, with keys changed that leave its model, or with another ``efficiency`` or speed of
        ``kernels`` assumed; what was traced stays known."""
        config = with_changes(self.config, changes or {})
        other = replace(self, gpus=gpus or self.gpus, device=device or self.device, config=config, **assumed)  # type: ignore[arg-type]
        other.model, other._traces, other._updates = self.model, self._traces, self._updates
        return other

    def remedy(self) -> tuple[Changes, RunPlan] | None:
        """The first change that makes the run fit, or the fewest of them in order; None: none does."""
        steps = list(self._remedies())
        for changes in (change for step in steps for change in step):
            found = self._fitting(changes)
            if found is not None:
                return changes, found
        added: Changes = {}
        for step in steps:
            for changes in step:
                together = {**added, **changes}
                found = self._fitting(together)
                if found is not None:
                    return together, found
            added |= self._strongest(added, step)
        return None

    def others(self, first: Changes) -> list[tuple[Changes, RunPlan]]:
        """Changes after the first that fit too, of those that need no further trace."""
        every = [changes for step in self._remedies() for changes in step]
        later = every[every.index(first) + 1 :] if first in every else []
        free = [
            changes for changes in later if all(key.startswith("parallel.") and "time" not in key for key in changes)
        ]
        found = ((changes, self._fitting(changes)) for changes in free)
        return [(changes, plan) for changes, plan in found if plan is not None]

    def _strongest(self, added: Changes, step: list[Changes]) -> Changes:
        """The last of a kind that is possible beside what was added."""
        for changes in reversed(step):
            try:
                self.plan({**added, **changes})
            except ConfigError:
                continue
            return changes
        return {}

    def _fitting(self, changes: Changes) -> RunPlan | None:
        try:
            found = self.plan(changes)
        except ConfigError:
            return None
        return found if found.fits else None

    def _remedies(self) -> Iterator[list[Changes]]:
        training, parallel = self.config.training, self.config.parallel
        again = training.activation_checkpointing
        if again != "auto" and checkpointed_blocks(again, len(self.model.blocks)) < len(self.model.blocks):
            yield [{"training.activation_checkpointing": "auto"}]
        yield [{"parallel.zero_stage": stage} for stage in range(parallel.zero_stage + 1, 4)]
        halves, micro = list[Changes](), training.micro_batch_size
        while micro > 1:
            micro //= 2
            halves.append({"training.micro_batch_size": micro})
        yield halves
        shards = [2**i for i in range(1, self.gpus.bit_length()) if 2**i > parallel.time and self.gpus % 2**i == 0]
        yield [{"parallel.time": time} for time in shards]
        if parallel.offload_optimizer == "none":
            stage = {"parallel.zero_stage": 2} if parallel.zero_stage < 2 else {}
            yield [{**stage, "parallel.offload_optimizer": "cpu"}]
        if parallel.offload_parameters == "none":
            yield [
                {
                    "parallel.zero_stage": 3,
                    "parallel.offload_optimizer": "cpu",
                    "parallel.offload_parameters": "cpu",
                }
            ]


def _segments(traced: Trace) -> Iterator[Any]:
    yield from (traced.embedding, traced.head, traced.head_backward, traced.embedding_backward)
    for kind in traced.layers:
        yield traced.forward[kind]
        yield traced.backward[kind]


def value_of(config: Config, key: str) -> Any:
    """Of a dotted key of two parts."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with dotted keys of two parts changed. Raises ConfigError, one line, for what no configuration may be."""
    sections = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        sections[section][name] = value
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
