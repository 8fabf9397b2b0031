"""Which mixer stands in which layer: one for all, or a pattern of several that repeats over the layers.

    mixers: [mamba2*3, paralstm]        layers mamba2, mamba2, mamba2, paralstm, mamba2, …
    mixers: [{name: mlstm, count: 7, n_heads: 4}, slstm]

An entry is NAME, NAME*COUNT, or a mapping of ``name``, ``count`` (default 1) and the mixer's own keys. What
``model.mixer`` says of a mixer of the same name holds for it too. The pattern must fit the layers a whole number of
times, so that a hybrid is what it was meant to be.
"""

from __future__ import annotations

import re
from typing import Any

from paralm.config import ModelConfig
from paralm.errors import ConfigError

Spec = dict[str, Any]
"""What a configuration says of one mixer: ``name`` and the mixer's own keys."""


def mixer_pattern(config: ModelConfig) -> list[tuple[Spec, int]]:
    """(specification, how many layers in a row) of each entry. Raises ConfigError, one line."""
    if config.mixers is None:
        return [(config.mixer, 1)]
    if not config.mixers:
        raise ConfigError("model.mixers: an empty list; name the mixers, or leave the key out")
    return [_entry(item, f"model.mixers.{index}", config.mixer) for index, item in enumerate(config.mixers)]


def _entry(item: str | Spec, key: str, known: Spec) -> tuple[Spec, int]:
    if isinstance(item, str):
        match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\*\s*(\d+)\s*)?", item)
        if match is None:
            raise ConfigError(f"{key}: '{item}' is neither NAME nor NAME*COUNT, such as mamba2*3")
        own: Spec = {"name": match[1], "count": int(match[2] or 1)}
    else:
        own = dict(item)
    count = own.pop("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"{key}.count: {count!r} is not a whole number of layers, at least 1")
    if not isinstance(own.get("name"), str):
        raise ConfigError(f"{key}.name: missing; an entry is NAME, NAME*COUNT or {{name: NAME, count: COUNT, …}}")
    inherited = known if known.get("name") == own["name"] else {}
    return {**inherited, **own}, count


def layer_mixers(config: ModelConfig) -> list[Spec]:
    """The mixer specification of each layer. Raises ConfigError, one line."""
    pattern = [spec for spec, count in mixer_pattern(config) for _ in range(count)]
    if config.n_layers % len(pattern):
        raise ConfigError(
            f"model.mixers: a pattern of {len(pattern)} layers does not fit model.n_layers {config.n_layers} a whole "
            f"number of times"
        )
    return pattern * (config.n_layers // len(pattern))


def mixer_names(config: ModelConfig) -> str:
    """For people: ``paragru``, or ``mamba2*3, paralstm``."""
    pattern = mixer_pattern(config)
    return ", ".join(f"{spec.get('name', '?')}*{count}" if count > 1 else str(spec["name"]) for spec, count in pattern)
