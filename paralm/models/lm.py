"""The language model: embedding → blocks → norm → head, one entry point for training, scoring and generation.

    x ← x + drop(mixer(norm(x)))        x ← x + drop(mlp(norm(x)))        for each block

The residual stream is in at least float32 whatever the weights' dtype. Because every mixer carries its state by one
law, so does the model: a sequence fed in pieces, with the state handed on, gives what it gives whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from paralm_kernels.pointwise import compiled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paralm.config import ModelConfig
from paralm.errors import ConfigError
from paralm.models import loss as losses
from paralm.models.hybrid import layer_mixers
from paralm.models.mixers.base import LayerContext, Mixer, State
from paralm.models.mlp import SwiGLU
from paralm.models.norms import RMSNorm
from paralm.models.parameters import declare, embedding_std, initialize, normal, parameter_groups, refuse_unsaved, specs
from paralm.registry import validate_mixer


class LMOutput(NamedTuple):
    """What a forward gives; a named tuple, because DeepSpeed's hooks look into tuples."""

    loss: Tensor | None
    """Cross-entropy in nats summed over the unmasked tokens, scalar, at least float32; None without labels."""
    aux: Tensor | None
    """Sum of the weighted auxiliary losses (z-loss) over the same tokens; None without labels."""
    logits: Tensor | None
    """(batch, time, n_tokens), at least float32; None with labels."""
    state: State | None
    """The state after the last token."""
    stats: dict[str, Tensor | float]
    """``layer_03/newton_iterations``, ``layer_03/newton_last_update``, …: numbers, or tensors on a device."""
    token_losses: Tensor | None = None
    """(batch, time), 0 where masked, no gradient; only when asked for."""


class Block(nn.Module):
    """One mixer and one MLP, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig, mixer: Mixer) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer
        self.dropout = config.dropout
        self.mlp_norm: RMSNorm | None = None
        self.mlp: SwiGLU | None = None
        if config.mlp.enabled:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
            self.mlp = SwiGLU(config.mlp, config.d_model, config.n_layers)
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """(batch, time, d_model) → the same, and the mixer's state."""
        y, state = self.mixer.over_time(self.mixer_norm(x), state, reset)
        x = x + self._drop(y)
        if self.mlp is not None:
            # Compiled for training only: other calls have other shapes, and what is compiled anew is not kept.
            feed_forward = self._compiled if torch.is_grad_enabled() else None
            x = (feed_forward or self.feed_forward)(x)
        return x, state

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half: (batch, time, d_model) → the same."""
        assert self.mlp is not None
        assert self.mlp_norm is not None
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def compile_feed_forward(self) -> None:
        """Run the second half, in training, as torch compiles it: norm, gate and sum as few kernels. One graph a shape,
        so that what is computed depends on nothing that ran before."""
        self._compiled = compiled(self.feed_forward, dynamic=False, fullgraph=True)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward_without_state(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, None]:
        """As :meth:`forward`, for a state that nobody needs: checkpointing would hold it otherwise."""
        return self(x, state, reset)[0], None


class Head(nn.Module):
    """Logits h Wᵀ of the first ``n_tokens`` rows of W (vocab, d_model), which is its own or the embedding's."""

    def __init__(self, config: ModelConfig, vocab_size: int, n_tokens: int) -> None:
        super().__init__()
        self.cap, self.n_tokens = config.logit_cap, n_tokens
        self.weight = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.d_model))
        if self.weight is not None:
            declare(self, "weight", normal(_embedding_std(config)), decay=True, matrix=False)

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(batch, time, d_model) → (batch, time, n_tokens), at least float32."""
        logits = losses.logits_of(hidden.flatten(0, 1), weight[: self.n_tokens])
        return losses.capped(logits, self.cap).unflatten(0, hidden.shape[:2])


class Embedding(nn.Embedding):
    """torch's, without first values: :meth:`LanguageModel.init_weights` gives them, and drawing some on the meta device
    would import torch's compiler (1.6 s of a processor)."""

    def reset_parameters(self) -> None:
        """Nothing."""


class LanguageModel(nn.Module):
    """Built by :func:`build_model`. Its parameters are uninitialised until :meth:`init_weights`.

    ``n_tokens``: default: ``vocab_size``. Rows from there on are padding: they are in the loss that is trained on, so
    that they learn to be unlikely, and in no logits and no token's loss.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, n_tokens: int | None = None) -> None:
        super().__init__()
        self.config, self.vocab_size, self.n_tokens = config, vocab_size, n_tokens or vocab_size
        self.embedding = Embedding(vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config, build_mixer(spec, config, layer)) for layer, spec in enumerate(layer_mixers(config))
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Head(config, vocab_size, self.n_tokens)
        self.checkpointed = 0
        start = normal(_embedding_std(config))
        declare(self.embedding, "weight", start, decay=config.embedding_decay, matrix=False)

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of each layer."""
        return [block.mixer for block in self.layers]

    @property
    def bounded_state(self) -> bool:
        """Whether the state's size does not depend on how much was read."""
        return all(mixer.bounded_state for mixer in self.mixers)

    @property
    def head_weight(self) -> Tensor:
        """(vocab, d_model): the head's own matrix, or the embedding's."""
        return self.embedding.weight if self.head.weight is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        state: State | None = None,
        reset: Tensor | None = None,
        return_token_losses: bool = False,
        last_logits: bool = False,
        return_state: bool | None = None,
    ) -> LMOutput:
        """Loss with ``labels``, logits without.

        ``tokens``: int64 (batch, time). ``labels``: int64 (batch, time), already the *next* token of each position,
        −100 where it counts for nothing. ``state``: from a former call or :meth:`initial_state`, None for the
        latter. ``reset``: bool (batch, time), true where a new sequence starts. ``return_token_losses``: every
        token's loss, without gradient (``loss`` is then their sum, ``aux`` 0). ``last_logits``: logits of the last
        position only, (batch, 1, n_tokens). ``return_state``: default: always, except that a growing state is not
        kept while training.

        Raises ValueError if the state is of another model or batch.
        """
        training = labels is not None and torch.is_grad_enabled()
        keep = return_state if return_state is not None else self.bounded_state or not training
        hidden, state, stats = self._run(tokens, state, reset, keep)
        if labels is None:
            hidden = hidden[:, -1:] if last_logits else hidden
            return LMOutput(None, None, self.head(hidden, self.head_weight), state, stats)
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        chunk, cap = self.config.loss_chunk, self.config.logit_cap
        if return_token_losses:
            weight = self.head_weight[: self.n_tokens]
            each = losses.token_losses(flat, weight, targets, chunk=chunk, logit_cap=cap)
            return LMOutput(each.sum(), each.new_zeros(()), None, state, stats, each.view(labels.shape))
        loss, aux = losses.cross_entropy(
            flat, self.head_weight, targets, chunk=chunk, z_loss=self.config.z_loss, logit_cap=cap
        )
        return LMOutput(loss, aux, None, state, stats)

    def _run(
        self, tokens: Tensor, state: State | None, reset: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, State | None, dict[str, Tensor | float]]:
        """Hidden states after the last norm, the new state, and the mixers' statistics."""
        before = self._layer_states(state, len(tokens))
        x = self.embedding(tokens)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        after: list[State] = []
        stats: dict[str, Tensor | float] = {}
        for layer, block in enumerate(self.layers):
            run = block if keep_state else block.forward_without_state
            if layer < self.checkpointed and torch.is_grad_enabled():
                x, layer_state = checkpoint(run, x, before[layer], reset, use_reentrant=False)
            else:
                x, layer_state = run(x, before[layer], reset)
            after.append(layer_state)
            stats.update({f"layer_{layer:02d}/{key}": value for key, value in block.mixer.stats.items()})
        return self.norm(x), {"layers": tuple(after)} if keep_state else None, stats

    def _layer_states(self, state: State | None, batch: int) -> Sequence[State | None]:
        if state is None:
            return [None] * len(self.blocks)
        layers = state["layers"]
        if len(layers) != len(self.blocks):
            raise ValueError(f"the state has {len(layers)} layers, the model {len(self.blocks)}")
        rows = {len(leaf) for leaf in torch.utils._pytree.tree_leaves(layers)}
        if rows - {batch}:
            raise ValueError(f"the state has {sorted(rows - {batch})[0]} rows, the tokens {batch}")
        return layers

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before anything was read: ``{"layers": (…)}``, every leaf a tensor with the batch first."""
        return {"layers": tuple(mixer.initial_state(batch, device, dtype) for mixer in self.mixers)}

    def set_activation_checkpointing(self, blocks: bool | int) -> None:
        """Keep only a block's input for the backward, and run the block again there: all, none, or the first so many.

        The first ones, since the backward comes to them last: what the others kept is gone by then.
        """
        self.checkpointed = checkpointed_blocks(blocks, len(self.blocks))

    def init_weights(self, seed: int) -> None:
        """Fill every parameter: a pure function of (seed, parameter name)."""
        initialize(self, seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As :func:`paralm.models.parameters.parameter_groups`; every parameter is in exactly one."""
        return parameter_groups(self)


def checkpointed_blocks(setting: bool | int, n_layers: int) -> int:
    """How many of the first blocks run again in the backward."""
    return n_layers if setting is True else int(setting)


def _embedding_std(config: ModelConfig) -> float:
    return config.embedding_std or embedding_std(config.d_model)


def build_mixer(spec: dict[str, Any], config: ModelConfig, layer: int) -> Mixer:
    """The mixer of one layer. Raises ConfigError, one line."""
    entry, keys = validate_mixer(spec)
    context = LayerContext(config.d_model, layer, config.n_layers, config.norm_eps, config.init)
    mixer: Mixer = entry.value(keys, context)
    refuse_unsaved(mixer, f"mixer '{entry.name}'")
    return mixer


def construct_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """A model whose parameters are where torch (or DeepSpeed's ``zero.Init``) puts new tensors, uninitialised."""
    padded = config.vocab_size or vocab_size
    if padded < vocab_size:
        raise ConfigError(f"model.vocab_size: {padded} is less than the tokenizer's {vocab_size}; leave it out or pad")
    return LanguageModel(config, padded, vocab_size)


def build_model(
    config: ModelConfig,
    vocab_size: int,
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """A model with its initial values, which depend on ``seed`` and the parameters' names only.

    ``vocab_size``: the tokenizer's; ``config.vocab_size`` may be larger (padding). ``device``: "meta" gives a model
    of shapes without values. ``dtype``: of the parameters, default float32. Raises ConfigError, one line, for
    keys that cannot work, before anything is allocated.
    """
    with torch.device("meta"):
        model = construct_model(config, vocab_size).to(dtype or torch.float32)
    where = torch.device(device or "cpu")
    if where.type != "meta":
        model.to_empty(device=where)
        model.init_weights(seed)
    return model


def flops_per_token(model: LanguageModel, seq_len: int) -> float:
    """Matrix-product FLOPs of forward and backward for one token of a sequence of ``seq_len``.

    Three times the forward's (the backward makes two products for each). The forward has two FLOPs for each element
    of each matrix, which are the parameters that weight decay applies to and the head: the embedding's look-up is
    none. Attention adds its products with the (seq_len + 1)/2 keys that a causal query sees on average. Elementwise
    work, short convolutions and recomputation are not counted, so this over time and peak is the usual MFU.
    """
    apart = (model.embedding.weight, model.head_weight)
    inside = (p.numel() for _, p, spec in specs(model) if spec.decay and all(p is not other for other in apart))
    matrices = model.head_weight.numel() + sum(inside)
    return 3.0 * (2.0 * matrices + sum(mixer.extra_flops_per_token(seq_len) for mixer in model.mixers))
