"""Titans and window attention against their definitions written out; sizes; stability where training starts."""

from __future__ import annotations

import math
from typing import Any

import paralm_kernels
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paralm.config import ModelConfig
from paralm.errors import ConfigError
from paralm.models import Mixer, build_mixer, build_model
from paralm.models.mixers.neural_memory import NeuralMemoryLayer
from paralm.models.parameters import initialize

SMALL: dict[str, Any] = {"n_heads": 2, "chunk_size": 4, "memory_expand": 2}


def mixer(name: str, seed: int = 0, **keys: Any) -> Mixer:
    built = build_mixer({"name": name, **keys}, ModelConfig(d_model=16), 0).double()
    initialize(built, seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64), alpha=0.1)
    return built


def x(time: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, time, 16, generator=torch.Generator().manual_seed(time), dtype=torch.float64)


def rms(z: Tensor, weight: Tensor) -> Tensor:
    return z / torch.sqrt(z.square().mean(-1, keepdim=True) + 1e-5) * weight


def memory_written_out(layer: NeuralMemoryLayer, given: Tensor) -> Tensor:
    """The layer's output: torch's convolution, and a loop over tokens with autograd's inner gradient."""

    def projected(part: Any) -> Tensor:
        z = given @ part.weight.T
        z = F.conv1d(F.pad(z.mT, (3, 0)), part.conv_weight[:, None], part.conv_bias, groups=16).mT
        return F.silu(z).unflatten(-1, (2, 8))

    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in map(projected, (layer.q_proj, layer.k_proj)))
    raw = (given @ layer.gates.weight.T + layer.gates.bias).unflatten(-1, (3, 2))
    eta, alpha = raw[..., 1, :].sigmoid(), raw[..., 2, :].sigmoid()
    theta = layer.gates.max_rate * (1 - eta) * raw[..., 0, :].sigmoid()
    weights = [layer.memory_weight_0, layer.memory_weight_1]
    gates = (theta, eta.log(), (1 - alpha).log())
    keys: dict[str, Any] = {"norm": layer.memory_gain, "chunk_size": 4, "method": "reference"}
    y, _ = paralm_kernels.neural_memory(q, k, projected(layer.v_proj), *gates, weights, **keys)
    y = rms(y, layer.norm.weight) * (given @ layer.gate_proj.weight.T).sigmoid()[..., None]
    return y.flatten(2) @ layer.out_proj.weight.T


def attention_written_out(part: Any, given: Tensor, window: int) -> Tensor:
    """A loop over queries; rotations as complex numbers; persistent tokens scored by the unrotated query."""
    heads, width = part.n_heads, part.d_head

    def split(z: Tensor) -> tuple[Tensor, ...]:
        return (z @ part.qkv_proj.weight.T).unflatten(-1, (3, heads, width)).unbind(-3)

    q, k, v = split(given)
    _, p_k, p_v = split(part.persistent)
    frequency = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    turn = torch.exp(1j * torch.arange(given.shape[1], dtype=torch.float64)[:, None] * frequency)[None, :, None]

    def rotated(z: Tensor) -> Tensor:
        turned = torch.complex(z[..., : width // 2], z[..., width // 2 :]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    r_q, r_k = rotated(q), rotated(k)
    outputs = []
    for i in range(given.shape[1]):
        near = slice(max(0, i - window + 1), i + 1)
        scores = torch.einsum("bhd,bjhd->bhj", r_q[:, i], r_k[:, near])
        scores = torch.cat((torch.einsum("bhd,jhd->bhj", q[:, i], p_k), scores), dim=-1)
        weight = (scores / math.sqrt(width)).softmax(-1)
        values = torch.cat((p_v.expand(len(v), -1, -1, -1), v[:, near]), dim=1)
        outputs.append(torch.einsum("bhj,bjhd->bhd", weight, values).flatten(1))
    return torch.stack(outputs, dim=1)


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [1, 5, 100, 140, 150])
def test_window_attention_is_softmax_over_the_window(window: int) -> None:
    block = mixer("window_attention", n_heads=2, window=window, n_persistent=3)
    given = x(150)
    same(block(given)[0], attention_written_out(block.attention, given, window) @ block.out_proj.weight.T)


def test_pieces_of_many_blocks_are_the_whole() -> None:
    """Pieces within and beyond the window and its blocks, with resets; outputs, state, gradients."""
    block = mixer("window_attention", n_heads=2, window=140, n_persistent=1)
    given, reset = x(381), torch.zeros(2, 381, dtype=torch.bool)
    reset[0, 33] = reset[1, 250] = True
    results = []
    for pieces in ([381], [30, 200, 1, 150], [140, 141, 100]):
        state, outputs, part = None, [], given.clone().requires_grad_()
        for piece, cut in zip(part.split(pieces, 1), reset.split(pieces, 1), strict=True):
            y, state = block(piece, state, cut)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        results.append((y, *state.values(), torch.autograd.grad(y.sin().sum() + state["v"].sum(), part)[0]))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            same(got, expected)


def test_a_wide_window_is_attention() -> None:
    block, full = mixer("window_attention", n_heads=2, n_kv_heads=1), mixer("attention", n_heads=2, n_kv_heads=1)
    full.qkv_proj.load_state_dict(block.attention.qkv_proj.state_dict())
    full.out_proj.load_state_dict(block.out_proj.state_dict())
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[0, 7] = reset[1, 20] = True
    same(block(x(30), None, reset)[0], full(x(30), None, reset)[0])


def test_far_into_a_document() -> None:
    """Outputs depend on distances only, persistent tokens included: position 10⁷ is as good as 0."""
    block = mixer("window_attention", n_heads=2, window=5, n_persistent=3)
    near = block.initial_state(2, dtype=torch.float64)
    state = block(x(9), near)[1]
    far = block(x(9), {**near, "position": near["position"] + 10_000_000})
    assert not torch.equal(far[1]["k"], state["k"])
    torch.testing.assert_close(block(x(8), far[1])[0], block(x(8), state)[0], rtol=1e-7, atol=1e-7)


def test_the_memory_layer() -> None:
    block = mixer("titans_memory", **SMALL)
    same(block(x(11))[0], memory_written_out(block.memory, x(11)))


def test_what_a_memory_recalls() -> None:
    """Reads of the weights at the chunk's start, whatever was written since, by the queries as ever; normed."""
    layer = mixer("titans_memory", **SMALL).memory
    memory = layer(x(6))[1]["memory"]  # two tokens into a chunk
    z, part = x(5), layer.q_proj
    z = F.conv1d(F.pad((z @ part.weight.T).mT, (3, 0)), part.conv_weight[:, None], part.conv_bias, groups=16).mT
    q = F.silu(z).unflatten(-1, (2, 8))
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    read = paralm_kernels.read_memory(q, memory["start_weights"], norm=layer.memory_gain)
    same(layer(x(5), None, None, memory)[0], rms(read, layer.norm.weight).flatten(2))


def test_mag_and_mal() -> None:
    given = x(11)
    mag = mixer("titans_mag", **SMALL, window=5, n_persistent=3)
    y = rms(attention_written_out(mag.attention, given, 5), mag.attention_norm.weight)
    m = rms(memory_written_out(mag.memory, given), mag.memory_norm.weight)
    same(mag(given)[0], (y * F.silu(m)) @ mag.out_proj.weight.T)
    mal = mixer("titans_mal", **SMALL, window=5, n_persistent=3)
    m = rms(memory_written_out(mal.memory, given), mal.memory_norm.weight)
    same(mal(given)[0], attention_written_out(mal.attention, m, 5) @ mal.out_proj.weight.T)


def test_mac() -> None:
    """Segment by segment: h from the memory that the tokens before the segment left, then attention over p, h and the
    segment up to the token, then the memory reads what attention gave."""
    mac = mixer("titans_mac", **SMALL, n_persistent=3)
    given, attention = x(11), mac.attention
    written = torch.zeros(2, 0, 16, dtype=torch.float64)
    outputs = []
    for begin in range(0, 11, 4):
        segment = given[:, begin : begin + 4]
        before = mac.memory(written)[1]["memory"] if begin else mac.memory.initial_state(2)["memory"]
        h = mac.memory(given[:, : begin + 4], None, None, before)[0][:, begin:]
        ys = []
        for i in range(segment.shape[1]):
            # the two halves share positions, so each is the definition's loop over one half with the other's softmax
            q, k, v = ((segment[:, : i + 1] @ attention.qkv_proj.weight.T).unflatten(-1, (3, 2, 8))).unbind(-3)
            _, k_h, v_h = ((h[:, : i + 1] @ attention.qkv_proj.weight.T).unflatten(-1, (3, 2, 8))).unbind(-3)
            _, p_k, p_v = ((attention.persistent @ attention.qkv_proj.weight.T).unflatten(-1, (3, 2, 8))).unbind(-3)
            place = torch.arange(i + 1)[None]
            turned = attention.rotate(q, place)[:, i]
            scores = [
                torch.einsum("bhd,jhd->bhj", q[:, i], p_k),
                *(torch.einsum("bhd,bjhd->bhj", turned, attention.rotate(z, place)) for z in (k_h, k)),
            ]
            weight = (torch.cat(scores, -1) / math.sqrt(8)).softmax(-1)
            values = torch.cat((p_v.expand(2, -1, -1, -1), v_h, v), dim=1)
            ys.append(torch.einsum("bhj,bjhd->bhd", weight, values).flatten(1))
        y = torch.stack(ys, dim=1) @ mac.attention_proj.weight.T
        written = torch.cat((written, y), dim=1)
        m = memory_written_out(mac.memory, written)[:, begin:]
        gated = rms(y, mac.attention_norm.weight) * F.silu(rms(m, mac.memory_norm.weight))
        outputs.append(gated @ mac.out_proj.weight.T)
    same(mac(given)[0], torch.cat(outputs, dim=1))


def test_ablations_change_the_output() -> None:
    """No momentum, no decay, no convolution, no norm, a linear memory: each is another function, and none fails."""
    outputs = [
        mixer("titans_memory", **{**SMALL, **change})(x(19))[0]
        for change in (
            {},
            *({name: False} for name in ("momentum", "decay", "memory_norm")),
            {"d_conv": 1},
            {"memory_depth": 1},
        )
    ]
    for n, one in enumerate(outputs):
        assert all(float((one - other).detach().abs().max()) > 1e-3 for other in outputs[:n])


@pytest.mark.parametrize(("chunk", "largest"), [(1, 0.25), (16, 1 / 16)])
def test_initial_values(chunk: int, largest: float) -> None:
    """Gates without input, and the sizes of weights, as the module's docstring says them."""
    built = build_mixer({"name": "titans_memory", "n_heads": 4, "chunk_size": chunk}, ModelConfig(d_model=256), 0)
    initialize(built, 0)
    layer = built.memory
    rate, log_momentum, log_keep = layer.gates(torch.zeros(1, 1, 256))
    torch.testing.assert_close(log_momentum.exp(), torch.full((1, 1, 4), 0.5))
    torch.testing.assert_close(rate / 0.5, torch.full((1, 1, 4), largest / 2))
    torch.testing.assert_close(-log_keep.expm1()[0, 0], torch.logspace(-1, -3, 4), rtol=1e-4, atol=0)
    for weight, fan_in in ((layer.memory_weight_0, 64), (layer.memory_weight_1, 256)):
        assert float(weight.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.05)
    assert float(layer.gates.weight.detach().std()) == pytest.approx(math.sqrt(2 / (5 * 256)) / 4, rel=0.1)
    assert bool((layer.memory_gain == 1).all())


@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("momentum", [-3.0, 0.0, 3.0])
def test_where_training_starts_the_memory_learns(chunk: int, momentum: float) -> None:
    """Random tokens of a vocabulary of 64: what the memory has read it predicts better than at its start, and it stays
    of its size, whatever η is."""
    block = build_mixer({"name": "titans_memory", "n_heads": 1, "chunk_size": chunk}, ModelConfig(d_model=64), 0)
    initialize(block, 0)
    layer = block.memory
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randn(64, 64, generator=draws)[torch.randint(0, 64, (1, 2048), generator=draws)]
    with torch.no_grad():
        layer.gates.bias[1] = momentum
        layer.gates.bias[2] = math.log(0.01 / 0.99)
        k = layer._unit(layer.k_proj(tokens, None, None)[0])
        v = layer.v_proj(tokens, None, None)[0].unsqueeze(2)
        memory = block(tokens)[1]["memory"]["weights"]
        first = [w[None] for w in layer._first()[0]]
        read = [paralm_kernels.read_memory(k, w, norm=layer.memory_gain) for w in (first, memory)]
        losses = [(predicted - v).square().sum(-1).mean() for predicted in read]
    assert losses[1] < 0.95 * losses[0]
    assert all(b.norm() < 2 * a.norm() for a, b in zip(first, memory, strict=True))


def test_the_7b_mag_to_the_unit() -> None:
    """24 layers of 4096: attention 32 × 128 over 2048 tokens, memory 32 × 128 of two layers 4×, 16 persistent tokens,
    SwiGLU 11008, vocabulary 32000 untied; the gain of the memory's norm is d_model more a layer."""
    sizes: dict[str, Any] = {
        "d_model": 4096,
        "n_layers": 24,
        "vocab_size": 32000,
        "tie_embeddings": False,
        "mlp": {"d_ff": 11008},
    }
    keys = {"name": "titans_mag", "n_heads": 32, "n_attention_heads": 32, "window": 2048, "n_persistent": 16}
    for gate, expected in (("headwise", 6_846_457_088), ("full", 7_245_964_544)):
        for norm in (False, True):
            mixer = {**keys, "gate": gate, "memory_norm": norm}
            model = build_model(ModelConfig(**sizes, mixer=mixer), 32000, 0, device="meta")
            assert sum(p.numel() for p in model.parameters()) == expected + 24 * 4096 * norm


def test_bfloat16_carries_its_memory_in_float32() -> None:
    for name in ("titans_memory", "titans_mag", "titans_mal", "titans_mac"):
        block = mixer(name, **SMALL).bfloat16()
        y, state = block(x(9).bfloat16())
        y, state = block(x(1).bfloat16(), state)
        assert y.dtype == torch.bfloat16
        memory = state["memory"]["memory"] if name != "titans_memory" else state["memory"]
        assert {w.dtype for w in (*memory["weights"], *memory["momentum_weights"])} == {torch.float32}


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"name": "titans_memory", "n_heads": 3}, ["n_heads", "3 heads", "32"]),
        ({"name": "titans_mag", "n_attention_heads": 32}, ["n_attention_heads", "32 heads", "even width"]),
        ({"name": "titans_mac", "n_heads": 5}, ["n_heads", "5 heads", "32"]),
        ({"name": "titans_memory", "rate_init": 0.3, "max_rate": 0.2}, ["rate_init", "0.3", "max_rate", "0.2"]),
        ({"name": "titans_mal", "chunk_size": 0}, ["chunk_size", "0"]),
        ({"name": "titans_mal", "window": 0}, ["window", "0"]),
        ({"name": "titans_memory", "activation": "relu"}, ["activation", "'relu'"]),
        ({"name": "window_attention", "n_heads": 4, "n_kv_heads": 3}, ["n_kv_heads", "3", "4"]),
        ({"name": "window_attention", "n_persistent": -1}, ["n_persistent", "-1"]),
    ],
)
def test_impossible_sizes_are_one_line(keys: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_mixer(keys, ModelConfig(d_model=32), 0)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("model.mixer.")
    for part in parts:
        assert part in text
