"""One look-up for the files that travel with the package, in a source tree and in a wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from paralm import resources
from paralm.errors import UserError


def lay_out(root: Path) -> None:
    for name in ("configs/a.yaml", "configs/model/b.yaml", "slurm/train.sbatch"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("# what it is\nrun: {}\n")


@pytest.mark.parametrize("layout", ["source tree", "wheel"])
def test_both_layouts_are_found(layout: str, tmp_path: Path) -> None:
    package = tmp_path / "site" / "paralm"
    package.mkdir(parents=True)
    root = package / "_share" if layout == "wheel" else package.parent
    lay_out(root)
    assert resources.share_root(package) == root


def test_a_wheel_does_not_take_a_neighbours_files(tmp_path: Path) -> None:
    """site-packages may hold folders of these names that belong to others."""
    package = tmp_path / "paralm"
    lay_out(package / "_share")
    lay_out(tmp_path)
    assert resources.share_root(package) == package / "_share"


def test_an_installation_without_them_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configs/ and slurm/"):
        resources.share_root(tmp_path / "paralm")


def test_files_by_name() -> None:
    assert resources.find("configs/quickstart.yaml").read_text().startswith("#")
    assert resources.find("slurm/train.sbatch").is_file()


@pytest.mark.parametrize(
    "name", ["configs/quikstart.yaml", "quickstart.yaml", "configs/../configs/quickstart.yaml", ""]
)
def test_a_missing_file_names_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match=r"no such file comes with paralm; nearest: "):
        resources.find(name)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_presets_by_name(name: str) -> None:
    assert resources.find_preset(name) == resources.find("configs/quickstart.yaml")
    assert resources.find_preset("no_such_preset") is None
