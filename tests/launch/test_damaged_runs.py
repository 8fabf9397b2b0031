"""Damaged runs and checkpoints, given to the commands: one line that names the culprit, and nothing overwritten.

Together with the damaged configurations (tests/paralm/damaged_configs.py), corpora and stores (tests/data), these are
the inputs that must never end in a traceback.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from paralm_launch import cli

from paralm.errors import EXIT_STOPPED, EXIT_USER
from tests.conftest import settings

Damage = Callable[[Path], None]
CASES: dict[str, tuple[Damage, str]] = {}


def case(names: str) -> Callable[[Damage], Damage]:
    """Registers a way to damage the run's only checkpoint (or its folder) and what the message must name."""

    def register(damage: Damage) -> Damage:
        CASES[damage.__name__.replace("_", " ")] = (damage, names)
        return damage

    return register


def checkpoint(run: Path) -> Path:
    (found,) = (run / "checkpoints").glob("step_*")
    return found


def edit_manifest(run: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    path = checkpoint(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True))


@case("rank_00000.safetensors")
def a_truncated_rank_file(run: Path) -> None:
    path = checkpoint(run) / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@case("rank_00000.safetensors")
def a_flipped_bit_in_a_rank_file(run: Path) -> None:
    path = checkpoint(run) / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@case("rank_00000.safetensors")
def a_missing_rank_file(run: Path) -> None:
    (checkpoint(run) / "rank_00000.safetensors").unlink()


@case("rank_00000.safetensors")
def an_empty_rank_file(run: Path) -> None:
    (checkpoint(run) / "rank_00000.safetensors").write_bytes(b"")


@case("manifest.json")
def a_truncated_manifest(run: Path) -> None:
    path = checkpoint(run) / "manifest.json"
    path.write_text(path.read_text()[:-50])


@case("manifest.json")
def a_manifest_that_is_no_json(run: Path) -> None:
    (checkpoint(run) / "manifest.json").write_bytes(b"\xff\xfe\x00")


@case("manifest.json")
def a_manifest_that_is_a_list(run: Path) -> None:
    (checkpoint(run) / "manifest.json").write_text("[]")


@case("format 99")
def a_manifest_of_another_format(run: Path) -> None:
    edit_manifest(run, lambda manifest: manifest.update(format=99))


@case("manifest.json")
def a_manifest_edited_by_hand(run: Path) -> None:
    edit_manifest(run, lambda manifest: manifest.update(step=3))


@case("'latest' names a checkpoint")
def a_lost_manifest(run: Path) -> None:
    (checkpoint(run) / "manifest.json").unlink()


@case("'latest' names a checkpoint")
def a_checkpoint_that_was_never_given_its_name(run: Path) -> None:
    found = checkpoint(run)
    found.rename(found.with_name(f".{found.name}.writing-000001-000001"))


@case("rank_00000.safetensors")
def a_rank_file_of_the_same_size(run: Path) -> None:
    path = checkpoint(run) / "rank_00000.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


@case("config.yaml: not valid YAML")
def a_run_configuration_that_is_no_yaml(run: Path) -> None:
    (run / "config.yaml").write_text("run: [")


@case("config.yaml:1: runn: unknown key; nearest: run")
def a_run_configuration_with_an_unknown_key(run: Path) -> None:
    (run / "config.yaml").write_text("runn: {name: tiny}\n")


@case("config.yaml:2: training.max_steps: expected an integer, got two")
def a_run_configuration_with_a_wrong_type(run: Path) -> None:
    (run / "config.yaml").write_text("training:\n  max_steps: two\n")


@case("metrics.jsonl:1")
def a_damaged_metrics_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text("{" + path.read_text())


@case("tokenizer.model")
def a_tokenizer_that_is_none(run: Path) -> None:
    (run / "data" / "tokenizer.model").write_bytes(b"nothing")


@case("train")
def a_store_that_is_missing(run: Path) -> None:
    shutil.rmtree(run / "data" / "train")


@case("tokens.bin")
def a_truncated_store(run: Path) -> None:
    path = run / "data" / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-7])


@pytest.fixture(scope="module")
def trained(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an unfinished run of one checkpoint, its data inside it, and its configuration."""
    folder = tmp_path_factory.mktemp("damaged")
    config = settings(corpus, None, folder / "runs", training={"max_steps": 2})
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(prepared, folder / "runs" / "tiny" / "data")
    # One step and a checkpoint, so that there is something left to do.
    assert cli.run(["train", str(folder / "run.yaml"), "training.stop_after_seconds=0.000001"]) == EXIT_STOPPED
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_culprit_and_nothing_is_overwritten(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, names = CASES[name]
    shutil.copytree(trained / "runs", tmp_path / "runs")
    damage(tmp_path / "runs" / "tiny")
    before = contents(tmp_path / "runs")
    capsys.readouterr()
    code = cli.run(["train", str(trained / "run.yaml"), f"run.root={tmp_path / 'runs'}", "checkpoint.keep_last=3"])
    _, err = capsys.readouterr()
    assert code == EXIT_USER
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in err
    assert names in err
    after = contents(tmp_path / "runs")
    # The attempt itself may be noted, and the same configuration with its new keys; nothing else may differ.
    noted = {key for key in after if "/attempts/" in key or key.endswith(("environment.json", "tiny/config.yaml"))}
    assert {k: v for k, v in after.items() if k not in noted} == {k: v for k, v in before.items() if k not in noted}


def test_undamaged_it_goes_on_and_says_which_steps_the_time_is_of(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    assert cli.run(["train", str(trained / "run.yaml"), f"run.root={tmp_path / 'runs'}"]) == 0
    assert re.search(r"training: 2 steps, 256 tokens, .* parameters, \d+s since step 1 → ", capsys.readouterr().out)


def test_more_than_fifty_damaged_inputs_are_tried() -> None:
    from tests.data import test_damaged_corpora, test_damaged_stores
    from tests.paralm.damaged_configs import DAMAGED

    assert len(CASES) + len(DAMAGED) + len(test_damaged_corpora.CASES) + len(test_damaged_stores.CASES) > 100
