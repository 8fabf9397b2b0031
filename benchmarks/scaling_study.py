"""What would 7B training take on 8 to 1,024 GPUs, with sequences of 2K to 1M, and which dimension should be cut when?

    make scaling-study           (or)  .venv/bin/python benchmarks/scaling_study.py [--check] [--only TITLE ...]

A study on paper: every number is `paralm plan`'s, from the real models traced without values; what was measured of its
constants and what is assumed stands in the document. Writes docs/scaling.md and docs/scaling.png; --check compares
instead, --only makes some of the sections. Minutes on one core, most of them for Titans.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from paralm.config_files import load_config
from paralm.evaluation.figures import row as figure_row
from paralm.evaluation.figures import save, style
from paralm.evaluation.markdown import table
from paralm.models import flops_per_token
from paralm.planning import Planner, RunPlan, cost, device_of, shards
from paralm.planning.run import Changes, value_of
from paralm.planning.search import CHOSEN, NEAR, ROOM, search

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, FIGURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.png"
MEASURED = ROOT / "benchmarks" / "results" / "solver_variants_NVIDIA_H100_80GB_HBM3.json"
ROUNDS = ROOT / "benchmarks" / "results" / "time_shards.json"

MODELS = ("paragru", "paralstm", "mamba2", "xlstm", "titans_mag", "transformer")
SCALES = (8, 64, 256)
TOKENS = 2**22
STEPS = 33_000
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
CONTEXTS = tuple(2**i for i in (11, 13, 15, 17, 19, 20))
GRID = (8, 64, 256, 1024)


@cache
def planner(model: str) -> Planner:
    """Of a model's run; all that was traced of it is kept here."""
    made = load_config(f"7b/{model}_8").config
    return Planner(made, made.data.tokenizer.vocab_size, device_of("h100"), 8, cost.EFFICIENCY)


def spread_of(name: str) -> Changes:
    """What a run's configuration says of the keys that a search decides."""
    made = load_config(name).config
    return {key: value_of(made, key) for key in CHOSEN}


@cache
def best(model: str, gpus: int, context: int, most_shards: int | None = None) -> RunPlan | None:
    """The plan to take for TOKENS a step in sequences of ``context``; None: nothing fits.

    Time shards are tried from the fewest that leave no GPU without a sequence, doubled until twice in a row that is no
    faster. ``most_shards``: at most so many.
    """
    rows = TOKENS // context
    here = planner(model).on(gpus, changes={"training.seq_len": context, "training.global_batch_size": rows})
    time, plans, worse = max(1, gpus // rows), list[RunPlan](), 0
    while time <= min(gpus, most_shards or gpus) and worse < 2:
        found = search(here, (time,)).best
        if found is not None and (not plans or found.time.step < (1 - NEAR) * min(p.time.step for p in plans)):
            plans.append(found)
            worse = 0
        elif plans:
            worse += 1
        time *= 2
    return min(plans, key=lambda plan: plan.time.step, default=None)


# -- how a plan is written ---------------------------------------------------------------------------------------

HEADS = ("data × time", "ZeRO", "micro-batch × a step", "blocks again", "GiB", "s a step", "tokens/s/GPU", "MFU")
HEADS += ("communication", "if none is hidden")


def cells(plan: RunPlan) -> tuple[str, ...]:
    """As HEADS: communication as the part of a step that nothing hides; then the step if nothing hid any."""
    parallel, training, time = plan.config.parallel, plan.config.training, plan.time
    exposed = time.step - time.exposed + time.communication
    return (
        f"{plan.gpus // parallel.time} × {parallel.time}",
        f"{parallel.zero_stage}",
        f"{training.micro_batch_size} × {plan.micro_batches}",
        f"{int(training.activation_checkpointing)} of {plan.config.model.n_layers}",
        f"{plan.memory.peak.total / 2**30:.1f}",
        f"{time.step:.3g}",
        f"{plan.tokens_per_step / time.step / plan.gpus:,.0f}",
        f"{plan.mfu:.1%}",
        f"{time.exposed / time.step:.1%}",
        f"{exposed / time.step - 1:+.0%}",
    )


def length(context: int) -> str:
    """2K, 1M."""
    return f"{context // 1024}K" if context < 2**20 else f"{context // 2**20}M"


def plans_table(lead: str, rows: list[tuple[str, RunPlan | None]]) -> str:
    """``lead``: what the first column is."""
    made = [(name, *(cells(plan) if plan else ("nothing fits", *[""] * (len(HEADS) - 1)))) for name, plan in rows]
    return table((lead, *HEADS), made, right=range(1, 1 + len(HEADS)))


# -- sections ----------------------------------------------------------------------------------------------------


def fractions() -> Iterator[tuple[str, list[float]]]:
    """Of the copy's bandwidth that the solver's forward kernels reached on an H100: the best of the variants, by shape
    and for cells that forget and that remember."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    states = {"paragru": 1, "paralstm": 2}
    found: dict[tuple[int, ...], dict[tuple[str, float], float]] = {}
    for row in rows:
        batch, time, channels = shape = row["shape"]
        moved = 2 * (3 + states[row["cell"]]) * batch * time * channels
        reached = moved / row["copy_bytes_per_second"] / (row["fwd_ms"] / 1e3)
        cases = found.setdefault(tuple(shape), {})
        case = (row["cell"], row["bias"])
        cases[case] = max(cases.get(case, 0.0), reached)
    for shape, cases in found.items():
        yield " × ".join(f"{size:,}" for size in shape), list(cases.values())


def lowest_fraction() -> float:
    """At 8 × 2,048 × 4,096, the shape of these models' micro-batches."""
    return min(dict(fractions())["8 × 2,048 × 4,096"])


def constants() -> str:
    h100 = device_of("h100")
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    copy = sorted(row["copy_bytes_per_second"] for row in rows)
    rounds = {r["rounds"] for r in json.loads(ROUNDS.read_text(encoding="utf-8"))["rows"] if r["rounds"]}
    lines = [
        ("memory bandwidth in a copy", f"{cost.COPY:.0%} of {h100.bandwidth / 1e12} TB/s",
         f"measured on an H100: {copy[0] / 1e12:.2f} to {copy[-1] / 1e12:.2f} TB/s "
         f"({min(copy) / h100.bandwidth:.0%} to {max(copy) / h100.bandwidth:.0%})"),
        ("matrix products in bf16", f"{cost.EFFICIENCY:.0%} of {h100.bf16 / 1e12:.0f} TFLOP/s",
         "measured on an H100 in large products alone, not within a step"),
        ("a kernel takes at least", f"{cost.LAUNCH * 1e6:.0f} µs", "measured on an H100"),
        ("fused kernels", "as a copy", "**not reached**: see below"),
        ("exchanges of a time-sharded cell", f"{shards.ROUNDS} a solve; what ranks compute twice for it takes no time",
         f"{min(rounds)} to {max(rounds)} counted on CPUs, on up to 4 shards (`benchmarks/results/time_shards.json`)"),
        ("links", f"{cost.LINK:.0%} of {h100.link / 1e9:.0f} GB/s in a node, of {h100.port / 1e9:.0f} GB/s a GPU "
         "between nodes", "assumed; nothing was measured between GPUs"),
        ("overlap of communication", "complete, where there is compute to hide it", "assumed; the last column has the "
         "step without any"),
        ("from rank to rank in a ring", f"{cost.HOP * 1e6:.0f} µs", "assumed; it is what weighs at 1,024 GPUs"),
        ("a plan itself", f"to {NEAR:.0%}", "steps that differ by less are called equal, and the lower ZeRO stage is "
         "taken"),
        ("memory", f"{h100.usable / 2**30:.1f} GiB of {h100.memory / 2**30:.1f}, {ROOM:.0%} of it left free",
         "peaks within 15 % of training on a CPU; not measured on a GPU"),
    ]  # fmt: skip
    reached = [(shape, f"{min(cases):.0%} to {max(cases):.0%}") for shape, cases in fractions()]
    return "\n\n".join(
        [
            table(("constant", "value", "what it rests on"), lines),
            "Of a copy's bandwidth, the cells' forward kernels reached (best variant of each case, seconds of the host "
            "included; `benchmarks/results/solver_variants_NVIDIA_H100_80GB_HBM3.json`, made before the kernels had "
            "their present form):",
            table(("batch × time × channels", "lowest and highest case"), reached),
        ]
    )


def configurations(models: tuple[str, ...] = MODELS) -> str:
    rows, budget = list[tuple[str, RunPlan | None]](), list[tuple[str, ...]]()
    for model in models:
        for gpus in SCALES:
            made = load_config(f"7b/{model}_{gpus}").config
            plan = planner(model).on(gpus).plan(spread_of(f"7b/{model}_{gpus}"))
            rows.append((f"`7b/{model}_{gpus}`", plan))
            tokens = made.training.max_steps * plan.tokens_per_step
            days = plan.seconds_of(tokens) / 86400
            each = made.checkpoint.every * plan.time.step / 60
            budget.append((f"`7b/{model}_{gpus}`", f"{plan.sizes.total:,}", f"{made.training.seq_len:,}",
                           f"{made.optimizer.lr:g}", f"{days:.3g}", f"{days * 24 * gpus:,.0f}",
                           f"{each:.0f} min, {plan.checkpoint / 1e9:.0f} GB"))  # fmt: skip
    heads = ("run", "parameters", "seq_len", "lr", "days", "GPU hours", "a checkpoint every")
    return "\n\n".join(
        [
            f"Each step has {TOKENS:,} tokens, each run {STEPS * TOKENS / 1e9:.1f} billion. A row is what `paralm plan "
            "7b/NAME` says, and the best of what its `--search` tries without time shards "
            "(`tests/paralm/test_configs_7b.py`, but for Titans).",
            plans_table("run", rows),
            table(heads, budget, right=range(1, len(heads))),
            "Titans' neural memory is taken as torch compiles it on a GPU: one kernel for what is between two matrix "
            "products, each moving what goes in and comes out once.",
        ]
    )


def more_gpus(models: tuple[str, ...] = ("paragru", "transformer")) -> str:
    parts = []
    for model in models:
        context = planner(model).config.training.seq_len
        rows = [(f"{gpus:,}", best(model, gpus, context, most_shards=1)) for gpus in GPUS]
        parts += [f"**{model}**, {TOKENS:,} tokens a step in sequences of {context:,}:", plans_table("GPUs", rows)]
    return "\n\n".join(parts)


def longer_contexts(models: tuple[str, ...] = ("paragru", "mamba2", "transformer")) -> str:
    parts = []
    for model in models:
        rows = [(length(context), best(model, 64, context)) for context in CONTEXTS]
        parts += [f"**{model}** on 64 GPUs, {TOKENS:,} tokens a step:", plans_table("context", rows)]
        if model != "transformer":
            alone = [c for c in CONTEXTS if (p := best(model, 8, c, most_shards=1)) is not None and p.fits]
            parts.append(f"Without time shards a GPU of 8 holds sequences of up to {length(max(alone))}.")
    parts.append(
        "A Transformer's state grows with the sequence, and it is not cut over time here; its FLOPs a token grow too, "
        f"from {flops_per_token(planner('transformer').model, 2**11):.3g} at 2K to "
        f"{flops_per_token(planner('transformer').model, 2**20):.3g} at 1M, while ParaGRU's stay "
        f"{flops_per_token(planner('paragru').model, 2**20):.3g}."
    )
    return "\n\n".join(parts)


def which_dimension() -> str:
    heads = ("context", *(f"{gpus:,} GPUs" for gpus in GRID))
    rows = []
    for context in CONTEXTS:
        row = [length(context)]
        for gpus in GRID:
            plan = best("paragru", gpus, context)
            if plan is None:
                row.append("nothing fits")
                continue
            time, again = plan.config.parallel.time, int(plan.config.training.activation_checkpointing)
            row.append(f"{gpus // time} × {time}, ZeRO {plan.config.parallel.zero_stage}"
                       f"{f', {again} again' if again else ''}: {plan.mfu:.0%}")  # fmt: skip
        rows.append(tuple(row))
    return "\n\n".join(
        [
            "ParaGRU, data × time, ZeRO stage, blocks that run again, MFU:",
            table(heads, rows),
            "Time is cut where there are fewer sequences than GPUs, or where one of them is too long for a GPU; "
            f"otherwise data. Both come from the batch: {TOKENS:,} tokens are {TOKENS // CONTEXTS[0]:,} sequences of "
            f"{length(CONTEXTS[0])}, and {TOKENS // CONTEXTS[-1]} of {length(CONTEXTS[-1])}. More shards than that "
            f"forces are taken where they make a step {NEAR:.0%} faster.",
            "![Predicted MFU of ParaGRU over context, and memory of a GPU over time shards](scaling.png)",
        ]
    )


def sensitivity() -> str:
    slow = round(lowest_fraction(), 2)
    cases: list[tuple[str, float, float, bool]] = [
        ("as planned", cost.EFFICIENCY, 1.0, False),
        (f"fused kernels at {slow:.0%} of a copy, the lowest measured at this shape", cost.EFFICIENCY, slow, False),
        ("products at 60 % of the peak", 0.6, 1.0, False),
        ("nothing of the communication hidden", cost.EFFICIENCY, 1.0, True),
        ("all three", 0.6, slow, True),
    ]
    rows = []
    for name, efficiency, kernels, bare in cases:
        plan = planner("paragru").on(64, efficiency=efficiency, kernels=kernels).plan(spread_of("7b/paragru_64"))
        step = plan.time.step + (plan.time.communication - plan.time.exposed if bare else 0)
        rows.append((name, f"{step:.3g}", f"{plan.mfu * plan.time.step / step:.1%}",
                     f"{plan.seconds_of(STEPS * TOKENS) / plan.time.step * step / 86400:.3g}"))  # fmt: skip
    return "\n\n".join(
        [
            "`7b/paragru_64`, one assumption changed at a time:",
            table(("case", "s a step", "MFU", "days"), rows, right=(1, 2, 3)),
            "A first run will say; `paralm plan --efficiency` and `--kernels` take what it measures.",
        ]
    )


HEADER = f"""# Scaling, on paper

What 7B training would take, before a cluster is booked: every number here is computed by `paralm plan` from the real
models, traced without values, for H100 SXM 80 GB in nodes of 8. **None of these runs was made.** Made by
`make scaling-study` (`benchmarks/scaling_study.py`); tests make parts of it again and compare.

Columns: *data × time*: GPUs that read different sequences × those that share each; *blocks again*: run a second time in
the backward; *GiB*: the peak on a GPU; *communication*: the part of a step that nothing hides; *if none is hidden*: how
much longer a step would be. Plans keep {ROOM:.0%} of the memory free. Rows with time shards are the least certain: that
a cell walks its part of a sequence again is not in them, nor is waiting for the slowest of many GPUs in any."""

SECTIONS: dict[str, Callable[[], str]] = {
    "What the numbers rest on": constants,
    "The eighteen runs": configurations,
    "More GPUs": more_gpus,
    "Longer sequences": longer_contexts,
    "Which dimension to cut when": which_dimension,
    "If the assumptions are wrong": sensitivity,
}


def draw() -> None:
    """MFU over context, and a GPU's memory over time shards."""
    figure, (left, right) = figure_row(2)
    style(left, "context, tokens", "predicted MFU, %")
    for gpus in GRID:
        found = [(context, best("paragru", gpus, context)) for context in CONTEXTS]
        known = [(context, 100 * plan.mfu) for context, plan in found if plan is not None]
        left.plot(*zip(*known, strict=True), marker="o", label=f"{gpus:,} GPUs")
    left.set_xscale("log", base=2)
    left.set_xticks(CONTEXTS, [length(context) for context in CONTEXTS])
    left.set_ylim(0)
    left.legend(frameon=False)
    counts = [16, 32, 64, 128, 256]
    style(right, "time shards", "GiB of a GPU, sequences of 1M")
    for model in ("paragru", "mamba2"):
        shape = {"training.seq_len": 2**20, "training.global_batch_size": 4, "training.micro_batch_size": 1}
        held = planner(model).on(256, changes=shape)
        fixed = {"parallel.zero_stage": 3, "training.activation_checkpointing": True}
        plans = [held.plan({"parallel.time": count, **fixed}) for count in counts]
        right.plot(counts, [plan.memory.peak.total / 2**30 for plan in plans], marker="o", label=model)
    right.axhline(device_of("h100").usable / 2**30, color="#7F7F7F", linestyle=":", label="what there is")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(counts, [str(n) for n in counts])
    right.legend(frameon=False)
    save(figure, FIGURE)


def sections_of(text: str) -> dict[str, str]:
    """The parts of the document by their titles."""
    parts = text.split("\n## ")
    return {part.partition("\n")[0]: part.partition("\n")[2].strip("\n") for part in parts[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the document there is")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args()
    before = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    made = {**sections_of(before), **{title: SECTIONS[title]() for title in options.only}}
    text = "\n\n".join([HEADER, *(f"## {title}\n\n{made[title]}" for title in SECTIONS if title in made)]) + "\n"
    if options.check:
        if text != before:
            sys.exit(f"{DOCUMENT}: is not what this makes; make scaling-study")
        return
    DOCUMENT.write_text(text, encoding="utf-8")
    if list(options.only) == list(SECTIONS):
        draw()


if __name__ == "__main__":
    main()
