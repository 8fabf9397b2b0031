"""Training without a run: an engine around a model, and batches of synthetic tokens. For tools and benchmarks."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from paralm_data import Batch

from paralm.config import Config
from paralm.models import build_model
from paralm.models.parameters import initial_value, specs
from paralm.training.engine import build_engine
from paralm.training.fragments import EngineFragments
from paralm.training.grid import Grid
from paralm.training.rendezvous import device, start_distributed
from paralm.training.step import Stepper


def text(step: int, rows: int, length: int, vocabulary: int) -> torch.Tensor:
    """Tokens (rows, length + 1) with structure to learn: most are a fixed function of the one before."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    keep = torch.rand((rows, length + 1), generator=generator) < 0.75
    keep[:, 0] = False
    at = torch.arange(length + 1)
    drawn = torch.where(keep, 0, at).cummax(1).values
    tokens, steps = tokens.gather(1, drawn), at - drawn
    for done in range(int(steps.max())):  # a loop over time takes a quarter of a minute for a million tokens
        tokens = torch.where(steps > done, (tokens * 7 + 3) % 64, tokens)
    return tokens


def batch(step: int, rows: int, length: int, vocabulary: int) -> Batch:
    """This rank's rows of a batch of :func:`text`."""
    tokens = text(step, rows, length, vocabulary)
    reset = torch.zeros(rows, length, dtype=torch.bool)
    reset[0, length // 3] = True
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rows * rank // world, rows * (rank + 1) // world)
    fresh = torch.zeros(rows, dtype=torch.bool)[mine]
    return Batch(step, np.arange(rows)[mine], tokens[mine, :-1], tokens[mine, 1:], reset[mine], fresh, 0.0)


def stepper(config: Config, vocabulary: int) -> Stepper:
    """The configured model with its initial values, ready to step, on every rank of the group (joined if need be)."""
    start_distributed(60.0)
    rank, world = dist.get_rank(), dist.get_world_size()
    engine, optimizer = build_engine(config, vocabulary, world)
    fragments = EngineFragments(engine, rank, world)
    known = {name: (tuple(p.shape), spec) for name, p, spec in specs(build_model(config.model, vocabulary, 0, "meta"))}

    def read(kind: str, name: str, offset: int, numel: int) -> torch.Tensor:
        shape, spec = known[name]
        return initial_value(name, shape, spec, config.run.seed).view(-1)[offset : offset + numel]

    fragments.load(read, lambda name: (), {})
    optimizer.bind(fragments, {name: shape for name, (shape, _) in known.items()}, device())
    return Stepper(engine, optimizer, config, device(), Grid(rank, world))
