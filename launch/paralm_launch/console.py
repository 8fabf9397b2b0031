"""What the commands print: lines, tables, and a progress line that is plain where no terminal is attached."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_PLAIN_SECONDS = 10.0  # between lines where the progress line cannot be redrawn


def say(text: str) -> None:
    """A line on stdout, as it is; from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        _print(text)


def _print(text: str) -> None:
    """A line on stdout. A log on a full disk does not end what it is about; a reader that has left does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        return


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table; numbers to the right. Not cut where the output is no terminal; on one that is too narrow for its words,
    a row is a line for each of its cells."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    drawn = Table(
        title=title, title_justify="left", box=None, pad_edge=False, show_edge=False, show_header=any(columns)
    )
    for i, column in enumerate(columns):
        numbers = bool(cells) and all(isinstance(row[i], (int, float)) for row in cells)
        drawn.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(cell if isinstance(cell, str) else f"{cell:,}") for cell in row))
    terminal = sys.stdout.isatty()
    console = Console() if terminal else Console(width=200)
    if terminal and console.width < Measurement.get(console, console.options.update(width=1000), drawn).minimum:
        _lines(title, columns, cells)
        return
    with console.capture() as text:
        console.print(drawn)
    for line in text.get().splitlines():
        print(line.rstrip())


def _lines(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table as a line for each cell that holds something, an empty one between rows."""
    if title:
        print(title)
    for number, row in enumerate(rows):
        if number:
            print()
        for column, cell in zip(columns, row, strict=True):
            if cell != "":
                print(f"{column}: " * bool(column) + (cell if isinstance(cell, str) else f"{cell:,}"))


def duration(seconds: float) -> str:
    """``42s``, ``3m 05s``, ``2h 07m``."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def quantity(value: float) -> str:
    """A count in three digits: ``950``, ``12.3k``, ``4.56M``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class ProgressLine:
    """One line that is redrawn on a terminal, and printed now and then elsewhere; a context manager.

    ``update(what, done, total, text)``: ``total`` may be None when it is not known. A change of ``what``
    begins a new line.
    """

    def __init__(self, terminal: bool | None = None, every: float = _PLAIN_SECONDS) -> None:
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._every = every
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._pending: str | None = None  # the last state, when it is not printed yet
        self._printed = ""
        self._said = 0.0

    def __enter__(self) -> ProgressLine:
        if self._terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bars = Progress(
                TextColumn("{task.description:9}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()
        else:
            self._print_pending()

    def _print_pending(self) -> None:
        if self._pending is not None and self._pending != self._printed:
            _print(self._pending)
        self._pending = None

    def update(self, what: str, done: float, total: float | None, text: str) -> None:
        """Show how far it is."""
        new, self._what = what != self._what, what
        if self._bars is not None:
            if new:
                self._task = self._bars.add_task(what, total=total, text=text)
            assert self._task is not None
            self._bars.update(self._task, completed=done, total=total, text=text)
            return
        line = f"{what}: {text}" if text else f"{what} …"
        if new:
            self._print_pending()
        self._pending = line
        if new or time.monotonic() - self._said >= self._every:
            self._print_pending()
            self._printed, self._said = line, time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays, above the one that moves."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _print(text)
