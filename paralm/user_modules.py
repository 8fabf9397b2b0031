"""A user's own modules (``imports:``), whose cells and mixers register themselves when they are loaded.

What such a file imports from its own folder is found there, as a script's is, and is part of it: an export carries both
(:func:`helpers`), and a checkpoint says which they were (:func:`digests`).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from paralm.errors import ConfigError, UserError

_PREFIX = "paralm_user_"  # of the names of modules loaded from files
_NOT_THEIRS = sys.stdlib_module_names | {"paralm", "paralm_kernels", "paralm_data", "paralm_launch"}


def load_modules(names: Iterable[str]) -> list[ModuleType]:
    """Load modules by dotted name, or by path when it ends in ``.py``; each once a process.

    Raises ConfigError, one line that names the module, the line of the fault and the fault itself.
    """
    return [_load_file(Path(name)) if is_file(name) else _load_name(name) for name in names]


def is_file(name: str) -> bool:
    """Whether an entry of ``imports`` is the path of a file, not the dotted name of a module."""
    return name.endswith(".py")


def loaded_files() -> list[Path]:
    """The files that :func:`load_modules` has loaded in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith(_PREFIX)]
    return [Path(module.__file__) for module in modules if module.__file__ is not None]


def helpers(path: Path) -> list[str]:
    """The modules beside a file that it imports, or that those import, as paths relative to its folder; sorted.

    Found in the text, so that what is imported later, within a function, is among them.
    """
    folder = path.resolve().parent
    found: set[Path] = set()
    waiting = [Path(path.name)]
    while waiting:
        new = {file for name in _imported(folder, waiting.pop()) for file in _files_of(folder, name)} - found
        found |= new
        waiting += new
    return sorted(file.as_posix() for file in found - {Path(path.name)})


def _imported(folder: Path, file: Path) -> Iterator[str]:
    """What a module may import: dotted names, among them some that are no modules; of no Python, none."""
    try:
        tree = ast.parse((folder / file).read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = file.parts[: len(file.parts) - node.level] if node.level else ()
            base = [*above, *(node.module or "").split(".")]
            yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)


def _files_of(folder: Path, name: str) -> Iterator[Path]:
    """The files in ``folder`` that the import of a dotted name runs: of its packages, and its own."""
    parts = name.split(".")
    if parts[0] in _NOT_THEIRS:
        return
    for end in range(1, len(parts) + 1):
        module = Path(*parts[:end])
        for file in (module / "__init__.py", module.with_suffix(".py")):
            if (folder / file).is_file():
                yield file
                break


def digests(names: Iterable[str]) -> dict[str, str]:
    """Of ``imports`` the SHA-256 of every file: of a module that is loaded, of a .py file, and of its helpers."""
    files = []
    for name in names:
        if is_file(name):
            files += [name, *(str(Path(name).resolve().parent / helper) for helper in helpers(Path(name)))]
        elif (file := getattr(sys.modules.get(name), "__file__", None)) is not None and Path(file).is_file():
            files.append(file)
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def edited(now: dict[str, str], manifest: dict[str, Any]) -> str | None:
    """The first file that is another than a checkpoint's manifest says, in words, or None. ``now``: :func:`digests`."""
    before = manifest.get("modules", {})
    other = next((file for file, digest in now.items() if before.get(file, digest) != digest), None)
    return f"{other} (imports) was edited since; it may make another model now" if other else None


def _load_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"imports: no module named {name!r}; install it, or give the path of a .py file"
            ) from None
        raise ConfigError(_fault(name, error)) from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # SystemExit: a script's own main
        raise ConfigError(_fault(name, error)) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"imports: {path}: no such file")
    full = path.resolve()
    # The same file under two spellings is one module: cells in it must not register twice.
    name = f"{_PREFIX}{full.stem}_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _check_helpers(path, full)
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution, so that dataclasses in it resolve their annotations
    try:
        with _found_beside(full.parent):
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, UserError) or not isinstance(error, (Exception, SystemExit)):
            raise
        raise ConfigError(_fault(str(path), error, full)) from error
    return module


def _check_helpers(path: Path, full: Path) -> None:
    """Refuse a file whose helper is another module than the one loaded under its name, which Python would take."""
    for helper in helpers(full):
        name = ".".join(Path(helper).with_suffix("").parts).removesuffix(".__init__")
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded is not None and not _same(Path(loaded), full.parent / helper):
            raise ConfigError(
                f"imports: {path}: it imports '{name}', {full.parent / helper}, and another '{name}' is loaded from "
                f"{loaded}; rename one, or load the file in a process of its own"
            )


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()


@contextlib.contextmanager
def _found_beside(folder: Path) -> Iterator[None]:
    """Let imports look into ``folder`` first; afterwards last, so that it hides nobody's module."""
    there = str(folder) in sys.path
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if not there:
            sys.path.append(str(folder))


def _fault(name: str, error: Exception | SystemExit, file: Path | None = None) -> str:
    """``imports: NAME, line 3: NameError: ...``; the deepest line of the user's own file, if there is one."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    frame = error.__traceback__
    while frame is not None:
        if file is not None and frame.tb_frame.f_code.co_filename == str(file):
            line = frame.tb_lineno
        frame = frame.tb_next
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"imports: {name}{f', line {line}' if line else ''}: {type(error).__name__}: {message}"
