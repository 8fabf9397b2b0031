"""What every method receives and returns: one recurrence, checked and in its compute dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .cell import Tensors
from .derive import Derived
from .torch_code import TorchCode, torch_code


@dataclass(frozen=True)
class SolveInfo:
    """How a solve went. Plain numbers on a CPU, 0-dimensional tensors on a device (nothing waits for it).

    iterations: Newton iterations of the tile that took most, 0 for the sequential loop. last_update: the largest
    |update| / (1 + |state|) of the last iteration. method: the method that gave the states. rewalked: the fraction of
    all steps that segments of time were walked beyond once (ρ); 0 for every other method.
    """

    iterations: int | Tensor
    last_update: float | Tensor
    method: str
    rewalked: float | Tensor = 0.0


@dataclass(frozen=True, eq=False)
class Problem:
    """h_t = step(h_{t−1}, x_t; p) for t = 0 … T−1, with the state zeroed before every t where reset.

    inputs: (batch, time, channel) in the dtype they came in; params (channel,) and state (batch, channel) in the
    compute dtype; reset: bool (batch, time) or None.
    """

    derived: Derived
    inputs: Tensors
    params: Tensors
    state: Tensors
    reset: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, time, channel = self.inputs[0].shape
        return batch, time, channel

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the compute dtype, where the problem lives."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def info(self, iterations: int, last_update: float | Tensor, method: str) -> SolveInfo:
        """Plain numbers on a CPU; on a device tensors, filled there, so that nothing waits."""
        if self.device.type == "cpu":
            return SolveInfo(iterations, float(last_update), method)
        if not isinstance(last_update, Tensor):
            last_update = torch.full((), last_update, dtype=self.dtype, device=self.device)
        return SolveInfo(torch.full((), iterations, device=self.device), last_update, method)

    @cached_property
    def code(self) -> TorchCode:
        return torch_code(self.derived)

    def inputs_at(self, start: int, stop: int) -> Tensors:
        """The inputs of some steps, in the compute dtype."""
        return tuple(x[:, start:stop].to(self.dtype) for x in self.inputs)

    @cached_property
    def _reset_steps(self) -> list[bool] | None:
        """On a CPU: per step, whether any row is reset. None on a device, where looking would wait for it."""
        if self.reset is None or self.device.type != "cpu":
            return None
        steps: list[bool] = self.reset.any(0).tolist()
        return steps

    def cuts(self, start: int, stop: int) -> list[Tensor | None]:
        """Per step None or the mask (batch, 1) of rows to reset."""
        if self.reset is None:
            return [None] * (stop - start)
        masks = self.reset[:, start:stop].unsqueeze(-1).unbind(1)
        known = self._reset_steps
        if known is None:
            return list(masks)
        return [mask if known[t] else None for t, mask in zip(range(start, stop), masks, strict=True)]

    def mask(self, start: int, stop: int) -> Tensor | None:
        """The mask (batch, time, 1) of resets in some steps; None where there are none for sure."""
        if self.reset is None:
            return None
        known = self._reset_steps
        if known is not None and not any(known[start:stop]):
            return None
        return self.reset[:, start:stop].unsqueeze(-1)

    def previous(self, states: Tensors, start: int, stop: int) -> Tensors:
        """The states before each of some steps: shifted by one, zero after a reset. A view where that is possible."""
        if start > 0:
            shifted = tuple(h[:, start - 1 : stop - 1] for h in states)
        else:
            shifted = tuple(
                torch.cat((s.unsqueeze(1), h[:, : stop - 1]), 1) for s, h in zip(self.state, states, strict=True)
            )
        mask = self.mask(start, stop)
        return shifted if mask is None else tuple(h.masked_fill(mask, 0.0) for h in shifted)
