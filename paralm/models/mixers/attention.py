"""Causal multi-head attention with rotary positions: the Transformer baseline every claim is held against.

    softmax(R_i q_i · R_j k_j / √d_head) over j ≤ i within one document       (RoFormer, arXiv 2104.09864)

Its state is the keys and values read so far, so it grows (``bounded_state`` is False); otherwise it obeys the law of
all mixers. Positions count from the row's last reset, so a document gives the same numbers wherever it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import paralm_kernels
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from paralm.errors import ConfigError
from paralm.models.linear import Linear
from paralm.models.mixers.base import LayerContext, Mixer, State, StateLeaf, default_heads
from paralm.models.parameters import output_std
from paralm.registry import EntryConfig, register_mixer


class AttentionConfig(EntryConfig):
    """Keys of ``model.mixer`` for attention."""

    n_heads: PositiveInt | None = Field(default=None, description="default: of 64 channels or a little more")
    n_kv_heads: PositiveInt | None = Field(default=None, description="heads of keys and values; default: n_heads")
    rope_theta: PositiveFloat = Field(default=10_000.0, description="base of the rotary frequencies")


@register_mixer("attention", AttentionConfig)
class Attention(Mixer):
    """Softmax attention through ``scaled_dot_product_attention``."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = {"[kv]": StateLeaf(heads=2)}
    refuses: ClassVar[str] = "its state is what was read, and no recurrence"
    bounded_state: ClassVar[bool] = False
    config: AttentionConfig

    def __init__(self, config: AttentionConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model = context.d_model
        self.n_heads = config.n_heads or default_heads(d_model, even=True)
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        if d_model % self.n_heads or (d_model // self.n_heads) % 2:
            raise ConfigError(
                f"model.mixer.n_heads: {self.n_heads} heads do not split d_model {d_model} into heads of even width"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"model.mixer.n_kv_heads: {self.n_kv_heads} must divide n_heads, which is {self.n_heads}")
        self.d_head = d_model // self.n_heads
        self.qkv_proj = Linear(d_model, [n * self.d_head for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)])
        self.out_proj = Linear(d_model, d_model, output_std(d_model, context.n_layers))

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`. State: ``{"k", "v"}`` (batch, read, kv heads, d_head), keys already rotated, and
        ``"position"`` int64 (batch,): tokens read since the row's last reset."""
        batch, time, d_model = x.shape
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.d_head))
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        if reset is not None and state is None and x.device.type == "cpu" and not reset[:, 1:].any():
            reset = None  # a start at position 0 is no cut; looking is free on a CPU, and the mask is not
        if state is None:
            state = self.initial_state(batch, x.device, x.dtype)
        position = paralm_kernels.positions(state["position"], reset, time)
        angles = paralm_kernels.rotary_angles(position, self.d_head, self.config.rope_theta, self.qkv_proj.weight.dtype)
        q, k = paralm_kernels.rotate(q, *angles), paralm_kernels.rotate(k, *angles)
        past = state["k"].shape[1]
        if past:
            k, v = torch.cat((state["k"], k), dim=1), torch.cat((state["v"], v), dim=1)
        mask = None if past == 0 and reset is None else _mask(position, past)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        y = self.out_proj(y.transpose(1, 2).reshape(batch, time, d_model))
        length = position[:, -1] + 1
        if reset is not None and not self.training:
            # Streaming evaluation: what no row can see any more is let go, or it would pile up over documents.
            keep = int(length.max())
            k, v = k[:, -keep:], v[:, -keep:]
        return y, {"k": k, "v": v, "position": length}

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Nothing read yet."""
        weight = self.qkv_proj.weight
        empty = torch.zeros(
            batch, 0, self.n_kv_heads, self.d_head, device=device or weight.device, dtype=dtype or weight.dtype
        )
        return {"k": empty, "v": empty, "position": torch.zeros(batch, dtype=torch.int64, device=empty.device)}

    def extra_flops_per_token(self, seq_len: int) -> float:
        """q·k and the weighted sum of v, over the (seq_len + 1)/2 keys a causal query sees on average."""
        return 4.0 * self.n_heads * self.d_head * (seq_len + 1) / 2


def _mask(position: Tensor, past: int) -> Tensor:
    """(batch, 1, time, past + time), true where query i may see key j: the ``position`` keys before it and itself."""
    time = position.shape[1]
    query = torch.arange(past, past + time, device=position.device)[None, :, None]
    key = torch.arange(past + time, device=position.device)[None, None, :]
    return ((key <= query) & (key >= query - position[..., None]))[:, None]
