"""``launcher.kind: local``: in this process, which is a rank of a group if something made it one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paralm.config import Config
from paralm_launch.launchers import register_launcher

if TYPE_CHECKING:
    from paralm.training.loop import TrainResult


@register_launcher("local")
def local(config: Config, on_progress: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> TrainResult:
    """Train in this process."""
    from paralm.training.loop import train

    return train(config, on_progress=on_progress, say=say)
