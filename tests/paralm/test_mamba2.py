"""The Mamba2 mixer: against the paper's loop, its initial values, what decays, sizes that cannot be."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paralm.config import ModelConfig
from paralm.errors import ConfigError
from paralm.models import LayerContext, build_mixer, build_model, flops_per_token
from paralm.models.mixers import Mamba2
from paralm.models.parameters import initialize, specs
from paralm.registry import validate_mixer


def mixer(d_model: int = 32, n_layers: int = 1, seed: int = 0, **keys: object) -> Mamba2:
    entry, config = validate_mixer({"name": "mamba2", **keys})
    built = entry.value(config, LayerContext(d_model, 0, n_layers)).double()
    initialize(built, seed)
    assert isinstance(built, Mamba2)
    return built


def x(time: int, batch: int = 2, d_model: int = 32) -> Tensor:
    return torch.randn(batch, time, d_model, generator=torch.Generator().manual_seed(time), dtype=torch.float64)


def plain_loop(block: Mamba2, u: Tensor) -> Tensor:
    """The paper's equations, a token after the other and a head after the other, with torch's own convolution."""
    config, (batch, time, _) = block.config, u.shape
    heads, head_dim, groups, n = block.n_heads, block.head_dim, config.n_groups, config.d_state
    d_inner = heads * head_dim
    projected = F.linear(u, block.in_proj.weight, block.in_proj.bias)
    z, xbc, dt = projected[..., :d_inner], projected[..., d_inner:-heads], projected[..., -heads:]
    taps = config.d_conv
    padded = F.pad(xbc.mT, (taps - 1, 0))
    xbc = F.silu(F.conv1d(padded, block.conv_weight[:, None], block.conv_bias, groups=xbc.shape[-1]).mT)
    v = xbc[..., :d_inner].reshape(batch, time, heads, head_dim)
    b = xbc[..., d_inner : d_inner + groups * n].reshape(batch, time, groups, n)
    c = xbc[..., d_inner + groups * n :].reshape(batch, time, groups, n)
    dt = F.softplus(dt + block.dt_bias)
    if config.dt_limit[1] is not None:
        dt = dt.clip(config.dt_limit[0], config.dt_limit[1])
    y = torch.zeros(batch, time, heads, head_dim, dtype=u.dtype)
    for h in range(heads):
        group, a = h // (heads // groups), -torch.exp(block.A_log[h])
        s = torch.zeros(batch, head_dim, n, dtype=u.dtype)
        for t in range(time):
            step = dt[:, t, h, None, None]
            s = torch.exp(step * a) * s + step * v[:, t, h, :, None] * b[:, t, group, None, :]
            y[:, t, h] = (s * c[:, t, group, None, :]).sum(-1) + block.D[h] * v[:, t, h]
    gated = y.reshape(batch, time, d_inner) * F.silu(z)
    by_group = gated.split(d_inner // groups, dim=-1)
    normed = torch.cat([g / torch.sqrt(g.square().mean(-1, keepdim=True) + block.norm.eps) for g in by_group], dim=-1)
    return F.linear(normed * block.norm.weight, block.out_proj.weight, block.out_proj.bias)


@pytest.mark.parametrize(
    "keys",
    [
        {"d_state": 8},
        {"n_groups": 2, "head_dim": 8, "d_state": 8, "chunk_size": 4},
        {"n_groups": 4, "head_dim": 16, "d_state": 5, "chunk_size": 7, "d_conv": 3, "bias": True, "conv_bias": False},
        {"expand": 1, "head_dim": 4, "n_groups": 2, "d_state": 16, "dt_limit": (0.02, 0.3), "norm_eps": 1e-2},
    ],
)
def test_the_block_is_the_papers(keys: dict[str, object]) -> None:
    block = mixer(**keys)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    given, g = x(13).requires_grad_(), x(13) * 0.3
    parameters = [given, *block.parameters()]
    expected = plain_loop(block, given)
    torch.testing.assert_close(block(given)[0], expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad((expected * g).sum(), parameters)
    found = torch.autograd.grad((block(given)[0] * g).sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_chunk_size_changes_nothing() -> None:
    outputs = [mixer(d_state=8, chunk_size=size)(x(41))[0] for size in (1, 4, 64)]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("autograd", [True, False])
def test_bfloat16_carries_its_state_in_float32(autograd: bool) -> None:
    block = mixer(n_groups=2, head_dim=16).bfloat16()
    state = block.initial_state(2)
    with torch.set_grad_enabled(autograd):
        for time in (1, 5, 1):
            y, state = block(x(time).bfloat16(), state)
            assert y.dtype == torch.bfloat16
            assert (state["ssm"].dtype, state["conv"].dtype) == (torch.float32, torch.bfloat16)


def test_a_decay_over_many_tokens_is_not_rounded_away() -> None:
    """In bfloat16 the per-token decay 1 − 1e-4 would be 1: dt, its sums and the state are wider than that."""
    block = mixer(d_state=4).bfloat16()
    with torch.no_grad():
        block.A_log.fill_(0.0)
        block.dt_bias.fill_(math.log(math.expm1(1e-4)))
        block.in_proj.weight[-block.n_heads :].zero_()
    _, before = block(x(8).bfloat16())
    silent = torch.zeros(2, 1000, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        block.conv_bias.fill_(-1e4)  # SiLU of it is 0: nothing is written, only forgotten
        before["conv"] = torch.zeros_like(before["conv"])
        _, after = block(silent, before)
    ratio = after["ssm"] / before["ssm"]
    dt = F.softplus(block.dt_bias.float()).item()  # 1e-4 but for the bias's own rounding
    assert 0.9e-4 < dt < 1.1e-4
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(-1000 * dt)), rtol=1e-4, atol=0)


def test_initial_values_are_as_published() -> None:
    block = mixer(d_model=1024, n_layers=16, head_dim=2, d_state=16)
    heads = block.n_heads
    assert heads == 1024
    a = block.A_log.exp()
    assert 1 <= a.min() < 1.1
    assert 15.9 < a.max() <= 16
    assert abs(a.mean() - 8.5) < 0.5  # uniform, not log-uniform (whose mean is 5.4)
    dt = F.softplus(block.dt_bias)
    assert 0.999e-3 < dt.min() < 1.1e-3
    assert 0.09 < dt.max() < 0.1001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.15  # log-uniform
    assert torch.equal(block.D, torch.ones_like(block.D))
    assert torch.equal(block.norm.weight, torch.ones_like(block.norm.weight))
    for tensor, bound in (
        (block.in_proj.weight, 1 / math.sqrt(1024)),
        (block.out_proj.weight, 1 / math.sqrt(2048) / math.sqrt(16)),
        (block.conv_weight, 0.5),
        (block.conv_bias, 0.5),
    ):
        assert 0.99 * bound < tensor.abs().max() <= bound * (1 + 1e-6)
        assert abs(tensor.std() / (bound / math.sqrt(3)) - 1) < 0.05
    other = mixer(dt_min=1e-5, dt_max=2e-4, dt_floor=1e-4, A_range=(2.0, 3.0), head_dim=1, bias=True)
    assert abs(F.softplus(other.dt_bias).min() - 1e-4) < 1e-9
    assert 2 <= other.A_log.exp().min() <= other.A_log.exp().max() <= 3
    assert not other.in_proj.bias.any()
    assert not other.out_proj.bias.any()


def test_only_the_two_maps_decay() -> None:
    decaying = {name for name, _, spec in specs(mixer(bias=True)) if spec.decay}
    assert decaying == {"in_proj.weight", "out_proj.weight"}
    assert {name for name, _, spec in specs(mixer()) if spec.matrix} == decaying


@pytest.mark.parametrize(("d_model", "heads"), [(32, 1), (320, 10), (768, 24), (100, 2), (37, 1)])
def test_default_sizes_fit(d_model: int, heads: int) -> None:
    block = mixer(d_model=d_model)
    assert (block.n_heads, block.n_heads * block.head_dim) == (heads, 2 * d_model)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"head_dim": 48}, ["head_dim: 48", "64 channels"]),
        ({"head_dim": 128}, ["head_dim: 128", "64 channels"]),
        ({"head_dim": 16, "n_groups": 3}, ["n_groups: 3", "4 heads"]),
        ({"n_groups": 2}, ["n_groups: 2", "1 heads"]),
        ({"chunk_size": 0}, ["chunk_size", "got 0"]),
        ({"d_state": -1}, ["d_state", "got -1"]),
        ({"d_conv": 1}, ["d_conv", "got 1"]),
        ({"dt_min": 0.2}, ["dt_min", "0.2", "0.1"]),
        ({"dt_limit": [0.2, 0.1]}, ["dt_limit", "0.2", "0.1"]),
        ({"A_range": [5, 2]}, ["A_range", "5", "2"]),
        ({"A_range": [0, 2]}, ["A_range", "greater than 0"]),
        ({"n_head": 2}, ["n_head", "no such key"]),
    ],
)
def test_impossible_sizes_are_one_line(keys: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_mixer({"name": "mamba2", **keys}, ModelConfig(d_model=32), 0)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("model.mixer.")
    for part in parts:
        assert part in text, text


def test_flops_are_those_of_the_chunk_form() -> None:
    """Of the matrices, two each; within a chunk of 4 a token sees 2.5 on average; the state is read and written."""
    config = ModelConfig(
        d_model=32,
        n_layers=1,
        mixer={"name": "mamba2", "d_state": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
        mlp={"enabled": False},  # type: ignore[arg-type]
    )
    model = build_model(config, 50, seed=0, device="meta")
    matrices = 50 * 32 + 32 * (2 * 64 + 2 * 2 * 8 + 4) + 64 * 32
    within, across = 2 * 2.5 * (2 * 8 + 64), 4 * 64 * 8
    assert flops_per_token(model, 100) == 3 * (2 * matrices + within + across)
