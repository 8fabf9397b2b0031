"""Plant one named defect at a time and see that the test named beside it fails: ``make mutants``.

``tests/mutants.toml`` lists the defects: a file, a piece of its text that stands there exactly once, what
replaces it, and the test that must then fail. Each is planted in a copy of the tree. A defect that no test
notices, a test that fails without it, or a text that no longer stands in its file makes the command fail.

    python tools/mutants.py [--jobs 2] [--passed] [--recorded] [--record] [NAME …]

--passed: the whole suite has just passed on this tree, so the named tests need not be run without a defect first.
--recorded: what ``tests/mutants_caught.json`` says was caught is left out, unless its file, its test's file or the
defect itself has changed since; but for every 32nd of them. --record writes that file anew, as far as it goes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
CAUGHT = ROOT / "tests" / "mutants_caught.json"
PARTS = (
    "paralm",
    "kernels",
    "benchmarks",
    "data_pipeline",
    "launch",
    "configs",
    "slurm",
    "tests",
    "tools",
    "pyproject.toml",
)
PATHS = (".", "kernels", "data_pipeline", "launch")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    test: str


def load(path: Path) -> list[Mutant]:
    """The table; every text must stand exactly once in its file."""
    mutants = [Mutant(name, **entry) for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items()]
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            raise SystemExit(f"mutants: {mutant.name}: its text stands {count} times in {mutant.file}, not once")
    return mutants


def fingerprint(mutant: Mutant) -> str:
    """Of the defect, and of the files whose change may let it pass; 16 hexadecimal digits."""
    test = ROOT / mutant.test.split("::")[0]
    texts = [mutant.name, mutant.old, mutant.new, mutant.test]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / mutant.file, test)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def caught_before() -> dict[str, str]:
    """Fingerprints by name."""
    found: dict[str, str] = json.loads(CAUGHT.read_text(encoding="utf-8")) if CAUGHT.exists() else {}
    return found


def write_caught(mutants: list[Mutant], caught: dict[str, str]) -> None:
    """The record, with these fingerprints by name in it, and without what is no defect of the table."""
    record = caught_before() | caught
    kept = {mutant.name: record[mutant.name] for mutant in mutants if mutant.name in record}
    CAUGHT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")


def copy_tree(target: Path) -> None:
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target / part)


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status in a copy of the tree, importing that copy."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(str(tree / p) for p in PATHS), OMP_NUM_THREADS="1")
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


def attempt(mutant: Mutant, trees: Queue[Path]) -> tuple[Mutant, bool, str, float]:
    """Plant the defect, run its test, put the file back."""
    tree, start = trees.get(), time.monotonic()
    path = tree / mutant.file
    original = path.read_text(encoding="utf-8")
    try:
        path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
        code, output = run_tests(tree, [mutant.test])
    finally:
        path.write_text(original, encoding="utf-8")
        trees.put(tree)
    # 1: a test failed. Anything else (no test found, a broken import) is not the catch that was promised.
    return mutant, code == 1, output if code != 1 else "", time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these defects")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--passed", action="store_true", help="the named tests have just passed on this tree")
    parser.add_argument("--recorded", action="store_true", help="leave out what is on record as caught, mostly")
    parser.add_argument("--record", action="store_true", help="write what is caught to the record")
    arguments = parser.parse_args()
    table = mutants = load(ROOT / "tests" / "mutants.toml")
    unknown = set(arguments.names) - {m.name for m in mutants}
    if unknown:
        raise SystemExit(f"mutants: unknown: {', '.join(sorted(unknown))}; known: {', '.join(m.name for m in mutants)}")
    mutants = [m for m in mutants if not arguments.names or m.name in arguments.names]
    marks = {mutant.name: fingerprint(mutant) for mutant in mutants}  # of the tree that is copied now
    if arguments.recorded:
        known = caught_before()
        mutants = [m for m in mutants if known.get(m.name) != marks[m.name] or int(marks[m.name][:2], 16) < 8]
    with tempfile.TemporaryDirectory(prefix="paralm-mutants-") as folder:
        trees: Queue[Path] = Queue()
        for index in range(arguments.jobs):
            tree = Path(folder) / str(index)
            tree.mkdir()
            copy_tree(tree)
            trees.put(tree)
        survived = 0
        with ThreadPoolExecutor(arguments.jobs) as pool:
            tests = [] if arguments.passed else sorted({m.test for m in mutants})
            shares = [tests[index :: arguments.jobs] for index in range(min(arguments.jobs, len(tests)))]
            for code, output in pool.map(run_tests, list(trees.queue), shares):
                if code != 0:
                    print(output)
                    print("mutants: the named tests do not pass on the tree as it is")
                    return 1
            for mutant, caught, output, seconds in pool.map(lambda m: attempt(m, trees), mutants):
                survived += not caught
                if caught and arguments.record:
                    write_caught(table, {mutant.name: marks[mutant.name]})
                print(
                    f"{'caught  ' if caught else 'SURVIVED'} {mutant.name:34} {seconds:5.1f} s  {mutant.test}",
                    flush=True,
                )
                if not caught:
                    print(output)
    left = f", {len(table) - len(mutants)} on record or not asked for" if len(mutants) < len(table) else ""
    print(f"mutants: {len(mutants) - survived} caught, {survived} survived{left}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
