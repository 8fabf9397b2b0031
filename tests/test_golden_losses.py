"""Training's first losses are what they were: see tools/golden_losses.py, which makes the file and compares."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

_PATH = Path(__file__).resolve().parent.parent / "tools" / "golden_losses.py"
_SPEC = importlib.util.spec_from_file_location("golden_losses", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
golden_losses = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden_losses)

RECORDED = json.loads(golden_losses.GOLDEN.read_text(encoding="utf-8"))["losses"]


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 50, 512), (2, 700, 7)])
def test_the_text_is_that_of_a_loop_over_time(shape: tuple[int, int, int]) -> None:
    rows, length, vocabulary = shape
    draws = torch.Generator().manual_seed(4)
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=draws)
    follows = torch.rand((rows, length + 1), generator=draws) < 0.75
    for t in range(1, length + 1):
        tokens[:, t] = torch.where(follows[:, t], (tokens[:, t - 1] * 7 + 3) % 64, tokens[:, t])
    assert torch.equal(golden_losses.synthetic.text(4, *shape), tokens)


def test_every_10m_preset_has_its_losses() -> None:
    assert sorted(RECORDED) == sorted(golden_losses.presets())
    assert all(len(losses) == golden_losses.STEPS for losses in RECORDED.values())


@pytest.mark.parametrize("preset", golden_losses.presets())
def test_losses_are_what_they_were(preset: str) -> None:
    assert golden_losses.losses(preset) == pytest.approx(RECORDED[preset], rel=golden_losses.TOLERANCE)
