"""Small models of every registered mixer, for the laws of evaluation."""

from __future__ import annotations

from typing import Any

import torch

from paralm.config import ModelConfig
from paralm.models import LanguageModel, build_model

KEYS: dict[str, dict[str, Any]] = {
    **{name: {"chunk_size": 8} for name in ("mamba2", "mlstm", "titans_memory", "titans_mac")},
    **{name: {"chunk_size": 8, "window": 10} for name in ("titans_mag", "titans_mal")},
    "window_attention": {"window": 10},
}
"""Keys of mixers whose chunks and windows are long by default; a test's sequences are some tens of tokens."""


def small_model(name: str, vocab_size: int, *, n_layers: int = 2, scale: float = 2.0, **keys: Any) -> LanguageModel:
    """A model of mixer ``name`` in float64, far from the uniform predictions of a new one: its answers are arbitrary
    but exact. ``keys``: the mixer's own, over those of :data:`KEYS`."""
    mixer = {"name": name, **KEYS.get(name, {}), **keys}
    config = ModelConfig(d_model=16, n_layers=n_layers, mixer=mixer, loss_chunk=50)
    model = build_model(config, vocab_size, seed=3).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model
