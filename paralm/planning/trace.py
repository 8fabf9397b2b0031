"""One micro-batch, forward and backward, of the real model on tensors that have no values: what it holds and moves.

One block of each kind is run, between the real embedding and the real head; a model is its kinds, repeated.

    on "gpu"    meta tensors; fused kernels are told instead of launched (paralm_kernels.dry_run)
    on "cpu"    fake tensors, which take the way of a CPU's
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from paralm_kernels import dry_run
from torch import Tensor, nn

from paralm.batching import state_nbytes
from paralm.config import Config
from paralm.errors import ConfigError
from paralm.models.hybrid import layer_mixers
from paralm.models.lm import Block, LanguageModel, checkpointed_blocks, construct_model
from paralm.models.mixers.base import shard_time
from paralm.planning.ledger import Ledger, Segment, gpu_attention
from paralm.planning.shards import CountedShards

On = Literal["gpu", "cpu"]
LONGEST_WALK = 2048
"""Steps that are run where a mixer goes through chunks of time in Python; what is longer is continued linearly."""
PROBE, STEPWISE = 128, 8
"""A mixer that makes so many operations a step, seen over so many steps, walks step by step: twice as many are run."""


_WHATEVER_THE_STEPS: set[tuple[Any, ...]] = set()
"""Models that were seen to make as many operations for a long sequence as for half of it."""


@dataclass(frozen=True)
class Trace:
    """Segments of one micro-batch on one rank; ``layers``: the kind of each layer, an index into ``forward`` and
    ``backward``. ``state_bytes``: of the micro-batch's states. ``sent``: bytes given to other time shards, by kind.
    ``resets``: whether documents' starts were traced. ``tokens``: of the micro-batch on this rank."""

    tokens: int
    layers: list[int]
    embedding: Segment
    forward: list[Segment]
    head: Segment
    head_backward: Segment
    backward: list[Segment]
    embedding_backward: Segment
    state_bytes: int
    sent: dict[str, int]
    resets: bool
    extra_flops: list[float]
    """Of each kind: forward matrix-product FLOPs inside of fused kernels."""
    relays: list[bool]
    """Of each kind: whether time shards take turns in it."""
    again: list[bool]
    """Of each kind: whether its forward is run again in the backward."""


def trace(config: Config, vocab_size: int, on: On = "gpu", gradient_bytes: int = 0) -> Trace:
    """Run one micro-batch without values. ``gradient_bytes``: of a finished gradient's element while others are made;
    it decides which moment is the peak. ``training.activation_checkpointing`` must be settled, not auto. Raises
    ConfigError for a model that cannot be."""
    setting, n = config.training.activation_checkpointing, config.model.n_layers
    if setting == "auto":
        raise ValueError("training.activation_checkpointing: auto is not settled")
    blocks = checkpointed_blocks(setting, n)
    if 0 < blocks < n:
        kept, again = (uniform_trace(config, vocab_size, every, on, gradient_bytes) for every in (False, True))
        return partly_again(kept, again, blocks)
    return uniform_trace(config, vocab_size, blocks > 0, on, gradient_bytes)


def uniform_trace(config: Config, vocab_size: int, again: bool, on: On, gradient_bytes: int) -> Trace:
    """As :func:`trace`, every block or none of them run again in the backward."""
    steps = -(-config.training.seq_len // config.parallel.time)
    training = config.training.model_copy(update={"activation_checkpointing": again})
    config = config.model_copy(update={"training": training})
    try:
        return _of_length(config, vocab_size, on, gradient_bytes, steps, resets=True)
    except (NotImplementedError, RuntimeError, TypeError):
        # Where documents start decides how some mixers cut time (Titans); without values nobody can say.
        try:
            return _of_length(config, vocab_size, on, gradient_bytes, steps, resets=False)
        except NotImplementedError as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"model: what it does depends on values, so it cannot be planned: {first}") from error


def _of_length(config: Config, vocab_size: int, on: On, gradient_bytes: int, steps: int, resets: bool) -> Trace:
    def run(length: int) -> Trace:
        return _run(config, vocab_size, on, gradient_bytes, length, resets)

    # Whether operations become more with the steps is a question of the model alone, asked once.
    kind = config.model.model_dump_json(), on, config.parallel.time > 1, config.training.activation_checkpointing
    if steps <= PROBE or kind in _WHATEVER_THE_STEPS:
        return run(steps)
    short = run(PROBE)
    longest = 2 * PROBE if any(len(s.work) > STEPWISE * PROBE for s in short.forward) else LONGEST_WALK
    whole = run(min(steps, longest))
    half = run(longest // 2) if steps > longest > 2 * PROBE else short
    if steps >= 2 * PROBE and all(
        len(a.work) < 1.2 * len(b.work) for a, b in zip(whole.forward, half.forward, strict=True)
    ):
        _WHATEVER_THE_STEPS.add(kind)
        return run(steps) if steps > longest else whole
    return whole if steps <= longest else _continued(half, whole, steps / longest)


@contextmanager
def _without_values(on: On, ledger: Ledger) -> Iterator[str]:
    """The device that tensors are made on."""
    with ExitStack() as stack:
        if on == "cpu":
            from torch._subclasses.fake_tensor import FakeTensorMode

            stack.enter_context(FakeTensorMode())
        else:
            stack.enter_context(gpu_attention())
            stack.enter_context(dry_run(ledger.told))
        yield "cpu" if on == "cpu" else "meta"


def _run(config: Config, vocab_size: int, on: On, gradient_bytes: int, steps: int, resets: bool) -> Trace:
    training, rows = config.training, config.training.micro_batch_size
    again = training.activation_checkpointing is True
    ledger = Ledger(gradient_bytes)
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = construct_model(config.model, vocab_size).to(dtype)
    layers, kinds = _kinds(model, config)
    model.blocks = nn.ModuleList(kinds)
    with _without_values(on, ledger) as device:
        if device != "meta":
            _move(model, device)
        model.set_activation_checkpointing(again)
        shards = CountedShards(config.parallel.time) if config.parallel.time > 1 else None
        shard_time(model, shards)
        ledger.take(list(model.parameters()))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(ledger.gradient)
        tokens = torch.zeros((rows, steps), dtype=torch.int64, device=device)
        reset = torch.zeros((rows, steps), dtype=torch.bool, device=device) if resets else None
        # A finished state stays, as what the next rows of the same text start from.
        carries = training.carry_state or training.initial_state != "zero"
        start = model.initial_state(rows, device, dtype) if carries else None
        sent = _step(model, ledger, tokens, start, reset, shards)
    segments = {segment.name: segment for segment in ledger.segments}
    forward = [segments[f"block {k}"] for k in range(len(kinds))]
    backward = [segments[f"block {k}, backward"] for k in range(len(kinds))]
    counts = [layers.count(k) for k in range(len(kinds))]
    flops = [float(block.mixer.extra_flops_per_token(config.training.seq_len)) * rows * steps for block in kinds]
    per_kind = state_bytes_of(kinds, rows, dtype) if model.bounded_state else [0] * len(kinds)
    return Trace(
        tokens=rows * steps,
        layers=layers,
        embedding=segments["embedding"],
        forward=forward,
        head=segments["head"],
        head_backward=segments["head, backward"],
        backward=backward,
        embedding_backward=segments["embedding, backward"],
        state_bytes=sum(size * count for size, count in zip(per_kind, counts, strict=True)),
        sent=_totals(sent, counts),
        resets=resets,
        extra_flops=[f if seg.kernels else 0.0 for f, seg in zip(flops, forward, strict=True)],
        relays=[shards is not None and not block.mixer.joins_shards for block in kinds],
        again=[again] * len(kinds),
    )


def _move(model: nn.Module, device: str) -> None:
    """Parameters on a device, in place of those on meta; under a mode that ``Module.to`` cannot work in."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            new = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _kinds(model: LanguageModel, config: Config) -> tuple[list[int], list[Block]]:
    """The kind of each layer, and the first block of each."""
    found: dict[str, int] = {}
    layers, kinds = list[int](), list[Block]()
    for spec, block in zip(layer_mixers(config.model), model.layers, strict=True):
        shapes = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
        key = json.dumps([spec, shapes], sort_keys=True, default=str)
        if key not in found:
            found[key] = len(kinds)
            kinds.append(block)
        layers.append(found[key])
    return layers, kinds


def state_bytes_of(kinds: list[Block], rows: int, dtype: torch.dtype) -> list[int]:
    """Bytes of a kind's state for some rows."""
    with torch.device("meta"):
        return [state_nbytes(block.mixer.initial_state(rows, "meta", dtype)) for block in kinds]


def _step(
    model: LanguageModel,
    ledger: Ledger,
    tokens: Tensor,
    state: Any,
    reset: Tensor | None,
    shards: CountedShards | None,
) -> list[dict[str, int]]:
    """Forward and backward, the ledger marked between the parts; bytes sent by each block."""
    sent: list[dict[str, int]] = []
    count = len(model.blocks)

    def noted(into: Callable[[dict[str, int]], None]) -> None:
        if shards is not None:
            into(dict(shards.bytes_sent))
            shards.bytes_sent.clear()

    def entered(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            if ledger.segments[-1].name.endswith("backward"):
                return  # activation checkpointing runs the block again
            if index:
                noted(sent.append)
            ledger.mark(f"block {index}")
            x = arguments[0]
            after = "embedding" if index == 0 else f"block {index - 1}"
            if x.requires_grad:
                x.register_hook(lambda grad: backward(f"{after}, backward"))

        return hook

    def backward(name: str) -> None:
        noted(lambda bytes_sent: _add(sent, name, bytes_sent))
        ledger.mark(name)

    def head(module: nn.Module, arguments: Any) -> None:
        noted(sent.append)
        ledger.mark("head")
        arguments[0].register_hook(lambda grad: backward(f"block {count - 1}, backward"))

    handles = [block.register_forward_pre_hook(entered(index)) for index, block in enumerate(model.blocks)]
    handles.append(model.norm.register_forward_pre_hook(head))
    with ledger:
        ledger.mark("embedding")
        output = model(tokens, labels=tokens, state=state, reset=reset)
        ledger.mark("head, backward")
        loss = output.loss + output.aux
        loss.backward()
        ledger.mark("end")
    for handle in handles:
        handle.remove()
    return sent


def _add(sent: list[dict[str, int]], name: str, more: dict[str, int]) -> None:
    """What was sent before this mark was sent by the block after it."""
    index = -1 if not name.startswith("block ") else int(name.split(",")[0].removeprefix("block "))
    if 0 <= index + 1 < len(sent):
        for key, size in more.items():
            sent[index + 1][key] = sent[index + 1].get(key, 0) + size


def _totals(sent: list[dict[str, int]], counts: list[int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each, count in zip(sent, counts, strict=False):
        for key, size in each.items():
            total[key] = total.get(key, 0) + size * count
    return total


def _continued(half: Trace, whole: Trace, factor: float) -> Trace:
    """A longer one: what half of the steps adds, added on."""
    more = 2 * (factor - 1)

    def number(a: float, b: float) -> int:
        return round(b + (b - a) * more)

    def segment(a: Segment, b: Segment) -> Segment:
        scale = number(a.moved, b.moved) / max(1, b.moved)
        kernels = number(len(a.work), len(b.work)) / max(1, len(b.work))
        work = [replace(w, flops=w.flops * factor / kernels, moved=round(w.moved * scale / kernels)) for w in b.work]
        work = (work * max(1, round(kernels)))[: max(len(work), round(len(work) * kernels))]
        sizes = {key: number(getattr(a, key), getattr(b, key)) for key in ("begin", "peak", "end", "kernels")}
        return Segment(b.name, gradients=b.gradients, gradients_at_peak=b.gradients_at_peak, work=work, **sizes)

    def segments(a: list[Segment], b: list[Segment]) -> list[Segment]:
        return [segment(x, y) for x, y in zip(a, b, strict=True)]

    return Trace(
        tokens=round(whole.tokens * factor),
        layers=whole.layers,
        embedding=segment(half.embedding, whole.embedding),
        forward=segments(half.forward, whole.forward),
        head=segment(half.head, whole.head),
        head_backward=segment(half.head_backward, whole.head_backward),
        backward=segments(half.backward, whole.backward),
        embedding_backward=segment(half.embedding_backward, whole.embedding_backward),
        state_bytes=whole.state_bytes,
        sent=whole.sent,
        resets=whole.resets,
        extra_flops=[flops * factor for flops in whole.extra_flops],
        relays=whole.relays,
        again=whole.again,
    )


def partly_again(kept: Trace, again: Trace, blocks: int) -> Trace:
    """Of a model of which the first ``blocks`` run again in the backward: from its traces without and with that."""
    n, kinds = len(kept.layers), len(kept.forward)
    more = {key: again.sent.get(key, 0) - size for key, size in kept.sent.items()}
    return replace(
        kept,
        layers=[kind + kinds * (layer < blocks) for layer, kind in enumerate(kept.layers)],
        forward=kept.forward + again.forward,
        backward=kept.backward + again.backward,
        sent={key: size + more[key] * blocks // n for key, size in kept.sent.items()},
        extra_flops=kept.extra_flops + again.extra_flops,
        relays=kept.relays + again.relays,
        again=kept.again + again.again,
    )
