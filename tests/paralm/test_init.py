"""Initial values are a pure function of (seed, parameter name); decay and clamp are explicit for every parameter."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from paralm.config import ModelConfig
from paralm.models import LanguageModel, LayerContext, build_mixer, build_model, constant, declare, flops_per_token
from paralm.models.parameters import generator_for, initialize, parameter_groups, specs


def config(name: str = "paragru", **keys: object) -> ModelConfig:
    top = {key: keys.pop(key) for key in list(keys) if key in ModelConfig.model_fields}
    return ModelConfig(d_model=64, **{"n_layers": 2, **top}, mixer={"name": name, **keys})  # type: ignore[arg-type]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["paragru", "paralstm", "attention"])
def test_same_seed_same_values_another_seed_others(name: str) -> None:
    one, two = (values(build_model(config(name), 100, seed=7)) for _ in range(2))
    other = values(build_model(config(name), 100, seed=8))
    for key in one:
        assert torch.equal(one[key], two[key])
        if one[key].std() > 0 and not key.endswith("norm.weight"):
            assert not torch.equal(one[key], other[key]), key


def test_values_depend_on_the_name_only() -> None:
    """Not on the global generator, on how many layers there are, or on the dtype the values end up in."""
    torch.manual_seed(0)
    small = values(build_model(config(n_layers=2), 100, seed=0))
    torch.manual_seed(1)
    torch.rand(17)
    deep = values(build_model(config(n_layers=3, tie_embeddings=False), 100, seed=0))
    for name, value in small.items():
        if "down" not in name and "out_proj" not in name:  # their scale has the depth in it
            assert torch.equal(value, deep[name]), name
    wide = values(build_model(config(n_layers=2), 100, seed=0, dtype=torch.float64))
    half = values(build_model(config(n_layers=2), 100, seed=0, dtype=torch.bfloat16))
    for name, value in small.items():
        assert torch.equal(value.double(), wide[name])
        assert torch.equal(value.bfloat16(), half[name])


def test_meta_then_empty_then_fill() -> None:
    model = build_model(config(), 100, seed=3, device="meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights(3)
    expected = values(build_model(config(), 100, seed=3))
    for name, value in values(model).items():
        assert torch.equal(value, expected[name]), name


def test_names_give_independent_streams() -> None:
    draws = {torch.randn(4, generator=generator_for(s, n)).sum().item() for s in (0, 1) for n in ("a", "b", "a.b")}
    assert len(draws) == 6


def test_released_recipe() -> None:
    model = build_model(ModelConfig(d_model=1024, n_layers=1, init="released", mixer={"name": "paralstm"}), 50, 0)
    mixer = model.mixers[0]
    recurrent = torch.cat([mixer.recurrent[name].detach() for name in mixer.cell.params])
    # 5 · 1024 draws: the standard deviation's own relative error is 1/√(2n) = 1 %.
    assert float(recurrent.std()) == pytest.approx(2 / math.sqrt(5 * 1024), rel=0.05)
    assert torch.equal(mixer.inputs.bias[0], -torch.linspace(0, 1, 1024))
    assert not mixer.inputs.bias[1:].any()
    width = mixer.inputs.weight.shape[-1]
    assert float(mixer.inputs.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / (2 * width)), rel=0.01)
    assert {group["clamp"] for group in model.parameter_groups()} == {None}


def test_language_model_recipe() -> None:
    model = build_model(ModelConfig(d_model=1024, n_layers=1, mixer={"name": "paragru"}), 50, 0)
    mixer = model.mixers[0]
    recurrent = torch.cat([mixer.recurrent[name].detach() for name in mixer.cell.params])
    assert float(recurrent.std()) == pytest.approx(1 / math.sqrt(1024), rel=0.05)
    assert not mixer.inputs.bias.any()
    width = mixer.inputs.weight.shape[-1]
    assert float(mixer.inputs.weight.detach().abs().max()) == pytest.approx(1 / math.sqrt(width), rel=0.01)
    library = build_model(config(input_bound=1.732), 50, 0).mixers[0].inputs.weight.detach()
    assert float(library.abs().max()) == pytest.approx(math.sqrt(3 / library.shape[-1]), rel=0.01)


@pytest.mark.parametrize("init", ["released", "language_model"])
def test_gate_spread_sets_the_first_gates_biases(init: str) -> None:
    bias = build_model(config("paralstm", init=init, gate_spread=-4), 50, 0).mixers[0].inputs.bias.detach()
    torch.testing.assert_close(bias[0], torch.linspace(0, -4, 64))
    assert not bias[1:].any()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 0.5),
        ({"clamp": 0.9}, 0.9),
        ({"clamp": 1}, 1.0),
        ({"clamp": "none"}, None),
        ({"init": "released"}, None),
        ({"init": "released", "clamp": 0.25}, 0.25),
    ],
)
def test_clamp_of_recurrent_vectors(keys: dict[str, object], expected: float | None) -> None:
    model = build_model(config(**keys), 100, 0)
    (group,) = [g for g in model.parameter_groups() if any("recurrent" in name for name in g["names"])]
    assert group["clamp"] == expected
    assert not group["weight_decay"]


def test_the_clamp_holds_from_the_start() -> None:
    model = build_model(config(clamp=0.01), 100, 0)
    recurrent = [p for name, p in model.named_parameters() if "recurrent" in name]
    assert max(float(p.detach().abs().max()) for p in recurrent) <= 0.01


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(tied: bool) -> None:
    model = build_model(config("paralstm", tie_embeddings=tied), 100, 0)
    groups = model.parameter_groups()
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is model.get_parameter(name)
            matrix = parameter.dim() >= 2 and "conv" not in name and not name.endswith("inputs.bias")
            assert group["weight_decay"] == matrix, name
    assert ("head.weight" in names) == (not tied)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_may_be_left_undecayed_and_flops_stay(tied: bool) -> None:
    with_it, without = (build_model(config(tie_embeddings=tied, embedding_decay=on), 100, 0) for on in (True, False))
    all_decays, decays = ({name for name, _, spec in specs(model) if spec.decay} for model in (with_it, without))
    assert decays == all_decays - {"embedding.weight"}
    assert ("head.weight" in decays) == (not tied)
    assert flops_per_token(without, 16) == flops_per_token(with_it, 16)


@pytest.mark.parametrize(
    ("mixer", "parameter", "maps"),
    [
        ({"name": "paragru", "expand": 2}, "in_proj", (128, 128)),
        ({"name": "mamba2", "d_state": 16, "n_groups": 2}, "in_proj", (128, 128, 32, 32, 2)),
        ({"name": "mlstm", "n_heads": 2}, "in_proj", (32, 32, 64, 64)),
        ({"name": "lstm"}, "in_proj", (64, 64, 64, 64)),
        ({"name": "attention", "n_heads": 4, "n_kv_heads": 2}, "qkv_proj", (64, 32, 32)),
        ({"name": "window_attention", "n_heads": 4, "n_kv_heads": 2}, "attention.qkv_proj", (64, 32, 32)),
        ({"name": "titans_mag", "n_heads": 2, "decay": False}, "memory.gates", (2, 2)),
    ],
)
def test_what_lies_in_one_matrix_is_told_apart(mixer: dict[str, object], parameter: str, maps: tuple[int, ...]) -> None:
    model = build_model(ModelConfig(d_model=64, n_layers=1, mixer=mixer), 100, 0, device="meta")
    (group,) = [g for g in model.parameter_groups() if g["matrix"]]
    assert group["maps"][f"blocks.0.mixer.{parameter}.weight"] == maps
    d_ff = model.layers[0].mlp.d_ff
    assert group["maps"]["blocks.0.mlp.gate_up.weight"] == (d_ff, d_ff)


def test_maps_that_are_not_the_matrix_are_refused() -> None:
    linear = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"Linear.weight is \(6, 4\); maps of \(2, 3\) rows"):
        declare(linear, "weight", constant(0.0), decay=True, maps=(2, 3))


def test_an_undeclared_parameter_is_named() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mystery = nn.Parameter(torch.zeros(3))

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Raw()

    with pytest.raises(ValueError, match=r"inner\.mystery of Raw.*declare"):
        initialize(Around(), 0)
    with pytest.raises(AttributeError, match="Raw has no parameter 'x'"):
        declare(Raw(), "x", constant(0.0), decay=False)


def test_torchs_own_modules_have_defaults() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(8, 8, 4, groups=8))
    initialize(model, 0)
    decays = {name: spec.decay for name, _, spec in specs(model)}
    assert {name for name, decay in decays.items() if decay} == {"0.weight", "1.weight"}
    assert torch.equal(model[2].weight, torch.ones(8))
    assert not model[1].bias.any()
    groups = [(group["names"], group["weight_decay"], group["matrix"]) for group in parameter_groups(model)]
    rest = ["1.bias", "2.weight", "2.bias", "3.weight", "3.bias"]
    assert groups == [(["1.weight"], True, True), (["0.weight"], True, False), (rest, False, False)]


def test_frozen_parameters_are_in_no_group() -> None:
    model = build_model(config(), 100, 0)
    model.embedding.weight.requires_grad_(False)
    assert all("embedding.weight" not in group["names"] for group in model.parameter_groups())


def test_a_model_can_be_pickled() -> None:
    model = build_model(config(), 100, 0)
    again: LanguageModel = pickle.loads(pickle.dumps(model))
    again.init_weights(0)
    for name, value in values(model).items():
        assert torch.equal(value, values(again)[name])


def test_output_projections_shrink_with_depth() -> None:
    """Each adds to the residual stream; 2 n_layers of them keep its variance by std/√(2 n_layers)."""
    stds = {}
    for depth in (1, 4):
        mixer = build_mixer({"name": "paragru"}, ModelConfig(d_model=256, n_layers=depth), 0)
        initialize(mixer, 0)
        stds[depth] = float(mixer.out_proj.weight.detach().std())
    assert stds[1] / stds[4] == pytest.approx(2.0, rel=0.02)
    assert LayerContext(8).n_layers == 1
