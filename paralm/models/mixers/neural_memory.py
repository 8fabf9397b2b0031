"""The neural memory as a layer, around :func:`paralm_kernels.neural_memory` (Titans, arXiv 2501.00663).

    q, k = ℓ2(SiLU(conv(W x))) a head      v = SiLU(conv(W_v x))
    η = σ(·)    α = σ(·)    θ = θ_max (1 − η) σ(·)      one each a head and token, from x
    y = W_o (g ⊙ RMSNorm(M_t(q_t)))        g = σ(W_g x) a head, or SiLU of a full matrix

θ carries 1 − η, so that θ_max bounds what a token writes in all, Σ_n θ ηⁿ, whatever η learns to be.

Where training starts: M's layers are normal with std 1/√fan_in, so that a unit key makes activations of total square
about expand/4 and no layer's step is much longer than another's. η starts at 0.5. θ_max is min(0.25, 1/chunk_size) and
θ starts at half of its range: gradients of a chunk are taken at one point, so it is their sum that has to be a stable
step, even where all its keys are alike. α starts spread over the heads, log-uniform from 0.1 to 0.001: memories of ten
to a thousand tokens.

With ``memory_norm`` (the default) M(x) = x + γ ⊙ f(x)/√(|f(x)|² + 0.01), f the MLP, γ learned from 1. The paper has f
alone, for which no θ_max is safe: the step that is stable shrinks as f's layers grow. One token for ever, or two in
turn, take its weights past all bounds at half of 1/chunk_size; with the norm they stay of their size, eight times
larger ones too (tests/kernels/test_neural_memory.py).
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Literal

import paralm_kernels
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from paralm.errors import ConfigError
from paralm.models.linear import Linear
from paralm.models.mixers.base import LayerContext, State, default_heads
from paralm.models.norms import RMSNorm
from paralm.models.parameters import constant, declare, linear_std, normal, uniform
from paralm.registry import EntryConfig


class MemoryConfig(EntryConfig):
    """Keys of ``model.mixer`` for a neural memory."""

    n_heads: PositiveInt | None = Field(
        default=None, description="memories, each of d_model/n_heads channels; default: of 64 or a little more"
    )
    memory_depth: PositiveInt = Field(default=2, description="layers of each memory; 1: a matrix")
    memory_expand: PositiveInt = Field(default=4, description="hidden width of a memory over its head's")
    memory_bias: bool = Field(default=False, description="biases in the memory's layers")
    memory_norm: bool = Field(
        default=True,
        description="norm and residual around the memory, which keep it from diverging; false: the plain MLP",
    )
    activation: Literal["gelu", "silu"] = Field(default="gelu", description="between the memory's layers")
    chunk_size: PositiveInt = Field(
        default=64, description="tokens whose gradients are taken at one point; large (2048) for throughput"
    )
    d_conv: int = Field(default=4, ge=1, le=16, description="width of the convolutions after q, k, v; 1: none")
    momentum: bool = Field(default=True, description="false: η = 0")
    decay: bool = Field(default=True, description="false: α = 0, nothing is forgotten")
    gate: Literal["headwise", "full", "none"] = Field(
        default="headwise", description="of the output: one number a head, d_model numbers (d_model² weights), or none"
    )
    max_rate: PositiveFloat | None = Field(
        default=None, description="the largest θ/(1 − η), a token's whole step; default: min(0.25, 1/chunk_size)"
    )
    rate_init: PositiveFloat | None = Field(default=None, description="θ/(1 − η) at the start; default: max_rate/2")
    matmul: Literal["full", "bfloat16"] = Field(
        default="full", description="operands of the memory's matrix products: at least float32, or rounded to bfloat16"
    )


class ConvProjection(nn.Module):
    """SiLU(conv(W x)): a linear map, the short causal convolution after it, SiLU."""

    def __init__(self, d_model: int, channels: int, d_conv: int) -> None:
        super().__init__()
        self.channels, self.d_conv = channels, d_conv
        self.weight = nn.Parameter(torch.empty(channels, d_model))
        declare(self, "weight", normal(linear_std(d_model)), decay=True)
        if d_conv > 1:
            self.conv_weight = nn.Parameter(torch.empty(channels, d_conv))
            self.conv_bias = nn.Parameter(torch.empty(channels))
            declare(self, "conv_weight", uniform(d_conv**-0.5), decay=False)
            declare(self, "conv_bias", constant(0.0), decay=False)

    def forward(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """(batch, time, d_model) → (batch, time, channels); state (batch, d_conv − 1, channels)."""
        z = F.linear(x, self.weight)
        if self.d_conv == 1:
            return F.silu(z), z[:, :0]
        z, after = paralm_kernels.causal_conv(z, self.conv_weight, self.conv_bias, state, reset)
        return F.silu(z), after

    def initial_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        device, dtype = device or self.weight.device, dtype or self.weight.dtype
        return torch.zeros(batch, self.d_conv - 1, self.channels, device=device, dtype=dtype)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _gate_bias(kinds: tuple[str, ...], rate: float, tensor: Tensor, generator: torch.Generator) -> None:
    """Biases of the gates, heads of one kind after the other."""
    for kind, part in zip(kinds, tensor.view(len(kinds), -1), strict=True):
        if kind == "rate":
            part.fill_(_logit(rate))
        elif kind == "momentum":
            part.fill_(0.0)
        else:
            part.copy_(torch.logit(torch.logspace(-1, -3, part.numel(), dtype=torch.float64)).to(part.dtype))


class MemoryGates(nn.Module):
    """θ, log η and log(1 − α) of every head and token, in at least float32."""

    def __init__(self, d_model: int, n_heads: int, config: MemoryConfig, rate: float, max_rate: float) -> None:
        super().__init__()
        self.kinds = ("rate", *(["momentum"] if config.momentum else []), *(["decay"] if config.decay else []))
        self.max_rate = max_rate
        self.weight = nn.Parameter(torch.empty(len(self.kinds) * n_heads, d_model))
        self.bias = nn.Parameter(torch.empty(len(self.kinds) * n_heads))
        each = (n_heads,) * len(self.kinds)
        declare(self, "weight", normal(linear_std(d_model) / 4), decay=True, maps=each)
        declare(self, "bias", partial(_gate_bias, self.kinds, rate / max_rate), decay=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(batch, time, d_model) → three of (batch, time, heads); None where there is no momentum or decay."""
        wide = torch.promote_types(x.dtype, torch.float32)
        raw = F.linear(x, self.weight).to(wide) + self.bias.to(wide)
        found = dict(zip(self.kinds, raw.chunk(len(self.kinds), dim=-1), strict=True))
        momentum = F.logsigmoid(found["momentum"]) if "momentum" in found else None
        keep = F.logsigmoid(-found["decay"]) if "decay" in found else None
        rate = self.max_rate * torch.sigmoid(found["rate"])
        if momentum is not None:
            rate = rate * torch.sigmoid(-found["momentum"])  # 1 − η
        return rate, momentum, keep


class NeuralMemoryLayer(nn.Module):
    """The memory with everything around it but what a Titans variant adds; ``std``: of the output projection."""

    def __init__(self, config: MemoryConfig, context: LayerContext, std: float | None = None) -> None:
        super().__init__()
        d_model = context.d_model
        self.config, self.n_heads = config, config.n_heads or default_heads(d_model)
        if d_model % self.n_heads:
            raise ConfigError(f"model.mixer.n_heads: {self.n_heads} heads do not divide d_model, which is {d_model}")
        max_rate = config.max_rate if config.max_rate is not None else min(0.25, 1 / config.chunk_size)
        rate = config.rate_init if config.rate_init is not None else max_rate / 2
        if rate >= max_rate:
            raise ConfigError(f"model.mixer.rate_init: {rate:g} must be less than max_rate, which is {max_rate:g}")
        self.d_head = d_model // self.n_heads
        self.q_proj, self.k_proj, self.v_proj = (ConvProjection(d_model, d_model, config.d_conv) for _ in range(3))
        self.gates = MemoryGates(d_model, self.n_heads, config, rate, max_rate)
        if config.gate != "none":
            self.gate_proj = Linear(d_model, self.n_heads if config.gate == "headwise" else d_model)
        self.norm = RMSNorm(self.d_head, context.norm_eps)
        self.out_proj = Linear(d_model, d_model, std)
        for n, (i, o) in enumerate(self._sizes()):
            setattr(self, f"memory_weight_{n}", nn.Parameter(torch.empty(self.n_heads, o, i)))
            declare(self, f"memory_weight_{n}", normal(i**-0.5), decay=False)
            if config.memory_bias:
                setattr(self, f"memory_bias_{n}", nn.Parameter(torch.empty(self.n_heads, o)))
                declare(self, f"memory_bias_{n}", constant(0.0), decay=False)

        if config.memory_norm:
            self.memory_gain = nn.Parameter(torch.empty(self.n_heads, self.d_head))
            declare(self, "memory_gain", constant(1.0), decay=False)

    def _sizes(self) -> list[tuple[int, int]]:
        """(in, out) of each layer of a memory."""
        hidden = self.config.memory_expand * self.d_head
        return list(pairwise([self.d_head, *[hidden] * (self.config.memory_depth - 1), self.d_head]))

    def _first(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of the memory a sequence starts with."""
        depth = self.config.memory_depth
        weights = [getattr(self, f"memory_weight_{n}") for n in range(depth)]
        return weights, [getattr(self, f"memory_bias_{n}") for n in range(depth)] if self.config.memory_bias else []

    def _unit(self, x: Tensor) -> Tensor:
        """Heads of length 1: x / √(|x|² + 1e-6)."""
        heads = x.unflatten(-1, (self.n_heads, -1))
        wide = heads.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, recall: State | None = None
    ) -> tuple[Tensor, State]:
        """(batch, time, d_model) → the same shape. State: ``{"q", "k", "v"}`` of the convolutions and ``"memory"``,
        see :func:`paralm_kernels.neural_memory`.

        With ``recall`` (a memory's state) nothing is written: reads of the weights at that memory's chunk's start by
        x's queries, normed, neither gated nor projected; the state is then the queries' convolution's alone, and only
        the first token may be a reset.
        """
        weights, biases = self._first()
        norm = self.memory_gain if self.config.memory_norm else None
        q, q_state = self.q_proj(x, None if state is None else state["q"], reset)
        if recall is not None:
            anew = recall["position"] < 0 if reset is None else (recall["position"] < 0) | reset[:, 0]
            now, now_biases = (
                [
                    torch.where(anew.view(-1, *(1,) * first.dim()), first.to(w.dtype), w)
                    for first, w in zip(a, b, strict=True)
                ]
                for a, b in ((weights, recall["start_weights"]), (biases, recall["start_biases"]))
            )
            y = paralm_kernels.read_memory(self._unit(q), now, now_biases, norm=norm, activation=self.config.activation)
            return self.norm(y).flatten(2), {"q": q_state}
        k, k_state = self.k_proj(x, None if state is None else state["k"], reset)
        v, v_state = self.v_proj(x, None if state is None else state["v"], reset)
        rate, log_momentum, log_keep = self.gates(x)
        y, memory = paralm_kernels.neural_memory(
            self._unit(q),
            self._unit(k),
            v.unflatten(-1, (self.n_heads, -1)),
            rate,
            log_momentum,
            log_keep,
            weights,
            biases,
            None if state is None else state["memory"],
            reset,
            norm=norm,
            chunk_size=self.config.chunk_size,
            activation=self.config.activation,
            matmul_dtype=torch.bfloat16 if self.config.matmul == "bfloat16" else None,
        )
        y = self.norm(y)
        if self.config.gate == "headwise":
            y = y * torch.sigmoid(self.gate_proj(x)).unsqueeze(-1)
        y = y.flatten(2)
        if self.config.gate == "full":
            y = y * F.silu(self.gate_proj(x))
        return self.out_proj(y), {"q": q_state, "k": k_state, "v": v_state, "memory": memory}

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Nothing read: the memory starts from the learned one at its first token."""
        convolutions = {n: getattr(self, f"{n}_proj").initial_state(batch, device, dtype) for n in "qkv"}
        weight = self.gates.weight
        memory = paralm_kernels.memory_state(
            batch,
            [(self.n_heads, o, i) for i, o in self._sizes()],
            biases=self.config.memory_bias,
            momentum=self.config.momentum,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )
        return {**convolutions, "memory": memory}

    def extra_flops(self, seq_len: int) -> float:
        """A token's products with memory and momentum (reading both; outputs and slopes of the loss at the chunk's
        start; outer products into both) and with the tokens of its tile, two FLOPs a multiplication."""
        pairs = self._sizes()
        size = sum(i * o for i, o in pairs)
        back = sum(i * o for i, o in pairs[1:])
        both = 2 if self.config.momentum else 1
        tile = min(self.config.chunk_size, 128, seq_len)
        return 2.0 * self.n_heads * (size * (2 * both + 1) + back + tile * sum(i + o for i, o in pairs) + tile**2)
