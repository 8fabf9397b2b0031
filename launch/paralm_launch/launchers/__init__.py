"""Ways to start training, by name (``launcher.kind``). All of them run the same loop.

``local`` runs it in this process, ``torchrun`` on ranks under torch's elastic agent, ``ray`` on the workers of Ray
Train, ``mpi`` under mpirun. A process that is a rank already, because torchrun, srun or mpirun started it, is found
out by :mod:`paralm_launch.discovery`, and trains in itself.

exchange.py: the files between a launcher and its ranks. parent.py: the launcher's side. worker.py: the ranks' side.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from paralm.config import Config
from paralm.errors import ConfigError

if TYPE_CHECKING:
    from paralm.training.loop import TrainResult


class Launcher(Protocol):
    """Starts the training of ``config`` and returns when it has ended.

    ``on_progress`` receives every row of metrics, ``say`` lines for a person; both on rank 0 only. Errors of
    the run are raised here, as :func:`paralm.training.loop.train` raises them.
    """

    def __call__(
        self, config: Config, on_progress: Callable[[dict[str, Any]], None], say: Callable[[str], None]
    ) -> TrainResult: ...


_LAUNCHERS: dict[str, Launcher] = {}


def register_launcher(name: str) -> Callable[[Launcher], Launcher]:
    """Make a launcher known as ``launcher.kind: name``."""

    def add(launcher: Launcher) -> Launcher:
        if name in _LAUNCHERS:
            raise ConfigError(f"launcher '{name}' is registered twice")
        _LAUNCHERS[name] = launcher
        return launcher

    return add


def launchers() -> list[str]:
    """The names of all launchers."""
    return sorted(_LAUNCHERS)


def get_launcher(name: str) -> Launcher:
    """A launcher by name. Raises ConfigError, naming the nearest."""
    if name in _LAUNCHERS:
        return _LAUNCHERS[name]
    near = difflib.get_close_matches(name, launchers(), n=1, cutoff=0.5)
    hint = f"nearest: {near[0]}" if near else f"there is {', '.join(launchers())}"
    raise ConfigError(f"launcher.kind: unknown launcher '{name}'; {hint}")


# The launchers register themselves; none of them imports torch, Ray or MPI before it is called.
from paralm_launch.launchers import local, mpi, ray, torchrun  # noqa: E402, F401
