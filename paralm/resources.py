"""Files that travel with the package: presets in ``configs/`` and templates in ``slurm/``.

In a source tree (an editable install included) they lie at the repository's root, in a wheel under
``paralm/_share``. This is the one look-up; nothing else knows where they are.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import paralm
from paralm.errors import UserError

_FOLDERS = ("configs", "slurm")


def share_root(package: Path | None = None) -> Path:
    """The folder that holds ``configs/`` and ``slurm/``.

    ``package``: the folder of the ``paralm`` package; default: the imported one. Raises UserError when an
    installation lacks the files.
    """
    package = package or Path(paralm.__file__).resolve().parent
    for root in (package / "_share", package.parent):
        if all((root / folder).is_dir() for folder in _FOLDERS):
            return root
    raise UserError(f"{package}: no configs/ and slurm/ beside or inside it; install paralm again, with 'pip install'")


def find(name: str) -> Path:
    """The path of a shipped file by its name in the repository, such as ``configs/quickstart.yaml``.

    Raises UserError, naming the nearest existing file.
    """
    root = share_root()
    path = root / name
    if name.split("/")[0] in _FOLDERS and ".." not in Path(name).parts and path.is_file():
        return path
    existing = [str(p.relative_to(root)) for folder in _FOLDERS for p in sorted((root / folder).rglob("*.*"))]
    near = difflib.get_close_matches(name, existing, n=1, cutoff=0.0)
    raise UserError(f"{name}: no such file comes with paralm" + (f"; nearest: {near[0]}" if near else ""))


def presets() -> dict[str, Path]:
    """Presets by name (``quickstart``, ``model/paragru_10m``), in order."""
    configs = share_root() / "configs"
    return {str(p.relative_to(configs).with_suffix("")): p for p in sorted(configs.rglob("*.yaml"))}


def find_preset(name: str) -> Path | None:
    """The preset called ``name``, with or without ``configs/`` and ``.yaml``; None when there is none."""
    key = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    return presets().get(key)


def describe(preset: Path) -> str:
    """A preset's first comment line: what it is for."""
    for line in preset.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
        if line.strip():
            break
    return ""
