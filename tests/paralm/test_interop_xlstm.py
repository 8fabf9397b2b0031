"""transformers' xLSTMForCausalLM and ours with the same weights, each reading what the other has written.

transformers runs in a process of its own where neither xlstm nor mlstm_kernels can be imported, so that what is
compared with is its torch code. There eps = 1e-6 is added to the memory's denominator, which changes no logit by more
than 4e-9 here. The input gates are open, unlike initially, so that the head norm sees more than its own eps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paralm.config import ModelConfig
from paralm.config_files import load_config
from paralm.errors import ConfigError
from paralm.interop import load_transformers, save_transformers
from paralm.interop.xlstm import XLSTM
from paralm.models import LanguageModel, build_model
from tests.peers import run_peer

VOCAB, TIME = 61, 39
CASES: dict[str, dict[str, Any]] = {
    "published": {"mixer": {"n_heads": 2, "chunk_size": 16}, "mlp": {}},  # two chunks and seven single steps there
    "wide": {
        "mixer": {"n_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 2.0, "gate_soft_cap": 6.0, "chunk_size": 8},
        "mlp": {"d_ff": 72},
        "logit_cap": 10.0,
    },
}

_WHOLE = """
import json, sys
from transformers import xLSTMConfig, xLSTMForCausalLM
from transformers.models.xlstm import modeling_xlstm
assert not modeling_xlstm.external_xlstm and "xlstm" not in sys.modules and "mlstm_kernels" not in sys.modules
def measure(name, model):
    out = model(given["tokens"], use_cache=False)
    (out.logits * given["weights"]).sum().backward()
    result[name + "/logits"] = out.logits
    for key, p in model.named_parameters():
        result[f"{name}/{key}"] = p.grad
    states = {}
    hook = model.backbone.blocks[0].register_forward_hook(lambda block, args, out: states.update(first=out[1]))
    with torch.no_grad():
        model(given["tokens"], use_cache=False)
    hook.remove()
    for part, value in zip("Cnm", states["first"]):
        result[f"{name}/{part}"] = value
for name in CASES:
    model, info = xLSTMForCausalLM.from_pretrained(f"{FOLDER}/{name}", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    measure(name, model.train())
    torch.manual_seed(1)
    theirs = xLSTMForCausalLM(xLSTMConfig(**json.load(open(f"{FOLDER}/{name}/config.json")))).train()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
            if key.endswith("igate_preact.bias"):
                p.add_(10.0)
    theirs.save_pretrained(f"{FOLDER}/{name}-theirs", max_shard_size="20KB")
    measure(name + "-theirs", theirs)
"""


def model_of(case: str) -> LanguageModel:
    """A small model with weights away from their special initial values."""
    own = CASES[case]
    config = ModelConfig(
        d_model=32,
        n_layers=2,
        mixer={"name": "mlstm", **own["mixer"]},
        mlp=own["mlp"],
        tie_embeddings=False,
        norm_eps=1e-6,
        logit_cap=own.get("logit_cap", 30.0),
    )
    model = build_model(config, VOCAB, seed=3)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.05)
            if name.endswith("gates.bias"):
                parameter[: len(parameter) // 2].add_(10.0)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, TIME), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights() -> Tensor:
    """What the logits are weighted with, for a loss that every gradient takes part in."""
    return torch.randn(2, TIME, VOCAB, generator=torch.Generator().manual_seed(1))


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


def close(what: str, got: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """Within 1e-4 of the largest value, or of ``scale`` (measured: at most 2e-5)."""
    assert got.shape == expected.shape, what
    worst = ((got - expected).abs().max() / (scale or expected.abs().max())).item()
    assert worst < 1e-4, f"{what}: {worst:.1e}"


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
    scale = theirs[f"{name}/m"].view(2, -1).exp()  # theirs is scaled by e^-m
    close(f"{name} C", out.state["layers"][0][0], theirs[f"{name}/C"] * scale[..., None, None])
    close(f"{name} n", out.state["layers"][0][1], theirs[f"{name}/n"] * scale[..., None])
    (out.logits * weights).sum().backward()
    gradients = {parameter: p.grad for parameter, p in model.named_parameters()}
    stored = XLSTM.stored(model)
    parts = {f"{name}/{part}" for part in ("logits", "C", "n", "m")}
    assert {f"{name}/{entry.name}" for entry in stored} | parts == {k for k in theirs if k.split("/")[0] == name}
    for entry in stored:
        gradient = gradients[entry.parameter]
        assert gradient is not None
        got, expected = gradient.flatten()[entry.offset : entry.stop], theirs[f"{name}/{entry.name}"]
        # A gate's bias is a weight of its affine map; what a common factor of C and n is worth almost cancels in it.
        alike = theirs.get(f"{name}/{entry.name.removesuffix('bias')}weight", expected)
        scale = max(expected.abs().max().item(), alike.abs().max().item())
        assert scale > 0.1, entry.name
        close(f"{name} gradient of {entry.name}", got.view(entry.shape), expected, scale)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path: Path, case: str) -> None:
    model = model_of(case)
    save_transformers(model, tmp_path / "out", max_shard_size=9000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    back = load_transformers(tmp_path / "out")
    found = dict(back.named_parameters())
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert back.config.mixer.items() >= model.config.mixer.items()
    assert (back.config.norm_eps, back.config.logit_cap) == (model.config.norm_eps, model.config.logit_cap)
    save_transformers(back, tmp_path / "again", max_shard_size=9000)
    for path in sorted((tmp_path / "out").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("d_model", [1, 48, 320, 4096])
@pytest.mark.parametrize("d_ff", [1, 63, 64, 1024, 10944, 11008])
def test_any_width_of_the_mlp_is_written_and_read(d_model: int, d_ff: int) -> None:
    from paralm.interop.architecture import Keys

    mixer = {"name": "mlstm", "n_heads": 1, "qk_dim_factor": 1.0}
    config = ModelConfig(
        d_model=d_model, n_layers=1, mixer=mixer, mlp={"d_ff": d_ff}, tie_embeddings=False, logit_cap=30.0
    )  # type: ignore[arg-type]
    model = build_model(config, 8, seed=0, device="meta")
    back, _ = XLSTM.model_config(Keys("config.json", json.loads(json.dumps(XLSTM.keys(model)))))
    assert back.mlp.d_ff == d_ff


def test_the_published_7b_is_read_from_its_names_alone() -> None:
    """Its config.json says embedding_dim and num_blocks."""
    from paralm.interop.architecture import Keys

    config, vocab = XLSTM.model_config(Keys("config.json", {"embedding_dim": 4096, "num_blocks": 32, "num_heads": 8}))
    model = build_model(config, vocab, seed=0, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 6_865_424_896
    assert XLSTM.keys(model)["ffn_proj_factor"] == 2.667
    preset = load_config("model/xlstm_7b").config.model  # going on from it is trained as the preset is
    for key in ("embedding_decay", "norm_eps", "logit_cap", "tie_embeddings"):
        assert getattr(config, key) == getattr(preset, key), key
    assert config.mlp.down_init == preset.mlp.down_init


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**content, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_config(weight_mode="fused"), ["weight_mode", '"fused"', "single"]),
        (_config(use_bias=True), ["use_bias", "true", "false"]),
        (_config(add_out_norm=False), ["add_out_norm", "false", "true"]),
        (_config(tie_word_embeddings=True), ["tie_word_embeddings"]),
        (_config(eps=0.01), ["eps", "0.01", "1e-05"]),
        (_config(num_heads=5), ["5 heads", "16 channels"]),
        (_config(gate_soft_cap=100.0), ["gate_soft_cap", "40"]),
        (_config(embedding_dim=64), ["hidden_size is 32", "embedding_dim is 64"]),
        (_config(ffn_proj_factor=1.0), ["proj_up", "64"]),
        (_config(num_blocks=3, num_hidden_layers=3), ["blocks.2", "missing"]),
    ],
)
def test_what_cannot_be_read_is_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], parts: list[str]
) -> None:
    model = model_of("published")
    save_transformers(model, tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(ConfigError) as caught:
        load_transformers(tmp_path / "bad")
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"logit_cap": None}, ["logit_cap"]),
        ({"tie_embeddings": True}, ["tie_embeddings"]),
        ({"mlp": {"enabled": False}}, ["mlp.enabled"]),
        ({"mixer": {"name": "mlstm", "norm_eps": 1e-3}}, ["norm_eps", "0.001", "1e-05"]),
        ({"mixers": [{"name": "mlstm", "chunk_size": 8}, "mlstm"]}, ["model.mixers", "different keys"]),
        ({"mixers": ["mlstm", "slstm"]}, ["mlstm, slstm"]),
    ],
)
def test_what_transformers_does_not_have_is_one_line(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    base: dict[str, Any] = {"d_model": 32, "n_layers": 2, "mixer": {"name": "mlstm"}, "tie_embeddings": False}
    model = build_model(ModelConfig(**{**base, "logit_cap": 30.0, **changes}), VOCAB, seed=0, device="meta")
    with pytest.raises(ConfigError) as caught:
        save_transformers(model, tmp_path / "out")
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
