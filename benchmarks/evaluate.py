"""Streaming evaluation: how many tokens a second, and does memory stay flat over a million of them?

    .venv/bin/python benchmarks/evaluate.py [--tokens 1000000] [--mixers paragru,mamba2] [--only flat] [--out FILE]

On a CPU, one thread, float32; seconds are the process's own, so that a busy machine decides no result.

flat     one document of a million tokens through a small model (one layer of width 16) of every mixer with bounded
         state, each in a process of its own: tokens a second, and the peak RSS at the end less that after 10,000
         tokens, which must be below 4 MB
speed    tokens a second of `paralm eval perplexity` with a 10M-parameter preset of each architecture, 16 documents
         side by side, 512 tokens at a time
passkey  the cost of a passkey grid and of a multi-query one, shared text read once through state snapshots, and without

Writes benchmarks/results/evaluate.json row by row; rows that are not asked for stay as they were there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from support.retrieval import grids
from support.streams import Stream, bounded, in_a_process_of_its_own, one_arena
from support.timing import ROOT, environment

from paralm.config_files import load_config
from paralm.evaluation.scoring import score
from paralm.models import build_model

RESULT = ROOT / "benchmarks" / "results" / "evaluate.json"
LIMIT = 4_000_000  # bytes of growth
PRESETS = ("mamba2", "paragru", "paralstm", "xlstm", "xlstm_mixed", "titans_mac", "titans_mag", "titans_mal")
PRESET_VOCAB = 8192


def flat(tokens: int, mixers: list[str]) -> Iterator[dict[str, Any]]:
    """A row a mixer; printed as it comes."""
    print(f"{'mixer':18} {'tokens':>10} {'tokens/s':>10} {'peak RSS':>10} {'growth of it':>13}")
    for name in mixers:
        row = in_a_process_of_its_own(name, tokens)
        row["flat"] = "error" not in row and max(row["peak_growth"], row["rss_growth"]) < LIMIT
        if "error" in row:
            print(f"{name:18} {row['error']}")
        else:
            peak, growth = f"{row['peak_rss_warm'] / 1e6:.0f} MB", f"{row['peak_growth'] / 1e6:.2f} MB"
            print(f"{name:18} {tokens:10,} {row['tokens_per_s']:10,.0f} {peak:>10} {growth:>13}", flush=True)
        yield row


def speed(rows: int = 16, chunk: int = 512, seconds: float = 10.0) -> Iterator[dict[str, Any]]:
    """A row a preset: rectangles of ``rows`` documents until ``seconds`` are over, after one that is not counted."""
    print(f"\n{'preset':18} {'parameters':>11} {'tokens/s':>10}")
    for name in PRESETS:
        config = load_config([f"model/{name}_10m"], build=False).config.model
        model = build_model(config, PRESET_VOCAB, seed=0).eval()
        rate = _rate(model, rows, chunk, seconds)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name + '_10m':18} {parameters:11,} {rate['tokens_per_s']:10,.0f}", flush=True)
        yield {"preset": f"{name}_10m", "parameters": parameters, "documents": rows, "chunk": chunk, **rate}


class _Enough(Exception):
    """The time is over."""


def _rate(model: Any, rows: int, chunk: int, seconds: float) -> dict[str, float]:
    """Tokens a second of whole rectangles."""
    one = Stream.of(10_000_000, vocab_size=PRESET_VOCAB)
    length = len(one.tokens) // rows
    many = Documents(one, length)
    seen: list[tuple[float, int]] = []

    def after(done: int, total: int) -> None:
        seen.append((time.process_time(), done))
        if len(seen) > 2 and seen[-1][0] - seen[0][0] > seconds:
            raise _Enough

    with contextlib.suppress(_Enough):
        score(model, many, list(range(rows)), rows=rows, chunk=chunk, on_progress=after)  # type: ignore[arg-type]
    (start, before), (end, done) = seen[0], seen[-1]
    return {"tokens": done - before, "seconds": end - start, "tokens_per_s": (done - before) / (end - start)}


class Documents:
    """A stream cut into documents of equal length."""

    def __init__(self, stream: Stream, length: int) -> None:
        self.tokens, self.length = stream.tokens, length

    def bounds(self, document: int) -> tuple[int, int]:
        """Where a document lies."""
        return document * self.length, (document + 1) * self.length


def main() -> int:
    """Run the parts asked for; 1 if memory grew anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the flat part")
    parser.add_argument("--mixers", default="", help="of the flat part, with commas; default: every one")
    parser.add_argument("--only", default="", help="parts, with commas: flat, speed, passkey")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if not one_arena():
        os.environ["MALLOC_ARENA_MAX"] = "1"  # glibc reads it when a process starts
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(1)
    mixers = options.mixers.split(",") if options.mixers else bounded()
    # A part yields rows whose first key is what they are told apart by.
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "flat": lambda: flat(options.tokens, mixers),
        "speed": speed,
        "passkey": grids,
    }
    wanted = options.only.split(",") if options.only else list(parts)
    unknown = set(wanted) - parts.keys()
    if unknown:
        parser.error(f"--only: no part {sorted(unknown)[0]!r}; there is {', '.join(parts)}")
    for name in wanted:
        for row in parts[name]():
            keep(options.out, name, row)
    rows = json.loads(options.out.read_text()).get("flat", {"rows": []})["rows"]
    return 0 if all(row["flat"] for row in rows) else 1


def keep(path: Path, part: str, row: dict[str, Any]) -> None:
    """Put a row into the file at once, in place of that of the same mixer, preset or case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    key = next(iter(row))
    before = [old for old in content.get(part, {"rows": []})["rows"] if old[key] != row[key]]
    rows = sorted([*before, row], key=lambda row: str(row[key]))
    content[part] = {**environment("cpu"), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
