"""Whether a Ray cluster has what the ranks need. Ray itself waits for it, without a word and without an end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paralm.config import LauncherConfig
from paralm.errors import StoppedError
from paralm.training.rendezvous import LostRanksError

_LOOK_SECONDS = 5.0
Nodes = Callable[[], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Need:
    """What ``ranks`` ranks reserve, each the same, and how they may lie on the nodes (Ray's placement strategies)."""

    ranks: int
    resources: Mapping[str, float]
    placement: str

    def room(self, nodes: Sequence[Mapping[str, Any]]) -> int:
        """Ranks that the nodes which are alive have room for, were they free. ``nodes``: as of ``ray.nodes()``."""
        each = [self._on(node["Resources"]) for node in nodes if node["Alive"]]
        if self.placement == "STRICT_PACK":
            return max(each, default=0)
        return sum(min(1, fit) for fit in each) if self.placement == "STRICT_SPREAD" else sum(each)

    def _on(self, has: Mapping[str, float]) -> int:
        fits = (math.floor(has.get(key, 0.0) / much + 1e-9) for key, much in self.resources.items() if much > 0)
        return min(fits, default=self.ranks)

    def __str__(self) -> str:
        much = " and ".join(f"{value:g} {key}" for key, value in self.resources.items())
        return f"{self.ranks} ranks of {much}"


class Shortage:
    """Looks, as often as it is called, whether nodes that the ranks need are not there; busy ones are.

    Raises, after ``launcher.nodes_timeout`` seconds of it: StoppedError where the run has ``saved`` something new since
    this command began, for then another start elsewhere goes on from there; otherwise LostRanksError.
    """

    def __init__(
        self, need: Need, nodes: Nodes, settings: LauncherConfig, say: Callable[[str], None], saved: Callable[[], int]
    ) -> None:
        self._need, self._nodes, self._limit, self._say = need, nodes, settings.nodes_timeout, say
        self._saved, self._before = saved, saved()
        self._next, self._since = -math.inf, math.inf

    def look(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + min(_LOOK_SECONDS, self._limit / 4)
        try:
            room = self._need.room(self._nodes())
        except Exception:  # the head itself may be gone: Ray Train says so
            return
        if room >= self._need.ranks:
            if self._since < now:
                self._say(f"Ray: the cluster has room for {self._need} again")
            self._since = math.inf
            return
        if self._since > now:
            self._since = now
            self._say(f"Ray: {self._short(room)}; waiting {self._limit:g} s for nodes (launcher.nodes_timeout)")
        if now - self._since > self._limit:
            line = f"Ray: {self._short(room)}, for {self._limit:g} s (launcher.nodes_timeout)"
            if self._saved() > self._before:
                raise StoppedError(f"{line}; the run is saved, and the same command continues")
            raise LostRanksError(f"{line}; add nodes, or set launcher.ranks or what each rank reserves")

    def _short(self, room: int) -> str:
        how = f" ({self._need.placement})" if self._need.placement.startswith("STRICT") else ""
        return f"the nodes there are have room for {room} of {self._need}{how}"
