"""Training with the time of sequences on several ranks: the losses of one rank, on any grid, moved between grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paralm.config import Config
from paralm.config_files import load_config
from paralm.errors import ConfigError
from paralm.models import build_model
from paralm.training.grid import Grid, check_grid, check_ranks

from .test_training_ranks import SAME, losses, run_ranks
from .test_training_ranks import Grid as Runs

MIXED: dict[str, Any] = {
    "mixers": [
        {"name": "mamba2", "head_dim": 16, "d_state": 8, "chunk_size": 8},
        {"name": "mlstm", "n_heads": 2, "chunk_size": 8},
        {"name": "slstm", "n_heads": 4},
        {"name": "titans_mag", "n_heads": 2, "chunk_size": 4, "memory_expand": 2, "window": 6},
    ],
    "n_layers": 4,
}

JOINED: dict[str, Any] = {
    "mixers": [
        {"name": "paragru"},
        {"name": "window_attention", "n_heads": 2, "window": 6},
        {"name": "window_attention", "n_heads": 2, "window": 20},  # looks back further than a part is long
    ],
    "n_layers": 3,
}
"""Mixers that join the parts themselves: they admit ZeRO-3 and activation checkpointing."""


def config(runs: Runs, name: str, time: int, stage: int, mixed: bool = False, **training: Any) -> dict[str, Any]:
    made = runs.config(name, stage, seq_len=30, **training)  # 30 steps over 4 ranks: parts of 7 and 8
    made["parallel"]["time"] = time
    made["model"] = {"d_model": 32, **(MIXED if mixed else JOINED)}
    result: dict[str, Any] = made
    return result


@pytest.mark.slow
def test_losses_do_not_depend_on_the_grid(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    """A model whose mixers join the parts and one of four kinds: 1 rank, 2 and 4 time shards, 2 × 2; ZeRO 1 to 3; and a
    run that begins on 2 × 2 ranks, goes on with 2 time shards and ends on one rank."""
    runs = Runs(corpus, prepared, tmp_path)

    def both(name: str, time: int, stage: int, **training: Any) -> list[dict[str, Any]]:
        joined = config(runs, f"joined_{name}", time, stage, **training)
        return [joined, config(runs, f"mixed_{name}", time, min(stage, 2), mixed=True, **training)]

    moved = both("moved", 2, 1, stop_after_seconds=1e-9)
    run_ranks(4, [*both("2x2", 2, 2), *both("1x4", 4, 1), *moved], tmp_path)
    moved = both("moved", 2, 1, stop_after_seconds=1e-9)
    checkpointed = config(runs, "joined_checkpointed", 2, 1, activation_checkpointing=True)
    run_ranks(2, [*both("1x2", 2, 3), *moved, checkpointed], tmp_path)
    run_ranks(1, [*both("one", 1, 1), *both("moved", 1, 1)], tmp_path)
    for kind in ("joined", "mixed"):
        reference = losses(tmp_path / f"{kind}_one")
        assert len(reference) == 5
        for name in ("2x2", "1x4", "1x2", "moved"):
            assert losses(tmp_path / f"{kind}_{name}") == pytest.approx(reference, rel=SAME), (kind, name)
    assert losses(tmp_path / "joined_checkpointed") == pytest.approx(losses(tmp_path / "joined_one"), rel=SAME)


def test_where_a_rank_stands() -> None:
    grids = [Grid(rank, 6, time=3) for rank in range(6)]
    assert [(grid.data_rank, grid.time_rank, grid.data_size) for grid in grids] == [
        (0, 0, 2), (0, 1, 2), (0, 2, 2), (1, 0, 2), (1, 1, 2), (1, 2, 2)
    ]  # fmt: skip
    parts = [grid.steps(32) for grid in grids[:3]]
    assert [(part.start, part.stop) for part in parts] == [(0, 10), (10, 21), (21, 32)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"mixer": {"name": "attention"}}}, "layer 0, Attention: its state grows with the sequence"),
        ({"model": {"mixer": {"name": "lstm"}}, "parallel": {"zero_stage": 3}}, "LSTM: its ranks take turns .* ZeRO-3"),
        ({"model": {"mixer": {"name": "gru"}}, "training": {"activation_checkpointing": True}}, "GRU: its ranks take"),
        ({"training": {"seq_len": 8}, "parallel": {"time": 4}}, "as short as 2 steps, .* looks back 3; use at most 2"),
        (
            {"training": {"carry_state": True}, "data": {"order": "lanes"}},
            r"training\.carry_state: a state from another",
        ),
        ({"training": {"initial_state": "passed"}}, r"training\.initial_state: a state from another step"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_work(changes: dict[str, Any], message: str) -> None:
    sections: dict[str, Any] = {
        "run": {"name": "x"},
        "data": {"source": {"kind": "text", "paths": ["x"]}},
        "model": {"d_model": 32, "mixer": {"name": "paragru"}},
        "training": {"seq_len": 64},
        "parallel": {"time": 2},
    }
    for name, values in changes.items():
        sections[name] = {**sections[name], **values}
    made = Config.model_validate(sections)
    model = build_model(made.model, 320, seed=0, device="meta")
    with pytest.raises(ConfigError, match=message) as refused:
        check_grid(made, model)
    assert "\n" not in str(refused.value)


def test_ranks_that_do_not_fit_are_refused_with_what_would(tmp_path: Path) -> None:
    made = Config.model_validate(
        {"run": {"name": "x"}, "data": {"source": {"kind": "text", "paths": ["x"]}}, "parallel": {"time": 3}}
    )
    with pytest.raises(ConfigError, match=r"3 time shards do not divide 4 ranks; use one of: 1, 2, 4"):
        check_ranks(made, 4)
    lines = ["run: {name: x}", "data: {source: {kind: text, paths: [x]}}", "model: {mixer: {name: attention}}"]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, "parallel: {time: 2}"]))
    with pytest.raises(ConfigError, match=r"parallel\.time: layer 0"):
        load_config(tmp_path / "a.yaml")
