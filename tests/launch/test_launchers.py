"""Launchers are found by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from paralm_launch import launchers
from paralm_launch.launchers.exchange import Exchange

from paralm.config import Config
from paralm.errors import ConfigError, RunError
from paralm.training.rendezvous import LostRanksError


def test_local_is_there() -> None:
    assert "local" in launchers.launchers()
    assert launchers.launchers() == ["local", "mpi", "ray", "torchrun"]


def test_an_unknown_launcher_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^launcher.kind: unknown launcher 'locale'; nearest: local$"):
        launchers.get_launcher("locale")
    with pytest.raises(ConfigError, match="there is local, mpi, ray, torchrun"):
        launchers.get_launcher("zzz")


def test_a_launcher_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_LAUNCHERS", dict(launchers._LAUNCHERS))

    @launchers.register_launcher("mine")
    def mine(config: Any, on_progress: Any, say: Any) -> Any:
        return None

    assert launchers.get_launcher("mine") is mine
    with pytest.raises(ConfigError, match="'mine' is registered twice"):
        launchers.register_launcher("mine")(mine)


def test_what_a_full_disk_takes_of_the_progress_ends_nothing(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path)
    exchange.progress("say", "one")
    there, exchange._progress = exchange._progress, Path("/dev/full")
    exchange.progress("say", "lost")
    exchange._progress = there
    with there.open("a") as file:
        file.write('{"row": {"ste')  # what the disk took of a line
    exchange.progress("say", "joined to it")
    exchange.progress("say", "two")
    found, position = exchange.read_progress(0)
    assert [entry["say"] for entry in found] == ["one", "two"]
    assert position == there.stat().st_size


def test_nodes_that_do_not_meet_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first, or again: then another start goes on from the newest checkpoint. Each attempt has its own store."""
    from torch.distributed.elastic import rendezvous
    from torch.distributed.launcher import api

    def alone(agent: Any, program: str, arguments: list[str]) -> None:
        assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        raise rendezvous.RendezvousTimeoutError

    def left(agent: Any, program: str, arguments: list[str]) -> None:
        Exchange(Path(arguments[-1])).fail(2, "lost the other ranks: Connection reset by peer")
        raise rendezvous.RendezvousClosedError

    made = {"run": {"root": tmp_path}, "launcher": {"kind": "torchrun", "ranks": 4, "nodes": 2, "rendezvous": "n1:9"}}
    config = Config.model_validate(made)
    where = "2 nodes did not meet at n1:9: "
    monkeypatch.setattr(api, "launch_agent", alone)
    with pytest.raises(RunError, match=f"^{where}RendezvousTimeoutError; start the same command on each"):
        launchers.get_launcher("torchrun")(config, lambda row: None, lambda line: None)
    monkeypatch.setattr(api, "launch_agent", left)
    with pytest.raises(LostRanksError, match=f"^{where}RendezvousClosedError; .*the same command continues$"):
        launchers.get_launcher("torchrun")(config, lambda row: None, lambda line: None)
