"""The command line: what it prints, where, with which exit code; and what it must not import to do so."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paralm_launch import cli, pipeline
from paralm_launch.commands import config as config_commands

import paralm
from paralm import errors
from paralm.errors import CheckpointError, DivergedError, StoppedError
from tests.paralm.damaged_configs import DAMAGED, Damaged

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"paralm {paralm.__version__}\n", "")


COMMANDS = [
    ["run"],
    ["train"],
    ["eval"],
    ["generate"],
    ["compare"],
    ["monitor"],
    ["check"],
    ["dump-stacks"],
    ["data", "prepare"],
    ["data", "inspect"],
    ["data", "show"],
    ["config", "show"],
    ["config", "check"],
    ["config", "list"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_listed_and_explains_itself(command: list[str], run: Run) -> None:
    code, listed, _ = run(*command[:-1], "--help")
    assert code == 0
    assert f" {command[-1]} " in listed
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: paralm " + " ".join(command) in out
    described = [line for line in out.splitlines() if "<" in line and "--help" not in line]
    assert all(len(line.split(">", 1)[1].strip(" │")) > 5 for line in described), "an argument is not explained"


@pytest.mark.parametrize("group", [[], ["data"], ["config"]], ids=["paralm", "data", "config"])
def test_a_group_alone_prints_its_help(group: list[str], run: Run) -> None:
    code, out, err = run(*group)
    assert code == errors.EXIT_USER
    assert "Commands" in out
    assert err == ""


def test_help_versions_and_bad_configurations_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {d_modle: 3}\n")
    code = (
        "import sys\nfrom paralm_launch import cli\n"
        "codes = [cli.run(a) for a in (['--help'], ['--version'], ['run', '--help'], ['config', 'list'],"
        " ['run', 'bad.yaml'], ['config', 'check', 'no_such_file'])]\n"
        "assert codes == [0, 0, 0, 0, 2, 2], codes\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'datasets', 'matplotlib', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- what is wrong, in one line ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DAMAGED, ids=lambda d: d.name)
def test_a_damaged_configuration_ends_before_anything_begins(
    case: Damaged, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = case.text if isinstance(case.text, bytes) else case.text.encode()
    Path("run.yaml").write_bytes(content)
    code, out, err = run("run", "run.yaml", *case.overrides)
    assert code == errors.EXIT_USER
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for piece in case.names:
        assert piece in err
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
    assert Path("run.yaml").read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["rum"], ["No such command 'rum'", "'run'"]),
        (["run"], ["CONFIG", "paralm run --help"]),
        (["generate", "x", "--topk", "3"], ["--topk", "--top-k"]),
        (["generate", "x", "--top-k", "many"], ["--top-k", "integer"]),
        (["data", "show", "x"], ["--step"]),
        (["eval", "no_such_run"], ["no_such_run", "no such run folder"]),
        (["generate", "no_such_run"], ["no_such_run", "no such run folder"]),
        (["generate", "no_such_run", "--top-p", "0"], ["top_p"]),
        (["dump-stacks", "no_such_run"], ["no_such_run"]),
        (["monitor", "no_such_run"], ["no_such_run", "no such folder"]),
        (["data", "inspect", "no_such_run"], ["no_such_run"]),
        (["data", "show", "runs@x", "--step", "1"], ["runs@x", "step number"]),
        (["data", "show", "runs@²", "--step", "1"], ["runs@²", "step number"]),
        (["check", "no_such_file.py"], ["no_such_file.py", "no such file"]),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_a_wrong_command_line_is_answered_in_one_line(
    arguments: list[str], pieces: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (errors.EXIT_USER, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for piece in pieces:
        assert piece in err
    assert list(tmp_path.iterdir()) == []


def _data_error() -> Exception:
    from paralm_data import DataError

    return DataError("train/tokens.bin: cut short")


def _cell_error() -> Exception:
    from paralm_kernels import CellError

    return CellError("cell 'x': step\nmixes channels")


@pytest.mark.parametrize(
    ("make", "code", "line"),
    [
        (lambda: CheckpointError("a: b"), 2, "error: a: b"),
        (lambda: DivergedError("five bad steps"), 3, "error: five bad steps"),
        (lambda: StoppedError("stopped by SIGTERM"), 75, "error: stopped by SIGTERM"),
        (_data_error, 2, "error: train/tokens.bin: cut short"),
        (_cell_error, 2, "error: cell 'x': step mixes channels"),
        (lambda: PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (KeyboardInterrupt, 130, "interrupted"),
    ],
)
def test_errors_a_user_can_mend_are_one_line_with_their_exit_code(
    make: Callable[[], BaseException], code: int, line: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = make()
    monkeypatch.setattr("paralm.resources.presets", lambda: (_ for _ in ()).throw(error))
    assert run("config", "list") == (code, "", line + "\n")
    verbose = run("-v", "config", "list")
    assert verbose[0] == code
    assert verbose[2].endswith(line + "\n")


def test_a_bug_prints_its_traceback_and_asks_for_a_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(config_commands, "table", broken)
    code, _, err = run("config", "list")
    assert code == errors.EXIT_UNEXPECTED
    assert "Traceback" in err
    assert "KeyError: 'surprise'" in err
    assert err.splitlines()[-1].startswith("error: this is a bug in paralm")


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m paralm_launch config show quickstart | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "run:\n"
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_a_terminal_that_lacks_a_character_is_no_bug(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "paralm_launch", "config", "list"],
        capture_output=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"p ? tokens" in done.stdout


def test_the_commands_to_go_on_with_can_be_pasted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("check_start", "prepare_data", "train_run", "evaluate_run"):
        monkeypatch.setattr(pipeline, stage, lambda *arguments: None)
    code, out, _ = run("run", "quickstart", "run.root=my runs")
    assert code == 0
    assert "paralm generate 'my runs/quickstart' --prompt" in out
    assert "paralm monitor 'my runs/quickstart' " in out


# -- configurations ------------------------------------------------------------------------------------------


def test_show_prints_a_configuration_with_origins(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("config", "show", "quickstart", "run.seed=9")
    assert code == 0
    assert "quickstart.yaml:" in out
    Path("again.yaml").write_text(out)
    code, second, _ = run("config", "show", "again.yaml")
    assert code == 0

    def strip(text: str) -> list[str]:
        return [line.split("  #")[0].rstrip() for line in text.splitlines()]

    assert strip(second) == strip(out)


def test_show_prints_what_deepspeed_is_given(run: Run) -> None:
    code, out, _ = run("config", "show", "quickstart", "parallel.zero_stage=2", "launcher.ranks=4")
    assert "\n# adamw updates an operation at a time on this machine, in one kernel on a GPU: optimizer.fused\n" in out
    assert code == 0
    _, found, text = out.partition("# DeepSpeed's configuration on 4 ranks, generated from the above:\n")
    assert found
    generated = json.loads("\n".join(line.removeprefix("#") for line in text.splitlines()))
    assert generated["zero_optimization"]["stage"] == 2
    micro, steps = generated["train_micro_batch_size_per_gpu"], generated["gradient_accumulation_steps"]
    assert generated["train_batch_size"] == 4 * micro * steps


def test_check_says_ok_and_starts_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("config", "check", "quickstart", "run.name=x")
    assert (code, out, err) == (0, "ok: quickstart describes the run runs/x\n", "")
    assert list(tmp_path.iterdir()) == []


def test_list_names_every_preset(run: Run) -> None:
    from paralm import resources

    _, out, _ = run("config", "list")
    for name in resources.presets():
        assert name in out
