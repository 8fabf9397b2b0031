"""One rank of test_time_shards.py: every case on this rank's part of the time; the first rank compares with the whole.

python -m tests.paralm.time_shards_worker RANK WORLD_SIZE RENDEZVOUS_FILE CASES_FILE RESULT_FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from paralm_kernels import TimeShards
from torch import Tensor
from torch.utils import _pytree as pytree

from paralm.config import ModelConfig
from paralm.models import build_mixer
from paralm.models.mixers.base import shard_time
from paralm.models.parameters import initialize

BATCH, D_MODEL = 4, 16
DTYPE = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def cuts_of(time: int, world_size: int, uneven: bool) -> list[int]:
    """Where each rank's part ends."""
    if uneven:
        return [*(time - 5 * (world_size - rank - 1) for rank in range(world_size - 1)), time]
    return [time * (rank + 1) // world_size for rank in range(world_size)]


def resets_of(kind: str, time: int, cuts: list[int]) -> Tensor | None:
    """None, or resets on a cut, next to one on both sides, and at the very first step; in the last row none."""
    if kind == "none":
        return None
    reset = torch.zeros(BATCH, time, dtype=torch.bool)
    reset[0, cuts[0]] = reset[1, cuts[0] - 1] = reset[1, cuts[-2] + 1] = reset[2, 0] = True
    reset[0, cuts[-2]] = True
    return reset


def given_state(mixer: Any, seed: int) -> Any:
    """A state that a run has left, as a leaf that wants gradients."""
    with torch.no_grad():
        _, state = mixer(normal(BATCH, 7, D_MODEL, seed=seed))
    return pytree.tree_map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, state)


def score(y: Tensor, weights: Tensor, end: Any = None) -> Tensor:
    total = (y * weights).sum()
    for index, leaf in enumerate(() if end is None else pytree.tree_leaves(end)):
        if leaf.is_floating_point():
            total = total + (leaf * normal(*leaf.shape, seed=50 + index)).sum()
    return total


def run_case(case: dict[str, Any], rank: int, world_size: int) -> dict[str, float]:
    """On the first rank: the largest deviations from the whole, by what deviates."""
    time = case["time"]
    cuts = cuts_of(time, world_size, case["uneven"])
    start, stop = ([0, *cuts])[rank], cuts[rank]
    x, weights = normal(BATCH, time, D_MODEL, seed=1), normal(BATCH, time, D_MODEL, seed=2)
    reset = resets_of(case["resets"], time, cuts)

    def build() -> Any:
        made = build_mixer({"name": case["name"], **case["keys"]}, ModelConfig(d_model=D_MODEL), 0).to(DTYPE)
        initialize(made, 3)
        with torch.no_grad():
            for index, parameter in enumerate(made.parameters()):
                parameter.add_(normal(*parameter.shape, seed=100 + index), alpha=0.1)
        return made

    mixer = build()
    state = given_state(mixer, 4) if case["state"] else None
    shards = TimeShards()
    shard_time(mixer, shards)
    part = x[:, start:stop].clone().requires_grad_()
    y, end = mixer.over_time(part, state if rank == 0 else None, None if reset is None else reset[:, start:stop])
    last = rank == world_size - 1
    score(y, weights[:, start:stop], end if last else None).backward()
    for parameter in mixer.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    own = {"y": y.detach(), "x": part.grad, "bytes": sum(shards.bytes_sent.values())}
    if last:
        own["end"] = [leaf.detach() for leaf in pytree.tree_leaves(end)]
    if rank == 0 and state is not None:
        own["state"] = [leaf.grad for leaf in pytree.tree_leaves(state) if leaf.is_floating_point()]
    every: list[Any] = [None] * world_size
    dist.gather_object(own, every if rank == 0 else None)
    if rank:
        return {}
    whole = build()
    if state is not None:
        state = pytree.tree_map(lambda v: v.detach().clone().requires_grad_(v.requires_grad), state)
    whole_x = x.clone().requires_grad_()
    expected, expected_end = whole(whole_x, state, reset)
    score(expected, weights, expected_end).backward()
    found = {
        "outputs": worst(torch.cat([one["y"] for one in every], 1), expected),
        "inputs' gradient": worst(torch.cat([one["x"] for one in every], 1), whole_x.grad),
        "final state": max(
            worst(a, b) for a, b in zip(every[-1]["end"], pytree.tree_leaves(expected_end), strict=True)
        ),
    }
    for (name, a), b in zip(mixer.named_parameters(), whole.parameters(), strict=True):
        found[f"gradient of {name}"] = worst(a.grad, torch.zeros_like(b) if b.grad is None else b.grad)
    if state is not None:
        leaves = [leaf for leaf in pytree.tree_leaves(state) if leaf.is_floating_point()]
        for index, (a, b) in enumerate(zip(own["state"], leaves, strict=True)):
            zero = torch.zeros_like(b)
            found[f"gradient of state {index}"] = worst(zero if a is None else a, zero if b.grad is None else b.grad)
    return {**found, "bytes": float(max(one["bytes"] for one in every))}


def worst(got: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to the largest element or to one."""
    got, expected = got.detach().double(), expected.detach().double()
    same = (got == expected) | (got.isinf() & expected.isinf() & (got.sign() == expected.sign()))
    deviation = torch.where(same, torch.zeros_like(got), (got - expected).abs())
    return float(deviation.max() / expected[expected.isfinite()].abs().max().clamp(min=1.0)) if got.numel() else 0.0


def main() -> None:
    rank, world_size, rendezvous, cases, result = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    rows = []
    for case in json.loads(Path(cases).read_text()):
        try:
            rows.append(run_case(case, rank, world_size))
        except Exception as error:
            raise RuntimeError(f"rank {rank}: {case}") from error
        if rank == 0:
            Path(result).write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
