"""The README's files and commands are taken from it and run, on a tiny corpus."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from paralm_launch import cli

from tests.conftest import write_corpus

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FILES = {
    match.group(1): text
    for kind, text in BLOCKS
    if (match := re.match(r"# (\S+\.(?:py|yaml))\n", text)) and kind != "bash"
}
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    if line.split("#")[0].strip()
]
# What makes a command of the README cheap enough for a test.
TINY = [
    "model.d_model=32",
    "model.n_layers=1",
    "training.max_steps=2",
    "training.seq_len=32",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
    "training.validate_tokens=200",
    "data.tokenizer.vocab_size=400",
    "eval.max_tokens=200",
    "eval.rows=4",
    "eval.sample_tokens=4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: the files of the README, and some text."""
    path = tmp_path_factory.mktemp("readme")
    for name, text in FILES.items():
        (path / name).write_text(text, encoding="utf-8")
    write_corpus(path / "my_texts", documents=30)
    return path


def test_it_names_the_two_commands_and_every_folder() -> None:
    assert "make quickstart" in README
    assert "make test" in README
    for name in ("launch", "paralm", "kernels", "data_pipeline", "configs", "slurm", "tests", "benchmarks"):
        assert f"| `{name}/` |" in README
        assert (ROOT / name).is_dir()


def test_the_example_cell_is_short() -> None:
    assert len(FILES["my_cell.py"].splitlines()) <= 15


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_every_make_target_exists(command: list[str]) -> None:
    target = [word for word in command[1:] if "=" not in word]
    assert re.search(rf"^{target[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "paralm"], ids=" ".join)
def test_every_command_line_is_one_that_paralm_understands(command: list[str]) -> None:
    """Its names and options; nothing is run."""
    found = typer.main.get_command(cli.app)
    words = command[1:]
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    found.make_context(command[0], words)


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(".py")])
def test_every_python_file_runs(name: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, name], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_cell_obeys_the_laws_and_trains_on_text_of_ones_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of the sections on one's own text and cell, in order, with the run made small."""
    from paralm_kernels import cell

    monkeypatch.setattr(cell, "_registry", dict(cell._registry))
    monkeypatch.chdir(folder)
    own = [c for c in COMMANDS if c[0] == "paralm" and any(re.search("my_|mine|exported", word) for word in c)]
    assert [c[1] for c in own] == ["config", "config", "run", "data", "check", "run", "run", "export", "generate"]
    for command in own:
        small = TINY if command[1] == "run" else []
        code = cli.run(command[1:] + small)
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), command
        assert out
    assert (folder / "runs" / "mine" / "report.md").is_file()
    assert (folder / "runs" / "minimal" / "report.md").is_file()


def test_the_error_it_shows_is_the_error_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    shown = re.search(r"`(my_run\.yaml:[^`]*)`", README)
    assert shown is not None
    Path("my_run.yaml").write_text(FILES["my_run.yaml"].replace("  name: mine", "  nmae: mine"))
    try:
        assert cli.run(["config", "check", "my_run.yaml"]) == 2
    finally:
        Path("my_run.yaml").write_text(FILES["my_run.yaml"])
    assert capsys.readouterr().err == f"error: {shown.group(1)}\n"
