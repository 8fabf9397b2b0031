"""ZeRO stage 0: every rank keeps everything, and gradients are averaged over the ranks by DeepSpeed's engine.

DeepSpeed's own path at this stage reports a gradient norm of 0 in fp32, lets a NaN step into the weights, and offers
bf16 only with bf16 accumulation (0.19.8). So the engine is given this optimizer: it has fp32 masters, lets autograd
accumulate in fp32, and takes norm, clipping and the finite check upon itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Replicated(torch.optim.Optimizer):
    """Wraps ``inner``, whose parameters it replaces by flat fp32 masters (aliases of the weights if those are fp32).

    Has what the engine and the trainer ask a ZeRO optimizer for: ``param_groups``, ``overflow`` and
    ``_global_grad_norm`` (before clipping).
    """

    def __init__(self, inner: torch.optim.Optimizer, clip_grad_norm: float) -> None:
        # No super().__init__: groups and state are those of ``inner``.
        self.inner, self.clip = inner, clip_grad_norm
        self.overflow = False
        self._global_grad_norm = 0.0
        self.parameters: list[nn.Parameter] = []
        self.masters: list[nn.Parameter] = []
        for group in inner.param_groups:
            mine = [self._master(parameter) for parameter in group["params"]]
            self.parameters += group["params"]
            self.masters += mine
            group["params"] = mine
        inner.state.clear()

    @staticmethod
    def _master(parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().view(-1))

    def to_bf16(self) -> None:
        """Turn the model's weights into bf16 ones; the masters stay fp32, and so do the gradients."""
        for parameter in self.parameters:
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.grad = None
            parameter.grad_dtype = torch.float32  # autograd accumulates in it

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; none, and ``overflow``, when the gradients' norm is not finite."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.clip > 0:
            torch._foreach_mul_(grads, torch.clamp(self.clip / (norm + 1e-6), max=1.0))
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad.view(-1)
        self.inner.step()
        for master in self.masters:
            master.grad = None
        self.refresh_weights()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Weights from masters, where they are not the same memory."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.dtype != master.dtype:
                parameter.copy_(master.view_as(parameter))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None
