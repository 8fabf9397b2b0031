"""What starts, steps and saves of hundreds of ranks and hundreds of thousands of steps cost: calls, files and bytes."""

from __future__ import annotations

from typing import Any

import pytest
from paralm_data import TokenStore

from paralm.training import verification
from paralm.training.session import Session
from paralm.training.verification import first_on_node


@pytest.mark.parametrize("hosts", [["a"] * 8, ["a"] * 4 + ["b"] * 4, list("abababab"), list("abcdefgh")])
def test_the_data_is_read_whole_once_a_node(monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> None:
    """At every start, and every rank on its own, 256 ranks read 10 TB 256 times."""
    found = []
    for rank in range(8):
        monkeypatch.setattr(verification, "gather", lambda host: hosts)
        found.append(first_on_node(rank))
    assert [host for host, first in zip(hosts, found, strict=True) if first] == sorted(set(hosts))


@pytest.mark.parametrize(("verify", "first", "read"), [("full", True, 2), ("full", False, 0), ("size", True, 0)])
def test_a_rank_reads_each_store_whole_only_if_it_is_told_to(
    make: Any, monkeypatch: pytest.MonkeyPatch, verify: str, first: bool, read: int
) -> None:
    config = make(f"{verify}-{first}", data={"verify": verify})
    verified: list[str] = []
    monkeypatch.setattr(TokenStore, "verify", lambda store: verified.append(store.path.name))
    monkeypatch.setattr("paralm.training.session.first_on_node", lambda rank: first)
    said: list[str] = []
    Session.open(config, said.append).close()
    assert len(set(verified)) == len(verified) == read
    assert said == []
