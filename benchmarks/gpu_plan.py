"""Does a GPU hold and take what `paralm plan` says?

    .venv/bin/python benchmarks/gpu_plan.py --presets paragru_400m paragru_1.3b mamba2_1.3b

Real training steps of model presets on this machine's GPU (ZeRO 1, one rank, bf16), beside the plan for one GPU of that
kind: the allocator's peak, and the median of a step's seconds. Writes benchmarks/results/plan_DEVICE.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 32000


def configuration(preset: str, options: argparse.Namespace, again: bool) -> Any:
    """A run of a preset, in the shape of a step that is asked for."""
    from paralm.config_files import load_config

    rows = options.micro * options.accumulate
    values = {
        "training.precision": "bf16",
        "training.seq_len": options.length,
        "training.micro_batch_size": options.micro,
        "training.global_batch_size": rows,
        "training.activation_checkpointing": str(again).lower(),
        "parallel.zero_stage": options.stage,
    }
    return load_config(f"model/{preset}", [f"{key}={value}" for key, value in values.items()]).config


def measure(config: Any, steps: int) -> dict[str, Any]:
    """The allocator's peak from the second step on, and seconds of steps."""
    import synthetic
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    stepper = synthetic.stepper(config, VOCABULARY)
    seconds, training = [], config.training
    for step in range(steps + 2):
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        batch = synthetic.batch(step, training.global_batch_size, training.seq_len, 4096)
        start = time.perf_counter()
        stepper.run(batch, step, 1e-4, lambda: 0, timed=True)
        torch.cuda.synchronize()
        if step > 1:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before
    stepper.engine.destroy()
    return {"bytes": peak, "seconds": statistics.median(seconds), "samples": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--presets", nargs="+", default=["paragru_400m", "mamba2_400m", "xlstm_400m", "transformer_400m"]
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpointing", choices=["off", "on", "both"], default="both")
    parser.add_argument("--device", help="the plan's name of this machine's GPU; default: by its own name")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch

    sys.path.insert(0, str(ROOT / "tools"))
    from paralm.planning import DEVICES, Planner, device_of

    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_plan.py: needs a GPU; on a CPU tests/paralm/test_planning_memory.py compares")
    name = torch.cuda.get_device_name()
    options.device = options.device or next((key for key in DEVICES if key in re.findall(r"\w+", name.lower())), None)
    if options.device is None:
        sys.exit(
            f"benchmarks/gpu_plan.py: '{name}' is not known; say what it is planned as: --device {'|'.join(DEVICES)}"
        )
    rows = []
    held, took = f"{'planned':>9} {'held':>9} {'ratio':>5}", f"{'planned':>8} {'took':>8} {'ratio':>5}"
    print(f"{'model':18} {'again':5} {held}   {took} {'MFU':>5}")
    for preset in options.presets:
        for again in {"off": [False], "on": [True], "both": [False, True]}[options.checkpointing]:
            config = configuration(preset, options, again)
            plan = Planner(config, VOCABULARY, device_of(options.device), 1, 0.8).plan()
            found = measure(config, options.steps)
            planned = {"bytes": plan.memory.peak.total, "moment": plan.memory.peak.name, "seconds": plan.time.step}
            mfu = plan.flops_per_token * plan.tokens_per_step / (found["seconds"] * plan.device.bf16)
            rows.append({"preset": preset, "checkpointing": again, "planned": planned, "measured": found, "mfu": mfu})
            print(
                f"{preset:18} {again!s:5} {planned['bytes'] / 1e9:6.2f} GB {found['bytes'] / 1e9:6.2f} GB "
                f"{planned['bytes'] / found['bytes']:5.2f}   {planned['seconds']:6.3f} s {found['seconds']:6.3f} s "
                f"{planned['seconds'] / found['seconds']:5.2f} {mfu:5.1%}",
                flush=True,
            )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    out = options.out or ROOT / "benchmarks" / "results" / f"plan_{name.replace(' ', '_')}.json"
    shape = {key: getattr(options, key) for key in ("length", "micro", "accumulate", "stage", "steps")}
    record = {"command": " ".join(["python", "benchmarks/gpu_plan.py", *sys.argv[1:]]), "commit": commit.stdout.strip()}
    record |= {"device": name, "torch": torch.__version__, "shape": shape, "rows": rows}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
