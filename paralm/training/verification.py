"""Choosing a checkpoint on rank 0 while all ranks verify it: each hashes its share of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paralm.errors import CheckpointError, UserError
from paralm.training.checkpoint import Checkpoint
from paralm.training.together import broadcast, gather

FindDamage = Callable[[Checkpoint], str | None]


def choose_together(rank: int, world_size: int, choose: Callable[[FindDamage], Checkpoint | None]) -> Checkpoint | None:
    """What ``choose`` returns on rank 0, opened on every rank. It is called there only.

    ``choose`` gets a function that finds a checkpoint's damage with the help of all ranks; the others serve it
    until a choice is made. Raises CheckpointError, the same line on every rank, when ``choose`` raises a UserError.
    """
    if rank != 0:
        while True:
            request, value = broadcast(None)
            if request == "verify":
                gather(_damage(value, rank, world_size))
            elif request == "failed":
                raise CheckpointError(value)
            else:
                return Checkpoint(value) if value is not None else None

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


def _damage(directory: Path, rank: int, world_size: int) -> str | None:
    """This rank's finding; what it cannot open is damage too, to be said by rank 0 instead of raised here."""
    try:
        return Checkpoint(directory).damage(rank, world_size)
    except CheckpointError as error:
        return str(error)
