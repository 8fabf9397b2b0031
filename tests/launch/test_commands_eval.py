"""``paralm eval NAME TARGET`` on a real, tiny run: by name, in parts side by side, and beside a run that trains on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from paralm_launch import cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paralm.config import Config
from paralm.errors import StoppedError
from paralm.evaluation import follow as following
from paralm.evaluation.cells import load_steps
from paralm.evaluation.perplexity import PerplexityResult
from paralm.evaluation.result import read_json
from paralm.evaluation.suite import get_evaluation
from paralm.training import checkpoint as ckpt
from tests.conftest import settings

PERPLEXITY = ("max_tokens=6000", "rows=3", "chunk=40", "parts=3")


@pytest.fixture(scope="module")
def trained(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    from paralm.training.loop import train

    folder = tmp_path_factory.mktemp("eval")
    made = settings(corpus, prepared, folder, training={"max_steps": 6}, checkpoint={"every": 2, "keep_last": 3})
    train(Config.model_validate(made))
    return folder / "tiny"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def perplexity(run: Path) -> PerplexityResult:
    found = read_json(PerplexityResult, run / "eval" / "perplexity.json")
    assert found is not None
    return found


def test_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "eval", "perplexity", run, *PERPLEXITY)
    assert (code, err) == (0, "")
    assert "step 6, 3 pieces measured" in out
    assert "perplexity/bits_per_byte" in out
    whole = perplexity(run)
    assert whole.step == 6
    assert 600 < whole.tokens <= 6000
    assert "## perplexity" in (run / "eval" / "report.md").read_text()
    assert "0 pieces measured, 3 were there" in call(capsys, "eval", "perplexity", run, *PERPLEXITY)[1]
    code, out, _ = call(capsys, "eval", "perplexity", f"{run}@2", *PERPLEXITY)
    assert "3 pieces measured on something else" in out
    assert perplexity(run).step == 2
    assert list(load_steps(run, "perplexity")) == [2, 6]
    report = (run / "eval" / "report.md").read_text()
    assert "### Over training" in report


def test_the_cells_add_up_to_the_whole_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from paralm_data import TokenStore

    from paralm.evaluation.perplexity import perplexity as at_once
    from paralm.training.load import load_model

    assert call(capsys, "eval", "perplexity", run, *PERPLEXITY)[0] == 0
    loaded = load_model(run)
    store = TokenStore.open(loaded.data_dir / "held_out")
    whole = at_once(loaded.model, store, loaded.tokenizer, 6000, train_seq_len=32)
    cells = perplexity(run)
    assert cells.documents.index == whole.documents.index
    assert (cells.tokens, cells.n_bytes, cells.words) == (whole.tokens, whole.n_bytes, whole.words)
    assert cells.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)
    assert cells.bits_per_byte_interval == pytest.approx(whole.bits_per_byte_interval, rel=1e-5)
    for mine, other in zip(cells.by_position, whole.by_position, strict=True):
        assert (mine.first, mine.tokens) == (other.first, other.tokens)
        assert mine.nats_per_token == pytest.approx(other.nats_per_token, rel=1e-6)
        assert mine.interval == pytest.approx(other.interval, rel=1e-4)


def test_two_processes_side_by_side_are_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As torchrun starts them: each takes its rank's share, and whoever is last combines."""
    shutil.copytree(run, tmp_path / "one")
    assert call(capsys, "eval", "perplexity", tmp_path / "one", *PERPLEXITY)[0] == 0
    command = [sys.executable, "-m", "paralm_launch", "eval", "perplexity", str(run), *PERPLEXITY, "--part", "rank"]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    for name in ("perplexity.json", "perplexity_by_position.png"):
        assert (run / "eval" / name).read_bytes() == (tmp_path / "one" / "eval" / name).read_bytes()
    assert len(list((run / "eval" / "perplexity.cells").glob("held_out-*.json"))) == 3


def test_a_checkpoint_of_any_world_size(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 6 written once more in three files, cut inside parameters as ZeRO cuts them: other files, same numbers."""
    assert call(capsys, "eval", "perplexity", run, *PERPLEXITY)[0] == 0
    one = perplexity(run)
    folder = run / "checkpoints"
    source = ckpt.Checkpoint(folder / "step_00000006")
    total = sum(torch.Size(shape).numel() for shape in source.shapes.values())
    bounds, files = [total * rank // 3 for rank in range(4)], []
    for rank in range(3):
        fragments, begin = [], 0
        for name, shape in source.shapes.items():
            count = torch.Size(shape).numel()
            low, high = max(begin, bounds[rank]) - begin, min(begin + count, bounds[rank + 1]) - begin
            if low < high:
                fragments.append(("master", name, low, source.read("master", name, low, high - low)))
            begin += count
        files.append(ckpt.write_rank_file(folder / "three", rank, fragments, {}))
    own = ("format", "sha256", "files", "fragments")
    meta = {key: value for key, value in source.manifest.items() if key not in own}
    ckpt.write_manifest(folder / "three", files, meta)
    shutil.rmtree(folder / "step_00000006")
    (folder / "three").rename(folder / "step_00000006")
    assert ckpt.Checkpoint(folder / "step_00000006").world_size == 3
    out = call(capsys, "eval", "perplexity", run, *PERPLEXITY)[1]
    assert "3 pieces measured on something else" in out  # by the checkpoint's digest
    assert perplexity(run) == one


@pytest.mark.slow
def test_tasks_of_ray_are_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cluster of this machine for the time being, on the loopback."""
    shutil.copytree(run, tmp_path / "one")
    assert call(capsys, "eval", "perplexity", tmp_path / "one", *PERPLEXITY)[0] == 0
    code, out, err = call(capsys, "eval", "perplexity", run, *PERPLEXITY, "--ray", "2")
    assert code == 0, err
    assert "0 pieces measured, 3 were there" in out
    assert (run / "eval" / "perplexity.json").read_bytes() == (
        tmp_path / "one" / "eval" / "perplexity.json"
    ).read_bytes()
    code, _, err = call(capsys, "eval", "perplexity", run, "sets=[nowhere]", "--ray", "1")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no set 'nowhere'" in err


def test_the_standard_evaluation_and_the_suite_do_not_pass_for_each_other(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "eval", run)[0] == 0
    assert "already done" in call(capsys, "eval", run)[1]
    standard = perplexity(run)
    assert "(eval/report.md)" in (run / "report.md").read_text()
    assert call(capsys, "eval", "perplexity", run, "max_tokens=200", "reset_every=8")[0] == 0
    assert perplexity(run).reset_every == 8
    out = call(capsys, "eval", run)[1]
    assert "already done" not in out
    assert perplexity(run) == standard
    assert "0 pieces measured" in call(capsys, "eval", "perplexity", run, "max_tokens=200", "reset_every=8")[1]
    assert perplexity(run).reset_every == 8


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["perplexty", "RUN"], ["no evaluation 'perplexty'", "did you mean 'perplexity'"]),
        (["perplexity"], ["evaluation 'perplexity' of what"]),
        (["perplexity", "RUN", "chunks=3"], ["chunks", "did you mean 'chunk'"]),
        (["perplexity", "RUN", "sets=[nowhere]"], ["no set 'nowhere'", "held_out"]),
        (["perplexity", "RUN@3"], ["no checkpoint of step 3"]),
        (["perplexity", "nowhere"], ["nowhere: no such run folder"]),
        (["perplexity", "RUN", "--part", "3/2"], ["part 3/2"]),
        (["RUN", "perplexity"], ["override 'perplexity'", "only eval.*"]),
        (["RUN", "--part", "1/2"], ["--part goes with an evaluation by name"]),
        (["perplexity", "RUN@2", "--follow"], ["only a run can be followed"]),
        (["perplexity", "RUN", "--follow", "--part", "1/2"], ["one at a time"]),
        (["perplexity", "RUN", "--follow", "--again"], ["--again does not go with --follow"]),
        (["perplexity", "RUN", "--every", "2"], ["--every 2 goes with --follow"]),
        (["RUN", "--every", "2"], ["--every 2 goes with --follow"]),
        ([], ["nothing to evaluate"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_change_nothing(
    run: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "eval", *[a.replace("RUN", str(run)) for a in arguments])
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert all(part in err for part in parts), err
    assert not (run / "eval").exists()


def test_an_export_is_measured_on_the_text_of_its_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the numbers are the run's."""
    assert call(capsys, "eval", "perplexity", run, *PERPLEXITY)[0] == 0
    assert call(capsys, "export", run, "--to", tmp_path / "export")[0] == 0
    code, _, err = call(capsys, "eval", "perplexity", tmp_path / "export", *PERPLEXITY)
    assert code == 2
    assert "data.dir=DIR" in err
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]["dir"]
    assert call(capsys, "eval", "perplexity", tmp_path / "export", *PERPLEXITY, f"data.dir={data}")[0] == 0
    assert perplexity(tmp_path / "export") == perplexity(run)


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "eval", "--list")
    assert code == 0
    assert "perplexity" in out
    code, out, _ = call(capsys, "eval", "perplexity", "--list")
    assert code == 0
    assert "reset_every" in out
    assert "start afresh" in out


def test_checkpoints_are_evaluated_as_they_appear(run: Path, tmp_path: Path) -> None:
    """The run's checkpoints are moved away and come back one by one; the second is gone before its turn."""
    away = tmp_path / "away"
    shutil.move(run / "checkpoints", away)
    (run / "checkpoints").mkdir()
    coming = iter(["step_00000002", "step_00000004", "step_00000006"])
    said: list[str] = []

    def train_on(_: float) -> None:
        name = next(coming)
        shutil.copytree(away / name, run / "checkpoints" / name)
        if name == "step_00000004":
            shard = next((run / "checkpoints" / name).glob("*.safetensors"))
            shard.write_bytes(shard.read_bytes()[:-8])

    evaluation = get_evaluation("perplexity")
    found = list(following.follow(evaluation, run, PERPLEXITY, sleep=train_on, warn=said.append))
    assert [outcome.step for outcome in found] == [2, 6]
    assert len(said) == 1
    assert said[0].startswith("step 4: ")
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    steps = [event.step for event in board.Scalars("eval/perplexity/bits_per_byte")]
    assert steps == [2, 6]
    assert list(load_steps(run, "perplexity")) == [2, 6]
    # Started again, what is measured is left out, and the run is over.
    assert list(following.follow(evaluation, run, PERPLEXITY, every=2, warn=said.append)) == []
    # With other settings all of it is measured anew, of multiples of 4 and the last.
    again = list(following.follow(evaluation, run, ["max_tokens=200"], every=4, warn=said.append))
    assert [outcome.step for outcome in again] == [6]


def test_following_a_dead_run_ends(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    follow = following.follow(get_evaluation("perplexity"), run, PERPLEXITY, every=5, patience=-1, sleep=lambda _: None)
    with pytest.raises(StoppedError, match="no new checkpoint"):
        list(follow)


def test_following_trains_the_same(run: Path) -> None:
    """Nothing of the run but eval/ and the scalars' folder changes."""
    before = {
        str(p.relative_to(run)): p.read_bytes()
        for p in run.rglob("*")
        if p.is_file() and p.relative_to(run).parts[0] not in ("eval",)
    }
    list(following.follow(get_evaluation("perplexity"), run, PERPLEXITY))
    after = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert {name: content for name, content in after.items() if name in before} == before
    new = {Path(name).parts[:2] for name in after.keys() - before.keys() if not name.startswith("eval/")}
    assert new == {("tensorboard", "eval")}
    assert json.loads((run / "eval" / "perplexity.json").read_text())["step"] == 6
