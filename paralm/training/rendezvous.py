"""Where the ranks meet: who this process is, and how the process group comes about.

The environment says who a process is, in torchrun's names (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR``, ``MASTER_PORT``); launchers put it there. The ranks sign a list in a store before the group is
made, so that the ones that never come can be named.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from paralm.errors import RunError
from paralm.training import watch

_TELL = 20.0  # seconds that rank 0 stays when one has refused, so that all others hear of it
_MARGIN = 60.0  # seconds that the group's own limit lies above ours, so that ours, which names ranks, comes first


class LostRanksError(RunError):
    """Ranks that never came, or came no further. Another start may go well, so launchers try again."""

    exit_code = watch.EXIT_LOST


def device() -> torch.device:
    """This rank's device: of the GPUs it sees the one of its ``LOCAL_RANK``, or the only one."""
    if torch.cuda.is_available():
        alone = torch.cuda.device_count() == 1  # as under srun --gpus-per-task=1, or that others too would take
        return torch.device("cuda", 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank_and_world() -> tuple[int, int]:
    """From the environment a launcher set; a lone process is rank 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def group_timeout(limit: float) -> timedelta:
    """What a process group gets as its own limit of a collective, in place of ``limit`` seconds."""
    return timedelta(seconds=1.25 * limit + _MARGIN)


def start_distributed(timeout: float, refusal: Exception | None = None) -> None:
    """Join the process group, once in a process's life; it is left again when the process exits.

    ``timeout``: seconds that ranks wait for each other, here and in every collective. ``refusal``: why this rank
    cannot take part; it is raised here, and all others raise a RunError that says whose it is. Raises LostRanksError,
    naming the ranks that did not come, and RunError for an environment that cannot be right.

    DeepSpeed caches groups, so a second group in one process would be used through stale handles.
    """
    where = device()
    if where.type == "cuda":
        if where.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            refusal = refusal or RunError(f"LOCAL_RANK is {where.index}, but this node has {count} GPUs")
        else:
            torch.cuda.set_device(where)
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
            os.environ[name] = str(where.index)  # from which DeepSpeed takes its device
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    rank, world = rank_and_world()
    if refusal is not None:
        if world > 1 and not dist.is_initialized():
            _refuse(rank, world, timeout, refusal)
        raise refusal
    watch.note("start")
    if dist.is_initialized():  # by an earlier run in this process
        return
    backend = "nccl" if where.type == "cuda" else "gloo"
    if world == 1:
        # A store in memory: a lone process opens no port, so any number of them can share a machine.
        with _on_loopback():
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=group_timeout(timeout)
            )
    else:
        if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = _store(rank, world, timeout)
        meet(store, rank, world, timeout, _gpu(where))
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=group_timeout(timeout))
        except (ValueError, RuntimeError) as error:
            raise LostRanksError(_cannot_join(rank, world, error)) from None
    atexit.register(leave)


def _refuse(rank: int, world: int, timeout: float, refusal: Exception) -> None:
    """Let the others know, as soon as they come; they would wait for this rank until their time is over."""
    with contextlib.suppress(RunError):  # what they say of it, or that they never came
        meet(_store(rank, world, timeout), rank, world, timeout, refusal=" ".join(str(refusal).split()))


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Within it gloo takes the loopback, unless it was told otherwise; what this process starts later may be a rank
    that others must reach."""
    told = "GLOO_SOCKET_IFNAME" in os.environ
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        yield
    finally:
        if not told:
            del os.environ["GLOO_SOCKET_IFNAME"]


def _cannot_join(rank: int, world: int, error: Exception) -> str:
    first = str(error).splitlines()[0]
    return (
        f"rank {rank} of {world} cannot join the others: {first}; check RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
    )


def _store(rank: int, world: int, timeout: float) -> dist.Store:
    """The store of this attempt: rank 0's own, or the elastic agent's, which outlives attempts.

    Only of an agent that is alone: each counts the starts of its own ranks, so several do not agree on the number.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise RunError(
            f"WORLD_SIZE is {world}, but MASTER_ADDR is {address or 'not set'} and MASTER_PORT is "
            f"{port or 'not set'}; all ranks need rank 0's host and a free port there"
        )
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = timedelta(seconds=timeout)
    try:
        if rank == 0 and not agent:
            store = open_store(address, int(port), limit)
        else:
            store = dist.TCPStore(address, int(port), is_master=False, timeout=limit, wait_for_workers=False)
    except (ValueError, RuntimeError, OSError) as error:
        if rank == 0:
            raise LostRanksError(_cannot_join(rank, world, error)) from None
        raise LostRanksError(
            f"rank 0 has not opened MASTER_ADDR:MASTER_PORT ({address}:{port}) after {timeout:g} s, says rank {rank} "
            f"of {world}; check that it runs, and RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from None
    return dist.PrefixStore(f"paralm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if agent else '0'}", store)


def open_store(address: str, port: int, limit: timedelta) -> dist.TCPStore:
    """A store for others to join. torch's listens at every address of the machine; ranks that are all on this one
    need no more than the loopback. ``port`` 0: any that is free, there.
    """
    if address not in ("127.0.0.1", "localhost"):
        return dist.TCPStore(address, port, is_master=True, timeout=limit, wait_for_workers=False)
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _gpu(where: torch.device) -> str:
    """The name of a GPU that no other has, whoever sees it as what; of a CPU ``""``."""
    return str(torch.cuda.get_device_properties(where).uuid) if where.type == "cuda" else ""


def meet(store: dist.Store, rank: int, world: int, timeout: float, gpu: str = "", refusal: str = "") -> None:
    """Wait until every rank has signed; raises LostRanksError, naming those that have not after ``timeout`` seconds.

    ``gpu``: the name of this rank's. Raises RunError where ranks have the same, and where one signs with a ``refusal``,
    a line that says why it cannot take part.
    """
    deadline = time.monotonic() + timeout
    keys = [f"here/{other}" for other in range(world)]  # asked for at once: one by one they are world² questions
    absent: list[int] = []
    pause = 0.01
    try:
        store.set(keys[rank], f"{socket.gethostname()} {gpu}\n{refusal}")
        while not store.check(keys):
            if time.monotonic() > deadline:
                absent = [other for other, key in enumerate(keys) if not store.check([key])]
                break
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
        present = [other for other in range(world) if other not in absent]
        signed_by = store.multi_get([keys[other] for other in present])
        here = {other: signed.decode() for other, signed in zip(present, signed_by, strict=True)}
        refused = _refusal(store, rank, here)
    except RuntimeError as error:
        raise LostRanksError(_cannot_join(rank, world, error)) from None
    if refused is not None:
        raise RunError(refused)
    if absent:
        hosts = sorted({signed.partition(" ")[0] for signed in here.values()})
        raise LostRanksError(
            f"{watch.ranks_text(absent)} of {world} did not come to the rendezvous within {timeout:g} s; "
            f"the others are on {', '.join(hosts)}"
        )
    owners: dict[str, list[int]] = {}
    for other, signed in here.items():
        owners.setdefault(signed.partition("\n")[0].partition(" ")[2], []).append(other)
    for name, ranks in owners.items():
        if name and len(ranks) > 1:
            host = here[ranks[0]].partition(" ")[0]
            raise RunError(f"{watch.ranks_text(ranks)} have one GPU ({name} of {host}); each needs one of its own")


def _refusal(store: dist.Store, rank: int, here: dict[int, str]) -> str | None:
    """Of the first rank that refuses, if one does. Rank 0, whose the store may be, stays until the others know."""
    found = ((other, *signed.partition("\n")[::2]) for other, signed in here.items())
    first = next(((other, about, why) for other, about, why in found if why), None)
    if first is None:
        return None
    other, about, why = first
    told, deadline = store.add("told", 1), time.monotonic() + _TELL
    while rank == 0 and told < len(here) and time.monotonic() < deadline:
        time.sleep(0.05)
        told = store.add("told", 0)
    return f"rank {other} on {about.partition(' ')[0]}: {why}"


def leave() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
