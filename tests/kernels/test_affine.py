"""Affine maps compose associatively, and the one scan over them is the loop over time, in all its forms."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import AffineMap, ArgumentError
from paralm_kernels.affine import _WALK_WIDTH, Recurrence, scan, trajectory

LENGTHS = (1, 2, 3, 5, 8, 31, 64, 127)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}  # float64; the scan associates differently from the loop


def random_maps(size, full, time, batch=2, channel=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (size, batch, time, channel)
    matrix = torch.randn(((size, *shape) if full else shape), generator=generator, dtype=torch.float64) / 2
    return AffineMap(matrix, torch.randn(shape, generator=generator, dtype=torch.float64))


def loop(maps, initial):
    states, x = [], initial
    for t in range(maps.length):
        x = maps.at(t)(x)
        states.append(x)
    return torch.stack(states, -2)


kinds = pytest.mark.parametrize(("size", "full"), [(1, False), (2, False), (2, True), (3, True)])


@kinds
def test_composition_is_application_twice_and_associative(size, full):
    maps = random_maps(size, full, 3)
    x = torch.randn(size, 2, 3, dtype=torch.float64)
    a, b, c = (maps.at(t) for t in range(3))
    torch.testing.assert_close(b.after(a)(x), b(a(x)))
    left, right = c.after(b).after(a), c.after(b.after(a))
    torch.testing.assert_close(left.matrix, right.matrix)
    torch.testing.assert_close(left.offset, right.offset)


@kinds
def test_a_state_is_the_constant_map(size, full):
    step = random_maps(size, full, 1).at(0)
    x = torch.randn(size, 2, 3, dtype=torch.float64)
    after = step.after(AffineMap(None, x))
    assert after.matrix is None
    torch.testing.assert_close(after.offset, step(x))
    assert AffineMap(None, x).after(step).offset is x


def test_diagonal_and_full_maps_do_not_compose():
    with pytest.raises(ArgumentError, match="cannot compose a diagonal affine map with a full one"):
        random_maps(2, True, 1).after(random_maps(2, False, 1))


@kinds
@pytest.mark.parametrize("time", LENGTHS)
def test_the_scan_is_the_loop(size, full, time):
    maps = random_maps(size, full, time)
    x = torch.randn(size, 2, 3, dtype=torch.float64)
    expected = loop(maps, x)
    result = scan(maps, AffineMap(None, x))
    assert result.matrix is None
    torch.testing.assert_close(result.offset, expected, **CLOSE)
    prefixes = scan(maps)
    torch.testing.assert_close(prefixes(x.unsqueeze(-2)), expected, **CLOSE)
    before = random_maps(size, full, 1, seed=1).at(0)
    torch.testing.assert_close(scan(maps, before)(x.unsqueeze(-2)), loop(maps, before(x)), **CLOSE)


@kinds
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("channel", [3, _WALK_WIDTH])
def test_the_trajectory_is_the_loop_both_ways_narrow_and_wide(size, full, time, channel):
    """Narrow problems go by odd–even reduction, wide ones by a walk; into new tensors and in place."""
    maps = random_maps(size, full, min(time, 31), batch=1, channel=channel)
    x = torch.randn(size, 1, channel, dtype=torch.float64)
    torch.testing.assert_close(trajectory(maps, x), loop(maps, x), **CLOSE)
    torch.testing.assert_close(trajectory(maps), loop(maps, torch.zeros_like(x)), **CLOSE)
    backwards = loop(maps.reversed(), x).flip(-2)
    torch.testing.assert_close(trajectory(maps, x, reverse=True), backwards, **CLOSE)
    for reverse, expected in ((False, loop(maps, x)), (True, backwards)):
        buffer = AffineMap(maps.matrix, torch.empty_like(maps.offset))
        recurrence = Recurrence(buffer, reverse)
        for _ in range(2):  # again, with other values in the same tensors
            buffer.offset.copy_(maps.offset)
            assert recurrence.run(x) is buffer.offset
            torch.testing.assert_close(buffer.offset, expected, **CLOSE)


def test_a_recurrence_of_constant_maps_is_refused():
    with pytest.raises(ArgumentError, match="nothing to run"):
        Recurrence(AffineMap(None, torch.zeros(1, 1, 3, 2)))
