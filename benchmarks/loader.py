"""How many tokens a second does one core's loader feed, shuffled and with resets, from the page cache?

    .venv/bin/python benchmarks/loader.py

A store of 200 million uint16 ids in documents of exponential length, all in the page cache, on a process that is bound
to one processor. Each batch is what training gets: int64 tokens and labels, resets, continuation flags. Beside it, the
same rows' raw bytes gathered by `numpy.take` (row by row of the map, shuffled alike) and copied in one piece from one
warm buffer to another: what the memory would allow if nothing were computed. Batches of the sizes that training uses;
`windows` and `lanes` of one store, and a mixture of three. The target is 50 million tokens a second at the default
batch (16 rows of 256 tokens) and every larger one; exits with 1 below it. Writes benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paralm_data import Loader, Manifest, MixtureLoader, MixtureSource, TokenStore
from paralm_data.manifest import DOC_BYTES, DOC_ENDS, NAME, TOKENS, FileEntry

sys.path.insert(0, str(Path(__file__).resolve().parent))
from support.timing import environment

RESULT = Path(__file__).resolve().parent / "results" / "loader.json"
TARGET = 50e6
BATCHES = ((256, 8), (256, 16), (256, 64), (1024, 32), (2048, 64), (4096, 128))
DEFAULT = 16 * 256  # tokens of the batch from which on the target counts
BOS, EOS, VOCAB = 1, 2, 32_000


def write_store(folder: Path, n_tokens: int, mean_length: int, seed: int) -> TokenStore:
    """A store of random ids; its checksums are not computed, and not looked at."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lengths = np.maximum(3, rng.exponential(mean_length, 2 * n_tokens // mean_length)).astype(np.int64)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < n_tokens - 3], n_tokens)
    tokens = rng.integers(4, VOCAB, n_tokens, dtype=np.uint16)
    starts = np.concatenate(([0], ends[:-1]))
    tokens[starts], tokens[ends - 1] = BOS, EOS
    tokens.tofile(folder / TOKENS)
    ends.astype("<u8").tofile(folder / DOC_ENDS)
    (ends - starts).astype("<u8").tofile(folder / DOC_BYTES)
    files = {name: FileEntry((folder / name).stat().st_size, "0" * 64) for name in (TOKENS, DOC_ENDS, DOC_BYTES)}
    manifest = Manifest("0" * 64, VOCAB, BOS, EOS, "uint16", n_tokens, len(ends), int((ends - starts).sum()), files)
    (folder / NAME).write_bytes(manifest.to_json())
    return TokenStore.open(folder, verify="size")


def rate(call: Callable[[int], Any], tokens: int, seconds: float, rounds: int = 5) -> float:
    """Tokens a second of ``call(step)``, the best of ``rounds``: what others do to the machine only slows it."""
    steps = itertools.count()
    for _ in range(3):
        call(next(steps))
    best = 0.0
    for _ in range(rounds):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / rounds:
            call(next(steps))
            done += tokens
        best = max(best, done / (time.perf_counter() - start))
    return best


def take(store: TokenStore, seq_len: int, rows: int) -> Callable[[int], Any]:
    """Gathers as many random windows of raw ids, and nothing else."""
    tokens = np.asarray(store.tokens)
    whole = tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)
    order = np.random.default_rng(0).permutation(len(whole))
    out = np.empty((rows, seq_len), tokens.dtype)

    def call(step: int) -> None:
        at = step * rows % (len(order) - rows)
        np.take(whole, order[at : at + rows], axis=0, out=out, mode="clip")

    return call


def copy(seq_len: int, rows: int) -> Callable[[int], Any]:
    """Copies as many bytes from one warm buffer to another."""
    source, target = np.ones(seq_len * rows, np.uint16), np.empty(seq_len * rows, np.uint16)

    def call(step: int) -> None:
        np.copyto(target, source)

    return call


def main() -> int:
    """Measure all; 1 if a batch at the target's size or above it is slower than the target."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=200_000_000, help="of the store")
    parser.add_argument("--document", type=int, default=600, help="tokens of a document, on average")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--folder", type=Path, default=None, help="where the store is written; default: temporary")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    cpu = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parts = (1.0, 0.5, 0.25)
        stores = [
            write_store(Path(folder) / str(i), int(options.tokens * part), options.document, i)
            for i, part in enumerate(parts)
        ]
        for store in stores:
            np.asarray(store.tokens).max()  # into the page cache
        rows = measure(stores, options.seconds)
    slow = [row for row in rows if row["batch_tokens"] >= DEFAULT and row["tokens_per_s"] < TARGET]
    content = {
        **environment("cpu"),
        "processor": cpu_name(),
        "store_tokens": options.tokens,
        "document_tokens": options.document,
        "target_tokens_per_s": TARGET,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"→ {options.out}")
    return 1 if slow else 0


def measure(stores: list[TokenStore], seconds: float) -> list[dict[str, Any]]:
    """A row an order and batch size."""
    print(f"{'order':8} {'batch':>12} {'Mtokens/s':>10} {'of take':>8} {'of copy':>8}")
    rows = []
    sources = [MixtureSource(name, store, weight) for name, store, weight in zip("abc", stores, (3.0, 2.0, 1.0))]
    for seq_len, batch in BATCHES:
        tokens = seq_len * batch
        gathered, copied = (
            rate(take(stores[0], seq_len, batch), tokens, seconds),
            rate(copy(seq_len, batch), tokens, 0.5),
        )
        loaders: dict[str, Loader | MixtureLoader] = {
            "windows": Loader(stores[0], seq_len, batch, seed=0),
            "lanes": Loader(stores[0], seq_len, batch, seed=0, order="lanes"),
            "mixture": MixtureLoader(sources, seq_len, batch, seed=0),
        }
        for order, loader in loaders.items():
            found = rate(loader.batch, tokens, seconds)
            rows.append(
                {
                    "order": order, "seq_len": seq_len, "rows": batch, "batch_tokens": tokens, "tokens_per_s": found,
                    "take_tokens_per_s": gathered, "copy_tokens_per_s": copied, "of_take": found / gathered,
                    "of_copy": found / copied,
                }
            )  # fmt: skip
            print(
                f"{order:8} {f'{batch} × {seq_len}':>12} {found / 1e6:10.0f} {found / gathered:8.3f} "
                f"{found / copied:8.3f}",
                flush=True,
            )
    return rows


def cpu_name() -> str:
    """As the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    sys.exit(main())
