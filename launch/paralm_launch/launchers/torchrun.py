"""``launcher.kind: torchrun``: ranks under torch's elastic agent, which starts them again when one is lost.

On several nodes (``launcher.nodes``) the same command runs on each of them; they meet at ``launcher.rendezvous``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from paralm.config import Config
from paralm.errors import RunError
from paralm_launch.launchers import register_launcher
from paralm_launch.launchers.parent import Launch, ended_by, number_of_ranks, worker_command

if TYPE_CHECKING:
    from paralm.training.loop import TrainResult

_LOOPBACK = "paralm-loopback"
_END_SECONDS = 5  # that ranks of a broken attempt get before SIGKILL; they have nothing left to save


def _loopback_backend() -> str:
    """The name of a rendezvous for one node. torch's own opens a store for the whole network; this one does not."""
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousParameters,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )

    from paralm.training.rendezvous import open_store

    class Loopback(RendezvousHandler):
        """The only node is always there."""

        use_agent_store = True

        def __init__(self, parameters: RendezvousParameters) -> None:
            self._run_id, self._closed = parameters.run_id, False
            self._store = open_store("127.0.0.1", 0, timedelta(seconds=float(parameters.get("timeout"))))

        def get_backend(self) -> str:
            return _LOOPBACK

        def next_rendezvous(self) -> RendezvousInfo:
            return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", self._store.port))

        def is_closed(self) -> bool:
            return self._closed

        def set_closed(self) -> None:
            self._closed = True

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return self._run_id

        def shutdown(self) -> bool:
            self._closed = True
            return True

    with contextlib.suppress(ValueError):  # registered by an earlier launch in this process
        rendezvous_handler_registry.register(_LOOPBACK, Loopback)
    return _LOOPBACK


@register_launcher("torchrun")
def torchrun(config: Config, on_progress: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> TrainResult:
    """Train on ``launcher.ranks`` processes, ``launcher.nodes`` nodes."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks' own words are enough
    settings = config.launcher
    alone = settings.nodes == 1
    if not alone:
        # A store for each attempt: in one that outlives them, agents that count the starts differently never meet.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    reason = "the ranks ended without a word"
    with Launch(config, on_progress, say) as launch:
        command = worker_command(launch.exchange)
        agent = LaunchConfig(
            min_nodes=settings.nodes,
            max_nodes=settings.nodes,
            nproc_per_node=number_of_ranks(config) // settings.nodes,
            run_id=config.run.name,
            rdzv_backend=_loopback_backend() if alone else "c10d",
            rdzv_endpoint=settings.rendezvous or "",
            rdzv_configs={"timeout": config.parallel.collective_timeout},
            local_addr="127.0.0.1" if alone else None,
            max_restarts=settings.max_failures,
            signals_to_handle="SIGHUP,SIGQUIT",  # the others are the launch's
            shutdown_timeout=_END_SECONDS,
        )
        try:
            launch_agent(agent, command[0], command[1:])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            reason = f"rank {rank} was {ended_by(failure.exitcode)}"
        except SignalException as error:
            reason = f"the launcher got {error.sigval.name}"
        except (RuntimeError, RendezvousError) as error:
            if "rendezvous" not in str(error).lower() and type(error).__module__.split(".")[0] != "torch":
                raise
            reason = f"{settings.nodes} nodes did not meet at {settings.rendezvous}: {_first_line(error)}"
            if not (launch.exchange.outcomes() or launch.exchange.failures() or launch.exchange.starts()):
                raise RunError(f"{reason}; start the same command on each, and check launcher.rendezvous") from None
        return launch.result(reason)


def _first_line(error: Exception) -> str:
    """What it says first, or its name: that a rendezvous was closed is an error without a word."""
    return (str(error).splitlines() or [type(error).__name__])[0]
