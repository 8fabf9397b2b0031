"""The course of a run from its ``metrics.jsonl``, as arrays and as figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from paralm.config_yaml import read
from paralm.errors import RunError, UserError
from paralm.evaluation import figures
from paralm.training.metrics import read_metrics

Floats = NDArray[np.float64]
POINTS = 2000  # drawn at most; more cannot be told apart in a figure


@dataclass(frozen=True)
class Validation:
    """The validations of one set, one entry each."""

    tokens: Floats  # trained on by then
    seconds: Floats  # of training by then
    loss: Floats  # nats per token
    bits_per_byte: Floats  # NaN for a task, which has no bytes
    accuracy: Floats  # of a task's answers; NaN for text


@dataclass(frozen=True)
class Curves:
    """The training steps of a run that were logged, one entry each, and its validations by set."""

    step: Floats
    tokens: Floats  # trained on so far, those before a fork included
    tokens_before: int  # the fork: of the run this one went on from; 0 for one that began anew
    seconds: Floats  # of this run's training so far, over all attempts; validations and checkpoints not counted
    loss: Floats  # nats per token
    grad_norm: Floats
    lr: Floats
    tokens_per_s: Floats
    parts: dict[str, Floats]  # seconds of a step: data, forward and backward, update
    mfu: Floats  # NaN where the device's peak is not known
    skipped: NDArray[np.bool_]
    newton: dict[str, Floats]  # iterations by layer
    validation: dict[str, Validation]

    @property
    def bytes_factor(self) -> float | None:
        """Bits per byte over nats per token, as the last validation of the held-out split has them."""
        held_out = self.validation.get("held_out")
        if held_out is None or not len(held_out.loss):
            return None
        factor = float(held_out.bits_per_byte[-1] / held_out.loss[-1])
        return factor if math.isfinite(factor) and factor > 0 else None


def read_curves(run_dir: Path) -> Curves:
    """Read a run's metrics.

    Raises RunError, one line: no metrics, none of a training step yet, or a damaged line (by its number). A last
    line that a crash left unfinished is passed over.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"{path}: no such file, so there is nothing to show of {run_dir}; train the run first")
    rows = read_metrics(path)
    train = [row for row in rows if row.get("kind") == "train"]
    if not train:
        raise RunError(f"{path}: no training step in it yet; train the run first")
    try:
        validations = [row for row in rows if row.get("kind") == "validation"]
        return _curves(train, validations, _tokens_before(run_dir, train[0]))
    except (KeyError, TypeError, ValueError) as error:
        key = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{path}: a row is not as paralm writes it ({key}); restore or remove it") from None


def _tokens_before(run_dir: Path, first: dict[str, Any]) -> int:
    """Of the run that a run went on from as ``training.fork_from``, whose time is not its own; 0 for one that began
    anew. ``first``: the first row there is, ``log_every`` steps after the fork where RUN@STEP says no step."""
    try:
        training = read(run_dir / "config.yaml", "config.yaml")[0]["training"]
        source, every = training.get("fork_from"), int(training.get("log_every", 1))
        each = training["global_batch_size"] * training["seq_len"] if source else 0
    except (OSError, UserError, KeyError, TypeError, ValueError, AttributeError):
        return 0  # no configuration that says so
    if not source:
        return 0
    _, at, step = str(source).rpartition("@")
    own = max(1, first["step"] - int(step)) if at and step.isdecimal() else min(every, first["step"])
    return max(0, int(first["tokens"]) - own * each)


def _curves(train: list[dict[str, Any]], validations: list[dict[str, Any]], before: int) -> Curves:
    step, tokens, speed = (_column(train, key) for key in ("step", "tokens", "tokens_per_s"))
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.nancumsum(np.diff(tokens, prepend=before) / speed)
    names = [key for key in train[-1].get("newton") or {} if key.endswith("iterations")]
    found: dict[str, Validation] = {}
    for name in dict.fromkeys(str(row["set"]) for row in validations):
        mine = [row for row in validations if row["set"] == name]
        at = _column(mine, "step")
        found[name] = Validation(
            np.interp(at, step, tokens),
            np.interp(at, step, seconds),
            _column(mine, "loss"),
            _column(mine, "bits_per_byte", math.nan),  # none where there is no text
            _column(mine, "accuracy", math.nan),
        )
    return Curves(
        step=step,
        tokens=tokens,
        tokens_before=before,
        seconds=seconds,
        loss=_column(train, "loss"),
        grad_norm=_column(train, "grad_norm"),
        lr=_column(train, "lr"),
        tokens_per_s=speed,
        parts={
            "data": _column(train, "time_data", math.nan),
            "forward and backward": _column(train, "time_forward_backward", math.nan),
            "update": _column(train, "time_step", math.nan),
        },
        mfu=_column(train, "mfu", math.nan),
        skipped=np.array([bool(row.get("skipped", False)) for row in train]),
        newton={name: np.array([_number((row.get("newton") or {}).get(name)) for row in train]) for name in names},
        validation=found,
    )


def _column(rows: list[dict[str, Any]], key: str, missing: float | None = None) -> Floats:
    """A key of every row; KeyError where it is absent and ``missing`` is not given."""
    values = [row[key] if missing is None else row.get(key, missing) for row in rows]
    return np.array([_number(value) for value in values], dtype=np.float64)


def _number(value: Any) -> float:
    """A metric's value; null is NaN, and what is not finite was written as a word."""
    return math.nan if value is None else float(value)


# -- figures -------------------------------------------------------------------------------------------------


def smooth(values: Floats, window: int) -> Floats:
    """The mean over ``window`` entries around each; entries that are not finite do not count.

    At the beginning, where losses are steep, fewer on both sides; at the end only those before it, for a mean of few
    noisy entries would look like a turn.
    """
    finite = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    index = np.arange(len(values))
    reach = np.minimum(index, window // 2)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def window_of(count: int) -> int:
    """Entries to smooth over: a fiftieth of them."""
    return max(1, count // 50) | 1


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most POINTS of the points: the means of runs of neighbours."""
    step = -(-len(x) // POINTS)
    if step == 1:
        return x, y
    starts = np.arange(0, len(x), step)
    lengths = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / lengths, np.add.reduceat(y, starts) / lengths


def draw_loss(axes: Axes, x: Floats, loss: Floats, label: str, color: str = figures.BLUE, faint: bool = True) -> None:
    """A training loss: smoothed, with the raw values faint behind it."""
    if faint:
        axes.plot(*thin(x, loss), color=color, alpha=0.25, linewidth=0.8)
    axes.plot(*thin(x, smooth(loss, window_of(len(loss)))), color=color, linewidth=1.6, label=label)


def crop(axes: Axes, curves: list[Floats], others: list[float]) -> None:
    """Limits of y that show where the curves go: the steep beginning, a thirtieth of the steps, may run out at
    the top."""
    tails = [c[len(c) // 30 :] for c in (smooth(c, window_of(len(c))) for c in curves)]
    values = np.concatenate([*tails, np.array(others)])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def loss_figure(curves: Curves, levels: dict[str, float] | None = None) -> Figure:
    """Loss over tokens; ``levels``: bits per byte to compare with, by name, drawn as dotted lines."""
    figure, axes = figures.new("tokens trained on", "loss (nats per token)")
    factor = curves.bytes_factor
    draw_loss(axes, curves.tokens, curves.loss, "training")
    others = []
    for (name, found), color in zip(curves.validation.items(), (figures.RED, *figures.CYCLE[2:]) * 9):
        axes.plot(found.tokens, found.loss, color=color, marker="o", markersize=4, label=name.replace("_", "-"))
        others += found.loss.tolist()
    if factor is not None:
        for name, level in (levels or {}).items():
            axes.axhline(level / factor, color=figures.GREY, linewidth=1, linestyle=":")
            above = level == max((levels or {}).values())  # the name of a lower line below it: they may lie close
            axes.annotate(
                name, (1, level / factor), xycoords=("axes fraction", "data"), xytext=(-4, 3 if above else -3),
                textcoords="offset points", ha="right", va="bottom" if above else "top", color=figures.GREY,
                fontsize=9,
            )  # fmt: skip
            others.append(level / factor)
        right = axes.secondary_yaxis("right", functions=_scale(factor))
        right.set_ylabel("bits per byte")
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
    crop(axes, [curves.loss], others)
    axes.set_xlim(left=0)
    figures.short_axis(axes)
    axes.legend(frameon=False)
    axes.set_title("Loss")
    return figure


def _scale(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Multiplication and division by a number, of arrays."""
    return lambda y: np.asarray(y) * factor, lambda y: np.asarray(y) / factor


def throughput_figure(curves: Curves) -> Figure:
    """Tokens a second, and what the time of a step goes into."""
    figure, (left, right) = figures.row(2)
    figures.style(left, "step", "tokens per second")
    left.plot(*thin(curves.step, curves.tokens_per_s), color=figures.BLUE, linewidth=0.8, alpha=0.6)
    median = float(np.median(curves.tokens_per_s))
    left.axhline(median, color=figures.BLUE, linewidth=1.4, label=f"median {figures.short(median)}")
    left.legend(frameon=False)
    left.set_ylim(bottom=0)
    figures.short_axis(left)
    figures.short_axis(left, "y")
    left.set_title("Throughput")
    figures.style(right, "step", "milliseconds")
    window = window_of(len(curves.step))
    for (name, values), color in zip(curves.parts.items(), (figures.GREEN, figures.BLUE, figures.RED)):
        if np.isfinite(values).any():
            right.plot(*thin(curves.step, 1e3 * smooth(values, window)), color=color, label=name)
    right.set_ylim(bottom=0)
    figures.short_axis(right)
    right.legend(frameon=False)
    right.set_title("Time of a step")
    return figure


def optimization_figure(curves: Curves) -> Figure:
    """Gradient norm before clipping, and the learning rate."""
    figure, (left, right) = figures.row(2)
    figures.style(left, "step", "gradient norm before clipping")
    good = np.isfinite(curves.grad_norm) & (curves.grad_norm > 0)
    if good.any():
        norm = curves.grad_norm[good]
        left.plot(*thin(curves.step[good], norm), color=figures.BLUE, linewidth=0.8, alpha=0.6)
        if norm.max() > 20 * norm.min():
            left.set_yscale("log")
    if curves.skipped.any():
        for at in curves.step[curves.skipped][:100]:
            left.axvline(at, color=figures.RED, linewidth=0.8)
        left.set_title("Gradient norm (red: skipped steps)")
    else:
        left.set_title("Gradient norm")
    figures.short_axis(left)
    figures.style(right, "step", "learning rate")
    right.plot(*thin(curves.step, curves.lr), color=figures.RED)
    right.set_ylim(bottom=0)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    figures.short_axis(right)
    right.set_title("Learning rate")
    return figure


def newton_figure(curves: Curves) -> Figure | None:
    """Newton iterations a solve took, by layer; None where nothing was solved by Newton's method."""
    solved = {name: values for name, values in curves.newton.items() if np.nanmax(values, initial=0.0) > 0}
    if not solved:
        return None
    figure, axes = figures.new("step", "Newton iterations (most in a step)")
    window = window_of(len(curves.step))
    for index, (name, values) in enumerate(solved.items()):
        shade = index / max(1, len(solved) - 1)
        color = (0.0, 0.55 - 0.35 * shade, 0.85 - 0.45 * shade)
        label = name.split("/")[0].replace("_", " ")
        shown = label if len(solved) <= 8 or index in (0, len(solved) - 1) else None
        axes.plot(*thin(curves.step, smooth(values, window)), color=color, linewidth=1.2, label=shown)
    axes.set_ylim(bottom=0)
    figures.short_axis(axes)
    axes.legend(frameon=False)
    axes.set_title("Newton iterations by layer")
    return figure


def write_curves(run_dir: Path, curves: Curves, levels: dict[str, float] | None = None) -> dict[str, Path]:
    """Draw every figure into the run's folder; returns the files by name."""
    drawn = {
        "loss": loss_figure(curves, levels),
        "throughput": throughput_figure(curves),
        "optimization": optimization_figure(curves),
        "newton": newton_figure(curves),
    }
    return {name: figures.save(figure, run_dir / f"{name}.png") for name, figure in drawn.items() if figure}
