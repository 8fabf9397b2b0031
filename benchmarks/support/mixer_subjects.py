"""What the benchmark of the mixers runs: every registered mixer, and what others have in its place.

A subject is make(d_model, device, dtype) → (call: x (batch, time, d_model) → y of the same shape, parameters). Where a
peer is only a recurrence, it is run inside our mixer in the place of ours, so that projections, convolution and norms
are the same; where it is a layer of its own, as it is, its sizes set to those of the mixer it stands beside.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .packages import without_init

Call = Callable[[Tensor], Tensor]
Built = tuple[Call, list[Tensor]]
Make = Callable[[int, str, torch.dtype], Built]


@dataclass(frozen=True)
class Subject:
    """``peer``: the folder it is imported from, "" for what is ours or torch's; ``importable``: peers' modules that may
    be found beside it; ``beside``: the subject it is compared with."""

    make: Make
    what: str
    beside: str = ""
    peer: str = ""
    importable: tuple[str, ...] = field(default=())


def built(layer: nn.Module, run: Callable[[Tensor], Any], device: str, dtype: torch.dtype) -> Built:
    """A layer of its own; the first of what it returns is the output."""
    layer = layer.to(device=device, dtype=dtype).train()

    def call(x: Tensor) -> Tensor:
        y = run(x)
        result: Tensor = y[0] if isinstance(y, tuple) else y
        return result

    return call, [p for p in layer.parameters() if p.requires_grad]


def heads_of(channels: int) -> int:
    """As many heads as ours have by default."""
    from paralm.models.mixers.base import default_heads

    return default_heads(channels)


def ours(name: str, keys: dict[str, Any], d_model: int, device: str, dtype: torch.dtype) -> Built:
    """The mixer of that name with its initial values."""
    from paralm.config import ModelConfig
    from paralm.models import build_mixer
    from paralm.models.parameters import initialize

    if device == "cpu":
        keys = {key: value for key, value in keys.items() if value != "triton"}
    mixer = build_mixer({"name": name, **keys}, ModelConfig(d_model=d_model), 0)
    with torch.no_grad():
        initialize(mixer, 0)
    return built(mixer, mixer, device, dtype)


def torch_rnn(kind: str, d_model: int, device: str, dtype: torch.dtype) -> Built:
    """torch.nn.LSTM, GRU or RNN (cuDNN on a GPU) and a Linear after it, as our mixers have."""
    rnn = getattr(nn, kind)(d_model, d_model, batch_first=True)
    layer = nn.Sequential(rnn, nn.Linear(d_model, d_model, bias=False))
    return built(layer, lambda x: layer[1](layer[0](x)[0]), device, dtype)


def transformers_mamba2(d_model: int, device: str, dtype: torch.dtype) -> Built:
    """transformers' Mamba2Mixer, its torch code."""
    from transformers import Mamba2Config  # type: ignore[import-not-found]
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer  # type: ignore[import-not-found]

    heads = heads_of(2 * d_model)
    config = Mamba2Config(
        hidden_size=d_model, num_heads=heads, head_dim=2 * d_model // heads, state_size=128, n_groups=1, use_cache=False
    )
    layer = Mamba2Mixer(config, 0)
    return built(layer, layer, device, dtype)


def transformers_mlstm(d_model: int, device: str, dtype: torch.dtype) -> Built:
    """The mLSTM layer of transformers' xLSTM block, its torch code, without the norms and the MLP around it."""
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMBlock  # type: ignore[import-not-found]

    name = str(dtype).removeprefix("torch.")
    config = xLSTMConfig(
        hidden_size=d_model,
        num_hidden_layers=1,
        num_heads=heads_of(d_model // 2),
        mode="train",
        return_last_states=True,  # in mode train it unpacks two values whatever this says
        autocast_kernel_dtype=name,
    )
    layer = xLSTMBlock(config).mlstm_layer
    return built(layer, layer, device, dtype)


def mamba_ssm(d_model: int, device: str, dtype: torch.dtype) -> Built:
    """mamba_ssm's Mamba2; its fused path, convolution included, where causal_conv1d is there."""
    without_init("mamba_ssm")
    module = importlib.import_module("mamba_ssm.modules.mamba2")
    heads = heads_of(2 * d_model)
    fused = importlib.util.find_spec("causal_conv1d") is not None
    layer = module.Mamba2(d_model, headdim=2 * d_model // heads, use_mem_eff_path=fused)
    return built(layer, layer, device, dtype)


def mlstm_kernels(kernel: str, d_model: int, device: str, dtype: torch.dtype) -> Built:
    """Our mLSTM mixer around a chunkwise kernel of mlstm_kernels."""
    import paralm_kernels

    run = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel(f"chunkwise--{kernel}")

    def chunkwise(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, gain: Tensor, *_: Any, **__: Any) -> Any:
        # It takes logsigmoid of the forget gate by itself; here it is taken twice, of one number a head and token.
        by_head = (part.transpose(1, 2) for part in (q, k, v, gain, log_decay))
        h, (c, n, m) = run(*by_head, return_last_states=True, autocast_kernel_dtype=dtype)
        return h.transpose(1, 2), (c, n, m.flatten(1))

    paralm_kernels.chunkwise = chunkwise  # type: ignore[assignment]
    return ours("mlstm", {}, d_model, device, dtype)


def flashrnn(kind: str, backend: str, d_model: int, device: str, dtype: torch.dtype) -> Built:
    """Our mixer of a dense recurrence around FlashRNN's."""
    import paralm_kernels
    from paralm_kernels.dense_cells import KINDS

    run = importlib.import_module("flashrnn").flashrnn
    order, biases = ([2, 0, 1], [3, 0, 1, 2]) if kind == "gru" else (slice(None), slice(None))
    states = len(KINDS[kind].state)
    name = str(dtype).removeprefix("torch.")

    def dense_rnn(_: str, inputs: Tensor, weight: Tensor, bias: Tensor, *__: Any, **___: Any) -> Any:
        batch, _time, _gates, heads, d_head = inputs.shape
        state = inputs.new_zeros(states, batch, 1, heads, d_head)
        y, last = run(inputs, weight[order], bias[biases], state, kind, None, backend, name)
        return y[0], tuple(last[:, :, 0])

    paralm_kernels.dense_rnn = dense_rnn  # type: ignore[assignment]
    return ours(kind, {}, d_model, device, dtype)


def titans_pytorch(chunk: int, batch: int | None, d_model: int, device: str, dtype: torch.dtype) -> Built:
    """NeuralMemory with heads as wide as ours: an MLP of two layers, four times as wide inside."""
    module = importlib.import_module("titans_pytorch")
    heads = heads_of(d_model)
    layer = module.NeuralMemory(dim=d_model, dim_head=d_model // heads, heads=heads, chunk_size=chunk, batch_size=batch)
    return built(layer, layer, device, dtype)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm, 1 head": ("lstm", {"n_heads": 1, "method": "triton"}),
    "gru, 1 head": ("gru", {"n_heads": 1, "method": "triton"}),
    "titans_memory, chunks of 2048": ("titans_memory", {"chunk_size": 2048}),
}
"""Ours with keys that a comparison asks for, beside every mixer with its default keys."""


def subjects() -> dict[str, Subject]:
    """By name, in the order in which they are run: each of ours, and behind it what is compared with it."""
    from paralm.registry import MIXERS

    own = {name: (name, {}) for name in MIXERS.names()} | VARIANTS
    peers = _peers()
    found: dict[str, Subject] = {}
    for label in sorted(own):
        name, keys = own[label]
        text = ", ".join(f"{key}={value}" for key, value in keys.items()) or "default keys"
        found[f"paralm {label}"] = Subject(partial(ours, name, keys), f"the mixer {name}, {text}")
        found |= {peer: subject for peer, subject in peers.items() if subject.beside == f"paralm {label}"}
    return found


def _peers() -> dict[str, Subject]:
    lines = "the recurrence of our mixer done by "
    found = {
        "transformers Mamba2Mixer": Subject(
            transformers_mamba2, "its torch code, chunks of 256", "paralm mamba2", "transformers"
        ),
        "mamba_ssm Mamba2": Subject(
            mamba_ssm,
            "Triton; fused with the convolution where causal_conv1d is there",
            "paralm mamba2",
            "mamba_ssm",
            ("causal_conv1d",),
        ),
        "transformers xLSTM layer": Subject(
            transformers_mlstm, "the mLSTM layer of its block, torch code", "paralm mlstm", "transformers"
        ),
        "titans-pytorch, chunk 1, batch 64": Subject(
            partial(titans_pytorch, 1, 64),
            "gates a token, gradients anew every 64 tokens: our form",
            "paralm titans_memory",
            "titans-pytorch",
        ),
        "titans-pytorch, chunk 64, batch 64": Subject(
            partial(titans_pytorch, 64, 64),
            "gates every 64 tokens, gradients anew every 64 tokens",
            "paralm titans_memory",
            "titans-pytorch",
        ),
        "titans-pytorch, chunk 64": Subject(
            partial(titans_pytorch, 64, None),
            "gates every 64 tokens, all gradients at the first memory",
            "paralm titans_memory",
            "titans-pytorch",
        ),
        "torch.nn.LSTM": Subject(partial(torch_rnn, "LSTM"), "one head, and a Linear behind it", "paralm lstm, 1 head"),
        "torch.nn.GRU": Subject(partial(torch_rnn, "GRU"), "one head, and a Linear behind it", "paralm gru, 1 head"),
    }
    for kernel in ("triton_xl_chunk", "native_custbw"):
        found[f"mlstm_kernels {kernel}"] = Subject(
            partial(mlstm_kernels, kernel), f"{lines}chunkwise--{kernel}", "paralm mlstm", "xlstm", ("mlstm_kernels",)
        )
    for kind, backend in (
        *((kind, "cuda_fused") for kind in ("lstm", "gru", "slstm", "elman")),
        ("lstm", "triton_fused"),
        *((kind, "vanilla") for kind in ("lstm", "slstm")),
    ):
        found[f"flashrnn {kind}, {backend}"] = Subject(
            partial(flashrnn, kind, backend), f"{lines}backend {backend}", f"paralm {kind}", "flashrnn"
        )
    return found
