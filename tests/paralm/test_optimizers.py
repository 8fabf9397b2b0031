"""The registered optimizers: laws over all of them, Muon against torch's, the gradient noise, and skipped spikes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from paralm.config import Config, OptimizerConfig
from paralm.training.fragments import EngineFragments, Fragment
from paralm.training.loop import train
from paralm.training.metrics import read_metrics
from paralm.training.muon import MatrixUpdate, newton_schulz, orthogonalized_update
from paralm.training.optimizers import OPTIMIZERS, GradientNoise, build_optimizer, is_fused
from paralm.training.rendezvous import start_distributed
from paralm.training.replicated import Replicated
from paralm.training.step import SpikeGuard
from tests.conftest import settings

FUSED_CASES = [(False, False), (True, False), (False, True)]
SHAPES = {"w": (24, 16), "heads": (2, 8, 8), "vector": (16,), "bound": (16,)}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) / 4))


def make(config: OptimizerConfig, **maps: tuple[int, ...]) -> tuple[Small, Replicated]:
    """A few parameters under a stage-0 optimizer, bound as the engine's is."""
    start_distributed(60.0)
    model = Small()
    groups = [
        {"params": [model.w, model.heads], "weight_decay": True, "clamp": None, "matrix": True, "maps": maps},
        {"params": [model.vector], "weight_decay": False, "clamp": None, "matrix": False},
        {"params": [model.bound], "weight_decay": False, "clamp": 0.1, "matrix": False},
    ]
    inner = build_optimizer(groups, config, seed=3)
    outer = Replicated(inner, config.clip_grad_norm)
    fragments = EngineFragments(SimpleNamespace(optimizer=outer, module=model), 0, 1)
    inner.bind(fragments, SHAPES, torch.device("cpu"))
    return model, outer


def run(model: Small, optimizer: Replicated, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_neither_weights_nor_state(name: str) -> None:
    model, optimizer = make(OptimizerConfig(name=name, lr=0.1))
    run(model, optimizer, 2)
    inner: Any = optimizer.inner
    before = [p.detach().clone() for p in model.parameters()]
    state = {id(k): {n: v.clone() for n, v in s.items()} for k, s in inner.state.items()}
    inner.skip = True
    run(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for key, values in inner.state.items():
        assert all(torch.equal(value, state[id(key)][n]) for n, value in values.items())
    inner.skip = False
    run(model, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], list(model.parameters())[:3], strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_update_is_the_update(name: str) -> None:
    """One kernel or many: the same up to rounding, noise, clamp and the share without decay included."""
    keys: dict[str, Any] = {"name": name, "lr": 0.1, "gradient_noise": {"eta": 0.3}}
    found = []
    for fused in (False, True):
        model, optimizer = make(OptimizerConfig(**keys, fused=fused))
        assert all(bool(group["fused"]) == fused for group in optimizer.param_groups)
        run(model, optimizer, 5)
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_an_update_is_fused_on_a_gpu_and_where_states_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {fused: [is_fused(OptimizerConfig(fused=fused), *x) for x in FUSED_CASES] for fused in (None, True, False)}
    assert asked == {None: [False, True, True], True: [True] * 3, False: [False] * 3}
    assert not make(OptimizerConfig())[1].param_groups[0]["fused"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    groups = [{"params": [nn.Parameter(torch.zeros(3))], "weight_decay": True}]
    assert build_optimizer(groups, OptimizerConfig()).param_groups[0]["fused"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bounds_hold_after_every_step(name: str) -> None:
    model, optimizer = make(OptimizerConfig(name=name, lr=0.5))
    run(model, optimizer, 3)
    assert float(model.bound.detach().abs().max()) <= torch.tensor(0.1)  # the bound in float32
    assert float(model.vector.detach().abs().max()) > 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_norm_that_is_not_finite_is_noticed_and_clipping_is_torchs(name: str) -> None:
    model, optimizer = make(OptimizerConfig(name=name, lr=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    model.vector.grad[3] = math.inf
    optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for copy, parameter in zip(copies, model.parameters(), strict=True):
        copy.grad = parameter.grad.clone()
    norm = nn.utils.clip_grad_norm_(copies, 1.0)
    optimizer.step()
    assert not optimizer.overflow
    assert optimizer._global_grad_norm == pytest.approx(float(norm), rel=1e-6)
    for copy, parameter in zip(copies, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, copy.grad)


def test_newton_schulz_keeps_the_singular_vectors_and_levels_the_values() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(3, 20, 12, generator=generator)
    found = newton_schulz(matrix, 5)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.mT @ found @ right.mT  # diagonal when the singular vectors are kept
    values = core.diagonal(dim1=-2, dim2=-1)
    assert float((core - torch.diag_embed(values)).abs().max()) < 1e-4
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    torch.testing.assert_close(newton_schulz(matrix.mT.contiguous(), 5), found.mT, rtol=1e-4, atol=1e-5)


def test_pieces_come_back_to_where_they_were_taken() -> None:
    """Fragments in any order, a parameter in two of them: each gets its own part of what was made of the whole."""
    start_distributed(60.0)
    shapes = {"a": (2, 3), "b": (4, 2), "c": (2, 2)}
    flat = torch.arange(18.0)
    places = [("b", 0, 5), ("c", 0, 4), ("a", 0, 6), ("b", 5, 3)]
    starts = [0, 5, 9, 15]
    fragments = [Fragment(name, at, n, flat, start) for (name, at, n), start in zip(places, starts, strict=True)]
    exchange = MatrixUpdate(fragments, shapes, torch.device("cpu"))
    seen: list[torch.Tensor] = []

    def update(matrix: torch.Tensor) -> torch.Tensor:
        seen.append(matrix.clone())
        return 2 * matrix

    found = exchange([fragment.view(flat) for fragment in fragments], update)
    assert [piece.tolist() for piece in found] == [(2 * fragment.view(flat)).tolist() for fragment in fragments]
    assert sorted(map(tuple, (matrix.shape for matrix in seen))) == sorted(shapes.values())
    whole = next(matrix for matrix in seen if matrix.shape == (4, 2))
    assert whole.flatten().tolist() == [0, 1, 2, 3, 4, 15, 16, 17]


def test_muon_is_torchs_muon_on_whole_matrices() -> None:
    """torch.optim.Muon rounds the Newton-Schulz products to bf16; everything else is equal."""
    config = OptimizerConfig(name="muon", lr=0.02, weight_decay=0.1, clip_grad_norm=0.0)
    model, optimizer = make(config)
    copy = nn.Parameter(model.w.detach().clone())
    reference = torch.optim.Muon(
        [copy], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    start = copy.detach().clone()
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        copy.grad = model.w.grad.clone()
        optimizer.step()
        reference.step()
    moved, expected = (model.w - start).detach(), (copy - start).detach()
    assert float((moved - expected).norm() / expected.norm()) < 0.02


def test_muon_levels_each_of_stacked_maps_by_itself() -> None:
    """One with gradients a hundred times smaller moves as far as the others: as a stack it would hardly move."""
    config = OptimizerConfig(name="muon", lr=0.02, weight_decay=0.0, clip_grad_norm=0.0)
    model, optimizer = make(config, w=(16, 6, 2), heads=(5, 3))
    before, generator = [p.detach().clone() for p in (model.w, model.heads)], torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    model.w.grad[16:] /= 100
    grads = [p.grad.clone() for p in (model.w, model.heads)]
    optimizer.step()
    for start, parameter, grad, rows in zip(before, (model.w, model.heads), grads, ((16, 6, 2), (5, 3)), strict=True):
        moved = ((parameter.detach() - start) / -0.02).split(rows, dim=-2)
        for found, part in zip(moved, grad.split(rows, dim=-2), strict=True):
            torch.testing.assert_close(found, orthogonalized_update(part, 5), rtol=1e-3, atol=1e-4)
            assert float(found.square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("cut", [1, 65_536, 100_000, 199_999])
def test_gradient_noise_does_not_depend_on_where_a_parameter_is_cut(cut: int) -> None:
    noise, n = GradientNoise(eta=0.3, gamma=0.55, seed=7), 200_000

    def draw(offset: int, numel: int, step: int = 4) -> torch.Tensor:
        grad = torch.zeros(numel)
        noise.add(Fragment("w", offset, numel, grad, 0), grad, step)
        return grad

    whole = draw(0, n)
    assert torch.equal(torch.cat([draw(0, cut), draw(cut, n - cut)]), whole)
    # n draws: the standard deviation's own relative error is 1/√(2n) = 0.16 %
    assert float(whole.std()) == pytest.approx(math.sqrt(0.3 / 5**0.55), rel=0.01)
    assert not torch.equal(draw(0, n, step=5), whole)


def test_a_spike_is_skipped_once_and_training_goes_on(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of one step are replaced by nonsense; without the guard its update is made, with it not."""
    from paralm.training.step import Stepper

    original = Stepper.run

    def run(self: Stepper, batch: Any, step: int, *rest: Any, **more: Any) -> Any:
        if step == 20:
            batch.labels[batch.labels >= 0] = 1
        return original(self, batch, step, *rest, **more)

    monkeypatch.setattr(Stepper, "run", run)
    found: dict[bool, list[dict[str, Any]]] = {}
    for guarded in (False, True):
        guard = {"sigmas": 6.0, "window": 16} if guarded else {}
        base = settings(
            corpus, prepared, tmp_path, optimizer={"skip_spikes": guard, "lr": 1e-2}, training={"max_steps": 24}
        )
        base["run"]["name"] = f"guarded_{guarded}"
        config = Config.model_validate(base)
        train(config, say=print)
        rows = read_metrics(config.run_dir / "metrics.jsonl")
        found[guarded] = [row for row in rows if row["kind"] == "train"]
    assert [row["skipped"] for row in found[True]] == [step == 21 for step in range(1, 25)]
    assert found[True][-1]["spikes"] == 1
    assert not any(row["skipped"] for row in found[False])
    assert [row["loss"] for row in found[True][:21]] == [row["loss"] for row in found[False][:21]]
    assert found[True][21]["loss"] != found[False][21]["loss"]  # that update was made in the other run


def test_the_guard_waits_for_its_window_and_forgets() -> None:
    guard = SpikeGuard(sigmas=4.0, window=8)
    high = torch.tensor(9.0)
    for index in range(4):
        assert not guard.found(high)
        guard.note(1.0 + index / 10)
    assert guard.found(high)
    other = SpikeGuard(sigmas=4.0, window=8)
    other.load(guard.state())
    assert other.found(high)
    for _ in range(8):
        guard.note(9.0 + torch.rand(()).item())
    assert not guard.found(high)
    assert not SpikeGuard(sigmas=0.0, window=8).found(high)
