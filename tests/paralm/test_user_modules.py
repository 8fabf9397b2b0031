"""A user's own files: what belongs to one, and that it is the same one from training to export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from paralm.errors import ConfigError
from paralm.export import export
from paralm.training.loop import train
from paralm.user_modules import digests, edited, helpers, load_modules
from tests.conftest import quiet

_FILES = {
    "own_um.py": "import random, torch, one_um\nfrom one_um import value\n\ndef later():\n    import later_um\n",
    "one_um.py": "from pack_um import inner, sub\nfrom bare_um.leaf import x\nimport own_um_of_nobody\nvalue = 3\n",
    "pack_um/__init__.py": "from .inner import y\nfrom . import sub\n",
    "pack_um/inner.py": "from .sub import z as y\n",
    "pack_um/sub/__init__.py": "z = 1\n",
    "pack_um/unused.py": "",
    "bare_um/leaf.py": "import one_um\nx = 2\n",
    "later_um.py": "this is no Python",
    "random.py": "raise SystemExit",
    "unused_um.py": "",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in _FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_helpers_are_what_is_imported_from_beside_a_file_directly_or_not(folder: Path) -> None:
    assert helpers(folder / "own_um.py") == [
        "bare_um/leaf.py",
        "later_um.py",
        "one_um.py",
        "pack_um/__init__.py",
        "pack_um/inner.py",
        "pack_um/sub/__init__.py",
    ]


def test_a_file_finds_its_helpers_and_hides_nobodys_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "one_um.py").write_text(_FILES["one_um.py"].replace("import own_um_of_nobody", ""))
    (module,) = load_modules([str(folder / "own_um.py")])
    assert module.value == 3
    assert sys.path.index(str(folder)) == len(sys.path) - 1
    other = folder / "other"
    other.mkdir()
    (other / "second_um.py").write_text("import one_um")
    (other / "one_um.py").write_text("value = 4")
    with pytest.raises(ConfigError, match=r"it imports 'one_um', .*other/one_um.py, and another 'one_um' is loaded"):
        load_modules([str(other / "second_um.py")])
    (other / "one_um.py").write_text((folder / "one_um.py").read_text())
    load_modules([str(other / "second_um.py")])  # the same text: a copy of an export, say


def test_digests_are_of_every_file_and_tell_the_one_that_was_edited(folder: Path) -> None:
    names = [str(folder / "own_um.py"), "json"]
    before = digests(names)
    assert len(before) == 8
    assert all(len(digest) == 64 for digest in before.values())
    assert edited(before, {"modules": before}) is None
    assert edited(before, {}) is None  # of a checkpoint from before they were kept
    (folder / "pack_um/inner.py").write_text("y = 0")
    assert str(edited(digests(names), {"modules": before})).startswith(f"{folder / 'pack_um/inner.py'} (imports) was ")


def test_a_run_whose_file_was_edited_says_so_when_it_continues_and_when_it_is_exported(
    make: Any, tmp_path: Path
) -> None:
    own = tmp_path / "resumed_um.py"
    own.write_text("value = 1")
    config = make("a", training={"max_steps": 1})
    config.imports = [str(own)]
    train(config, say=quiet)
    said: list[str] = []
    train(config, say=said.append)
    export(config.run_dir, tmp_path / "first", warn=said.append)
    assert said == []
    own.write_text("value = 2")
    train(config, say=said.append)
    export(config.run_dir, tmp_path / "second", warn=said.append)
    line = f"{config.run_dir / 'checkpoints/step_00000001'}: {own} (imports) was edited since; "
    assert [text.removeprefix("warning: ").startswith(line) for text in said] == [True, True]
