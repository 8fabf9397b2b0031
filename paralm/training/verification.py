"""Who verifies what: of a checkpoint each rank hashes its share of the files, of a node's data one rank reads all."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from paralm_data import TokenStore

from paralm.config import Config
from paralm.errors import CheckpointError, UserError
from paralm.training.checkpoint import Checkpoint
from paralm.training.together import broadcast, gather

_MUCH = 100e9  # bytes of tokens whose reading is worth a word

FindDamage = Callable[[Checkpoint], str | None]


def first_on_node(rank: int) -> bool:
    """Whether no lower rank has this host's name: what all ranks of a node see alike, one of them can read for all. A
    collective."""
    hosts = gather(socket.gethostname())
    return hosts.index(hosts[rank]) == rank


def verify_stores(config: Config, stores: Sequence[TokenStore], reads: bool, say: Callable[[str], None]) -> None:
    """With ``data.verify: full`` read the stores whole, where this rank ``reads`` for its node. Raises DataError."""
    if config.data.verify != "full" or not reads:
        return
    size = sum(entry.size for store in stores for entry in store.manifest.files.values())
    if size > _MUCH:
        say(
            f"data.verify: full: one rank of each node reads {size / 1e9:,.0f} GB now, for which it has "
            f"parallel.collective_timeout ({config.parallel.collective_timeout:g} s); with size none does"
        )
    for store in stores:
        store.verify()


def choose_together(rank: int, world_size: int, choose: Callable[[FindDamage], Checkpoint | None]) -> Checkpoint | None:
    """What ``choose`` returns on rank 0, opened on every rank. It is called there only.

    ``choose`` gets a function that finds a checkpoint's damage with the help of all ranks; the others serve it
    until a choice is made. Raises CheckpointError, the same line on every rank, when ``choose`` raises a UserError.
    """
    if rank != 0:
        opened: dict[Path, Checkpoint] = {}  # a manifest of hundreds of ranks is megabytes
        while True:
            request, value = broadcast(None)
            if request == "verify":
                gather(_damage(value, rank, world_size, opened))
            elif request == "failed":
                raise CheckpointError(value)
            else:
                return opened.get(value) or Checkpoint(value) if value is not None else None

    def find_damage(candidate: Checkpoint) -> str | None:
        broadcast(("verify", candidate.directory))
        return next((found for found in gather(candidate.damage(0, world_size)) if found), None)

    try:
        chosen = choose(find_damage)
    except (UserError, OSError) as error:
        broadcast(("failed", str(error)))
        raise CheckpointError(str(error)) from None
    broadcast(("chosen", chosen.directory if chosen else None))
    return chosen


def _damage(directory: Path, rank: int, world_size: int, opened: dict[Path, Checkpoint]) -> str | None:
    """This rank's finding; what it cannot open is damage too, to be said by rank 0 instead of raised here."""
    try:
        opened[directory] = Checkpoint(directory)
        return opened[directory].damage(rank, world_size)
    except CheckpointError as error:
        return str(error)
