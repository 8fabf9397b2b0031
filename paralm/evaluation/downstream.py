"""``paralm eval lm-eval RUN tasks=[…]``: downstream tasks, run by lm_eval, with a run's own bookkeeping.

A cell is one task (or group of tasks) as lm_eval names it, so an interrupted evaluation goes on with the next task, and
several processes share them. For lm_eval's own command line: :mod:`paralm.evaluation.lm_eval_cli`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from paralm.errors import UserError
from paralm.evaluation import markdown as md
from paralm.evaluation.result import Result
from paralm.evaluation.suite import Evaluation, EvaluationSettings, Target, register_evaluation
from paralm.registry import nearest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from matplotlib.figure import Figure


class LmEvalSettings(EvaluationSettings):
    """What to run, and how."""

    tasks: list[str] = Field(default_factory=list, description="tasks or groups as lm_eval names them")
    include_path: Path | None = Field(default=None, description="folder of task files of your own (YAML)")
    num_fewshot: int | None = Field(default=None, ge=0, description="examples in the context; default: the task's")
    limit: int | None = Field(default=None, ge=1, description="documents of each task, for a trial; default: all")
    rows: int = Field(default=16, ge=1, description="sequences side by side")
    chunk: int = Field(default=512, ge=1, description="tokens of each read at a time")
    reset_every: int | None = Field(default=None, ge=1, description="rolling tasks: forget after so many tokens")
    max_length: int | None = Field(default=None, ge=2, description="windows as lm_eval cuts them; default: none")
    score_eos: bool = Field(default=False, description="rolling tasks: count the end of a document")
    max_gen_toks: int = Field(default=256, ge=0, description="tokens to generate where a task does not say")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="of few-shot examples and sampled generation")


class TaskScore(BaseModel):
    """One metric of one task; ``stderr`` as lm_eval finds it, None where it does not."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    documents: int | None
    num_fewshot: int | None
    version: str


class LmEvalResult(Result):
    """Every metric of every task, groups' own included."""

    kind: ClassVar[str] = "lm-eval"

    lm_eval: str  # its version
    limit: int | None
    reset_every: int | None
    max_length: int | None
    score_eos: bool
    scores: list[TaskScore]

    def scalars(self) -> dict[str, float]:
        """``TASK/METRIC``; a metric under several filters as ``TASK/METRIC/FILTER``."""
        found: dict[str, float] = {}
        for score in self.scores:
            key = f"{score.task}/{score.metric}"
            found[key if score.filter == "none" and key not in found else f"{key}/{score.filter}"] = score.value
        return found

    def figures(self) -> dict[str, Figure]:
        """Metrics that lie between 0 and 1, with ± 1.96 standard errors; perplexities are in the table only."""
        shares = [s for s in self.scores if 0 <= s.value <= 1 and not s.metric.endswith(("perplexity", "per_byte"))]
        if not shares:
            return {}
        from paralm.evaluation import figures

        figure, axes = figures.new("score", "", (7.2, 1.2 + 0.32 * len(shares)))
        at = range(len(shares), 0, -1)
        errors = [1.96 * (s.stderr or 0.0) for s in shares]
        axes.barh(at, [s.value for s in shares], xerr=errors, color=figures.BLUE, height=0.6)
        axes.set_yticks(at, [f"{s.task}  {s.metric}" for s in shares])
        axes.set_xlim(0, 1)
        axes.set_title("Downstream tasks (95 % intervals)")
        return {"scores": figure}


@register_evaluation
class LmEval(Evaluation):
    """Downstream tasks, run by lm_eval.

    Contexts are read once and whole: no window, and one reading for all answers to a question.
    """

    name = "lm-eval"
    Settings = LmEvalSettings
    Results = (LmEvalResult,)

    def __init__(self, target: Target, settings: LmEvalSettings) -> None:
        if not settings.tasks:
            raise UserError("tasks: name at least one, such as tasks=[lambada_openai,arc_easy]")
        repeated = next((task for task in settings.tasks if settings.tasks.count(task) > 1), None)
        if repeated is not None:
            raise UserError(f"tasks: '{repeated}' is named twice")
        if settings.include_path is not None and not settings.include_path.is_dir():
            raise UserError(f"include_path: {settings.include_path} is no folder")
        try:
            self._version = importlib.metadata.version("lm_eval")
        except importlib.metadata.PackageNotFoundError:
            raise UserError("lm_eval is not installed; pip install 'paralm[eval]'") from None
        super().__init__(target, settings)
        _ = target.tokenizer  # an import without one is refused here
        self._manager = task_manager(settings.tasks, settings.include_path)

    def follows_from(self) -> dict[str, Any]:
        """lm_eval's version, and the content of ``include_path``, which the settings only name."""
        return {"lm_eval": self._version, "include_path": _digest(self.settings.include_path)}

    def cells(self) -> list[str]:
        """The tasks as they were given."""
        return list(self.settings.tasks)

    def measure(self, cell: str) -> dict[str, Any]:
        """lm_eval's results of one task or group. UserError, one line, if its data cannot be had."""
        import lm_eval

        from paralm.evaluation.harness import ParalmLM

        s: LmEvalSettings = self.settings
        model = ParalmLM.of(
            self.target.model,
            self.target.tokenizer,
            batch_size=s.rows,
            chunk=s.chunk,
            reset_every=s.reset_every,
            max_length=s.max_length,
            score_eos=s.score_eos,
            max_gen_toks=s.max_gen_toks,
            seed=s.seed,
        )
        try:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=[cell],
                task_manager=self._manager,
                num_fewshot=s.num_fewshot,
                limit=s.limit,
                log_samples=False,
                random_seed=s.seed,
                numpy_random_seed=s.seed,
                torch_random_seed=s.seed,
                fewshot_random_seed=s.seed,
            )
        except (ConnectionError, FileNotFoundError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"tasks: the data of '{cell}' cannot be had ({reason})") from None
        return {"scores": [score.model_dump() for score in scores_of(found)]}

    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        """One table of all; a task that was asked for by itself and in a group is in it once."""
        scores: dict[tuple[str, str, str], TaskScore] = {}
        for score in (TaskScore.model_validate(score) for cell in cells.values() for score in cell["scores"]):
            scores.setdefault((score.task, score.metric, score.filter), score)
        s: LmEvalSettings = self.settings
        return [
            LmEvalResult(
                lm_eval=self._version,
                limit=s.limit,
                reset_every=s.reset_every,
                max_length=s.max_length,
                score_eos=s.score_eos,
                scores=list(scores.values()),
            )
        ]

    @classmethod
    def page(cls, results: Sequence[Any]) -> str:
        """The table and the figure."""
        parts = []
        for result in results:
            rows = [
                (
                    s.task,
                    s.metric if s.filter == "none" else f"{s.metric} ({s.filter})",
                    f"{s.value:.4f}",
                    "" if s.stderr is None else f"± {s.stderr:.4f}",
                    "" if s.documents is None else f"{s.documents:,}",
                    "" if s.num_fewshot is None else f"{s.num_fewshot}",
                )
                for s in result.scores
            ]
            header = ("task", "metric", "value", "standard error", "documents", "shots")
            parts.append(md.table(header, rows, right=(2, 3, 4, 5)))
            if result.figures():
                parts.append(f"![Scores]({result.name}_scores.png)")
            read = "texts are read whole, with the state carried"
            if result.max_length is not None:
                read = f"in windows of {result.max_length:,} tokens"
            elif result.reset_every is not None:
                read = f"rolling tasks forget after every {result.reset_every:,} tokens"
            notes = [f"By lm_eval {result.lm_eval}; {read}."]
            if result.score_eos:
                notes.append("In rolling tasks the end of a document counts.")
            if result.limit is not None:
                notes.append(f"Of each task only the first {result.limit:,} documents.")
            parts.append(" ".join(notes))
        return "\n\n".join(parts)


def task_manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """lm_eval's task manager that knows the tasks; its own tasks are looked through (some seconds) only if needed.

    Raises UserError, one line, for a task that neither it nor ``include_path`` has.
    """
    from lm_eval.tasks import TaskManager

    path = str(include_path) if include_path is not None else None
    own = TaskManager(include_path=path, include_defaults=False)
    if set(tasks) <= set(own.all_tasks):
        return own
    manager = TaskManager(include_path=path)
    for task in tasks:
        if task not in manager.all_tasks:
            hint = nearest(task, manager.all_tasks).split(" (valid")[0]
            raise UserError(f"tasks: lm_eval has no task '{task}'{hint} ('lm_eval ls tasks' lists them)")
    return manager


def scores_of(found: Mapping[str, Any]) -> list[TaskScore]:
    """Every number in what ``lm_eval.simple_evaluate`` returned."""
    scores = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            documents = found.get("n-samples", {}).get(task, {}).get("effective")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if known else None,
                    documents=documents,
                    num_fewshot=found.get("n-shot", {}).get(task),
                    version=str(found.get("versions", {}).get(task, "")),
                )
            )
    return scores


def _digest(folder: Path | None) -> str:
    """Of every file in a folder of tasks: changed texts are other tasks. Empty without one."""
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
