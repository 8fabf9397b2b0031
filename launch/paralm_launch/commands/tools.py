"""``paralm check`` and ``paralm dump-stacks``: the laws for a stranger's cell, and a look into a live run."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paralm.errors import RunError, UserError
from paralm_launch.commands.arguments import RunArgument, add_command
from paralm_launch.console import say, table

if TYPE_CHECKING:
    from paralm_kernels.laws import LawResult


def add_to(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    add_command(parent, check)
    add_command(parent, dump_stacks, "dump-stacks")


def check(
    file: Annotated[str, typer.Argument(metavar="FILE.py", help="A file (or module) with cells or mixers of yours.")],
) -> None:
    """Run the laws on the cells and mixers that a file registers: exactly what the tests run on paralm's own.

    Exit code 2 when a law is broken; each broken one says by how much.
    """
    import paralm_kernels
    import paralm_kernels.laws

    from paralm import laws
    from paralm.registry import mixers
    from paralm.user_modules import load_modules

    before = set(paralm_kernels.cells()), set(mixers())
    load_modules([file])
    cells = [name for name in paralm_kernels.cells() if name not in before[0]]
    own = [name for name in mixers() if name not in before[1]]
    if not cells and not own:
        raise UserError(
            f"{file}: registers no cell and no mixer; end it with paralm_kernels.register(YourCell()), "
            "or decorate the mixer with paralm.registry.register_mixer"
        )
    results = [(f"cell {n}", r) for n in cells for r in paralm_kernels.laws.check_cell(paralm_kernels.get_cell(n))]
    sound = not any(not r.ok for _, r in results)  # of an unsound cell, its mixer would only repeat the news
    results += [(f"mixer {n}", r) for n in own for r in laws.check_mixer(n) if sound or n not in cells]
    table(None, ("of", "law", "", "of the tolerance", "where"), list(_rows(results)))
    broken = sum(not r.ok for _, r in results)
    if broken:
        raise UserError(f"{file}: {broken} of {len(results)} laws are broken")
    say(f"ok: {len(results)} laws hold")


def _rows(results: list[tuple[str, LawResult]]) -> Iterator[tuple[str, ...]]:
    """A row for each law; one for all of a cell or mixer where the same thing breaks each, such as how it is made."""
    for of, group in itertools.groupby(results, key=lambda pair: pair[0]):
        laws = [law for _, law in group]
        if len({(law.ok, law.detail) for law in laws}) == 1 and not laws[0].ok and len(laws) > 1:
            yield of, f"all {len(laws)}", *_row(of, laws[0])[2:]
        else:
            yield from (_row(of, law) for law in laws)


def _row(of: str, law: LawResult) -> tuple[str, ...]:
    """``worst`` is in units of what is allowed; infinite where something other than a number broke the law."""
    return of, law.name, "ok" if law.ok else "BROKEN", f"{law.worst:.2g}" if law.worst < 1e99 else "", law.detail


def dump_stacks(
    run: RunArgument,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the ranks to answer.")] = 15.0,
) -> None:
    """Ask a live run what every rank is doing: each writes its threads' stacks to RUN/stacks/.

    It does not disturb the run. Ranks on other machines answer too, through the shared folder.
    """
    from paralm.training.control import request_stacks
    from paralm.training.session import parse_run

    path, _ = parse_run(run)
    ranks = list(_live_ranks(path / "ranks"))
    if not ranks:
        raise RunError(f"{path}: no rank of it is running")
    files = {r["rank"]: path / "stacks" / f"rank_{r['rank']:05d}.txt" for r in ranks}
    before = {rank: _size(file) for rank, file in files.items()}
    request_stacks(path / "stacks")
    deadline = time.monotonic() + wait
    waiting = set(files)
    while waiting and time.monotonic() < deadline:
        time.sleep(0.2)
        waiting = {rank for rank in waiting if _size(files[rank]) <= before[rank]}
    for rank, file in files.items():
        say(f"rank {rank}: {'no answer' if rank in waiting else file}")
    if waiting:
        raise RunError(f"{path}: {len(waiting)} of {len(files)} ranks did not answer in {wait:.0f} s")


def _live_ranks(folder: Path) -> Iterable[dict[str, Any]]:
    """The ranks that left a file and, as far as this machine can tell, still run."""
    for file in sorted(folder.glob("rank_*.json")):
        try:
            rank = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # it is being written or removed at this moment
        if rank["host"] != socket.gethostname() or _runs(rank["pid"]):
            yield rank


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
