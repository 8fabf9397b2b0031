"""What a rank owns of the master weights and the optimizer state, addressed by (parameter name, flat offset).

ZeRO flattens each parameter group and gives every rank an equal slice of it, so a rank owns, of each
parameter, at most one contiguous range of its elements. DeepSpeed records that range on the parameter
(``_hp_mapping``); here it becomes a :class:`Fragment`, the unit in which checkpoints are written and read.
Nothing in it depends on the world size, so any grid can read what any other wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

MASTER = "master"


@dataclass(frozen=True)
class Fragment:
    """Elements ``[offset, offset + numel)`` of the flattened parameter ``name``, owned by this rank."""

    name: str
    offset: int
    numel: int
    flat: torch.Tensor  # the flat fp32 partition of the parameter's group
    start: int  # where the fragment lies in ``flat``

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fragment's part of ``tensor``, which is laid out like ``flat``."""
        return tensor.detach().narrow(0, self.start, self.numel)


class EngineFragments:
    """The fragments of a DeepSpeed engine (ZeRO 1 and 2, fp32 and bf16) and of its optimizer's state."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        flats = getattr(self.zero, "single_partition_of_fp32_groups", None)
        if flats is None:  # DeepSpeed's BF16_Optimizer: bf16 with fp32 accumulation at stage 1
            flats = self.zero.fp32_groups_flat_partition
        self.flats: list[torch.Tensor] = list(flats)

    def __iter__(self) -> Iterator[Fragment]:
        for name, parameter in self.engine.module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # no element of it lies in this rank's partition
                continue
            inside, outside = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            flat = self.flats[mapping.param_group_index]
            yield Fragment(name, outside.start, inside.numel, flat, inside.start)

    def tensor_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Optimizer state with one value per element of ``flat``."""
        state = self.optimizer.state.get(flat, {})
        return {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape}

    def scalar_state(self) -> dict[str, float]:
        """Optimizer state of one value a group (Adam's step), the same on every rank and in every group."""
        scalars: dict[str, float] = {}
        for flat in self.flats:
            for key, value in self.optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value) and value.shape != flat.shape and value.numel() == 1:
                    scalars[key] = float(value)
        return scalars

    @torch.no_grad()
    def load(
        self,
        read: Callable[[str, str, int, int], torch.Tensor],
        tensor_keys: list[str],
        scalars: dict[str, float],
    ) -> None:
        """Fill masters and optimizer state from ``read(kind, name, offset, numel)``, then the weights.

        ``tensor_keys`` names the optimizer's elementwise states; empty: weights only, a new optimizer.
        """
        for flat in self.flats:
            if tensor_keys:
                state = self.optimizer.state[flat]
                for key in tensor_keys:
                    state[key] = torch.zeros_like(flat)
                for key, value in scalars.items():
                    state[key] = torch.tensor(value, dtype=torch.float32)
        for fragment in self:
            fragment.view(fragment.flat).copy_(read(MASTER, fragment.name, fragment.offset, fragment.numel))
            for key in tensor_keys:
                target = fragment.view(self.optimizer.state[fragment.flat][key])
                target.copy_(read(key, fragment.name, fragment.offset, fragment.numel))
        self.zero.update_lp_params()
