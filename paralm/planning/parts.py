"""What a model is made of, by part.

Counted on the real model on the meta device, so that it cannot drift from the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from paralm.batching import state_nbytes
from paralm.config import ModelConfig
from paralm.models import build_model
from paralm.models.hybrid import mixer_pattern
from paralm.models.lm import LanguageModel, flops_per_token


@dataclass(frozen=True)
class Part:
    """Parameters of one kind; ``layers``: how many layers have it (0: it stands outside of the layers)."""

    name: str
    layers: int
    parameters: int


@dataclass(frozen=True)
class Parts:
    """``state_elements``, ``state_bytes``: of one sequence, None where it grows with what was read.
    ``flops_per_token``: forward and backward at ``seq_len``."""

    parts: list[Part]
    parameters: int
    state_elements: int | None
    state_bytes: int | None
    seq_len: int
    flops_per_token: float


def plan_model(config: ModelConfig, vocab_size: int, seq_len: int, model: LanguageModel | None = None) -> Parts:
    """Count. ``model``: that of ``config``, where it is built already. Raises ConfigError, one line, for a model that
    cannot be.
    """
    model = model or build_model(config, vocab_size, seed=0, device="meta")
    parts = list(_parts(model, config))
    total = sum(parameter.numel() for parameter in model.parameters())
    counted = sum(part.parameters for part in parts)
    if counted != total:
        raise AssertionError(f"the parts have {counted} parameters, the model {total}")
    elements = size = None
    if model.bounded_state:
        state = model.initial_state(1, torch.device("meta"), torch.bfloat16)
        elements, size = sum(leaf.numel() for leaf in pytree.tree_leaves(state)), state_nbytes(state)
    return Parts(parts, total, elements, size, seq_len, flops_per_token(model, seq_len))


def _parts(model: LanguageModel, config: ModelConfig) -> Iterator[Part]:
    yield Part("embedding" + (" (and head)" if config.tie_embeddings else ""), 0, _size(model.embedding))
    pattern = [str(spec["name"]) for spec, count in mixer_pattern(config) for _ in range(count)]
    names = [pattern[layer % len(pattern)] for layer in range(config.n_layers)]
    for name in dict.fromkeys(names):
        chosen = [block for block, other in zip(model.layers, names, strict=True) if other == name]
        yield Part(f"mixer {name}", len(chosen), sum(_size(block.mixer) for block in chosen))
    blocks = model.layers
    if config.mlp.enabled:
        yield Part("mlp", len(blocks), sum(_size(block.mlp) for block in blocks))
    norms = sum(_size(block.mixer_norm) + _size(block.mlp_norm) for block in blocks)
    yield Part("norms", len(blocks), norms + _size(model.norm))
    if not config.tie_embeddings:
        yield Part("head", 0, _size(model.head))


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
