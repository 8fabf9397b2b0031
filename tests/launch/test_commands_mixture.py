"""The commands on a run over a mixture: prepared, trained, measured, reported and shown, source by source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from paralm_launch import cli

from tests.conftest import settings, write_corpus
from tests.launch.test_commands import call


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps over two texts, whose weights are learned; a validation set beside them is the target."""
    folder = tmp_path_factory.mktemp("mixture")
    sources = {}
    for seed, name in enumerate(("first", "second", "wanted")):
        text = write_corpus(folder / name, documents=40, seed=seed)
        sources[name] = {"kind": "text", "paths": [str(text)]}
    wanted = sources.pop("wanted")
    config = settings(folder, None, folder / "runs", training={"max_steps": 8}, checkpoint={"every": 4, "keep_last": 1})
    config["data"] = {
        "mixture": {"sources": sources, "weights": "exp3", "target": "wanted", "every": 3, "rows": 2},
        "validation": {"wanted": wanted},
        "tokenizer": {"vocab_size": 320},
        "held_out_fraction": 0.2,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.run(["run", str(folder / "run.yaml")]) == 0
    return folder


def test_run_prepares_trains_and_reports_each_source(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = done / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows if row["kind"] == "validation"] == ["held_out", "first", "second", "wanted"]
    last = next(row for row in reversed(rows) if row["kind"] == "train")["mixture"]
    assert sum(source["tokens"] for source in last.values()) == 8 * 4 * 32
    report = (run / "report.md").read_text()
    assert f"first ({done / 'first'}); second ({done / 'second'}); weights: exp3 for wanted" in report
    for name in ("held_out", "first", "second", "wanted"):
        assert list((run / "eval").glob(f"perplexity{'' if name == 'held_out' else '_' + name}.json")), name
    code, out, _ = call(capsys, "run", done / "run.yaml")
    assert code == 0
    assert "data: already prepared" in out


def test_data_show_says_which_source_each_row_is_of(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = done / "runs" / "tiny"
    code, out, _ = call(capsys, "data", "show", run, "--step", 9)  # after the last checkpoint, in its round
    assert code == 0
    assert out.count(" of first: ") + out.count(" of second: ") == 4
    code, out, _ = call(capsys, "data", "show", run, "--step", 7)  # before it, in its round, of which none is there
    assert code == 0
    assert "step 7, rank 0 of 1: 4 rows" in out
    code, _, err = call(capsys, "data", "show", run, "--step", 5)  # its checkpoint is gone
    assert code == 2
    assert "step 5 drew follows from weights that were learned on the way" in err
    assert "tell those of steps 1 to 3" in err
    assert err.count("\n") == 1


def test_data_inspect_reads_every_store(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "data", "inspect", done / "runs" / "tiny", "--samples", 0)
    assert code == 0
    for part in ("held_out", "mixture/first/train", "mixture/second/held_out", "mixture/first/validation/wanted"):
        assert part in out


def test_eval_on_a_source(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = done / "runs" / "tiny"
    code, _, _ = call(capsys, "eval", "perplexity", run, "sets=[second]", "max_tokens=300")
    assert code == 0
    code, _, err = call(capsys, "eval", "perplexity", run, "sets=[train]")
    assert code != 0
    assert "no set 'train'" in err
    assert "there is held_out, first, second, wanted" in err
