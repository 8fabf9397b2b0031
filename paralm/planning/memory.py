"""What a rank holds, by kind, at the moments of a training step: from a trace and what DeepSpeed is told.

What DeepSpeed keeps is read off its code (0.19), n parameters on W ranks, b bytes each (2 in bf16):

    stage 0          weights b n; fp32 masters (bf16) and states whole; gradients 4 n while they are there
    stage 1, bf16    (BF16_Optimizer) weights 2 n, gradients 2 n that stay, their fp32 sums 4 n; masters, states / W
    stage 1, 2       weights b n; gradients go through buckets to 4 n / W; masters, states / W
    stage 3          weights b n / W and what is gathered at a time; gradients 4 n / W; masters, states / W

``tests/paralm/test_planning_memory.py`` holds it against measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from paralm.config import Config
from paralm.errors import ConfigError
from paralm.models.lm import LanguageModel
from paralm.planning.ledger import Ledger
from paralm.planning.trace import On, Trace
from paralm.training.engine import deepspeed_config, grad_accum_steps, reduce_after_backward
from paralm.training.optimizers import Partitioned, build_optimizer, is_fused

KINDS = ("weights", "gradients", "optimizer", "activations", "states", "communication", "loss head", "workspace")
ENGINE_BUCKET = 500_000_000
"""Elements that DeepSpeed's engine reduces at a time at stage 0, and at stage 1 in bf16."""
LIVE_PARAMETERS, PERSISTENT = 1_000_000_000, 100_000
"""DeepSpeed's defaults at stage 3: gathered elements at most, and how small a parameter is that stays whole."""


@dataclass(frozen=True)
class Sizes:
    """Elements: of each parameter, by optimizer group."""

    groups: list[list[int]]
    matrices: int = 0
    """Those in matrices, which Muon updates as such."""

    @property
    def total(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        return max(map(max, self.groups))


@dataclass(frozen=True)
class OptimizerCosts:
    """Bytes on one rank: ``state`` beside the masters, ``workspace`` of an update, ``moved`` by it; ``per_element``:
    values that the optimizer keeps of one, on average."""

    state: int
    workspace: int
    moved: int
    per_element: float


@dataclass(frozen=True)
class Moment:
    """Bytes by kind (:data:`KINDS`)."""

    name: str
    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Memory:
    """``peak``: the moment with the most. ``host``: bytes that the rank keeps in its machine's memory."""

    moments: list[Moment]
    host: int = 0
    peak: Moment = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", max(self.moments, key=lambda moment: moment.total))


def sizes_of(model: LanguageModel) -> Sizes:
    """Of a model, which may be on the meta device."""
    groups = [group for group in model.parameter_groups() if group["params"]]
    matrices = sum(p.numel() for group in groups if group["matrix"] for p in group["params"])
    return Sizes([[p.numel() for p in group["params"]] for group in groups], matrices)


def optimizer_costs(config: Config, model: LanguageModel, ranks: int, on: On = "gpu") -> OptimizerCosts:
    """Two updates of the configured optimizer on this rank's share, without values."""
    groups = []
    for group in model.parameter_groups():
        shapes = [p.numel() for p in group["params"]]
        flats = shapes if config.parallel.zero_stage == 0 else [-(-sum(shapes) // ranks)]
        groups.append({**group, "params": [nn.Parameter(torch.empty(n, device="meta")) for n in flats]})
    fused = is_fused(config.optimizer, on == "gpu", config.parallel.offload_optimizer != "none")
    optimizer = build_optimizer(groups, config.optimizer.model_copy(update={"fused": False}), config.run.seed)
    optimizer.noise = None
    flats = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["foreach"] = on == "gpu"  # as torch chooses; asked of a tensor without values it chooses a CPU's
    optimizer.layout = {flat: [] for flat in flats}
    optimizer._updates = {flat: lambda pieces, update: [] for flat in flats}  # type: ignore[attr-defined]
    for flat in flats:
        flat.grad = torch.empty_like(flat)
    ledger = Ledger()
    ledger.take([*flats, *(flat.grad for flat in flats if flat.grad is not None)])
    with ledger:
        optimizer.step()
        adam = _fuse(optimizer) if fused else 0
        ledger.mark("update")
        optimizer.step()
        ledger.mark("end")
    update = next(segment for segment in ledger.segments if segment.name == "update")
    elements = sum(flat.numel() for flat in flats)
    written = 3 * 4 * adam  # master and both moments: an operation's results that are its arguments are not told
    return OptimizerCosts(update.begin, update.peak - update.begin, update.moved + written, update.begin / 4 / elements)


def _fuse(optimizer: Partitioned) -> int:
    """Let the next update of an optimizer without values be fused, which torch refuses to make from the start; the
    elements that it updates so."""
    elements = 0
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
        for flat in group["params"]:
            if "step" in optimizer.state[flat]:
                optimizer.state[flat]["step"] = torch.empty((), device="meta")
                elements += flat.numel()
    return elements


def memory(config: Config, traced: Trace, sizes: Sizes, costs: OptimizerCosts, ranks: int, on: On = "gpu") -> Memory:
    """The moments of a step on one of ``ranks`` ranks, and the host's part where something is there."""
    rank = _Rank(config, sizes, costs, ranks, on)
    if any(traced.relays) and rank.stage:
        reduce_after_backward(rank.told, rank.n)
    moments = [*_of_micro_batch(config, traced, rank), *rank.step()]
    carried = traced.state_bytes * (grad_accum_steps(config, ranks) - 1) if keeps_states(config) else 0
    kept = [Moment(m.name, {**m.kinds, "states": m.kinds.get("states", 0) + carried}) for m in moments]
    return Memory([Moment(m.name, {kind: int(m.kinds.get(kind, 0)) for kind in KINDS}) for m in kept], rank.host)


def held_always(config: Config, sizes: Sizes, costs: OptimizerCosts, ranks: int, on: On = "gpu") -> int:
    """Bytes that no activation is needed for: less than any peak."""
    return int(sum(_Rank(config, sizes, costs, ranks, on).always().values()))


def keeps_states(config: Config) -> bool:
    """Whether every micro-batch's last states stay until the next step (:class:`paralm.training.step.Stepper`)."""
    return config.training.carry_state or config.training.initial_state == "passed"


def gradient_bytes(config: Config, on: On) -> int:
    """Of an element of a gradient that stays where autograd put it while others are made."""
    stage, overlap = config.parallel.zero_stage, on == "gpu" and config.parallel.overlap_comm is not False
    if stage == 0:
        return 4
    return 4 if stage == 1 and config.training.precision == "fp32" and not overlap else 0


def raw_number(options: Mapping[str, Any], key: str, default: int) -> int:
    """Of ``parallel.deepspeed.zero_optimization``. Raises ConfigError for what is none, such as DeepSpeed's 'auto'."""
    value = options.get(key, default)
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"parallel.deepspeed.zero_optimization.{key}: {value!r} is no number, which a plan needs; give one, or "
            "leave the key out"
        ) from None


class _Rank:
    """What a rank holds all the time, during a backward pass and in the update."""

    def __init__(self, config: Config, sizes: Sizes, costs: OptimizerCosts, ranks: int, on: On) -> None:
        self.config, self.sizes, self.costs, self.ranks, self.on = config, sizes, costs, ranks, on
        self.n, self.part = sizes.total, -(-sizes.total // ranks)
        self.told: dict[str, Any] = deepspeed_config(config, ranks, self.n)
        self.stage = config.parallel.zero_stage
        self.bf16 = config.training.precision == "bf16"
        self.width = 2 if self.bf16 else 4
        self.offloads = config.parallel.offload_optimizer != "none"
        self.summing = self.stage == 1 and self.bf16 and not self.offloads  # DeepSpeed's BF16_Optimizer
        overlap = config.parallel.overlap_comm
        self.overlap = on == "gpu" if overlap is None else overlap
        self.kept = gradient_bytes(config, on)
        self.many = grad_accum_steps(config, ranks) > 1

    @property
    def host(self) -> int:
        """Masters, states and gradients, and what DeepSpeed keeps beside them: at stages 1 and 2 new weights on their
        way to the device, at stage 3 gradients that arrive; weights. And a checkpoint that is written meanwhile:
        masters and two states, as :class:`paralm.training.saving.Saver` makes room for."""
        size, groups = 0, [sum(group) for group in self.sizes.groups]
        if self.offloads and self.stage == 3:
            size = self.costs.state + 4 * self.part + self._pinned(4, groups) + self._pinned(4, [self.n])
        elif self.offloads:
            size = self.costs.state + 2 * self._pinned(4, groups) + self._pinned(self.width, groups)
        if self.config.parallel.offload_parameters != "none":
            size += self._pinned(self.width, [self.n])
        return size + (3 * 4 * self.part if self.config.checkpoint.asynchronous else 0)

    def _pinned(self, width: int, tensors: Sequence[int]) -> int:
        """Bytes of a rank's parts of tensors of so many elements: torch pins a power of two for each."""
        sizes = [width * -(-elements // self.ranks) for elements in tensors]
        return sum(1 << (size - 1).bit_length() for size in sizes) if self.on == "gpu" else sum(sizes)

    def always(self) -> dict[str, int]:
        held = {"weights": self.width * self.n}
        masters = 4 * self.part
        if self.stage == 0:
            masters = 4 * self.n if self.bf16 else 0
        held["optimizer"] = 0 if self.offloads else masters + self.costs.state
        if self.summing:
            stays = 0 if self.told["bf16"].get("immediate_grad_update") else 2 * self.n
            held["gradients"] = 4 * self.n + stays
        elif self.stage == 3:
            small = sum(
                n for group in self.sizes.groups for n in group if n < self._three("param_persistence_threshold")
            )
            at_once = min(self.n, self._three("max_live_parameters")) + self._three("prefetch_bucket_size", 50_000_000)
            whole = self.width * min(self.n, small + at_once)
            mine = 0 if self.config.parallel.offload_parameters != "none" else self.width * self.part
            held = {**held, "weights": mine, "communication": whole}
            held["gradients"] = 0 if self.offloads else 4 * self.part
            held["communication"] += 4 * self._bucket()
        elif self.stage == 0 and self.many:
            held["gradients"] = 4 * self.n
        elif self.stage and self.many:
            full = self.stage == 1
            held["gradients"] = 4 * self.n if full else 0 if self.offloads else 4 * self.part
        return held

    def _three(self, name: str, default: int = 0) -> int:
        known = {"param_persistence_threshold": PERSISTENT, "max_live_parameters": LIVE_PARAMETERS}
        return raw_number(self.told["zero_optimization"], f"stage3_{name}", known.get(name, default))

    def _bucket(self) -> int:
        """Elements; on a CPU only what is written to is memory."""
        size = raw_number(self.told["zero_optimization"], "reduce_bucket_size", 0)
        return size if self.on == "gpu" else min(size, self.n)

    def backward(self, finished: int) -> dict[str, int]:
        """Beside :meth:`always`, with so many elements of gradients finished."""
        if self.stage in (0, 3) or self.summing:
            kept = 0 if self.many else self.kept
            return {"gradients": kept * finished}
        if self.kept:
            return {"gradients": 0 if self.many else self.kept * finished}
        # Stage 1 with offloading sums up in float32 where the gradients are; they go through buckets otherwise.
        wide = 4 if self.stage == 1 or not self.bf16 else 2
        bucket = self._bucket()
        used = bucket if self.on == "gpu" else min(bucket, finished)
        cast = 4 * min(bucket, self.n) if wide == 2 else 0
        whole = self.stage == 1 and self.bf16
        share = 0 if (self.offloads and not whole) or self.many else 4 * (finished if whole else self.part)
        largest = self.sizes.largest * self.width if self.offloads else 0
        return {"gradients": share + largest, "communication": wide * used * (2 if self.overlap else 1) + cast}

    def step(self) -> list[Moment]:
        """After the last backward pass: the reduction, and the update."""
        always = self.always()
        reducing, updating = dict(always), dict(always)
        work = 0 if self.offloads else self.costs.workspace
        if self.stage == 0:
            reducing["gradients"] = updating["gradients"] = 4 * self.n
            reducing["communication"] = 4 * _flattened([n for group in self.sizes.groups for n in group])
        elif self.summing:
            reducing["communication"] = 4 * max(self.sizes.largest, _flattened([sum(g) for g in self.sizes.groups]))
        elif self.stage < 3:
            if self.kept:  # all gradients move into the bucket, and this rank's share of them out of it
                reducing["gradients"] = 4 * self.n + (4 * self.part if self.part < self.n else 4 * self.n)
            share = 0 if self.offloads else 4 * self.part
            # Each group's share becomes one vector, as a copy unless it is one already.
            copy = 0 if self.bf16 or self.offloads else 4 * max(map(sum, self.sizes.groups)) // self.ranks
            updating["gradients"] = share + copy
        else:
            updating["gradients"] = always["gradients"] + (0 if self.offloads else 4 * self.part)
        updating["workspace"] = work
        return [Moment("reducing gradients", reducing), Moment("the update", updating)]


def _flattened(sizes: Sequence[int]) -> int:
    """The most elements that are copied side by side to be reduced; a tensor alone is not copied."""
    most, bucket = 0, list[int]()
    for index, size in enumerate(sizes):
        bucket.append(size)
        if sum(bucket) > ENGINE_BUCKET or index + 1 == len(sizes):
            most = max(most, sum(bucket) if len(bucket) > 1 else 0)
            bucket = []
    return most


def _of_micro_batch(config: Config, traced: Trace, rank: _Rank) -> Iterator[Moment]:
    """The segments of a micro-batch, the kinds repeated as the model repeats them."""
    last = len(traced.layers) - 1
    every = [("the embedding", traced.embedding, False)]
    every += [(f"layer {i}, forward", traced.forward[kind], False) for i, kind in enumerate(traced.layers)]
    every += [("the loss", traced.head, False), ("the loss, backward", traced.head_backward, True)]
    every += [(f"layer {last - i}, backward", traced.backward[k], True) for i, k in enumerate(reversed(traced.layers))]
    every.append(("the embedding, backward", traced.embedding_backward, True))
    always, live, finished, states = rank.always(), 0, 0, 0
    per_layer = traced.state_bytes // len(traced.layers) if keeps_states(config) else 0
    for name, segment, backward in every:
        base = segment.begin if name == "the embedding" else live
        held = base + segment.peak - segment.begin
        kinds = dict(always)
        if backward:
            for kind, size in rank.backward(finished + segment.gradients_at_peak).items():
                kinds[kind] = kinds.get(kind, 0) + size
        elif name.startswith("layer"):
            states += per_layer
        if name.startswith("the loss"):
            kept = live if not backward else live + segment.end - segment.begin
            kinds["loss head"] = max(0, held - kept)
            held -= kinds["loss head"]
        kinds["states"] = min(states, held)
        kinds["activations"] = held - kinds["states"]
        yield Moment(name, kinds)
        live = base + segment.end - segment.begin
        finished += segment.gradients
