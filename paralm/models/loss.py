"""Cross-entropy of a language model's head without ever holding all the logits.

    l_i = W h_i  (or c·tanh(l_i/c) with a cap c)        lse_i = log Σ_v exp l_iv
    loss = Σ_i (lse_i − l_i[y_i])        aux = z · Σ_i lse_i²  (z-loss: PaLM, arXiv 2204.02311)      over labels ≠ −100

Logits exist for ``chunk`` tokens at a time. Where a gradient is needed it is made in the forward, while the chunk's
logits are at hand, and only scaled in the backward: nothing is computed twice and nothing of the size of the logits
is kept. All softmax arithmetic and the weight's gradient are in at least float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from paralm_kernels.dry import on_gpu
from paralm_kernels.once import once_differentiable
from torch import Tensor

IGNORE = -100
"""Labels with this value count for nothing."""


class _Options(NamedTuple):
    chunk: int
    z_loss: float
    cap: float | None


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, z_loss: float = 0.0, logit_cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats and the weighted z-loss, two scalars in at least float32.

    ``hidden``: (tokens, d); ``weight``: (vocab, d), both of one floating dtype; ``labels``: int64 (tokens,).
    Each of the two has exact gradients whatever the other is scaled by.
    """
    options = _Options(chunk, z_loss, logit_cap)
    keep = labels != IGNORE
    if hidden.device.type == "cpu" and bool((~keep).sum() > 0.1 * keep.numel()):
        # Masked tokens are left out before the products; a device would have to be waited for to learn how many.
        hidden, labels = hidden[keep], labels[keep]
    loss, aux = _ChunkedCrossEntropy.apply(hidden, weight, labels, options)
    return loss, aux


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, logit_cap: float | None = None
) -> Tensor:
    """Each token's cross-entropy in nats, in at least float32, 0 where the label is −100; no gradient."""
    losses = torch.empty(labels.shape, dtype=_wide(hidden.dtype), device=hidden.device)
    for part in _parts(len(labels), chunk):
        logits = capped(logits_of(hidden[part], weight), logit_cap)
        losses[part] = F.cross_entropy(logits, labels[part], ignore_index=IGNORE, reduction="none")
    return losses


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden Wᵀ with accumulation and result in at least float32. (tokens, d), (vocab, d) → (tokens, vocab)."""
    return _matmul(hidden, weight.t())


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """c·tanh(l/c), which keeps logits within ±c; without a cap, the logits."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b of two matrices of one dtype, the result in at least float32."""
    wide = _wide(a.dtype)
    if a.dtype == wide:
        return torch.mm(a, b, out=out) if out is not None else torch.mm(a, b)
    if on_gpu(a):
        return torch.mm(a, b, out_dtype=wide)
    return torch.mm(a.to(wide), b.to(wide))


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


class _Sums(NamedTuple):
    """What one pass over the chunks gives; gradients None where not asked for."""

    loss: Tensor
    aux: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None


def _pass(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: _Options,
    need: tuple[bool, bool],
    scales: tuple[Tensor | float, Tensor | float] = (1.0, 1.0),
) -> _Sums:
    """Loss, z-loss, and the gradients of ``scales[0] · loss + scales[1] · aux``."""
    wide = _wide(hidden.dtype)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    aux = torch.zeros_like(loss)
    grad_hidden = torch.empty_like(hidden) if need[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if need[1] else None
    # One buffer for all chunks: memory newly mapped for each costs more than the softmax in it.
    buffer = torch.empty((min(options.chunk, len(labels)), len(weight)), dtype=wide, device=hidden.device)
    for part in _parts(len(labels), options.chunk):
        h, y = hidden[part], labels[part]
        logits = _matmul(h, weight.t(), buffer[: len(y)])
        if options.cap is not None:
            logits = logits.div_(options.cap).tanh_().mul_(options.cap)
        slope = 1 - (logits / options.cap).square_() if options.cap is not None and any(need) else None
        live = (y != IGNORE).to(wide)
        column = y.clamp(min=0)[:, None]
        target = logits.gather(1, column)[:, 0]
        top = logits.amax(dim=1, keepdim=True)
        exps = logits.sub_(top).exp_()
        total = exps.sum(dim=1)
        lse = top[:, 0] + total.log()
        loss += ((lse - target) * live).sum()
        aux += (lse.square() * live).sum() * options.z_loss
        if not any(need):
            continue
        # d/dl of s₀(lse − l_y) + s₁ z lse² = (s₀ + 2 s₁ z lse) softmax(l) − s₀ 1_y
        rate = (scales[0] + (2 * options.z_loss) * scales[1] * lse) * live
        grad = exps.mul_((rate / total)[:, None])
        grad.scatter_add_(1, column, (-scales[0] * live)[:, None])
        if slope is not None:
            grad.mul_(slope)
        grad = grad.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(grad, weight, out=grad_hidden[part])
        if grad_weight is not None:
            _accumulate(grad_weight, grad.t(), h)
    return _Sums(loss, aux, grad_hidden, grad_weight)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _matmul(a, b)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The forward already makes the gradients of loss + aux; the backward scales them.

    When the two outputs arrive with different scales, which nothing in training does, the pass is made again with
    those scales: exact always, and no second weight gradient is kept for a case that does not occur.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        sums = _pass(hidden, weight, labels, options, need)
        ctx.options, ctx.need = options, need
        ctx.save_for_backward(hidden, weight, labels, sums.grad_hidden, sums.grad_weight)
        return sums.loss, sums.aux

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, d_aux: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, grad_hidden, grad_weight = ctx.saved_tensors
        scale = d_loss
        if ctx.options.z_loss and not _same(d_loss, d_aux):
            scales = (0.0 if d_loss is None else d_loss, 0.0 if d_aux is None else d_aux)
            sums = _pass(hidden, weight, labels, ctx.options, ctx.need, scales)
            grad_hidden, grad_weight, scale = sums.grad_hidden, sums.grad_weight, None
        elif d_loss is None:
            return None, None, None, None
        if grad_hidden is not None:
            grad_hidden = grad_hidden if scale is None else grad_hidden * scale.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight if scale is None else grad_weight * scale).to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two scales are equal; the gradient of ``loss + aux`` is one tensor twice, known without waiting."""
    if a is None or b is None or a is b:
        return a is b
    return a.data_ptr() == b.data_ptr() or bool(a == b)
