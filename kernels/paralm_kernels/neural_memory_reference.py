"""The neural memory token by token, the inner gradient by autograd: slow, and obviously the recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .neural_memory_tile import Form, Layers, apply_memory


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor | None, Tensor | None],
    initial: Layers,
    state: tuple[Layers, Layers, Layers | None, Tensor],
    reset: Tensor | None,
    chunk: int,
    form: Form,
) -> tuple[Tensor, tuple[Layers, Layers, Layers | None, Tensor]]:
    """q, k, v (batch, heads, time, ·), gates (batch, heads, time), all in the compute dtype; see ``neural_memory``.

    With autograd on, everything is differentiable, the inner gradient too.
    """
    depth = len(initial.weights)
    memory, start, momentum, position = state
    rate, log_momentum, log_keep = gates
    outputs = []
    for t in range(q.shape[2]):
        if reset is not None:
            now = reset[:, t]
            memory, start = initial.where(now, memory), initial.where(now, start)
            if momentum is not None:
                zero = Layers.of(tuple(torch.zeros_like(s) for s in momentum.flat), depth)
                momentum = zero.where(now, momentum)
            position = torch.where(now, 0, position)
        gradient = _gradient(start, k[:, :, t], v[:, :, t], form)
        new_memory, new_momentum = [], []
        for n, (w, g) in enumerate(zip(memory.flat, gradient)):
            s = -_like(rate[:, :, t], g) * g
            if momentum is not None:
                assert log_momentum is not None
                s = _like(log_momentum[:, :, t].exp(), g) * momentum.flat[n] + s
                new_momentum.append(s)
            new_memory.append((w if log_keep is None else _like(log_keep[:, :, t].exp(), w) * w) + s)
        memory = Layers.of(tuple(new_memory), depth)
        momentum = None if momentum is None else Layers.of(tuple(new_momentum), depth)
        outputs.append(apply_memory(memory, q[:, :, t : t + 1], form))
        position = position + 1
        start = memory.where(position == chunk, start)
        position = position % chunk
    return torch.cat(outputs, dim=2), (memory, start, momentum, position)


def _like(factor: Tensor, x: Tensor) -> Tensor:
    return factor.reshape(*factor.shape, *(1,) * (x.dim() - 2))


def _gradient(memory: Layers, k: Tensor, v: Tensor, form: Form) -> tuple[Any, ...]:
    """∂‖M(k) − v‖²/∂M of each row and head, by autograd."""
    outside = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in memory.flat)
        predicted = apply_memory(Layers.of(leaves, len(memory.weights)), k.unsqueeze(2), form).squeeze(2)
        loss = (predicted - v).square().sum()
        return torch.autograd.grad(loss, leaves, create_graph=outside)
