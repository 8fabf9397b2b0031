"""Optimizers, found by name. Each sees flat partitions of fp32 master weights (ZeRO), a group at a time.

A group may carry ``clamp``: the elementwise bound on recurrent weights (ParaRNN, arXiv 2510.21450), applied
to the master weights right after the update. It is elementwise, so it is exact on any shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paralm.config import OptimizerConfig


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` and the groups' ``clamp``."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            bound = group.get("clamp")
            if bound is not None:
                for parameter in group["params"]:
                    parameter.clamp_(-bound, bound)
        return result


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]] = {"adamw": _adamw}


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer over the model's explicit groups.

    ``groups``: as from ``LanguageModel.parameter_groups()``: ``params``, ``names``, ``weight_decay`` (whether
    the group decays) and ``clamp`` (bound or None).
    """
    prepared = [
        {
            "params": list(group["params"]),
            "weight_decay": config.weight_decay if group["weight_decay"] else 0.0,
            "clamp": group.get("clamp"),
        }
        for group in groups
        if group["params"]
    ]
    return OPTIMIZERS[config.name](prepared, config)
