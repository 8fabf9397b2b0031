"""Runs of one synthetic task over one another: answers right by length, in one figure and one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paralm.errors import RunError
from paralm.evaluation import figures
from paralm.evaluation import markdown as md
from paralm.evaluation.compare import check_runs
from paralm.evaluation.result import eval_dir, read_json
from paralm.evaluation.tracking import TrackingResult, draw, frame, title

_MARKERS = "osD^vXP*"


@dataclass(frozen=True)
class TrackingComparison:
    """Results by run, in the order the runs were given."""

    results: dict[str, TrackingResult]
    figure: Path
    notes: list[str]

    @property
    def sizes(self) -> list[str]:
        """The sizes that every run was tested on, as the first has them."""
        every = [{s.size for s in result.sizes} for result in self.results.values()]
        return [s.size for s in next(iter(self.results.values())).sizes if all(s.size in sizes for sizes in every)]

    @property
    def header(self) -> list[str]:
        """Of :attr:`cells`."""
        return ["run", "mixer", "seed", "99 % right to", *self.sizes]

    @property
    def cells(self) -> list[list[str]]:
        """A row a run: the share of answers that are right at each size."""
        rows = []
        for name, result in self.results.items():
            accuracy = {s.size: s.accuracy for s in result.sizes}
            reach = f"{result.solved:,}" if result.solved else "–"
            rows.append([name, result.mixer, str(result.seed), reach, *(f"{accuracy[s]:.1%}" for s in self.sizes)])
        return rows

    def markdown(self) -> str:
        """The table, and the notes below it."""
        return "\n\n".join([md.table(self.header, self.cells, right=range(2, len(self.header))), *self.notes])


def compare_tracking(runs: Sequence[str | Path], out: str | Path) -> TrackingComparison:
    """Draw the curves of ``runs`` into the PNG ``out``; runs of one mixer have one colour.

    Raises RunError, one line: what ``check_runs`` refuses, a run that was not measured, runs of different tasks, or an
    ``out`` that cannot be written.
    """
    paths, target = check_runs(runs, out)
    results: dict[str, TrackingResult] = {}
    for name, path in paths.items():
        found = read_json(TrackingResult, eval_dir(path) / "tracking.json")
        if found is None:
            raise RunError(f"{path}: not measured yet; paralm eval tracking {path}")
        results[name] = found
    names, first = list(results), next(iter(results.values()))
    for name, result in results.items():
        if (title(result.task), result.chance) != (title(first.task), first.chance):
            raise RunError(
                f"{names[0]} is of {title(first.task)}, {name} of {title(result.task)}; compare runs of one task"
            )
    notes = []
    if any(result.task != first.task for result in results.values()):
        notes.append("The runs' tasks have different settings (paralm config show RUN/config.yaml).")
    return TrackingComparison(results, draw_results(list(results.values()), target), notes)


def draw_results(results: Sequence[TrackingResult], out: Path) -> Path:
    """Answers right by length, a curve a result and a colour a mixer, as the PNG ``out``; RunError, one line, if it
    cannot be written."""
    figure, axes = figures.new("length of the example (tokens)", "answers right")
    mixers = list(dict.fromkeys(result.mixer for result in results))
    labelled: set[str] = set()
    for result in results:
        place = mixers.index(result.mixer)
        color, marker = figures.CYCLE[place % len(figures.CYCLE)], _MARKERS[place % len(_MARKERS)]
        draw(axes, result, color, result.mixer if result.mixer not in labelled else "_", marker)
        labelled.add(result.mixer)
    frame(axes, results)
    axes.set_title(title(results[0].task))
    try:
        return figures.save(figure, out)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None
