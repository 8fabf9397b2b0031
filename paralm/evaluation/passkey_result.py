"""What the passkey and needle grids find, as numbers, figures and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from paralm.evaluation.proportion import wilson
from paralm.evaluation.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Interval = tuple[float, float]


class Rate(BaseModel):
    """``hits`` of ``n``, and the 95 % Wilson interval."""

    hits: int
    n: int
    rate: float
    interval: Interval

    @classmethod
    def of(cls, hits: int, n: int) -> Rate:
        return cls(hits=hits, n=n, rate=hits / n, interval=wilson(hits, n))

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.interval[0]:.1%}, {self.interval[1]:.1%}]"


class Needle(BaseModel):
    """One asked needle of a cell: where it begins, the tokens between its end and the question, how it was answered."""

    start: int
    distance: int
    teacher_forced: Rate
    generated: Rate


class GridCell(BaseModel):
    """A (length, depth): ``n`` answers, of all samples and questions."""

    length: int
    depth: float  # asked for, of the first needle
    n: int
    teacher_forced: Rate  # every token of the key is the likeliest, the key before it given
    generated: Rate  # the key stands in what was generated greedily
    token_accuracy: Rate
    by_token: list[float]  # accuracy of the key's first token, second, …, each with the key before it given
    nats_per_token: float | None  # of the key; None where a logit was not finite
    not_finite: int  # answers with logits that were not finite: misses
    needles: list[Needle]


class LengthRow(BaseModel):
    """All depths of a length together."""

    length: int
    teacher_forced: Rate
    generated: Rate
    token_accuracy: Rate


class DistanceRow(BaseModel):
    """All needles with ``first`` … ``last`` tokens between them and the question."""

    first: int
    last: int
    teacher_forced: Rate
    generated: Rate


class Saving(BaseModel):
    """What reading shared text once saves: ``prompts`` tokens in all prompts, ``read`` tokens that a model reads."""

    prompts: int
    read: int
    factor: float


class PasskeyResult(Result):
    """Retrieval over lengths and depths. Intervals: 95 %, Wilson, over keys; the filler is one text."""

    kind: ClassVar[str] = "passkey"

    task: str
    haystack: str
    samples: int
    queries: int
    key_tokens: int
    one_token_a_digit: bool
    chance: float  # of a uniform guess at the whole key
    lengths: list[int]
    depths: list[float]
    cells: list[GridCell]
    by_length: list[LengthRow]
    by_distance: list[DistanceRow]
    pass_at: float
    longest_passed: int | None  # the longest length up to which at every length `generated` over all depths ≥ pass_at
    snapshots: Saving

    @property
    def name(self) -> str:
        """``passkey``, or ``passkey_TASK`` for the needle tasks."""
        return self.kind if self.task == "passkey" else f"{self.kind}_{self.task}"

    def inside_training(self) -> Rate | None:
        """Generated, over the lengths that the model was trained on; None where nobody says, or none is."""
        rows = [row.generated for row in self.by_length if self.train_seq_len and row.length <= self.train_seq_len]
        return Rate.of(sum(r.hits for r in rows), sum(r.n for r in rows)) if rows else None

    def scalars(self) -> dict[str, float]:
        """For TensorBoard."""
        n = sum(cell.n for cell in self.cells)
        found = {
            "teacher_forced": sum(cell.teacher_forced.hits for cell in self.cells) / n,
            "generated": sum(cell.generated.hits for cell in self.cells) / n,
            "longest_passed": float(self.longest_passed or 0),
        }
        inside = self.inside_training()
        return found if inside is None else {**found, "inside_training_length": inside.rate}

    def figures(self) -> dict[str, Figure]:
        """The grid, and the accuracy by distance."""
        return {"grid": self._grid(), "distance": self._distance()}

    def _grid(self) -> Figure:
        from matplotlib.colors import LinearSegmentedColormap

        from paralm.evaluation import figures

        colours = LinearSegmentedColormap.from_list("accuracy", ["#F7F7F7", "#9ECAE1", figures.BLUE])
        width = max(4.2, 1.0 + 0.62 * len(self.lengths))
        figure, panels = figures.row(2, size=(width, 1.8 + 0.5 * len(self.depths)))
        at = {(cell.length, cell.depth): cell for cell in self.cells}
        for axes, key, title in zip(panels, ("teacher_forced", "generated"), ("teacher-forced", "generated")):
            rates = [[getattr(at[length, depth], key) for length in self.lengths] for depth in self.depths]
            image = axes.imshow([[r.rate for r in row] for row in rates], vmin=0, vmax=1, cmap=colours, aspect="auto")
            for place, value in ((place, value) for row in enumerate(rates) for place, value in _places(*row)):
                colour = "white" if value.rate > 0.6 else "black"
                low, high = (100 * end for end in value.interval)
                axes.text(*place, f"{100 * value.rate:.0f}\n", ha="center", va="center", fontsize=9, color=colour)
                axes.text(*place, f"\n{low:.0f}–{high:.0f}", ha="center", va="center", fontsize=6, color=colour)
            axes.set_xticks(range(len(self.lengths)), [figures.short(length) for length in self.lengths], fontsize=8)
            axes.set_yticks(range(len(self.depths)), [f"{depth:.0%}" for depth in self.depths], fontsize=8)
            axes.set_xlabel("prompt (tokens)")
            axes.set_ylabel("depth of the needle")
            axes.set_title(f"{self.task}: exact match\n{title} (%, 95 % interval)", fontsize=10)
            inside = sum(length <= (self.train_seq_len or 0) for length in self.lengths)
            if 0 < inside < len(self.lengths):
                axes.axvline(inside - 0.5, color=figures.RED, linewidth=1.5, linestyle="--")
            axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=panels, shrink=0.85)
        return figure

    def _distance(self) -> Figure:
        from matplotlib import colormaps

        from paralm.evaluation import figures

        figure, axes = figures.new("tokens between needle and question", "exact match, generated")
        for index, length in enumerate(self.lengths):
            points = sorted((n.distance, n.generated.rate) for c in self.cells if c.length == length for n in c.needles)
            axes.plot(
                [max(x, 1) for x, _ in points], [y for _, y in points], "o", markersize=4, alpha=0.7,
                color=colormaps["viridis"](index / max(len(self.lengths) - 1, 1)), label=figures.short(length),
            )  # fmt: skip
        middle = [math.sqrt(max(row.first, 1) * max(row.last, 1)) for row in self.by_distance]
        rates = [row.generated for row in self.by_distance]
        errors = [[r.rate - r.interval[0] for r in rates], [r.interval[1] - r.rate for r in rates]]
        axes.errorbar(middle, [r.rate for r in rates], yerr=errors, color="black", capsize=3, linewidth=1.2)
        axes.axhline(self.chance, color=figures.GREY, linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.1)
        axes.legend(title="prompt", fontsize=8, title_fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.05))
        axes.set_title(f"{self.task}: accuracy by distance; bars: 95 % Wilson over all lengths", fontsize=10)
        if self.train_seq_len:
            figures.mark(axes, self.train_seq_len, "training length")
        return figure


def _places(row: int, values: Sequence[Rate]) -> list[tuple[tuple[int, int], Rate]]:
    return [((column, row), value) for column, value in enumerate(values)]


def by_length(cells: Sequence[GridCell]) -> list[LengthRow]:
    """The depths of each length together."""
    rows = []
    for length in sorted({cell.length for cell in cells}):
        own = [cell for cell in cells if cell.length == length]
        rows.append(
            LengthRow(
                length=length,
                teacher_forced=_together([cell.teacher_forced for cell in own]),
                generated=_together([cell.generated for cell in own]),
                token_accuracy=_together([cell.token_accuracy for cell in own]),
            )
        )
    return rows


def by_distance(cells: Sequence[GridCell]) -> list[DistanceRow]:
    """All needles in buckets of distances: 0, 1, 2 … 3, 4 … 7, and so on."""
    buckets: dict[int, list[Needle]] = {}
    for cell in cells:
        for needle in cell.needles:
            buckets.setdefault(needle.distance.bit_length(), []).append(needle)
    return [
        DistanceRow(
            first=(1 << bits) >> 1,
            last=max((1 << bits) - 1, 0),
            teacher_forced=_together([needle.teacher_forced for needle in own]),
            generated=_together([needle.generated for needle in own]),
        )
        for bits, own in sorted(buckets.items())
    ]


def longest_passed(rows: Sequence[LengthRow], pass_at: float) -> int | None:
    """The last length before the first that is below ``pass_at``; None if that is the shortest."""
    passed = None
    for row in rows:
        if row.generated.rate < pass_at:
            break
        passed = row.length
    return passed


def _together(rates: Sequence[Rate]) -> Rate:
    return Rate.of(sum(rate.hits for rate in rates), sum(rate.n for rate in rates))


def grid_cell(found: Mapping[str, Any]) -> GridCell:
    """From what a cell measured (counts)."""
    needles = [
        Needle(
            start=needle["start"],
            distance=needle["distance"],
            teacher_forced=Rate.of(needle["teacher_forced"], needle["n"]),
            generated=Rate.of(needle["generated"], needle["n"]),
        )
        for needle in found["needles"]
    ]
    n, by_token = found["n"], found["by_token"]
    return GridCell(
        length=found["length"],
        depth=found["depth"],
        n=n,
        teacher_forced=_together([needle.teacher_forced for needle in needles]),
        generated=_together([needle.generated for needle in needles]),
        token_accuracy=Rate.of(sum(by_token), n * len(by_token)),
        by_token=[hits / n for hits in by_token],
        nats_per_token=found["nats"] / (n * len(by_token)) if found["nats"] is not None else None,
        not_finite=found["not_finite"],
        needles=needles,
    )


def page(results: Sequence[PasskeyResult]) -> str:
    """The section of ``eval/report.md``."""
    return "\n\n".join(_section(result) for result in results)


def _section(result: PasskeyResult) -> str:
    digits = ", one a digit" if result.one_token_a_digit else ""
    lines = [
        f"### {result.task}",
        "",
        f"Keys of {result.key_tokens} tokens{digits}; chance {result.chance:.1e}. Haystack: {result.haystack}, one "
        f"text for all samples. {result.samples} samples a cell, {result.queries} question(s) each. Intervals: 95 %, "
        "Wilson.",
        "",
        "| prompt (tokens) | teacher-forced | generated | key tokens right |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.length:,} | {row.teacher_forced} | {row.generated} | {row.token_accuracy.rate:.1%} |"
        for row in result.by_length
    ]
    passed = f"{result.longest_passed:,} tokens" if result.longest_passed else "none of the lengths"
    trained = f"; trained at {result.train_seq_len:,}" if result.train_seq_len else ""
    lines += [
        "",
        f"Longest prompt passed (at it and below, at least {result.pass_at:.0%} generated over all depths): "
        f"**{passed}**{trained}. Read by one process, shared text is read once: {result.snapshots.read:,} "
        f"tokens instead of {result.snapshots.prompts:,}, {result.snapshots.factor:.2f} times fewer.",
        "",
        f"![exact match by length and depth]({result.name}_grid.png)",
        "",
        f"![exact match by distance]({result.name}_distance.png)",
    ]
    broken = sum(cell.not_finite for cell in result.cells)
    if broken:
        lines += ["", f"{broken} answers had logits that were not finite; they count as misses."]
    return "\n".join(lines)
