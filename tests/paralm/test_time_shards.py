"""Time on several ranks equals one rank: outputs, the final state and every gradient, for every mixer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paralm_kernels.time_shards import HIDDEN

from paralm.errors import ConfigError
from paralm.models.mixers.base import shard_time
from paralm.registry import MIXERS

from .test_mixers import mixer

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL: dict[str, dict[str, Any]] = {
    "mamba2": {"n_groups": 2, "head_dim": 8, "d_state": 4, "chunk_size": 4},
    "mlstm": {"n_heads": 2, "chunk_size": 4, "input_gate_bias": 0.0},
    "window_attention": {"window": 5, "n_heads": 2, "n_persistent": 2},
    "titans_memory": {"chunk_size": 4, "n_heads": 2, "memory_expand": 2},
    "titans_mag": {"chunk_size": 4, "n_heads": 2, "memory_expand": 2, "window": 5, "n_persistent": 2},
    "titans_mal": {"chunk_size": 4, "memory_expand": 2, "window": 5, "n_persistent": 0},
    "titans_mac": {"chunk_size": 4, "n_heads": 2, "memory_expand": 2, "n_persistent": 2},
}
BOUNDED = [name for name in MIXERS.names() if MIXERS.get(name).value.bounded_state]


def cases() -> list[dict[str, Any]]:
    """Every mixer of bounded state, whose first case has neither a state nor resets, and whose second has all."""
    found = []
    for name in BOUNDED:
        keys = SMALL.get(name, {})
        found.append({"name": name, "keys": keys, "time": 24, "uneven": False, "resets": "none", "state": False})
        found.append({"name": name, "keys": keys, "time": 26, "uneven": True, "resets": "at cuts", "state": True})
    found.append({"name": "paragru", "keys": {"gate_spread": -6.0}, "time": 24} | {"uneven": True, "resets": "none"})
    found[-1]["state"] = True
    found += [{**found[1], "keys": {"method": "newton"}, "name": name} for name in ("paragru", "paralstm")]
    for name in BOUNDED:
        keys = SMALL.get(name, {})
        found.append({**found[1], "name": name, "keys": keys, "dtype": "float32"})
        found += [{**found[i], "name": name, "keys": keys, "frozen": True} for i in (0, 1)]
        reach = {"d_conv": 2} if "d_conv" in MIXERS.get(name).config.model_fields else {}
        found.append({**found[0], "name": name, "keys": {**keys, **reach}, "time": "one step a rank"})
        found.append({**found[1], "name": name, "keys": keys, "rows": 1})
    for name in ("paragru", "paralstm", "fastslow"):  # parts so long that their ends are guessed first
        for keys in ({}, {"gate_spread": -6.0}):
            found.append({**found[1], "name": name, "keys": keys, "time": 1800, "rows": 3, "uneven": False})
    one_group = {**SMALL["mamba2"], "n_groups": 1}
    found.append({**found[1], "name": "mamba2", "keys": one_group, "rows": 1})
    for time in (24, 96):
        found += [{**found[0], "name": name, "keys": SMALL.get(name, {}), "time": time} for name in BOUNDED]
    return found


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases over so many ranks, one process each."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "cases.json").write_text(json.dumps(cases()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    paths = [str(folder / name) for name in ("rendezvous", "cases.json", "result.json")]
    command = [sys.executable, "-m", "tests.paralm.time_shards_worker"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(request.param), *paths],
            env=environment, cwd=ROOT, stderr=(folder / f"{rank}.err").open("w"),
        )
        for rank in range(request.param)
    ]  # fmt: skip
    try:
        codes = [rank.wait(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    texts = [(folder / f"{rank}.err").read_text()[-3000:] for rank in range(request.param)]
    assert codes == [0] * request.param, "\n".join(texts)
    return {"rows": json.loads((folder / "result.json").read_text()), "size": request.param}


def test_parts_are_the_whole(results: dict[str, Any]) -> None:
    """Unequal parts, resets on a cut and beside it, a given state, cells that remember."""
    for case, row in zip(cases(), results["rows"], strict=True):
        for what, deviation in row["deviations"].items():
            # of a sum whose terms cancel, float32 keeps less than 1e-5 on one rank too
            bound = 1e-5 + 4 * row["rounding"][what] if case.get("dtype") == "float32" else 1e-9
            assert deviation <= bound, (case, what, deviation, row["rounding"][what])


def test_what_is_sent_does_not_grow_with_the_sequence(results: dict[str, Any]) -> None:
    rows = [row["bytes"] for row in results["rows"]]
    short, long = rows[-2 * len(BOUNDED) : -len(BOUNDED)], rows[-len(BOUNDED) :]
    for name, a, b in zip(BOUNDED, short, long, strict=True):
        # a cell may need a round more or less: four messages of a state, an entry and a product
        assert a > 0
        assert b <= 1.5 * a + 64, name


def test_what_was_sent_is_not_kept(results: dict[str, Any]) -> None:
    """However many forwards were made."""
    for name, row in zip(BOUNDED, results["rows"][-len(BOUNDED) :], strict=True):
        for kept in row["under way"]:
            assert kept[1] == kept[2], name


def test_messages_travel_while_something_is_computed(results: dict[str, Any]) -> None:
    """On every rank between two others: something is computed from the beginning of each until it is taken. Of a cell's
    solve one other round is waited for, and one message backward."""
    seen: dict[str, list[bool]] = {kind: [] for kind in HIDDEN if not kind.startswith("window")}
    for case, row in zip(cases(), results["rows"], strict=True):
        for events in row["events"][1:-1]:
            begun: dict[str, list[int]] = {}
            for index, event in enumerate(events):
                what, _, kind = event.partition(" ")
                if what == "begun":
                    begun.setdefault(kind, []).append(index)
                elif what == "taken" and kind in seen and (kind != "guess" or case["time"] == 1800):
                    seen[kind].append("computed" in events[begun[kind].pop(0) : index])
    if results["size"] > 2:
        assert all(seen.values())
        assert {kind: sum(found) for kind, found in seen.items()} == {kind: len(found) for kind, found in seen.items()}


def test_a_window_s_keys_are_sent_before_the_others_are_turned(results: dict[str, Any]) -> None:
    """By ranks whose parts are as long as what the window looks back; others must wait for the rank before."""
    for case, row in zip(cases(), results["rows"], strict=True):
        if case["name"] != "window_attention":
            continue
        for events in row["events"]:
            handed, took = events.index("hand_on"), events.index("take_over")
            if case["time"] == "one step a rank":
                assert took < handed
            elif not case["uneven"]:
                assert "computed" in events[handed:took]


def test_a_state_that_grows_cannot_be_handed_on() -> None:
    with pytest.raises(ConfigError, match="state grows with the sequence"):
        shard_time(mixer("attention"), object())  # type: ignore[arg-type]


def test_the_outermost_mixers_are_told() -> None:
    model = torch.nn.Sequential(mixer("paragru"), torch.nn.Sequential(mixer("titans_mag", n_heads=2)))
    shard_time(model, "ranks")  # type: ignore[arg-type]
    told = [type(module).__name__ for module in model.modules() if getattr(module, "time_shards", None) == "ranks"]
    assert len(told) == 2
