"""What a tile of the neural memory does between its matrix products, and the gradients of that.

The names are those of neural_memory_tile.py. Tensors are (batch, heads, time, ·), coefficients of tokens (batch, heads,
time) and of a tile's last token (batch, heads); an absent one (None) stands for 1 where it scales what is kept, and for
0 where it scales what is added. All is computed in at least float32; what goes into a matrix product next has the dtype
of the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pointwise import pointwise

NORM_EPS = 1e-2
"""Added to the squared length in the norm around a memory: no slope is steeper than 10, where z is nearly zero too."""

_INV_SQRT_2PI = 0.3989422804014327
_INV_SQRT_2 = 0.7071067811865476


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(factor: Tensor | None, x: Tensor) -> Tensor:
    """A factor a token, or a head, times what it belongs to."""
    return x if factor is None else factor.reshape(*factor.shape, *(1,) * (x.dim() - factor.dim())) * x


def activate(kind: str, z: Tensor) -> Tensor:
    """The activation between two layers; GELU is the exact one, with erf."""
    return F.gelu(z) if kind == "gelu" else F.silu(z)


def _slope(kind: str, z: Tensor, grad: Tensor) -> Tensor:
    """Its derivative times ``grad``."""
    backward = torch.ops.aten.gelu_backward if kind == "gelu" else torch.ops.aten.silu_backward
    found: Tensor = backward(grad.to(z.dtype), z)
    return found


def _curve(kind: str, z: Tensor) -> Tensor:
    """Its second derivative."""
    if kind == "gelu":
        return _INV_SQRT_2PI * torch.exp(-0.5 * z * z) * (2 - z * z)
    gate = torch.sigmoid(z)
    return gate * (1 - gate) * (2 + z * (1 - 2 * gate))


def inverse_length(z: Tensor) -> Tensor:
    """1/√(|z|² + ε) of each token."""
    return (z.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()


def _length_grad(z: Tensor, grad: Tensor) -> Tensor:
    """From the gradient to z/√(|z|² + ε) to z."""
    scale = inverse_length(z)
    unit = z * scale
    return scale * (grad - unit * (unit * grad).sum(-1, keepdim=True))


def finish(x: Tensor, z: Tensor, gain: Tensor | None) -> Tensor:
    """M(x) from the last layer's output z."""
    return z if gain is None else x + gain.unsqueeze(-2) * (z * inverse_length(z))


def _loss_slope(x: Tensor, z: Tensor, v: Tensor, gain: Tensor | None) -> Tensor:
    """∂‖M(x) − v‖²/∂z."""
    error = 2 * (finish(x, z, gain) - v)
    if gain is None:
        return error
    return _length_grad(z, gain.unsqueeze(-2) * error)


# -- the gates ----------------------------------------------------------------------------------------------------


@pointwise
def between(log: Tensor) -> Tensor:
    """(…, time) → (…, time, time): exp of the sum of ``log`` over j < k ≤ i at (i, j), zero above the diagonal."""
    index = torch.arange(log.shape[-1], device=log.device)
    # Column j sums what comes after j: entries k > j of the log, summed up to i.
    steps = torch.where(index[:, None] > index, log.unsqueeze(-1), 0.0).cumsum(-2)
    return torch.where(index[:, None] >= index, steps, float("-inf")).exp()


@pointwise
def running(log: Tensor) -> Tensor:
    """Products of all steps up to each."""
    return log.cumsum(-1).exp()


@pointwise
def between_grad(grad: Tensor, value: Tensor, column: Tensor | None, row: Tensor | None) -> Tensor:
    """From the gradient to :func:`between` (and ``column`` × ``row`` more of it) to what :func:`running_grad` sums: k
    is in all (i, j) with j < k ≤ i, so its gradient differs from the next one's by row k less column k of these."""
    if column is not None and row is not None:
        grad = grad + column.unsqueeze(-1) * row.unsqueeze(-2)
    product = grad * value
    return product.sum(-1) - product.sum(-2)


@pointwise
def running_grad(differences: Tensor, grad: Tensor | None, value: Tensor) -> Tensor:
    """To the logarithm: through :func:`between`, and :func:`running` of that ``value``."""
    total = differences if grad is None else differences + grad * value
    return total.flip(-1).cumsum(-1).flip(-1)


# -- forward ------------------------------------------------------------------------------------------------------


@pointwise
def activated(z: Tensor, kind: str) -> Tensor:
    """a of the next layer."""
    return activate(kind, _wide(z)).to(z.dtype)


@pointwise
def last_slope(k: Tensor, z: Tensor, v: Tensor, rate: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """d of the last layer, with the rate, which all layers before have from it."""
    return _scaled(rate, _loss_slope(k, _wide(z), v, gain)).to(dtype)


@pointwise
def slope(back: Tensor, z: Tensor, kind: str) -> Tensor:
    """d of a layer from what came back from the next, and its output z."""
    return _slope(kind, _wide(z), _wide(back)).to(back.dtype)


@pointwise
def weigh(grads: Tensor, scores: Tensor) -> Tensor:
    """G ⊙ scores."""
    return (grads * scores).to(scores.dtype)


def _read(keep: Tensor | None, now: Tensor, rate: Tensor | None, late: Tensor | None, written: Tensor) -> Tensor:
    z = _scaled(keep, _wide(now)) - written
    return z if late is None else z + _scaled(rate, _wide(late))


@pointwise
def read_hidden(
    keep: Tensor | None, now: Tensor, rate: Tensor | None, late: Tensor | None, written: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """W_t x_t = β W₀x + f S₀x − written of a layer before others, and the next one's x."""
    z = _read(keep, now, rate, late, written).to(now.dtype)
    return z, activate(kind, _wide(z)).to(now.dtype)


@pointwise
def read_last(
    keep: Tensor | None,
    now: Tensor,
    rate: Tensor | None,
    late: Tensor | None,
    written: Tensor,
    q: Tensor,
    gain: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """W_t x_t of the last layer, and M_t(q) where it is not the same."""
    z = _read(keep, now, rate, late, written)
    return z, None if gain is None else finish(q, z, gain)


@pointwise
def weighed_slopes(d: Tensor, grads: Tensor, momentum_grads: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """g ⊙ d and n ⊙ d, the last token's rows of G and E."""
    late = None if momentum_grads is None else _scaled(momentum_grads, _wide(d)).to(d.dtype)
    return _scaled(grads, _wide(d)).to(d.dtype), late


@pointwise
def updated(
    w: Tensor,
    s: Tensor | None,
    by_weights: Tensor,
    by_momentum: Tensor | None,
    keep: Tensor | None,
    rate: Tensor | None,
    persist: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Weights and momentum after the tile: β W₀ + f S₀ − (g ⊙ d)ᵀa and h S₀ − (n ⊙ d)ᵀa."""
    after = _scaled(keep, w) - by_weights
    if s is None or by_momentum is None:
        return after, None
    return after + _scaled(rate, s), _scaled(persist, s) - by_momentum


# -- backward -----------------------------------------------------------------------------------------------------


@pointwise
def read_last_grad(grad: Tensor, z: Tensor, gain: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of M_t(q) with a norm to z and γ."""
    return _length_grad(z, gain.unsqueeze(-2) * grad).to(dtype), (grad * z * inverse_length(z)).sum((0, 2))


@pointwise
def scores_grad(grad: Tensor, grads: Tensor, scores: Tensor, sum_before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of −(G ⊙ scores), ``grad``, to the scores, and to G, added to the layers' before."""
    by_grads = -grad * scores.to(grads.dtype)
    return (-grads * grad).to(grad.dtype), by_grads if sum_before is None else by_grads + sum_before


@pointwise
def read_scaled(grad: Tensor, keep: Tensor | None, rate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """β and f times the gradient to W_t x_t."""
    late = None if rate is None else _scaled(rate, _wide(grad)).to(grad.dtype)
    return _scaled(keep, _wide(grad)).to(grad.dtype), late


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) * b).sum(-1)


def _to_factors(
    x: Tensor, now: Tensor, late: Tensor | None, keep: Tensor | None, rate: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """To β and f, in their dtype."""
    by_rate = None if late is None or rate is None else _dot(x, late, rate.dtype)
    return None if keep is None else _dot(x, now, keep.dtype), by_rate


def _to_reads(now: Tensor, late: Tensor | None, by_scores: Tensor, keep: Tensor | None, rate: Tensor | None) -> Tensor:
    by_x = _scaled(keep, _wide(now)) + by_scores
    return by_x if late is None else by_x + _scaled(rate, _wide(late))


@pointwise
def read_grad(
    x: Tensor, now: Tensor, late: Tensor | None, by_scores: Tensor, keep: Tensor | None, rate: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """To x, β and f: ``now`` and ``late`` are the gradient to W_t x_t through W₀ and S₀."""
    by_x = _to_reads(now, late, by_scores, keep, rate)
    return by_x, *_to_factors(x, now, late, keep, rate)


@pointwise
def read_hidden_grad(
    x: Tensor,
    now: Tensor,
    late: Tensor | None,
    by_scores: Tensor,
    keep: Tensor | None,
    rate: Tensor | None,
    z: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`read_grad`, but to the output z that x is the activation of."""
    n = z.shape[-1]  # without the 1 of biases
    by_x = _to_reads(now, late, by_scores, keep, rate)
    by_z = _slope(kind, _wide(z), by_x[..., :n]).to(z.dtype)
    return by_z, *_to_factors(x, now, late, keep, rate)


class Uses(NamedTuple):
    """Of a layer's d, with the last rows of G and E in ``grads`` and ``momentum_grads``: gradients to what it went
    into, a read (negated), the updates of weights and momentum (negated), and ``back`` of the layer before."""

    d: Tensor
    by_read: Tensor | None
    by_weights: Tensor
    by_momentum: Tensor | None
    by_back: Tensor | None
    grads: Tensor
    momentum_grads: Tensor | None

    def together(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """To d, and to the rows."""
        total = -_scaled(self.grads, _wide(self.by_weights))
        late = None
        if self.by_momentum is not None:
            total = total - _scaled(self.momentum_grads, _wide(self.by_momentum))
            late = -_dot(self.d, self.by_momentum, self.grads.dtype)
        if self.by_read is not None:
            total = total - self.by_read
        if self.by_back is not None:
            total = total + self.by_back
        return total, -_dot(self.d, self.by_weights, self.grads.dtype), late


@pointwise
def slopes_grad(
    uses: Uses,
    back: Tensor,
    z: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of d = back ⊙ act′(z) to back, to z, and to the last token's rows of G and E."""
    total, by_grads, by_momentum_grads = uses.together()
    z = _wide(z)
    by_z = total * back * _curve(kind, z)
    return _slope(kind, z, total).to(uses.d.dtype), by_z.to(uses.d.dtype), by_grads, by_momentum_grads


@pointwise
def last_slopes_grad(
    uses: Uses,
    k: Tensor,
    z: Tensor,
    v: Tensor,
    rate: Tensor,
    gain: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """As :func:`slopes_grad` of the last layer, d = θ ∂ℓ/∂z: to z, k, v, θ, γ and the rows."""
    total, by_grads, by_momentum_grads = uses.together()
    z = _wide(z)
    by_rate = (_loss_slope(k, z, v, gain) * total).sum(-1)
    total = _scaled(rate, total)
    if gain is None:
        return (2 * total).to(uses.d.dtype), None, -2 * total, by_rate, None, by_grads, by_momentum_grads
    # With u = z s, s = 1/√(|z|² + ε), e = 2 (k + γu − v), w = γe: ∂ℓ/∂z = s (w − u (u·w)). Each step of it, backwards.
    gamma = gain.unsqueeze(-2)
    s = inverse_length(z)
    u = z * s
    e = 2 * (k + gamma * u - v)
    w = gamma * e
    along = (u * w).sum(-1, keepdim=True)
    inner = s * total  # to w − u (u·w)
    to_along = -(inner * u).sum(-1, keepdim=True)
    to_w = inner + to_along * u
    to_e = gamma * to_w
    to_u = to_along * w - along * inner + 2 * gamma * to_e
    to_s = (total * (w - u * along)).sum(-1, keepdim=True) + (to_u * z).sum(-1, keepdim=True)
    to_z = to_u * s - to_s * s**3 * z
    to_gain = (e * to_w + 2 * u * to_e).sum((0, 2))
    return to_z.to(uses.d.dtype), 2 * to_e, -2 * to_e, by_rate, to_gain, by_grads, by_momentum_grads


def _to_inputs(by_output: Tensor, by_scores: Tensor | None, by_weights: Tensor, by_momentum: Tensor | None) -> Tensor:
    total = _wide(by_output) - by_weights
    if by_momentum is not None:
        total = total - by_momentum
    if by_scores is not None:
        total = total + by_scores
    return total


@pointwise
def inputs_grad(
    by_output: Tensor, by_scores: Tensor | None, by_weights: Tensor, by_momentum: Tensor | None, before: Tensor | None
) -> Tensor:
    """To a layer's input a: through z, the scores of a read, and the updates; added to ``before``."""
    total = _to_inputs(by_output, by_scores, by_weights, by_momentum)
    return total if before is None else total + before


@pointwise
def hidden_grad(
    by_output: Tensor,
    by_scores: Tensor | None,
    by_weights: Tensor,
    by_momentum: Tensor | None,
    z: Tensor,
    by_slope: Tensor,
    kind: str,
) -> Tensor:
    """As :func:`inputs_grad`, but to the output z that a is the activation of; ``by_slope``: through its slope."""
    n = z.shape[-1]
    total = _to_inputs(by_output, by_scores, by_weights, by_momentum)
    return (_slope(kind, _wide(z), total[..., :n]) + by_slope).to(z.dtype)


@pointwise
def updated_grad(
    grad: Tensor,
    grad_momentum: Tensor | None,
    w: Tensor,
    s: Tensor | None,
    keep: Tensor | None,
    rate: Tensor | None,
    persist: Tensor | None,
    by_read: Tensor | None,
    momentum_by_read: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """To W₀, S₀, and the last token's β, f and h, one number a row of the weights: (batch, heads, out) each."""
    by_w = _scaled(keep, grad)
    if by_read is not None:
        by_w = by_w + by_read
    by_keep = None if keep is None else (grad * w).sum(-1)
    if s is None or grad_momentum is None:
        return by_w, None, by_keep, None, None
    by_s = _scaled(rate, grad) + _scaled(persist, grad_momentum)
    if momentum_by_read is not None:
        by_s = by_s + momentum_by_read
    return by_w, by_s, by_keep, (grad * s).sum(-1), (grad_momentum * s).sum(-1)
