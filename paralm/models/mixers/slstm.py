"""sLSTM, xLSTM's scalar memory with memory mixing: dense within a head (Beck et al., arXiv 2405.04517).

    î, f̂ = W_i u, W_f u,  u = SiLU(conv_4(x))       ẑ, ô = W_z x, W_o x          all block-diagonal over heads
    i, f, z, o = (î, f̂, ẑ, ô) + R_head h_{t−1} + b
    c_t = σ(f) c_{t−1} + e^i tanh z       n_t = σ(f) n_{t−1} + e^i       h_t = σ(o) c_t / n_t        stabilised by m
    y = LayerNorm_head(h), times W_out if there is one

by `paralm_kernels.dense_rnn`. A head's Jacobian is dense, so the recurrence is a walk; the variant with a diagonal R,
which the Newton solver takes, is the mixer `slstm_diagonal`. The released block has no output projection (the MLP after
it mixes the heads); ``output_projection`` adds one of d × d.

Initial values as released: W normal with √(2/(5 d)), R zero, b zero but for the forget gate's,
5 − 12 (j / (d_head − 1))^{0.3 + 1.3 layer/(n_layers − 1)} over the channels j of a head; W_out 2/(n_layers √d).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import paralm_kernels
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from paralm.errors import ConfigError
from paralm.models.linear import Linear
from paralm.models.mixers.base import LayerContext, Mixer, State, StateLeaf, default_heads
from paralm.models.norms import HeadLayerNorm
from paralm.models.parameters import constant, declare, linear_std, normal, uniform, wang_std
from paralm.registry import EntryConfig, register_mixer


class SLSTMConfig(EntryConfig):
    """Keys of ``model.mixer`` for sLSTM."""

    n_heads: PositiveInt | None = Field(
        default=None, description="blocks of every matrix; default: of 64 channels or a little more"
    )
    d_conv: int = Field(default=4, ge=2, le=16, description="width of the short convolution, in tokens")
    output_projection: bool = Field(default=False, description="whether a d_model × d_model map follows the norm")
    norm_eps: PositiveFloat | None = Field(default=None, description="of the head norm; default: model.norm_eps")
    method: Literal["auto", "torch", "newton", "triton"] = Field(
        default="auto", description="of the recurrence; newton walks the sequence where it does not converge"
    )


@register_mixer("slstm", SLSTMConfig)
class SLSTM(Mixer):
    """The sLSTM mixer."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = {"cell/*": StateLeaf(heads=1)}
    refuses: ClassVar[str] = "its gates depend on its own state"

    config: SLSTMConfig

    def __init__(self, config: SLSTMConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model = context.d_model
        self.n_heads = config.n_heads or default_heads(d_model)
        if d_model % self.n_heads:
            raise ConfigError(f"model.mixer.n_heads: {self.n_heads} heads do not divide model.d_model {d_model}")
        self.d_head = d_model // self.n_heads
        matrices = (4, self.n_heads, self.d_head, self.d_head)  # gates i, f, z, o; (out, in)
        self.conv_weight = nn.Parameter(torch.empty(d_model, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_model))
        self.input_weight = nn.Parameter(torch.empty(matrices))
        self.recurrent = nn.Parameter(torch.empty(matrices))
        self.bias = nn.Parameter(torch.empty(4, self.n_heads, self.d_head))
        self.norm = HeadLayerNorm(self.n_heads, self.d_head, config.norm_eps or context.norm_eps)
        std = wang_std(d_model, context.n_layers)
        self.out_proj = Linear(d_model, d_model, std) if config.output_projection else None
        declare(self, "conv_weight", uniform(config.d_conv**-0.5), decay=False)
        declare(self, "conv_bias", uniform(config.d_conv**-0.5), decay=False)
        declare(self, "input_weight", normal(linear_std(d_model)), decay=True)
        declare(self, "recurrent", constant(0.0), decay=True)
        depth = context.layer / max(1, context.n_layers - 1)
        declare(self, "bias", partial(_powerlaw_forget_biases, exponent=0.3 + 1.3 * depth), decay=False)

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`. State: ``{"cell": (h, c, n, m), each (batch, head, d_head) in at least float32, "conv":
        (batch, d_conv − 1, d_model)}``."""
        cell_state, conv_state = (None, None) if state is None else (state["cell"], state["conv"])
        u, conv_state = paralm_kernels.causal_conv(x, self.conv_weight, self.conv_bias, conv_state, reset)
        inputs = torch.cat((self._by_head(F.silu(u), 0), self._by_head(x, 2)), dim=2)
        h, cell_state = paralm_kernels.dense_rnn(
            "slstm",
            inputs,
            self.recurrent,
            self.bias,
            cell_state,
            reset,
            method=self.config.method,
            on_failure="sequential",
        )
        y = self.norm(h)
        return (y if self.out_proj is None else self.out_proj(y)), {"cell": cell_state, "conv": conv_state}

    def _by_head(self, x: Tensor, first: int) -> Tensor:
        """Two gates from (batch, time, d_model): (batch, time, 2, head, d_head)."""
        heads = x.unflatten(-1, (self.n_heads, self.d_head))
        return torch.einsum("bthi,ghoi->btgho", heads, self.input_weight[first : first + 2])

    def refusal(self, kind: str) -> str | None:
        """See :class:`Mixer`."""
        if kind == "clip":
            return "its output is c/n, a weighted mean, which clipping both leaves as it is"
        return super().refusal(kind)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros, and −∞ for m; the cell's in at least float32."""
        device, dtype = device or self.bias.device, dtype or self.bias.dtype
        return {
            "cell": paralm_kernels.dense_state("slstm", batch, self.n_heads, self.d_head, device, dtype),
            "conv": torch.zeros(batch, self.config.d_conv - 1, self.context.d_model, device=device, dtype=dtype),
        }


def _powerlaw_forget_biases(tensor: Tensor, generator: torch.Generator, exponent: float) -> None:
    """Zeros, and for the gate f of (i, f, z, o) 5 − 12 (j/(d_head − 1))^exponent over a head's channels j."""
    tensor.zero_()
    tensor[1] = 5.0 - 12.0 * torch.linspace(0.0, 1.0, tensor.shape[-1]) ** exponent
