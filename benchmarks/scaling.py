"""How do tokens per second and communication change with ranks and ZeRO stages?

    make bench                            (or)  .venv/bin/python benchmarks/scaling.py

A ParaGRU model of 10 million parameters, one fixed global batch, 1 to 4 gloo ranks of this machine, ZeRO 0 to 3, one
thread a rank. Communication is counted, not estimated: every collective that a rank issues in a step, by kind, with
the bytes of the tensor it works on (the larger of what goes in and what comes out). Ranks share this machine's cores,
so tokens per second say what a stage costs beside another, not how training scales over machines. Steps are medians.
Writes benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
VOCABULARY = 4096


def configuration(stage: int, options: argparse.Namespace) -> dict[str, Any]:
    """The model and the shape of a step."""
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return {
        "model": {"d_model": options.width, "n_layers": options.layers, "mixer": {"name": "paragru"}},
        "training": {
            "global_batch_size": options.rows,
            "micro_batch_size": options.rows,
            "seq_len": options.length,
        },
        "parallel": {"zero_stage": stage, "deepspeed": raw},
        "optimizer": {"name": options.optimizer},
    }


def counter() -> Any:
    """A mode that counts the collectives issued inside it: {kind: [calls, bytes]}."""
    import torch
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, list[int]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                sizes = [
                    sum(t.numel() * t.element_size() for t in pytree.tree_leaves(arg) if torch.is_tensor(t))
                    for arg in args
                ]
                entry = self.found.setdefault(func._schema.name.removeprefix("c10d::").strip("_"), [0, 0])
                entry[0] += 1
                entry[1] += max(sizes, default=0)
            return func(*args, **(kwargs or {}))

    return Counter()


def worker(options: argparse.Namespace) -> None:
    """One rank: all stages, one after the other; rank 0 prints a line of JSON for each."""
    import torch

    sys.path.insert(0, str(ROOT / "tools"))
    import synthetic

    from paralm.config import Config

    torch.set_num_threads(1)
    for stage in (0, 1, 2, 3):
        stepper = synthetic.stepper(Config.model_validate(configuration(stage, options)), VOCABULARY)
        seconds, loss, counted = [], 0.0, counter()
        for step in range(options.steps + 3):
            batch = synthetic.batch(step, options.rows, options.length, VOCABULARY)
            torch.distributed.barrier()
            start = time.perf_counter()
            if step == 2:
                with counted:
                    loss = stepper.run(batch, step, 1e-3, lambda: 0, timed=False).loss
            else:
                loss = stepper.run(batch, step, 1e-3, lambda: 0, timed=False).loss
            torch.distributed.barrier()
            if step > 2:
                seconds.append(time.perf_counter() - start)
        if torch.distributed.get_rank() == 0:
            row = {"ranks": torch.distributed.get_world_size(), "stage": stage, "loss": loss}
            print("ROW " + json.dumps({**row, "seconds": seconds, "collectives": counted.found}), flush=True)
        stepper.engine.destroy()


def measure(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one world size."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(Path(__file__).resolve()), "--worker"]
    for key in ("width", "layers", "rows", "length", "steps", "optimizer"):
        command += [f"--{key}", str(getattr(options, key))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{ranks} ranks: {done.stderr[-2000:]}")
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rows", type=int, default=12, help="sequences a step, over all ranks")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    rows = [row for ranks in options.ranks for row in measure(ranks, options)]
    tokens = options.rows * options.length
    base = tokens / statistics.median(rows[0]["seconds"])
    print(f"{'ranks':>5} {'ZeRO':>4} {'tokens/s':>9} {'of first':>8} {'MB/step':>8}  collectives of a step: calls, MB")
    for row in rows:
        row["tokens_per_s"] = tokens / statistics.median(row["seconds"])
        row["megabytes_per_step"] = sum(size for _, size in row["collectives"].values()) / 1e6
        kinds = ", ".join(f"{kind} {n}×, {size / 1e6:.1f}" for kind, (n, size) in sorted(row["collectives"].items()))
        print(
            f"{row['ranks']:5} {row['stage']:4} {row['tokens_per_s']:9.0f} {row['tokens_per_s'] / base:8.2f} "
            f"{row['megabytes_per_step']:8.1f}  {kinds}"
        )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    record = {
        "command": " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "shape": {key: getattr(options, key) for key in ("width", "layers", "rows", "length", "optimizer")},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
