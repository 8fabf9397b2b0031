"""One rank of test_time_shards.py: every case on this rank's part of the time; the first rank compares with the whole.

python -m tests.paralm.time_shards_worker RANK WORLD_SIZE RENDEZVOUS_FILE CASES_FILE RESULT_FILE
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from paralm_kernels import TimeShards, chunkwise_torch, conv, time_shards_solve
from torch import Tensor
from torch.utils import _pytree as pytree

from paralm.config import ModelConfig
from paralm.models import build_mixer
from paralm.models.mixers import windowed
from paralm.models.mixers.base import shard_time
from paralm.models.parameters import initialize

ROWS, D_MODEL = 4, 16
DTYPE = torch.float64
"""In which numbers are drawn; a case may compute in another."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def cuts_of(time: int, world_size: int, uneven: bool) -> list[int]:
    """Where each rank's part ends."""
    if uneven:
        return [*(time - 5 * (world_size - rank - 1) for rank in range(world_size - 1)), time]
    return [time * (rank + 1) // world_size for rank in range(world_size)]


def resets_of(kind: str, rows: int, time: int, cuts: list[int]) -> Tensor | None:
    """None, or resets on a cut, next to one on both sides, and at the very first step; in the last row none, and of a
    single row one in the middle of the first part."""
    if kind == "none":
        return None
    reset = torch.zeros(rows, time, dtype=torch.bool)
    if rows == 1:
        reset[0, cuts[0] // 2] = True
        return reset
    reset[0, cuts[0]] = reset[1, cuts[0] - 1] = reset[1, cuts[-2] + 1] = reset[2, 0] = True
    reset[0, cuts[-2]] = True
    return reset


def given_state(mixer: Any, rows: int, seed: int, dtype: torch.dtype) -> Any:
    """A state that a run has left, as a leaf that wants gradients."""
    with torch.no_grad():
        _, state = mixer(normal(rows, 7, D_MODEL, seed=seed).to(dtype))
    return pytree.tree_map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, state)


def score(y: Tensor, weights: Tensor, end: Any = None) -> Tensor:
    total = (y * weights).sum()
    for index, leaf in enumerate(() if end is None else pytree.tree_leaves(end)):
        if leaf.is_floating_point():
            total = total + (leaf * normal(*leaf.shape, seed=50 + index).to(leaf.dtype)).sum()
    return total


class Case:
    """A case's inputs and its mixer, in its own numbers."""

    def __init__(self, case: dict[str, Any], world_size: int) -> None:
        self.case, self.frozen = case, bool(case.get("frozen", False))
        self.dtype = getattr(torch, case.get("dtype", "float64"))
        self.time = world_size if case["time"] == "one step a rank" else case["time"]
        self.cuts = cuts_of(self.time, world_size, case["uneven"])
        rows = case.get("rows", ROWS)
        self.x, self.weights = (normal(rows, self.time, D_MODEL, seed=seed).to(self.dtype) for seed in (1, 2))
        self.reset = resets_of(case["resets"], rows, self.time, self.cuts)
        self.state = given_state(self.build(), rows, 4, self.dtype) if case["state"] else None

    def build(self) -> Any:
        keys = {"name": self.case["name"], **self.case["keys"]}
        made = build_mixer(keys, ModelConfig(d_model=D_MODEL), 0).to(self.dtype)
        initialize(made, 3)
        with torch.no_grad():
            for index, parameter in enumerate(made.parameters()):
                parameter.add_(normal(*parameter.shape, seed=100 + index).to(self.dtype), alpha=0.1)
        return made.requires_grad_(not self.frozen)

    def on_one_rank(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is compared, of the same inputs and weights computed in ``dtype``."""

        def leaf(value: Any) -> Any:
            if value is None or not value.is_floating_point():
                return value
            return value.detach().to(dtype).requires_grad_(value.requires_grad)

        mixer, state = self.build().to(dtype), pytree.tree_map(leaf, self.state)
        x, scale = self.x.to(dtype).clone().requires_grad_(), torch.ones((), dtype=dtype, requires_grad=True)
        y, end = mixer(x, state, self.reset)
        score(y * scale, self.weights.to(dtype), end).backward()
        return {
            "outputs": y.detach(),
            "gradient of scale": gradient(scale),
            "gradient of inputs": gradient(x),
            **{f"gradient of {name}": gradient(parameter) for name, parameter in mixer.named_parameters()},
            **{f"final state {index}": value.detach() for index, value in enumerate(pytree.tree_leaves(end))},
            **{f"gradient of state {index}": gradient(value) for index, value in enumerate(leaves_of(state))},
        }


def leaves_of(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


@contextlib.contextmanager
def recorded(shards: TimeShards) -> Iterator[list[str]]:
    """In their order: "begun KIND" and "taken KIND" of each message, "hand_on" and "take_over" of those to a neighbour,
    "computed" of what a part is computed by."""
    events: list[str] = []

    def telling(begin: Any) -> Any:
        def begun(kind: str, *arguments: Any) -> Any:
            events.append(f"begun {kind}")
            message = begin(kind, *arguments)
            take = message.taken

            def taken() -> Any:
                events.append(f"taken {kind}")
                return take()

            message.taken = taken
            return message

        return begun

    def computing(function: Any, event: str = "computed") -> Any:
        def computed(*arguments: Any, **options: Any) -> Any:
            events.append(event)
            return function(*arguments, **options)

        return computed

    with contextlib.ExitStack() as stack:
        for name in ("gather", "pass_on"):
            stack.enter_context(mock.patch.object(shards, name, telling(getattr(shards, name))))
        for name in ("hand_on", "take_over"):
            stack.enter_context(mock.patch.object(shards, name, computing(getattr(shards, name), name)))
        for module, names in (
            (windowed.Heads, ("project", "rotate")),
            (conv.Call, ("outputs", "gradients")),
            (chunkwise_torch, ("outputs", "end", "gradients", "entry_gradient")),
            (time_shards_solve, ("run", "part_map", "gradients_of")),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(module, name, computing(getattr(module, name))))
        yield events


def run_case(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """On the first rank: for what is compared, the largest deviation from the whole in float64, and that of the whole
    in the case's own numbers.
    """
    made = Case(case, world_size)
    start, stop = ([0, *made.cuts])[rank], made.cuts[rank]
    mixer = made.build()
    scale = torch.ones((), dtype=made.dtype, requires_grad=True)  # trained even where the mixer is not
    shards = TimeShards()
    shard_time(mixer, shards)
    part = made.x[:, start:stop].clone().requires_grad_(not made.frozen)
    reset = None if made.reset is None else made.reset[:, start:stop]
    last = rank == world_size - 1
    with recorded(shards) as events:
        y, end = mixer.over_time(part, made.state if rank == 0 else None, reset)
        score(y * scale, made.weights[:, start:stop], end if last else None).backward()
    for parameter in (*mixer.parameters(), scale):
        parameter.grad = gradient(parameter)
        dist.all_reduce(parameter.grad)
    own = {"y": y.detach(), "x": gradient(part), "bytes": sum(shards.bytes_sent.values()), "events": events}
    own["under way"] = [messages_kept(shards, mixer, part) for _ in range(3)] if case["time"] == 96 else []
    if last:
        own["end"] = [leaf.detach() for leaf in pytree.tree_leaves(end)]
    every: list[Any] = [None] * world_size
    dist.gather_object(own, every if rank == 0 else None)
    if rank:
        return {}
    got = {
        "outputs": torch.cat([one["y"] for one in every], 1),
        "gradient of scale": gradient(scale),
        **{f"gradient of {name}": gradient(parameter) for name, parameter in mixer.named_parameters()},
        **{f"final state {index}": value for index, value in enumerate(every[-1]["end"])},
        **{f"gradient of state {index}": gradient(value) for index, value in enumerate(leaves_of(made.state))},
    }
    if not made.frozen:
        got["gradient of inputs"] = torch.cat([one["x"] for one in every], 1)
    exact = made.on_one_rank(torch.float64)
    whole = exact if made.dtype == torch.float64 else made.on_one_rank(made.dtype)
    if made.frozen:
        del exact["gradient of inputs"]
    assert got.keys() == exact.keys()
    return {
        "deviations": {what: worst(got[what], exact[what]) for what in exact},
        "rounding": {what: worst(whole[what], exact[what]) for what in exact},
        "bytes": max(one["bytes"] for one in every),
        "events": [one["events"] for one in every],
        "under way": [one["under way"] for one in every],
    }


def messages_kept(shards: TimeShards, mixer: Any, part: Tensor) -> int:
    """After one more forward, how many sent messages this rank still holds."""
    with torch.no_grad():
        mixer.over_time(part, None, None)
    return len(shards._under_way)


def worst(got: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to the largest element; itself where all should be zero."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    same = (got == expected) | (got.isinf() & expected.isinf() & (got.sign() == expected.sign()))
    deviation = torch.where(same, torch.zeros_like(got), (got - expected).abs())
    if not got.numel():
        return 0.0
    largest = float(expected.masked_fill(expected.isinf(), 0.0).abs().max())
    return float(deviation.max()) / (largest or 1.0)


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
