"""The stages of a run, each of which does nothing when its work is there: prepare, train, evaluate, report."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralm.config import Config, SourceConfig
from paralm.config_files import frozen_differences, load_config
from paralm.errors import EXIT_USER, ConfigError, RunError, UserError
from paralm.user_modules import load_modules
from paralm_launch import preparing
from paralm_launch.console import ProgressLine, duration, quantity, say, table
from paralm_launch.discovery import settle
from paralm_launch.launchers import get_launcher

if TYPE_CHECKING:
    from paralm_data import Execution, Prepared, PreparedMixture, Progress, SourceSpec


@dataclass(frozen=True)
class RunPlace:
    """A run's folder, its configuration, and where its data lies now."""

    path: Path
    step: int | None
    config: Config
    data_dir: Path


def open_run(run: str | Path) -> RunPlace:
    """``RUN`` or ``RUN@STEP``. Raises RunError, one line, for what is no run folder."""
    from paralm.training.run_folder import RunFolder
    from paralm.training.session import parse_run

    path, step = parse_run(run)
    config = RunFolder(path).saved_config()
    if config is None:
        raise RunError(f"{path}: no config.yaml, so this is not a run folder")
    load_modules(config.imports)
    return RunPlace(path, step, config, config.data.dir if config.data.dir is not None else path / "data")


def check_start(config: Config) -> None:
    """Refuse what cannot start before anything is done: an unknown launcher, keys that a run must keep, a run to
    start from that is not there.
    """
    from paralm.training.run_folder import RunFolder
    from paralm.training.session import check_sources

    get_launcher(config.launcher.kind)
    check_sources(config)
    RunFolder(config.run_dir).check_same_run(config, frozen_differences)


def only_rank() -> None:
    """Refuse to do the work of one process on several ranks."""
    settle()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RunError(
            "this command is for one process, and WORLD_SIZE says there are several; "
            "use 'paralm data prepare' first, then 'paralm train' on the ranks, then 'paralm eval'"
        )


# -- data ----------------------------------------------------------------------------------------------------


def prepare_data(config: Config) -> Prepared | PreparedMixture | None:
    """Make the tokenizer and the token stores, as far as they are not there; None for a task, which needs none, and on
    MPI ranks that are not the first.
    """
    from paralm_data import DataError

    from paralm.synthetic import task_of

    task = task_of(config.data)
    if task is not None:
        say(f"data: task '{task.name}', computed as it is needed, vocabulary {task.vocab_size:,}; nothing to prepare")
        return None
    told = preparing.needs_mpirun(config)
    if told:
        preparing.under_mpirun(config)  # its ranks say what they do; what follows finds everything there
        config = config.model_copy(update={"data": config.data.model_copy(update={"executor": "local"})})
    with preparing.execution(config) as execution:
        assert not isinstance(execution.executor, str)
        if not execution.executor.leads:
            try:
                execution.executor.follow()
            except DataError:
                sys.exit(EXIT_USER)  # the first rank says why
            return None
        prepare = _prepare if config.data.mixture is None else _prepare_mixture
        return prepare(config, execution, (lambda text: None) if told else say)


def _prepare(config: Config, execution: Execution, say: Callable[[str], None]) -> Prepared:
    from paralm_data import TokenizerSpec, prepare

    with preparing.progress_line() as line:
        prepared = prepare(
            _source(config.data.source),
            TokenizerSpec(**config.data.tokenizer.model_dump()),
            config.data_dir,
            held_out_fraction=config.data.held_out_fraction,
            validation={name: _source(source) for name, source in config.data.validation.items()},
            progress=lambda progress: _show_data(line, progress),
            steps=preparing.steps_of(config),
            execution=execution,
        )
    stores = {"train": prepared.train, "held out": prepared.held_out, **prepared.validation}
    text = ", ".join(f"{name} {quantity(store.n_tokens)} tokens" for name, store in stores.items())
    state = "already prepared" if prepared.skipped else "prepared"
    for bad in preparing.quarantined(prepared.path):
        say(f"data: {bad}")
    say(f"data: {state}, vocabulary {prepared.tokenizer.vocab_size:,}, {text} → {prepared.path}")
    return prepared


def _prepare_mixture(config: Config, execution: Execution, say: Callable[[str], None]) -> PreparedMixture:
    from paralm_data import TokenizerSpec, prepare_mixture

    data, mixture = config.data, config.data.mixture
    assert mixture is not None
    with preparing.progress_line() as line:
        prepared = prepare_mixture(
            {
                name: source.store.expanduser() if source.store is not None else _source(source)
                for name, source in mixture.sources.items()
            },
            TokenizerSpec(**data.tokenizer.model_dump()),
            config.data_dir,
            held_out_fraction=data.held_out_fraction,
            validation={name: _source(source) for name, source in data.validation.items()},
            progress=lambda progress: _show_data(line, progress),
            steps=preparing.steps_of(config),
            execution=execution,
        )
    text = ", ".join(f"{name} {quantity(store.n_tokens)} tokens" for name, store in prepared.train.items())
    for folder in (prepared.path / "mixture" / name for name in mixture.sources):
        for bad in preparing.quarantined(folder):
            say(f"data: {bad}")
    say(
        f"data: {'already prepared' if prepared.skipped else 'prepared'}, vocabulary "
        f"{prepared.tokenizer.vocab_size:,}, {text}, held out {quantity(prepared.held_out.n_tokens)} tokens → "
        f"{prepared.path}"
    )
    return prepared


def _source(source: SourceConfig) -> SourceSpec:
    from paralm_data import SourceSpec

    return SourceSpec(**source.model_dump(include=set(SourceConfig.model_fields)))


def _show_data(line: ProgressLine, progress: Progress) -> None:
    fraction = 1.0 if progress.done else progress.fraction
    line.update(progress.stage, fraction or 0.0, None if fraction is None else 1.0, preparing.progress_text(progress))


# -- training ------------------------------------------------------------------------------------------------


def is_trained(config: Config) -> bool:
    """Whether the run has a whole checkpoint of its last step."""
    from paralm.training import checkpoint

    steps = checkpoint.steps(config.run_dir / "checkpoints")
    if not steps or steps[-1] < config.training.max_steps:
        return False  # without a look into the files, which training's ranks verify together
    found = checkpoint.newest_whole(config.run_dir / "checkpoints", lambda message: say(f"warning: {message}"))
    return found is not None and found.step >= config.training.max_steps


def train_run(config: Config) -> None:
    """Train, or continue, with the configured launcher; nothing when it is done."""
    settle()
    launcher = get_launcher(config.launcher.kind)
    if is_trained(config):
        say(f"training: already done, {config.training.max_steps:,} steps")
        return
    with ProgressLine() as line:
        rank = os.environ.get("RANK", "0")
        result = launcher(config, lambda row: _show_step(line, row), line.say if rank == "0" else lambda text: None)
    bad = f", {result.bad_steps} steps skipped" if result.bad_steps else ""
    # The steps and tokens are the run's; where another start made some of them, the time is not.
    since = f" since step {result.first_step:,}" if result.first_step else ""
    say(
        f"training: {result.step:,} steps, {quantity(result.tokens)} tokens, {quantity(result.parameters)} parameters, "
        f"{duration(result.seconds)}{since}{bad} → {result.run_dir}"
    )


def _show_step(line: ProgressLine, row: dict[str, Any]) -> None:
    if row["kind"] == "validation":
        reached = (
            f"{row['bits_per_byte']:.3f} bits per byte"
            if "bits_per_byte" in row
            else f"{row['accuracy']:.1%} of the answers right, {row['sequence_accuracy']:.1%} of the examples"
        )
        line.say(f"step {row['step']:,}  {row['set'].replace('_', ' ')}: loss {row['loss']:.3f}, {reached}")
    elif row["kind"] == "train":
        skipped = "  SKIPPED, not finite" if row["skipped"] else ""
        text = (
            f"{row['step']:,}/{row['max_steps']:,}  loss {row['loss']:.3f}  {quantity(row['tokens_per_s'])} tok/s  "
            f"eta {duration(row['eta'])}{skipped}"
        )
        line.update("training", row["step"], row["max_steps"], text)


# -- results -------------------------------------------------------------------------------------------------


def evaluate_run(run: str | Path, overrides: Sequence[str] = (), again: bool = False) -> None:
    """Measure a run (``RUN`` or ``RUN@STEP``) and write its report; what is measured already is kept.

    ``overrides``: of the ``eval`` section; for a run of a task, settings of ``tracking``. Raises UserError, one line,
    as ``run_evaluation`` and ``run_suite`` do.
    """
    from paralm.evaluation.run import run_evaluation
    from paralm.export import is_export
    from paralm.training.session import parse_run

    path, _ = parse_run(run)
    exported = is_export(path)
    if not exported:
        path = open_run(run).path
    if _is_of_task(path):
        _evaluate_task(run, path, overrides, again)
        return
    for text in overrides:
        if not text.startswith(("eval.", "data.dir=") if exported else "eval."):
            raise ConfigError(f"override '{text}': only eval.* can change here; the run itself is as it was trained")
    settings = load_config([] if exported else path / "config.yaml", overrides, build=False).config
    with ProgressLine() as line:
        found = run_evaluation(
            run,
            settings.eval,
            again=again,
            data_dir=settings.data.dir if exported else None,
            on_progress=lambda what, done, total: line.update(what, done, total, f"{done:,}/{total:,}"),
        )
    say(f"evaluation: step {found.step:,}{', already done' if found.skipped else ''}")
    results = found.results
    for name, scored in results.perplexity.items():
        beside = results.compression.get(name)
        others = ", ".join(f"{what} {bits:.3f}" for what, bits in beside.bits_per_byte.items()) if beside else ""
        say(
            f"  {name.replace('_', ' ')}: {scored.bits_per_byte:.3f} bits per byte"
            f"{f' (on the same bytes {others})' if others else ''}, perplexity {scored.token_perplexity:.2f} a token"
        )
    say(f"report: {found.report}")


def _evaluate_task(run: str | Path, path: Path, overrides: Sequence[str], again: bool) -> None:
    """The evaluation of a run of a synthetic task: its answers, by length."""
    from paralm.evaluation.report import write_report
    from paralm.evaluation.suite import get_evaluation
    from paralm.export import is_export
    from paralm_launch import evaluation

    evaluation.evaluate(get_evaluation("tracking"), str(run), overrides, again=again)
    if not is_export(path):
        say(f"report: {write_report(path)}")


def _is_of_task(run: Path) -> bool:
    """Whether a run was trained on a synthetic task; what is no run is not."""
    from paralm.training.load import saved_config

    try:
        return saved_config(run).data.synthetic is not None
    except UserError:
        return False


def compare_runs(runs: Sequence[Path], out: Path) -> None:
    """Overlay the curves of runs in a figure and print what they reached; of runs of tasks, the answers right.

    Raises RunError, one line, as ``compare`` and ``compare_tracking`` do, and for runs of both kinds.
    """
    from paralm.evaluation.compare import check_runs, compare
    from paralm.evaluation.compare_tracking import compare_tracking

    of_tasks = [run for run in runs if _is_of_task(run)]
    others = [run for run in runs if run not in of_tasks]
    if of_tasks and others:
        check_runs(runs, out)
        raise RunError(f"{of_tasks[0]} is of a task, {others[0]} is not: runs of tasks and of text cannot be compared")
    comparison = compare_tracking(runs, out) if of_tasks else compare(runs, out)
    table(None, comparison.header, comparison.cells)
    for note in comparison.notes:
        say(f"\n{note}")
    say(f"\nfigure: {comparison.figure}")
