"""One readable Triton module per cell: `generate(cell)` is its text, `module(cell)` the module.

Those of the registered cells are committed in `generated/`, so that the derivation can be reviewed; a user's cell is
generated in memory (its lines are in `linecache`, where Triton and tracebacks look; there is no file that two processes
could race for). PARALM_KERNELS_DIR=DIR writes what is generated in memory to DIR as well, for reading.

    python -m paralm_kernels.generate            writes generated/*.py for every registered cell
    python -m paralm_kernels.generate --check    exits with 1 if a file is not what its cell says
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import linecache
import os
import sys
import textwrap
from functools import cache
from pathlib import Path
from types import ModuleType

from .cell import Cell, cells
from .derive import Derived, derive
from .triton_backward import backward
from .triton_code import LOWERED
from .triton_parallel import parallel
from .triton_template import (
    Names,
    advance,
    decode_kernel,
    elementwise,
    loads,
    walk_kernel,
    walk_piece,
)

FOLDER = Path(__file__).parent / "generated"
_FUNCTIONS = ("add_compensated", "constant", "finite", "largest_size", "largest_update", "power", "relative_change", "spread")


def generate(cell: Cell) -> str:
    """The text of a cell's Triton module. CellError where its step cannot be lowered."""
    derived = derive(cell)
    names = Names(derived)
    parts = [
        *elementwise(names),
        *loads(names),
        advance(names),
        walk_piece(names),
        walk_kernel(names),
        decode_kernel(names),
        *parallel(names),
        *backward(names),
    ]
    body = "\n\n".join(parts)
    functions = sorted(name for name in (*LOWERED, *_FUNCTIONS) if f"{name}(" in body and _called(name, body))
    head = [
        "# fmt: off",
        *([] if names.derived.diagonal else ["# ruff: noqa: RUF059"]),
        "# mypy: ignore-errors",
        f'"""Kernels of the cell {cell.name!r}, generated from its step by paralm_kernels.generate; not edited by hand.',
        "",
        *(f"    {line}" if line else "" for line in _source(cell)),
        "",
        "python -m paralm_kernels.generate writes this file again.",
        '"""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        *_import("..triton_math", functions),
        "",
        "",
        "",
    ]
    return "\n".join(head) + body


def _called(name: str, body: str) -> bool:
    return any(f"{before}{name}(" in body for before in (" ", "(", "-", "~"))


def _import(source: str, names: list[str]) -> list[str]:
    line = f"from {source} import {', '.join(names)}"
    return [line] if len(line) <= 120 else [f"from {source} import (", *(f"    {name}," for name in names), ")"]


def _source(cell: Cell) -> list[str]:
    """The lines of the cell's step, without what they share in indentation."""
    try:
        text = textwrap.dedent(inspect.getsource(type(cell).step))
    except (OSError, TypeError):
        return [f"(the source of {type(cell).__qualname__}.step is not at hand)"]
    return text.replace("\\", "\\\\").replace('"""', "'''").rstrip().splitlines()


def module(cell: Cell) -> ModuleType:
    """The Triton module of a cell: the committed one where there is one, else generated in memory, once."""
    return _module(derive(cell))


@cache
def _module(derived: Derived) -> ModuleType:
    cell = derived.cell
    if cells().get(cell.name) is cell and (FOLDER / f"{cell.name}.py").is_file():
        return importlib.import_module(f"{__package__}.generated.{cell.name}")
    text = generate(cell)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    filename = f"<paralm_kernels {cell.name} {digest}>"
    folder = os.environ.get("PARALM_KERNELS_DIR")
    if folder:
        path = Path(folder) / f"{cell.name}_{digest}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    made = ModuleType(f"paralm_kernels_generated_{cell.name}_{digest}")
    made.__file__, made.__package__ = filename, f"{__package__}.generated"
    exec(compile(text, filename, "exec"), made.__dict__)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the committed modules; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m paralm_kernels.generate", description="write generated/*.py")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a file is out of date")
    options = parser.parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for name, cell in cells().items():
        path, text = FOLDER / f"{name}.py", generate(cell)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not options.check:
            path.write_text(text, encoding="utf-8")
    orphans = [path.name for path in FOLDER.glob("*.py") if path.stem not in cells() and path.name != "__init__.py"]
    for name in stale:
        print(f"generated/{name}: {'is not what its cell says' if options.check else 'written'}")
    for name in orphans:
        print(f"generated/{name}: no registered cell has this name")
    return int(options.check and bool(stale or orphans))


if __name__ == "__main__":
    sys.exit(main())
