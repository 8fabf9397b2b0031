"""``report.md``: what a run was, what it reached, how it got there, and what to do next.

Everything in it is read from the run's folder, so it can be written anew at any time: while the run trains (then
without results), after it, or after the folder was moved.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from paralm_data.atomic import write_file

from paralm.config import Config, SourceConfig, TrainingConfig
from paralm.errors import RunError
from paralm.evaluation import markdown as md
from paralm.evaluation import record as records
from paralm.evaluation.compression import CompressionResult
from paralm.evaluation.curves import Curves, read_curves, write_curves
from paralm.evaluation.figures import short
from paralm.evaluation.perplexity import PerplexityResult
from paralm.evaluation.record import Record
from paralm.evaluation.result import eval_dir, read_json
from paralm.evaluation.samples import SamplesResult
from paralm.models.hybrid import mixer_names, mixer_pattern
from paralm.training.run_folder import RunFolder


@dataclass(frozen=True)
class ResultSet:
    """What lies in ``eval/``; by set, ``held_out`` first."""

    record: Record | None = None
    perplexity: dict[str, PerplexityResult] = field(default_factory=dict)
    compression: dict[str, CompressionResult] = field(default_factory=dict)
    samples: SamplesResult | None = None


def read_results(run_dir: Path) -> ResultSet:
    """The results of a run's last whole evaluation. RunError, one line, for a damaged file."""
    record = records.load(run_dir)
    if record is None:
        return ResultSet()
    folder = eval_dir(run_dir)
    scored: dict[str, PerplexityResult] = {}
    compressed: dict[str, CompressionResult] = {}
    for name in record.basis.stores:
        tail = "" if name == "held_out" else f"_{name}"
        perplexity = read_json(PerplexityResult, folder / f"perplexity{tail}.json")
        compression = read_json(CompressionResult, folder / f"compression{tail}.json")
        if perplexity is not None:
            scored[name] = perplexity
        if compression is not None:
            compressed[name] = compression
    return ResultSet(record, scored, compressed, read_json(SamplesResult, folder / "samples.json"))


def write_report(run_dir: str | Path) -> Path:
    """Draw the figures and write ``report.md`` in a run's folder; returns its path.

    Raises RunError, one line: no run folder, no metrics, or a damaged file.
    """
    path = Path(run_dir)
    config = RunFolder(path).saved_config()
    if config is None:
        raise RunError(f"{path}: no config.yaml, so this is not a run folder")
    curves, results = read_curves(path), read_results(path)
    held_out = results.compression.get("held_out")
    levels = {k: v for k, v in held_out.bits_per_byte.items() if k in ("gzip -9", "xz -9e")} if held_out else {}
    drawn = write_curves(path, curves, levels)
    parts = [
        _head(config, curves, results),
        *_measured(path, config, results),
        *_suite(path),
        *_course(path, config, curves, drawn),
        *_text(results),
        *_made_from(config, curves, results),
        *_environment(path),
        *_next(path, config, curves, results),
    ]
    report = path / "report.md"
    write_file(report, ("\n\n".join(parts) + "\n").encode("utf-8"))
    return report


def _head(config: Config, curves: Curves, results: ResultSet) -> str:
    step, last = int(curves.step[-1]), config.training.max_steps
    kind = "language model" if config.data.synthetic is None else "model"
    what = f"A {mixer_names(config.model)} {kind}"
    if results.record is not None:
        what += f" of {short(results.record.parameters)} parameters"
    own, seconds = float(curves.tokens[-1]) - curves.tokens_before, float(curves.seconds[-1])
    trained = f"trained on {short(own)} tokens in {md.duration(seconds)}"
    far = "" if step >= last else f" so far (step {step:,} of {last:,})"
    if curves.tokens_before:
        far += f", after {short(curves.tokens_before)} in the run it was forked from"
    measured = "."
    if results.record is not None:
        measured = f", measured after step {results.record.basis.step:,}."
    return f"# {config.run.name}\n\n{what}, {trained}{far}{measured}"


# -- results -------------------------------------------------------------------------------------------------


def _measured(run_dir: Path, config: Config, results: ResultSet) -> list[str]:
    if config.data.synthetic is not None:
        return _task_measured(run_dir)
    heading = "## On text it was not trained on"
    if results.record is None or "held_out" not in results.perplexity:
        return [heading, f"Not measured yet: `paralm eval {_quoted(run_dir)}`."]
    parts = [heading]
    for name, scored in results.perplexity.items():
        compressed = results.compression.get(name)
        same = compressed is not None and compressed.n_bytes == scored.n_bytes
        parts += _against_compressors(name, scored, compressed if same else None)
    parts.append("### Perplexity")
    parts.append(
        md.table(
            ["set", "documents", "tokens", "nats per token", "token perplexity", "word perplexity"],
            [
                [
                    _shown(name) + ("" if r.step == results.record.basis.step else f" (step {r.step:,})"),
                    f"{r.n_documents:,} of {r.of_documents:,}",
                    f"{r.tokens:,}",
                    f"{r.nats_per_token:.4f}",
                    _with_interval(r.token_perplexity, r.token_perplexity_interval),
                    _with_interval(r.word_perplexity, r.word_perplexity_interval),
                ]
                for name, r in results.perplexity.items()
            ],
            right=range(1, 6),
        )
    )
    parts.append(_how_scored(results.record, results.perplexity["held_out"].reset_every))
    figure = eval_dir(run_dir) / "perplexity_by_position.png"
    if figure.exists():
        parts.append(f"![Loss by position]({figure.relative_to(run_dir).as_posix()})")
    return parts


def _suite(run_dir: Path) -> list[str]:
    """Where the evaluations by name are."""
    if not (eval_dir(run_dir) / "report.md").is_file():
        return []
    return ["Every evaluation made of it, past the training length too, is in [eval/report.md](eval/report.md)."]


def _task_measured(run_dir: Path) -> list[str]:
    """Of a run of a synthetic task."""
    from paralm.evaluation.tracking import Tracking, TrackingResult

    heading = "## On examples it was not trained on"
    found = read_json(TrackingResult, eval_dir(run_dir) / "tracking.json")
    if found is None:
        return [heading, f"Not measured yet: `paralm eval {_quoted(run_dir)}`."]
    return [heading, Tracking.page([found]).replace("](tracking_", "](eval/tracking_")]


def _against_compressors(name: str, scored: PerplexityResult, compressed: CompressionResult | None) -> list[str]:
    rows = [(scored.bits_per_byte, ["**this model**", f"**{scored.bits_per_byte:.3f}**"])]
    rows[0][1].extend([md.interval(scored.bits_per_byte_interval, 3), ""])
    for label, value in (compressed.bits_per_byte if compressed else {}).items():
        rows.append((value, [label, f"{value:.3f}", "", f"{value / scored.bits_per_byte - 1:+.1%}"]))
    rows.sort(key=lambda row: row[0])
    header = [f"{_shown(name)} text", "bits per byte", "95 % interval", "against the model"]
    parts = [md.table(header, [cells for _, cells in rows], right=(1, 2, 3))]
    if compressed is not None and compressed.bits_per_byte:
        parts.append(
            f"Lower is better; every row is of the same {scored.n_bytes:,} bytes. The compressors see these bytes "
            "alone, as one stream, and were trained on nothing; the model has read other text of the kind before, and "
            "its own size is not counted, but it starts every document from nothing and also pays for its end."
        )
    elif compressed is not None and compressed.reason:
        parts.append(
            f"No compressor stands beside it: {compressed.reason}. What the tokenizer loses the model need not "
            "predict, so its bits per byte are too good."
        )
    return parts


def _how_scored(record: Record, reset_every: int | None) -> str:
    if reset_every is not None:
        how = (
            f"Each token but the first of a document is scored once; the model forgets after every "
            f"{reset_every:,} tokens of a document."
        )
    else:
        how = (
            "Each token but the first of a document is scored once, with the whole document before it read: the state "
            "is carried from its first token to its last"
        )
        how += f" ({_bytes(record.state_bytes)} a document)." if record.state_bytes is not None else "."
    return (
        f"{how} A document's end counts as a token. Words are what lies between blanks. Intervals are of 95 %, by "
        f"bootstrap over documents. In {record.dtype} on {record.device}, {md.duration(record.seconds)}."
    )


# -- course --------------------------------------------------------------------------------------------------


def _course(run_dir: Path, config: Config, curves: Curves, drawn: dict[str, Path]) -> list[str]:
    parts = ["## How it got there"]
    titles = {
        "loss": "Loss over tokens",
        "throughput": "Throughput and the time of a step",
        "optimization": "Gradient norm and learning rate",
        "newton": "Newton iterations by layer",
    }
    parts += [f"![{titles[name]}]({file.relative_to(run_dir).as_posix()})" for name, file in drawn.items()]
    facts = [f"{short(float(np.median(curves.tokens_per_s)))} tokens per second (median)"]
    if np.isfinite(curves.mfu).any():
        used = f"model FLOP utilisation {float(np.nanmedian(curves.mfu)):.1%} (median)"
        facts.append(f"{used} of the peak in {config.training.precision}")
    skipped = int(curves.skipped.sum())
    facts.append(f"{skipped:,} skipped steps" if skipped else "no step skipped")
    for name, found in curves.validation.items():
        if len(found.loss):
            bits, right = float(found.bits_per_byte[-1]), float(found.accuracy[-1])
            reached = f"{bits:.3f} bits per byte" if np.isfinite(bits) else f"{right:.1%} of the answers right"
            facts.append(f"last validation, {_shown(name)}: {reached}")
    parts.append("\n".join(f"- {fact}" for fact in facts))
    return parts


def _text(results: ResultSet) -> list[str]:
    found = results.samples
    if found is None or not found.samples:
        return []
    drawn = f"temperature {found.temperature:g}, top-p {found.top_p:g}"
    drawn += f", top-k {found.top_k}" if found.top_k else ""
    parts = ["## What it writes", f"Each begins with the prompt in its title; {drawn}, seed {found.seed}."]
    for sample in found.samples:
        end = "" if not sample.ended else " (it ended the document here)"
        parts.append(f"### {md.code(sample.prompt)}{end}")
        parts.append(md.fence(sample.prompt + sample.text))
    return parts


# -- circumstances -------------------------------------------------------------------------------------------


def _mixer_row(spec: Mapping[str, Any]) -> str:
    keys = ", ".join(f"{k} {v}" for k, v in spec.items() if k != "name")
    return str(spec["name"]) + (f" ({keys})" if keys else "")


def _made_from(config: Config, curves: Curves, results: ResultSet) -> list[str]:
    model, training, optimizer = config.model, config.training, config.optimizer
    task = config.data.synthetic
    rows = [
        ["text", _read(config)]
        if task is None
        else ["task", ", ".join(f"{key} {value}" for key, value in task.items()).removeprefix("task ")],
        *(["mixer", _mixer_row(spec)] for spec, _ in mixer_pattern(model)),
        ["layers × width", f"{model.n_layers} × {model.d_model}"],
        ["parameters", f"{results.record.parameters:,}" if results.record is not None else ""],
        ["sequence length", f"{training.seq_len:,} tokens" + _started(training)],
        ["batch", f"{training.global_batch_size:,} sequences"],
        ["steps", f"{int(curves.step[-1]):,} of {training.max_steps:,}"],
        ["optimizer", f"{optimizer.name}, learning rate {optimizer.lr:g}, {optimizer.schedule.kind}"],
        ["precision", training.precision],
        ["seed", str(config.run.seed)],
    ]
    shown = md.table(["", ""], [row for row in rows if row[1]])
    return ["## What it was made from", shown, "The whole configuration is in [config.yaml](config.yaml)."]


def _read(config: Config) -> str:
    """Where the text came from, and of a mixture how often each source is drawn."""

    def of(source: SourceConfig) -> str:
        return source.dataset or (", ".join(source.paths) if source.paths else source.kind)

    mixture = config.data.mixture
    if mixture is None:
        return of(config.data.source)
    fixed = mixture.weights == "fixed"
    parts = []
    for name, source in mixture.sources.items():
        weight = f", weight {1 if source.weight is None else source.weight:g}" if fixed else ""
        parts.append(f"{name} ({source.store or of(source)}{weight})")
    how = "" if fixed else f"; weights: {mixture.weights}" + (f" for {mixture.target}" if mixture.target else "")
    return "; ".join(parts) + how


def _started(training: TrainingConfig) -> str:
    """What rows start from, where that is not zeros."""
    if training.carry_state:
        return ", state carried"
    return "" if training.initial_state == "zero" else f", initial state: {training.initial_state}"


def _environment(run_dir: Path) -> list[str]:
    path = run_dir / "environment.json"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        return ["## Environment", "environment.json cannot be read."]
    packages = found.get("packages")
    rows = [
        ["started", str(found.get("started", ""))],
        ["command", md.code(shlex.join(map(str, found.get("command") or [])))],
        ["machine", f"{found.get('host', '?')}, {found.get('cpus', '?')} processors, {found.get('platform', '?')}"],
        ["python", str(found.get("python", "?"))],
        ["packages", ", ".join(f"{k} {v}" for k, v in packages.items()) if isinstance(packages, dict) else ""],
        ["git commit", md.code(str(found["git_commit"])) if found.get("git_commit") else ""],
    ]
    return ["## Environment", md.table(["", ""], [row for row in rows if row[1]])]


def _next(run_dir: Path, config: Config, curves: Curves, results: ResultSet) -> list[str]:
    run, steps = _quoted(run_dir), config.training.max_steps
    prompt = results.samples.samples[0].prompt if results.samples and results.samples.samples else ""
    commands = [
        ("text from the model", f"paralm generate {run}" + (f" --prompt {shlex.quote(prompt)}" if prompt else "")),
        ("every metric, in a browser", f"paralm monitor {run}"),
        ("measure on more text", f"paralm eval {run} eval.max_tokens={config.eval.max_tokens * 10}"),
        ("beside another run", f"paralm compare {run} OTHER_RUN"),
    ]
    if config.data.synthetic is not None:
        commands = [commands[1], ("more examples", f"paralm eval tracking {run} samples=4096"), commands[3]]
    if curves.step[-1] < steps:
        moved = run_dir.resolve() != config.run_dir.resolve()  # then its config.yaml names another folder
        here = f" run.root={_quoted(run_dir.parent)} run.name={shlex.quote(run_dir.name)}" if moved else ""
        commands.insert(0, ("train on", f"paralm run {_quoted(run_dir / 'config.yaml')}{here}"))
    else:
        longer = (
            f"paralm run {_quoted(run_dir / 'config.yaml')} run.name={config.run.name}-longer "
            f"training.fork_from={run}@{steps} training.max_steps={2 * steps}"
        )
        commands.append(("train on from here, as a new run", longer))
    width = max(len(command) for _, command in commands[:-1])
    lines = [f"{command:<{width}}  # {what}" for what, command in commands]
    return ["## What next", md.fence("\n".join(lines), "sh")]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _shown(name: str) -> str:
    return name.replace("_", "-")


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    digits = 2 if value < 1000 else 0
    return f"{value:,.{digits}f}" + (f" ({md.interval(interval, digits)})" if interval is not None else "")


def _bytes(count: int) -> str:
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count} bytes"
