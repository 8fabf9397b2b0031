"""Ways to start training, by name (``launcher.kind``). All of them run the same loop.

``local`` runs it in this process. The process is one rank of a group when its environment says so (``RANK``,
``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``, ``LOCAL_RANK``, as torchrun and ``slurm/train.sbatch`` set
them), and a group of its own otherwise.
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


@register_launcher("local")
def local(config: Config, on_progress: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> TrainResult:
    """Train in this process."""
    from paralm.training.loop import train

    return train(config, on_progress=on_progress, say=say)
