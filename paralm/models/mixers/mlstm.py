"""mLSTM, xLSTM's matrix memory, as the block of xLSTM-7B has it (Beck et al., arXiv 2405.04517, 2503.13427).

    q, k, v, o = W_in x     î, f̂ = cap(W_g x + b),  cap(x) = c tanh(x / c)      q, k of one width, v and o of another
    C_t = σ(f̂) C_{t−1} + e^î k vᵀ       n_t = σ(f̂) n_{t−1} + e^î k               per head, one gate of each a head
    h_t = C_tᵀ q̃ / max(|n_t·q̃|, 1)      q̃ = q / √d_k
    y = W_out (LayerNorm_head(h) ⊙ σ(o))

by `paralm_kernels.chunkwise`, whose stabiliser m scales C and n by e^{−m}. What is carried here is C and n themselves:
the capped input gate bounds them (e^15 is nothing to float32), so that a state means the same whatever it was scaled
by, has no infinite part, and its gradient is exact. The released code adds eps = 1e-6 to the denominator, in units of
e^m. The denominator is at least 1, so there is nothing to guard, and an added eps would make results depend on where
a sequence was cut: here it is 0. The difference is in the scale of a head's h, at most a factor 1 + 1e-6 e^m, and the
head norm takes that out.

Initial values as released: W_in normal with √(2/(5 d)), except the output gate's rows, zero; W_g zero, b −10 for i and
from 3 to 6 over the heads for f; W_out normal with 2/(n_layers √d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import paralm_kernels
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from paralm.errors import ConfigError
from paralm.models.linear import Linear
from paralm.models.mixers.base import LayerContext, Mixer, State, StateLeaf, clip_factor
from paralm.models.norms import HeadLayerNorm
from paralm.models.parameters import constant, declare, linear_std, wang_std
from paralm.registry import EntryConfig, register_mixer


class MLSTMConfig(EntryConfig):
    """Keys of ``model.mixer`` for mLSTM."""

    n_heads: PositiveInt | None = Field(default=None, description="default: of 64 query channels or a little more")
    qk_dim_factor: PositiveFloat = Field(default=0.5, description="channels of queries and of keys over d_model")
    v_dim_factor: PositiveFloat = Field(default=1.0, description="channels of values and output gate over d_model")
    gate_soft_cap: float = Field(default=15.0, gt=0, le=40, description="bound c of the gates' pre-activations")
    input_gate_bias: float = Field(default=-10.0, description="what the input gates' biases start as")
    chunk_size: PositiveInt | None = Field(
        default=None, description="tokens done side by side; no result depends on it. Default: what is fastest there"
    )
    norm_eps: PositiveFloat | None = Field(default=None, description="of the head norm; default: model.norm_eps")


class MLSTMGates(nn.Module):
    """Capped pre-activations of input and forget gate: ``weight`` (2 heads, d_model), ``bias`` (2 heads), i first."""

    def __init__(self, d_model: int, n_heads: int, cap: float, input_bias: float) -> None:
        super().__init__()
        self.n_heads, self.cap = n_heads, cap
        self.weight = nn.Parameter(torch.empty(2 * n_heads, d_model))
        self.bias = nn.Parameter(torch.empty(2 * n_heads))
        declare(self, "weight", constant(0.0), decay=True, matrix=False)
        declare(self, "bias", partial(_gate_biases, value=input_bias), decay=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, time, d_model) → i and f, (batch, time, head), in at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gates = F.linear(x, self.weight).to(wide) + self.bias.to(wide)
        i, f = (self.cap * torch.tanh(gates / self.cap)).chunk(2, dim=-1)
        return i, f


@register_mixer("mlstm", MLSTMConfig)
class MLSTM(Mixer):
    """The mLSTM mixer."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = {
        "0": StateLeaf(heads=1, matrix=True, free=True),
        "1": StateLeaf(heads=1, free=True),
    }
    admits: ClassVar[frozenset[str]] = frozenset({"scale", "window"})

    config: MLSTMConfig

    def __init__(self, config: MLSTMConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model = context.d_model
        self.qk_dim, self.v_dim = int(d_model * config.qk_dim_factor), int(d_model * config.v_dim_factor)
        self.n_heads = _heads(config, self.qk_dim, self.v_dim)
        self.scale = (self.qk_dim // self.n_heads) ** -0.5
        self.sizes = (self.qk_dim, self.qk_dim, self.v_dim, self.v_dim)  # q, k, v, o
        self.in_proj = Linear(d_model, self.sizes)
        self.gates = MLSTMGates(d_model, self.n_heads, config.gate_soft_cap, config.input_gate_bias)
        self.norm = HeadLayerNorm(self.n_heads, self.v_dim // self.n_heads, config.norm_eps or context.norm_eps)
        self.out_proj = Linear(self.v_dim, d_model, wang_std(d_model, context.n_layers))
        start = partial(_zero_last_rows, std=linear_std(d_model), rows=self.v_dim)
        declare(self.in_proj, "weight", start, decay=True, maps=self.sizes)

    @property
    def joins_shards(self) -> bool:
        """See :class:`Mixer`."""
        return self.mitigation is None or self.mitigation.window is None

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`. State: (C (batch, head, d_k, d_v), n (batch, head, d_k)), in at least float32; under a
        window a third part, ``{"window": …}``, see `paralm_kernels.windowed_chunkwise`."""
        q, k, v, o = self.in_proj(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in (q, k, v))
        i, f = self.gates(x)
        log_decay = F.logsigmoid(f)
        if self.mitigation is not None:
            log_decay, i = log_decay + math.log(self.mitigation.decay), i + math.log(self.mitigation.input)
            if self.mitigation.window is not None:
                h, after = self._windowed(q, k, v, log_decay, i.exp(), self.mitigation.window, state, reset)
                return self.out_proj(self.norm(h, o)), after
        h, scaled = self.kernels.chunkwise(
            q,
            k,
            v,
            log_decay,
            i,
            None if state is None else _scaled(state),
            reset,
            normalized=True,
            chunk_size=self.config.chunk_size,
            eps=0.0,
        )
        return self.out_proj(self.norm(h, o)), _unscaled(scaled)

    def _windowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        gain: Tensor,
        window: int,
        state: State | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, State]:
        """C and n over the last ``window`` tokens, unscaled: n is the last column of C where v ends in 1."""
        q, k, v = (part.to(gain.dtype) for part in (q * self.scale, k, v))
        line: dict[str, Any] | None = None
        if state is not None:
            line = {"S": torch.cat((state[0], state[1].unsqueeze(-1)), -1), **state[2]["window"]}
        v = torch.cat((v, v.new_ones(*v.shape[:-1], 1)), -1)
        y, line = paralm_kernels.windowed_chunkwise(
            q, k, v, log_decay, gain, window, line, reset, chunk_size=self.config.chunk_size
        )
        both = line.pop("S")
        h = y[..., :-1] / y[..., -1:].abs().clamp(min=1.0)
        return h, (both[..., :-1].contiguous(), both[..., -1].contiguous(), {"window": line})

    def clip_state(self, state: State, limit: float) -> State:
        """C and n by the same factor, that of C: what is remembered keeps its normaliser."""
        c, n, *rest = state
        factor = clip_factor(c, limit, 1)
        return (c * factor, n * factor.squeeze(-1), *rest)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros, in at least float32."""
        weight = self.gates.bias
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        d_k, d_v = self.qk_dim // self.n_heads, self.v_dim // self.n_heads
        c = torch.zeros(batch, self.n_heads, d_k, d_v, device=device or weight.device, dtype=wide)
        n = c.new_zeros(batch, self.n_heads, d_k)
        if self.mitigation is None or self.mitigation.window is None:
            return c, n
        heads = self.n_heads
        line = paralm_kernels.window_state(
            batch, self.mitigation.window, heads, heads, d_k, d_v + 1, dtype=wide, device=c.device
        )
        line.pop("S")
        return c, n, {"window": line}

    def extra_flops_per_token(self, seq_len: int) -> float:
        """What the chunk form takes: q·k and the sum over v, over the (chunk + 1)/2 tokens that a token sees of its
        chunk on average; and, in each head, the state's reading and its update."""
        seen = (min(self.config.chunk_size or 64, 256, seq_len) + 1) / 2  # 256: the largest chunk of the kernels
        return 2.0 * seen * (self.qk_dim + self.v_dim) + 4.0 * self.qk_dim * self.v_dim / self.n_heads


def _scaled(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(C e^{−m}, n e^{−m}, m) with numbers of at most 1, whatever the precision they will be multiplied in."""
    c, n = state
    largest = torch.maximum(c.detach().abs().amax((-2, -1)), n.detach().abs().amax(-1)).clamp(min=1.0)
    return c / largest[..., None, None], n / largest[..., None], largest.log()


def _unscaled(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """C and n; m is a constant in their gradient, and as their product does not depend on it, that is exact."""
    c, n, m = state
    scale = m.detach().exp()
    return c * scale[..., None, None], n * scale[..., None]


def _heads(config: MLSTMConfig, qk_dim: int, v_dim: int) -> int:
    """Raises ConfigError, one line, for widths that the heads do not divide."""
    shared = math.gcd(qk_dim, v_dim)
    heads = config.n_heads or next((h for h in range(qk_dim // 64, 0, -1) if shared % h == 0), 1)
    for key, width in (("qk_dim_factor", qk_dim), ("v_dim_factor", v_dim)):
        if width == 0 or width % heads:
            raise ConfigError(
                f"model.mixer.n_heads: {heads} heads do not divide {width} channels "
                f"({key} {getattr(config, key):g} × model.d_model)"
            )
    return heads


def _zero_last_rows(tensor: Tensor, generator: torch.Generator, std: float, rows: int) -> None:
    """Normal; zero in the rows of the output gate."""
    tensor.normal_(0.0, std, generator=generator)
    tensor[-rows:] = 0.0


def _gate_biases(tensor: Tensor, generator: torch.Generator, value: float) -> None:
    """``value`` for the input gates; from 3 to 6 over the heads for the forget gates."""
    heads = len(tensor) // 2
    tensor[:heads] = value
    tensor[heads:] = torch.linspace(3.0, 6.0, heads)
