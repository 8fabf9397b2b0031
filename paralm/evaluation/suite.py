"""The evaluation suite: one frame that every evaluation of it stands in (``paralm eval NAME TARGET``).

An evaluation is a class with a name, settings, and pieces of work (cells) that do not depend on one another. The frame
keeps each measured cell, so that an interrupted evaluation goes on where it stopped and several processes share one;
combines them; and writes ``eval/NAME.json``, figures, TensorBoard scalars and ``eval/report.md``.

    @register_evaluation
    class Passkey(Evaluation):
        name = "passkey"
        Settings = PasskeySettings
        Results = (PasskeyResult,)

        def cells(self) -> list[str]: ...
        def measure(self, cell: str) -> dict[str, Any]: ...
        def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]: ...
        @classmethod
        def page(cls, results: Sequence[Any]) -> str: ...

A module that is listed in :data:`MODULES`, or among a run's ``imports:``, registers its evaluations when it is loaded.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from paralm.errors import ConfigError, RunError, UserError
from paralm.evaluation import result as results
from paralm.evaluation.cells import Cells, SuiteRecord, file_digest
from paralm.evaluation.parts import Part
from paralm.evaluation.result import Result, eval_dir
from paralm.evaluation.scoring import scoring_version
from paralm.evaluation.target import Target, checkpoint_digest, weights_digest
from paralm.key_values import read_key_values
from paralm.registry import nearest

__all__ = [
    "Evaluation",
    "EvaluationSettings",
    "Outcome",
    "Part",
    "Target",
    "checkpoint_digest",
    "evaluations",
    "get_evaluation",
    "register_evaluation",
    "run_suite",
    "weights_digest",
]

MODULES: tuple[str, ...] = (
    "paralm.evaluation.long_perplexity",
    "paralm.evaluation.collapse",
    "paralm.evaluation.capacity",
    "paralm.evaluation.effective_memory",
    "paralm.evaluation.passkey",
    "paralm.evaluation.downstream",
    "paralm.evaluation.tracking",
)
"""Modules that register the built-in evaluations."""

ROUNDS = 3
"""How often a call without a part measures cells that somebody else removed meanwhile."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


class EvaluationSettings(BaseModel):
    """Base of an evaluation's settings: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Evaluation(abc.ABC):
    """One question asked of a model. The first line of a subclass's docstring is its description in lists.

    ``name``: of the command, of ``eval/NAME.json``, of its page and scalars; its results are named NAME, or NAME_x
    where it has several. ``version``: raise it when what a cell holds, or how it is measured, changes: cells of
    another version are measured again. ``Results``: the classes of its results, to read them back with.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Settings: ClassVar[type[BaseModel]] = EvaluationSettings
    Results: ClassVar[tuple[type[Result], ...]] = ()

    def __init__(self, target: Target, settings: Any) -> None:
        """Check everything that can be checked before the first cell; UserError in one line. Open stores here."""
        self.target = target
        self.settings = settings
        self.on_progress: Callable[[int, int], None] = lambda done, total: None  # within a cell; set by the frame

    def follows_from(self) -> dict[str, Any]:
        """What else the results follow from, besides weights, settings and the stores opened in ``__init__``."""
        return {}

    @abc.abstractmethod
    def cells(self) -> list[str]:
        """Names of the independent pieces of work, in the order of measuring (cheap ones first where possible).

        A function of target and settings alone: every process that shares the work must find the same.
        """

    @abc.abstractmethod
    def measure(self, cell: str) -> dict[str, Any]:
        """Measure a cell: a function of (target, settings, cell) alone. What it returns is kept as JSON."""

    @abc.abstractmethod
    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        """Results from all cells, as they are read back from JSON (lists for tuples, text for keys); no model is run
        here. ``step`` and ``train_seq_len`` are filled in by the frame."""

    @classmethod
    @abc.abstractmethod
    def page(cls, results: Sequence[Any]) -> str:
        """The section of ``eval/report.md``, in markdown without a heading (the frame sets it; subsections begin at
        ###). From results alone, which may have been read back; ``![title](NAME_FIGURE.png)`` shows a figure."""

    @classmethod
    def description(cls) -> str:
        """One line for lists."""
        return (inspect.getdoc(cls) or "").split("\n", 1)[0].rstrip(".")


E = TypeVar("E", bound=type[Evaluation])
_REGISTERED: dict[str, type[Evaluation]] = {}


def register_evaluation(evaluation: E) -> E:
    """Class decorator: ``paralm eval NAME`` finds it. Raises ConfigError if the class cannot work in the frame."""
    name = getattr(evaluation, "name", None)
    where = f"{evaluation.__module__}.{evaluation.__qualname__}"
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"{where}: 'name' must be a word (letters, digits, '_' and '-'), got {name!r}")
    if evaluation.Settings.model_config.get("extra") != "forbid":
        raise ConfigError(f"{where}: {evaluation.Settings.__name__} lets unknown keys through; derive it from "
                          "paralm.evaluation.suite.EvaluationSettings")  # fmt: skip
    if not evaluation.Results:
        raise ConfigError(f"{where}: 'Results' must name the classes of its results")
    if not isinstance(inspect.getattr_static(evaluation, "page"), (classmethod, staticmethod)):
        raise ConfigError(f"{where}: 'page' must be a classmethod: the report is written without a model")
    taken = _REGISTERED.get(name)
    if taken is not None and f"{taken.__module__}.{taken.__qualname__}" != where:
        raise ConfigError(f"evaluation name '{name}' is taken by {taken.__module__}.{taken.__qualname__}")
    _REGISTERED[name] = evaluation
    return evaluation


def evaluations() -> dict[str, type[Evaluation]]:
    """Every evaluation by name, sorted."""
    for module in MODULES:
        importlib.import_module(module)
    return dict(sorted(_REGISTERED.items()))


def get_evaluation(name: str) -> type[Evaluation]:
    """The evaluation of that name; UserError naming the nearest otherwise."""
    known = evaluations()
    if name not in known:
        raise UserError(f"no evaluation '{name}'{nearest(name, known)}")
    return known[name]


def read_settings(evaluation: type[Evaluation], overrides: Sequence[str] | Mapping[str, Any] = ()) -> BaseModel:
    """Settings from ``KEY=VALUE`` texts (values read as YAML; ``a.b=1`` reaches into a section) or a mapping.

    Raises ConfigError, one line: no '=', an unknown key (the nearest is named), or a value that cannot be.
    """
    return read_key_values(evaluation.Settings, f"evaluation '{evaluation.name}'", overrides)


# -- running -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a call of :func:`run_suite` did. ``results`` is empty while cells of other parts are missing."""

    name: str
    run_dir: Path
    step: int
    results: list[Any]
    files: list[Path]
    report: Path
    measured: int  # cells, by this call
    kept: int  # cells of its share that were measured before
    missing: int  # cells that other parts have yet to measure
    discarded: int  # cells of another basis (other weights, settings or texts) that were removed
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether all cells are measured, and results written."""
        return self.missing == 0


def run_suite(
    evaluation: str | type[Evaluation],
    target: str | Path | Target,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    again: bool = False,
    part: Part | None = None,
    device: str | None = None,
    data_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> Outcome:
    """Measure the cells that are missing; if then none is, combine them and write the results and the report.

    ``target``: ``RUN``, ``RUN@STEP``, an export's folder, or a :class:`Target`. ``overrides``: settings, as
    :func:`read_settings` takes them. ``again``: forget what was measured (with ``part``: only the part's own cells).
    ``part``: measure a share of the cells; whoever finds all cells measured combines them, so parts may run side by
    side or one after another, in any order. ``device``, ``data_dir``: as for :meth:`Target.open`.

    Results do not depend on parts or interruptions. Raises UserError, one line, before anything is measured; RunError,
    one line, if an evaluation of this name with other settings keeps removing the cells of a call without ``part``.
    """
    from paralm.evaluation.report import write_report
    from paralm.evaluation.suite_report import write_suite_report

    started = time.monotonic()
    chosen = get_evaluation(evaluation) if isinstance(evaluation, str) else evaluation
    settings = read_settings(chosen, overrides)
    if not isinstance(target, Target):
        target = Target.open(target, device=device, data_dir=data_dir)
    running = chosen(target, settings)
    cells = Cells(target.run_dir, chosen.name, _basis(running))
    target.sealed.append(True)
    try:
        names = running.cells()
        if len(set(names)) != len(names) or not names:
            raise RuntimeError(f"evaluation '{chosen.name}': its cells must be different names, at least one: {names}")
        mine = part.of(names) if part is not None else names
        discarded = cells.prepare(again=again and part is None)
        todo, measured = mine if again else cells.missing(mine), set[str]()
        for _ in range(ROUNDS if part is None else 1):
            if todo:
                cells.unfinish()
            for number, cell in enumerate(todo):
                _measure(running, cells, cell, number, len(todo), on_progress)
            measured.update(todo)
            kept = {cell: content for cell in names if (content := cells.get(cell)) is not None}
            todo = [cell for cell in mine if cell not in kept]
            if not todo:
                break
        missing = [cell for cell in names if cell not in kept]
        if missing and part is None:
            raise RunError(
                f"{cells.folder}: {len(missing)} of {len(names)} pieces are gone after they were measured: another "
                "evaluation with other settings runs in this folder; let it end, then give this command again"
            )
        found, files = ([], []) if missing else _finish(running, cells, kept)
    finally:
        target.sealed.pop()
    report = write_suite_report(target.run_dir)
    if files and (target.run_dir / "report.md").is_file():
        with contextlib.suppress(UserError):  # a run whose metrics are damaged has its evaluations all the same
            write_report(target.run_dir)
    return Outcome(
        chosen.name, target.run_dir, target.step, found, files, report, len(measured), len(mine) - len(measured),
        len(missing), discarded, time.monotonic() - started,
    )  # fmt: skip


def _basis(running: Evaluation) -> dict[str, Any]:
    """What cells and results follow from."""
    target = running.target
    scoring = scoring_version(target.model.vocab_size, target.model.n_tokens)
    return {
        "evaluation": running.name,
        "version": running.version,
        **({"scoring": scoring} if scoring > 1 else {}),
        "step": target.step,
        "checkpoint": target.digest,
        "dtype": str(target.dtype).removeprefix("torch."),
        "settings": running.settings.model_dump(mode="json"),
        "stores": {name: store.manifest.fingerprint for name, store in sorted(target.stores.items())},
        "other": running.follows_from(),
    }


def _measure(
    running: Evaluation, cells: Cells, cell: str, number: int, total: int, on_progress: Progress | None
) -> None:
    """Measure a cell and keep it."""
    began = time.monotonic()
    if on_progress is not None:
        report = on_progress
        what = f"{running.name} {number + 1}/{total} {cell}"
        running.on_progress = lambda done, of: report(what, done, of)
        report(what, 0, 1)
    cells.put(cell, running.measure(cell), time.monotonic() - began)


def _finish(running: Evaluation, cells: Cells, kept: Mapping[str, dict[str, Any]]) -> tuple[list[Result], list[Path]]:
    """Combine all cells, as they were read back, and write results and record; if they are there already, read them."""
    target, done = running.target, cells.record()
    folder = eval_dir(target.run_dir)
    if done is not None:
        found = [read_result(running, folder / name) for name in done.files if name.endswith(".json")]
        return [result for result in found if result is not None], [folder / name for name in done.files]
    combined = running.combine(kept)
    for result in combined:
        if result.name != running.name and not result.name.startswith(f"{running.name}_"):
            raise RuntimeError(f"evaluation '{running.name}': a result named '{result.name}'")
    whole = [
        result.model_copy(update={"step": target.step, "train_seq_len": result.train_seq_len or target.train_seq_len})
        for result in combined
    ]
    files = results.save(whole, target.run_dir)
    cells.finish(
        SuiteRecord(
            digest=cells.digest,
            basis=cells.basis,
            files={path.name: file_digest(path) or "" for path in files},
            cells=len(kept),
            device=str(target.device),
            dtype=str(target.dtype).removeprefix("torch."),
            parameters=sum(p.numel() for p in target.model.parameters()),
            seconds=cells.seconds(list(kept)),
        )
    )
    cells.remember(
        target.step, {f"{result.name}/{key}": value for result in whole for key, value in result.scalars().items()}
    )
    return whole, files


def read_result(evaluation: type[Evaluation] | Evaluation, path: Path) -> Result | None:
    """A result of an evaluation from its JSON; None if there is no such file. RunError, one line, if it is damaged."""
    damage: RunError | None = None
    for kind in evaluation.Results:
        try:
            return results.read_json(kind, path)
        except RunError as error:
            damage = damage or error
    if damage is not None:
        raise damage
    return None
