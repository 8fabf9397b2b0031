"""The pieces with a backward of their own are their composites: values and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from paralm_kernels import dry_run
from torch import Tensor

from paralm.models import functional, norms
from paralm.models.functional import block_diagonal, rms_norm, swiglu
from paralm.models.mixers import mamba2
from paralm.models.mixers.mamba2 import GateThenRMSNorm
from paralm.models.norms import GatedRMSNorm, HeadLayerNorm, RMSNorm

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=draws, dtype=torch.float64).requires_grad_()


def same(ours: Function, theirs: Function, leaves: Sequence[Tensor]) -> None:
    """Outputs and gradients along a random cotangent agree to float64 rounding; and gradcheck holds."""
    results = []
    for function in (ours, theirs):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [normal(*o.shape, seed=9 + n).detach() for n, o in enumerate(outputs)]
        results.append((outputs, torch.autograd.grad(outputs, leaves, cotangents)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, tuple(leaves))


def test_rms_norm() -> None:
    def composite(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, w.shape, w, 1e-3)

    same(lambda x, w: rms_norm(x, w, 1e-3), composite, [normal(2, 3, 6), normal(6)])


def test_rms_norm_gated_by_a_slice() -> None:
    def composite(x: Tensor, w: Tensor, both: Tensor) -> Tensor:
        return F.rms_norm(x, w.shape, w, 1e-3) * F.silu(both[..., 6:])

    same(lambda x, w, b: rms_norm(x, w, 1e-3, b[..., 6:]), composite, [normal(2, 3, 6), normal(6), normal(2, 3, 12)])


def test_rms_norm_of_what_is_not_contiguous() -> None:
    def composite(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x.mT, w.shape, w, 1e-3).mT

    same(lambda x, w: rms_norm(x.mT, w, 1e-3).mT, composite, [normal(2, 6, 3), normal(6)])


def test_a_second_derivative_is_refused() -> None:
    """Also where the gradient that comes in is a constant."""
    x = normal(2, 3, 6)
    (grad,) = torch.autograd.grad(rms_norm(x, normal(6), 1e-3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_a_gpus_kernels_are_for_many_rows_and_not_for_torchs_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(4, 8, 6, device="meta")
    assert not functional.fused(x)
    with dry_run():
        assert functional.fused(x)
        assert not functional.fused(x[:, 1:])
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not functional.fused(x)


def test_swiglu() -> None:
    def composite(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    same(swiglu, composite, [normal(2, 3, 10)])


@pytest.mark.parametrize(("heads", "maps"), [(1, 1), (1, 3), (2, 3), (4, 2)])
def test_block_diagonal(heads: int, maps: int) -> None:
    width = 8 // heads

    def composite(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(x @ torch.block_diag(*w).T + b for w, b in zip(weight, bias, strict=True))

    leaves = [normal(2, 3, 8), normal(maps, heads, width, width), normal(maps, 8)]
    same(block_diagonal, composite, leaves)
    assert all(output.is_contiguous() for output in block_diagonal(*leaves))


def test_what_a_gpu_takes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of the fused form, which off a GPU is its composite."""
    head = HeadLayerNorm(2, 8, 1e-3).double()
    first = GateThenRMSNorm(16, 2, 1e-3).double()
    after = GatedRMSNorm(16, 1e-3).double()
    x, gate, both = normal(2, 3, 16), normal(2, 3, 16), normal(2, 3, 32)
    d, v = normal(4), normal(2, 3, 4, 4)
    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda x: head(x.unflatten(-1, (2, 8))), [x]),
        (lambda x, g: head(x.unflatten(-1, (2, 8)), g), [x, gate]),
        (lambda x, g, d, v: first(x.unflatten(-1, (4, 4)), g, d, v), [x, gate, d, v]),
        (after, [x, gate]),
        (swiglu, [both]),
    ]
    for norm in (head, first, after):
        torch.nn.init.normal_(norm.weight, 1.0)
    asked: list[str] = []
    for call, leaves in calls:
        results = []
        for on_gpu in (False, True):
            for module in (functional, norms, mamba2):
                monkeypatch.setattr(module, "fused", lambda x, on_gpu=on_gpu: on_gpu and not asked.append("gpu"))
            y = call(*leaves)
            results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert len(asked) >= len(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 5, 16, generator=draws).to(dtype).requires_grad_() for _ in range(2))
    plain, gated = RMSNorm(16, 1e-5).to(dtype), GatedRMSNorm(16, 1e-5).to(dtype)
    with torch.no_grad():
        for norm in (plain, gated):
            norm.weight.copy_(torch.rand(16, generator=draws) + 0.5)
    wide = x.double()
    unit = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    expected = (unit * plain.weight.double(), unit * gated.weight.double() * F.silu(gate.double()))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8}[dtype]
    for norm, got, want in zip((plain, gated), (plain(x), gated(x, gate)), expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        leaves = (x, norm.weight) if norm is plain else (x, gate, norm.weight)
        weights = torch.randn(2, 5, 16, generator=draws).to(dtype)
        ours = torch.autograd.grad((got * weights).sum(), leaves)
        theirs = torch.autograd.grad((want * weights.double()).sum(), leaves, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            # The scale's gradient sums 10 products, and is rounded to the dtype at the end.
            torch.testing.assert_close(a.double(), b.double(), rtol=4 * tolerance, atol=16 * tolerance)
