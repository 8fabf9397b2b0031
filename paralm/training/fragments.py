"""What a rank owns of the master weights and the optimizer state, addressed by (parameter name, flat offset).

ZeRO flattens parameters and gives every rank a slice, so of each parameter a rank has at most one contiguous range
of elements. Where it lies differs by stage; here it becomes a :class:`Fragment`, the unit in which checkpoints are
written and read. Nothing in it depends on the world size or the stage, so any grid can read what any other wrote.

    stage 0     every rank has every parameter; rank r of W owns (writes) elements [n r/W, n (r+1)/W)
    stage 1, 2  a group of parameters is one vector, cut in W pieces: DeepSpeed's ``parameter._hp_mapping``
    stage 3     each parameter is cut in W pieces of ⌈n/W⌉: ``optimizer.grad_position``
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from paralm.training.replicated import Replicated

MASTER = "master"

Read = Callable[[str, str, int, int], torch.Tensor]
"""(kind, parameter name, offset, numel) → 1-D tensor."""


@dataclass(frozen=True)
class Fragment:
    """Elements ``[offset, offset + numel)`` of the flattened parameter ``name``, held by this rank."""

    name: str
    offset: int
    numel: int
    flat: torch.Tensor  # the 1-D fp32 tensor that the optimizer updates
    start: int  # where the fragment lies in ``flat``

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fragment's part of ``tensor``, which is laid out like ``flat``."""
        return tensor.detach().narrow(0, self.start, self.numel)


class EngineFragments:
    """The fragments of a DeepSpeed engine (ZeRO 0 to 3, fp32 and bf16) and of its optimizer's state.

    ``flats``: the tensors the optimizer updates; ``groups``: the index of each one's parameter group; ``held``: what
    of which parameter they hold.
    """

    def __init__(self, engine: Any, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.zero = engine.optimizer
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        if isinstance(self.zero, Replicated):
            self.stage = 0
            self.optimizer: torch.optim.Optimizer = self.zero.inner
            self.flats: list[torch.Tensor] = list(self.zero.masters)
            sizes = [len(group["params"]) for group in self.zero.param_groups]
            self.groups = [index for index, size in enumerate(sizes) for _ in range(size)]
            self.held = [
                Fragment(names[id(parameter)], 0, flat.numel(), flat, 0)
                for parameter, flat in zip(self.zero.parameters, self.zero.masters, strict=True)
            ]
        elif hasattr(self.zero, "fp32_partitioned_groups_flat"):
            self.stage = 3
            self.optimizer = self.zero.optimizer
            self.flats = list(self.zero.fp32_partitioned_groups_flat)
            self.groups = [self.zero.sub_group_to_group_id[index] for index in range(len(self.flats))]
            self.held = list(self._stage_3(names))
        else:
            self.stage = 1  # or 2: the same layout
            self.optimizer = self.zero.optimizer
            flats = getattr(self.zero, "single_partition_of_fp32_groups", None)
            # DeepSpeed's BF16_Optimizer (bf16 with fp32 accumulation at stage 1) has another name for it.
            self.flats = list(self.zero.fp32_groups_flat_partition if flats is None else flats)
            self.groups = list(range(len(self.flats)))
            self.held = list(self._stage_1(engine.module))

    def _stage_1(self, module: torch.nn.Module) -> Iterator[Fragment]:
        for name, parameter in module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # no element of it lies in this rank's partition
                continue
            inside, outside = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            flat = self.flats[mapping.param_group_index]
            yield Fragment(name, outside.start, inside.numel, flat, inside.start)

    def _stage_3(self, names: dict[int, str]) -> Iterator[Fragment]:
        for group in self.zero.fp16_groups:
            for parameter in group:
                index, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
                offset = self.rank * length
                numel = min(length, parameter.ds_numel - offset)  # the last pieces are padded
                if numel > 0:
                    yield Fragment(names[id(parameter)], offset, numel, self.flats[index], start)

    def __iter__(self) -> Iterator[Fragment]:
        """The fragments this rank writes; over all ranks every element occurs once.

        Tensors that are offloaded to disk are there until the next fragment is asked for.
        """
        for index, flat in enumerate(self.flats):
            mine = [fragment for fragment in self.held if fragment.flat is flat]
            if self.stage == 0:
                mine = [share for whole in mine for share in self._share(whole)]
            with self._present(index):
                yield from mine

    def _share(self, whole: Fragment) -> Iterator[Fragment]:
        low = whole.numel * self.rank // self.world_size
        high = whole.numel * (self.rank + 1) // self.world_size
        if high > low:
            yield Fragment(whole.name, low, high - low, whole.flat, low)

    @contextlib.contextmanager
    def _present(self, index: int, changed: bool = False) -> Iterator[None]:
        """A flat tensor and its state in memory, wherever they are kept (ZeRO-3 with NVMe)."""
        if self.stage < 3 or not self.zero._swappable_optimizer_subgroup(index):
            yield
            return
        self.zero._optimizer_states_and_gradient_swap_in(index)
        try:
            yield
        finally:
            if changed:
                self.zero._optimizer_states_and_gradient_swap_out(index)
            else:
                self.zero._release_swap_buffers(index)

    def tensor_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Optimizer state with one value per element of ``flat``."""
        state = self.optimizer.state.get(flat, {})
        return {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape}

    def scalar_state(self) -> dict[str, float]:
        """Optimizer state of one value a tensor (Adam's step), the same for all that have it."""
        scalars: dict[str, float] = {}
        for flat in self.flats:
            for key, value in self.optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value) and value.shape != flat.shape and value.numel() == 1:
                    scalars[key] = float(value)
        return scalars

    @torch.no_grad()
    def load(self, read: Read, kinds: Callable[[str], Iterable[str]], scalars: dict[str, float]) -> None:
        """Fill masters and optimizer state from ``read``, then the weights the model computes with.

        ``kinds(name)``: the elementwise optimizer states there are for a parameter; none: weights only, and a new
        optimizer. ``scalars``: the others, for every tensor whose parameters have an elementwise state.
        """
        if self.stage == 3:
            self.zero._partition_all_parameters()
        for index, flat in enumerate(self.flats):
            with self._present(index, changed=True):
                state = self.optimizer.state[flat]
                for fragment in (fragment for fragment in self.held if fragment.flat is flat):
                    where = (fragment.name, fragment.offset, fragment.numel)
                    fragment.view(flat).copy_(read(MASTER, *where))
                    for key in kinds(fragment.name):
                        if key not in state:  # what lies between fragments is padding, and stays zero
                            state[key] = torch.zeros_like(flat)
                        fragment.view(state[key]).copy_(read(key, *where))
                if any(torch.is_tensor(value) and value.shape == flat.shape for value in state.values()):
                    fused = self.optimizer.param_groups[self.groups[index]].get("fused")
                    for key, value in scalars.items():  # a fused kernel looks for them on its device
                        state[key] = torch.tensor(value, dtype=torch.float32, device=flat.device if fused else None)
                if self.stage == 3:
                    self.zero._reassign_or_swap_out_partitioned_parameters(index)
        if self.stage == 0:
            self.zero.refresh_weights()
        elif self.stage < 3:
            self.zero.update_lp_params()
        elif self.zero.persistent_parameters:  # small ones, which stay whole on every rank
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
