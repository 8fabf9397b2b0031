"""Which blocks run again in the backward: as few as fit, of the first ones.

Each block that does costs its forward once more and frees what it kept; the first ones free the most, since at the
peaks of the backward (the loss, and the last blocks) all of theirs is still held.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist

from paralm.config import Config
from paralm.models.lm import LanguageModel
from paralm.planning.cost import FRAGMENTED, usable_bytes
from paralm.planning.memory import gradient_bytes, memory, optimizer_costs, sizes_of
from paralm.planning.trace import On, Trace, partly_again, uniform_trace


def fewest_blocks(peak_of: Callable[[int], int], n_layers: int, usable: float) -> int | None:
    """The smallest number of blocks whose peak fits. ``peak_of``: bytes at the peak, by number. None: not even all."""
    return next((blocks for blocks in range(n_layers + 1) if peak_of(blocks) <= usable), None)


def mixed(uniform: Callable[[bool], Trace], blocks: int) -> Trace:
    """Of a model of which the first ``blocks`` run again; ``uniform``: of all or none."""
    if blocks == 0:
        return uniform(False)
    again = uniform(True)
    return again if blocks == len(again.layers) else partly_again(uniform(False), again, blocks)


def settle_here(config: Config, model: LanguageModel, vocab_size: int, ranks: int, where: torch.device) -> int:
    """What ``auto`` is on these ranks' devices: as few blocks as fit on the fullest, or all. Collective.

    ``model``: of ``config``, on the meta device. A GPU's memory is its own; a CPU's is what is free now, shared by
    the ranks of the machine. The choice changes no loss, so a run may go on with another.
    """
    on: On = "gpu" if where.type == "cuda" else "cpu"
    if on == "gpu":
        usable = usable_bytes(torch.cuda.get_device_properties(where).total_memory)
    else:
        usable = psutil.virtual_memory().available * (1 - FRAGMENTED) / int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    sizes, costs, kept = sizes_of(model), optimizer_costs(config, model, ranks, on), gradient_bytes(config, on)
    known: dict[bool, Trace] = {}

    def uniform(again: bool) -> Trace:
        if again not in known:
            known[again] = uniform_trace(config, vocab_size, again, on, kept)
        return known[again]

    def peak_of(blocks: int) -> int:
        return memory(config, mixed(uniform, blocks), sizes, costs, ranks, on).peak.total

    n = config.model.n_layers
    chosen = fewest_blocks(peak_of, n, usable)
    agreed = torch.tensor(n if chosen is None else chosen, device=where)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)  # ranks that gather weights together must run the same blocks
    return int(agreed)
