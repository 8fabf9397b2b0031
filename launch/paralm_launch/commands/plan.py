"""``paralm plan``: what a run holds, takes and costs, before anything is allocated."""

from __future__ import annotations

from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING, Annotated

import typer

from paralm_launch.commands.arguments import ConfigArgument, OverridesArgument, add_command
from paralm_launch.console import duration, quantity, say, table

if TYPE_CHECKING:
    from paralm.planning import Parts, RunPlan
    from paralm.planning.run import Planner

BARE = {
    "training.precision": "bf16",
    "training.seq_len": "2048",
    "training.micro_batch_size": "1",
    "training.global_batch_size": "256",
}
"""Of a model preset, which says nothing of training; half a million tokens a step."""


def add_to(parent: typer.Typer) -> None:
    """Add ``plan`` to the application."""
    add_command(parent, plan)


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs in all; nodes have 8. Default: those of the section cluster, or 8.")
    ] = None,
    device: Annotated[str, typer.Option(help="h100, h200, a100 or mi300x.")] = "h100",
    tokens: Annotated[
        float | None, typer.Option(help="Token budget; default: the run's steps, or 20 a parameter for a preset.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of a GPU an hour, in whatever currency.")] = None,
    efficiency: Annotated[float, typer.Option(help="Of the peak, in large matrix products.")] = 0.8,
    kernels: Annotated[float, typer.Option(help="Of a copy's bandwidth, in fused kernels.")] = 1.0,
    search: Annotated[
        bool, typer.Option("--search", help="Try ZeRO stages, micro-batches, checkpointing and time shards.")
    ] = False,
) -> None:
    """Plan a run: memory of a GPU by kind, work, communication, time and cost; what to change if it does not fit.
    CONFIG: a run's, or a model preset (mamba2_7b), which is planned in bf16 with 256 sequences of 2048 a step.

    The real model runs one micro-batch without values: nothing is allocated, 7B answers in seconds on a laptop.
    Without model.vocab_size the vocabulary is that of data.tokenizer, or of the task of data.synthetic.
    """
    from paralm.config_files import load_config
    from paralm.errors import UserError
    from paralm.planning import Planner, device_of, plan_model
    from paralm.planning.run import TOKENS_PER_PARAMETER
    from paralm.synthetic import vocab_size_of

    if tokens is not None and not (isfinite(tokens) and tokens > 0):
        raise UserError(f"--tokens: {tokens:g} is not above 0 and finite")
    if price is not None and not (isfinite(price) and price >= 0):
        raise UserError(f"--price: {price:g} is below 0 or not finite")
    name, bare = _preset(config)
    given = list(overrides or [])
    if bare:
        said = {item.partition("=")[0] for item in given}
        given = [f"{key}={value}" for key, value in BARE.items() if key not in said] + given
    chosen = device_of(device)
    made = load_config(name, given).config
    vocabulary = vocab_size_of(made.data)
    ranks = gpus if gpus is not None else made.cluster.ranks if made.cluster.gpus_per_node else 8
    planner = Planner(made, vocabulary, chosen, ranks, efficiency, kernels)
    if search:
        _show_search(planner)
        return
    _show_parts(plan_model(made.model, vocabulary, made.training.seq_len, planner.model))
    found = planner.plan()
    _show_memory(planner, found)
    budget, origin = tokens, "--tokens"
    if budget is None and bare:
        budget, origin = float(TOKENS_PER_PARAMETER * found.sizes.total), f"{TOKENS_PER_PARAMETER} a parameter"
    elif budget is None:
        budget, origin = float(made.training.max_steps * found.tokens_per_step), "training.max_steps"
    _show_time(found, budget, origin, price)
    _show_assumptions(found, efficiency, kernels)


def _preset(config: str) -> tuple[str, bool]:
    """The configuration's name, and whether it is a model and no run."""
    from paralm import resources

    path = resources.find_preset(config)
    if path is None and resources.find_preset(f"model/{config}") is not None:
        return f"model/{config}", True
    return config, path is not None and path.parent.name == "model"


def _show_parts(found: Parts) -> None:
    rows = [
        (part.name, f"{part.layers}" if part.layers else "", f"{part.parameters:,}", f"{share:.1%}")
        for part in found.parts
        for share in (part.parameters / found.parameters,)
    ]
    table(None, ("part", "layers", "parameters", "share"), [*rows, ("all", "", f"{found.parameters:,}", "")])
    if found.state_elements is None or found.state_bytes is None:
        say("\nstate: grows with the tokens read")
    else:
        say(f"\nstate of a sequence: {found.state_elements:,} numbers, {found.state_bytes / 2**20:,.1f} MiB in bf16")
    say(f"FLOPs a token, forward and backward at seq_len {found.seq_len:,}: {found.flops_per_token:.3g}")


def _show_memory(planner: Planner, found: RunPlan) -> None:
    from paralm.models.lm import checkpointed_blocks

    training, parallel = found.config.training, found.config.parallel
    shards = f", {parallel.time} time shards" if parallel.time > 1 else ""
    assert training.activation_checkpointing != "auto", "a plan has settled it"
    blocks, layers = checkpointed_blocks(training.activation_checkpointing, found.config.model.n_layers), ""
    if blocks < found.config.model.n_layers:
        layers = f" of {blocks} of {found.config.model.n_layers} blocks"
    again = f", activation checkpointing{layers}" if blocks else ""
    say(
        f"\n{found.gpus} × {found.device.name}: ZeRO {parallel.zero_stage}{shards}, {training.precision}{again}, "
        f"micro-batch {training.micro_batch_size} × {found.traced.tokens // training.micro_batch_size:,} tokens, "
        f"{found.micro_batches} a step\n"
    )
    peak = found.memory.peak
    rows = [(kind, _size(size)) for kind, size in peak.kinds.items() if size]
    table(None, ("memory of a GPU", f"in {peak.name}"), [*rows, ("all", _size(peak.total))])
    usable = found.device.usable / 2**30
    if found.memory.host:
        say(f"\nin the host's memory: {found.memory.host / 2**30:.1f} GiB a GPU")
    if found.fits:
        say(f"\nfits: {usable - peak.total / 2**30:.1f} GiB of {usable:.1f} GiB are left")
        return
    say(f"\ndoes not fit: {peak.total / 2**30 - usable:.1f} GiB more than the {usable:.1f} GiB there are")
    remedy = planner.remedy()
    if remedy is None:
        say("nothing that was tried fits (checkpointing, ZeRO 3, micro-batch 1, time shards, offloading): more GPUs")
        return
    for lead, (changes, better) in zip(
        ("fits with", *["or with"] * 9), [remedy, *planner.others(remedy[0])], strict=False
    ):
        words = " ".join(f"{key}={str(better.value(key)).lower()}" for key in changes)
        host = f", {_size(better.memory.host)} of the host's" if better.memory.host else ""
        say(f"{lead}: {words}  ({_size(better.memory.peak.total)}{host}, {better.time.step:.3g} s a step)")


def _size(count: float) -> str:
    """``12.94 GiB``, ``3.2 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _amount(count: float) -> str:
    """``27.8 GB``."""
    text = quantity(count)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def _show_time(found: RunPlan, budget: float, origin: str, price: float | None) -> None:
    time, tokens = found.time, found.tokens_per_step
    seconds = found.seconds_of(budget)
    rate = tokens / time.step
    sent = ", ".join(f"{kind} {_amount(size)}" for kind, size in found.exchange.by_kind().items())
    hours = seconds / 3600 * found.gpus
    days = f"{seconds / 86400:.3g} days, " if seconds > 86400 else ""
    rows = [
        ("FLOPs a token", f"{found.flops_per_token:.3g}"),
        ("memory traffic a token", _amount(found.bytes_per_token)),
        ("communication a step", f"{sent or 'none'}  (a rank's collectives)"),
        ("step", f"{time.step:.3g} s: compute {time.compute:.3g}, communication that nothing hides {time.exposed:.2g} "
                 f"of {time.communication:.2g}, update {time.update:.2g}"),
        ("tokens", f"{quantity(tokens)} a step, {quantity(rate)} a second, {quantity(rate / found.gpus)} a GPU"),
        ("MFU", f"{found.mfu:.1%} of the peak in {found.config.training.precision}"),
        (f"{quantity(budget)} tokens ({origin})", f"{days}{duration(seconds)}, "
                                                  f"{quantity(hours)} GPU hours"),
        ("checkpoint", f"{_amount(found.checkpoint)}, {duration(found.checkpoint_seconds)} to write"),
    ]  # fmt: skip
    if price is not None:
        rows.insert(7, ("cost", f"{hours * price:,.0f} at {price:g} a GPU hour"))
    say("")
    table(None, ("", ""), rows)


SHOWN = 10
"""Plans of a search, at most."""


def _show_search(planner: Planner) -> None:
    from paralm.planning.search import CHOSEN, NEAR, ROOM, search

    shards = [2**i for i in range(planner.gpus.bit_length())]
    found = search(planner, shards)
    if found.best is None:
        say(f"none of {found.tried} fits with {ROOM:.0%} of the memory left: more GPUs, or offloading")
        return
    say(f"{planner.gpus} × {planner.device.name}: {found.tried} tried, {len(found.plans)} fit with {ROOM:.0%} left\n")
    rows = [
        (
            *(str(plan.value(key)).lower() for key in CHOSEN),
            f"{plan.micro_batches}",
            _size(plan.memory.peak.total),
            f"{plan.time.step:.3g} s",
            f"{plan.mfu:.1%}",
            f"{plan.time.communication:.2g} s",
        )
        for plan in found.plans[:SHOWN]
    ]
    heads = ("zero_stage", "time", "micro_batch_size", "checkpointed blocks", "a step", "memory", "step", "MFU")
    table(None, (*heads, "communication"), rows)
    words = " ".join(f"{key}={str(found.best.value(key)).lower()}" for key in CHOSEN)
    say(f"\nbest (equal within {NEAR:.0%}: the lowest stage): {words}  ({found.best.time.step:.3g} s a step)")


def _show_assumptions(found: RunPlan, efficiency: float, kernels: float) -> None:
    from paralm.planning import cost

    device = found.device
    say(
        f"\nassumed: products at {efficiency:.0%} of {device.bf16 / 1e12:.0f} TFLOP/s in bf16 (--efficiency) and "
        f"{device.fp32 / 1e12:.0f} in fp32; memory at {cost.COPY:.0%} of {device.bandwidth / 1e12:.3g} TB/s, in fused "
        f"kernels at {kernels:.0%} of that (--kernels); a kernel takes at least {cost.LAUNCH * 1e6:.0f} µs; "
        f"collectives at {cost.LINK:.0%} of {device.link / 1e9:.0f} GB/s a GPU in a node of {device.per_node} and of "
        f"{device.port / 1e9:.0f} GB/s a GPU between nodes, {cost.HOP * 1e6:.0f} µs from rank to rank; checkpoints at "
        f"{cost.STORAGE / 1e9:.0f} GB/s a node; {cost.RESERVED / 2**30:.1f} GiB and {cost.FRAGMENTED:.0%} of "
        f"the memory are not the plan's to fill"
    )
    if found.config.parallel.offload_optimizer != "none":
        say(
            f"assumed of offloading, a GPU: {cost.HOST_LINK / 1e9:.0f} GB/s to the host, "
            f"{cost.HOST_UPDATE / 1e9:.0f}G elements a second updated there"
        )
    if found.config.training.compile:
        say("training.compile: planned as if it were off; compiled blocks keep and move less")
    if find_spec("triton") is None:
        say("not traced: the fused kernels that a GPU runs (Triton is not installed here); memory and time are more")
    if any(found.traced.relays):
        say("time shards take turns in this model's mixers: a block is taken to wait for all of them")
    if not found.traced.resets:
        say("not traced: where documents start within a row (it decides how this model cuts time)")
