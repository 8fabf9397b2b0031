"""The classical recurrent networks as mixers: LSTM, GRU and Elman's, their recurrence dense within each head.

    x_t ↦ W x_t       rows_t = W x_t + R_head h_{t−1} + b       h_t = cell(rows_t, …)       y_t = W_out h_t

by `paralm_kernels.dense_rnn` (the cells: torch.nn.LSTM's, GRU's, RNN's), with R block-diagonal over heads as in
FlashRNN (arXiv 2412.07752): with one head the network is torch's, whose weights load (paralm.interop.torch_rnn), with
many small ones R stays on the chip. They are here for what they can do and no parallel mixer can: track a state.

Initial values: W as every linear map; R orthogonal for each gate and head, or uniform within ±1/√d_head as torch has
it; biases zero, except the LSTM's forget gate's, which starts open (Jozefowicz et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import paralm_kernels
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from paralm.errors import ConfigError
from paralm.models.linear import Linear
from paralm.models.mixers.base import LayerContext, Mixer, State, StateLeaf, default_heads
from paralm.models.parameters import constant, declare, output_std, uniform
from paralm.registry import EntryConfig, register_mixer


class DenseConfig(EntryConfig):
    """Keys of ``model.mixer`` for a recurrence that is dense within a head."""

    n_heads: PositiveInt | None = Field(
        default=None, description="blocks of the recurrent matrices; default: of 64 channels or a little more"
    )
    d_head: PositiveInt | None = Field(default=None, description="channels of a head; default: d_model / n_heads")
    recurrent_init: Literal["orthogonal", "uniform"] = Field(default="orthogonal", description="of the matrices R")
    method: Literal["auto", "torch", "newton", "triton"] = Field(
        default="auto", description="of the recurrence; newton walks the sequence where it does not converge"
    )


class LSTMConfig(DenseConfig):
    """Keys of ``model.mixer`` for ``lstm``."""

    forget_bias: float = Field(default=1.0, description="what the forget gate's biases start as")


class DenseMixer(Mixer):
    """Base of the three; ``kind`` as `paralm_kernels.dense_rnn` names it."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = {"[0-9]": StateLeaf(heads=1, free=True)}
    refuses: ClassVar[str] = "its gates depend on its own state"

    kind: ClassVar[str]
    gates: ClassVar[int]
    config: DenseConfig

    def __init__(self, config: DenseConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model = context.d_model
        if config.d_head is None:
            self.n_heads = config.n_heads or default_heads(d_model)
            if d_model % self.n_heads:
                raise ConfigError(
                    f"model.mixer.n_heads: {self.n_heads} heads do not divide model.d_model {d_model}; "
                    f"give model.mixer.d_head as well"
                )
            self.d_head = d_model // self.n_heads
        else:
            self.d_head = config.d_head
            self.n_heads = config.n_heads or max(1, d_model // config.d_head)
        width = self.n_heads * self.d_head
        n_biases = self.gates + (self.kind == "gru")  # n has a bias of its recurrent product as well
        self.in_proj = Linear(d_model, [width] * self.gates)
        self.recurrent = nn.Parameter(torch.empty(self.gates, self.n_heads, self.d_head, self.d_head))
        self.bias = nn.Parameter(torch.empty(n_biases, self.n_heads, self.d_head))
        self.out_proj = Linear(width, d_model, output_std(width, context.n_layers))
        orthogonal = config.recurrent_init == "orthogonal"
        declare(self, "recurrent", _orthogonal if orthogonal else uniform(1 / math.sqrt(self.d_head)), decay=True)
        declare(self, "bias", constant(0.0), decay=False)

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`. State: a tuple of (batch, n_heads, d_head), h first, in at least float32."""
        inputs = self.in_proj(x).unflatten(-1, (self.gates, self.n_heads, self.d_head))
        h, state = paralm_kernels.dense_rnn(
            self.kind,
            inputs,
            self.recurrent,
            self.bias,
            state,
            reset,
            method=self.config.method,
            on_failure="sequential",
        )
        return self.out_proj(h.flatten(2)), state

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros, in at least float32."""
        device, dtype = device or self.bias.device, dtype or self.bias.dtype
        return paralm_kernels.dense_state(self.kind, batch, self.n_heads, self.d_head, device, dtype)


def _orthogonal(tensor: Tensor, generator: torch.Generator) -> None:
    """An orthogonal matrix in the last two dimensions, one for each of the others."""
    for matrix in tensor.flatten(0, -3):
        nn.init.orthogonal_(matrix, generator=generator)


def _forget(value: float, tensor: Tensor, generator: torch.Generator) -> None:
    """Zeros, and a value for the gate f of (i, f, z, o)."""
    tensor.zero_()
    tensor[1] = value


@register_mixer("lstm", LSTMConfig)
class LSTM(DenseMixer):
    """Hochreiter & Schmidhuber (1997) with Gers' forget gate; gates i, f, z, o, state (h, c)."""

    kind: ClassVar[str] = "lstm"
    gates: ClassVar[int] = 4

    def __init__(self, config: LSTMConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        declare(self, "bias", partial(_forget, config.forget_bias), decay=False)


@register_mixer("gru", DenseConfig)
class GRU(DenseMixer):
    """Cho et al. (2014) as cuDNN has it, r after the recurrent product; gates r, z, n, state (h,)."""

    kind: ClassVar[str] = "gru"
    gates: ClassVar[int] = 3


@register_mixer("elman", DenseConfig)
class Elman(DenseMixer):
    """Elman (1990): h = tanh(W x + R h + b), state (h,)."""

    kind: ClassVar[str] = "elman"
    gates: ClassVar[int] = 1
