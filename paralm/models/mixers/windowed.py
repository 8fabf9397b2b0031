"""Causal attention over a sliding window with rotary positions and persistent tokens: bounded state.

    softmax over {p_1 … p_P} ∪ {j : i − window < j ≤ i}       scores R_i q_i · R_j k_j and q_i · W_k p_m, over √d_head

Window and rotations as in Mistral 7B (arXiv 2310.06825) and RoFormer (2104.09864); persistent tokens p_m are learned
and stand before every sequence (Titans, arXiv 2501.00663, section 4). They have no position: their scores take the
query unrotated, so outputs depend on distances only, however far a document goes. One call of
``scaled_dot_product_attention`` does both: queries carry their P scores with the persistent keys as extra channels.

Time is cut into blocks of half the window's length, each with the window−1 keys before it: O(time · window). *Measured*
(benchmarks/mixers.py --lengths 8192 --only window_attention, before and after): a quarter less time than with blocks of
the whole window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import paralm_kernels
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from paralm.errors import ConfigError
from paralm.models.linear import Linear
from paralm.models.mixers.base import LayerContext, Mixer, State, StateLeaf, default_heads
from paralm.models.parameters import declare, normal, output_std
from paralm.registry import EntryConfig, register_mixer

SHORTEST_BLOCK = 64
"""Queries of a block where half the window is shorter: smaller products are not faster."""


class WindowAttentionConfig(EntryConfig):
    """Keys of ``model.mixer`` for window_attention."""

    n_heads: PositiveInt | None = Field(default=None, description="default: of 64 channels or a little more")
    n_kv_heads: PositiveInt | None = Field(default=None, description="heads of keys and values; default: n_heads")
    window: PositiveInt = Field(default=2048, description="tokens a query sees, itself among them")
    n_persistent: NonNegativeInt = Field(default=0, description="learned tokens that every query sees")
    rope_theta: PositiveFloat = Field(default=10_000.0, description="base of the rotary frequencies")


def head_width(d_model: int, n_heads: int, key: str = "model.mixer.n_heads") -> int:
    """Channels of a head; ConfigError if heads do not divide the model into even widths, which rotations need."""
    if d_model % n_heads or (d_model // n_heads) % 2:
        raise ConfigError(f"{key}: {n_heads} heads do not split d_model {d_model} into heads of even width")
    return d_model // n_heads


class Heads(nn.Module):
    """What sliding and segment attention share: projections, rotations, persistent tokens."""

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int | None, n_persistent: int, rope_theta: float, key: str
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        self.d_head = head_width(d_model, n_heads, key)
        if n_heads % self.n_kv_heads:
            raise ConfigError(f"model.mixer.n_kv_heads: {self.n_kv_heads} must divide n_heads, which is {n_heads}")
        self.rope_theta, self.n_persistent = rope_theta, n_persistent
        self.qkv_proj = Linear(d_model, [n * self.d_head for n in (n_heads, self.n_kv_heads, self.n_kv_heads)])
        if n_persistent:
            self.persistent = nn.Parameter(torch.empty(n_persistent, d_model))
            declare(self, "persistent", normal(1.0), decay=False)  # of the size of the normed tokens beside them

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, d_model) → q, k, v (…, heads, d_head)."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.d_head))
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=-2)
        return q, k, v

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Turn the pairs (i, i + d_head/2) of x (batch, time, heads, d_head); angles in float64."""
        return paralm_kernels.rotate(x, *paralm_kernels.rotary_angles(position, self.d_head, self.rope_theta, x.dtype))

    def attend(self, q: Tensor, rotated: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention over the persistent tokens and k, v.

        q, rotated: (batch, queries, heads, d_head), unrotated and rotated; k, v: (batch, keys, kv heads, d_head);
        mask: bool (batch or 1, queries, keys). Returns (batch, queries, heads · d_head).
        """
        query = rotated
        if self.n_persistent:
            _, p_k, p_v = self.project(self.persistent.to(q.dtype))
            groups = self.n_heads // self.n_kv_heads
            scores = torch.einsum("bthd,phd->bthp", q, p_k.repeat_interleave(groups, dim=1))
            query = torch.cat((rotated, scores), dim=-1)
            batch, p = len(k), self.n_persistent
            one_hot = torch.eye(p, dtype=k.dtype, device=k.device)[:, None].expand(p, self.n_kv_heads, p)
            p_k = F.pad(one_hot, (self.d_head, 0)).expand(batch, p, self.n_kv_heads, self.d_head + p)
            k = torch.cat((p_k, F.pad(k, (0, p))), dim=1)
            v = torch.cat((p_v.expand(batch, -1, -1, -1), v), dim=1)
            mask = F.pad(mask, (p, 0), value=True)
        y = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask[:, None],
            scale=self.d_head**-0.5,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return y.transpose(1, 2).flatten(2)


class SlidingAttention(Heads):
    """Attention over the window, without the output projection."""

    def __init__(self, window: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.window = window

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        shards: paralm_kernels.TimeShards | None = None,
    ) -> tuple[Tensor, State]:
        """(batch, time, d_model) → the same shape. State: ``{"k", "v"}`` (batch, window − 1, kv heads, d_head), the
        last keys (rotated) and values, zeros where a row has none, and ``"position"`` int64 (batch,).

        shards: x is a part of sequences whose time lies on several ranks. A rank sends its last keys and values to the
        next as soon as it has them, at once where its part is as long as what the window looks back, and turns the
        others meanwhile; where the next rank is in the sequence is found while q, k and v are.
        """
        batch, time, _ = x.shape
        reach = self.window - 1
        same = state is None and reset is None and shards is None  # rows are alike, so one mask serves all
        past, block = reach, min(time, max(self.window // 2, SHORTEST_BLOCK))
        if state is None and shards is None and time <= max(self.window, SHORTEST_BLOCK):
            past, block = 0, time  # nothing was read: no keys before the first query
        if state is None:
            state = self.initial_state(batch, x.device, x.dtype)
        where = None if shards is None else shards.position(state["position"], reset, time)
        q, k, v = self.project(x)
        start = state["position"] if where is None else where.taken()
        if shards is not None:
            shards.settle()  # of the call before: a rank that has told its position has taken all of that
        position = paralm_kernels.positions(start, reset, time)
        zero, early = None, time >= reach
        if shards is not None and reach and early:
            last = slice(time - reach, None)
            zero = shards.hand_on("window", self.rotate(k[:, last], position[:, last]), v[:, last])
        rotated, k = self.rotate(q, position), self.rotate(k, position)
        before_k, before_v = state["k"].to(k.dtype), state["v"].to(v.dtype)
        if shards is not None and reach:
            before_k, before_v = shards.take_over("window", zero, before_k, before_v)
        k, v = torch.cat((before_k, k), dim=1), torch.cat((before_v, v), dim=1)
        if shards is not None and reach and not early:
            zero = shards.hand_on("window", k[:, time:], v[:, time:])
        seen = position[:1] if same else position
        y = self._blocks(q, rotated, k[:, reach - past :], v[:, reach - past :], seen, past, block)
        if zero is not None and not early:
            y = y + zero
        length = position[:, -1] + 1
        age = torch.arange(reach, 0, -1, device=x.device)
        lost = (age > length[:, None])[..., None, None]
        keep_k, keep_v = (z[:, time:].masked_fill(lost, 0.0) for z in (k, v))
        return y, {"k": keep_k, "v": keep_v, "position": length}

    def _blocks(
        self, q: Tensor, rotated: Tensor, k: Tensor, v: Tensor, position: Tensor, past: int, block: int
    ) -> Tensor:
        """k, v begin ``past`` steps before q: window − 1, or 0 with one block; position (batch or 1, time)."""
        batch, time = q.shape[:2]
        reach = self.window - 1
        count = -(-time // block)
        padding = count * block - time

        def padded(z: Tensor) -> Tensor:
            return F.pad(z, (0, 0, 0, 0, 0, padding)) if padding else z

        def blocks(z: Tensor) -> Tensor:
            return padded(z).view(batch * count, block, *z.shape[2:]) if count > 1 else z

        def spans(z: Tensor) -> Tensor:
            if count == 1:
                return z
            return padded(z).unfold(1, block + past, block).movedim(-1, 2).flatten(0, 1)

        position = F.pad(position, (0, padding)).view(-1, count, block)
        distance = torch.arange(block, device=q.device)[:, None] + past - torch.arange(block + past, device=q.device)
        mask = (distance >= 0) & (distance <= position.clamp(max=reach)[..., None])
        if count > 1 or len(mask) > 1:
            mask = mask.expand(batch, -1, -1, -1)
        y = self.attend(blocks(q), blocks(rotated), spans(k), spans(v), mask.flatten(0, 1))
        return y.view(batch, count * block, -1)[:, :time]

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Nothing read yet."""
        weight = self.qkv_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        none = torch.zeros(batch, self.window - 1, self.n_kv_heads, self.d_head, device=device, dtype=dtype)
        return {"k": none, "v": none.clone(), "position": torch.zeros(batch, dtype=torch.int64, device=device)}

    def extra_flops(self, seq_len: int) -> float:
        """q·k and the weighted sum of v, over the keys a query sees on average, and over the persistent ones."""
        window = min(self.window, seq_len)
        seen = window - window * (window - 1) / (2 * seq_len) + self.n_persistent
        return 4.0 * self.n_heads * self.d_head * seen


@register_mixer("window_attention", WindowAttentionConfig)
class WindowAttention(Mixer):
    """Sliding-window attention as a mixer of its own."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = {"[kv]": StateLeaf(heads=2)}
    refuses: ClassVar[str] = "its state is what was read, and no recurrence"

    config: WindowAttentionConfig

    def __init__(self, config: WindowAttentionConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model = context.d_model
        self.attention = SlidingAttention(
            config.window,
            d_model,
            config.n_heads or default_heads(d_model, even=True),
            config.n_kv_heads,
            config.n_persistent,
            config.rope_theta,
            "model.mixer.n_heads",
        )
        self.out_proj = Linear(d_model, d_model, output_std(d_model, context.n_layers))

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`; the state is that of :class:`SlidingAttention`."""
        y, state = self.attention(x, state, reset, self.time_shards)
        return self.out_proj(y), state

    @property
    def joins_shards(self) -> bool:
        """See :class:`Mixer`."""
        return True

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Nothing read yet."""
        return self.attention.initial_state(batch, device, dtype)

    def extra_flops_per_token(self, seq_len: int) -> float:
        return self.attention.extra_flops(seq_len)
