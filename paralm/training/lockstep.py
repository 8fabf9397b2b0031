"""Forwards that every rank makes equally often. At ZeRO-3 a forward gathers weights from all ranks, so a rank that has
fewer documents to score than the others must go on calling the model, on nothing, until the last one is done."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Lockstep(nn.Module):
    """An engine's forward, agreed on beforehand; :meth:`finish` makes the calls that others still need."""

    engine: Any

    def __init__(self, engine: Any, device: torch.device) -> None:
        super().__init__()
        self.__dict__["engine"] = engine  # not a child: its mode and parameters are the engine's business
        self.device = device

    def _calls(self, mine: int) -> torch.Tensor:
        """How many ranks are about to call the model."""
        count = torch.tensor(mine, device=self.device)
        dist.all_reduce(count)
        return count

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self._calls(1)
        return self.engine(*arguments, **options)

    def finish(self) -> None:
        """Call the model on one masked token for as long as some rank has work."""
        nothing = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            while int(self._calls(0)):
                self.engine(nothing, labels=nothing - 100, return_token_losses=True)
