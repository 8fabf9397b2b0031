"""Every registered mixer under the laws; and what is particular to each."""

from __future__ import annotations

import math

import paralm_kernels
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paralm.config import ModelConfig
from paralm.errors import ConfigError
from paralm.laws import LAWS, check_mixer
from paralm.models import LayerContext, Mixer, build_mixer
from paralm.models.mixers.base import default_heads
from paralm.models.parameters import initialize
from paralm.registry import MIXERS, validate_mixer

CONFIGS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in MIXERS.names()),
    ("paragru", {"n_heads": 4, "d_conv": 2}),
    ("paragru", {"init": "released", "expand": 2}),
    ("paragru", {"method": "newton"}),
    ("paralstm", {"method": "newton", "n_heads": 2}),
    ("paralstm", {"method": "sequential"}),
    ("attention", {"n_heads": 4, "n_kv_heads": 2}),
    ("attention", {"n_heads": 2, "n_kv_heads": 1, "rope_theta": 100.0}),
    ("window_attention", {"window": 5, "n_heads": 2, "n_kv_heads": 1, "n_persistent": 3}),
    ("titans_memory", {"chunk_size": 4, "n_heads": 2, "memory_depth": 3, "memory_expand": 1, "memory_bias": True}),
    ("titans_memory", {"chunk_size": 7, "memory_depth": 1, "momentum": False, "decay": False, "d_conv": 1}),
    ("titans_mag", {"chunk_size": 4, "n_heads": 2, "memory_expand": 2, "window": 5, "n_persistent": 2}),
    ("titans_mal", {"chunk_size": 4, "memory_expand": 2, "window": 5, "n_persistent": 0, "gate": "full"}),
    ("titans_mac", {"chunk_size": 4, "n_heads": 2, "memory_expand": 2, "n_persistent": 2}),
    ("mamba2", {"n_groups": 2, "head_dim": 16, "d_state": 8, "chunk_size": 4}),
    ("mamba2", {"expand": 1, "head_dim": 8, "d_conv": 2, "bias": True, "conv_bias": False, "dt_limit": [0.01, 0.5]}),
    ("lstm", {"n_heads": 4, "recurrent_init": "uniform"}),
    ("gru", {"n_heads": 2, "d_head": 5}),
    ("elman", {"n_heads": 3, "d_head": 7}),
    ("lstm", {"n_heads": 2, "method": "newton"}),
    ("mlstm", {"n_heads": 2, "chunk_size": 4, "input_gate_bias": 0.0}),
    ("mlstm", {"n_heads": 4, "qk_dim_factor": 0.25, "v_dim_factor": 2, "gate_soft_cap": 5.0, "input_gate_bias": 3.0}),
    ("slstm", {"n_heads": 4, "output_projection": True}),
    ("slstm", {"n_heads": 8, "d_conv": 2, "method": "newton"}),
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=[f"{n}-{c}" for n, c in CONFIGS])
def test_law(name: str, config: dict[str, object], law: str) -> None:
    (result,) = check_mixer(name, config, laws=[law])
    assert result.ok, str(result)


def mixer(name: str, d_model: int = 32, seed: int = 0, **keys: object) -> Mixer:
    built = build_mixer({"name": name, **keys}, ModelConfig(d_model=d_model), 0).double()
    initialize(built, seed)
    return built


def x(time: int, batch: int = 2, d_model: int = 32) -> Tensor:
    return torch.randn(batch, time, d_model, generator=torch.Generator().manual_seed(time), dtype=torch.float64)


@pytest.mark.parametrize("name", ["paragru", "paralstm"])
def test_the_block_is_the_papers(name: str) -> None:
    """Written out again with torch's own convolution, dense block-diagonal matrices and a loop over time."""
    block = mixer(name, n_heads=4)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype), alpha=0.1)
    given = x(11)
    u, gate = (given @ block.in_proj.weight.T).split(32, dim=-1)
    u = F.conv1d(F.pad(u.mT, (3, 0)), block.conv_weight[:, None], block.conv_bias, groups=32).mT
    v = F.silu(u)
    inputs = [
        v @ torch.block_diag(*weight).T + bias
        for weight, bias in zip(block.inputs.weight, block.inputs.bias, strict=True)
    ]
    state = tuple(torch.zeros(2, 32, dtype=torch.float64) for _ in block.cell.state)
    params = tuple(block.recurrent[p] for p in block.cell.params)
    outputs = []
    for t in range(11):
        state = block.cell.step(state, tuple(i[:, t] for i in inputs), params)
        outputs.append(state[-1])
    h = torch.stack(outputs, dim=1)
    normed = h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-5) * block.norm.weight
    expected = (normed * F.silu(gate)) @ block.out_proj.weight.T
    torch.testing.assert_close(block(given)[0], expected, rtol=1e-10, atol=1e-10)


def test_every_method_gives_the_same_block() -> None:
    outputs = []
    for method in ("sequential", "newton", "auto"):
        block = mixer("paralstm", method=method)
        outputs.append(block(x(50))[0])
        assert set(block.stats) == {"newton_iterations", "newton_last_update"}
        if method == "newton":
            assert block.stats["newton_iterations"] > 0
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["paragru", "paralstm"])
@pytest.mark.parametrize("autograd", [True, False])
def test_bfloat16_carries_its_state_in_float32(name: str, autograd: bool) -> None:
    block = mixer(name).bfloat16()
    state = block.initial_state(2)
    with torch.set_grad_enabled(autograd):
        for _ in range(3):
            y, state = block(x(1).bfloat16(), state)
            assert y.dtype == torch.bfloat16
            assert all(leaf.dtype == torch.float32 for leaf in state["cell"])
            assert state["conv"].dtype == torch.bfloat16


def test_attention_is_softmax_over_the_past() -> None:
    """Against the definition: a loop over queries, rotations as complex numbers."""
    block = mixer("attention", n_heads=2)
    given = x(9, batch=1)
    q, k, v = (given @ block.qkv_proj.weight.T).view(1, 9, 3, 2, 16).unbind(2)
    frequency = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    turn = torch.exp(1j * torch.arange(9, dtype=torch.float64)[:, None] * frequency)[None, :, None]

    def rotated(z: Tensor) -> Tensor:
        turned = torch.complex(z[..., :8], z[..., 8:]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    q, k = rotated(q), rotated(k)
    outputs = []
    for i in range(9):
        scores = torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, : i + 1]) / math.sqrt(16)
        outputs.append(torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), v[:, : i + 1]).flatten(1))
    expected = torch.stack(outputs, dim=1) @ block.out_proj.weight.T
    torch.testing.assert_close(block(given)[0], expected, rtol=1e-10, atol=1e-10)


def test_attention_lets_go_of_finished_documents_when_streaming() -> None:
    """The cache holds what some row can still see: here 3 tokens of one row and 5 of the other."""
    block = mixer("attention").eval()
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 9] = reset[1, 7] = True
    state = block(x(12), None, reset)[1]
    assert state["k"].shape[1] == state["v"].shape[1] == 5
    assert state["position"].tolist() == [3, 5]


def test_attention_far_into_a_document() -> None:
    """Rotations at position 10⁷ are as exact as at 0: outputs depend on distances only."""
    block = mixer("attention").float()
    near = block.initial_state(1)
    far = {**near, "position": near["position"] + 10_000_000}
    # No key is cached, so the mask hides nothing and only the angles change; fp32 angles would be off by ~1.
    given = x(8, batch=1).float()
    positions = far["position"][:, None], near["position"][:, None]
    angle = [paralm_kernels.rotary_angles(position, 8, 10_000.0, torch.float32)[0] for position in positions]
    assert not torch.equal(*angle)
    pieces, state = [], far
    for t in range(8):
        y, state = block(given[:, t : t + 1], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), block(given)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ({"name": "paragru", "n_heads": 5}, ["n_heads", "5 heads", "32 channels"]),
        ({"name": "attention", "n_heads": 3}, ["n_heads", "3 heads", "32"]),
        ({"name": "attention", "n_heads": 32}, ["even width"]),
        ({"name": "attention", "n_heads": 4, "n_kv_heads": 3}, ["n_kv_heads", "3", "4"]),
        ({"name": "paragru", "method": "magic"}, ["method", "'sequential'"]),
        ({"name": "paragru", "clamp": -1.0}, ["model.mixer.clamp: ", "greater than 0", "'none'", "got -1.0"]),
        ({"name": "paragru", "d_conv": 1}, ["d_conv", "1"]),
        ({"name": "paralstm", "init": "xavier"}, ["init", "'xavier'"]),
    ],
)
def test_impossible_sizes_are_one_line(spec: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_mixer(spec, ModelConfig(d_model=32), 0)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("model.mixer.")
    for part in parts:
        assert part in text


@pytest.mark.parametrize("channels", [1, 32, 64, 96, 200, 256, 320, 4096])
def test_default_heads_divide(channels: int) -> None:
    heads = default_heads(channels)
    assert channels % heads == 0
    assert channels // heads >= min(64, channels)
    if channels % 2 == 0:
        assert channels % (2 * default_heads(channels, even=True)) == 0


def test_default_width_is_64() -> None:
    assert [default_heads(c) for c in (256, 320, 4096)] == [4, 5, 64]


def test_a_registered_cell_is_a_mixer() -> None:
    import paralm_kernels

    class Leaky(paralm_kernels.Cell):
        name = "leaky-for-test-mixers"
        state = ("h",)
        inputs = ("i",)
        params = ("a",)

        def step(self, state, inputs, params):  # type: ignore[no-untyped-def]
            (h,), (i,), (a,) = state, inputs, params
            return (torch.tanh(a * h + i),)

    paralm_kernels.register(Leaky)
    try:
        for result in check_mixer(Leaky.name):
            assert result.ok, str(result)
        entry, _ = validate_mixer({"name": Leaky.name})
        assert entry.value.__name__ == "LeakyMixer"
        assert LayerContext(32).init == "language_model"
    finally:
        paralm_kernels.cell._registry.pop(Leaky.name)
