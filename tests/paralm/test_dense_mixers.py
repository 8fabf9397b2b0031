"""LSTM, GRU and Elman's network as mixers: what they compute, how they start, and torch's weights in and out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paralm.config import ModelConfig
from paralm.errors import ConfigError
from paralm.interop.torch_rnn import load_torch_rnn, to_torch_rnn
from paralm.models import build_mixer
from paralm.models.mixers import DenseMixer
from paralm.models.parameters import initialize

MODULES: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}


def mixer(name: str, d_model: int = 32, dtype: torch.dtype = torch.float64, **keys: object) -> DenseMixer:
    built = build_mixer({"name": name, **keys}, ModelConfig(d_model=d_model), 0).to(dtype)
    initialize(built, 0)
    assert isinstance(built, DenseMixer)
    return built


def x(time: int = 11, d_model: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, time, d_model, generator=torch.Generator().manual_seed(time), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_torchs_weights_load(name: str, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    """The module with the mixer's output projection after it, in outputs, final state and gradients."""
    torch.manual_seed(1)
    module = MODULES[name](32, 24, batch_first=True, bias=bias, dtype=dtype)
    ours = mixer(name, n_heads=1, d_head=24, dtype=dtype)
    load_torch_rnn(ours, module)
    given = x(dtype=dtype)
    results = []
    for run in (ours, module):
        own = given.clone().requires_grad_()
        y, end = run(own)
        if run is module:
            y = ours.out_proj(y)
            end = tuple(part[0].unsqueeze(1) for part in (end if isinstance(end, tuple) else (end,)))
        weights = (ours.in_proj.weight, ours.recurrent) if run is ours else (module.weight_ih_l0, module.weight_hh_l0)
        grads = torch.autograd.grad((y**2).sum() + sum((part**2).sum() for part in end), [own, *weights])
        results.append([y, *end, grads[0], grads[1], grads[2].flatten()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_weights_go_back_to_torch(name: str) -> None:
    ours = mixer(name, n_heads=1, d_head=24)
    with torch.no_grad():
        ours.bias.normal_()
    module = to_torch_rnn(ours)
    assert isinstance(module, MODULES[name])
    torch.testing.assert_close(ours.out_proj(module(x())[0]), ours(x())[0], rtol=1e-10, atol=1e-10)
    again = mixer(name, n_heads=1, d_head=24)
    load_torch_rnn(again, module)
    for key, value in ours.state_dict().items():
        if not key.startswith("out_proj"):
            assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", MODULES)
def test_heads_are_networks_side_by_side(name: str) -> None:
    """Two heads of 16 are two torch modules of 16 that read the same input."""
    ours = mixer(name, n_heads=2)
    with torch.no_grad():
        ours.bias.normal_()
    outputs = []
    for head in range(2):
        alone = mixer(name, n_heads=1, d_head=16)
        alone.in_proj.weight.data = ours.in_proj.weight.view(-1, 2, 16, 32)[:, head].reshape(-1, 32)
        alone.recurrent.data, alone.bias.data = ours.recurrent[:, head : head + 1], ours.bias[:, head : head + 1]
        outputs.append(to_torch_rnn(alone)(x())[0])
    expected = ours.out_proj(torch.cat(outputs, -1))
    torch.testing.assert_close(ours(x())[0], expected, rtol=1e-10, atol=1e-10)


def test_how_they_start() -> None:
    lstm = mixer("lstm", n_heads=4, forget_bias=2.0)
    assert lstm.bias.shape == (4, 4, 8)
    assert (lstm.bias[1] == 2).all()
    assert not lstm.bias[[0, 2, 3]].any()
    eye = torch.eye(8, dtype=torch.float64).expand(4, 4, 8, 8)
    torch.testing.assert_close(lstm.recurrent @ lstm.recurrent.mT, eye, rtol=1e-5, atol=1e-5)
    assert len(set(lstm.recurrent[..., 0, 0].flatten().tolist())) == 16
    gru = mixer("gru", n_heads=4, recurrent_init="uniform")
    assert gru.bias.shape == (4, 4, 8)
    assert not gru.bias.any()
    assert 0.3 < gru.recurrent.abs().max() <= 8**-0.5


@pytest.mark.parametrize("autograd", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_carries_its_state_in_float32(name: str, autograd: bool) -> None:
    ours = mixer(name).bfloat16()
    state = ours.initial_state(2)
    with torch.set_grad_enabled(autograd):
        for _ in range(3):
            y, state = ours(x(1).bfloat16(), state)
            assert y.dtype == torch.bfloat16
            assert all(leaf.dtype == torch.float32 for leaf in state)


@pytest.mark.parametrize(
    ("name", "keys", "module", "parts"),
    [
        ("lstm", {}, nn.GRU(32, 32), ["the mixer is lstm, which takes torch.nn.LSTM", "got torch.nn.GRU"]),
        ("lstm", {}, nn.LSTM(32, 32, num_layers=2), ["2 layers", "one layer"]),
        ("gru", {}, nn.GRU(32, 32, bidirectional=True), ["bidirectional=True", "one direction"]),
        ("lstm", {}, nn.LSTM(32, 32, proj_size=8), ["proj_size=8", "no projection"]),
        ("elman", {}, nn.RNN(32, 32, nonlinearity="relu"), ["nonlinearity='relu'", "'tanh'"]),
        ("lstm", {"n_heads": 2}, nn.LSTM(32, 32), ["n_heads 2", "d_head 16", "hidden_size 32"]),
        ("lstm", {"n_heads": 1}, nn.LSTM(16, 32), ["d_model 32", "input_size 16"]),
        ("lstm", {"n_heads": 1}, nn.LSTM(32, 48), ["d_head 32", "hidden_size 48"]),
    ],
)
def test_another_modules_weights_are_refused(
    name: str, keys: dict[str, object], module: nn.RNNBase, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_torch_rnn(mixer(name, dtype=torch.float32, **{"n_heads": 1, **keys}), module)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_several_heads_are_no_torch_module() -> None:
    with pytest.raises(ConfigError, match="the mixer has 4 heads, a torch module has one"):
        to_torch_rnn(mixer("gru", n_heads=4))


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"n_heads": 5}, ["model.mixer.n_heads", "5 heads do not divide model.d_model 32", "d_head"]),
        ({"recurrent_init": "zeros"}, ["model.mixer.recurrent_init", "'orthogonal'", "got 'zeros'"]),
        ({"forget_bias": 1.0}, ["model.mixer.forget_bias", "'gru'"]),
    ],
)
def test_impossible_keys_are_one_line(keys: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        mixer("gru", **keys)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
