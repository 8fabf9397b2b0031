"""Time shards whose ranks take turns: a rank computes its next rows while a message is under way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RANK = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist
from paralm_kernels import TimeShards

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)

def told(name):
    deadline = time.monotonic() + 60
    while not (folder / name).exists():
        assert time.monotonic() < deadline, f"rank {rank} waits for '{name}' in vain"
        time.sleep(0.01)

class Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, state):
        if rank == 0 and x[0, 0] == 2:
            (folder / "second row").touch()
        ctx.first = bool(x[0, 0] == 1)
        return x + state, (state + x.sum(1, keepdim=True))

    @staticmethod
    def backward(ctx, y, state):
        if rank == 1 and ctx.first:  # rows come back in the other order
            (folder / "both rows back").touch()
        return y + state, y.sum(1, keepdim=True) + state

x = torch.tensor([[1.0, 3.0], [2.0, 5.0]], requires_grad=True)
if rank == 1:
    told("second row")  # takes the first row's state only now
shards = TimeShards()
zero = lambda batch: torch.zeros(batch, 1)
y, end = shards.relay(lambda x, state, reset: Row.apply(x, state), zero, x, zero(2))
if rank == 0:
    told("both rows back")
y.sum().backward()
shards.settle()
print(y.tolist(), x.grad.tolist())
dist.barrier()
dist.destroy_process_group()
"""


def test_no_rank_waits_until_its_message_is_taken(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    # y of rank 1 adds the sum of rank 0's part; its gradient there is 1 + the two outputs that hold it
    assert said[0].splitlines()[-1] == "[[1.0, 3.0], [2.0, 5.0]] [[3.0, 3.0], [3.0, 3.0]]"
    assert said[1].splitlines()[-1] == "[[5.0, 7.0], [9.0, 12.0]] [[1.0, 1.0], [1.0, 1.0]]"
