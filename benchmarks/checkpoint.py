"""How long does saving a checkpoint hold up training, written synchronously and asynchronously?

    .venv/bin/python benchmarks/checkpoint.py

A ParaGRU model of about 100 million parameters on 4 gloo ranks of this machine, with DeepSpeed's ZeRO-1 engine and
AdamW: the very session that `paralm train` runs. Saves take turns, synchronous and asynchronous, each from a barrier;
what counts is the slowest rank's time inside `save`, during which the loop stands still. Steps are timed alone and
beside a write, because the write's thread shares the machine with training. Checkpoints go to a temporary folder
(--folder: on another file system). Writes benchmarks/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "checkpoint.json"
WORDS = [
    "the",
    "of",
    "river",
    "stone",
    "light",
    "walks",
    "under",
    "over",
    "and",
    "then",
    "never",
    "sings",
    "old",
    "seven",
    "bridge",
    "north",
    "cold",
    "wind",
    "letter",
]


def prepare_corpus(folder: Path) -> None:
    """A tokenizer and stores of a few thousand tokens: what the model reads does not matter here."""
    from paralm_data import SourceSpec, TokenizerSpec, prepare

    rng = random.Random(0)
    (folder / "text").mkdir(parents=True)
    for index in range(60):
        text = " ".join(rng.choice(WORDS) for _ in range(300))
        (folder / "text" / f"{index:03d}.txt").write_text(text + "\n")
    source = SourceSpec(kind="text", paths=[str(folder / "text")])
    prepare(source, TokenizerSpec(vocab_size=300), folder / "data", held_out_fraction=0.1)


def configuration(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run's configuration: a large model and few tokens a step."""
    return {
        "run": {"name": "run", "root": str(folder)},
        "data": {"dir": str(folder / "data"), "source": {"kind": "text", "paths": [str(folder / "text")]}},
        "model": {
            "d_model": options.width,
            "n_layers": options.layers,
            "vocab_size": 4096,  # padded: with 1024 × 8 it makes 100 million
            "mixer": {"name": "paragru", "n_heads": 8},
        },
        "training": {"max_steps": 1000, "seq_len": 16, "global_batch_size": options.ranks, "micro_batch_size": 1},
        "parallel": {"zero_stage": 1},
        "checkpoint": {"asynchronous": True, "keep_last": 1},
    }


def run_rank(folder: Path, options: argparse.Namespace) -> None:
    """One rank; rank 0 leaves what was measured in ``measured.json``."""
    import torch
    import torch.distributed as dist

    from paralm.config import Config
    from paralm.training.session import Session

    torch.set_num_threads(1)
    session = Session.open(Config.model_validate(configuration(folder, options)), lambda text: None)

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        session.stepper.run(session.loader.batch(session.step), session.step, 1e-4, lambda: 0, timed=True)
        session.step += 1
        session.loader.step = session.step
        return time.perf_counter() - start

    def save(wait: bool) -> float:
        dist.barrier()
        start = time.perf_counter()
        if not session.save(wait=wait):
            raise SystemExit("a checkpoint could not be written")
        return time.perf_counter() - start

    def drain() -> float:
        """Until the write on its way is finished everywhere; the seconds it took."""
        write = session.saver.write
        if write is None:
            return 0.0
        write.finished.wait()
        if write.problem:
            raise SystemExit(write.problem)
        return write.seconds

    samples: dict[str, list[float]] = {}
    reserved = session.saver.buffer.nbytes if session.saver.buffer else 0
    step()
    for turn in range(-1, options.turns):  # the first turn is not counted
        alone = step()
        synchronous = save(True)
        step()
        asynchronous = save(False)
        beside = step()
        row = {
            "synchronous save": synchronous,
            "asynchronous save": asynchronous,
            "asynchronous write, beside the loop": drain(),
            "step alone": alone,
            "step beside a write": beside,
        }
        slowest = torch.tensor(list(row.values()), dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        for name, seconds in zip(row, slowest.tolist(), strict=True):
            if turn >= 0:
                samples.setdefault(name, []).append(seconds)
        if session.rank == 0:
            print(f"\r\033[Kturn {turn + 2} of {options.turns + 1}", end="", file=sys.stderr, flush=True)
    grown = (session.saver.buffer.nbytes if session.saver.buffer else 0) - reserved
    size = sum(path.stat().st_size for path in (folder / "run" / "checkpoints").glob("step_*/*"))
    if session.rank == 0:
        measured = {
            "samples": samples,
            "parameters": session.parameters,
            "checkpoint_bytes": size,
            "buffer_bytes_per_rank": reserved,
            "buffer_grown_by": grown,
        }
        (folder / "measured.json").write_text(json.dumps(measured))
    dist.barrier()
    session.close()


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Spawn the ranks; what rank 0 left."""
    prepare_corpus(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    flags = [f"--{key}={getattr(options, key)}" for key in ("ranks", "width", "layers", "turns")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, __file__, f"--rank-of={folder}", *flags], env=environment, check=True)
    print("\r\033[K", end="", file=sys.stderr)
    found: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    return found


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what this was measured."""
    import torch

    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "cpu": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": options.ranks,
        "zero_stage": 1,
    }


def report(where: dict[str, Any], measured: dict[str, Any], table: dict[str, dict[str, float]]) -> str:
    """The table and what it comes to."""
    size = measured["checkpoint_bytes"]
    lines = [
        f"{measured['parameters'] / 1e6:.0f} M parameters, {size / 1e9:.2f} GB, {where['ranks']} gloo ranks, "
        f"{where['cores']} cores, {where['cpu']}, torch {where['torch']}",
        f"{'seconds, the slowest rank':<40}{'median':>10}{'min':>10}{'max':>10}",
    ]
    lines += [f"{name:<40}{row['median']:>10.3f}{row['min']:>10.3f}{row['max']:>10.3f}" for name, row in table.items()]
    ratio = table["asynchronous save"]["median"] / table["synchronous save"]["median"]
    speed = size / table["synchronous save"]["median"] / 1e6
    lines.append(
        f"an asynchronous save stalls the loop for {ratio:.1%} of a synchronous one's time; synchronous: {speed:.0f} "
        f"MB/s, SHA-256 and fsync included; kept buffer: {measured['buffer_bytes_per_rank'] / 1e6:.0f} MB a rank"
    )
    return "\n".join(lines)


def main() -> None:
    """Measures (as the parent of the ranks), or is one of the ranks (``--rank-of``)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; default: the temporary folder")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.rank_of:
        run_rank(options.rank_of, options)
        return
    where = describe(options)
    with tempfile.TemporaryDirectory(prefix="paralm-checkpoint-", dir=options.folder) as folder:
        measured = measure(Path(folder), options)
    table = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in measured["samples"].items()
    }
    print(report(where, measured, table))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**where, "seconds": table, **measured}, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
