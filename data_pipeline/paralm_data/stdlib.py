"""The built-in corpus: source and documentation text of the running interpreter's standard library.

Tens of megabytes of real text on every machine, without a download. One document a file, in sorted order.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from paralm_data.errors import DataError, reason
from paralm_data.specs import Document

_CODE = (".py", ".pyi", ".c", ".h", ".cpp", ".sh", ".bat", ".ps1")
_TEXT = (".txt", ".rst", ".md", ".html", ".htm", ".css", ".xml", ".json", ".toml", ".cfg", ".ini", ".csv", ".stoptions")
SUFFIXES = frozenset(_CODE + _TEXT)
EXCLUDED = frozenset(("site-packages", "dist-packages", "__pycache__"))


def root() -> Path:
    """The standard library's folder."""
    return Path(sysconfig.get_path("stdlib"))


def files(folder: Path | None = None) -> list[Path]:
    """Source and documentation files below ``folder`` (default: the standard library), sorted."""
    folder = folder or root()
    if not folder.is_dir():
        raise DataError(f"{folder}: this interpreter has no standard library folder; use another source kind")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = set(folders) - EXCLUDED  # not entered: site-packages may hold a hundred thousand files
        found += [Path(parent, name) for name in names if os.path.splitext(name)[1] in SUFFIXES]
    return sorted(path for path in found if path.is_file())


def documents(folder: Path | None = None) -> Iterator[Document]:
    """The UTF-8 text files; others (test data in old encodings, binary files) are no text and are left out."""
    folder = folder or root()
    for path in files(folder):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {reason(error)}") from error
        if b"\0" in data:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield Document(text, path.relative_to(folder).as_posix())
