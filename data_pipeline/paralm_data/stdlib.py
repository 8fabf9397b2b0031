"""The built-in corpus: source and documentation text of the running interpreter's standard library.

Tens of megabytes of real text on every machine, without a download. One document a file, in sorted order. Its parts,
none of which holds text of another: ``code`` (source files without their docstrings), ``docs`` (the docstrings, and
files of prose) and ``tests`` (source files below a folder of tests).
"""

from __future__ import annotations

import ast
import io
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from paralm_data.errors import DataError, reason
from paralm_data.specs import Document

_CODE = (".py", ".pyi", ".c", ".h", ".cpp", ".sh", ".bat", ".ps1")
_TEXT = (".txt", ".rst", ".md", ".html", ".htm", ".css", ".xml", ".json", ".toml", ".cfg", ".ini", ".csv", ".stoptions")
SUFFIXES = frozenset(_CODE + _TEXT)
_PROSE = (".txt", ".rst", ".md")
_TESTS = frozenset(("test", "tests", "idle_test"))
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


def documents(folder: Path | None = None, part: str | None = None) -> Iterator[Document]:
    """The UTF-8 text files; others (test data in old encodings, binary files) are no text and are left out. ``part``:
    only one of specs.STDLIB_PARTS.
    """
    folder = folder or root()
    for document in _whole(folder):
        text = document.text if part is None else _part(document, part)
        if text is not None:
            yield Document(text, document.origin)


def _part(document: Document, part: str) -> str | None:
    """The text of a file that belongs to a part; None: nothing of it does."""
    *folders, name = document.origin.split("/")
    suffix = os.path.splitext(name)[1]
    if _TESTS.intersection(folders):
        return document.text if part == "tests" and suffix in _CODE else None
    if suffix in _PROSE:
        return document.text if part == "docs" else None
    if suffix not in _CODE or part == "tests":
        return None
    code, docs = split_docstrings(document.text) if suffix in (".py", ".pyi") else (document.text, "")
    return code if part == "code" else docs or None


def split_docstrings(source: str) -> tuple[str, str]:
    """Python source without its docstrings, and those, in their order, with a blank line between.

    One that does not begin its line stays; text that does not parse has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return source, ""
    lines = list(io.StringIO(source, newline=""))  # as Python counts them: a form feed, for one, ends no line
    docs: list[tuple[int, str]] = []
    gone: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            statement = node.body[0] if node.body else None
            if text and statement and not lines[statement.lineno - 1].encode()[: statement.col_offset].strip():
                docs.append((statement.lineno, text))
                gone.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    kept = "".join(line for number, line in enumerate(lines, 1) if number not in gone)
    return kept, "\n\n".join(text for _, text in sorted(docs))


def _whole(folder: Path) -> Iterator[Document]:
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
