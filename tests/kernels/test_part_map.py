"""A part of a recurrence as one map: what ranks that share a sequence tell each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paralm_kernels import Cell, ParaGRU, affine, time_shards_solve
from paralm_kernels.affine import AffineMap
from paralm_kernels.laws import random_case

from .part_maps import assert_part_map


@pytest.mark.parametrize("numbers", [1, 40, 1 << 16], ids=["a step", "a few steps", "all steps"])
@pytest.mark.parametrize("resets", [0.0, 0.05])
def test_a_part_s_map_is_the_plain_loop_s(
    cell: Cell, numbers: int, resets: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_shards_solve, "_NUMBERS", numbers)
    for time, weights in ((1, 1.0), (2, 0.5), (23, 1.5)):
        case = random_case(cell, batch=2, time=time, channel=3, weights=weights, resets=resets, seed=time)
        assert_part_map(case, "sequential")


def test_what_cannot_be_seen_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reset in every row nothing of the state before is left, and its Jacobians are not taken."""
    monkeypatch.setattr(time_shards_solve, "_NUMBERS", 6)
    case = random_case(ParaGRU(), batch=1, time=200, channel=3, resets=0.0)
    reset = torch.zeros(1, 200, dtype=torch.bool)
    reset[:, 7] = True
    seen = []
    original = affine.whole
    monkeypatch.setattr(time_shards_solve, "whole", lambda maps: seen.append(maps.length) or original(maps))
    assert_part_map(replace(case, reset=reset), "sequential")
    assert sum(seen) == 2 * 8, "steps of two calls"


@pytest.mark.parametrize("kind", ["full", "diagonal", "constant"])
@pytest.mark.parametrize("length", [1, 2, 5, 8, 13])
def test_the_whole_of_maps_is_one_after_another(kind: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shape = {"full": (2, 2), "diagonal": (2,), "constant": None}[kind]
    matrix = None if shape is None else torch.randn(*shape, 3, length, 4, generator=generator, dtype=torch.float64)
    maps = AffineMap(matrix, torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    expected = x
    for index in reversed(range(length)):
        expected = maps.at(index)(expected)
    torch.testing.assert_close(affine.whole(maps)(x), expected, rtol=1e-12, atol=1e-12)
