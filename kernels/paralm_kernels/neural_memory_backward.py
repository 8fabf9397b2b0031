"""The gradient of a tile of the neural memory: neural_memory_tile.py backwards, its names with ∂ before them here.

    read     ∂x_l = β ∂z W₀ + f ∂z S₀ + ∂s a     ∂s = −G ⊙ (∂z dᵀ)     ∂z_{l−1} = ∂x_l ⊙ act′(z_{l−1})
    update   ∂d = −g ⊙ (a ∂Wᵀ) − n ⊙ (a ∂Sᵀ) + …      ∂a = −(g ⊙ d) ∂W − (n ⊙ d) ∂S + …
    d        d_{l−1} = (d_l W̄_l) ⊙ act′(z_{l−1}), from the first layer to the last
    z        z_l = a_l W̄_lᵀ, from the last layer to the first

and from the coefficients to the gates in neural_memory_mixing.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .neural_memory_mixing import Ends, mixing_grads
from .neural_memory_pointwise import (
    Uses,
    hidden_grad,
    inputs_grad,
    last_slopes_grad,
    read_grad,
    read_hidden_grad,
    read_last_grad,
    read_scaled,
    scores_grad,
    slopes_grad,
    updated_grad,
    weighed_slopes,
)
from .neural_memory_tile import Form, Gates, Layers, Read, Tile, columns, from_columns


class TileGrads(NamedTuple):
    """Gradients to what a tile was made from, and to q; None: to none there is."""

    memory: Layers
    start: Layers
    momentum: Layers | None
    q: Tensor | None
    k: Tensor
    v: Tensor
    gates: Gates
    gain: Tensor | None


class _ByRead(NamedTuple):
    """What a read's gradient leaves for the rest, by layer: to W₀, S₀, d (negated) and a; to q, γ, β, f and G."""

    memory: list[Tensor | None]
    momentum: list[Tensor | None]
    slopes: list[Tensor | None]
    inputs: list[Tensor | None]
    q: Tensor | None = None
    gain: Tensor | None = None
    keep: Tensor | None = None
    from_momentum: Tensor | None = None
    grads: Tensor | None = None


def tile_grads(
    saved: Tile,
    reads: Read,
    grad_y: Tensor | None,
    grad_memory: Layers,
    grad_momentum: Layers | None,
    lengths: Tensor | None,
    form: Form,
) -> TileGrads:
    """From the gradients to y of a read and to memory and momentum after the tile, all in the memory's dtype."""
    run, kind, biased = form.compiled, form.activation, bool(grad_memory.biases)
    depth, dtype, wide = len(saved.frozen), saved.inputs[0].dtype, saved.k.dtype
    read = _by_read(saved, reads, grad_y, form)
    by_after = columns(grad_memory)
    by_late: list[Tensor | None] = [None] * depth
    if saved.momentum:
        assert grad_momentum is not None
        by_late = list(columns(grad_momentum))

    # Through the updates, to a and d of each layer; then through d = back ⊙ act′(z), first layer to last.
    ends = saved.ends
    by_inputs, by_outputs, by_frozen = list[tuple[Tensor, Tensor | None]](), list[Tensor](), list[Tensor | None]()
    by_row = torch.zeros_like(ends.grads)
    by_momentum_row = None if ends.momentum_grads is None else torch.zeros_like(ends.momentum_grads)
    back, by_k, by_v, by_rate, by_gain = None, None, None, None, read.gain
    for layer, (a, d) in enumerate(zip(saved.inputs, saved.slopes)):
        after = by_after[layer].to(dtype)
        late = by_late[layer]
        late = None if late is None else late.to(dtype)
        scaled, scaled_late = weighed_slopes(run, d, ends.grads, ends.momentum_grads)
        by_inputs.append((scaled @ after, None if late is None or scaled_late is None else scaled_late @ late))
        frozen = saved.frozen[layer]
        uses = Uses(
            d,
            read.slopes[layer],
            a @ after.mT,
            None if late is None else a @ late.mT,
            None if back is None else back @ frozen[..., : back.shape[-1]].mT,
            ends.grads,
            ends.momentum_grads,
        )
        by_frozen.append(None if back is None else _padded(d.mT @ back, frozen).to(wide))
        if layer + 1 < depth:
            back, by_z, row, momentum_row = slopes_grad(run, uses, saved.backs[layer], saved.outputs[layer], kind)
        else:
            by_z, by_k, by_v, by_rate, gain, row, momentum_row = last_slopes_grad(
                run, uses, saved.k, saved.outputs[layer], saved.v, saved.rate, form.gain
            )
            by_gain = gain if by_gain is None or gain is None else by_gain + gain
        by_outputs.append(by_z)
        by_row = by_row + row
        by_momentum_row = None if by_momentum_row is None else by_momentum_row + momentum_row
    assert by_v is not None
    assert by_rate is not None

    # Through z = a W̄ᵀ, last layer to first.
    by_output = by_outputs[-1]
    for layer in reversed(range(depth)):
        frozen = saved.frozen[layer]
        by_frozen[layer] = _sum(by_frozen[layer], (by_output.mT @ saved.inputs[layer]).to(wide))
        parts = (by_output @ frozen, read.inputs[layer], *by_inputs[layer])
        if layer:
            by_output = hidden_grad(run, *parts, saved.outputs[layer - 1], by_outputs[layer - 1], kind)
        else:
            width = saved.k.shape[-1]
            parts = tuple(None if p is None else p[..., :width] for p in parts)  # type: ignore[assignment]
            by_k = inputs_grad(run, *parts, by_k)
    assert by_k is not None

    by_memory, by_momentum = list[Tensor](), list[Tensor]()
    by_end: list[Tensor | None] = [None, None, None]
    for layer, w in enumerate(saved.memory):
        s = saved.momentum[layer] if saved.momentum else None
        coefficients = (ends.keep, ends.from_momentum, ends.persist)
        by_w, by_s, *sums = updated_grad(
            run, by_after[layer], by_late[layer], w, s, *coefficients, read.memory[layer], read.momentum[layer]
        )
        by_memory.append(by_w)
        if by_s is not None:
            by_momentum.append(by_s)
        for n, more in enumerate(sums):
            by_end[n] = _sum(by_end[n], None if more is None else more.sum(-1))
    by_ends = Ends(by_end[0], by_end[1], by_row, by_end[2], by_momentum_row)
    to_gates = mixing_grads(saved.mix, read.keep, read.from_momentum, read.grads, by_ends, lengths, run)
    return TileGrads(
        from_columns(by_memory, biased),
        from_columns([g for g in by_frozen if g is not None], biased),
        from_columns(by_momentum, biased) if saved.momentum else None,
        read.q,
        by_k,
        by_v,
        Gates(by_rate, *to_gates),
        by_gain,
    )


def _by_read(saved: Tile, reads: Read, grad_y: Tensor | None, form: Form) -> _ByRead:
    """The gradient of a read."""
    depth, run, dtype = len(saved.frozen), form.compiled, saved.inputs[0].dtype
    none = [None] * depth
    if grad_y is None:
        return _ByRead(list(none), list(none), list(none), list(none))
    by_memory, by_momentum, by_slopes, by_inputs = (list[Tensor | None](none) for _ in range(4))
    mix, by_keep, by_rate, by_grads, by_gain = saved.mix, None, None, None, None
    by_z = grad_y.to(dtype)
    if form.gain is not None:
        by_z, by_gain = read_last_grad(run, grad_y, reads.outputs[-1], form.gain, dtype)
    by_x = None
    for layer in reversed(range(depth)):
        x = reads.inputs[layer]
        by_scores, by_grads = scores_grad(run, by_z @ saved.slopes[layer].mT, mix.grads, reads.scores[layer], by_grads)
        scaled, scaled_late = read_scaled(run, by_z, mix.keep, mix.from_momentum)
        by_memory[layer] = scaled.mT @ x
        by_momentum[layer] = None if scaled_late is None else scaled_late.mT @ x
        by_slopes[layer] = reads.weighed[layer].mT @ by_z
        by_inputs[layer] = by_scores.mT @ x
        parts = (
            x,
            by_z @ saved.now[layer],
            by_z @ saved.late[layer] if saved.late else None,
            by_scores @ saved.inputs[layer],
            mix.keep,
            mix.from_momentum,
        )
        if layer:
            by_z, keep, rate = read_hidden_grad(run, *parts, reads.outputs[layer - 1], form.activation)
        else:
            by_x, keep, rate = read_grad(run, *parts)
        by_keep, by_rate = _sum(by_keep, keep), _sum(by_rate, rate)
    assert by_x is not None
    by_x = by_x[..., : saved.k.shape[-1]]
    by_q = by_x if form.gain is None else by_x + grad_y
    return _ByRead(by_memory, by_momentum, by_slopes, by_inputs, by_q, by_gain, by_keep, by_rate, by_grads)


def _padded(x: Tensor, like: Tensor) -> Tensor:
    """With zeros in place of the biases' column, where there is one."""
    return x if x.shape[-1] == like.shape[-1] else F.pad(x, (0, like.shape[-1] - x.shape[-1]))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
