"""Several runs over one another: their curves in one figure and what they reached in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from paralm.errors import RunError
from paralm.evaluation import figures
from paralm.evaluation import markdown as md
from paralm.evaluation.curves import Curves, crop, draw_loss, read_curves
from paralm.evaluation.report import ResultSet, read_results


@dataclass(frozen=True)
class Row:
    """What a run reached. ``validation``: the last one of the held-out split during training; the rest is of
    ``paralm eval``, None where the run was not evaluated."""

    run: str
    parameters: int | None
    step: int
    tokens: float
    seconds: float
    tokens_per_s: float
    train_loss: float
    validation_bits_per_byte: float | None
    bits_per_byte: float | None
    bits_per_byte_interval: tuple[float, float] | None
    token_perplexity: float | None


@dataclass(frozen=True)
class Comparison:
    """Rows in the order the runs were given; ``notes``: what keeps the numbers from being comparable."""

    rows: list[Row]
    figure: Path
    notes: list[str]

    @property
    def header(self) -> list[str]:
        """Of :attr:`cells`."""
        return [
            "run", "parameters", "step", "tokens", "time", "tokens/s", "train loss", "validation bits/byte",
            "eval bits/byte", "95 % interval", "token perplexity",
        ]  # fmt: skip

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [
            [
                row.run,
                figures.short(row.parameters) if row.parameters is not None else "–",
                f"{row.step:,}",
                figures.short(row.tokens),
                md.duration(row.seconds),
                figures.short(row.tokens_per_s),
                f"{row.train_loss:.4f}",
                _number(row.validation_bits_per_byte, 4),
                _number(row.bits_per_byte, 4),
                md.interval(row.bits_per_byte_interval, 4) or "–",
                _number(row.token_perplexity, 2),
            ]
            for row in self.rows
        ]

    def markdown(self) -> str:
        """The table, and the notes below it."""
        return "\n\n".join([md.table(self.header, self.cells, right=range(1, 11)), *self.notes])

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"rows": [asdict(row) for row in self.rows], "figure": str(self.figure), "notes": self.notes}


def compare(runs: Sequence[str | Path], out: str | Path) -> Comparison:
    """Overlay the losses of ``runs`` over tokens and over time in the PNG ``out``, and tabulate what they reached.

    Losses are drawn in bits per byte where every run validated on held-out text (then tokenizers may differ),
    otherwise in nats per token. Raises RunError, one line: what :func:`check_runs` refuses, a run without metrics or
    with damaged ones, or an ``out`` that cannot be written.
    """
    paths, target = check_runs(runs, out)
    found = {name: (read_curves(path), read_results(path)) for name, path in paths.items()}
    figure = _draw({name: curves for name, (curves, _) in found.items()}, target)
    rows = [_row(name, curves, results) for name, (curves, results) in found.items()]
    return Comparison(rows, figure, _notes({name: results for name, (_, results) in found.items()}))


def check_runs(runs: Sequence[str | Path], out: str | Path) -> tuple[dict[str, Path], Path]:
    """The folders of ``runs`` by the names they are shown under, in their order, and the figure's path.

    A name is the folder's, or the whole path where folders' names are not different. Raises RunError, one line: fewer
    than two runs, a folder that is not there, a run given twice, or an ``out`` that is no PNG.
    """
    paths, target = [Path(run) for run in runs], Path(out)
    if len(paths) < 2:
        raise RunError(f"{len(paths)} run to compare; give at least two")
    if target.suffix.lower() != ".png":
        raise RunError(f"{target}: the figure is a PNG; give a name that ends in .png")
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder")
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path, full in zip(paths, resolved) if resolved.count(full) > 1)
        raise RunError(f"{twice}: given twice; compare different runs")
    names = [path.name for path in resolved]
    names = names if len(set(names)) == len(names) else [str(path) for path in resolved]
    return dict(zip(names, paths, strict=True)), target


def _row(name: str, curves: Curves, results: ResultSet) -> Row:
    held_out = curves.validation.get("held_out")
    scored = results.perplexity.get("held_out")
    tail = curves.loss[-max(1, len(curves.loss) // 50) :]
    tail = tail[np.isfinite(tail)]
    return Row(
        run=name,
        parameters=results.record.parameters if results.record is not None else None,
        step=int(curves.step[-1]),
        tokens=float(curves.tokens[-1]),
        seconds=float(curves.seconds[-1]),
        tokens_per_s=float(np.median(curves.tokens_per_s)),
        train_loss=float(tail.mean()) if len(tail) else math.nan,
        validation_bits_per_byte=(
            float(held_out.bits_per_byte[-1]) if held_out is not None and len(held_out.bits_per_byte) else None
        ),
        bits_per_byte=scored.bits_per_byte if scored is not None else None,
        bits_per_byte_interval=scored.bits_per_byte_interval if scored is not None else None,
        token_perplexity=scored.token_perplexity if scored is not None else None,
    )


def _notes(results: dict[str, ResultSet]) -> list[str]:
    notes = []
    scored = {name: r.perplexity["held_out"] for name, r in results.items() if "held_out" in r.perplexity}
    missing = [name for name in results if name not in scored]
    if missing:
        notes.append(f"Not evaluated yet: {', '.join(missing)} (paralm eval RUN).")
    if len({(r.n_bytes, r.n_documents) for r in scored.values()}) > 1:
        sizes = ", ".join(f"{name} {r.n_bytes:,}" for name, r in scored.items())
        notes.append(f"The runs were evaluated on different bytes ({sizes}): their results are not comparable.")
    if len({r.tokens for r in scored.values()}) > 1:
        notes.append("Their tokens differ, so perplexities per token are not comparable; bits per byte are.")
    if len({r.reset_every for r in scored.values()}) > 1:
        windows = ", ".join(f"{name} {r.reset_every or 'whole documents'}" for name, r in scored.items())
        notes.append(f"They were read in different windows: {windows}.")
    return notes


def _draw(found: dict[str, Curves], out: Path) -> Path:
    factors = {name: curves.bytes_factor for name, curves in found.items()}
    in_bytes = all(factor is not None for factor in factors.values())
    figure, (left, right) = figures.row(2, (5.6, 4.4))
    unit = "bits per byte" if in_bytes else "nats per token"
    longest = max(float(curves.seconds[-1]) for curves in found.values())
    scale, time_unit = next((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
                            if longest >= 2 * s or s == 1)  # fmt: skip
    figures.style(left, "tokens trained on", f"loss ({unit})")
    figures.style(right, f"time in training steps ({time_unit})", f"loss ({unit})")
    losses, others = [], []
    for (name, curves), color in zip(found.items(), figures.CYCLE * (1 + len(found) // len(figures.CYCLE))):
        factor = (factors[name] or 1.0) if in_bytes else 1.0
        losses.append(curves.loss * factor)
        held_out = curves.validation.get("held_out")
        for axes, x in ((left, curves.tokens), (right, curves.seconds / scale)):
            draw_loss(axes, x, losses[-1], name, color, faint=len(found) <= 3)
        if held_out is not None:
            values = held_out.bits_per_byte if in_bytes else held_out.loss
            others += values.tolist()
            for axes, x in ((left, held_out.tokens), (right, held_out.seconds / scale)):
                axes.plot(x, values, color=color, marker="o", markersize=4, linestyle="none")
    for axes in (left, right):
        crop(axes, losses, others)
        axes.set_xlim(left=0)
    figures.short_axis(left)
    if others:
        left.plot([], [], color=figures.GREY, marker="o", markersize=4, linestyle="none", label="held-out text")
    left.legend(frameon=False)
    left.set_title("by tokens")
    right.set_title("by time")
    try:
        return figures.save(figure, out)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
