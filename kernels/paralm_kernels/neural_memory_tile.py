"""The neural memory inside one tile: stretches of time in which the weights that gradients are taken at stand still.

W₀ and S₀ are weights and momentum at the tile's start, W̄ the weights at the chunk's start, a_l and z_l the inputs and
outputs of layer l on the keys at W̄, d_l = ∂ℓ/∂z_l there (ℓ_j = ‖M(k_j) − v_j‖²). With, for i ≥ j (i, j in the tile)

    D_ij = Π_{j<k≤i} (1 − α_k)      N_ij = θ_j Π_{j<k≤i} η_k      h_i = Π_{k≤i} η_k      β_i = Π_{k≤i} (1 − α_k)
    G = D N      f = D h

the memory after token t is, per layer,

    S_t = h_t S₀ − Σ_{j≤t} N_tj d_j a_jᵀ        W_t = β_t W₀ + f_t S₀ − Σ_{j≤t} G_tj d_j a_jᵀ

and applied to x_t, without forming it (biases: the same with a_j replaced by 1),

    W_t x_t = β_t W₀ x_t + f_t S₀ x_t − Σ_{j≤t} G_tj (a_j · x_t) d_j

With a norm, M(x) = x + γ ⊙ z/√(|z|² + ε), z what the last layer gives: only d of that layer and the last step of a read
know of it.

Titans (arXiv 2501.00663) section 3; the read at every token is worked out in this project's notes and held against the
loop by the tests. D and N come from sums over the steps between (never a difference of two cumulative sums, which
cancels), so that η = 0 and α = 1 are exact zeros and not NaN. All is plain differentiable torch: gradients of the
inner gradient come out of autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "silu")
"""Between layers; GELU is the exact one, with erf."""

NORM_EPS = 1e-2
"""Added to the squared length in the norm around a memory: no slope is steeper than 10, where z is nearly zero too."""

_INV_SQRT_2PI = 0.3989422804014327
_INV_SQRT_2 = 0.7071067811865476


class Layers(NamedTuple):
    """A memory, its momentum, or a gradient of either: ``weights`` (batch, heads, out, in) for each layer and
    ``biases`` (batch, heads, out) for each, or none."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def where(self, mask: Tensor, other: Layers) -> Layers:
        """This where ``mask`` (batch,) is true, else the other."""
        return Layers(
            tuple(torch.where(mask[:, None, None, None], a, b) for a, b in zip(self.weights, other.weights)),
            tuple(torch.where(mask[:, None, None], a, b) for a, b in zip(self.biases, other.biases)),
        )

    @property
    def flat(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases)

    @classmethod
    def of(cls, flat: tuple[Tensor, ...], depth: int) -> Layers:
        return cls(tuple(flat[:depth]), tuple(flat[depth:]))


class Form(NamedTuple):
    """What a memory is besides its weights: the ``activation`` between layers, the ``gain`` γ (heads, d_out) of the
    norm and residual around them or None, and the ``dtype`` operands of matrix products are rounded to."""

    activation: str
    gain: Tensor | None = None
    dtype: torch.dtype | None = None

    def finish(self, x: Tensor, z: Tensor) -> Tensor:
        """M(x) from the last layer's output z, both (batch, heads, time, d)."""
        if self.gain is None:
            return z
        return x + self.gain.unsqueeze(-2) * (z * _inverse_length(z))

    def slope(self, x: Tensor, z: Tensor, v: Tensor) -> Tensor:
        """∂‖M(x) − v‖²/∂z."""
        error = 2 * (self.finish(x, z) - v)
        if self.gain is None:
            return error
        scale, weighted = _inverse_length(z), self.gain.unsqueeze(-2) * error
        unit = z * scale
        return scale * (weighted - unit * (unit * weighted).sum(-1, keepdim=True))


def _inverse_length(z: Tensor) -> Tensor:
    return (z.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()


class Gates(NamedTuple):
    """``rate`` θ, ``log_momentum`` log η and ``log_keep`` log(1 − α), each (batch, heads, time); None: η = 0, α = 0."""

    rate: Tensor
    log_momentum: Tensor | None
    log_keep: Tensor | None


def activate(kind: str, z: Tensor) -> Tensor:
    """The activation between two layers."""
    return F.gelu(z) if kind == "gelu" else F.silu(z)


def _slope(kind: str, z: Tensor) -> Tensor:
    """Its derivative, from operations that autograd differentiates again."""
    if kind == "gelu":
        return 0.5 * (1 + torch.erf(z * _INV_SQRT_2)) + z * (_INV_SQRT_2PI * torch.exp(-0.5 * z * z))
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """a b with operands rounded to ``dtype`` (None: as they are); the result has the dtype of ``a``."""
    if dtype is None or dtype == a.dtype:
        return torch.matmul(a, b)
    return torch.matmul(a.to(dtype), b.to(dtype)).to(a.dtype)


def apply_memory(memory: Layers, x: Tensor, form: Form) -> Tensor:
    """M(x) of one memory for all of x (batch, heads, time, in)."""
    return form.finish(x, _outputs(memory, x, form)[1][-1])


def _outputs(memory: Layers, x: Tensor, form: Form) -> tuple[list[Tensor], list[Tensor]]:
    """Every layer's input and output."""
    inputs, outputs = [x], []
    for layer, weight in enumerate(memory.weights):
        z = matmul(inputs[-1], weight.mT, form.dtype)
        if memory.biases:
            z = z + memory.biases[layer].unsqueeze(-2)
        outputs.append(z)
        if layer + 1 < len(memory.weights):
            inputs.append(activate(form.activation, z))
    return inputs, outputs


def loss_gradients(memory: Layers, k: Tensor, v: Tensor, form: Form) -> tuple[list[Tensor], list[Tensor]]:
    """(a, d): each layer's input on k, and ∂‖M(k) − v‖²/∂(the layer's output), both (batch, heads, time, ·)."""
    inputs, outputs = _outputs(memory, k, form)
    slopes = [form.slope(k, outputs[-1], v)]
    for layer in range(len(memory.weights) - 1, 0, -1):
        back = matmul(slopes[0], memory.weights[layer], form.dtype)
        slopes.insert(0, back * _slope(form.activation, outputs[layer - 1]))
    return inputs, slopes


def _between(log: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, time) → (…, time, time): exp of the sum of ``log`` over j < k ≤ i at (i, j), zero above the diagonal."""
    length = log.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=log.device).tril()
    # Column j sums what comes after j: entries k > j of the log, summed up to i.
    steps = torch.where(lower.tril(-1), log.to(dtype).unsqueeze(-1), 0.0).cumsum(-2)
    return torch.where(lower, steps, float("-inf")).exp()


class Mixing(NamedTuple):
    """The coefficients above: ``keep`` β and ``from_momentum`` f (batch, heads, time), ``grads`` G (batch, heads, time,
    time); of the momentum ``persist`` h and ``momentum_grads`` N. None where there is no momentum, or no forgetting."""

    keep: Tensor | None
    from_momentum: Tensor | None
    grads: Tensor
    persist: Tensor | None
    momentum_grads: Tensor | None


def mixing(gates: Gates, dtype: torch.dtype) -> Mixing:
    """The coefficients of a tile from its gates."""
    rate = gates.rate.to(dtype)
    length = rate.shape[-1]
    triangle = torch.ones(length, length, dtype=dtype, device=rate.device).tril()
    decay = None if gates.log_keep is None else _between(gates.log_keep, dtype)
    keep = None if gates.log_keep is None else gates.log_keep.to(dtype).cumsum(-1).exp()
    if gates.log_momentum is None:
        return Mixing(keep, None, (triangle if decay is None else decay) * rate.unsqueeze(-2), None, None)
    momentum = _between(gates.log_momentum, dtype) * rate.unsqueeze(-2)
    persist = gates.log_momentum.to(dtype).cumsum(-1).exp()
    both = torch.cat((persist.unsqueeze(-1), momentum), dim=-1)
    both = both.cumsum(-2) if decay is None else torch.matmul(decay, both)
    return Mixing(keep, both[..., 0], both[..., 1:], persist, momentum)


class Ends(NamedTuple):
    """Row ``t`` of :class:`Mixing` for a row's last token in the tile."""

    keep: Tensor | None
    from_momentum: Tensor | None
    grads: Tensor
    persist: Tensor | None
    momentum_grads: Tensor | None


def _ends(mix: Mixing, lengths: Tensor | None) -> Ends:
    """Coefficients at the last of ``lengths`` (batch,) tokens; a row of no tokens keeps what it has."""
    if lengths is None:
        keep, from_momentum, grads, persist, momentum_grads = (None if c is None else c.select(2, -1) for c in mix)
        assert grads is not None
        return Ends(keep, from_momentum, grads, persist, momentum_grads)
    last = (lengths - 1).clamp(min=0)[:, None, None]
    none = (lengths == 0)[:, None, None]

    def vector(c: Tensor | None, empty: float) -> Tensor | None:
        if c is None:
            return None
        picked = c.gather(2, last.expand(-1, c.shape[1], -1))
        return torch.where(none, empty, picked).squeeze(2)

    def matrix(c: Tensor | None) -> Tensor | None:
        if c is None:
            return None
        picked = c.gather(2, last[..., None].expand(-1, c.shape[1], -1, c.shape[3]))
        return torch.where(none[..., None], 0.0, picked).squeeze(2)

    last_grads = matrix(mix.grads)
    assert last_grads is not None
    return Ends(
        vector(mix.keep, 1.0),
        vector(mix.from_momentum, 0.0),
        last_grads,
        vector(mix.persist, 1.0),
        matrix(mix.momentum_grads),
    )


def tile(
    memory: Layers,
    start: Layers,
    momentum: Layers | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    lengths: Tensor | None,
    form: Form,
) -> tuple[Tensor | None, Layers, Layers | None]:
    """One tile: (y, memory, momentum) after it.

    memory, momentum: at the tile's start; start: the memory gradients are taken at. q, k (batch, heads, time, in), v
    (batch, heads, time, out) in the dtype of the memory; q None: no read. lengths (batch,): how many of the tokens are
    a row's own, None for all.
    """
    inputs, slopes = loss_gradients(start, k, v, form)
    mix = mixing(gates, k.dtype)
    y = None if q is None else _read(memory, momentum, q, inputs, slopes, mix, form)
    ends = _ends(mix, lengths)
    weights = [_after(w, ends.keep) for w in memory.weights]
    biases = [_after(c, ends.keep) for c in memory.biases]
    momenta: list[Tensor] = []
    momenta_biases: list[Tensor] = []
    for layer, (a, d) in enumerate(zip(inputs, slopes)):
        scaled = (ends.grads.unsqueeze(-1) * d).mT
        weights[layer] = weights[layer] - matmul(scaled, a, form.dtype)
        if biases:
            biases[layer] = biases[layer] - scaled.sum(-1)
        if momentum is None:
            continue
        assert ends.from_momentum is not None
        assert ends.momentum_grads is not None
        s = momentum.weights[layer]
        weights[layer] = torch.addcmul(weights[layer], _like(ends.from_momentum, s), s)
        scaled = (ends.momentum_grads.unsqueeze(-1) * d).mT
        momenta.append(_after(s, ends.persist) - matmul(scaled, a, form.dtype))
        if biases:
            s = momentum.biases[layer]
            biases[layer] = torch.addcmul(biases[layer], _like(ends.from_momentum, s), s)
            momenta_biases.append(_after(s, ends.persist) - scaled.sum(-1))
    after = None if momentum is None else Layers(tuple(momenta), tuple(momenta_biases))
    return y, Layers(tuple(weights), tuple(biases)), after


def _like(factor: Tensor, x: Tensor) -> Tensor:
    """(batch, heads) against (batch, heads, …)."""
    return factor.reshape(*factor.shape, *(1,) * (x.dim() - 2))


def _after(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * _like(factor, x)


def _read(
    memory: Layers,
    momentum: Layers | None,
    x: Tensor,
    inputs: list[Tensor],
    slopes: list[Tensor],
    mix: Mixing,
    form: Form,
) -> Tensor:
    """M_t(x_t) at every token t of the tile."""
    depth, first, dtype = len(inputs), x, form.dtype
    for layer in range(depth):
        scores = matmul(x, inputs[layer].mT, dtype)
        z = matmul(x, memory.weights[layer].mT, dtype)
        if memory.biases:
            scores = scores + 1
            z = z + memory.biases[layer].unsqueeze(-2)
        if mix.keep is not None:
            z = z * mix.keep.unsqueeze(-1)
        if momentum is not None:
            assert mix.from_momentum is not None
            s = matmul(x, momentum.weights[layer].mT, dtype)
            if memory.biases:
                s = s + momentum.biases[layer].unsqueeze(-2)
            z = torch.addcmul(z, mix.from_momentum.unsqueeze(-1), s)
        z = z - matmul(mix.grads * scores, slopes[layer], dtype)
        x = activate(form.activation, z) if layer + 1 < depth else z
    return form.finish(first, x)
