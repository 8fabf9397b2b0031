"""Launchers are found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from paralm_launch import launchers
from paralm_launch.launchers.exchange import Exchange

from paralm.errors import ConfigError


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
