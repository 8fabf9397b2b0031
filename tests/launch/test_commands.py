"""The commands on a real, tiny run: each does its work once, and says what it did."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from paralm_launch import cli

from tests.conftest import settings, write_corpus

STEPS = 4


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a configuration, and the run that `paralm run` makes of them."""
    folder = tmp_path_factory.mktemp("commands")
    corpus = write_corpus(folder / "text", documents=60)
    config = settings(corpus, None, folder / "runs", training={"max_steps": STEPS})
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.run(["run", str(folder / "run.yaml")]) == 0
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def test_run_makes_a_whole_run_and_says_where_to_look(done: Path) -> None:
    run = done / "runs" / "tiny"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report.md", "eval", "data/train", "tensorboard"):
        assert (run / name).exists(), name
    assert (run / "checkpoints" / f"step_{STEPS:08d}").is_dir()


def test_run_again_does_nothing_twice(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = done / "runs" / "tiny"
    before = {k: v for k, v in contents(run).items() if "report" not in k and not k.endswith(".png")}
    code, out, err = call(capsys, "run", done / "run.yaml")
    assert (code, err) == (0, "")
    after = contents(run)
    assert {k: after[k] for k in before} == before
    assert set(after) - set(before) == {k for k in after if "report" in k or k.endswith(".png")}
    for line in ("data: already prepared", f"training: already done, {STEPS} steps", "already done", "look next at"):
        assert line in out
    assert f"paralm generate {run}" in out


def test_a_frozen_key_is_refused_with_both_values_before_anything_is_touched(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(done)
    code, out, err = call(capsys, "run", done / "run.yaml", "optimizer.lr=0.5")
    assert (code, out) == (2, "")
    assert err.startswith("error: optimizer.lr: ")
    assert "0.003" in err
    assert "0.5" in err
    assert contents(done) == before


@pytest.mark.parametrize("command", ["run", "train"])
def test_an_unknown_launcher_is_refused_before_anything_is_made(
    command: str, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, command, done / "run.yaml", "run.name=other", "launcher.kind=locl")
    assert code == 2
    assert "nearest: local" in err
    assert not (done / "runs" / "other").exists()


@pytest.mark.parametrize("key", ["init_from", "fork_from"])
def test_a_missing_run_to_start_from_is_refused_before_anything_is_made(
    key: str, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "run", done / "run.yaml", "run.name=other", f"training.{key}=no_such_run@3")
    assert (code, out) == (2, "")
    assert "no_such_run: no such run folder" in err
    assert not (done / "runs" / "other").exists()


def test_train_without_data_says_what_to_do(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "train", done / "run.yaml", "run.name=no_data")
    assert code == 2
    assert "paralm data prepare" in err
    assert err.count("\n") == 1
    assert not (done / "runs" / "no_data").exists()


def test_run_is_for_one_process(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(capsys, "run", done / "run.yaml", "run.name=ranks")
    assert code == 2
    assert "paralm train" in err
    assert not (done / "runs" / "ranks").exists()


# -- data ----------------------------------------------------------------------------------------------------


def test_data_show_prints_the_text_of_a_step(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank by rank the same text as the whole batch, and the loader's own tokens."""
    from paralm_data import Loader, Tokenizer, TokenStore

    run = done / "runs" / "tiny"
    _, whole, _ = call(capsys, "data", "show", run, "--step", 2)
    parts = [call(capsys, "data", "show", run, "--step", 2, "--rank", r, "--world-size", 2)[1] for r in range(2)]

    def rows(text: str) -> str:
        return text.split("\n", 1)[1]

    assert rows(whole) == rows(parts[0]) + rows(parts[1])
    assert whole.startswith("step 2, rank 0 of 1: 4 rows")
    config = yaml.safe_load((run / "config.yaml").read_text())
    store = TokenStore.open(run / "data" / "train", verify="size")
    seed = config["run"]["seed"]
    batch = Loader(store, config["training"]["seq_len"], config["training"]["global_batch_size"], seed).batch(1)
    tokenizer = Tokenizer.load(run / "data" / "tokenizer.model")
    for tokens, reset in zip(batch.tokens, batch.reset):
        first = [0, *reset.nonzero().flatten().tolist(), len(tokens)]
        assert tokenizer.decode(tokens[first[-2] :].tolist()) in whole


def test_data_inspect_finds_the_stores_of_a_run(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = done / "runs" / "tiny"
    code, out, _ = call(capsys, "data", "inspect", run, "--samples", 1)
    assert code == 0
    assert str(run / "data" / "train") in out
    assert str(run / "data" / "held_out") in out
    assert "── document" in out
    assert call(capsys, "data", "inspect", run / "data" / "train", "--samples", 0, "--full")[0] == 0


def test_a_damaged_store_is_refused_with_its_file(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done / "runs" / "tiny" / "data", tmp_path / "data")
    tokens = tmp_path / "data" / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    code, _, err = call(capsys, "data", "inspect", tmp_path / "data")
    assert code == 2
    assert "tokens.bin" in err
    assert err.count("\n") == 1


# -- results -------------------------------------------------------------------------------------------------


def test_generate_repeats_itself_and_begins_with_the_prompt(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", done / "runs" / "tiny", "--prompt", "the river", "--max-tokens", 12, "--seed", 3]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert out.startswith("the river")
    assert out.endswith("\n")
    assert call(capsys, *arguments)[1] == out
    assert call(capsys, *arguments[:-1], 4)[1] != out
    assert call(capsys, *arguments[:5], 0)[1] == "the river\n"


def test_eval_measures_what_it_is_told_to(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(done / "runs" / "tiny", run)
    code, out, err = call(capsys, "eval", run, "eval.max_tokens=100", "eval.prompts=[a]")
    assert (code, err) == (0, "")
    assert "bits per byte" in out
    assert "gzip -9" in out
    assert "already done" not in out
    assert "already done" in call(capsys, "eval", run, "eval.max_tokens=100", "eval.prompts=[a]")[1]
    assert "already done" not in call(capsys, "eval", run, "eval.max_tokens=100", "eval.prompts=[a]", "--again")[1]
    code, _, err = call(capsys, "eval", run, "model.d_model=64")
    assert code == 2
    assert "only eval.*" in err


def test_compare_overlays_runs(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(done / "runs" / "tiny", other)
    figure = tmp_path / "both.png"
    code, out, _ = call(capsys, "compare", done / "runs" / "tiny", other, "--out", figure)
    assert code == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "other" in out
    assert call(capsys, "compare", other)[0] == 2


# -- live ----------------------------------------------------------------------------------------------------


@pytest.fixture
def background() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(background: list[subprocess.Popen[str]], *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "paralm_launch", *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    background.append(process)
    return process


def test_monitor_serves_this_machine_only(done: Path, background: list[subprocess.Popen[str]]) -> None:
    process = start(background, "monitor", done / "runs")
    assert process.stdout is not None
    url = process.stdout.readline().split()[0]
    assert url.startswith("http://127.0.0.1:")
    runs: list[str] = []
    deadline = time.monotonic() + 60
    while not runs and time.monotonic() < deadline:  # TensorBoard answers before it has read them
        with urllib.request.urlopen(f"{url}data/runs", timeout=60) as response:
            runs = json.load(response)
        time.sleep(0.1)
    assert any("tiny" in name for name in runs)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_monitor_needs_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "monitor", tmp_path)
    assert code == 2
    assert "no metrics" in err


def test_stacks_of_a_live_run_and_a_clean_leave(
    done: Path, background: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = done / "runs" / "live"
    data = done / "runs" / "tiny" / "data"
    changes = ["run.name=live", f"data.dir={data}", "training.max_steps=100000", "checkpoint.every=100000"]
    process = start(background, "train", done / "run.yaml", *changes)
    while not list((run / "ranks").glob("rank_*.json")) and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    code, out, err = call(capsys, "dump-stacks", run, "--wait", 60)
    assert (code, err) == (0, "")
    stacks = run / "stacks" / "rank_00000.txt"
    assert out == f"rank 0: {stacks}\n"
    assert "loop.py" in stacks.read_text()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert error.count("\n") == 1
    assert "SIGTERM" in error
    assert call(capsys, "dump-stacks", run)[0] == 2, "nothing of it runs any more"


# -- the laws ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten with it."""
    from paralm_kernels import cell

    from paralm.registry import MIXERS, mixers

    mixers()  # loads paralm's own
    monkeypatch.setattr(cell, "_registry", dict(cell._registry))
    monkeypatch.setattr(MIXERS, "_own", dict(MIXERS._own))


CELL = """
import torch
import paralm_kernels


@paralm_kernels.register
class Checked(paralm_kernels.Cell):
    name, state, inputs, params = "NAME", ("h",), ("x",), ("a",)

    def step(self, state, inputs, params):
        return (torch.tanh(params[0] * state[0] + inputs[0]),)
"""


@pytest.mark.usefixtures("own_cells")
def test_check_holds_the_laws_against_a_cell_and_its_mixer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cell.py").write_text(CELL.replace("NAME", "checked_good"))
    code, out, _ = call(capsys, "check", tmp_path / "cell.py")
    assert code == 0
    assert "cell checked_good" in out
    assert "mixer checked_good" in out
    assert "BROKEN" not in out


@pytest.mark.usefixtures("own_cells")
def test_check_names_the_broken_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A box that true states leave, so that clamping to it would change the solution."""
    box = "\n    def box(self, state):\n        return (0.01,)\n"
    (tmp_path / "cell.py").write_text(CELL.replace("NAME", "checked_bad").replace("class Checked", "class Bad") + box)
    code, out, err = call(capsys, "check", tmp_path / "cell.py")
    assert code == 2
    assert any("box" in line and "BROKEN" in line for line in out.splitlines())
    assert "laws are broken" in err


MIXER = """
from paralm.models.mixers.base import Mixer
from paralm.registry import EntryConfig, register_mixer


class Keys(EntryConfig):
    pass


@register_mixer("checked_unmade", Keys)
class Unmade(Mixer):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.width = context.width
"""


@pytest.mark.usefixtures("own_cells")
def test_check_says_once_what_breaks_every_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mixer.py").write_text(MIXER)
    code, out, err = call(capsys, "check", tmp_path / "mixer.py")
    assert code == 2
    (line,) = (line for line in out.splitlines() if "BROKEN" in line)
    assert line.startswith("mixer checked_unmade  all 8  BROKEN")
    assert "no attribute 'width'" in line
    assert "8 of 8 laws are broken" in err


def test_check_needs_something_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    code, _, err = call(capsys, "check", tmp_path / "empty.py")
    assert code == 2
    assert "registers no cell and no mixer" in err
