"""Does a Mamba2 whose state is large for its training length collapse past it, and what helps?

    paralm train collapse/mamba2        (then mamba2_plain, mamba2_carried, mamba2_noise, mamba2_passed, which go on)
    paralm eval collapse runs/collapse-mamba2 streams=8 length=4096 'mitigations=["decay=0.996","clip=20","window=256"]'
    paralm eval collapse runs/collapse-mamba2-plain streams=8 length=4096 'texts=[]'          (and the others)
    .venv/bin/python benchmarks/collapse.py

Puts side by side what `paralm eval collapse` found in each run (eval/collapse.json), measures nothing itself. Training
on changes the weights whatever the rows start from, so what it is set against is the control, ``plain``: as many more
steps from zeros. `against_plain` is the difference on the same streams. Writes benchmarks/results/collapse.json and
docs/collapse.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from support.timing import ROOT, environment

from paralm.evaluation import figures
from paralm.evaluation.bootstrap import ratio_intervals
from paralm.evaluation.cells import load_record
from paralm.evaluation.collapse_result import CollapseResult, Reading
from paralm.evaluation.markdown import table
from paralm.evaluation.result import eval_dir, read_json
from paralm.training.load import saved_config
from paralm.training.metrics import read_metrics

RESULT = ROOT / "benchmarks" / "results" / "collapse.json"
FIGURE = ROOT / "docs" / "collapse.png"
TRAINED = {
    "": "as trained",
    "-plain": "60 plain steps",
    "-carried": "carried state",
    "-noise": "noise as state",
    "-passed": "passed state",
}
CONTROL = "-plain"
RUNS = [f"runs/collapse-mamba2{tail}" for tail in TRAINED]


def row(run: Path, label: str, result: CollapseResult, reading: Reading) -> dict[str, Any]:
    """What the table and the JSON say of one reading."""
    at = result.edges.index(result.train_seq_len or 0)
    mean, verdict = reading.mean(), reading.verdict
    return {
        "run": run.name,
        "what": label,
        "verdict": verdict.verdict,
        "sentence": verdict.sentence,
        "by_the_loss_alone": reading.loss_verdict.sentence,
        "onset": None if verdict.onset is None else int(verdict.onset),
        "onset_interval": [min(end, float(result.length)) for end in verdict.onset_interval or ()],
        "rise_at_the_end": verdict.rise[-1],
        "rise_at_the_end_se": verdict.rise_se[-1],
        "loss_within": float(mean[at - 2 : at].mean()),
        "loss_past": float(mean[-2:].mean()),
        "loss_past_read_afresh": float(np.asarray(result.afresh).mean(axis=0)[-2:].mean()),
        "heads_left": len({(d.layer, d.leaf, d.head) for d in reading.departures}),
        "heads": reading.heads,
        "rise": verdict.rise,
        "rise_se": verdict.rise_se,
    }


def end_rises(result: CollapseResult, reading: Reading) -> np.ndarray:
    """(streams,) rise in the last bucket, of which the verdict's is the mean."""
    curves = np.asarray(reading.loss) - np.asarray(result.afresh)
    rises: np.ndarray = curves[:, -1] - curves[:, reading.verdict.reference]
    return rises


def against(result: CollapseResult, control: CollapseResult) -> dict[str, Any]:
    """How a run trained on differs from the control on the same streams, the model as it is: differences of the rise
    at the end and of the loss past 2,048 tokens, nats a token, with 95 % intervals over streams."""
    if (result.edges, result.streams, result.set) != (control.edges, control.streams, control.set):
        sys.exit("the control was read on other streams; give both the same streams, length and set")
    found: dict[str, Any] = {}
    for name, mine, theirs in (
        ("rise_at_the_end", end_rises(result, result.plain), end_rises(control, control.plain)),
        ("loss_past", *(np.asarray(r.plain.loss)[:, -2:].mean(axis=1) for r in (result, control))),
    ):
        (interval,) = ratio_intervals(mine - theirs, [np.ones(len(mine))])
        found |= {name: float((mine - theirs).mean()), f"{name}_interval": interval}
    return found


def facts(run: Path, result: CollapseResult) -> dict[str, Any]:
    """Of a run: what it was trained on, and how it was read."""
    config, record = saved_config(run), load_record(eval_dir(run) / "collapse.cells")
    rows = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    return {
        "commit": json.loads((run / "environment.json").read_text())["git_commit"],
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "last_loss": rows[-1]["loss"],
        "train_seq_len": config.training.seq_len,
        "carry_state": config.training.carry_state,
        "initial_state": config.training.initial_state,
        "edges": result.edges,
        "streams": result.streams,
        "seconds": record.seconds if record else None,
    }


def draw(found: list[tuple[str, str, CollapseResult, Reading]], out: Path) -> None:
    """Rises by position: mitigations of the first run, and training with other states."""
    figure, (left, right) = figures.row(2)
    first = found[0][2]
    middle = np.sqrt(np.maximum(1, first.edges[:-1]) * np.asarray(first.edges[1:], dtype=float))
    for axes, title, chosen in (
        (left, "without training", [f for f in found if f[0] == found[0][0]]),
        (right, "trained on from there", [f for f in found if not f[3].mitigation]),
    ):
        for index, (_, label, _, reading) in enumerate(chosen):
            rise, error = np.asarray(reading.verdict.rise), np.asarray(reading.verdict.rise_se)
            color = figures.CYCLE[index]
            axes.plot(middle, rise, marker=".", color=color, label=f"{label}: {reading.verdict.verdict}")
            axes.fill_between(middle, rise - error, rise + error, color=color, alpha=0.15, linewidth=0)
        figures.style(axes, "position (tokens)", "rise against reading afresh (nats)")
        axes.set_xscale("log", base=2)
        figures.short_axis(axes)
        figures.mark(axes, first.train_seq_len or 0, "training length")
        axes.axhline(0, color=figures.GREY, linewidth=0.8)
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    figures.save(figure, out)


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=RUNS, help="run folders, the one as trained first")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    given = parser.parse_args()
    results: dict[Path, CollapseResult] = {}
    for run in map(Path, given.runs):
        result = read_json(CollapseResult, eval_dir(run) / "collapse.json")
        if result is None:
            sys.exit(f"{eval_dir(run) / 'collapse.json'}: missing; paralm eval collapse {run}")
        results[run] = result
    first = next(iter(results)).name
    found = [
        (run.name, reading.mitigation or TRAINED.get(run.name.removeprefix(first), run.name), result, reading)
        for run, result in results.items()
        for reading in result.readings
    ]
    rows = [row(Path(run), label, result, reading) for run, label, result, reading in found]
    shown = ("what", "verdict", "onset", "rise_at_the_end", "loss_within", "loss_past", "loss_past_read_afresh")
    cells = [[f"{r[k]:.3f}" if isinstance(r[k], float) else str(r[k] or "–") for k in shown] for r in rows]
    print(table([key.replace("_", " ") for key in shown], cells, right=range(2, 7)))
    control = next((result for run, result in results.items() if run.name == first + CONTROL), None)
    others = [run for run in results if run.name not in (first, first + CONTROL)] if control is not None else []
    compared = {run.name: against(results[run], control) for run in others if control is not None}
    for name, difference in compared.items():
        low, high = difference["rise_at_the_end_interval"]
        print(f"{name} against plain: rise {difference['rise_at_the_end']:+.3f} ({low:+.3f} to {high:+.3f})")
    content = {
        "environment": environment("cpu"),
        "runs": {run.name: facts(run, result) for run, result in results.items()},
        "against_plain": compared,
        "readings": rows,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    draw(found, given.figure)


if __name__ == "__main__":
    main()
