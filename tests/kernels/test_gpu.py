"""Every fused kernel of every registered cell on a real GPU, against float64 on the CPU; `make gpu-check` runs this.

float32 states element by element within 8·2⁻²⁴·κ, gradients relative to their largest element, float64 to 1e-10.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from paralm_kernels import causal_conv, cells, diagonal_scan, matrix_scan, rotary_angles, rotate, solve, step, swiglu
from paralm_kernels.laws import (
    FLOAT32_GRADIENTS,
    TOLERANCE,
    ULPS,
    Outcome,
    amplification,
    by,
    deviation,
    outcome,
    random_case,
    reference,
)
from torch.utils import _pytree as pytree

from .test_chunkwise import Case
from .test_neural_memory import Case as Memory
from .test_neural_memory import close
from .test_neural_memory import gradients as memory_gradients
from .test_norm import FORMS
from .test_norm import random_case as norm_case
from .test_norm import values_and_gradients as norm_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
METHODS = ("auto", "triton-walk", "triton-tile", "triton-segments")
CELLS = list(cells().values())
every_cell = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
every_method = pytest.mark.parametrize("method", METHODS)


def moved(value, device):
    """Tensors in a value, tuples included, on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(moved(x, device) for x in value) if isinstance(value, tuple) else value


def on_gpu(case):
    return replace(case, **{f.name: moved(getattr(case, f.name), "cuda") for f in fields(case) if f.name != "cell"})


def fetched(result):
    return Outcome(*({name: x.cpu() for name, x in group.items()} for group in (result.values, result.grads)))


@every_cell
@every_method
@pytest.mark.parametrize("time", [1, 2, 31, 97, 1024])
def test_float64_to_ten_digits_in_values_and_gradients(cell, method, time):
    case = random_case(cell, batch=3, time=time, channel=70, weights=2.0, resets=0.05, seed=time)
    got = fetched(outcome(on_gpu(case), by(method)))
    worst, where = deviation(got, outcome(case, by("sequential")), TOLERANCE)
    assert worst <= 1, f"{where}: {worst:.2g} times what is allowed"


@every_cell
@every_method
@pytest.mark.parametrize(("time", "weights"), [(33, 4.0), (513, 1.0), (2048, 0.5)])
def test_float32_within_rounding_of_float64(cell, method, time, weights):
    single = random_case(cell, batch=2, time=time, channel=130, weights=weights, resets=0.01).to(torch.float32)
    exact = single.to(torch.float64)
    got, expected = fetched(outcome(on_gpu(single), by(method))), outcome(exact, by("sequential"))
    bound = ULPS * amplification(exact)
    for name in cell.state:
        value = expected.values[f"states[{name}]"]
        error = (got.values[f"states[{name}]"] - value).abs() / (bound * value.abs().max().clamp(min=1))
        assert float(error.max()) <= 1, name
    if weights <= 1:
        worst, where = deviation(replace(got, values={}), replace(expected, values={}), FLOAT32_GRADIENTS)
        assert worst <= 1, where


@every_cell
@every_method
def test_bfloat16_is_rounded_once(cell, method):
    case = random_case(cell, batch=2, time=300, channel=64, weights=0.5, resets=0.01)
    inputs = tuple(x.bfloat16() for x in case.inputs)
    exact = solve(cell, [x.double() for x in inputs], case.params, case.state, case.reset, "sequential")
    got = solve(
        cell, moved(inputs, "cuda"), *(tuple(x.float().cuda() for x in part) for part in (case.params, case.state)),
        case.reset.cuda(), method,
    )  # fmt: skip
    for h, value in zip(got.states, exact.states, strict=True):
        assert h.dtype == torch.bfloat16
        bound = torch.finfo(torch.bfloat16).eps * (1 + value.abs()) + 1e-4
        assert bool(((h.cpu().double() - value).abs() <= bound).all())
    for h in got.final:
        assert h.dtype == torch.float32


@every_cell
def test_the_decode_step(cell):
    case = random_case(cell, batch=5, time=2, channel=130).to(torch.float32)
    x = tuple(x[:, 0] for x in case.inputs)
    expected = cell.step(case.state, x, case.params)
    got = step(cell, moved(case.state, "cuda"), moved(x, "cuda"), moved(case.params, "cuda"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@every_cell
@every_method
def test_the_same_call_gives_the_same_bits(cell, method):
    case = on_gpu(random_case(cell, batch=4, time=257, channel=96, weights=1.0).to(torch.float32))
    first, second = outcome(case, by(method)), outcome(case, by(method))
    for name, value in (first.values | first.grads).items():
        assert torch.equal(value, (second.values | second.grads)[name]), name


@pytest.mark.parametrize("method", ["torch", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [0, 2])
def test_the_linear_scans(size, reverse, method):
    generator = torch.Generator().manual_seed(0)
    rows = (size,) if size else ()
    scan = matrix_scan if size else diagonal_scan

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b, state = random(*rows, *rows, 2, 515, 70) / 3, random(*rows, 2, 515, 70), random(*rows, 2, 70)
    reset = torch.rand((2, 515), generator=generator) < 0.02
    results = []
    for device, chosen in (("cpu", "loop"), ("cuda", method)):
        leaves = [x.to(device).requires_grad_() for x in (a, b, state)]
        states, final = scan(*leaves, reset.to(device), reverse, method=chosen)
        gradients = torch.autograd.grad((states.sin().sum() + final.sum()), leaves)
        results.append([x.detach().cpu() for x in (states, final, *gradients)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-10)


def test_the_reference_itself_agrees():
    """What the others are compared with is the plain loop."""
    case = random_case(CELLS[0], time=31)
    assert deviation(outcome(case, by("sequential")), outcome(case, reference), TOLERANCE)[0] <= 1


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("resets", [0.0, 0.02])
@pytest.mark.parametrize("taps", [1, 4])
def test_the_convolution(taps, resets, dtype, close, monkeypatch):
    """A slice of a projection, a state and resets, beside torch on the CPU; programs of two blocks of time."""
    monkeypatch.setattr("paralm_kernels.triton_conv.PROGRAMS", 40)
    generator = torch.Generator().manual_seed(0)
    wide, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((3, 301, 200), (130, taps)))
    bias, state = (torch.randn(s, generator=generator).to(dtype) for s in ((130,), (3, taps - 1, 130)))
    reset = torch.rand((3, 301), generator=generator) < resets if resets else None
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in (wide, weight, bias, state)]
        y, end = causal_conv(leaves[0][..., 40:170], *leaves[1:], None if reset is None else reset.to(device))
        gradients = torch.autograd.grad(y.sin().sum() + end.cos().sum(), leaves, allow_unused=True)
        results.append([y, end, *(g for g in gradients if g is not None)])
    for a, b in zip(*results, strict=True):
        assert (a.double() - b.cpu().double()).abs().max() <= close * a.double().abs().max().clamp(min=1)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("channels", [96, 768, 4096, 8192])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_norms_and_gates(form, channels, dtype, close):
    """Values and gradients against float64 on the CPU."""
    leaves, options = norm_case(form, (3, 301), dtype, channels - channels % 12)
    there = {name: x.detach().cuda().requires_grad_() for name, x in leaves.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    expected = norm_gradients(exact, options, "torch")
    for a, b in zip(norm_gradients(there, options, "auto"), expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= close * b.abs().max()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_swiglu_of_a_part_of_a_projection(dtype, close):
    wide = torch.randn(2, 301, 2051, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        x = wide.to(device, kind).requires_grad_()
        y = swiglu(x[..., 1:2049])
        results.append([y, *torch.autograd.grad(y.sum(), x)])
    for a, b in zip(*results, strict=True):
        assert (a.cpu().double() - b).abs().max() <= close * b.abs().max()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_rotary_positions(dtype, close):
    heads = torch.randn(2, 301, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    position = torch.arange(301)[None] + 1_000_000
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        x = heads.to(device, kind).requires_grad_()
        y = rotate(x[:, :, 1:4], *rotary_angles(position.to(device), 64, 10_000.0, kind))
        results.append([y, *torch.autograd.grad((y * y).sum() + y.sum(), x)])
    for a, b in zip(*results, strict=True):
        assert (a.cpu().double() - b).abs().max() <= close * b.abs().max()


@pytest.mark.parametrize("normalized", [False, True], ids=["ssd", "mlstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("resets", "rows"), [(0.0, "some"), (0.01, "some"), (0.01, "one"), (0.01, "many")])
def test_chunkwise_at_the_sizes_of_models(normalized, dtype, resets, rows, monkeypatch):
    """Against float64 on the CPU; bfloat16 by the norm of the difference, as every product rounds its operands. One
    head of a long text: walks go in pieces of time. Many rows: their tiles are wide, here for a few already."""
    sizes = {"groups": 2, "shared": 1, "d_k": 256, "d_v": 512} if normalized else {"shared": 4, "d_k": 128, "d_v": 64}
    if rows == "one":
        case = Case(normalized, 1, 20_000, 1, 1, 128, 64, resets=resets, seed=1, dtype=torch.float32)
    else:
        case = Case(normalized, time=1000, resets=resets, seed=1, dtype=torch.float32, **sizes)
    chunk = None if rows == "one" else 64 if normalized else 256
    if rows == "many":
        from paralm_kernels import triton_chunkwise_shapes

        monkeypatch.setattr(triton_chunkwise_shapes, "WALKS", 1)
    case.inputs[:3] = [(x / x.shape[-1] ** 0.25).to(dtype) for x in case.inputs[:3]]
    case.weights[0] = case.weights[0].to(dtype).float()

    def to(device, kind=None):
        for name in ("inputs", "state", "weights"):
            setattr(case, name, [x.to(device=device, dtype=kind or x.dtype) for x in getattr(case, name)])
        case.reset = None if case.reset is None else case.reset.to(device)

    to("cuda")
    got = case.run(chunk_size=chunk, method="triton")
    to("cpu", torch.float64)
    for index, (a, b) in enumerate(zip(got, case.run(method="torch"), strict=True)):
        error = float((a.cpu().double() - b).norm() / b.norm().clamp(min=1e-6))
        assert error <= (1e-4 if dtype == torch.float32 else 3e-2), (index, error)


@pytest.mark.parametrize("kind", [{}, {"norm": True, "depth": 3, "biases": True}, {"momentum": False}], ids=str)
def test_neural_memory_as_torch_compiles_it(kind):
    """Outputs, final state and gradients of auto on a GPU against the loop, in float64."""
    on_cpu, there = Memory(time=19, **kind), Memory(time=19, **kind)
    leaves = there.moved("cuda")
    for reset in (None, on_cpu.resets()):
        expected = on_cpu.run(reset=reset, method="reference")
        got = there.run(reset=None if reset is None else reset.cuda())
        fetched = [x.cpu() for x in pytree.tree_leaves(got)]
        close(fetched, pytree.tree_leaves(expected))
        by_device = [g.cpu() for g in memory_gradients(got, leaves)]
        close(by_device, memory_gradients(expected, on_cpu.leaves()))
