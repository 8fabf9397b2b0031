"""Markdown that stays what it is whatever text is put into it: tables, code spans, fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from paralm.evaluation.bootstrap import Interval


def fence(text: str, language: str = "text") -> str:
    """A fenced block; its fence is longer than any run of backticks in the text."""
    text = _printable(text).rstrip("\n")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def code(text: str) -> str:
    """A code span on one line; line ends and other control characters are written as escapes."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{padding}{text}{padding}{ticks}" if text else "(nothing)"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table; ``right``: columns set to the right."""
    rule = ["---:" if i in right else ":---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(_cell(c) for c in row) + " |" for row in (header, rule, *rows))


def interval(value: Interval | None, digits: int) -> str:
    """``1.57 – 1.64``, or nothing."""
    return "" if value is None else f"{value[0]:,.{digits}f} – {value[1]:,.{digits}f}"


def duration(seconds: float) -> str:
    """``42 s``, ``4 min 12 s``, ``3 h 20 min``, ``2 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _printable(text: str) -> str:
    """Line ends as "\\n"; control characters, which a viewer may swallow or act on, as U+FFFD."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text)
