"""Mamba2: a state space with one scalar decay a head, in chunks (SSD; Dao & Gu, arXiv 2405.21060).

    z, xBC, dt = W_in u            sizes d_inner, d_inner + 2 G N, H;  d_inner = expand · d_model = H P
    x, B, C = SiLU(conv_4(xBC))    dt = softplus(dt + b_dt), kept within dt_limit;  A = −exp(A_log)
    S_t = e^{dt_t A} S_{t−1} + dt_t B_t x_tᵀ        y_t = S_tᵀ C_t + D x_t        per head, S (N, P)
    out = W_out (w ⊙ RMSNorm_G(y ⊙ SiLU(z)))        the gate before the norm, the norm over each of G groups of channels

Heads h of one group ⌊h G / H⌋ share B and C. dt, the decays and the state are in at least float32. The recurrence over
time is :func:`paralm_kernels.chunkwise`.

Initial values as in the released code: A uniform in A_range; dt log-uniform in [dt_min, dt_max], at least dt_floor,
through the inverse softplus; D = 1; W_in and the convolution with torch's defaults (uniform in ±1/√fan_in, the biases
of the maps 0); W_out likewise, over √n_layers (the released code has √(2 n_layers) beside MLPs). No weight decay on
A_log, dt_bias and D (nor on convolution, norm and biases, as everywhere here).

With ``precision: bf16`` these three are bf16 roundings of fp32 masters like all weights; the released models were
trained under autocast, with fp32 weights. *Measured*, compare/mamba2 after 300 steps, held-out text in windows of
1,024: A_log and dt_bias rounded cost 3e-5 nats a token, all weights 1.2e-4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import paralm_kernels
import torch
import torch.nn.functional as F
from paralm_kernels import gated_norm
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from paralm.errors import ConfigError
from paralm.models.functional import fused, rms_norm
from paralm.models.mixers.base import LayerContext, Mixer, State, StateLeaf, default_heads
from paralm.models.parameters import constant, declare, uniform
from paralm.registry import EntryConfig, register_mixer


class Mamba2Config(EntryConfig):
    """Keys of ``model.mixer`` for Mamba2."""

    expand: PositiveInt = Field(default=2, description="channels of the recurrence (d_inner) over d_model")
    d_state: PositiveInt = Field(default=128, description="N, rows of a head's state")
    head_dim: PositiveInt | None = Field(
        default=None, description="P, channels of a head; default: 64 or a little more, as divides d_inner"
    )
    n_groups: PositiveInt = Field(default=1, description="G, heads of one group share B and C, and its norm")
    d_conv: int = Field(default=4, ge=2, le=16, description="width of the short convolution, in tokens")
    chunk_size: PositiveInt | None = Field(
        default=None, description="tokens done side by side; no result depends on it. Default: what is fastest there"
    )
    dt_limit: tuple[NonNegativeFloat, PositiveFloat | None] = Field(
        default=(0.0, None), description="bounds of a token's dt after the softplus; null: none"
    )
    dt_min: PositiveFloat = Field(default=1e-3, description="least initial dt")
    dt_max: PositiveFloat = Field(default=0.1, description="largest initial dt")
    dt_floor: PositiveFloat = Field(default=1e-4, description="initial dt is at least this")
    A_range: tuple[PositiveFloat, PositiveFloat] = Field(default=(1.0, 16.0), description="of the initial -A")
    bias: bool = Field(default=False, description="of the maps in and out")
    conv_bias: bool = Field(default=True, description="of the short convolution")
    norm_eps: PositiveFloat | None = Field(default=None, description="of the gated norm; default: model.norm_eps")


class Mamba2Projection(nn.Module):
    """y = x Wᵀ + b, W uniform in ±``scale``/√in, which at 1 is as torch has it; b, if any, starts at 0. ``maps``: the
    rows of each of several maps in W."""

    def __init__(self, in_features: int, maps: tuple[int, ...], bias: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, sum(maps)
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features))
        declare(self, "weight", uniform(scale / math.sqrt(in_features)), decay=True, maps=maps)
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        if bias:
            declare(self, "bias", constant(0.0), decay=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class GateThenRMSNorm(nn.Module):
    """w ⊙ RMSNorm(x ⊙ SiLU(gate)) of x = y + D v, the mean square taken over each of ``groups`` equal runs of
    channels."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.size, self.groups, self.eps = size, groups, eps
        self.weight = nn.Parameter(torch.empty(size))
        declare(self, "weight", constant(1.0), decay=False)

    def forward(self, y: Tensor, gate: Tensor, coefficients: Tensor, v: Tensor) -> Tensor:
        """Of x = y + D v: y, v (..., head, width) and gate (..., size), of any floating dtype, D (head,) → (..., size)
        in the weight's dtype."""
        if fused(y.select(-2, 0)):  # a token's heads are one row
            y, skip = y.flatten(-2), (coefficients, v.flatten(-2))
            return gated_norm(y, self.weight, self.eps, gate, skip=skip, groups=self.groups, gate_first=True)
        wide = torch.promote_types(y.dtype, torch.float32)
        x = (y.to(wide) + coefficients.to(wide).unsqueeze(-1) * v).flatten(-2)
        gated = x * F.silu(gate.to(wide))
        if self.groups == 1:
            return rms_norm(gated, self.weight, self.eps)
        within = self.size // self.groups
        normed = rms_norm(gated.unflatten(-1, (self.groups, within)), gated.new_ones(within), self.eps)
        return (normed.flatten(-2) * self.weight.to(wide)).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, groups={self.groups}, eps={self.eps}"


@register_mixer("mamba2", Mamba2Config)
class Mamba2(Mixer):
    """The Mamba2 mixer."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = {"ssm": StateLeaf(heads=1, matrix=True, free=True)}
    admits: ClassVar[frozenset[str]] = frozenset({"scale", "window"})

    config: Mamba2Config

    def __init__(self, config: Mamba2Config, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model, d_inner = context.d_model, config.expand * context.d_model
        self.d_inner, self.head_dim, self.n_heads = d_inner, *_heads(config, d_inner)
        bc = config.n_groups * config.d_state
        self.sizes = (d_inner, d_inner + 2 * bc, self.n_heads)  # z, xBC, dt
        self.conv_sizes = (d_inner, bc, bc)  # x, B, C
        channels = self.sizes[1]
        self.in_proj = Mamba2Projection(d_model, (d_inner, *self.conv_sizes, self.n_heads), config.bias)
        self.conv_weight = nn.Parameter(torch.empty(channels, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(channels)) if config.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GateThenRMSNorm(d_inner, config.n_groups, config.norm_eps or context.norm_eps)
        self.out_proj = Mamba2Projection(d_inner, (d_model,), config.bias, scale=context.n_layers**-0.5)
        declare(self, "conv_weight", uniform(config.d_conv**-0.5), decay=False)
        if config.conv_bias:
            declare(self, "conv_bias", uniform(config.d_conv**-0.5), decay=False)
        dt = partial(_inverse_softplus_of_dt, low=config.dt_min, high=config.dt_max, floor=config.dt_floor)
        declare(self, "dt_bias", dt, decay=False)
        declare(self, "A_log", partial(_log_uniform_values, low=config.A_range[0], high=config.A_range[1]), decay=False)
        declare(self, "D", constant(1.0), decay=False)

    @property
    def joins_shards(self) -> bool:
        """See :class:`Mixer`."""
        return self.mitigation is None or self.mitigation.window is None

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`. State: ``{"ssm": (batch, head, N, P), "conv": (batch, d_conv − 1, d_inner + 2 G N)}``,
        the first in at least float32; under a window also ``"window"``, see `paralm_kernels.windowed_chunkwise`."""
        config = self.config
        ssm_state, conv_state = (None, None) if state is None else (state["ssm"], state["conv"])
        z, xbc, dt = self.in_proj(x).split(self.sizes, dim=-1)
        xbc, conv_state = self.kernels.causal_conv(xbc, self.conv_weight, self.conv_bias, conv_state, reset)
        v, b, c = F.silu(xbc).split(self.conv_sizes, dim=-1)
        v = v.unflatten(-1, (self.n_heads, self.head_dim))
        b, c = (part.unflatten(-1, (config.n_groups, config.d_state)) for part in (b, c))
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if config.dt_limit != (0.0, None):
            dt = dt.clamp(*config.dt_limit)
        log_decay = dt * -self.A_log.to(wide).exp()
        gain = dt
        if self.mitigation is not None:
            log_decay, gain = self.mitigation.scaled(log_decay, gain)
        after: dict[str, Any] = {"ssm": ssm_state, "conv": conv_state}
        if self.mitigation is None or self.mitigation.window is None:
            y, after["ssm"] = self.kernels.chunkwise(
                c, b, v, log_decay, gain, ssm_state, reset, chunk_size=config.chunk_size
            )
        else:
            line = None if state is None else {"S": ssm_state, **state["window"]}
            y, line = paralm_kernels.windowed_chunkwise(
                c, b, v, log_decay, gain, self.mitigation.window, line, reset, chunk_size=config.chunk_size
            )
            after |= {"ssm": line.pop("S"), "window": line}
        return self.out_proj(self.norm(y, z, self.D, v)), after

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros; the recurrence's in at least float32."""
        dtype = dtype or self.conv_weight.dtype
        device = device or self.conv_weight.device
        wide = torch.promote_types(dtype, torch.float32)
        size = (batch, self.n_heads, self.config.d_state, self.head_dim)
        state = {
            "ssm": torch.zeros(size, device=device, dtype=wide),
            "conv": torch.zeros(batch, self.config.d_conv - 1, self.sizes[1], device=device, dtype=dtype),
        }
        if self.mitigation is None or self.mitigation.window is None:
            return state
        sizes = self.config.n_groups, self.n_heads, self.config.d_state, self.head_dim
        line = paralm_kernels.window_state(batch, self.mitigation.window, *sizes, dtype=dtype, device=device)
        line.pop("S")
        return {**state, "window": line}

    def extra_flops_per_token(self, seq_len: int) -> float:
        """What the chunk form takes: C·B in each group and its sum over x in each head, over the (chunk + 1)/2 tokens
        that a token sees of its chunk on average; and, in each head, the state's reading and its update."""
        seen = (min(self.config.chunk_size or 64, 256, seq_len) + 1) / 2  # 256: the largest chunk of the kernels
        within = 2.0 * seen * (self.config.n_groups * self.config.d_state + self.d_inner)
        return within + 4.0 * self.d_inner * self.config.d_state


def _heads(config: Mamba2Config, d_inner: int) -> tuple[int, int]:
    """Channels of a head and the number of heads. Raises ConfigError, one line, for sizes that do not fit."""
    head_dim = config.head_dim or d_inner // default_heads(d_inner)
    if d_inner % head_dim:
        raise ConfigError(
            f"model.mixer.head_dim: {head_dim} does not divide {d_inner} channels (expand × model.d_model)"
        )
    heads = d_inner // head_dim
    if heads % config.n_groups:
        raise ConfigError(
            f"model.mixer.n_groups: {config.n_groups} groups do not divide {heads} heads "
            f"({d_inner} channels of {head_dim})"
        )
    for key, low, high in (
        ("dt_min", config.dt_min, config.dt_max),
        ("A_range", *config.A_range),
        ("dt_limit", config.dt_limit[0], config.dt_limit[1] or math.inf),
    ):
        if low > high:
            raise ConfigError(f"model.mixer.{key}: the lower bound {low:g} is above the upper one, {high:g}")
    return head_dim, heads


def _inverse_softplus_of_dt(tensor: Tensor, generator: torch.Generator, low: float, high: float, floor: float) -> None:
    """softplus of the values is log-uniform in [low, high], at least ``floor``."""
    tensor.uniform_(math.log(low), math.log(high), generator=generator).exp_().clamp_(min=floor)
    tensor.add_(torch.log(-torch.expm1(-tensor)))  # log(e^dt − 1), without the overflow


def _log_uniform_values(tensor: Tensor, generator: torch.Generator, low: float, high: float) -> None:
    """exp of the values is uniform in [low, high]."""
    tensor.uniform_(low, high, generator=generator).log_()
