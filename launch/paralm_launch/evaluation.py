"""``paralm eval NAME TARGET``: one evaluation of the suite, in this process, and of checkpoints as they appear."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paralm.errors import RunError, UserError
from paralm_launch.console import ProgressLine, duration, say, table
from paralm_launch.discovery import settle

if TYPE_CHECKING:
    from paralm.evaluation.suite import Evaluation, Outcome

_DATA = "data.dir="


def list_evaluations() -> None:
    """A table of what ``paralm eval NAME`` can be."""
    from paralm.evaluation.suite import evaluations

    table(None, ["evaluation", "what it measures"], [(name, e.description()) for name, e in evaluations().items()])
    say("\nsettings and their defaults: paralm eval NAME --list")


def list_settings(name: str) -> None:
    """A table of an evaluation's settings."""
    from paralm.config_yaml import inline
    from paralm.evaluation.suite import get_evaluation

    evaluation = get_evaluation(name)
    say(f"{name}: {evaluation.description()}.\n")
    rows = []
    for key, field in evaluation.Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = inline(default) if isinstance(default, (str, int, float, bool, list, tuple, type(None))) else "…"
        rows.append((key, shown, field.description or ""))
    table(None, ["setting", "default", "what it is"], rows)


def find_evaluation(arguments: Sequence[str]) -> type[Evaluation] | None:
    """The evaluation that ``NAME TARGET …`` names, or None where the first argument is a run.

    Raises UserError, one line, for two arguments of which the first is neither; the nearest name is given.
    """
    from paralm.evaluation.suite import evaluations, get_evaluation

    first, second = arguments[0], arguments[1] if len(arguments) > 1 else ""
    if not second or "=" in second:
        if first in evaluations() and not Path(first).exists():
            raise UserError(f"evaluation '{first}' of what? paralm eval {first} RUN (or RUN@STEP, or an export)")
        return None
    if first not in evaluations():
        if _is_run(first):
            return None
        _load_modules_of(second)  # a run's own evaluations, among its `imports:`
    return get_evaluation(first)


def _is_run(text: str) -> bool:
    from paralm.training.session import parse_run

    try:
        parse_run(text)
    except RunError:
        return False
    return True


def _load_modules_of(target: str) -> None:
    from paralm.training.load import saved_config
    from paralm.training.session import parse_run
    from paralm.user_modules import load_modules

    load_modules(saved_config(parse_run(target)[0]).imports)


def evaluate(
    evaluation: type[Evaluation],
    target: str,
    overrides: Sequence[str] = (),
    *,
    again: bool = False,
    part: str | None = None,
) -> Outcome:
    """Measure and say what was done. ``overrides``: settings, and ``data.dir=DIR``. Raises UserError, one line."""
    from paralm.evaluation.suite import Part, run_suite

    settings, data_dir = _split(overrides)
    if part == "rank":
        settle()
    share = Part.parse(part) if part is not None else None
    with ProgressLine() as line:
        found = run_suite(
            evaluation,
            target,
            settings,
            again=again,
            part=share,
            device=_device() if part == "rank" else None,
            data_dir=data_dir,
            on_progress=(lambda what, done, total: line.update(what, done, total, f"{done:,}/{total:,}"))
            if os.environ.get("RANK", "0") == "0"
            else None,
        )
    _say(found)
    return found


def follow(evaluation: type[Evaluation], run: str, overrides: Sequence[str] = (), *, every: int = 1) -> None:
    """Evaluate each checkpoint as it appears. Raises UserError, one line; StoppedError where none appears for long."""
    from paralm.evaluation.follow import follow as each

    settings, data_dir = _split(overrides)
    with ProgressLine() as line:
        for found in each(
            evaluation,
            run,
            settings,
            every=every,
            data_dir=data_dir,
            on_progress=lambda what, done, total: line.update(what, done, total, f"{done:,}/{total:,}"),
            warn=lambda message: line.say(f"warning: {message}"),
        ):
            numbers = [f"{r.name}/{key} {value:.6g}" for r in found.results for key, value in r.scalars().items()]
            line.say(f"step {found.step:,}: {', '.join(numbers)}")
    say(f"{evaluation.name}: the run is over, and its last checkpoint is evaluated")


def evaluate_on_ray(
    evaluation: type[Evaluation], target: str, overrides: Sequence[str] = (), *, tasks: int, again: bool = False
) -> Outcome:
    """Measure in ``tasks`` tasks of Ray, a share each, then combine here.

    The cluster is the run's ``launcher.address``, else RAY_ADDRESS, else one of this machine for the time being; its
    nodes see the run's folder. A task that a lost worker took along is begun again by Ray, and goes on with the cells
    that are missing; with ``again`` it measures all its cells again. Raises UserError, one line, as :func:`evaluate`
    does.
    """
    from paralm.training.load import saved_config
    from paralm.training.session import parse_run
    from paralm_launch.launchers import ray as launcher

    config = saved_config(parse_run(target)[0])
    config.launcher.address = config.launcher.address or os.environ.get("RAY_ADDRESS")
    ray = launcher.import_ray(config)
    ours = launcher.start(ray, config, tasks)
    try:
        gpus = config.launcher.gpus_per_rank
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        task = ray.remote(num_cpus=config.launcher.cpus_per_rank, num_gpus=gpus)(_part_on_ray)
        given = (os.getcwd(), evaluation.name, target, *_split(overrides), again)
        waiting = [task.remote(*given, index, tasks) for index in range(1, tasks + 1)]
        with ProgressLine() as line:
            while waiting:
                line.update("parts", tasks - len(waiting), tasks, f"{tasks - len(waiting):,}/{tasks:,}")
                done, waiting = ray.wait(waiting, timeout=1.0)
                ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        if ours:
            ray.shutdown()
    return evaluate(evaluation, target, overrides)


def _part_on_ray(
    folder: str, name: str, target: str, settings: list[str], data_dir: Path | None, again: bool, index: int, count: int
) -> int:
    """What a task of Ray runs; returns how many cells it measured."""
    from paralm.evaluation.suite import Part, get_evaluation, run_suite

    os.chdir(folder)  # paths are relative to where the command runs
    _load_modules_of(target)
    return run_suite(
        get_evaluation(name), target, settings, again=again, part=Part(index, count), data_dir=data_dir
    ).measured


def _split(overrides: Sequence[str]) -> tuple[list[str], Path | None]:
    """Settings, and where the data is."""
    data_dirs = [text.removeprefix(_DATA) for text in overrides if text.startswith(_DATA)]
    settings = [text for text in overrides if not text.startswith(_DATA)]
    return settings, Path(data_dirs[-1]) if data_dirs else None


def _device() -> str | None:
    """Of ranks on one machine each takes its own GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _say(found: Outcome) -> None:
    if found.discarded:
        say(f"{found.name}: {found.discarded} pieces measured on something else (weights, settings, text) removed")
    kept = f", {found.kept} were there" if found.kept else ""
    say(f"{found.name}: step {found.step:,}, {found.measured} pieces measured{kept}, {duration(found.seconds)}")
    for result in found.results:
        for key, value in result.scalars().items():
            say(f"  {result.name}/{key}: {value:.6g}")
    if found.complete:
        say(f"report: {found.report}")
    else:
        say(f"{found.missing} pieces are missing yet: whoever measures the last of them writes the results")


def refuse_options_of_the_suite(**options: object) -> None:
    """The run's standard evaluation takes no ``--part`` and the like."""
    for name, value in options.items():
        if value:
            raise RunError(f"--{name} goes with an evaluation by name, such as 'paralm eval perplexity RUN --{name}'")
