"""Does a GPU hold and take what `paralm plan` says, up to 7B parameters and a million tokens?

    .venv/bin/python benchmarks/gpu_plan.py [--only middle|large|long] [--presets paragru_7b ...]

Real training steps of model presets on this machine's GPU (bf16, one rank), beside the plan for one GPU of that kind:
the allocator's peak, the median of a step's seconds, tokens a second, MFU, and the loss of the first and of the last
step.

middle  400M and 1.3B, ZeRO 1, with and without activation checkpointing, 4 × 2,048 tokens twice a step
large   7B, 20 steps of 16 × 2,048 tokens. ZeRO-Offload: weights and gradients on the GPU, Adam and its fp32 weights in
        the host's memory. Where the plan says that the GPU or the host does not hold it, the model keeps its width and
        has fewer layers, and its row says how many. A loss that does not go down is a failure.
long    one sequence of 1,048,576 tokens through ParaGRU 130M, layers left out in the same way

Writes benchmarks/results/plan_DEVICE.json (or that file under $OUT) after every row.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
from support import timing  # noqa: E402

VOCABULARY = 32000
MIXERS = ("paragru", "paralstm", "mamba2", "xlstm", "titans_mag", "transformer")


@dataclass(frozen=True)
class Case:
    """Steps of a preset: ``micro`` rows at once, ``accumulate`` times a step."""

    kind: str
    preset: str
    length: int
    micro: int
    accumulate: int
    checkpointing: bool
    steps: int
    offload: bool = False
    shrinks: bool = False
    """Whether layers are left out until the plan fits."""

    def configuration(self, **more: Any) -> Any:
        from paralm.config_files import load_config

        values = {
            "training.precision": "bf16",
            "training.seq_len": self.length,
            "training.micro_batch_size": self.micro,
            "training.global_batch_size": self.micro * self.accumulate,
            "training.activation_checkpointing": str(self.checkpointing).lower(),
            "parallel.zero_stage": 2 if self.offload else 1,
            "parallel.offload_optimizer": "cpu" if self.offload else "none",
            **more,
        }
        return load_config(f"model/{self.preset}", [f"{key}={value}" for key, value in values.items()]).config


def cases(options: argparse.Namespace) -> list[Case]:
    found = []
    for size in ("400m", "1.3b"):
        for name in MIXERS:
            found += [Case("middle", f"{name}_{size}", 2048, 4, 2, again, 5) for again in (False, True)]
    found += [Case("large", f"{name}_7b", 2048, 1, 16, True, 18, offload=True, shrinks=True) for name in MIXERS]
    found.append(Case("long", "paragru_130m", 1 << 20, 1, 1, True, 2, shrinks=True))
    found = [case for case in found if case.kind in options.only]
    known = sorted({case.preset for case in found})
    for name in options.presets or ():
        if name not in known:
            sys.exit(f"benchmarks/gpu_plan.py: --presets: no '{name}' among {', '.join(known)}")
    return [case for case in found if not options.presets or case.preset in options.presets]


def planned(case: Case, device: Any, host: float) -> tuple[Any, Any, int]:
    """The configuration, its plan, and how many layers were left out for it to fit a GPU, and ``host`` bytes."""
    from paralm.planning import Planner, cost

    def at(layers: int | None) -> tuple[Any, Any]:
        config = case.configuration(**({} if layers is None else {"model.n_layers": layers}))
        return config, Planner(config, VOCABULARY, device, 1, cost.EFFICIENCY).plan()

    config, plan = at(None)
    whole = fewest = config.model.n_layers
    if not case.shrinks or (plan.fits and plan.memory.host <= host):
        return config, plan, 0
    low = 0  # layers that are known to fit, and the fewest that do not
    while fewest - low > 1:
        middle = (low + fewest) // 2
        tried = at(middle)
        if tried[1].fits and tried[1].memory.host <= host:
            low, (config, plan) = middle, tried
        else:
            fewest = middle
    if not low:
        raise RuntimeError(f"{case.preset}: not even one layer fits {device.name} with {host / 1e9:.0f} GB of the host")
    return config, plan, whole - low


def measured(case: Case, device: Any, host: float) -> dict[str, Any]:
    """A row."""
    from support.steps import take

    config, plan, left_out = planned(case, device, host)
    found = take(config, VOCABULARY, case.steps)
    rate = plan.tokens_per_step / found["seconds"]
    row = {
        "kind": case.kind,
        "preset": case.preset,
        "layers": config.model.n_layers,
        "left_out": left_out,
        "checkpointing": case.checkpointing,
        "offload": case.offload,
        "shape": [case.accumulate, case.micro, case.length],
        "planned": {
            "bytes": plan.memory.peak.total,
            "moment": plan.memory.peak.name,
            "host": plan.memory.host,
            "seconds": plan.time.step,
        },
        "measured": found,
        "tokens_per_s": rate,
        "mfu": rate * plan.flops_per_token / plan.device.bf16,
    }
    if case.kind == "large":
        row["learns"] = found["losses"][-1] < found["losses"][0] - 0.5
    return row


def line(row: dict[str, Any]) -> str:
    plan, found, losses = row["planned"], row["measured"], row["measured"]["losses"]
    held = found["bytes"] or float("nan")
    left = f" −{row['left_out']}" if row["left_out"] else ""
    return (
        f"{row['preset']:16} {row['layers']:3}{left:4} {row['checkpointing']!s:5} {plan['bytes'] / 1e9:6.2f} "
        f"{held / 1e9:6.2f} GB {plan['bytes'] / held:5.2f}  {plan['seconds']:6.3f} {found['seconds']:6.3f} s "
        f"{plan['seconds'] / found['seconds']:5.2f}  {row['tokens_per_s']:9,.0f} {row['mfu']:5.1%}  "
        f"{losses[0]:.2f} → {losses[-1]:.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["middle", "large", "long"], default=["middle", "large", "long"])
    parser.add_argument("--presets", nargs="+", help="of the chosen kinds, only these")
    parser.add_argument("--device", help="the plan's name of this machine's GPU; default: by its own name")
    parser.add_argument("--out", type=Path)
    timing.add_minutes(parser)
    options = parser.parse_args()
    budget = timing.Budget(options.minutes)
    import psutil
    import torch

    from paralm.planning import DEVICES, device_of

    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_plan.py: needs a GPU; on a CPU tests/paralm/test_planning_memory.py compares")
    name = torch.cuda.get_device_name()
    options.device = options.device or next((key for key in DEVICES if key in re.findall(r"\w+", name.lower())), None)
    if options.device is None:
        sys.exit(
            f"benchmarks/gpu_plan.py: '{name}' is not known; say what it is planned as: --device {'|'.join(DEVICES)}"
        )
    out = options.out or timing.results() / f"plan_{name.replace(' ', '_')}.json"
    record: dict[str, Any] = {"command": " ".join(["python", "benchmarks/gpu_plan.py", *sys.argv[1:]])}
    record |= {"commit": timing.commit(), "device": name, "torch": torch.__version__, "rows": []}
    print("model        layers again planned   held    ratio planned   took   ratio  tokens/s   MFU  loss")
    failed = False
    for case in cases(options):
        try:
            if budget.over:
                raise TimeoutError(timing.NOT_MEASURED)
            row = measured(case, device_of(options.device), 0.9 * psutil.virtual_memory().total)
            failed |= not row.get("learns", True)
            print(line(row), flush=True)
        except Exception as error:  # the other models are still asked
            traceback.print_exc()
            failed, row = True, {"kind": case.kind, "preset": case.preset, "checkpointing": case.checkpointing}
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        record["rows"].append(row)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
