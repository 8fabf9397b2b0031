"""``paralm eval tracking``: the share of right answers on a synthetic task, by length, far past the trained ones.

Every size of example is a cell: so many examples of the test split, each read once from a fresh state. A token is
right where the likeliest id of the whole vocabulary is the label; an example is right where all of its answers are.
Intervals are Wilson's, with the number of examples for n: the answers of one example are not independent, so counted
by tokens they would be too narrow.

    scaled accuracy = (accuracy − chance) / (1 − chance)         0: guessing, 1: perfect (arXiv 2405.04517, 2411.12537)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from paralm_data import DataError, Task, make_task
from pydantic import BaseModel, Field, PositiveInt

from paralm.errors import ConfigError, UserError
from paralm.evaluation import markdown as md
from paralm.evaluation.answers import Answers, answer
from paralm.evaluation.proportion import wilson
from paralm.evaluation.result import Result
from paralm.evaluation.suite import Evaluation, EvaluationSettings, Target, register_evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Interval = tuple[float, float]
SOLVED = 0.99  # of the answers right


class TrackingSettings(EvaluationSettings):
    """Of ``paralm eval tracking``."""

    sizes: list[str] | None = Field(
        default=None,
        description="lengths such as '64', ranges such as '40-256', of mqar LENGTH:PAIRS; default: the task's",
    )
    samples: PositiveInt = Field(default=512, description="examples of each size")
    seed: int = Field(default=0, ge=0, description="of the test split")
    rows: PositiveInt = Field(default=64, description="examples read side by side")
    chunk: PositiveInt = Field(default=256, description="tokens of an example read at a time")


class Positions(BaseModel):
    """Answers at tokens ``first`` … ``last`` of the examples, counted from 1."""

    first: int
    last: int
    answers: int
    accuracy: float


class SizeScore(BaseModel):
    """One size of example. ``shortest``, ``longest``: of the examples, in tokens."""

    size: str
    shortest: int
    longest: int
    examples: int
    answers: int
    accuracy: float  # of the answers
    interval: Interval
    scaled_accuracy: float
    sequence_accuracy: float  # of the examples: every answer right
    sequence_interval: Interval
    nats_per_answer: float
    by_position: list[Positions]


class TrackingResult(Result):
    """Of one run. ``chance``: of guessing among the possible answers; ``trained``: tokens of the longest example."""

    kind: ClassVar[str] = "tracking"

    task: dict[str, Any]
    mixer: str
    layers: int
    chance: float
    trained: int
    seed: int
    sizes: list[SizeScore]

    @property
    def solved(self) -> int:
        """The longest size up to which, from the shortest on, 99 % of the answers are right; 0: none."""
        longest = 0
        for score in sorted(self.sizes, key=lambda s: s.longest):
            if score.accuracy < SOLVED:
                break
            longest = score.longest
        return longest

    def scalars(self) -> dict[str, float]:
        found = {"solved": float(self.solved)}
        for score in self.sizes:
            key = score.size.replace(":", "_")
            found[f"accuracy/{key}"] = score.accuracy
            found[f"sequence_accuracy/{key}"] = score.sequence_accuracy
        return found

    def figures(self) -> dict[str, Figure]:
        from paralm.evaluation import figures

        figure, axes = figures.new("length of the example (tokens)", "answers right")
        draw(axes, self, figures.BLUE, "all answers")
        whole = [s for s in points(self) if s.answers > s.examples]
        if whole:
            axes.plot([s.longest for s in whole], [s.sequence_accuracy for s in whole], marker=".", linestyle="--",
                      color=figures.ORANGE, label="whole examples")  # fmt: skip
        frame(axes, [self])
        axes.set_title(f"{title(self.task)}, {self.mixer}")
        drawn = {"by_length": figure}
        buckets = max(self.sizes, key=lambda s: s.longest).by_position
        if len(buckets) > 2:
            drawn["by_position"], axes = figures.new("position in the example (tokens)", "answers right")
            axes.plot([b.last for b in buckets], [b.accuracy for b in buckets], marker=".", color=figures.BLUE)
            frame(axes, [self])
            axes.set_title(
                f"{title(self.task)}, {self.mixer}: examples of {max(s.longest for s in self.sizes):,} tokens"
            )
        return drawn


def title(task: Mapping[str, Any]) -> str:
    """A task's name for people."""
    name = str(task["task"]).replace("_", " ")
    if "group" in task:
        return f"{name} over {task['group']}"
    return f"{name} in brackets" if task.get("brackets") else name


def points(result: TrackingResult) -> list[SizeScore]:
    """Sizes of one length, short ones first: those that make a curve."""
    alone = [s for s in result.sizes if s.shortest == s.longest]
    return sorted(alone or result.sizes, key=lambda s: (s.longest, s.size))


def draw(axes: Axes, result: TrackingResult, color: str, label: str, marker: str = "o") -> None:
    """Accuracy over length, with its interval as a band; of several sizes of one length (mqar) the lowest.

    Markers are hollow, so that curves of different ones are seen where they lie on one another.
    """
    lowest: dict[int, SizeScore] = {}
    for score in points(result):
        if score.longest not in lowest or score.accuracy < lowest[score.longest].accuracy:
            lowest[score.longest] = score
    scores = list(lowest.values())
    lengths = [s.longest for s in scores]
    axes.plot(
        lengths, [s.accuracy for s in scores], marker=marker, markersize=7, markerfacecolor="none", color=color,
        label=label, linewidth=1.2,
    )  # fmt: skip
    axes.fill_between(
        lengths, [s.interval[0] for s in scores], [s.interval[1] for s in scores], color=color, alpha=0.15, linewidth=0
    )


def frame(axes: Axes, results: Sequence[TrackingResult]) -> None:
    """Chance, the trained length, and the scales."""
    from paralm.evaluation import figures

    axes.set_xscale("log", base=2)
    figures.short_axis(axes)
    axes.set_ylim(-0.02, 1.12)  # the words at the mark stand above the curves
    axes.axhline(results[0].chance, color=figures.GREY, linewidth=1, linestyle="--", label="chance")
    for length in sorted({result.trained for result in results}):
        figures.mark(axes, length, "trained up to here")
    axes.legend(frameon=False, fontsize=9)


def measure_size(task: Task, size: str, settings: TrackingSettings, target: Target) -> dict[str, Any]:
    """One cell: counts, as JSON."""
    examples = task.examples(settings.seed, "test", np.arange(settings.samples), size=size)
    found = answer(
        target.model,
        examples,
        vocab_size=target.model.vocab_size,
        rows=settings.rows,
        chunk=settings.chunk,
        device=target.device,
    )
    return {
        "shortest": int(examples.lengths.min()),
        "longest": int(examples.lengths.max()),
        "examples": settings.samples,
        "answers": int(found.asked.sum()),
        "right": int(found.right.sum()),
        "whole": int(found.whole.sum()),
        "nats": float(found.loss.sum()),
        "by_position": _by_position(found),
    }


def _by_position(found: Answers) -> list[list[int]]:
    """[first, last, answers, right] of positions 1, 2, 3–4, 5–8, …; only where something is asked."""
    asked, right = found.asked.sum(axis=0), found.right.sum(axis=0)
    rows, first, width = [], 1, len(asked)
    for last in [2**k for k in range(width.bit_length() + 1)]:
        last = min(last, width)
        part = slice(first - 1, last)
        if last >= first and asked[part].sum():
            rows.append([first, last, int(asked[part].sum()), int(right[part].sum())])
        first = last + 1
    return rows


def _score(size: str, cell: Mapping[str, Any], chance: float) -> SizeScore:
    examples, answers, right, whole = (int(cell[key]) for key in ("examples", "answers", "right", "whole"))
    accuracy = right / answers
    low, high = wilson(right, answers) if answers == examples else _cautious(accuracy, examples)
    return SizeScore(
        size=size,
        shortest=cell["shortest"],
        longest=cell["longest"],
        examples=examples,
        answers=answers,
        accuracy=accuracy,
        interval=(low, high),
        scaled_accuracy=(accuracy - chance) / (1 - chance),
        sequence_accuracy=whole / examples,
        sequence_interval=wilson(whole, examples),
        nats_per_answer=cell["nats"] / answers,
        by_position=[Positions(first=a, last=b, answers=n, accuracy=r / n) for a, b, n, r in cell["by_position"]],
    )


def _cautious(accuracy: float, examples: int) -> Interval:
    """As if each example were one observation: right as often, rounded to the side that widens the interval."""
    return wilson(int(np.floor(accuracy * examples)), examples)[0], wilson(int(np.ceil(accuracy * examples)), examples)[
        1
    ]


@register_evaluation
class Tracking(Evaluation):
    """Accuracy on the synthetic task a run was trained on, by length, far past the trained lengths."""

    name = "tracking"
    Settings = TrackingSettings
    Results = (TrackingResult,)
    settings: TrackingSettings

    def __init__(self, target: Target, settings: TrackingSettings) -> None:
        super().__init__(target, settings)
        spec = target.config.data.synthetic
        if spec is None:
            raise UserError(
                f"{target.run_dir}: trained on text; 'tracking' measures runs of a task (data.synthetic), such as "
                "paralm run tracking/parity_paralstm"
            )
        self.task = make_task(spec)
        self.mixer, self.layers = _architecture(target)
        try:
            for size in self.cells():
                self.task.sizes(size, np.zeros(1, np.uint64))
        except DataError as error:
            raise ConfigError(f"sizes: {error}") from None

    def cells(self) -> list[str]:
        """The sizes, short ones first."""
        return list(dict.fromkeys(self.settings.sizes or self.task.test_sizes()))

    def measure(self, cell: str) -> dict[str, Any]:
        """See :func:`measure_size`."""
        return measure_size(self.task, cell, self.settings, self.target)

    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        """One result."""
        return [
            TrackingResult(
                task=self.task.spec,
                mixer=self.mixer,
                layers=self.layers,
                chance=self.task.chance,
                trained=self.task.max_len,
                seed=self.target.config.run.seed,
                sizes=[_score(size, cell, self.task.chance) for size, cell in cells.items()],
            )
        ]

    @classmethod
    def page(cls, results: Sequence[TrackingResult]) -> str:
        """A table by size, the figures, and how it was counted."""
        (result,) = results
        labels = [
            [
                s.size,
                f"{s.examples:,}",
                f"{s.answers:,}",
                f"{s.accuracy:.1%} ({s.interval[0]:.1%} to {s.interval[1]:.1%})",
                f"{s.scaled_accuracy:.2f}",
                f"{s.sequence_accuracy:.1%} ({s.sequence_interval[0]:.1%} to {s.sequence_interval[1]:.1%})",
                f"{s.nats_per_answer:.3f}",
            ]
            for s in result.sizes
        ]
        header = ["size", "examples", "answers", "answers right", "scaled", "whole examples right", "nats per answer"]
        reach = f"to {result.solved:,} tokens" if result.solved else "at no size"
        parts = [
            f"Task {title(result.task)}, {result.layers} × {result.mixer}, trained on examples of up to "
            f"{result.trained:,} tokens. Guessing is right in {result.chance:.1%}. {SOLVED:.0%} of the answers are "
            f"right {reach}, from the shortest size on.",
            md.table(header, labels, right=range(1, 7)),
            "![Answers right by length](tracking_by_length.png)",
        ]
        if len(max(result.sizes, key=lambda s: s.longest).by_position) > 2:
            parts.append("![Answers right by position](tracking_by_position.png)")
        parts.append(
            "Examples of the test split, each from a fresh state; the likeliest id of the whole vocabulary counts. "
            "Scaled: 0 is guessing, 1 is perfect. Intervals are Wilson's of 95 %, an example being one observation."
        )
        return "\n\n".join(parts)


def _architecture(target: Target) -> tuple[str, int]:
    """Mixer's name (of a hybrid, their names) and number of layers."""
    from paralm.models.hybrid import mixer_names

    return mixer_names(target.config.model), target.config.model.n_layers
