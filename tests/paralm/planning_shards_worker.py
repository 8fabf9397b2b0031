"""One rank of test_planning.py: what a rank really sends to the other time shards in a forward and a backward pass.

python -m tests.paralm.planning_shards_worker RANK WORLD_SIZE RENDEZVOUS_FILE MIXERS_JSON → a line of JSON
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from paralm_kernels import TimeShards

from paralm.config import ModelConfig
from paralm.models import build_mixer
from paralm.models.mixers.base import shard_time
from paralm.models.parameters import initialize

BATCH, STEPS, D_MODEL = 3, 128, 32
"""Steps of a rank's part: so many that what was before them is forgotten, and cells end after one further walk."""


def sent_by(spec: dict[str, Any], shards: TimeShards, device: str) -> dict[str, int]:
    """Bytes by kind, of one mixer."""
    mixer = build_mixer(spec, ModelConfig(d_model=D_MODEL, n_layers=1), 0)
    if device == "meta":
        mixer.to("meta")
    else:
        mixer.to_empty(device=device)
        initialize(mixer, 0)
    shard_time(mixer, shards)
    x = torch.zeros(BATCH, STEPS, D_MODEL, device=device, requires_grad=True)
    if device != "meta":
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(shards.rank)).requires_grad_()
    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool, device=device)
    y, _ = mixer.over_time(x, None, reset)
    y.sum().backward()
    return dict(shards.bytes_sent)


def main(rank: str, size: str, meeting: str, mixers: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(size))
    every = [(TimeShards(), spec) for spec in json.loads(mixers)]
    print(json.dumps([sent_by(spec, shards, "cpu") for shards, spec in every]), flush=True)
    for shards, _ in every:
        shards.settle()
    dist.barrier()  # a rank that left could take a message with it that was not taken yet
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
