"""Which architectures track a state, and how far past the lengths they were trained on?

    .venv/bin/python benchmarks/tracking.py [--tasks parity,cycle,arithmetic,a5] [--mixers paragru,…] [--seeds 0,1,2]
    .venv/bin/python benchmarks/tracking.py --collect [--root runs]     no training: whatever runs are there

Trains configs/tracking/TASK_MIXER.yaml for every task, mixer and seed (`paralm run`; a run that is there goes on or is
kept), each of which evaluates itself (`paralm eval tracking`). Then every run of a task is read, none left out: a row a
run goes to benchmarks/results/tracking.json, the curves to docs/tracking_TASK.png, and beside the published one-layer
table (arXiv 2510.21450) stand the answers right inside the trained lengths and on 40 to 256 tokens, the best and the
worst seed. A cell of the published table is one number; what lengths it was trained and tested on, and how many seeds
it is of, is not known to us, so the two are not the same measurement.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from support.timing import ROOT, environment

from paralm import resources
from paralm.evaluation.compare_tracking import compare_tracking
from paralm.evaluation.result import read_json
from paralm.evaluation.tracking import TrackingResult
from paralm.training.load import saved_config
from paralm.training.metrics import read_metrics

RESULT = ROOT / "benchmarks" / "results" / "tracking.json"
DOCS = ROOT / "docs"
TASKS = ("parity", "cycle", "arithmetic", "brackets", "s3", "a5", "s5", "mqar")
# One layer, per cent (arXiv 2510.21450).
PUBLISHED = {
    "cycle": {"paralstm": 95, "paragru": 90, "mamba2": 57, "lstm": 100},
    "arithmetic": {"paralstm": 94, "paragru": 63, "mamba2": 44, "lstm": 100},
    "a5": {"paralstm": 38, "paragru": 40, "mamba2": 36, "lstm": 100},
}


def configured(tasks: list[str], mixers: list[str] | None) -> list[tuple[str, str]]:
    """(task, mixer) of every configuration that is asked for."""
    names = [name.removeprefix("tracking/") for name in resources.presets() if name.startswith("tracking/")]
    pairs = [(t, m) for name in names if "/" not in name for t, _, m in (name.partition("_"),) if m]
    return [(t, m) for t, m in pairs if t in tasks and (mixers is None or m in mixers)]


def run_name(task: str, mixer: str, seed: int) -> str:
    """Of a run; seed 0 is the configuration's own."""
    return f"tracking-{task}-{mixer}" + (f"-s{seed}" if seed else "")


def train(task: str, mixer: str, seed: int, root: Path) -> None:
    """One run, to its end."""
    command = [sys.executable, "-m", "paralm_launch", "run", f"tracking/{task}_{mixer}", f"run.root={root}"]
    subprocess.run([*command, f"run.name={run_name(task, mixer, seed)}", f"run.seed={seed}"], check=True)


def found_runs(task: str, root: Path) -> list[Path]:
    """Every measured run of a task, by mixer and seed."""
    folders = sorted(root.glob(f"tracking-{task}-*"))
    return [folder for folder in folders if (folder / "eval" / "tracking.json").is_file()]


def row(task: str, folder: Path) -> dict[str, Any]:
    """What a run was, and what it reached."""
    result = read_json(TrackingResult, folder / "eval" / "tracking.json")
    assert result is not None
    config = saved_config(folder)
    losses = [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    return {
        "task": task,
        "run": folder.name,
        "mixer": folder.name.removeprefix(f"tracking-{task}-").split("-s")[0],
        "seed": config.run.seed,
        "steps": result.step,
        "of_steps": config.training.max_steps,
        "d_model": config.model.d_model,
        "layers": config.model.n_layers,
        "batch": config.training.global_batch_size,
        "lr": config.optimizer.lr,
        "last_train_loss": sum(losses[-5:]) / len(losses[-5:]),
        "solved": result.solved,
        "result": result.model_dump(mode="json"),
    }


def at(found: dict[str, Any], size: str) -> float:
    """Answers right at a size, NaN where it was not tested."""
    return next((s["accuracy"] for s in found["result"]["sizes"] if s["size"] == size), float("nan"))


def show(rows: list[dict[str, Any]]) -> None:
    """A line a task and mixer: the best and the worst of its seeds, and the published number."""
    print(f"{'task':12} {'mixer':12} {'seeds':>5} {'to 40':>13} {'40-256':>13} {'99 % to':>11}  published")
    for task in TASKS:
        for mixer in dict.fromkeys(r["mixer"] for r in rows if r["task"] == task):
            mine = [r for r in rows if (r["task"], r["mixer"]) == (task, mixer)]
            cells = []
            for size in ("40", "40-256"):
                values = sorted(at(r, size) for r in mine)
                cells.append(f"{values[0]:6.1%} {values[-1]:6.1%}")
            reach = sorted(r["solved"] for r in mine)
            known = PUBLISHED.get(task, {}).get(mixer)
            print(f"{task:12} {mixer:12} {len(mine):5} {cells[0]:>13} {cells[1]:>13} {reach[0]:5} {reach[-1]:5}  "
                  f"{f'{known} %' if known else ''}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="parity,cycle,arithmetic,a5")
    parser.add_argument("--mixers", help="default: every one that has a configuration")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    tasks = options.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"no task '{unknown[0]}'; there is {', '.join(TASKS)}")
    if not options.collect:
        for task, mixer in configured(tasks, options.mixers.split(",") if options.mixers else None):
            for seed in map(int, options.seeds.split(",")):
                train(task, mixer, seed, options.root)
    rows: list[dict[str, Any]] = []
    for task in tasks:
        folders = found_runs(task, options.root)
        rows += [row(task, folder) for folder in folders]
        if len(folders) > 1:
            DOCS.mkdir(exist_ok=True)
            print(f"figure: {compare_tracking(folders, DOCS / f'tracking_{task}.png').figure}")
    show(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment("cpu"), "published_percent": PUBLISHED, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
