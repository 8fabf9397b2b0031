"""Which rank this process is, from whatever started it: torchrun, Ray, srun, or mpirun.

One answer in one place: :func:`settle` puts it into the environment in torchrun's names, where everything else
reads it. torchrun sets those names itself. Under srun they follow from SLURM's. Under mpirun the ranks agree on
rank 0's address through mpi4py, in a worker of Ray Train through Ray.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from paralm.errors import RunError


@dataclass(frozen=True)
class Place:
    """One rank's place in its group, and where rank 0 is found."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    found_by: str  # slurm, mpi or ray

    def environment(self) -> dict[str, str]:
        """In torchrun's names."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def settle() -> None:
    """Find this process's place and put it into the environment; a lone process is left alone."""
    if in_ray_worker():
        place: Place | None = from_ray()  # a worker may be used again, in another place
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    else:
        place = from_slurm(os.environ) or (from_mpi() if mpi_size(os.environ) > 1 else None)
    if place is not None:
        os.environ.update(place.environment())


def is_rank() -> bool:
    """Whether this process is one of several ranks; :func:`settle` first."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def from_slurm(environment: Mapping[str, str]) -> Place | None:
    """Of a step that srun started with several tasks; a batch script by itself is no rank."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "SLURM_PROCID" not in environment or mpi_size(environment) > 1:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    # Of a port for this job and step, so that steps of one job can run side by side.
    number = int(environment.get("SLURM_JOB_ID", "0")) + 7 * int(environment.get("SLURM_STEP_ID", "0"))
    return Place(
        int(environment["SLURM_PROCID"]),
        tasks,
        int(environment.get("SLURM_LOCALID", "0")),
        environment.get("MASTER_ADDR") or first_host(nodes),
        int(environment.get("MASTER_PORT") or 20000 + number % 20000),
        "slurm",
    )


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: ``gpu[07-09,12],cpu1`` → ``gpu07``."""
    match = re.match(r"([^,\[\]]+)(?:\[(\w+)[^\]]*\]([^,\[\]]*))?", nodes)
    if match is None:
        raise RunError(f"SLURM_STEP_NODELIST is {nodes!r}: no node list; set MASTER_ADDR to rank 0's host")
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix or ''}"


def mpi_size(environment: Mapping[str, str]) -> int:
    """How many processes mpirun started, 0 outside: Open MPI's name, or that of MPICH's and Intel's."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 0


def from_mpi() -> Place:
    """Of a process under mpirun. Starts MPI; every process of the job must call it."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"this process is under mpirun, which needs mpi4py ({first}); install paralm[mpi]") from None
    world = MPI.COMM_WORLD
    hosts = world.allgather(socket.gethostname())
    rank = world.Get_rank()
    alone = len(set(hosts)) == 1
    address, port = world.bcast(_free_address(alone) if rank == 0 else None, root=0)
    return Place(rank, world.Get_size(), hosts[:rank].count(hosts[rank]), address, port, "mpi")


def in_ray_worker() -> bool:
    """Whether this process is a worker of Ray Train, in its training function."""
    train = sys.modules.get("ray.train")
    if train is None:
        return False
    try:
        return train.get_context().get_world_size() >= 1
    except (RuntimeError, AttributeError):
        return False


def from_ray() -> Place:
    """Of a worker of Ray Train; every worker must call it."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, host = context.get_world_rank(), ray.util.get_node_ip_address()
    alone = host == "127.0.0.1"  # Ray keeps to the loopback only where the whole cluster does
    address, port = broadcast_from_rank_zero((host, _free_address(alone)[1]))
    return Place(rank, context.get_world_size(), context.get_local_rank(), address, port, "ray")


def _free_address(alone: bool) -> tuple[str, int]:
    """An address of this machine that all ranks reach, and a port that nobody listens at."""
    address = "127.0.0.1" if alone else socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1" if alone else "", 0))
        return address, probe.getsockname()[1]
