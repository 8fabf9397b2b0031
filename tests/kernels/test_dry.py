"""A dry run gives tensors of the shapes and dtypes that computing gives, by the fused kernels, and launches nothing."""

from __future__ import annotations

import contextlib

import paralm_kernels
import pytest
import torch
from paralm_kernels import dry_run
from torch.utils import _pytree as pytree

BATCH, TIME, WIDTH = 2, 20, 16


def made(device, dtype, *shape, grad=True):
    x = torch.zeros(*shape, device=device, dtype=dtype)
    return x.requires_grad_() if grad else x


def paragru(device, dtype, reset):
    inputs = [made(device, dtype, BATCH, TIME, WIDTH) for _ in range(3)]
    params = [made(device, dtype, WIDTH) for _ in range(3)]
    return [*inputs, *params], paralm_kernels.solve(paralm_kernels.ParaGRU(), inputs, params, reset=reset)


def solved(device, dtype, reset):
    leaves, trajectory = paragru(device, dtype, reset)
    return leaves, (trajectory.states, trajectory.final)


def ssd(device, dtype, reset):
    q, k, v = (made(device, dtype, BATCH, TIME, heads, 16) for heads in (1, 1, 2))
    decay, gain = (made(device, torch.float32, BATCH, TIME, 2) for _ in range(2))
    return [q, k, v, decay, gain], paralm_kernels.chunkwise(q, k, v, decay, gain, reset=reset)


def mlstm(device, dtype, reset):
    q, k, v = (made(device, dtype, BATCH, TIME, 2, 16) for _ in range(3))
    decay, gain = (made(device, torch.float32, BATCH, TIME, 2) for _ in range(2))
    return [q, k, v, decay, gain], paralm_kernels.chunkwise(q, k, v, decay, gain, reset=reset, normalized=True)


def dense(device, dtype, reset):
    inputs, weight = made(device, dtype, BATCH, TIME, 4, 2, 16), made(device, dtype, 4, 2, 16, 16)
    return [inputs, weight], paralm_kernels.dense_rnn("lstm", inputs, weight, reset=reset)


def conv(device, dtype, reset):
    x, weight, bias = made(device, dtype, BATCH, TIME, WIDTH), made(device, dtype, WIDTH, 4), made(device, dtype, WIDTH)
    return [x, weight, bias], paralm_kernels.causal_conv(x, weight, bias, reset=reset)


def norm(device, dtype, reset):
    x, gate, v = (made(device, dtype, BATCH, TIME, WIDTH) for _ in range(3))
    weight, d, both = made(device, dtype, WIDTH), made(device, dtype, 2), made(device, dtype, BATCH, TIME, 2 * WIDTH)
    y = paralm_kernels.gated_norm(x, weight, 1e-5, gate, skip=(d, v), groups=2, gate_first=True)
    angles = paralm_kernels.rotary_angles(torch.zeros(1, TIME, dtype=torch.int64, device=device), 4, 1e4, dtype)
    turned = paralm_kernels.rotate(x.unflatten(-1, (4, 4)), *angles)
    return [x, gate, v, weight, d, both], (y, paralm_kernels.swiglu(both), turned)


def scan(device, dtype, reset):
    a, b = (made(device, dtype, BATCH, TIME, WIDTH) for _ in range(2))
    found = paralm_kernels.diagonal_scan(a, b, reset=reset)
    return [a, b], (found.states, found.final)


def memory(device, dtype, reset):
    """Two chunks; resets are not given, for where they are is a question of values."""
    q, k, v = (made(device, dtype, BATCH, TIME, 2, 4) for _ in range(3))
    gates = [made(device, torch.float32, BATCH, TIME, 2) for _ in range(3)]
    weights = [made(device, dtype, 2, 8, 4), made(device, dtype, 2, 4, 8)]
    norm = made(device, dtype, 2, 4)
    y, state = paralm_kernels.neural_memory(q, k, v, *gates, weights, norm=norm, chunk_size=12)
    return [q, k, v, *gates, *weights, norm], (y, state["weights"], state["momentum_weights"])


def described(run, device, dtype):
    """(shape, dtype) of every output, and of every gradient."""
    reset = torch.zeros(BATCH, TIME, dtype=torch.bool, device=device)
    leaves, outputs = run(device, dtype, reset)
    tensors = pytree.tree_leaves(outputs)
    sums = [t.float().sum() for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(sums, leaves, allow_unused=True)
    return [(tuple(t.shape), t.dtype) for t in (*tensors, *grads)]


@pytest.mark.parametrize("run", [solved, ssd, mlstm, dense, conv, norm, scan, memory], ids=lambda run: run.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_comes_out_has_the_form_of_what_is_computed(run, dtype):
    pytest.importorskip("triton")
    told = []
    with dry_run(lambda name, tensors, pointwise: told.append((name, len(tensors)))):
        dry = described(run, "meta", dtype)
        assert told, "no kernel was told"
        assert all(count for _, count in told)
    assert dry == described(run, "cpu", dtype)


def test_what_is_told_is_what_a_gpu_would_launch():
    pytest.importorskip("triton")
    told = []
    with dry_run(lambda name, tensors, pointwise: told.append(name)):
        described(solved, "meta", torch.bfloat16)
    assert told == ["walk_kernel", "backward_kernel"]


def test_auto_launches_what_the_method_it_takes_does():
    """Newton's iterations on a CPU are no rounds of segments: as many of those as the table expects."""
    pytest.importorskip("triton")
    launches = {}
    for method in ("auto", "triton"):
        launches[method] = told = []
        with dry_run(lambda name, tensors, pointwise, told=told: told.append(name)):
            inputs = [made("meta", torch.bfloat16, 1, 1 << 16, 1024) for _ in range(3)]
            params = [made("meta", torch.float32, 1024) for _ in range(3)]
            paralm_kernels.solve(paralm_kernels.ParaGRU(), inputs, params, method=method)
    assert "segments_join_kernel" in launches["triton"]
    assert launches["auto"] == launches["triton"]


def test_what_torch_compiles_is_told_as_one_kernel_each():
    """Of a tile forward: its name, and the bytes of what goes in and comes out."""
    told = {}
    with dry_run(
        lambda name, tensors, pointwise: told.setdefault(name, (pointwise, [tuple(x.shape) for x in tensors]))
    ):
        memory("meta", torch.float32, None)
    assert all(pointwise for pointwise, _ in told.values())
    assert told["between"][1] == [(BATCH, 2, 12), (BATCH, 2, 12, 12)]
    assert told["updated"][1] == [*[(BATCH, 2, 8, 4)] * 4, *[(BATCH, 2)] * 3, *[(BATCH, 2, 8, 4)] * 2]


def test_outside_of_it_nothing_is_different():
    """Tensors without values take the loop, as they did; launches are Triton's own again, after an error too."""
    with contextlib.suppress(RuntimeError), dry_run():
        raise RuntimeError
    told = []
    with dry_run(lambda name, tensors, pointwise: told.append(name)):
        pass
    _, trajectory = paragru("meta", torch.float32, None)
    assert trajectory.info.method == "sequential"
    assert trajectory.states[0].shape == (BATCH, TIME, WIDTH)
    assert not told


@pytest.mark.parametrize("run", [solved, ssd, dense, conv, scan], ids=lambda run: run.__name__)
def test_without_triton_auto_is_torch_on_a_gpu_too(run, monkeypatch):
    monkeypatch.setattr("paralm_kernels.fused._triton_is_there", lambda: False)
    told = []
    with dry_run(lambda name, tensors: told.append(name)):
        run("meta", torch.float32, None)
    assert told == []


def test_kernels_without_matrix_products_are_told_as_such():
    """All others may have some, which a plan then counts on their word."""
    for run, expected in ((norm, {True}), (conv, {True}), (solved, {True}), (ssd, {False}), (dense, {False})):
        told = set()
        with dry_run(lambda name, tensors, pointwise: told.add(pointwise)):  # noqa: B023
            run("meta", torch.bfloat16, None)
        assert told == expected, run.__name__
