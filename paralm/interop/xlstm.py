"""``transformers``' xLSTMForCausalLM in its names: the whole model is ours with mixer mlstm and untied embeddings.

Ours keeps q, k, v and the output gate in one matrix, the input and forget gates in another, and the MLP's gate and up
in a third, by rows; theirs are tensors of their own (``weight_mode`` "single"). ``eps`` is what theirs adds to the
memory's denominator, where ours has 0 (mlstm.py says why); ``chunk_size``, kernels and modes change no result.
"""

from __future__ import annotations

import math
from typing import Any

from paralm.config import MLPConfig, ModelConfig
from paralm.errors import ConfigError
from paralm.interop.architecture import Architecture, Keys, Stored, rows, whole
from paralm.models import LanguageModel
from paralm.models.mixers import MLSTM

_LARGEST_EPS = 1e-5
_FFN_FACTOR, _FFN_MULTIPLE = 2.667, 64
_MODEL = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.out_norm.weight",
    "head.weight": "lm_head.weight",
}
_WHOLE = {
    "mixer_norm.weight": "norm_mlstm.weight",
    "mixer.norm.weight": "mlstm_layer.multihead_norm.weight",
    "mixer.out_proj.weight": "mlstm_layer.out_proj.weight",
    "mlp_norm.weight": "norm_ffn.weight",
    "mlp.down.weight": "ffn.proj_down.weight",
}


def _model_config(keys: Keys) -> tuple[ModelConfig, int]:
    d_model = _named_twice(keys, "hidden_size", "embedding_dim", 4096)
    for key, needed in (("use_bias", False), ("add_out_norm", True), ("tie_word_embeddings", False)):
        if keys.flag(key, needed) != needed:
            raise keys.fault(key, f"{str(needed).lower()}, which is what paralm has")
    keys.one_of("weight_mode", "single", ("single",))
    if keys.number("eps", 1e-6) > _LARGEST_EPS:
        raise keys.fault("eps", f"at most {_LARGEST_EPS:g}, as paralm has none")
    vocab_size, norm_eps = keys.integer("vocab_size", 50304), keys.number("norm_eps", 1e-6)
    mixer = {
        "name": "mlstm",
        "n_heads": keys.integer("num_heads", 8),
        "qk_dim_factor": keys.number("qk_dim_factor", 0.5),
        "v_dim_factor": keys.number("v_dim_factor", 1.0),
        "gate_soft_cap": keys.number("gate_soft_cap", 15.0),
        "chunk_size": keys.integer("chunk_size", 64),
    }
    factor = keys.number("ffn_proj_factor", _FFN_FACTOR)
    d_ff = _rounded_up(d_model * factor, keys.integer("ffn_round_up_to_multiple_of", _FFN_MULTIPLE))
    config = ModelConfig(
        d_model=d_model,
        n_layers=_named_twice(keys, "num_hidden_layers", "num_blocks", 32),
        mixer=mixer,
        mlp=MLPConfig(d_ff=d_ff, down_init="wang"),
        vocab_size=vocab_size,
        tie_embeddings=False,
        norm_eps=norm_eps,
        logit_cap=keys.number("output_logit_soft_cap", 30.0),
        embedding_std=math.sqrt(2 / (5 * d_model)),
        embedding_decay=False,
    )
    return config, vocab_size


def _named_twice(keys: Keys, key: str, other: str, default: int) -> int:
    """A whole number that goes by two names, either of which may be absent or null."""
    given = [name for name in (key, other) if keys.content.get(name) is not None]
    values = [keys.integer(name, default) for name in given]
    if len(set(values)) > 1:
        raise ConfigError(f"{keys.where}: {key} is {values[0]} and {other} is {values[1]}; expected the same")
    return values[0] if values else default


def _rounded_up(size: float, multiple: int) -> int:
    """As transformers rounds, which keeps a fraction of one when ``multiple`` is 1."""
    return int((size + multiple - 1) // multiple * multiple)


def _keys(model: LanguageModel) -> dict[str, Any]:
    config, mixers = model.config, model.mixers
    first = mixers[0]
    assert isinstance(first, MLSTM)
    if any(mixer.config != first.config for mixer in mixers):
        raise ConfigError("model.mixers: layers of different keys; a transformers xLSTM has the same in every layer")
    mlp = model.layers[0].mlp
    if mlp is None:
        raise ConfigError("model.mlp.enabled: false; a transformers xLSTM has an MLP after each mixer")
    if config.tie_embeddings:
        raise ConfigError("model.tie_embeddings: true; a transformers xLSTM has a head of its own")
    if config.logit_cap is None:
        raise ConfigError("model.logit_cap: none; a transformers xLSTM has one, 30 as published")
    own = first.config
    if first.norm.eps != config.norm_eps:
        raise ConfigError(
            f"model.mixer.norm_eps: {first.norm.eps:g} beside model.norm_eps {config.norm_eps:g}; a transformers xLSTM "
            "has one for both"
        )
    factor, multiple = _FFN_FACTOR, _FFN_MULTIPLE
    if _rounded_up(config.d_model * factor, multiple) != mlp.d_ff:
        factor, multiple = (mlp.d_ff + 0.25) / config.d_model, 1  # rounded down to d_ff, whatever the last bit is
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": config.d_model,
        "embedding_dim": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_blocks": config.n_layers,
        "num_heads": first.n_heads,
        "qk_dim_factor": own.qk_dim_factor,
        "v_dim_factor": own.v_dim_factor,
        "gate_soft_cap": own.gate_soft_cap,
        "chunk_size": own.chunk_size or 64,
        "ffn_proj_factor": factor,
        "ffn_round_up_to_multiple_of": multiple,
        "output_logit_soft_cap": config.logit_cap,
        "norm_eps": config.norm_eps,
        "eps": 1e-6,
        "use_bias": False,
        "add_out_norm": True,
        "tie_word_embeddings": False,
        "weight_mode": "single",
    }


def _stored(model: LanguageModel) -> list[Stored]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: list[Stored] = []
    for name in shapes:
        if name in _MODEL:
            found.append(whole(_MODEL[name], name, shapes))
            continue
        _, layer, local = name.split(".", 2)
        block = f"backbone.blocks.{layer}."
        mixer = model.mixers[int(layer)]
        assert isinstance(mixer, MLSTM)
        gates = (mixer.n_heads, mixer.n_heads)
        parts: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            "mixer.in_proj.weight": (("q.weight", "k.weight", "v.weight", "ogate_preact.weight"), mixer.sizes),
            "mixer.gates.weight": (("igate_preact.weight", "fgate_preact.weight"), gates),
            "mixer.gates.bias": (("igate_preact.bias", "fgate_preact.bias"), gates),
        }
        if local in _WHOLE:
            found.append(whole(block + _WHOLE[local], name, shapes))
        elif local in parts:
            names, counts = parts[local]
            found.extend(rows(tuple(f"{block}mlstm_layer.{part}" for part in names), counts, name, shapes))
        else:  # the MLP's gate and up
            half = shapes[name][0] // 2
            names = (block + "ffn.proj_up_gate.weight", block + "ffn.proj_up.weight")
            found.extend(rows(names, (half, half), name, shapes))
    return found


XLSTM = Architecture(
    model_type="xlstm",
    class_name="xLSTMForCausalLM",
    mixer="mlstm",
    model_config=_model_config,
    keys=_keys,
    stored=_stored,
)
