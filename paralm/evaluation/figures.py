"""How every figure looks: light, one size, labelled axes, no boxes; drawn without a display."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from paralm_data.atomic import write_file

# Colour-blind safe (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7F7F7F"
CYCLE = (BLUE, RED, GREEN, ORANGE, PURPLE, "#56B4E9", "#000000", "#B8A100")
_DPI = 130


def new(xlabel: str, ylabel: str, size: tuple[float, float] = (7.2, 4.2)) -> tuple[Figure, Axes]:
    """A figure with one pair of axes. The figure belongs to no global state and needs no closing."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    style(axes, xlabel, ylabel)
    return figure, axes


def row(count: int, size: tuple[float, float] = (5.2, 4.0)) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` pairs of axes side by side, to be styled one by one."""
    figure = Figure(figsize=(size[0] * count, size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, count, index + 1) for index in range(count)]


def style(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, a faint grid, two spines."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def mark(axes: Axes, x: float, text: str) -> None:
    """A dotted vertical line with a word beside its top."""
    axes.axvline(x, color=GREY, linewidth=1, linestyle=":")
    axes.annotate(
        text, (x, 1), xycoords=("data", "axes fraction"), xytext=(4, -10), textcoords="offset points",
        color=GREY, fontsize=9,
    )  # fmt: skip


def short(value: float) -> str:
    """A count for people: 950, 12.5k, 3.3M, 7.29B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.4g}"


def short_axis(axes: Axes, which: str = "x") -> None:
    """Ticks of an axis as :func:`short` writes them."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG; a reader sees the old picture or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    write_file(path, content.getvalue())
    return path
