"""A user's own modules (``imports:``), whose cells and mixers register themselves when they are loaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from paralm.errors import ConfigError, UserError

_PREFIX = "paralm_user_"  # of the names of modules loaded from files


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
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution, so that dataclasses in it resolve their annotations
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, UserError) or not isinstance(error, (Exception, SystemExit)):
            raise
        raise ConfigError(_fault(str(path), error, full)) from error
    return module


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
