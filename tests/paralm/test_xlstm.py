"""mLSTM and sLSTM: against the paper's equations in a loop and the `xlstm` package; published sizes, initial values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import paralm_kernels
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paralm.config import ModelConfig
from paralm.config_files import load_config
from paralm.errors import ConfigError
from paralm.interop.xlstm import XLSTM
from paralm.models import LayerContext, Mixer, build_mixer, build_model, flops_per_token
from paralm.models.mixers import MLSTM, SLSTM
from paralm.models.parameters import initialize, specs
from paralm.registry import validate_mixer
from tests.peers import run_peer


def mixer(name: str, d_model: int = 32, layer: int = 0, n_layers: int = 1, noise: float = 0.2, **keys: object) -> Any:
    """A float64 mixer, its weights away from their special initial values unless ``noise`` is 0."""
    entry, config = validate_mixer({"name": name, **keys})
    built = entry.value(config, LayerContext(d_model, layer, n_layers)).double()
    initialize(built, 0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=draws), alpha=noise)
    return built


def x(time: int, batch: int = 2, d_model: int = 32) -> Tensor:
    return torch.randn(batch, time, d_model, generator=torch.Generator().manual_seed(time), dtype=torch.float64)


def head_norm(h: Tensor, block: MLSTM | SLSTM) -> Tensor:
    """(batch, time, head, d_head) → (batch, time, channel), written out."""
    centred = h - h.mean(-1, keepdim=True)
    return (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + block.norm.eps)).flatten(
        2
    ) * block.norm.weight


def mlstm_loop(block: MLSTM, u: Tensor) -> Tensor:
    """The paper's equations with no stabiliser, a token after the other and a head after the other."""
    heads, (batch, time, _) = block.n_heads, u.shape
    w_q, w_k, w_v, w_o = block.in_proj.weight.split((block.qk_dim, block.qk_dim, block.v_dim, block.v_dim))
    cap = block.config.gate_soft_cap
    gates = cap * torch.tanh((u @ block.gates.weight.T + block.gates.bias) / cap)
    q, k, v = ((u @ w.T).view(batch, time, heads, -1) for w in (w_q, w_k, w_v))
    by_head = []
    for head in range(heads):
        c, n = torch.zeros(batch, k.shape[-1], v.shape[-1], dtype=u.dtype), torch.zeros_like(k[:, 0, 0])
        outputs = []
        for t in range(time):
            keep, write = torch.sigmoid(gates[:, t, heads + head, None]), torch.exp(gates[:, t, head, None])
            c = keep[..., None] * c + write[..., None] * k[:, t, head, :, None] * v[:, t, head, None, :]
            n = keep * n + write * k[:, t, head]
            scaled = q[:, t, head] / math.sqrt(q.shape[-1])
            inner = (n * scaled).sum(-1, keepdim=True).abs()
            outputs.append((c * scaled[..., None]).sum(1) / torch.where(inner > 1, inner, torch.ones_like(inner)))
        by_head.append(torch.stack(outputs, 1))
    return (head_norm(torch.stack(by_head, 2), block) * torch.sigmoid(u @ w_o.T)) @ block.out_proj.weight.T


def slstm_loop(block: SLSTM, u: Tensor) -> Tensor:
    """The paper's equations with no stabiliser, torch's own convolution, dense block-diagonal matrices."""
    batch, time, d_model = u.shape
    taps = block.config.d_conv
    mixed = F.silu(F.conv1d(F.pad(u.mT, (taps - 1, 0)), block.conv_weight[:, None], block.conv_bias, groups=d_model).mT)
    dense, recurrent = ([torch.block_diag(*gate) for gate in w] for w in (block.input_weight, block.recurrent))
    inputs = [source @ w.T + b.flatten() for source, w, b in zip((mixed, mixed, u, u), dense, block.bias, strict=True)]
    h = c = n = torch.zeros(batch, d_model, dtype=u.dtype)
    outputs = []
    for t in range(time):
        i, f, z, o = (given[:, t] + h @ r.T for given, r in zip(inputs, recurrent, strict=True))
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    y = head_norm(torch.stack(outputs, 1).view(batch, time, block.n_heads, -1), block)
    return y if block.out_proj is None else y @ block.out_proj.weight.T


@pytest.mark.parametrize(
    ("name", "loop", "keys"),
    [
        ("mlstm", mlstm_loop, {"n_heads": 2}),
        ("mlstm", mlstm_loop, {"n_heads": 4, "chunk_size": 4, "input_gate_bias": 0.0}),
        ("mlstm", mlstm_loop, {"qk_dim_factor": 1, "v_dim_factor": 0.5, "gate_soft_cap": 3.0, "input_gate_bias": 9.0}),
        ("slstm", slstm_loop, {"n_heads": 4}),
        ("slstm", slstm_loop, {"n_heads": 2, "d_conv": 2, "output_projection": True, "norm_eps": 1e-2}),
    ],
)
def test_the_block_is_the_papers(name: str, loop: Callable[[Any, Tensor], Tensor], keys: dict[str, object]) -> None:
    block = mixer(name, **keys)
    given, g = x(13).requires_grad_(), x(13) * 0.3
    parameters = [given, *block.parameters()]
    expected = loop(block, given)
    y = block(given)[0]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad((expected * g).sum(), parameters)
    got = torch.autograd.grad((y * g).sum(), parameters)
    for what, mine, theirs in zip(["x", *dict(block.named_parameters())], got, wanted, strict=True):
        assert theirs.abs().max() > 1e-6, what
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item(), msg=what)


# Against the package `xlstm` (NX-AI), with `mlstm_kernels`.

_STACK = """
from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig
for kernel in ("native_autograd", "native_custbw"):
    config = xLSTMLargeConfig(
        embedding_dim=32, num_heads=2, num_blocks=2, vocab_size=41, qk_dim_factor=0.5, chunk_size=16, mode="train",
        ffn_proj_factor=2.0, chunkwise_kernel="chunkwise--" + kernel, sequence_kernel="native_sequence__native",
        step_kernel="native", autocast_kernel_dtype="float32", return_last_states=True,
    )
    model = xLSTMLarge(config)
    model.load_state_dict({key: given[key] for key in model.state_dict()})
    logits, _ = model(given["tokens"])
    (logits * given["weights"]).sum().backward()
    result[kernel + "/logits"] = logits
    for key, p in model.named_parameters():
        result[f"{kernel}/{key}"] = p.grad
"""


@pytest.fixture(scope="module")
def stack() -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], Tensor]:
    """The peer's results; what each of its tensors is and its gradient here; our logits. Float32, two mLSTM blocks."""
    config = ModelConfig(
        d_model=32,
        n_layers=2,
        mixer={"name": "mlstm", "n_heads": 2, "chunk_size": 8, "input_gate_bias": 0.0},
        mlp={"d_ff": 64},  # type: ignore[arg-type]
        tie_embeddings=False,
        norm_eps=1e-6,
        logit_cap=30.0,
    )
    model = build_model(config, 41, seed=5)
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draws), alpha=0.05)
    tokens = torch.randint(41, (2, 32), generator=draws)
    weights = torch.randn(2, 32, 41, generator=draws)
    logits = model(tokens).logits
    (logits * weights).sum().backward()
    ours = {}
    parameters = dict(model.named_parameters())
    for entry in XLSTM.stored(model):
        p = parameters[entry.parameter]
        assert p.grad is not None
        name = "embedding.weight" if entry.name == "backbone.embeddings.weight" else entry.name
        value, gradient = (part.flatten()[entry.offset : entry.stop].view(entry.shape) for part in (p.detach(), p.grad))
        ours[name] = (value, gradient)
    given = {"tokens": tokens, "weights": weights, **{name: value for name, (value, _) in ours.items()}}
    return run_peer("xlstm", _STACK, given, importable=("mlstm_kernels",)), ours, logits


@pytest.mark.parametrize("kernel", ["native_autograd", "native_custbw"])
def test_the_packages_mlstm_stack(
    stack: tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], Tensor], kernel: str
) -> None:
    """native_custbw's backward leaves the normaliser out of the cell's gradient, as its fused kernels do; the head norm
    after the cell is what makes that right, and so that is where to compare."""
    result, ours, logits = stack
    worst = (logits - result[f"{kernel}/logits"]).abs().max() / logits.abs().max()
    assert worst < 1e-4, worst
    assert {f"{kernel}/{name}" for name in ours} == {k for k in result if k.startswith(kernel)} - {f"{kernel}/logits"}
    for name, (_, gradient) in ours.items():
        # A gate's bias is a weight of its affine map; what a common factor of C and n is worth almost cancels in it.
        alike = ours.get(f"{name.removesuffix('bias')}weight", ours[name])[1]
        scale = torch.maximum(gradient.abs().max(), alike.abs().max())
        assert scale > 0.1, name
        worst = (gradient - result[f"{kernel}/{name}"]).abs().max() / scale
        assert worst < 1e-4, f"{name}: {worst:.1e}"


_SLSTM = """
from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig
from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig
own = dict(num_heads=HEADS, backend="vanilla", dtype="float32", enable_automatic_mixed_precision=False)
cell = sLSTMCell(sLSTMCellConfig(hidden_size=D, **own))
layer = sLSTMLayer(sLSTMLayerConfig(embedding_dim=D, **own))
for name, module, target in (("cell", cell, cell), ("layer", layer, layer.slstm_cell)):
    with torch.no_grad():
        target._recurrent_kernel_.copy_(given["recurrent"])
        target._bias_.copy_(given["bias"])
x = given["inputs"].requires_grad_()
y, state = cell(x)
(y * given["weights"]).sum().backward()
result["cell/y"], result["cell/state"], result["cell/inputs"] = y, state, x.grad
result["cell/recurrent"], result["cell/bias"] = cell._recurrent_kernel_.grad, cell._bias_.grad
with torch.no_grad():  # its own code gives the row i what it calls fgate, and f what it calls igate
    for row, gate in enumerate((layer.fgate, layer.igate, layer.zgate, layer.ogate)):
        gate.weight.copy_(given["input_weight"][row])
    layer.conv1d.conv.weight.copy_(given["conv_weight"][:, None])
    layer.conv1d.conv.bias.copy_(given["conv_bias"])
    layer.group_norm.weight.copy_(given["norm"] - 1)
x = given["x"].requires_grad_()
y = layer(x)
(y * given["g"]).sum().backward()
result["layer/y"], result["layer/x"] = y, x.grad
result["layer/recurrent"], result["layer/bias"] = layer.slstm_cell._recurrent_kernel_.grad, layer.slstm_cell._bias_.grad
gates = (layer.fgate, layer.igate, layer.zgate, layer.ogate)
result["layer/input_weight"] = torch.stack([gate.weight.grad for gate in gates])
result["layer/conv_weight"] = layer.conv1d.conv.weight.grad[:, 0]
result["layer/conv_bias"], result["layer/norm"] = layer.conv1d.conv.bias.grad, layer.group_norm.weight.grad
"""


def test_the_packages_slstm_cell_and_layer() -> None:
    """sLSTMCell, backend vanilla, and the layer around it: forward, final state, every gradient; float32, 1e-5."""
    d_model, heads, time = 32, 4, 23
    block = mixer("slstm", n_heads=heads, norm_eps=1e-5).float()
    assert isinstance(block, SLSTM)
    draws = torch.Generator().manual_seed(2)
    inputs = torch.randn(2, time, 4, heads, d_model // heads, generator=draws, requires_grad=True)
    weights = torch.randn(2, heads, time, d_model // heads, generator=draws)
    u, g = (torch.randn(2, time, d_model, generator=draws) for _ in range(2))

    def theirs(recurrent: Tensor) -> Tensor:
        """R (gate, head, out, in) as they keep it: (head, gate · out, in)."""
        return recurrent.transpose(0, 1).flatten(1, 2)

    given = {
        "recurrent": theirs(block.recurrent.detach()),
        "bias": block.bias.detach().flatten(),
        "inputs": inputs.detach().flatten(2),
        "weights": weights,
        "input_weight": block.input_weight,
        "conv_weight": block.conv_weight,
        "conv_bias": block.conv_bias,
        "norm": block.norm.weight,
        "x": u,
        "g": g,
    }
    result = run_peer("xlstm", f"D, HEADS = {d_model}, {heads}\n{_SLSTM}", given, importable=("mlstm_kernels",))

    def close(what: str, got: Tensor | None, expected: Tensor) -> None:
        assert got is not None, what
        assert got.shape == expected.shape, what
        worst = (got - expected).abs().max() / expected.abs().max()
        assert worst < 1e-5, f"{what}: {worst:.1e}"

    y, state = paralm_kernels.dense_rnn("slstm", inputs, block.recurrent, block.bias)
    (y.transpose(1, 2) * weights).sum().backward()
    close("cell", y.transpose(1, 2), result["cell/y"])
    close("cell state", torch.stack(state).flatten(2), result["cell/state"])
    assert inputs.grad is not None
    assert block.recurrent.grad is not None
    assert block.bias.grad is not None
    close("cell inputs", inputs.grad.flatten(2), result["cell/inputs"])
    close("cell recurrent", theirs(block.recurrent.grad), result["cell/recurrent"])
    close("cell bias", block.bias.grad.flatten(), result["cell/bias"])

    block.zero_grad()
    u = u.clone().requires_grad_()
    y = block(u)[0]
    (y * g).sum().backward()
    close("layer", y, result["layer/y"])
    close("layer x", u.grad, result["layer/x"])
    close("layer recurrent", theirs(block.recurrent.grad), result["layer/recurrent"])
    close("layer bias", block.bias.grad.flatten(), result["layer/bias"])
    for name, p in (("input_weight", block.input_weight), ("norm", block.norm.weight)):
        close(f"layer {name}", p.grad, result[f"layer/{name}"])
    for name, p in (("conv_weight", block.conv_weight), ("conv_bias", block.conv_bias)):
        close(f"layer {name}", p.grad, result[f"layer/{name}"])


# Sizes and initial values.

SEVEN_B: dict[str, Any] = {
    "d_model": 4096,
    "n_layers": 32,
    "vocab_size": 50304,
    "tie_embeddings": False,
    "mlp": {"d_ff": 10944},
    "logit_cap": 30.0,
    "norm_eps": 1e-6,
}
MLSTM_7B = {"name": "mlstm", "n_heads": 8}


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        ({"mixer": MLSTM_7B}, 6_865_424_896),
        ({"mixers": [{**MLSTM_7B, "count": 7}, {"name": "slstm", "n_heads": 8}]}, 6_663_983_552),
        (
            {"mixers": [{**MLSTM_7B, "count": 7}, {"name": "slstm", "n_heads": 8, "output_projection": True}]},
            6_731_092_416,
        ),
    ],
    ids=["mlstm", "28-mlstm-4-slstm", "28-mlstm-4-slstm-with-output-projections"],
)
def test_the_7b_has_as_many_parameters_as_published(layers: dict[str, Any], count: int) -> None:
    """xLSTM-7B to the unit; with sLSTM in every eighth layer, 6.66 and 6.73 thousand millions."""
    model = build_model(ModelConfig(**SEVEN_B, **layers), 50304, seed=0, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


def test_mlstms_initial_values() -> None:
    block = mixer("mlstm", d_model=256, n_layers=8, noise=0.0, n_heads=4)
    q_k_v, o = block.in_proj.weight.split((512, 256))
    assert q_k_v.std().item() == pytest.approx(math.sqrt(2 / (5 * 256)), rel=0.02)
    assert block.out_proj.weight.std().item() == pytest.approx(2 / (8 * math.sqrt(256)), rel=0.02)
    assert not o.any()
    assert not block.gates.weight.any()
    assert block.gates.bias.tolist() == [-10, -10, -10, -10, 3, 4, 5, 6]


@pytest.mark.parametrize(("layer", "exponent"), [(0, 0.3), (4, 0.95), (8, 1.6)])
def test_slstms_initial_values(layer: int, exponent: float) -> None:
    block = mixer("slstm", d_model=256, layer=layer, n_layers=9, noise=0.0, n_heads=4, output_projection=True)
    assert block.input_weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 256)), rel=0.02)
    assert block.out_proj.weight.std().item() == pytest.approx(2 / (9 * math.sqrt(256)), rel=0.02)
    assert not block.recurrent.any()
    i, f, z, o = block.bias
    assert not torch.stack((i, z, o)).any()
    expected = torch.tensor([5 - 12 * (j / 63) ** exponent for j in range(64)], dtype=torch.float64)
    torch.testing.assert_close(f, expected.expand(4, 64), rtol=1e-5, atol=1e-5)
    assert mixer("slstm", d_model=4, noise=0.0, n_heads=4).bias[1].tolist() == [[5.0]] * 4  # a head of one channel


@pytest.mark.parametrize("preset", ["xlstm_7b", "xlstm_mixed_7b"])
def test_the_released_training_starts_all_outputs_alike_and_leaves_embeddings_undecayed(preset: str) -> None:
    """NX-AI/xlstm-jax: feedforward.py has wang_init of the width for proj_down, adamw.yaml decays kernels only."""
    config = load_config(f"model/{preset}", ["model.d_model=256"]).config.model
    model = build_model(config.model_copy(update={"vocab_size": 64}), 64, seed=0)
    for block in model.layers:
        outputs = [block.mlp.down, *([block.mixer.out_proj] if block.mixer.out_proj is not None else [])]
        for output in outputs:
            assert output.weight.std().item() == pytest.approx(2 / (32 * math.sqrt(256)), rel=0.02)
    decays = {name: spec.decay for name, _, spec in specs(model)}
    assert not decays["embedding.weight"]
    assert decays["head.weight"]
    assert decays["blocks.0.mlp.down.weight"]


def test_what_decays() -> None:
    decaying = {
        name: {key for key, _, spec in specs(mixer(name, **keys)) if spec.decay}
        for name, keys in (("mlstm", {}), ("slstm", {"output_projection": True}))
    }
    assert decaying["mlstm"] == {"in_proj.weight", "gates.weight", "out_proj.weight"}
    assert decaying["slstm"] == {"input_weight", "recurrent", "out_proj.weight"}


@pytest.mark.parametrize(("d_model", "heads"), [(32, 1), (320, 2), (4096, 32), (48, 1), (1, None), (2, 1), (194, 1)])
def test_default_heads(d_model: int, heads: int | None) -> None:
    if heads is None:  # d_model 1 has no channel for queries
        with pytest.raises(ConfigError, match="qk_dim_factor"):
            mixer("mlstm", d_model)
        return
    with torch.device("meta"):
        entry, config = validate_mixer({"name": "mlstm"})
        assert entry.value(config, LayerContext(d_model)).n_heads == heads  # type: ignore[attr-defined]


def test_states_are_in_float32_and_bounded_by_the_cap() -> None:
    """Gates wide open for long: numbers grow to e^15 and no further than float32 goes; nothing is lost in bfloat16."""
    block = mixer("mlstm", n_heads=2).bfloat16()
    with torch.no_grad():
        block.gates.bias.fill_(100.0)
    state = block.initial_state(2)
    for _ in range(3):
        y, state = block(torch.randn(2, 200, 32).bfloat16(), state)
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()
        assert all(leaf.dtype == torch.float32 and leaf.isfinite().all() for leaf in state)
    assert state[0].abs().max() > 1e6
    cell = mixer("slstm", n_heads=2).bfloat16()
    y, carried = cell(torch.randn(2, 5, 32).bfloat16(), cell.initial_state(2))
    assert y.dtype == carried["conv"].dtype == torch.bfloat16
    assert all(leaf.dtype == torch.float32 for leaf in carried["cell"])


def test_a_state_counts_the_same_however_long_ago() -> None:
    """Streaming 4000 tokens one by one in float32 stays with the chunks in float64: nothing drifts."""
    block = mixer("mlstm", n_heads=2, input_gate_bias=0.0)
    with torch.no_grad():
        block.gates.bias[2:].fill_(7.0)  # a memory of about 1000 tokens
    given = x(4000, batch=1)
    expected, last = block(given)
    block = block.float()
    state, outputs = None, []
    with torch.no_grad():
        for t in range(4000):
            y, state = block(given[:, t : t + 1].float(), state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=0, atol=2e-4)
    assert state is not None
    for got, wanted in zip(state, last, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-4 * wanted.abs().max().item())


def test_flops() -> None:
    """Matrices by their elements; beside them, by hand: 40 channels of q and k, 80 of v in 2 heads, chunks of 8."""
    block = mixer("mlstm", d_model=80, n_heads=2, chunk_size=8)
    within, state = 2 * (8 + 1) / 2 * (40 + 80), 2 * (2 * 2 * 20 * 40)
    assert block.extra_flops_per_token(100) == within + state
    assert block.extra_flops_per_token(4) == 2 * (4 + 1) / 2 * (40 + 80) + state
    large, largest = (mixer("mlstm", d_model=80, n_heads=2, chunk_size=size) for size in (1000, 256))
    assert large.extra_flops_per_token(4096) == largest.extra_flops_per_token(4096), "a GPU does no larger chunks"
    config = ModelConfig(d_model=32, n_layers=1, mixer={"name": "slstm"}, mlp={"enabled": False})  # type: ignore[arg-type]
    assert flops_per_token(build_model(config, 16, seed=0, device="meta"), 10) == 6 * (8 * 32 * 32 + 16 * 32)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ({"name": "mlstm", "n_heads": 5}, ["n_heads", "5 heads", "16 channels", "qk_dim_factor 0.5"]),
        ({"name": "mlstm", "n_heads": 16, "v_dim_factor": 0.25}, ["16 heads", "8 channels", "v_dim_factor 0.25"]),
        ({"name": "mlstm", "qk_dim_factor": 0.01}, ["0 channels", "qk_dim_factor 0.01"]),
        ({"name": "mlstm", "gate_soft_cap": 100.0}, ["gate_soft_cap", "40", "100"]),
        ({"name": "mlstm", "chunk_size": 0}, ["chunk_size", "0"]),
        ({"name": "slstm", "n_heads": 5}, ["n_heads", "5 heads", "32"]),
        ({"name": "slstm", "method": "magic"}, ["method", "'newton'"]),
    ],
)
def test_impossible_sizes_are_one_line(spec: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_mixer(spec, ModelConfig(d_model=32), 0)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("model.mixer.")
    for part in parts:
        assert part in text


def test_the_registry_has_both_and_the_diagonal_one() -> None:
    built: list[Mixer] = [build_mixer({"name": n}, ModelConfig(d_model=32), 0) for n in ("mlstm", "slstm")]
    assert [type(m) for m in built] == [MLSTM, SLSTM]
    assert type(build_mixer({"name": "slstm_diagonal"}, ModelConfig(d_model=32), 0)) is not SLSTM
