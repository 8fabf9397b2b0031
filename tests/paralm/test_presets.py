"""Every model preset can be built, and has the size that is stated for it: the published ones to the unit."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from paralm import resources
from paralm.config_files import load_config
from paralm.models import build_model
from paralm.planning import plan_model

PUBLISHED = {
    "mamba2_2.7b": 2_702_599_680,
    "mamba2_7b": 7_285_403_648,
    "xlstm_7b": 6_865_424_896,
}
"""From the papers' code; the others are counts of ours, stated so that none changes unseen."""

STATED = {
    "mamba2_1.3b": 1_343_757_312,
    "mamba2_10m": 9_271_720,
    "mamba2_130m": 128_989_632,
    "mamba2_400m": 368_346_624,
    "paragru_1.3b": 1_226_737_664,
    "paragru_10m": 9_944_000,
    "paragru_130m": 131_682_048,
    "paragru_400m": 382_215_168,
    "paragru_7b": 6_945_738_752,
    "paralstm_1.3b": 1_226_835_968,
    "paralstm_10m": 9_948_480,
    "paralstm_130m": 131_703_552,
    "paralstm_400m": 382_272_512,
    "paralstm_7b": 6_946_033_664,
    "titans_mac_10m": 11_109_835,
    "titans_mag_1.3b": 1_319_654_496,
    "titans_mag_10m": 10_597_835,
    "titans_mag_130m": 123_526_888,
    "titans_mag_400m": 382_160_064,
    "titans_mag_7b": 6_846_555_392,
    "titans_mal_10m": 10_596_235,
    "transformer_1.3b": 1_317_373_952,
    "transformer_10m": 10_203_840,
    "transformer_130m": 123_587_328,
    "transformer_400m": 405_726_208,
    "transformer_7b": 6_713_249_792,
    "xlstm_1.3b": 1_420_839_104,
    "xlstm_10m": 10_224_056,
    "xlstm_130m": 123_670_368,
    "xlstm_400m": 406_856_896,
    "xlstm_mixed_10m": 10_019_568,
    "xlstm_mixed_7b": 6_663_983_552,
}

COUNTS = PUBLISHED | STATED
PRESETS = [name.removeprefix("model/") for name in resources.presets() if name.startswith("model/")]


def test_every_preset_is_stated() -> None:
    assert sorted(PRESETS) == sorted(COUNTS)


@pytest.mark.parametrize("family", ["paragru", "paralstm", "mamba2", "xlstm", "titans_mag", "transformer"])
def test_every_architecture_has_every_size(family: str) -> None:
    assert {f"{family}_{size}" for size in ("10m", "130m", "400m", "1.3b", "7b")} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_size_is_the_stated_one(name: str) -> None:
    config = load_config(f"model/{name}", []).config
    plan = plan_model(config.model, 4096, seq_len=2048)
    assert plan.parameters == sum(part.parameters for part in plan.parts) == COUNTS[name]
    assert (plan.state_elements is None) == name.startswith("transformer")


@pytest.mark.parametrize(("name", "heads"), [("transformer_7b", 32), ("transformer_1.3b", 16)])
def test_large_baselines_have_llama_2s_heads_of_128(name: str, heads: int) -> None:
    (mixer, *_) = build_model(load_config(f"model/{name}").config.model, 4096, seed=0, device="meta").mixers
    assert (mixer.n_heads, mixer.n_kv_heads, mixer.d_head) == (heads, heads, 128)


def test_the_state_that_is_planned_is_the_state_that_is() -> None:
    heads = [f"model.mixer.{key}=2" for key in ("n_heads", "n_attention_heads")]
    config = load_config("model/titans_mag_10m", ["model.d_model=32", "model.n_layers=2", *heads]).config
    plan = plan_model(config.model, 300, seq_len=64)
    model = build_model(config.model, 300, seed=0)
    with torch.no_grad():
        state = model(torch.zeros(1, 3, dtype=torch.int64)).state
    assert plan.state_elements == sum(leaf.numel() for leaf in pytree.tree_leaves(state))


COMPARED = [name for name in resources.presets() if name.startswith("compare/")]


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared_differs_in_the_architecture_only(name: str) -> None:
    """Parameters within 4 % of the base's; the same text, tokens, optimizer and evaluation."""
    base, config = (load_config(which, []).config for which in ("compare/paragru", name))
    sizes = [plan_model(c.model, c.data.tokenizer.vocab_size, c.training.seq_len).parameters for c in (base, config)]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.04
    for section in ("data", "training", "optimizer", "eval"):
        assert getattr(config, section) == getattr(base, section), section
    assert config.run.seed == base.run.seed
    assert config.run.name == name.replace("/", "-")


def test_every_architecture_is_compared() -> None:
    assert {name.removeprefix("compare/") for name in COMPARED} == {
        *("paragru", "paralstm", "mamba2", "xlstm", "titans", "transformer")
    }
