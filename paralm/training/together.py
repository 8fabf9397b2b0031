"""Small values that all ranks agree on or share: collectives over Python objects."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box
