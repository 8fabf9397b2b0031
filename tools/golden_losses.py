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

import numpy as np
import torch
import yaml
from paralm_data import Batch

from paralm import resources
from paralm.config import Config
from paralm.models import build_model
from paralm.models.parameters import initial_value, specs
from paralm.training.engine import build_engine
from paralm.training.fragments import EngineFragments
from paralm.training.rendezvous import device, start_distributed
from paralm.training.step import Stepper

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden_losses.json"
STEPS, ROWS, LENGTH, VOCABULARY = 5, 2, 64, 4096
TOLERANCE = 1e-4  # relative


def presets() -> list[str]:
    """The 10M model presets."""
    return [name for name in resources.presets() if name.startswith("model/") and name.endswith("_10m")]


def synthetic(step: int) -> Batch:
    """Tokens with structure to learn: each is a fixed function of the one before, but for one in four."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    keep = torch.rand((ROWS, LENGTH + 1), generator=generator) < 0.75
    for t in range(1, LENGTH + 1):
        tokens[:, t] = torch.where(keep[:, t], (tokens[:, t - 1] * 7 + 3) % 64, tokens[:, t])
    reset = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    reset[0, LENGTH // 3] = True
    fresh = torch.zeros(ROWS, dtype=torch.bool)
    return Batch(step, np.arange(ROWS), tokens[:, :-1], tokens[:, 1:], reset, continues=fresh, epoch=0.0)


def losses(preset: str) -> list[float]:
    """The losses of the first STEPS steps."""
    model = yaml.safe_load(resources.presets()[preset].read_text(encoding="utf-8"))["model"]
    training = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "seq_len": LENGTH}
    config = Config.model_validate({"model": model, "training": training, "optimizer": {"lr": 1e-3}})
    torch.set_num_threads(1)
    start_distributed(60.0)
    engine, optimizer = build_engine(config, VOCABULARY, 1)
    fragments = EngineFragments(engine, 0, 1)
    known = {name: (tuple(p.shape), spec) for name, p, spec in specs(build_model(config.model, VOCABULARY, 0, "meta"))}

    def read(kind: str, name: str, offset: int, numel: int) -> torch.Tensor:
        shape, spec = known[name]
        return initial_value(name, shape, spec, seed=0).view(-1)[offset : offset + numel]

    fragments.load(read, lambda name: (), {})
    optimizer.bind(fragments, {name: shape for name, (shape, _) in known.items()}, device())
    stepper = Stepper(engine, optimizer, config, device(), 0, 1)
    found = [stepper.run(synthetic(step), step, 1e-3, lambda: 0, timed=False).loss for step in range(STEPS)]
    engine.destroy()
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
