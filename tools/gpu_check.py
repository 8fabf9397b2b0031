"""The tests and benchmarks that need a GPU, one after the other; what fails or is too slow ends no other part.

    make gpu-check                                              where paralm's environment has a CUDA build of torch
    python3 tools/gpu_check.py --wheels .wheels --minutes 9     where torch and Triton are all there is, and no registry
                                                                (`make gpu-wheels` elsewhere made the folder .wheels)

tests   pytest -m gpu: every kernel against float64, but for
solver  benchmarks/gpu_solver.py
mixers  benchmarks/gpu_mixers.py
plan    benchmarks/gpu_plan.py
waits   those whose programs wait for each other, which may hang where something is wrong

With --minutes each part has its share of what is left, and what it has measured by then is written; with --parts only
these run, in the order given. Results go to benchmarks/results, or to $OUT. 0 when all went through, 1 otherwise, 2 for
a call that cannot be: no GPU, no such part, no wheels.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAID = ROOT / ".wheels" / "laid"
PEERS = LAID / "peers"
MIXERS = ("--only", "mamba", "mlstm", "titans_memory", "titans-pytorch", "lstm")
"""What the targets of benchmarks/mixers.py name, and their peers."""
GRACE = 20.0
"""Seconds past its share that a part may take to write what it has."""


@dataclass(frozen=True)
class Part:
    """A command, the part of the time it should have beside the others, and what it takes when time is short. (Tests
    then end, failed, at the twentieth failure: what follows is mostly the same, and other parts can use the time.)
    """

    command: tuple[str, ...]
    weight: float
    short: tuple[str, ...] = ()
    timed: bool = True
    """Whether it takes --minutes and ends by itself."""
    peers: str = ""
    """Of the unpacked wheels the folder of peers that it imports itself."""


def parts(jobs: int) -> dict[str, Part]:
    """All of them, the most telling first, and last what may keep the device."""
    tests = ("-m", "pytest", "-q", "-n", str(jobs), "--dist", "worksteal", "-m", "gpu", "tests/kernels", "-k")
    return {
        "tests": Part((*tests, "not large_heads"), 3.0, ("--maxfail=20",), timed=False),
        "solver": Part(("benchmarks/gpu_solver.py",), 3.0, ("--runs=10", "--seconds=0.5"), peers="solver"),
        "mixers": Part(("benchmarks/gpu_mixers.py",), 2.0, (*MIXERS, "--lengths", "2048", "16384")),
        "plan": Part(("benchmarks/gpu_plan.py",), 2.0),
        "waits": Part((*tests, "large_heads"), 1.5, ("--maxfail=20",), timed=False),
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a process and all that it started (pytest and benchmarks then say what they have), then kills them."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run(chosen: Mapping[str, Part], python: str, minutes: float | None, environment: Mapping[str, str]) -> list[str]:
    """Runs the parts in turn; returns a line for each, which begins with its name and "passed", "failed" or "ended"."""
    begun = time.monotonic()
    lines = []
    weights = [part.weight for part in chosen.values()]
    for index, (name, part) in enumerate(chosen.items()):
        share, more = None, ()
        if minutes is not None:
            left = 60 * minutes - (time.monotonic() - begun)
            share = max(0.0, left * weights[index] / sum(weights[index:]))
            more = (*part.short, *((f"--minutes={share / 60:.2f}",) if part.timed else ()))
        print(f"== {name}" + (f", {share:.0f} s" if share is not None else ""), flush=True)
        started = time.monotonic()
        path = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), part.peers and str(PEERS / part.peers)]))
        given = {**environment, "PYTHONPATH": path}
        process = subprocess.Popen([python, *part.command, *more], cwd=ROOT, env=given, start_new_session=True)
        try:
            code = process.wait(None if share is None else share + (GRACE if part.timed else 0.0))
            how = "passed" if code == 0 else f"failed, exit {code}"
        except subprocess.TimeoutExpired:
            how = "ended: its time was over"
        finally:
            end(process)
        lines.append(f"{name:8} {how} ({time.monotonic() - started:.0f} s)")
    return lines


def lay(wheels: Path, python: str) -> dict[str, str]:
    """Unpacks wheels, and peers' wheels each into a folder of its own; returns what the environment then needs.

    Raises FileNotFoundError, CalledProcessError.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"no wheels in {wheels}: `make gpu-wheels` makes them")
    folders = {LAID / "site": found}
    for peer in sorted(path for path in (wheels / "peers").glob("*") if path.is_dir()):
        folders[PEERS / peer.name] = sorted(peer.glob("*.whl"))
    for folder, files in folders.items():
        laid, names = folder / ".laid", "".join(f"{file}\n" for file in files)
        if not laid.exists() or laid.read_text() != names:  # or others are there
            command = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--disable-pip-version-check"]
            subprocess.run([*command, "--upgrade", "--target", str(folder), *map(str, files)], check=True)
            laid.write_text(names)
    paths = [LAID / "site", ROOT, *(ROOT / name for name in ("kernels", "data_pipeline", "launch"))]
    path = os.pathsep.join(filter(None, [*map(str, paths), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PARALM_PEERS": str(PEERS)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Says what runs, runs it, and says how each part ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", metavar="PART", help="of tests, solver, mixers, plan; default: all")
    parser.add_argument("--minutes", type=float, help="for everything; default: as long as it takes")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to unpack first, from `make gpu-wheels`")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="test processes (%(default)s)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs them")
    options = parser.parse_args(arguments)
    known = parts(options.jobs)
    for name in options.parts or ():
        if name not in known:
            print(f"gpu_check.py: --parts: no part '{name}' among {', '.join(known)}", file=sys.stderr)
            return 2
    if options.minutes is not None and not options.minutes > 0:
        print(f"gpu_check.py: --minutes {options.minutes:g} is no time; give minutes, or leave it out", file=sys.stderr)
        return 2
    see = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([options.python, "-c", see], check=False).returncode:
        text = "torch sees no GPU here; nothing was checked (for a CUDA build: make TORCH=...)"
        print(f"gpu_check.py: {text}", file=sys.stderr)
        return 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if options.wheels is not None:
        try:
            environment |= lay(options.wheels, options.python)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            print(f"gpu_check.py: --wheels: {error}", file=sys.stderr)
            return 2
    chosen = {name: known[name] for name in options.parts or known}
    lines = run(chosen, options.python, options.minutes, environment)
    print("\n".join(["", *lines]), flush=True)
    return int(any(" passed (" not in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
