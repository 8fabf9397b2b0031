"""The first losses of every 10M preset on synthetic tokens: what was not meant to change training has not changed it.

    .venv/bin/python tools/golden_losses.py            compare with tests/golden_losses.json
    .venv/bin/python tools/golden_losses.py --write    after a change that is meant to

Each preset takes STEPS steps of the default optimizer, with its real engine, on one thread. Sums in another order (an
other processor, another version of torch) move the losses by about 1e-6; TOLERANCE leaves room for that.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml

from paralm import resources
from paralm.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parent))
import synthetic  # beside this file

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden_losses.json"
STEPS, ROWS, LENGTH, VOCABULARY = 5, 2, 64, 4096
TOLERANCE = 1e-4  # relative


def presets() -> list[str]:
    """The 10M model presets."""
    return [name for name in resources.presets() if name.startswith("model/") and name.endswith("_10m")]


def losses(preset: str) -> list[float]:
    """The losses of the first STEPS steps."""
    model = yaml.safe_load(resources.presets()[preset].read_text(encoding="utf-8"))["model"]
    training = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "seq_len": LENGTH}
    config = Config.model_validate({"model": model, "training": training, "optimizer": {"lr": 1e-3}})
    torch.set_num_threads(1)
    made = synthetic.stepper(config, VOCABULARY)
    found = []
    for step in range(STEPS):
        batch = synthetic.batch(step, ROWS, LENGTH, VOCABULARY)
        found.append(made.run(batch, step, 1e-3, lambda: 0, timed=False).loss)
    made.engine.destroy()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the file anew")
    write = parser.parse_args().write
    measured = {preset: losses(preset) for preset in presets()}
    if write:
        record = {
            "command": "python tools/golden_losses.py --write",
            "torch": torch.__version__,
            "losses": measured,
        }
        GOLDEN.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return 0
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"]
    worst = 0
    for preset in sorted(set(golden) | set(measured)):
        pairs = list(zip(golden.get(preset, []), measured.get(preset, [])))
        off = max((abs(a - b) / a for a, b in pairs), default=float("inf"))
        worst |= off > TOLERANCE
        print(f"{preset:24} largest relative difference {off:.1e}{'  <- differs' if off > TOLERANCE else ''}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
