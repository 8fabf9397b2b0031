"""The cost of a passkey grid with shared text read once through state snapshots, and with each prompt read whole.

A small model of random weights (the cost does not depend on them) reads the same grid both ways, which take turns from
cell to cell, and whose answers are compared.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paralm_data import Tokenizer
from paralm_data.passkey import texts

from paralm.config import ModelConfig
from paralm.evaluation.needles import Builder, chosen
from paralm.evaluation.retrieval import Reader
from paralm.models import build_model

MIXERS = ("paragru", "mamba2", "mlstm", "attention")
TASKS = ("passkey", "niah_multiquery")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def grids(
    lengths: Sequence[int] = (1024, 2048), samples: int = 4, chunk: int = 256, width: int = 64, layers: int = 2
) -> Iterator[dict[str, Any]]:
    """A row for each task and mixer; printed as it comes."""
    print(f"\n{'passkey grid':28} {'tokens':>10} {'saved':>7} {'seconds':>9} {'saved':>7} {'differ':>7}")
    with tempfile.TemporaryDirectory(prefix="paralm-passkey-") as folder:
        tokenizer = Tokenizer.train(texts(0, 400), Path(folder) / "tokenizer.model", vocab_size=512)
    for task in TASKS:
        for mixer in MIXERS:
            config = ModelConfig(d_model=width, n_layers=layers, mixer={"name": mixer})
            model = build_model(config, tokenizer.vocab_size, seed=0).eval()
            made = Builder(tokenizer, chosen(task, haystack="noise"), name=task, reach=max(lengths))
            row = _both_ways(model, made, lengths, samples, chunk)
            tokens, seconds = row["tokens"], row["seconds"]
            print(
                f"{mixer + ' ' + task:28} {tokens['snapshots']:10,} {tokens['plain'] / tokens['snapshots']:6.2f}x "
                f"{seconds['snapshots']:9.2f} {seconds['plain'] / seconds['snapshots']:6.2f}x "
                f"{row['verdicts_that_differ']:7}",
                flush=True,
            )
            sizes = {"lengths": list(lengths), "depths": list(DEPTHS), "samples": samples, "chunk": chunk}
            yield {"case": f"{mixer} {task}", "d_model": width, "n_layers": layers, **sizes, **row}


def _both_ways(model: Any, made: Builder, lengths: Sequence[int], samples: int, chunk: int) -> dict[str, Any]:
    """Tokens and process seconds of either way, and how their answers differ."""
    ways = {way: Reader(model, chunk, made.tokenizer.vocab_size, snapshots=way == "snapshots") for way in
            ("snapshots", "plain")}  # fmt: skip
    seconds = dict.fromkeys(ways, 0.0)
    differ, worst, cells = 0, 0.0, 0
    for length in lengths:
        for depth in DEPTHS:
            prompts, found = made.prompts(length, depth, samples), {}
            for way in ways if cells % 2 else reversed(ways):
                began = time.process_time()
                found[way] = ways[way].ask(prompts, samples)
                seconds[way] += time.process_time() - began
            cells += 1
            for one, other in zip(found["snapshots"], found["plain"], strict=True):
                differ += int((one.right != other.right).sum())
                worst = max(worst, float(abs(one.nats - other.nats).max()))
    return {
        "tokens": {way: reader.tokens for way, reader in ways.items()},
        "seconds": seconds,
        "verdicts_that_differ": differ,
        "largest_difference_nats": worst,
    }
