"""What the rows of the benchmark of the mixers come to: a table, growth, comparisons, errors.

A row has "subject", "batch" and "length"; and "samples", "passed", "seconds" and "memory_bytes", or "error", or "over".
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from support.mixer_subjects import Subject

GROWTH = (8192, 65536)
"""Between these the exponent of growth is taken."""

Row = dict[str, Any]
Key = tuple[str, int, int]


def failed(row: Row) -> bool:
    """Whether it holds an error or ran over the limit."""
    return "error" in row or "over" in row


def key_of(row: Row) -> Key:
    """What a row is of."""
    return row["subject"], row["batch"], row["length"]


def summaries(rows: Iterable[Row]) -> list[Row]:
    """For each subject and batch: tokens a second at the shortest length, and the exponent of growth in time and
    memory over GROWTH (1 is linear), where both ends were measured."""
    groups: dict[tuple[str, int], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["subject"], row["batch"]), {})[row["length"]] = row
    result = []
    for (name, batch), by_length in groups.items():
        measured = {length: row for length, row in sorted(by_length.items()) if "seconds" in row}
        if not measured:
            continue
        shortest = min(measured)
        found: Row = {"subject": name, "batch": batch, "shortest": shortest}
        found["tokens_per_s"] = batch * shortest / measured[shortest]["seconds"]["median"]
        if all(length in measured for length in GROWTH):
            low, high = (measured[length] for length in GROWTH)
            scale = math.log(GROWTH[1] / GROWTH[0])
            found["time_exponent"] = math.log(high["seconds"]["median"] / low["seconds"]["median"]) / scale
            if min(low["memory_bytes"], high["memory_bytes"]) > 0:
                found["memory_exponent"] = math.log(high["memory_bytes"] / low["memory_bytes"]) / scale
        result.append(found)
    return result


def comparisons(rows: Iterable[Row], chosen: dict[str, Subject]) -> list[str]:
    """Each peer at the longest length that it and ours were measured at."""
    table = {key_of(row): row for row in rows if "seconds" in row}
    lines = []
    for name, subject in chosen.items():
        for batch in sorted({batch for _, batch, _ in table}):
            both = [n for s, b, n in table if s == name and b == batch and (subject.beside, batch, n) in table]
            if not both:
                continue
            theirs, own = table[name, batch, max(both)], table[subject.beside, batch, max(both)]
            text = f"{theirs['seconds']['median'] / own['seconds']['median']:.2f}× the time"
            if own["memory_bytes"] > 0:
                text += f", {theirs['memory_bytes'] / own['memory_bytes']:.2f}× the memory"
            lines.append(f"{name}: {text} of {subject.beside}, batch {batch}, {max(both)} tokens")
    return lines


def cell_text(row: Row | None) -> str:
    """Time and memory, or what came instead."""
    if row is None:
        return ""
    if "over" in row:
        return f"over {row['over']:g} s"
    if "error" in row:
        return "failed"
    seconds, size = row["seconds"]["median"], row["memory_bytes"]
    clock = f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    memory = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
    return f"{clock}{'*' if len(row['samples']) < 3 else ''}  {memory}"


def show(rows: list[Row], chosen: dict[str, Subject], head: str) -> None:
    """Tables, comparisons, errors."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 220, highlight=False)
    table = {key_of(row): row for row in rows}
    lengths = sorted({length for _, _, length in table})
    found = {(s["subject"], s["batch"]): s for s in summaries(rows)}
    for batch in sorted({batch for _, batch, _ in table}):
        shown = Table(title=f"forward and backward, peak memory; batch {batch}, {head}", title_justify="left")
        shown.add_column("tokens")
        for text in [*map(str, lengths), "tokens/s at the first", "time ~ tokens^"]:
            shown.add_column(text, justify="right", no_wrap=True)
        for name, subject in chosen.items():
            cells = [cell_text(table.get((name, batch, length))) for length in lengths]
            if any(cells):
                summary = found.get((name, batch), {})
                rate = f"{summary['tokens_per_s']:.0f}" if summary else ""
                power = f"{summary['time_exponent']:.2f}" if "time_exponent" in summary else ""
                shown.add_row(("  " if subject.beside else "") + name, *cells, rate, power)
        console.print(shown)
    if any("samples" in row and len(row["samples"]) < 3 for row in rows):
        print("* fewer than three repetitions: one takes long")
    passed = sum(sum(row.get("passed", ())) for row in rows)
    if passed:
        share = sum(sum(row.get("samples", ())) for row in rows) / passed
        print(f"what is counted is {share:.0%} of the time that went by")
    print("\n".join(comparisons(rows, chosen)))
    for row in rows:
        if "error" in row and "since" not in row:
            print(f"failed: {row['subject']}, batch {row['batch']}, {row['length']} tokens: {row['error']}")
