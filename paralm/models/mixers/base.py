"""What a mixer is: anything that carries a state through time.

    y, state = mixer(x, state, reset)        x, y (batch, time, d_model); reset bool (batch, time)

and the law it obeys (:mod:`paralm.laws` checks it): feeding a sequence in pieces, handing the state on, equals
feeding it whole, in outputs, final state and gradients; and a reset at position t equals a fresh start at t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

State = Any
"""A nested dict or tuple. Every leaf is a tensor with the batch first, counters too, and none is changed in place:
a state can be saved, moved, indexed by row and sent to another rank by code that knows nothing of the mixer."""


@dataclass(frozen=True)
class LayerContext:
    """Where in which model a mixer stands."""

    d_model: int
    layer: int = 0
    n_layers: int = 1
    norm_eps: float = 1e-5
    init: str = "language_model"


def default_heads(channels: int, even: bool = False) -> int:
    """Heads of 64 channels, or as little wider as divides ``channels`` (``even``: into heads of even width)."""
    fitting = (h for h in range(channels // 64, 0, -1) if channels % (2 * h if even else h) == 0)
    return next(fitting, 1)


class Mixer(nn.Module):
    """Base class. A subclass takes ``(config, context)``, declares its parameters, and registers itself:

    ```python
    @register_mixer("mine", MyConfig)
    class MyMixer(Mixer):
        def __init__(self, config: MyConfig, context: LayerContext) -> None: ...
    ```

    Wrong sizes (a head count that does not divide) are ConfigErrors raised in ``__init__``, before allocation.
    """

    bounded_state: ClassVar[bool] = True
    """Whether the state's size does not depend on how much was read."""

    def __init__(self, config: BaseModel, context: LayerContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.stats: dict[str, Tensor | float] = {}
        """How the last forward went (solver iterations, …): numbers on a CPU, tensors on a device."""

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """``x``: (batch, time, d_model), time ≥ 1. ``state``: from a former call or :meth:`initial_state`; None
        means the initial one. ``reset``: bool (batch, time), true where a new sequence starts."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, state, reset)")

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before anything was read, for ``batch`` rows; ``dtype`` is that of the activations."""
        raise TypeError(f"{type(self).__name__} does not define initial_state(batch, device, dtype)")

    def extra_flops_per_token(self, seq_len: int) -> float:
        """Forward matrix-product FLOPs a token beyond two for each matrix element; see ``flops_per_token``."""
        return 0.0
