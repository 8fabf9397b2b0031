"""transformers' Mamba2ForCausalLM and ours with the same weights, each reading what the other has written.

transformers runs in a process of its own where neither mamba_ssm nor causal_conv1d can be imported, so that what is
compared with is its torch code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paralm.config import ModelConfig
from paralm.errors import ConfigError, RunError
from paralm.interop import load_transformers, save_transformers
from paralm.interop.mamba2 import MAMBA2
from paralm.models import LanguageModel, LayerContext, build_model
from paralm.models.mixers import Mamba2
from paralm.models.parameters import initialize
from paralm.registry import validate_mixer
from tests.peers import run_peer

VOCAB = 61
SIZES = {"d_state": 8, "head_dim": 16, "chunk_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "one-group-tied": {"tie_embeddings": True, "mixer": {"n_groups": 1}},
    "two-groups": {"tie_embeddings": False, "mixer": {"n_groups": 2, "dt_limit": [0.01, 0.5]}},
    "four-groups-biases": {
        "tie_embeddings": False,
        # Two heads a group: with one, the norm undoes a head's scale, and what is left of some gradients is rounding.
        "mixer": {"n_groups": 4, "head_dim": 8, "bias": True, "conv_bias": False},
    },
}

_WHOLE = """
import json, sys
from transformers import Mamba2Config, Mamba2ForCausalLM
assert "mamba_ssm" not in sys.modules and "causal_conv1d" not in sys.modules
def measure(name, model):
    out = model(given["tokens"], use_cache=False)
    (out.logits * given["weights"]).sum().backward()
    result[name + "/logits"] = out.logits
    for key, p in model.named_parameters():
        result[f"{name}/{key}"] = p.grad
    with torch.no_grad():
        cache = model(given["tokens"], use_cache=True).cache
        result[name + "/ssm"] = cache.get_recurrent_state(0, state_idx=0)
for name in CASES:
    model, info = Mamba2ForCausalLM.from_pretrained(f"{FOLDER}/{name}", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    measure(name, model.train())
    torch.manual_seed(1)
    config = {**json.load(open(f"{FOLDER}/{name}/config.json")), "initializer_range": 0.02}
    theirs = Mamba2ForCausalLM(Mamba2Config(**config)).train()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    theirs.save_pretrained(f"{FOLDER}/{name}-theirs", max_shard_size="20KB")
    measure(name + "-theirs", theirs)
"""


def model_of(case: str) -> LanguageModel:
    """A small model with weights away from their special initial values."""
    own = CASES[case]
    config = ModelConfig(
        d_model=32,
        n_layers=2,
        mixer={"name": "mamba2", **SIZES, **own["mixer"]},
        mlp={"enabled": False},  # type: ignore[arg-type]
        tie_embeddings=own["tie_embeddings"],
        embedding_std=0.02,
    )
    model = build_model(config, VOCAB, seed=3)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.05)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights() -> Tensor:
    """What the logits are weighted with, for a loss that every gradient takes part in."""
    return torch.randn(2, 19, VOCAB, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our models as save_transformers writes them, one folder a case."""
    path = tmp_path_factory.mktemp("transformers")
    for case in CASES:
        save_transformers(model_of(case), path / case)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """transformers' numbers: on our folders, and on models of its own that it saved beside them as NAME-theirs."""
    script = f"FOLDER = {str(folder)!r}\nCASES = {list(CASES)!r}\n{_WHOLE}"
    return run_peer("transformers", script, {"tokens": tokens, "weights": weights})


def close(what: str, got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Within ``tolerance`` of the largest value (measured: at most 7e-6 in any gradient, 6e-7 in outputs)."""
    assert got.shape == expected.shape, what
    worst = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()
    assert worst < tolerance, f"{what}: {worst:.1e}"


@pytest.mark.parametrize("suffix", ["", "-theirs"], ids=["they-read-ours", "we-read-theirs"])
@pytest.mark.parametrize("case", CASES)
def test_the_whole_model(
    folder: Path, theirs: dict[str, Tensor], tokens: Tensor, weights: Tensor, case: str, suffix: str
) -> None:
    name = case + suffix
    model = load_transformers(folder / name).train() if suffix else model_of(case)
    if suffix:
        assert len(list((folder / name).glob("*.safetensors"))) > 1  # a sharded index was read
    out = model(tokens)
    close(f"{name} logits", out.logits, theirs[f"{name}/logits"])
    close(f"{name} state", out.state["layers"][0]["ssm"].mT, theirs[f"{name}/ssm"])
    (out.logits * weights).sum().backward()
    gradients = {parameter: p.grad for parameter, p in model.named_parameters()}
    stored = MAMBA2.stored(model)
    assert {f"{name}/{entry.name}" for entry in stored} | {f"{name}/logits", f"{name}/ssm"} == {
        key for key in theirs if key.split("/")[0] == name
    }
    for entry in stored:
        gradient = gradients[entry.parameter]
        assert gradient is not None
        close(f"{name} gradient of {entry.name}", gradient.view(entry.shape), theirs[f"{name}/{entry.name}"])


_MIXER = """
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer
for groups in (1, 2):
    config = Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=groups, chunk_size=8)
    mixer = Mamba2Mixer(config, layer_idx=0).train()
    own = {k.split("/")[1]: v for k, v in given.items() if k.startswith(f"{groups}/")}
    mixer.load_state_dict(own)
    x = given["x"].clone().requires_grad_()
    y = mixer(x)
    (y * given["g"]).sum().backward()
    result[f"{groups}/y"], result[f"{groups}/x"] = y, x.grad
    for key, p in mixer.named_parameters():
        result[f"{groups}/{key}"] = p.grad
"""


def test_the_mixer_alone() -> None:
    draws = torch.Generator().manual_seed(5)
    given = {"x": torch.randn(2, 29, 32, generator=draws), "g": torch.randn(2, 29, 32, generator=draws)}
    names = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias"}
    mixers = {}
    for groups in (1, 2):
        entry, keys = validate_mixer({"name": "mamba2", "n_groups": groups, "head_dim": 16, "d_state": 8})
        mixer = mixers[groups] = entry.value(keys, LayerContext(32))
        assert isinstance(mixer, Mamba2)
        initialize(mixer, groups)
        with torch.no_grad():
            for name, p in mixer.named_parameters():
                p.add_(torch.randn(p.shape, generator=draws), alpha=0.1)
                given[f"{groups}/{names.get(name, name)}"] = p[:, None] if name == "conv_weight" else p
    result = run_peer("transformers", _MIXER, given)
    for groups, mixer in mixers.items():
        x = given["x"].clone().requires_grad_()
        y, _ = mixer(x)
        (y * given["g"]).sum().backward()
        assert x.grad is not None
        close("y", y, result[f"{groups}/y"])
        close("gradient of x", x.grad, result[f"{groups}/x"])
        for name, p in mixer.named_parameters():
            assert p.grad is not None
            close(f"gradient of {name}", p.grad, result[f"{groups}/{names.get(name, name)}"].view(p.shape))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    model = model_of(case).to(dtype)
    save_transformers(model, tmp_path / "out", max_shard_size=9000, special_tokens={"eos_token_id": 2})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    back = load_transformers(tmp_path / "out")
    assert not back.training
    found = dict(back.named_parameters())
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], parameter), name
    assert back.config.mixer.items() >= model.config.mixer.items()
    save_transformers(back, tmp_path / "again", max_shard_size=9000, special_tokens={"eos_token_id": 2})
    for path in sorted((tmp_path / "out").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    wide = load_transformers(tmp_path / "out", dtype=torch.float64)
    assert wide.embedding.weight.dtype == torch.float64


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return rewrite


def _pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _truncated(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _outside(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')


NAME = "backbone.layers.1.mixer.in_proj.weight"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_config(model_type="llama"), ["model_type 'llama'", "mamba2"]),
        (_config(num_heads=5), ["num_heads 5", "head_dim 16", "hidden_size 32"]),
        (_config(num_heads=8, head_dim=8, n_groups=3), ["3 groups", "8 heads"]),
        (_config(hidden_act="gelu"), ["hidden_act", '"gelu"', "silu"]),
        (_config(state_size="eight"), ["state_size", '"eight"', "whole number"]),
        (_config(time_step_limit=[0.5]), ["time_step_limit", "[0.5]"]),
        (_config(time_step_limit=[0.5, 0.1]), ["dt_limit", "0.5", "0.1"]),
        (_config(conv_kernel=1), ["d_conv", "1"]),
        (_config(layer_norm_epsilon=0), ["norm_eps", "0.0", "greater than 0"]),
        (_config(state_size=16), ["backbone.layers.0.mixer.conv1d.weight", "(80, 1, 4)", "(96, 1, 4)"]),
        (_config(vocab_size=62), ["backbone.embeddings.weight", "(61, 32)", "(62, 32)"]),
        (_config(num_hidden_layers=1), ["backbone.layers.1.", "no place"]),
        (_config(tie_word_embeddings=False), ["lm_head.weight", "missing", "(61, 32)"]),
        (_tensors(lambda t: t.pop(NAME)), [NAME, "missing", "(148, 32)"]),
        (_tensors(lambda t: t.update({NAME: t[NAME][1:].clone()})), [NAME, "(147, 32)", "(148, 32)"]),
        (_tensors(lambda t: t.update({NAME: t[NAME].long()})), [NAME, "int64"]),
        (_tensors(lambda t: t.update({"extra": torch.ones(3)})), ["extra", "(3,)"]),
        (_tensors(lambda t: t.update({"lm_head.weight": torch.ones(61, 32)})), ["lm_head.weight", "tied"]),
        (_pickled, ["pytorch_model.bin", "pickle"]),
        (_truncated, ["model.safetensors"]),
        (_outside, ["index.json", "not in its folder"]),
        (lambda path: (path / "config.json").unlink(), ["config.json", "missing"]),
        (lambda path: (path / "config.json").write_text("[]"), ["config.json", "list"]),
        (lambda path: (path / "config.json").write_text("{"), ["config.json", "cannot be read"]),
    ],
)
def test_what_does_not_fit_is_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], parts: list[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "one-group-tied", copy)
    damage(copy)
    with pytest.raises(ConfigError) as caught:
        load_transformers(copy)
    text = str(caught.value)
    assert "\n" not in text
    for part in [str(copy), *parts]:
        assert part in text, text


def test_variants_that_fit(folder: Path, tmp_path: Path) -> None:
    """Tied weights stored twice, a name of older versions, an infinity as transformers 5 tags it."""
    copy = tmp_path / "copy"
    shutil.copytree(folder / "one-group-tied", copy)

    def older(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    _tensors(older)(copy)
    _config(time_step_limit=[0.0, {"__float__": "Infinity"}])(copy)
    back, model = load_transformers(copy), model_of("one-group-tied")
    assert torch.equal(back.embedding.weight, model.embedding.weight)
    assert back.config.mixer["dt_limit"] == [0.0, None]


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"mixer": {"name": "paragru"}}, ["paragru", "mamba2"]),
        ({"mixers": ["mamba2", "paragru"]}, ["mamba2, paragru"]),
        ({"mixer": {"name": "mamba2"}}, ["model.mlp.enabled"]),
        ({"mixer": {"name": "mamba2", "norm_eps": 1e-6}, "mlp": {"enabled": False}}, ["norm_eps", "1e-06", "1e-05"]),
        ({"mixer": {"name": "mamba2"}, "mlp": {"enabled": False}, "logit_cap": 30.0}, ["logit_cap", "30"]),
        ({"mixers": ["mamba2", {"name": "mamba2", "d_state": 8}], "mlp": {"enabled": False}}, ["model.mixers"]),
    ],
)
def test_models_transformers_does_not_have(tmp_path: Path, model: dict[str, Any], parts: list[str]) -> None:
    built = build_model(ModelConfig(d_model=32, n_layers=2, **model), VOCAB, seed=0)
    with pytest.raises(ConfigError) as caught:
        save_transformers(built, tmp_path / "out")
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    model = model_of("two-groups")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"format": "of another program"}')
    for force in (False, True):
        with pytest.raises(RunError, match="not a folder as transformers writes it"):
            save_transformers(model, tmp_path / "mine", force=force)
    save_transformers(model, tmp_path / "out")
    with pytest.raises(RunError, match="--force"):
        save_transformers(model, tmp_path / "out")
    save_transformers(model, tmp_path / "out", force=True)
