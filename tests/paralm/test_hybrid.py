"""Patterns of mixers over the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paralm.config import ModelConfig
from paralm.config_files import load_config
from paralm.errors import ConfigError
from paralm.models import build_model
from paralm.models.hybrid import layer_mixers, mixer_names, mixer_pattern

SIZES: dict[str, Any] = {"d_model": 32, "n_layers": 4}


def test_a_pattern_repeats_over_the_layers() -> None:
    config = ModelConfig(**{**SIZES, "n_layers": 8}, mixers=["paragru*3", "attention"])
    names = [spec["name"] for spec in layer_mixers(config)]
    assert names == ["paragru", "paragru", "paragru", "attention"] * 2
    assert mixer_names(config) == "paragru*3, attention"
    assert mixer_names(ModelConfig()) == "paragru"


def test_keys_of_the_mixer_section_hold_for_its_name_only() -> None:
    mixers = ["paragru", {"name": "paragru", "n_heads": 4}, "paralstm", {"name": "attention", "n_heads": 2, "count": 1}]
    config = ModelConfig(**SIZES, mixer={"name": "paragru", "n_heads": 2, "d_conv": 3}, mixers=mixers)
    assert layer_mixers(config) == [
        {"name": "paragru", "n_heads": 2, "d_conv": 3},
        {"name": "paragru", "n_heads": 4, "d_conv": 3},
        {"name": "paralstm"},
        {"name": "attention", "n_heads": 2},
    ]


def test_a_hybrid_is_a_model_whose_pieces_are_the_whole() -> None:
    config = ModelConfig(**SIZES, mixers=["paragru", "paralstm*2", "attention"])
    model = build_model(config, 50, seed=1, dtype=torch.float64)
    kinds = [type(mixer).__name__ for mixer in model.mixers]
    assert kinds == ["ParaGRUMixer", "ParaLSTMMixer", "ParaLSTMMixer", "Attention"]
    assert not model.bounded_state
    tokens = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(0))
    whole = model(tokens).logits
    first = model(tokens[:, :5])
    rest = model(tokens[:, 5:], state=first.state)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), whole, rtol=1e-9, atol=1e-9)


def test_a_saved_configuration_says_everything_and_means_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {d_model: 32, n_layers: 4, mixers: ['paragru*3', {name: attention, n_heads: 2}]}\n")
    config = load_config(path, []).config
    assert config.model.mixers is not None
    first, second = config.model.mixers
    assert isinstance(first, dict)
    assert first["count"] == 3
    assert first["d_conv"] == 4
    assert isinstance(second, dict)
    assert second["n_heads"] == 2
    assert mixer_names(config.model) == "paragru*3, attention"
    assert load_config(path, ["model.mixers=[attention]"]).config.model.mixers[0]["name"] == "attention"  # type: ignore


@pytest.mark.parametrize(
    ("mixers", "parts"),
    [
        ("[]", ["model.mixers", "empty"]),
        ("[paragru*3]", ["pattern of 3 layers", "n_layers 4"]),
        ("['paragru * x']", ["model.mixers", "'paragru * x'", "NAME*COUNT"]),
        ("[paragru*0, attention]", ["model.mixers", "count", "0"]),
        ("[{count: 2}]", ["model.mixers", "name", "missing"]),
        ("[paragrue]", ["paragrue", "paragru"]),
        ("[{name: paragru, n_head: 2}]", ["n_head", "n_heads"]),
        ("[{name: attention, n_heads: 3}]", ["n_heads", "3", "32"]),
        ("[{name: paragru, n_heads: two}]", ["n_heads", "two"]),
    ],
)
def test_a_pattern_that_cannot_be_is_one_line(tmp_path: Path, mixers: str, parts: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{d_model: 32, n_layers: 4, mixers: {mixers}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [])
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_the_pattern_is_of_entries() -> None:
    assert mixer_pattern(ModelConfig(mixer={"name": "attention"})) == [({"name": "attention"}, 1)]


def test_the_embedding_may_start_at_another_scale() -> None:
    stds = []
    for std in (None, 0.02):
        model = build_model(ModelConfig(**SIZES, embedding_std=std), 4000, seed=0)
        stds.append(float(model.embedding.weight.detach().std()))
    assert abs(stds[0] - 32**-0.5) < 0.01
    assert abs(stds[1] - 0.02) < 0.001
