"""Titans (arXiv 2501.00663, section 4): the neural memory alone, and beside, before and behind attention.

    titans_memory  out = M_t(x)                                                     (LMM)
    titans_mag     out = W_o (norm(attention(p ‖ x)) ⊙ SiLU(norm(M_t(x))))          (memory as a gate)
    titans_mal     out = W_o attention(p ‖ norm(M_t(x)))                            (memory as a layer)
    titans_mac     h = M_{t'}(q(x))   y = W_y attention(p ‖ h ‖ segment)   M_t reads y
                   out = W_o (norm(y) ⊙ SiLU(norm(M_t(y))))                         (memory as context)

M_t(x) is :class:`~paralm.models.mixers.neural_memory.NeuralMemoryLayer`; attention of MAG and MAL is over a window.
Persistent tokens p stand before attention only: a memory that reads them first is another first memory, and that is
learned.

MAC: the paper's index counts segments, h = M_{t−1}(q) there being the memory after the segment before, and M_t read
after y was written. Per token that is: h reads the memory at the segment's start (the segment is the memory's chunk, so
these are the weights its gradients are taken at), y_t attends to h_j and x_j, j ≤ t, of its segment, is written, and
then M_t, which has read y up to t and nothing later, is read by y_t. Reading the memory at the segment's end, as the
formula does word by word, would see the future.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import paralm_kernels
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from paralm.models.linear import Linear
from paralm.models.mixers.base import LayerContext, Mixer, State, StateLeaf, default_heads
from paralm.models.mixers.neural_memory import MemoryConfig, NeuralMemoryLayer
from paralm.models.mixers.windowed import Heads, SlidingAttention
from paralm.models.norms import RMSNorm
from paralm.models.parameters import output_std
from paralm.registry import register_mixer


class TitansConfig(MemoryConfig):
    """Keys of ``model.mixer`` for titans_mac."""

    n_attention_heads: PositiveInt | None = Field(default=None, description="default: n_heads, or of 64 channels")
    n_persistent: NonNegativeInt = Field(default=16, description="learned tokens that every query sees")
    rope_theta: PositiveFloat = Field(default=10_000.0, description="base of the rotary frequencies")


class WindowTitansConfig(TitansConfig):
    """Keys of ``model.mixer`` for titans_mag and titans_mal."""

    window: PositiveInt = Field(default=2048, description="tokens attention sees, the query's own among them")


def _attention_arguments(config: TitansConfig, d_model: int) -> tuple[Any, ...]:
    heads = config.n_attention_heads or config.n_heads or default_heads(d_model, even=True)
    key = (
        "model.mixer.n_heads"
        if config.n_attention_heads is None and config.n_heads
        else "model.mixer.n_attention_heads"
    )
    return d_model, heads, None, config.n_persistent, config.rope_theta, key


_LEAVES: Mapping[str, StateLeaf] = {
    "*memory/*weights/*": StateLeaf(heads=1, matrix=True),
    "*memory/*biases/*": StateLeaf(heads=1),
    "attention/[kv]": StateLeaf(heads=2),
    "[qkv]": StateLeaf(conv=True),
    "memory/[qkv]": StateLeaf(conv=True),
    "recall/q": StateLeaf(conv=True),
}
_REFUSES = "what it writes is a gradient taken at its own state"


@register_mixer("titans_memory", MemoryConfig)
class TitansMemory(Mixer):
    """The neural memory alone."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = _LEAVES
    refuses: ClassVar[str] = _REFUSES

    config: MemoryConfig

    def __init__(self, config: MemoryConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.memory = NeuralMemoryLayer(config, context, output_std(context.d_model, context.n_layers))

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`; the state is that of :class:`NeuralMemoryLayer`."""
        return self.memory(x, state, reset)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        return self.memory.initial_state(batch, device, dtype)

    def extra_flops_per_token(self, seq_len: int) -> float:
        return self.memory.extra_flops(seq_len)


class _WithAttention(Mixer):
    """Memory and sliding-window attention; state ``{"memory", "attention"}``."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = _LEAVES
    refuses: ClassVar[str] = _REFUSES

    config: WindowTitansConfig

    def __init__(self, config: WindowTitansConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model = context.d_model
        self.attention = SlidingAttention(config.window, *_attention_arguments(config, d_model))
        self.memory = NeuralMemoryLayer(config, context)
        self.memory_norm = RMSNorm(d_model, context.norm_eps)
        self.out_proj = Linear(d_model, d_model, output_std(d_model, context.n_layers))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        parts: dict[str, NeuralMemoryLayer | SlidingAttention] = {"memory": self.memory, "attention": self.attention}
        return {name: part.initial_state(batch, device, dtype) for name, part in parts.items()}

    def extra_flops_per_token(self, seq_len: int) -> float:
        return self.memory.extra_flops(seq_len) + self.attention.extra_flops(seq_len)


@register_mixer("titans_mag", WindowTitansConfig)
class TitansMAG(_WithAttention):
    """Memory as a gate of attention."""

    def __init__(self, config: WindowTitansConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.attention_norm = RMSNorm(context.d_model, context.norm_eps)

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`."""
        y, attention = self.attention(x, None if state is None else state["attention"], reset)
        m, memory = self.memory(x, None if state is None else state["memory"], reset)
        gated = self.attention_norm(y) * F.silu(self.memory_norm(m))
        return self.out_proj(gated), {"memory": memory, "attention": attention}


@register_mixer("titans_mal", WindowTitansConfig)
class TitansMAL(_WithAttention):
    """Memory as a layer before attention."""

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`."""
        m, memory = self.memory(x, None if state is None else state["memory"], reset)
        y, attention = self.attention(self.memory_norm(m), None if state is None else state["attention"], reset)
        return self.out_proj(y), {"memory": memory, "attention": attention}


class SegmentAttention(Heads):
    """Attention inside a segment of tokens and what the memory recalls for them, without the output projection."""

    def __init__(self, segment: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.segment = segment

    def forward(self, x: Tensor, h: Tensor, phase: Tensor, state: State) -> tuple[Tensor, State]:
        """x, h (batch, time, d_model) → (batch, time, d_model); phase (batch,): where in its segment a row's first
        token is. No row leaves its segment in ``time``.

        State: ``{"k", "v"}`` (batch, 2, segment, heads, d_head), of h and x, zeros where nothing was read.
        """
        time = x.shape[1]
        place = phase[:, None] + torch.arange(time, device=x.device)
        q, k, v = self.project(x)
        _, k_h, v_h = self.project(h)
        both = [
            torch.stack((self.rotate(k_h, place), self.rotate(k, place)), dim=1),
            torch.stack((v_h, v), dim=1),
        ]
        if time == self.segment:
            keys, values = both
        else:
            index = place[:, None, :, None, None].expand_as(both[0])
            keys, values = (state[n].to(new.dtype).scatter(2, index, new) for n, new in zip("kv", both, strict=True))
        mask = torch.arange(self.segment, device=x.device) <= place[..., None]
        mask = torch.cat((mask, mask), dim=-1)
        y = self.attend(q, self.rotate(q, place), keys.flatten(1, 2), values.flatten(1, 2), mask)
        full = (phase + time == self.segment)[:, None, None, None, None]
        return y, {"k": keys.masked_fill(full, 0.0), "v": values.masked_fill(full, 0.0)}

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.qkv_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        none = torch.zeros(batch, 2, self.segment, self.n_kv_heads, self.d_head, device=device, dtype=dtype)
        return {"k": none, "v": none.clone()}


@register_mixer("titans_mac", TitansConfig)
class TitansMAC(Mixer):
    """Memory as context of attention inside segments of ``chunk_size`` tokens, which count from a row's own start.

    Segments follow each other, since each recalls what the one before wrote; rows whose segments start at different
    places (resets) make as many shorter pieces.
    """

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = _LEAVES
    refuses: ClassVar[str] = _REFUSES

    config: TitansConfig

    def __init__(self, config: TitansConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model = context.d_model
        self.attention = SegmentAttention(config.chunk_size, *_attention_arguments(config, d_model))
        self.attention_proj = Linear(d_model, d_model)
        self.memory = NeuralMemoryLayer(config, context)
        self.attention_norm = RMSNorm(d_model, context.norm_eps)
        self.memory_norm = RMSNorm(d_model, context.norm_eps)
        self.out_proj = Linear(d_model, d_model, output_std(d_model, context.n_layers))

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`. State: ``{"memory", "attention", "recall"}``: the memory's (which holds the position in
        the segment), the segment's keys and values so far, and the convolution of the queries that recall."""
        time, fresh = x.shape[1], state is None
        if state is None:
            state = self.initial_state(len(x), x.device, x.dtype)
        read = state["memory"]["memory"]["position"].clamp(min=0)
        phase = paralm_kernels.positions(read, reset, time) % self.config.chunk_size
        cuts = self._cuts(phase, fresh, reset)
        outputs = []
        for begin, end in zip(cuts, [*cuts[1:], time], strict=True):
            now = None if reset is None else reset[:, begin:end]
            y, state = self._piece(x[:, begin:end], state, now, phase[:, begin])
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def _cuts(self, phase: Tensor, fresh: bool, reset: Tensor | None) -> list[int]:
        """Where pieces begin, so that in none a row's segment or sequence starts but at its first token."""
        time = phase.shape[1]
        if (fresh and reset is None) or time == 1:
            return list(range(0, time, self.config.chunk_size))
        cut = (phase == 0).any(0)
        cut[0] = True
        found: list[int] = cut.nonzero().flatten().tolist()
        return found

    def _piece(self, x: Tensor, state: State, reset: Tensor | None, phase: Tensor) -> tuple[Tensor, State]:
        recalled, attention = state["memory"]["memory"], state["attention"]
        if reset is not None:  # only ever at the first token
            lost = reset[:, :1, None, None, None]
            attention = {name: cache.masked_fill(lost, 0.0) for name, cache in attention.items()}
        h, recall = self.memory(x, state["recall"], reset, recalled)
        y, attention = self.attention(x, h.to(x.dtype), phase, attention)
        y = self.attention_proj(y)
        m, memory = self.memory(y, state["memory"], reset)
        out = self.out_proj(self.attention_norm(y) * F.silu(self.memory_norm(m)))
        return out, {"memory": memory, "attention": attention, "recall": recall}

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        memory = self.memory.initial_state(batch, device, dtype)
        attention = self.attention.initial_state(batch, device, dtype)
        return {"memory": memory, "attention": attention, "recall": {"q": memory["q"].clone()}}

    def extra_flops_per_token(self, seq_len: int) -> float:
        """The memory's; a recall; attention, over both halves of a segment; and the second use of q, k, v for h."""
        recall = self.memory.extra_flops(seq_len) / 4
        attention, d_model = self.attention, self.context.d_model
        seen = 2 * min(attention.segment, seq_len) + attention.n_persistent
        return self.memory.extra_flops(seq_len) + recall + 4.0 * d_model * seen + 2.0 * d_model * 4 * d_model
