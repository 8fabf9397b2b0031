"""Who has not come is named: at the rendezvous, and in a collective that waits too long."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paralm.errors import RunError
from paralm.training import rendezvous
from paralm.training.rendezvous import LostRanksError, meet
from paralm.training.watch import EXIT_LOST, Note, Watch, lost_message, missing_ranks, ranks_text, read_note


def note(rank: int, beats: int = 1, step: int = 7, phase: str = "step", waiting: str = "all_reduce") -> Note:
    return Note(rank, 100 + rank, f"node-{rank // 2}", phase, step, beats, waiting)


def later(notes: list[Note]) -> list[Note | None]:
    return [Note(**{**vars(n), "beats": n.beats + 3}) for n in notes]


def test_a_process_that_does_not_move_is_missing() -> None:
    before = [note(0), note(1), note(2)]
    after = later(before)
    after[1] = before[1]
    assert missing_ranks(list(before), after) == [1]


def test_a_rank_without_a_note_is_missing_and_one_that_has_just_come_is_not() -> None:
    before: list[Note | None] = [note(0), None, note(2), None]
    after = [*later([note(0)]), note(1), *later([note(2)]), None]
    assert missing_ranks(before, after) == [3]


def test_ranks_that_came_less_far_are_missing() -> None:
    notes = [note(0, phase="save"), note(1), note(2, step=6), note(3, phase="save")]
    assert missing_ranks(list(notes), later(notes)) == [1, 2]


def test_a_rank_that_computes_while_others_wait_is_missing() -> None:
    notes = [note(0), note(1, waiting=""), note(2)]
    assert missing_ranks(list(notes), later(notes)) == [1]
    every = [note(0), note(1)]
    assert missing_ranks(list(every), later(every)) == []


def test_the_line_names_ranks_hosts_what_and_how_long() -> None:
    notes: list[Note | None] = [note(rank, step=117) for rank in range(6)]
    assert lost_message([2, 5], notes, note(0, step=117), 600.2) == (
        "ranks 2, 5 (node-1, node-2) have not finished step 117 after 600 s; ending this attempt"
    )
    assert "rank 2 (node-1) has not saved step 8" in lost_message([2], notes, note(0, step=8, phase="save"), 9)
    assert ranks_text(list(range(20))).endswith("14, 15 and 4 more")


def test_a_rank_that_never_comes_to_the_rendezvous_is_named() -> None:
    store = dist.HashStore()
    store.set("here/2", "node-7")
    with pytest.raises(LostRanksError, match=r"^ranks 1, 3 of 4 did not come to the rendezvous within 0.2 s"):
        meet(store, 0, 4, 0.2)
    for rank in range(1, 4):
        store.set(f"here/{rank}", "node-7")
    meet(store, 0, 4, 0.2)


def test_a_rank_that_refuses_is_named_before_those_that_did_not_come() -> None:
    store = dist.HashStore()
    store.set("here/2", "node-7 GPU-a\n/data: missing")
    with pytest.raises(RunError, match=r"^rank 2 on node-7: /data: missing$"):
        meet(store, 1, 4, 0.2)
    assert store.add("told", 0) == 1


def test_ranks_that_share_a_gpu_are_named() -> None:
    """Of a rank that sees one GPU only, nothing else tells whether that is another's."""
    store = dist.HashStore()
    for rank, signed in enumerate(("node-7 GPU-a", "node-7 GPU-b", "node-8 GPU-c")):
        store.set(f"here/{rank}", signed)
    meet(store, 3, 4, 0.2, "GPU-d")
    with pytest.raises(RunError, match=r"^ranks 1, 3 have one GPU \(GPU-b of node-7\); each needs one of its own$"):
        meet(store, 3, 4, 0.2, "GPU-b")
    with pytest.raises(LostRanksError, match=r"^rank 4 of 5 did not come .* the others are on [^ ,]+(, [^ ,]+)*$"):
        meet(store, 3, 5, 0.01, "GPU-b")


@pytest.mark.parametrize(("seen", "place", "taken"), [(1, 3, 0), (1, 0, 0), (8, 3, 3), (2, 3, None)])
def test_of_several_gpus_a_rank_takes_its_own_and_of_one_that_one(
    monkeypatch: pytest.MonkeyPatch, seen: int, place: int, taken: int | None
) -> None:
    """As under srun --gpus-per-task=1. DeepSpeed takes its device from LOCAL_RANK, and compares it with Open MPI's."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", lambda where: chosen.append(where.index))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, str(place))
    if taken is None:
        with pytest.raises(RunError, match=f"^LOCAL_RANK is {place}, but this node has {seen} GPUs$"):
            rendezvous.start_distributed(1.0)
        return
    rendezvous.start_distributed(1.0)
    assert chosen == [taken]
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(taken)
    assert rendezvous.device().index == taken


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("told", [None, "eth1"])
def test_a_lone_process_leaves_the_environment_as_it_was(told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it starts later may be a rank of several nodes, which gloo would look for on the loopback."""
    seen: list[str | None] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if told is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", told)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: seen.append(os.environ.get("GLOO_SOCKET_IFNAME")))
    monkeypatch.setattr(rendezvous.atexit, "register", seen.append)
    rendezvous.start_distributed(1.0)
    assert seen == [told or "lo", rendezvous.leave]
    assert os.environ.get("GLOO_SOCKET_IFNAME") == told


def test_agents_that_count_their_starts_differently_meet(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent counts only those for ranks of its own that were lost; of another it joins the next attempt."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    stores = []
    for rank, starts in enumerate("10"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", starts)
        stores.append(rendezvous._store(rank, 2, 5.0))
        stores[-1].set(f"here/{rank}", "node-7")
    assert stores[0].check(["here/1"])
    assert stores[1].check(["here/0"])


_REFUSES = """
import sys
from paralm.errors import RunError
from paralm.training.rendezvous import start_distributed
refusing = sys.argv[1] == sys.argv[2]
try:
    start_distributed(60.0, RunError("/data: missing") if refusing else None)
except RunError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("refusing", [0, 1])
def test_what_one_rank_refuses_ends_all_of_them_at_once(free_port: int, refusing: int) -> None:
    """Data that one node does not see: the others waited half an hour for its ranks, and did not hear why."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _REFUSES, str(rank), str(refusing)], stdout=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=50)[0] for process in ranks]
    assert said[refusing] == "RunError /data: missing\n"
    assert said[1 - refusing] == f"RunError rank {refusing} on {socket.gethostname()}: /data: missing\n"


_RANK = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from paralm_kernels import TimeShards
from paralm.training.watch import watching
rank, run, port = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=120))
shards, x = TimeShards(), torch.zeros(1)
with watching(run, rank, 3, 1.0) as watch:
    for step in range(1, 1000000):
        watch.note("step", step)
        time.sleep(0.02)
        COLLECTIVE
"""


@pytest.mark.parametrize(
    ("collective", "waiting"), [("dist.all_reduce(x)", "all_reduce"), ("shards.gather('state', x).taken()", "taken")]
)
def test_a_stopped_rank_is_named_and_the_others_end(
    tmp_path: Path, free_port: int, collective: str, waiting: str
) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK.replace("COLLECTIVE", collective), str(rank), str(tmp_path), str(free_port)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        deadline = time.monotonic() + 120
        while (seen := read_note(tmp_path / "ranks" / "note_00001.json")) is None or seen.step < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.5)  # longer than the limit: steps that go on are no wait
        assert [process.poll() for process in processes] == [None] * 3
        processes[1].send_signal(signal.SIGSTOP)
        errors = [processes[rank].communicate(timeout=60)[1] for rank in (0, 2)]
        assert [processes[rank].returncode for rank in (0, 2)] == [EXIT_LOST] * 2
        said = [line for error in errors for line in error.splitlines() if "ending this attempt" in line]
        assert len(said) == 1, errors
        assert said[0].startswith("error: rank 1 (")
        assert "has not finished step" in said[0]
        assert waiting in (tmp_path / "stacks" / "rank_00002.txt").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_rank_that_cannot_say_why_ends_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    watch = Watch(tmp_path, 0, 2, 1.0, refuse)
    monkeypatch.setattr(watch, "_waited", lambda: 2.0)
    with pytest.raises(OSError, match="No space left"):
        watch._judge()
    assert codes == [EXIT_LOST]
