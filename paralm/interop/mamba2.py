"""``transformers``' Mamba2ForCausalLM in its names: the whole model is ours with mixer mamba2 and no MLP.

Ours keeps the taps of the short convolution as (channel, tap), theirs as torch.nn.Conv1d's (channel, 1, tap); all else
has the same shape. ``residual_in_fp32`` is always so here; ``chunk_size`` changes no result.
"""

from __future__ import annotations

import math
from typing import Any

from paralm.config import MLPConfig, ModelConfig
from paralm.errors import ConfigError
from paralm.interop.architecture import Architecture, Keys, Stored, whole
from paralm.models import LanguageModel
from paralm.models.mixers import Mamba2

_BLOCK = {
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.in_proj.bias": "mixer.in_proj.bias",
    "mixer.conv_weight": "mixer.conv1d.weight",
    "mixer.conv_bias": "mixer.conv1d.bias",
    "mixer.dt_bias": "mixer.dt_bias",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
    "mixer.norm.weight": "mixer.norm.weight",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mixer.out_proj.bias": "mixer.out_proj.bias",
    "mixer_norm.weight": "norm.weight",
}
_MODEL = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}


def _model_config(keys: Keys) -> tuple[ModelConfig, int]:
    d_model, expand = keys.integer("hidden_size", 4096), keys.integer("expand", 2)
    heads, head_dim = keys.integer("num_heads", 128), keys.integer("head_dim", 64)
    if heads * head_dim != expand * d_model:
        raise ConfigError(
            f"{keys.where}: num_heads {heads} × head_dim {head_dim} is not expand {expand} × hidden_size {d_model}"
        )
    keys.one_of("hidden_act", "silu", ("silu", "swish"))
    vocab_size = keys.integer("vocab_size", 32768)
    mixer = {
        "name": "mamba2",
        "expand": expand,
        "d_state": keys.integer("state_size", 128),
        "head_dim": head_dim,
        "n_groups": keys.integer("n_groups", 8),
        "d_conv": keys.integer("conv_kernel", 4),
        "chunk_size": keys.integer("chunk_size", 256),
        "dt_limit": _dt_limit(keys),
        "dt_min": keys.number("time_step_min", 1e-3),
        "dt_max": keys.number("time_step_max", 0.1),
        "dt_floor": keys.number("time_step_floor", 1e-4),
        "bias": keys.flag("use_bias", False),
        "conv_bias": keys.flag("use_conv_bias", True),
    }
    config = ModelConfig(
        d_model=d_model,
        n_layers=keys.integer("num_hidden_layers", 64),
        mixer=mixer,
        mlp=MLPConfig(enabled=False),
        vocab_size=vocab_size,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        embedding_std=0.02,
    )
    return config, vocab_size


def _dt_limit(keys: Keys) -> list[float | None]:
    """time_step_limit, whose upper bound may be infinite: as Python's JSON writes that, or tagged by transformers 5."""
    given = keys.content.get("time_step_limit", [0.0, math.inf])
    values = [value.get("__float__") if isinstance(value, dict) else value for value in given or ()]
    limits = [math.inf if v == "Infinity" else v for v in values if v == "Infinity" or isinstance(v, int | float)]
    if len(values) != 2 or len(limits) != 2 or any(math.isnan(limit) for limit in limits):
        raise keys.fault("time_step_limit", "two numbers")
    low, high = (float(limit) for limit in limits)
    return [low, None if high == math.inf else high]


def _keys(model: LanguageModel) -> dict[str, Any]:
    config, mixers = model.config, model.mixers
    first = mixers[0]
    assert isinstance(first, Mamba2)
    if any(mixer.config != first.config for mixer in mixers):
        raise ConfigError("model.mixers: layers of different keys; a transformers Mamba2 has the same in every layer")
    if config.mlp.enabled:
        raise ConfigError("model.mlp.enabled: true; a transformers Mamba2 has no MLP between its mixers")
    if config.logit_cap is not None:
        raise ConfigError(f"model.logit_cap: {config.logit_cap:g}; a transformers Mamba2 has none")
    own = first.config
    if first.norm.eps != config.norm_eps:
        raise ConfigError(
            f"model.mixer.norm_eps: {first.norm.eps:g} beside model.norm_eps {config.norm_eps:g}; a transformers "
            "Mamba2 has one for both"
        )
    low, high = own.dt_limit
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "expand": own.expand,
        "state_size": own.d_state,
        "num_heads": first.n_heads,
        "head_dim": first.head_dim,
        "n_groups": own.n_groups,
        "conv_kernel": own.d_conv,
        "chunk_size": own.chunk_size or 256,
        "time_step_limit": [low, math.inf if high is None else high],
        "time_step_min": own.dt_min,
        "time_step_max": own.dt_max,
        "time_step_floor": own.dt_floor,
        "use_bias": own.bias,
        "use_conv_bias": own.conv_bias,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "residual_in_fp32": True,
    }


def _stored(model: LanguageModel) -> list[Stored]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = []
    for name, shape in shapes.items():
        if name in _MODEL:
            found.append(whole(_MODEL[name], name, shapes))
            continue
        _, layer, local = name.split(".", 2)
        conv = (shape[0], 1, shape[1]) if local == "mixer.conv_weight" else None
        found.append(whole(f"backbone.layers.{layer}.{_BLOCK[local]}", name, shapes, conv))
    return found


MAMBA2 = Architecture(
    model_type="mamba2",
    class_name="Mamba2ForCausalLM",
    mixer="mamba2",
    model_config=_model_config,
    keys=_keys,
    stored=_stored,
    repeats={"lm_head.weight": "backbone.embeddings.weight"},
    renamed={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
