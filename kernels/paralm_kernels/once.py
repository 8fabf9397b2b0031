"""First derivatives only: what the backward passes written by hand here are marked with."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """As torch's, whose gradients are silently constants where what comes in is one, as from a plain sum: here a second
    derivative is refused there too."""
    refusing = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # create_graph
            grads = tuple(None if grad is None else grad.detach().requires_grad_() for grad in grads)
        return refusing(ctx, *grads)

    return wrapper
