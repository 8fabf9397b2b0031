"""Optimizers, found by name. Each updates flat pieces of fp32 master weights (ZeRO), and says what it needs to.

A step may add Gaussian noise to the gradient (Neelakantan et al., arXiv 1511.06807), may be told to be skipped, and
ends with the groups' ``clamp``: the elementwise bound on recurrent weights (ParaRNN, arXiv 2510.21450). All three are
elementwise, so they are exact on any shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paralm.config import OptimizerConfig
from paralm.training.fragments import EngineFragments, Fragment
from paralm.training.muon import MatrixUpdate, orthogonalized_update

_NOISE_BLOCK = 1 << 16


@dataclass(frozen=True)
class GradientNoise:
    """N(0, η/(1+t)^γ) on every element, a pure function of (seed, step, parameter, element): no rank changes it."""

    eta: float
    gamma: float
    seed: int

    def add(self, fragment: Fragment, grad: torch.Tensor, step: int) -> None:
        """Add the noise of the fragment's elements to its 1-D ``grad``. Drawn in blocks, so any slice can be had."""
        std = (self.eta / (1 + step) ** self.gamma) ** 0.5
        end = fragment.offset + fragment.numel
        for block in range(fragment.offset // _NOISE_BLOCK, -(-end // _NOISE_BLOCK)):
            key = f"{self.seed}/{step}/{fragment.name}/{block}".encode()
            value = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
            # On the CPU always: a device draws other numbers, and states may be offloaded.
            noise = torch.empty(_NOISE_BLOCK).normal_(0.0, std, generator=torch.Generator().manual_seed(value))
            start = block * _NOISE_BLOCK
            low, high = max(start, fragment.offset), min(start + _NOISE_BLOCK, end)
            grad[low - fragment.offset : high - fragment.offset] += noise[low - start : high - start].to(grad.device)


class Partitioned(torch.optim.Optimizer):
    """What every optimizer of ours shares. Put it before a torch optimizer among the bases.

    ``bind`` is called once the engine has cut the parameters up. ``skip``: the next steps change nothing.
    ``steps_taken``: finished optimizer steps of the run, which the noise depends on.
    """

    skip = False
    steps_taken = 0
    noise: GradientNoise | None = None
    maps: Mapping[str, tuple[int, ...]] = {}
    """Of parameters that are several linear maps below each other, the rows of each."""
    layout: dict[torch.Tensor, list[Fragment]]

    def bind(self, fragments: EngineFragments, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        """Learn what each flat tensor holds. Collective. ``shapes``: of all parameters, by name."""
        self.layout = {flat: [] for flat in fragments.flats}
        for fragment in fragments.held:
            self.layout[fragment.flat].append(fragment)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.skip:
            return None
        if self.noise is not None:
            for group in self.param_groups:
                for flat in group["params"]:
                    for fragment in self.layout[flat]:
                        self.noise.add(fragment, fragment.view(flat.grad), self.steps_taken)
        result = super().step(closure)
        for group in self.param_groups:
            bound = group.get("clamp")
            if bound is not None:
                for parameter in group["params"]:
                    parameter.clamp_(-bound, bound)
        return result


class AdamW(Partitioned, torch.optim.AdamW):
    """``torch.optim.AdamW``."""


class Muon(Partitioned, torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for groups with ``matrix``, AdamW for the others.

        m ← μ m + (1 − μ) g        u = NS₅((1 − μ) g + μ m)        W ← (1 − lr·wd) W − lr · 0.2 √max(rows, columns) · u

    NS₅: five Newton–Schulz steps towards the nearest orthogonal matrix, of each linear map by itself: in a stack of
    several (q, k, v; gate and up; Mamba2's z, x, B, C, dt) those with small gradients would hardly move. The scale
    makes the update's RMS that of AdamW (Moonlight, arXiv 2502.16982, eq. 4), so one learning rate and weight decay
    serve both. A matrix that is cut over ranks is put together on one of them for NS₅ (:mod:`paralm.training.muon`).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, steps: int, **adam: Any) -> None:
        super().__init__(groups, **adam)
        self.momentum, self.newton_schulz_steps = momentum, steps
        self._updates: dict[torch.Tensor, MatrixUpdate] = {}

    def bind(self, fragments: EngineFragments, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        super().bind(fragments, shapes, device)
        self._updates = {  # in the order of the flat tensors, which is the same on every rank
            flat: MatrixUpdate(self.layout[flat], shapes, device, whole=fragments.stage == 0, maps=self.maps)
            for flat, group in zip(fragments.flats, fragments.groups, strict=True)
            if self.param_groups[group]["matrix"]
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        every = self.param_groups
        try:  # AdamW, noise, clamp and skip for the rest; then the matrices
            self.param_groups = [group for group in every if not group["matrix"]]
            super().step(closure)
        finally:
            self.param_groups = every
        if self.skip:
            return None
        for group in every:
            if group["matrix"]:
                for flat in group["params"]:
                    self._step_matrices(flat, group)
        return None

    def _step_matrices(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        grad = flat.grad
        if grad is None:
            return
        fragments = self.layout[flat]
        if self.noise is not None:
            for fragment in fragments:
                self.noise.add(fragment, fragment.view(grad), self.steps_taken)
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - self.momentum)
        lookahead = grad.lerp(buffer, self.momentum)
        update = self._updates[flat](
            [fragment.view(lookahead) for fragment in fragments],
            lambda matrix: orthogonalized_update(matrix, self.newton_schulz_steps),
        )
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for fragment, values in zip(fragments, update, strict=True):
            fragment.view(flat).add_(values, alpha=-group["lr"])


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig, options: dict[str, Any]) -> Partitioned:
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, **options)


def _muon(groups: list[dict[str, Any]], config: OptimizerConfig, options: dict[str, Any]) -> Partitioned:
    muon = config.muon
    return Muon(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, momentum=muon.momentum, steps=muon.steps, **options
    )


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig, dict[str, Any]], Partitioned]] = {
    "adamw": _adamw,
    "muon": _muon,
}


def is_fused(config: OptimizerConfig, on_gpu: bool, offloaded: bool = False) -> bool:
    """Whether AdamW updates in one kernel, torch's own (DeepSpeed's would have to be compiled on the machine)."""
    return config.fused if config.fused is not None else on_gpu or offloaded


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, seed: int = 0, offloaded: bool = False
) -> Partitioned:
    """An optimizer over the model's explicit groups.

    ``groups``: as from ``LanguageModel.parameter_groups()``: ``params``, ``names``, ``weight_decay`` (whether
    the group decays), ``clamp`` (bound or None), ``matrix`` and ``maps``. ``seed``: of the gradient noise.
    ``offloaded``: the states are on the host.
    """
    prepared = [
        {
            "params": list(group["params"]),
            "weight_decay": config.weight_decay if group["weight_decay"] else 0.0,
            "clamp": group.get("clamp"),
            "matrix": group.get("matrix", False),
        }
        for group in groups
        if group["params"]
    ]
    fused = is_fused(config, torch.cuda.is_available(), offloaded)
    optimizer = OPTIMIZERS[config.name](prepared, config, {"fused": True} if fused else {})
    optimizer.maps = {name: rows for group in groups for name, rows in group.get("maps", {}).items()}
    if config.gradient_noise.eta > 0:
        optimizer.noise = GradientNoise(config.gradient_noise.eta, config.gradient_noise.gamma, seed)
    return optimizer
