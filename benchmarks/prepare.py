"""Preparing text: MB/s a core, beside bare sentencepiece on the same text, two workers beside one, and peak memory.

    .venv/bin/python benchmarks/prepare.py [--only speed,memory] [--mb 60] [--repeats 5] [--large 2000] [--out FILE]

The name is not `tokenize`, which would stand before the standard library's module of that name on the path.

speed   `paralm_data.prepare` with a given tokenizer, from jsonl to stores (records, digests, duplicates, split, tokens,
        checksums), by one worker and by two; and `SentencePieceProcessor.encode` of the same documents, which are in
        memory, in the same batches, on one thread, without anything else. Each run is a process of its own, the three
        take turns, and the medians are compared: of seconds on the clock, and of the processors' seconds, which say the
        same where the machine has other work to do. At least 0.8 of bare sentencepiece a core; at least 1.7 times with
        two workers.
memory  the whole pipeline with two workers, a trained tokenizer, normalisation and MinHash, on corpora of 100 MB and of
        2 GB: the peak RSS of the driver and of the largest worker, which may differ by 10 %.

The text is the standard library's, in documents of a few kilobytes that are cut and joined anew, each a different one.
Writes benchmarks/results/prepare.json; parts that are not asked for stay as they were there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from paralm_data import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent))
ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "prepare.json"
VOCAB = 4096
BATCH_BYTES = 1 << 20


def texts(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Distinct documents of 2 to 8 kB from the standard library's lines."""
    from paralm_data import SourceSpec, documents

    lines = [line for d in documents(SourceSpec()) if len(d.text) < 200_000 for line in d.text.splitlines()]
    draw, made, number = random.Random(seed), 0.0, 0
    while made < megabytes * 1e6:
        parts, size, wanted = [f"document {number}"], 0, draw.randint(2000, 8000)
        while size < wanted:
            at = draw.randrange(len(lines))
            piece = lines[at : at + draw.randint(5, 40)]
            parts += piece
            size += sum(map(len, piece))
        text = "\n".join(parts)
        made += len(text.encode())
        number += 1
        yield text


def write(path: Path, megabytes: float) -> None:
    with path.open("w") as file:
        for text in texts(megabytes):
            file.write(json.dumps({"text": text}) + "\n")


# -- what runs in a process of its own -----------------------------------------------------------------------


def bare(corpus: Path, model: Path) -> dict[str, Any]:
    """sentencepiece alone: its seconds for all documents, which are read before."""
    import sentencepiece

    batches: list[list[str]] = [[]]
    size = total = tokens = 0
    with corpus.open() as file:
        for line in file:
            text = json.loads(line)["text"]
            n_bytes = len(text.encode())
            batches[-1].append(text)
            size, total = size + n_bytes, total + n_bytes
            if size >= BATCH_BYTES:
                batches.append([])
                size = 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    began, used = time.perf_counter(), time.process_time()
    for batch in batches:
        tokens += sum(map(len, processor.encode(batch, num_threads=1)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return {"bytes": total, "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}


def prepared(corpus: Path, out: Path, workers: int, shard_bytes: int, model: Path | None) -> dict[str, Any]:
    """`prepare`, whole; without a model, with everything that it can do."""
    from paralm_data import Execution, MinHashRule, SourceSpec, StepsSpec, TokenizerSpec, prepare

    shutil.rmtree(out, ignore_errors=True)
    spec = TokenizerSpec(model=model) if model else TokenizerSpec(vocab_size=1024, sample_bytes=1_000_000)
    steps = StepsSpec() if model else StepsSpec(normalize="nfc", minhash=MinHashRule(enabled=True))
    stages: dict[str, float] = {}
    workers_peak = [0]

    def look(progress: Progress) -> None:
        # VmHWM, not ru_maxrss: that counts what the process was before it became this program.
        stages[progress.stage] = progress.seconds
        workers_peak.extend(high_water(process.pid) for process in psutil.Process().children())

    began = time.perf_counter()
    made = prepare(
        SourceSpec("jsonl", paths=(str(corpus),)), spec, out, 0.01, steps=steps,
        progress=look,
        execution=Execution("local", workers, shard_bytes=shard_bytes, threads=1),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    stores = (made.train, made.held_out)
    assert made.counts is not None
    return {
        "bytes": sum(store.n_bytes for store in stores),
        "documents": sum(store.n_documents for store in stores),
        "tokens": sum(store.n_tokens for store in stores),
        "near_duplicates": made.counts.near_duplicates,
        "seconds": seconds,
        "cpu_seconds": own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime,
        "stages": stages,
        "driver_peak_rss": high_water(os.getpid()),
        "worker_peak_rss": max(workers_peak),
    }


def high_water(process: int) -> int:
    """The peak RSS of a process in bytes; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def alone(*arguments: Any) -> dict[str, Any]:
    """Run a function above in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--call", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["load"] = os.getloadavg()[0]
    return found


def call(name: str, *arguments: str) -> dict[str, Any]:
    if name == "bare":
        return bare(Path(arguments[0]), Path(arguments[1]))
    corpus, out, workers, shard_bytes, model = arguments
    return prepared(Path(corpus), Path(out), int(workers), int(shard_bytes), Path(model) if model else None)


# -- the questions ---------------------------------------------------------------------------------------------


def speed(folder: Path, megabytes: float, repeats: int) -> dict[str, Any]:
    """Rows of each way, and their medians."""
    from paralm_data import Tokenizer

    corpus, model = folder / "speed.jsonl", folder / "speed.model"
    write(corpus, megabytes)
    Tokenizer.train(texts(3, seed=1), model, VOCAB)
    shard_bytes = corpus.stat().st_size // 8
    ways = {
        "bare": ("bare", corpus, model),
        "one": ("prepared", corpus, folder / "out", 1, shard_bytes, model),
        "two": ("prepared", corpus, folder / "out", 2, shard_bytes, model),
    }
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in list(ways) if repeat % 2 else reversed(ways):
            row = alone(*ways[way])
            rows[way].append(row)
            print(f"{way:5} {row['bytes'] / 1e6 / row['seconds']:6.2f} MB/s  load {row['load']:.1f}", flush=True)
    made = {row["tokens"] for way in ("one", "two") for row in rows[way]}
    assert len(made) == 1, made
    rates = {
        f"{way}_{what}": statistics.median(row["bytes"] / 1e6 / row[what] for row in rows[way])
        for way in rows
        for what in ("seconds", "cpu_seconds")
    }
    return {
        "megabytes": megabytes,
        "mb_per_s": {way: rates[f"{way}_seconds"] for way in rows},
        "mb_per_cpu_second": {way: rates[f"{way}_cpu_seconds"] for way in rows},
        "one_over_bare": rates["one_seconds"] / rates["bare_seconds"],
        "one_over_bare_cpu": rates["one_cpu_seconds"] / rates["bare_cpu_seconds"],
        "two_over_one": rates["two_seconds"] / rates["one_seconds"],
        "rows": rows,
    }


def memory(folder: Path, sizes: list[float]) -> dict[str, Any]:
    """A row a size, and how far apart the peaks are."""
    rows = []
    for size in sizes:
        corpus = folder / "memory.jsonl"
        write(corpus, size)
        row = {"megabytes": size, **alone("prepared", corpus, folder / "out", 2, 16 << 20, "")}
        peaks = f"driver {row['driver_peak_rss'] / 1e6:6.1f} MB  worker {row['worker_peak_rss'] / 1e6:6.1f} MB"
        print(f"{size:6.0f} MB  {peaks}  {row['seconds']:.0f} s  load {row['load']:.1f}", flush=True)
        rows.append(row)
        shutil.rmtree(folder / "out")
        corpus.unlink()
    small, large = rows[0], rows[-1]
    return {
        "rows": rows,
        "driver_growth": large["driver_peak_rss"] / small["driver_peak_rss"] - 1,
        "worker_growth": large["worker_peak_rss"] / small["worker_peak_rss"] - 1,
    }


def main() -> None:
    if sys.argv[1:2] == ["--call"]:
        print(json.dumps(call(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="speed,memory")
    parser.add_argument("--mb", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", type=float, default=2000, help="megabytes of the larger corpus of memory")
    parser.add_argument("--folder", type=Path, help="for corpora and stores; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    from support.timing import environment

    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for part in options.only.split(","):
            row = speed(Path(name), options.mb, options.repeats) if part == "speed" else memory(
                Path(name), [100, options.large]
            )  # fmt: skip
            found[part] = {
                "command": "python " + " ".join(["benchmarks/prepare.py", *sys.argv[1:]]),
                "environment": {**environment("cpu"), "processors": len(os.sched_getaffinity(0))},
                **row,
            }
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    for part in options.only.split(","):
        print(json.dumps({k: v for k, v in found[part].items() if k not in ("rows", "environment")}, indent=1))


if __name__ == "__main__":
    main()
