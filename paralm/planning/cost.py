"""How long a step takes and what it costs: from traced work, counted communication and a device's stated speeds.

    compute     Σ over kernels of max(FLOPs / (efficiency · peak), bytes / copy bandwidth, launch)
    exchange    all-reduce 2 (W−1)/W · bytes / link, gather and scatter (W−1)/W · bytes / link; each of a step's
                collectives goes round the ring, W−1 hops (an all-reduce twice)
    step        micro-batches · compute + what of the exchange nothing hides + update

Communication is counted as benchmarks/scaling.py counts it (the tensor a collective works on); a test holds it
against benchmarks/results/scaling.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from paralm_kernels.time_shards import HIDDEN

from paralm.config import Config
from paralm.errors import UserError
from paralm.planning.ledger import Segment
from paralm.planning.memory import ENGINE_BUCKET, LIVE_PARAMETERS, PERSISTENT, OptimizerCosts, Sizes, raw_number
from paralm.planning.trace import Trace
from paralm.training.engine import grad_accum_steps

LAUNCH = 4e-6
"""Seconds that a kernel costs at least (measured on an H100, paralm_kernels.triton_table)."""
EFFICIENCY = 0.8
"""Of the peak, in large bf16 products (measured on an H100: 790 of 989 TFLOP/s)."""
COPY = 0.88
"""Of the memory's bandwidth, in a copy (measured on an H100: 2.94 of 3.35 TB/s)."""
LINK = 0.75
"""Of a link's bandwidth, in a collective; assumed."""
HOP = 2e-6
"""Seconds from one rank of a ring to the next, of a collective however small; assumed."""
RESERVED, FRAGMENTED = 1.5 * 2**30, 0.05
"""Bytes of the context and the libraries, and the part of a device that fragments leave unused; assumed."""
HOST_LINK, HOST_UPDATE = 25e9, 1e9
"""Of offloading, on one of eight ranks of a node: bytes a second over PCIe, elements a second of Adam; assumed."""
STORAGE = 2e9
"""Bytes a second that a node writes of a checkpoint; assumed."""


@dataclass(frozen=True)
class Device:
    """``memory`` in bytes; ``bf16``, ``fp32``: dense FLOP/s; ``bandwidth``, ``link``, ``port`` in bytes/s: of the
    memory, of a GPU to the others of its node, each way, and of its port out of the node. From the makers' data sheets.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    port: float = 50e9
    per_node: int = 8

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return usable_bytes(self.memory)


def usable_bytes(memory: float) -> float:
    """Of a device's memory, what a plan may fill."""
    return memory * (1 - FRAGMENTED) - RESERVED


def with_room(device: Device, room: float) -> Device:
    """The device with this part of what a plan may fill taken away."""
    return replace(device, memory=(device.usable * (1 - room) + RESERVED) / (1 - FRAGMENTED))


DEVICES = {
    "h100": Device("H100 SXM 80 GB", 79.1 * 2**30, 989.4e12, 66.9e12, 3.35e12, 450e9),
    "h200": Device("H200 SXM 141 GB", 139.8 * 2**30, 989.4e12, 66.9e12, 4.8e12, 450e9),
    "a100": Device("A100 SXM 80 GB", 79.1 * 2**30, 312e12, 19.5e12, 2.04e12, 300e9),
    "mi300x": Device("MI300X 192 GB", 191.5 * 2**30, 1307.4e12, 163.4e12, 5.3e12, 448e9),
}


def device_of(name: str) -> Device:
    """By its name. Raises UserError with the list."""
    if name.lower() not in DEVICES:
        raise UserError(f"--device: '{name}' is not known; it must be one of: {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


@dataclass(frozen=True)
class Exchange:
    """Bytes a rank's collectives work on in one step, by kind as torch names them; ``between_shards``: what a rank
    gives to the other time shards, ``waited_for`` of it with nothing to compute meanwhile. ``reductions``,
    ``gathers``: how often gradients and weights go round the ring."""

    reduced: int = 0
    scattered: int = 0
    gathered: int = 0
    exchanged: int = 0
    between_shards: int = 0
    waited_for: int = 0
    reductions: int = 0
    gathers: int = 0

    def by_kind(self) -> Mapping[str, int]:
        """Those there are, as benchmarks/results/scaling.json names them."""
        every = {
            "allreduce": self.reduced,
            "reduce_scatter_base": self.scattered,
            "allgather_base": self.gathered,
            "alltoall_base": self.exchanged,
            "between time shards": self.between_shards,
        }
        return {kind: size for kind, size in every.items() if size}


def full_micro_batches(config: Config, ranks: int) -> float:
    """Of a step, by their rows: the last one counts for as much of one as it has. That of the rank with most rows."""
    rows = -(-config.training.global_batch_size // max(1, ranks // config.parallel.time))
    return rows / config.training.micro_batch_size


def exchange(config: Config, sizes: Sizes, sent: Mapping[str, int], ranks: int) -> Exchange:
    """Of one step; gradients travel in float32. ``sent``: of a micro-batch, to other time shards.

    Stages 0 and 1 reduce once a step, 2 and 3 every micro-batch. Stage 3 gathers every weight in the forward pass, and
    again in the backward pass where more of them lie between than DeepSpeed keeps.
    """
    n, micros, stage = sizes.total, grad_accum_steps(config, ranks), config.parallel.zero_stage
    width = 2 if config.training.precision == "bf16" else 4
    full = full_micro_batches(config, ranks)
    shards = round(sum(sent.values()) * full)
    waited = round(sum(size for kind, size in sent.items() if kind not in HIDDEN) * full)
    # Of the matrices, to their owners and back; none where every rank has all of them.
    matrices = 2 * 4 * -(-sizes.matrices // ranks) if config.optimizer.name == "muon" and stage and ranks > 1 else 0
    bucket = config.parallel.bucket_size if stage else ENGINE_BUCKET
    if stage == 3:
        options = config.parallel.deepspeed.get("zero_optimization", {})
        small = raw_number(options, "stage3_param_persistence_threshold", PERSISTENT)
        cut = sum(size for group in sizes.groups for size in group if size >= small)
        again = 2 if n > raw_number(options, "stage3_max_reuse_distance", LIVE_PARAMETERS) else 1
        gathered = width * (cut * again * micros + (n - cut)) if ranks > 1 else 0
        # DeepSpeed gathers what a module uses when it comes to it: a tensor each, about.
        gathers = sum(size >= small for group in sizes.groups for size in group) * again * micros + 1
        return Exchange(0, 4 * n * micros, gathered, matrices, shards, waited, -(-n // bucket) * micros, gathers)
    reductions = micros if stage == 2 else 1
    gathered = width * n if stage and ranks > 1 else 0
    around = 2 * -(-n // bucket) * reductions
    return Exchange(
        4 * n * reductions, 0, gathered, matrices, shards, waited, around, -(-n // bucket) if gathered else 0
    )


@dataclass(frozen=True)
class Time:
    """Seconds of a step: ``compute`` of all micro-batches, ``exposed`` communication, ``update``."""

    compute: float
    communication: float
    exposed: float
    update: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.update


def step_time(
    config: Config,
    traced: Trace,
    sent: Exchange,
    costs: OptimizerCosts,
    sizes: Sizes,
    device: Device,
    ranks: int,
    efficiency: float,
    kernels: float = 1.0,
) -> Time:
    """Expected, on ``ranks`` devices. ``efficiency``: of the peak, in products; ``kernels``: of a copy's bandwidth, in
    fused kernels."""
    micros, stage = full_micro_batches(config, ranks), config.parallel.zero_stage

    def seconds(segment: Segment) -> float:
        total = 0.0
        for work in segment.work:
            peak = device.fp32 if work.wide else device.bf16
            bandwidth = device.bandwidth * COPY * (kernels if work.fused else 1.0)
            total += max(work.flops / (peak * efficiency), work.moved / bandwidth, LAUNCH)
        return total

    # Products inside of fused kernels: once forward, twice backward, and once more where the forward is run again.
    fused = [flops / (device.bf16 * efficiency) for flops in traced.extra_flops]
    # Ranks that take turns over pieces of a micro-batch wait while the first pieces come and the last ones go.
    pieces = min(config.training.micro_batch_size, config.parallel.time)
    turns = [(config.parallel.time + pieces - 1) / pieces if relays else 1.0 for relays in traced.relays]
    forward = [(seconds(s) + extra) * wait for s, extra, wait in zip(traced.forward, fused, turns, strict=True)]
    backward = [
        (seconds(s) + (3 if again else 2) * extra) * wait
        for s, extra, wait, again in zip(traced.backward, fused, turns, traced.again, strict=True)
    ]
    ends = sum(map(seconds, (traced.embedding, traced.head, traced.head_backward, traced.embedding_backward)))
    back = sum(backward[kind] for kind in traced.layers)
    micro = ends + back + sum(forward[kind] for kind in traced.layers)
    link = LINK * device.link
    if ranks > device.per_node:
        link = min(link, LINK * device.port * device.per_node)
    others = (ranks - 1) / ranks
    ring = HOP * (ranks - 1)
    reduction = (2 * sent.reduced + sent.scattered) * others / link + sent.reductions * ring
    gathering = (sent.gathered + sent.exchanged) * others / link + sent.gathers * ring
    in_a_node = ranks <= device.per_node or device.per_node % config.parallel.time == 0
    shards_link = LINK * (device.link if in_a_node else device.port)
    between = waited = 0.0
    if config.parallel.time > 1:
        between, waited = sent.between_shards / shards_link, sent.waited_for / shards_link
        # The others travel beside the products inside of fused kernels, of one of two lanes at a time.
        beside = sum((4 if traced.again[kind] else 3) * fused[kind] for kind in traced.layers) * micros / 2
        waited += max(0.0, between - waited - beside)
    overlapped = config.parallel.overlap_comm is not False
    if overlapped and stage == 3:  # weights are gathered ahead, gradients scattered behind
        exposed = max(0.0, reduction + gathering - micro * micros)
    elif overlapped and stage == 2:
        exposed = max(0.0, reduction - back * micros) + gathering
    else:
        exposed = reduction + gathering
    update = costs.moved / (device.bandwidth * COPY)
    if config.parallel.offload_optimizer != "none":
        part = sizes.total / ranks
        update = part / HOST_UPDATE + part * 6 / HOST_LINK
    return Time(micro * micros, reduction + gathering + between, exposed + waited, update)
