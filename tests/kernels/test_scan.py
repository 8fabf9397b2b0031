"""The public linear scans: every face is the loop, in values and gradients, with resets, states, and both ways."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from paralm_kernels import ArgumentError, diagonal_scan, matrix_scan

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64; the faces associate differently
SIZES = [0, 1, 2, 3]  # 0: diagonal


def arguments(size, time, *, resets=False, state=True, batch=2, channel=3, dtype=torch.float64, device="cpu"):
    """a, b, state, reset of a random scan that neither grows nor dies."""
    generator = torch.Generator().manual_seed(size * 1000 + time)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    shape, rows = (batch, time, channel), (size,) if size else ()
    a = 0.8 * random(*rows, *rows, *shape) / max(size, 1)
    reset = (torch.rand((batch, time), generator=generator) < 0.3).to(device) if resets else None
    return a, random(*rows, *shape), random(*rows, batch, channel) if state else None, reset


def scan(size):
    return matrix_scan if size else diagonal_scan


def by_hand(size, a, b, state, reset, reverse):
    """The definition, one number after the other, with autograd through it."""
    time = b.shape[-2]
    h = torch.zeros_like(b[..., 0, :]) if state is None else state
    states = [None] * time
    for t in reversed(range(time)) if reverse else range(time):
        if reset is not None:
            h = torch.where(reset[:, t, None], 0.0, h)
        h = (torch.einsum("ijbc,jbc->ibc", a[..., t, :], h) if size else a[..., t, :] * h) + b[..., t, :]
        states[t] = h
    return torch.stack(states, -2), h


def values_and_gradients(run, a, b, state):
    leaves = [x.detach().clone().requires_grad_() for x in (a, b, state) if x is not None]
    outputs = run(*leaves, *([None] * (3 - len(leaves))))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h) for h in outputs]
    return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("time", [1, 2, 7, 64, 97])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["loop", "torch", "auto"])
def test_every_face_is_the_definition_in_values_and_gradients(method, size, time, resets, reverse):
    a, b, state, reset = arguments(size, time, resets=resets, state=time != 7)
    expected = values_and_gradients(lambda a, b, s: by_hand(size, a, b, s, reset, reverse), a, b, state)
    got = values_and_gradients(lambda a, b, s: scan(size)(a, b, s, reset, reverse, method=method), a, b, state)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1, see below")
@pytest.mark.parametrize(
    ("size", "time", "reverse"), [(0, 1, False), (0, 37, False), (0, 16, True), (2, 1, True), (2, 17, False)]
)
def test_the_fused_kernels_are_the_definition(size, time, reverse):
    a, b, state, reset = arguments(size, time, resets=time > 1)
    expected = values_and_gradients(lambda a, b, s: by_hand(size, a, b, s, reset, reverse), a, b, state)
    got = values_and_gradients(lambda a, b, s: scan(size)(a, b, s, reset, reverse, method="triton"), a, b, state)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    narrow = [x.bfloat16() for x in (a, b, state)]
    exact, _ = by_hand(size, *(x.double() for x in narrow), reset, reverse)
    rounded = scan(size)(*narrow, reset, reverse, method="triton")
    assert rounded.final.dtype == torch.float32
    bound = torch.finfo(torch.bfloat16).eps * (1 + exact.abs())
    assert bool(((rounded.states.double() - exact).abs() <= bound).all())


@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
def test_the_fused_kernels_under_the_interpreter():
    """Triton decides at import whether it interprets, hence a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    chosen = ["-k", "test_the_fused_kernels_are_the_definition"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout


def test_the_fused_face_needs_a_gpu_and_says_so():
    if INTERPRETED:
        pytest.skip("this process interprets")
    with pytest.raises(ArgumentError, match="method 'triton' needs a GPU"):
        diagonal_scan(torch.rand(1, 2, 3), torch.rand(1, 2, 3), method="triton")


@pytest.mark.parametrize("size", [0, 2])
def test_a_sequence_in_pieces_is_the_whole(size):
    """Either way through time: `final` is the state that continues."""
    a, b, state, reset = arguments(size, 31, resets=True)

    def piece(start, stop, state, reverse):
        return scan(size)(a[..., start:stop, :], b[..., start:stop, :], state, reset[:, start:stop], reverse)

    for reverse in (False, True):
        whole = piece(0, 31, state, reverse)
        final, parts = state, []
        for start, stop in ((11, 31), (0, 11)) if reverse else ((0, 11), (11, 31)):
            part, final = piece(start, stop, final, reverse)
            parts.append(part)
        joined = torch.cat(parts[::-1] if reverse else parts, -2)
        torch.testing.assert_close(joined, whole.states, **CLOSE)
        torch.testing.assert_close(final, whole.final, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_numbers_are_computed_in_float32(dtype):
    """One rounding at the end; the carried state keeps float32."""
    a, b, state, _ = arguments(0, 200, dtype=dtype)
    exact, _ = by_hand(0, *(x.double() for x in (a, b, state)), None, False)
    got = diagonal_scan(a, b, state)
    assert got.states.dtype == dtype
    assert got.final.dtype == torch.float32
    bound = torch.finfo(dtype).eps * (1 + exact.abs()) + 1e-5
    assert bool(((got.states.double() - exact).abs() <= bound).all())


def test_gradients_pass_finite_differences():
    for size in (0, 2):
        a, b, state, reset = (
            x.requires_grad_() if x.dtype != torch.bool else x for x in arguments(size, 5, resets=True, channel=2)
        )
        for reverse in (False, True):
            assert torch.autograd.gradcheck(
                lambda *x, size=size, reset=reset, reverse=reverse: tuple(scan(size)(*x, reset, reverse)), (a, b, state)
            )


def test_nothing_passes_a_reset():
    a, b, state, _ = arguments(0, 6)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[:, 2] = True
    b = b.requires_grad_()
    diagonal_scan(a, b, torch.full_like(state, 1e300), reset).states[:, 2:].sum().backward()
    assert not b.grad[:, :2].any()
    assert bool(b.grad[:, 2:].any())


WRONG = [
    ({"a": torch.rand(2, 3)}, "a is (2, 3) and b is (2, 4, 3); expected the same (batch, time, channel)"),
    ({"b": [[[0.5] * 3] * 4] * 2}, "b must be a tensor, got list"),
    ({"state": [[0.5] * 3] * 2}, "state must be a tensor, got list"),
    ({"b": torch.rand(2, 5, 3)}, "a is (2, 4, 3) and b is (2, 5, 3)"),
    ({"a": torch.rand(2, 0, 3), "b": torch.rand(2, 0, 3)}, "none of them 0"),
    ({"state": torch.rand(2, 2)}, "state is (2, 2), expected (2, 3)"),
    ({"state": torch.rand(2, 3).double()}, "state is torch.float64 but a is torch.float32"),
    ({"b": torch.rand(2, 4, 3).double()}, "a is torch.float32 and b is torch.float64"),
    ({"b": torch.rand(2, 4, 3, device="meta")}, "b is on meta but a is on cpu"),
    ({"reset": torch.zeros(2, 4)}, "reset is torch.float32 (2, 4), expected torch.bool (2, 4)"),
    ({"reset": torch.zeros(2, 5, dtype=torch.bool)}, "reset is torch.bool (2, 5), expected torch.bool (2, 4)"),
    ({"method": "cuda"}, "method is 'cuda'; expected one of auto, loop, torch, triton"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_mismatches_name_both_sides(changes, says):
    with pytest.raises(ArgumentError) as caught:
        diagonal_scan(**{"a": torch.rand(2, 4, 3), "b": torch.rand(2, 4, 3), **changes})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_matrix_of_another_size_is_named():
    with pytest.raises(ArgumentError, match=r"a is \(3, 3, 1, 2, 4\) and b is \(2, 1, 2, 4\)"):
        matrix_scan(torch.rand(3, 3, 1, 2, 4), torch.rand(2, 1, 2, 4))
    with pytest.raises(ArgumentError, match="matrix_scan: a must be a tensor, got list"):
        matrix_scan([[1.0]], torch.rand(1, 1, 2, 4))
    with pytest.raises(ArgumentError, match=r"state is \(2, 3\), expected \(2, 1, 4\)"):
        matrix_scan(torch.rand(2, 2, 1, 2, 4), torch.rand(2, 1, 2, 4), torch.rand(2, 3))
