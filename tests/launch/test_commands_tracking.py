"""The commands on runs of a synthetic task: one command from nothing to a report, and what has no text says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paralm_launch import cli

from paralm.models.mixers import Mamba2  # noqa: F401  (torch is imported once, before the first command)

TINY = ("training.max_steps=4", "training.validate_every=0", "training.validate_tokens=400", "model.d_model=16")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracking")
    assert cli.run(["run", "tracking/parity_paralstm", f"run.root={folder}", "run.name=a", *TINY]) == 0
    return folder


def test_one_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "a"
    found = json.loads((run / "eval" / "tracking.json").read_text())
    assert [s["size"] for s in found["sizes"]] == ["20", "40", "80", "120", "160", "320", "40-256", "640"]
    assert found["mixer"] == "paralstm"
    assert "eval/tracking_by_length.png" in (run / "report.md").read_text()
    code, out, err = call(capsys, "run", "tracking/parity_paralstm", f"run.root={root}", "run.name=a", *TINY)
    assert (code, err) == (0, "")
    assert "nothing to prepare" in out
    assert "already done, 4 steps" in out
    assert "0 pieces measured, 8 were there" in out
    assert "paralm generate" not in out


def test_eval_by_name_and_without(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "eval", "tracking", root / "a", "sizes=['12']", "samples=10")
    assert code == 0
    assert "accuracy/12" in out
    code, out, _ = call(capsys, "eval", root / "a", "sizes=['12']", "samples=10")
    assert code == 0
    assert "0 pieces measured, 1 were there" in out
    assert "report.md" in out
    code, _, err = call(capsys, "eval", root / "a", "eval.rows=3")
    assert code == 2
    assert err.count("\n") == 1
    assert "'tracking' has no such setting" in err


def test_a_step_is_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "data", "show", root / "a", "--step", 2)
    assert code == 0
    assert "32 examples of task 'parity'" in out
    assert "answers 1" in out
    assert "answers 0" in out
    part = call(capsys, "data", "show", root / "a", "--step", 2, "--rank", 1, "--world-size", 4)[1]
    assert "the run ends" not in out
    past = call(capsys, "data", "show", root / "a", "--step", 1000)[1]
    assert past.splitlines()[0].startswith("the run ends at step ")
    assert "(training.max_steps); no step 1,000 of it saw this:" in past
    assert "example 8:" in part
    assert part.split("──")[1] in out


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (("data", "inspect"), "which is not stored"),
        (("generate",), "which has token ids and no text"),
        (("eval", "perplexity"), "trained on task 'parity', which has token ids and no text"),
    ],
)
def test_what_needs_text_says_so(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], piece: str
) -> None:
    code, _, err = call(capsys, *arguments, root / "a")
    assert code == 2
    assert err.count("\n") == 1, err
    assert piece in err


def test_runs_side_by_side(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ("tracking/parity_mamba2", f"run.root={root}", "run.name=b", *TINY, "model.mixer.head_dim=8")
    assert call(capsys, "run", *other)[0] == 0
    call(capsys, "eval", "tracking", root / "a")
    code, out, err = call(capsys, "compare", root / "a", root / "b", "--out", root / "c.png")
    assert (code, err) == (0, "")
    assert "mamba2" in out
    assert "40-256" in out
    assert (root / "c.png").stat().st_size > 5000


def test_tasks_and_text_are_not_compared(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for runs in ((root / "a", tmp_path / "text"), (tmp_path / "text", root / "a")):
        code, out, err = call(capsys, "compare", *runs, "--out", tmp_path / "c.png")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "runs of tasks and of text cannot be compared" in err
    assert not (tmp_path / "c.png").exists()
