"""The neural memory inside one tile: stretches of time in which the weights that gradients are taken at stand still.

W₀ and S₀ are weights and momentum at the tile's start, W̄ the weights at the chunk's start, a_l and z_l the inputs and
outputs of layer l on the keys at W̄, d_l = θ ∂ℓ/∂z_l there (ℓ_j = ‖M(k_j) − v_j‖²). With, for i ≥ j (i, j in the tile)

    D_ij = Π_{j<k≤i} (1 − α_k)      E_ij = Π_{j<k≤i} η_k      h_i = Π_{k≤i} η_k      β_i = Π_{k≤i} (1 − α_k)
    G = D E      f = D h

the memory after token t is, per layer,

    S_t = h_t S₀ − Σ_{j≤t} E_tj d_j a_jᵀ        W_t = β_t W₀ + f_t S₀ − Σ_{j≤t} G_tj d_j a_jᵀ

and applied to x_t, without forming it (biases are a column more of W, S and W̄, met by a 1),

    W_t x_t = β_t W₀ x_t + f_t S₀ x_t − Σ_{j≤t} G_tj (a_j · x_t) d_j

With a norm, M(x) = x + γ ⊙ z/√(|z|² + ε), z what the last layer gives: only d of that layer and the last step of a read
know of it.

Titans (arXiv 2501.00663) section 3; the read at every token is worked out in this project's notes and held against the
loop by the tests. The coefficients are made in neural_memory_mixing.py; what is between the matrix products is in
neural_memory_pointwise.py, the gradient in neural_memory_backward.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .neural_memory_mixing import Ends, Mixing, last_rows, mixing
from .neural_memory_pointwise import (
    activate,
    activated,
    finish,
    last_slope,
    read_hidden,
    read_last,
    slope,
    updated,
    weigh,
    weighed_slopes,
)

ACTIVATIONS = ("gelu", "silu")
"""Between layers; GELU is the exact one, with erf."""


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
    norm and residual around them or None, the ``dtype`` operands of matrix products are rounded to (None: as they are),
    and whether what is between products is ``compiled``."""

    activation: str
    gain: Tensor | None = None
    dtype: torch.dtype | None = None
    compiled: bool = False


class Gates(NamedTuple):
    """``rate`` θ, ``log_momentum`` log η and ``log_keep`` log(1 − α), each (batch, heads, time); None: η = 0, α = 0."""

    rate: Tensor
    log_momentum: Tensor | None
    log_keep: Tensor | None


def apply_memory(memory: Layers, x: Tensor, form: Form) -> Tensor:
    """M(x) of one memory for all of x (batch, heads, time, in); differentiable."""
    z = x
    for layer, weight in enumerate(memory.weights):
        z = (activate(form.activation, z) if layer else z) @ weight.mT
        if memory.biases:
            z = z + memory.biases[layer].unsqueeze(-2)
    return finish(x, z, form.gain)


class Tile(NamedTuple):
    """A tile that has learned its keys: ``memory`` W₀ and ``momentum`` S₀ of each layer with the biases' column, both
    as operands of products ``now`` and ``late``, and ``frozen`` W̄; ``inputs`` a, ``outputs`` z, ``slopes`` d,
    ``backs`` d_l W̄_l for l ≥ 1. Operands are in the products' dtype, the rest in the memory's."""

    k: Tensor
    v: Tensor
    rate: Tensor
    memory: list[Tensor]
    momentum: list[Tensor]
    now: list[Tensor]
    late: list[Tensor]
    frozen: list[Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    slopes: list[Tensor]
    backs: list[Tensor]
    mix: Mixing
    ends: Ends


class Read(NamedTuple):
    """A read of it, by layer: ``inputs`` x, ``scores`` x aᵀ, ``weighed`` G ⊙ scores, ``outputs`` W_t x_t."""

    inputs: list[Tensor]
    scores: list[Tensor]
    weighed: list[Tensor]
    outputs: list[Tensor]


def columns(layers: Layers) -> list[Tensor]:
    """Weights with the biases as a column more."""
    if not layers.biases:
        return list(layers.weights)
    return [torch.cat((w, c.unsqueeze(-1)), -1) for w, c in zip(layers.weights, layers.biases)]


def from_columns(joined: list[Tensor], biased: bool) -> Layers:
    """The layers that :func:`columns` joined."""
    if not biased:
        return Layers(tuple(joined), ())
    return Layers(tuple(w[..., :-1] for w in joined), tuple(w[..., -1] for w in joined))


def with_one(x: Tensor, weight: Tensor) -> Tensor:
    """x with the 1 that meets a biases' column, where the weight has one."""
    return x if x.shape[-1] == weight.shape[-1] else F.pad(x, (0, 1), value=1.0)


def learn(
    memory: Layers,
    start: Layers,
    momentum: Layers | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    lengths: Tensor | None,
    form: Form,
) -> Tile:
    """The slopes of a tile's keys and values, and its coefficients.

    memory, momentum: at the tile's start; start: the memory gradients are taken at. k (batch, heads, time, in), v
    (batch, heads, time, out) in the dtype of the memory. lengths (batch,): how many of the tokens are a row's own, None
    for all. Neither here nor below is a gradient recorded: see neural_memory_backward.py.
    """
    run, kind, dtype = form.compiled, form.activation, form.dtype or k.dtype
    wide, wide_late = columns(memory), [] if momentum is None else columns(momentum)
    now, late = [w.to(dtype) for w in wide], [s.to(dtype) for s in wide_late]
    at_start = all(a is b for a, b in zip(start.flat, memory.flat))
    frozen = now if at_start else [w.to(dtype) for w in columns(start)]
    inputs, outputs = [with_one(k.to(dtype), frozen[0])], list[Tensor]()
    for layer, w in enumerate(frozen):
        outputs.append(inputs[-1] @ w.mT)
        if layer + 1 < len(frozen):
            inputs.append(with_one(activated(run, outputs[-1], kind), frozen[layer + 1]))
    slopes, backs = [last_slope(run, k, outputs[-1], v, gates.rate, form.gain, dtype)], list[Tensor]()
    for layer in range(len(frozen) - 1, 0, -1):
        backs.insert(0, slopes[0] @ frozen[layer][..., : outputs[layer - 1].shape[-1]])
        slopes.insert(0, slope(run, backs[0], outputs[layer - 1], kind))
    mix = mixing(gates.rate, gates.log_momentum, gates.log_keep, run)
    parts = (wide, wide_late, now, late, frozen, inputs, outputs, slopes, backs)
    return Tile(k, v, gates.rate, *parts, mix, last_rows(mix, lengths))


def read(tile: Tile, q: Tensor, form: Form) -> tuple[Tensor, Read]:
    """y = M_t(q_t) at every token; q (batch, heads, time, in) in the dtype of the memory."""
    found, mix, depth = Read([], [], [], []), tile.mix, len(tile.frozen)
    x, y = q.to(tile.now[0].dtype), None
    for layer in range(depth):
        x = with_one(x, tile.frozen[layer])
        scores = x @ tile.inputs[layer].mT
        weighed = weigh(form.compiled, mix.grads, scores)
        parts = (
            mix.keep,
            x @ tile.now[layer].mT,
            mix.from_momentum,
            x @ tile.late[layer].mT if tile.late else None,
            weighed @ tile.slopes[layer],
        )
        found.inputs.append(x)
        if layer + 1 < depth:
            z, x = read_hidden(form.compiled, *parts, form.activation)
        else:
            z, y = read_last(form.compiled, *parts, q, form.gain)
        for kept, new in zip(found[1:], (scores, weighed, z)):
            kept.append(new)
    return found.outputs[-1] if y is None else y, found


def update(tile: Tile, form: Form, biased: bool) -> tuple[Layers, Layers | None]:
    """Memory and momentum after the tile."""
    ends, after, after_momentum = tile.ends, list[Tensor](), list[Tensor]()
    for layer, (a, d) in enumerate(zip(tile.inputs, tile.slopes)):
        by_weights, by_momentum = weighed_slopes(form.compiled, d, ends.grads, ends.momentum_grads)
        w, s = updated(
            form.compiled,
            tile.memory[layer],
            tile.momentum[layer] if tile.momentum else None,
            by_weights.mT @ a,
            None if by_momentum is None else by_momentum.mT @ a,
            ends.keep,
            ends.from_momentum,
            ends.persist,
        )
        after.append(w)
        after_momentum.append(s)
    return from_columns(after, biased), from_columns(after_momentum, biased) if tile.momentum else None
