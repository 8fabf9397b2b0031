"""Kill training at random moments, start it again, and see that nothing was lost: ``make chaos``.

An outside killer draws its moments uniformly over the wall time that an undisturbed run takes, start-up included,
counted from the last start or kill. After --kills of them, a phase that has not been hit --each times is sought in the
first third of that time: loading takes a second, and comes early. It draws a target: one rank, all ranks, or the driver
(the ``paralm train`` process). It uses SIGKILL. Ranks are started again by their launcher, a driver by this program.
When a run ends, its losses must be those of an undisturbed run: bit for bit at an equal world size, to 1e-5 after a
change of it. The phase a kill hit is read from the victim's own note in the run folder; a process without one was still
starting.

    python tools/chaos.py [--kills 30] [--each 3] [--seed N] [--launchers torchrun,ray,mpi] [--out FILE]

It goes on beyond --kills until every phase and every target has been hit --each times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from paralm.training.metrics import read_metrics
from paralm.training.watch import read_note

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("start", "load", "step", "save")
TARGETS = ("rank", "all ranks", "driver")
ELASTIC = (4, 2, 1, 3)
NO_DROPOUT = "model.dropout=0"
"""Dropout draws by rank: at another world size the losses are others."""
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own helpers outlive a killed driver by 61 s: so long they try to reach a control store that is gone. They take
no part in training and end by themselves."""
WORKER = "paralm_launch.launchers.worker"
PATIENCE = 300.0  # seconds for anything that must end by itself
Say = Callable[[str], None]


@dataclass(frozen=True)
class Kill:
    """One kill: whom, when (seconds after the last start or kill), and what it was doing."""

    launcher: str
    ranks: int
    run: str
    target: str
    moment: float
    phase: str
    step: int


@dataclass
class Outcome:
    """Everything a campaign did."""

    seed: int
    kills: list[Kill] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def hits(self, what: str) -> Counter[str]:
        return Counter(getattr(kill, what) for kill in self.kills)

    def enough(self, kills: int, each: int) -> bool:
        phases, targets = self.hits("phase"), self.hits("target")
        met = all(phases[p] >= each for p in PHASES) and all(targets[t] >= each for t in TARGETS)
        return len(self.kills) >= kills and met


class Driver:
    """A ``paralm train`` process and what it started."""

    def __init__(self, config: Path, run: Path, launcher: str, ranks: int, *more: str) -> None:
        self.run, self.launcher, self.ranks = run, launcher, ranks
        overrides = [f"run.name={run.name}", f"launcher.kind={launcher}", f"launcher.ranks={ranks}"]
        overrides.append("launcher.max_failures=1000")
        overrides += more
        command = [sys.executable, "-m", "paralm_launch", "train", str(config), *overrides]
        self.log = run.parent / f"{run.name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.below = psutil.Process(self.process.pid)

    def descendants(self) -> list[psutil.Process]:
        try:
            return self.below.children(recursive=True)
        except psutil.Error:
            return []

    def workers(self) -> list[psutil.Process]:
        """The processes that are ranks, as far as they are there."""
        found = []
        for process in self.descendants():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            own = command[1:3] == ["-m", WORKER]
            if own or (command and command[0].startswith("ray::") and "RayTrainWorker" in command[0]):
                found.append(process)
        return found

    def finished(self, seconds: float) -> bool:
        """Wait so long; whether it ended meanwhile."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> None:
        """End everything, however a campaign ended."""
        for process in [*self.descendants(), self.below]:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait(PATIENCE)

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


def losses(run: Path) -> dict[int, tuple[Any, ...]]:
    """Step → what must not depend on how the run got there; a step must be there once."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    if len({row["step"] for row in rows}) != len(rows):
        raise ValueError(f"{run}: a step is logged twice")
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in rows}


def phase_of(run: Path, pids: set[int]) -> tuple[str, int]:
    """(phase, step) in the note of one of these processes, which is its last word when it was killed."""
    for path in sorted((run / "ranks").glob("note_*.json")):
        note = read_note(path)
        if note is not None and note.pid in pids:
            return ("step" if note.phase == "validation" else note.phase), note.step
    return "start", 0


def name_of(process: psutil.Process) -> str:
    """Empty when it is gone."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def strike(driver: Driver, target: str, rng: random.Random, moment: float, outcome: Outcome, say: Say) -> str:
    """Kill, note what was hit, and see that nothing is left of what must go; returns the target that it was."""
    workers = driver.workers()
    if target != "driver" and len(workers) < driver.ranks:
        target = "driver"  # there are no ranks yet to be hit
    below = driver.descendants()
    victims = {"rank": workers and [rng.choice(workers)], "all ranks": workers, "driver": [driver.below]}[target]
    for process in victims:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(victims, timeout=30)
    seen = {process.pid for process in (workers if target == "driver" else victims)}
    phase, step = phase_of(driver.run, seen)
    outcome.kills.append(Kill(driver.launcher, driver.ranks, driver.run.name, target, round(moment, 2), phase, step))
    say(
        f"{len(outcome.kills):4}  {driver.launcher:9} {driver.ranks} ranks  {moment:6.1f} s  {target:9}  "
        f"{phase:5} {step or ''}"
    )
    if target == "driver":
        driver.process.wait(PATIENCE)
        others = [process for process in below if name_of(process) not in RAY_AGENTS]
        _, left = psutil.wait_procs(others, timeout=30)
        left = [process for process in left if name_of(process) not in RAY_AGENTS]  # when hit, some had no name yet
        for process in below:
            with contextlib.suppress(psutil.Error):
                if name_of(process) in RAY_AGENTS:
                    process.kill()
        if left:
            outcome.problems.append(f"{driver.run.name}: {len(left)} processes outlived the driver: {left}")
            for process in left:
                process.kill()
    return target


def undisturbed(
    config: Path, root: Path, launcher: str, ranks: int, *more: str
) -> tuple[dict[int, tuple[Any, ...]], float]:
    """(losses, seconds) of a run that nobody touches."""
    start = time.monotonic()
    run = root / "-".join(["whole", launcher, str(ranks), *(text.replace("=", "_") for text in more)])
    driver = Driver(config, run, launcher, ranks, *more)
    try:
        if not driver.finished(PATIENCE) or driver.process.returncode != 0:
            raise SystemExit(f"chaos: the undisturbed run did not end well:\n{driver.tail()}")
    finally:
        driver.end()
    return losses(run), time.monotonic() - start


def disturbed(
    config: Path,
    run: Path,
    launcher: str,
    ranks: int,
    span: float,
    rng: random.Random,
    outcome: Outcome,
    say: Say,
    more: Callable[[], bool],
    kills: int,
) -> None:
    """A run under fire until it ends. ``more``: whether to go on killing; ``kills``: how many are drawn from all of
    ``span`` seconds."""
    driver = Driver(config, run, launcher, ranks)
    deadline = time.monotonic() + 40 * span + PATIENCE
    try:
        while True:
            moment = rng.uniform(0, span if len(outcome.kills) < kills else span / 3)
            if driver.finished(moment if more() else PATIENCE):
                break
            if not more() or time.monotonic() > deadline:
                outcome.problems.append(f"{run.name}: did not end; its last words: {driver.tail()}")
                return
            if strike(driver, rng.choice(TARGETS), rng, moment, outcome, say) == "driver":
                driver = Driver(config, run, launcher, ranks)
    finally:
        driver.end()
    if driver.process.returncode != 0:
        outcome.problems.append(f"{run.name}: ended with {driver.process.returncode}: {driver.tail()}")


def moving(config: Path, run: Path, launcher: str, span: float, rng: random.Random, outcome: Outcome, say: Say) -> None:
    """A run whose driver is killed at each world size but the last, a moment after its first step at that size."""
    for ranks in ELASTIC:
        driver = Driver(config, run, launcher, ranks, NO_DROPOUT)
        try:
            start = time.monotonic()
            if ranks == ELASTIC[-1]:
                if not driver.finished(PATIENCE) or driver.process.returncode != 0:
                    outcome.problems.append(f"{run.name}: did not end well: {driver.tail()}")
                return
            begun = 0
            while not (begun and progress(driver) > begun):
                begun = begun or progress(driver)
                if driver.finished(0.05) or time.monotonic() - start > PATIENCE:
                    outcome.problems.append(f"{run.name}: no step on {ranks} ranks: {driver.tail()}")
                    return
            driver.finished(rng.uniform(0, span / 20))
            strike(driver, "driver", rng, time.monotonic() - start, outcome, say)
        finally:
            driver.end()


def progress(driver: Driver) -> int:
    """The step that this start of the run is in, or has just finished; 0 before its first."""
    phase, step = phase_of(driver.run, {process.pid for process in driver.workers()})
    return {"step": step, "save": step + 1}.get(phase, 0)


def compare(run: Path, reference: dict[int, tuple[Any, ...]], exact: bool, outcome: Outcome) -> None:
    """Note whether the run's losses are the undisturbed one's."""
    try:
        found = losses(run)
    except ValueError as error:
        outcome.problems.append(str(error))
        return
    steps = set(found) == set(reference)
    worst = max((abs(found[s][0] / reference[s][0] - 1) for s in reference if s in found), default=math.inf)
    equal = steps and (found == reference if exact else worst <= 1e-5)
    kills = sum(kill.run == run.name for kill in outcome.kills)
    outcome.runs.append(
        {"run": run.name, "kills": kills, "exact": exact, "equal": equal, "largest_relative_difference": worst}
    )
    if not equal:
        outcome.problems.append(f"{run.name}: losses differ from the undisturbed run's, by {worst:.3g} relative")


def forget(root: Path) -> None:
    """Remove the checkpoints of the runs so far, half a gigabyte each."""
    for checkpoints in root.glob("*/checkpoints"):
        shutil.rmtree(checkpoints, ignore_errors=True)


def campaign(
    config: Path,
    root: Path,
    *,
    seed: int,
    kills: int,
    each: int,
    quotas: dict[str, int],
    ranks: int = 2,
    elastic: bool = True,
    say: Say = print,
) -> Outcome:
    """``quotas``: launcher → kills; of the last launcher as many more as ``kills`` and ``each`` need."""
    outcome, rng = Outcome(seed), random.Random(seed)
    last = list(quotas)[-1]
    for launcher, quota in quotas.items():
        reference, span = undisturbed(config, root, launcher, ranks)
        say(f"{launcher}: undisturbed, {ranks} ranks, {span:.0f} s")
        if launcher == last and elastic:
            moving(config, root / "moving", launcher, span, rng, outcome, say)
            smooth, _ = undisturbed(config, root, launcher, ranks, NO_DROPOUT)
            compare(root / "moving", smooth, False, outcome)
            forget(root)
        before, number = len(outcome.kills), 0

        def more(launcher: str = launcher, before: int = before, quota: int = quota) -> bool:
            own = len(outcome.kills) - before
            return own < quota or (launcher == last and own < 5 * kills and not outcome.enough(kills, each))

        while more() and len(outcome.problems) < 3:
            run = root / f"{launcher}-{number}"
            disturbed(config, run, launcher, ranks, span, rng, outcome, say, more, kills)
            compare(run, reference, True, outcome)
            forget(root)
            number += 1
    return outcome


def table(outcome: Outcome) -> str:
    """Targets by phases."""
    lines = [f"{'':11}" + "".join(f"{phase:>7}" for phase in (*PHASES, "all"))]
    for target in (*TARGETS, "all"):
        row = [kill for kill in outcome.kills if target in (kill.target, "all")]
        counts = [sum(kill.phase == phase for kill in row) for phase in PHASES]
        lines.append(f"{target:11}" + "".join(f"{count:7}" for count in (*counts, len(row))))
    return "\n".join(lines)


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """A run that is slow where it is to be hit: a model whose checkpoints take a while, saved at every step."""
    config: dict[str, Any] = {
        "run": {"root": str(folder / "runs"), "seed": 5},
        "data": {
            "source": {"kind": "python-stdlib", "max_documents": 60},
            "tokenizer": {"vocab_size": 512},
            "dir": str(folder / "data"),
        },
        # The padded vocabulary is there to be written and read: loading is what a moment drawn at random hits least.
        "model": {
            "d_model": 640,
            "n_layers": 8,
            "vocab_size": 50_000,
            "dropout": 0.1,
            "mixer": {"name": "paragru", "n_heads": 4},
        },
        "training": {
            "max_steps": 7,
            "seq_len": 32,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "validate_tokens": 500,
            "threads": 1,
        },
        "optimizer": {"lr": 3e-4},  # at 3e-3 this model jumps about, and rounding of 1e-7 becomes 4e-5 in ten steps
        "checkpoint": {"every": 1},
    }
    for section, values in sections.items():
        config.setdefault(section, {}).update(values)
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--each", type=int, default=3, help="at least so many hits of each phase and each target")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--launchers", default="mpi,ray,torchrun", help="the last one gets most of the kills")
    parser.add_argument("--quota", type=int, default=3, help="kills of the launchers before the last")
    parser.add_argument("--no-elastic", action="store_true", help="leave out the run that changes its world size")
    parser.add_argument("--out", type=Path, default=None, help="JSON, for instance benchmarks/results/chaos.json")
    arguments = parser.parse_args()
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of 15, Ray's default, a busy machine leaves nothing
    names = arguments.launchers.split(",")
    quotas = dict.fromkeys(names[:-1], arguments.quota) | {names[-1]: 0}
    print(f"chaos: seed {seed}")
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # its gigabytes of runs go too
    with tempfile.TemporaryDirectory(prefix="paralm-chaos-") as text:
        folder = Path(text)
        config = write_config(folder)
        (folder / "runs").mkdir()
        command = [sys.executable, "-m", "paralm_launch", "data", "prepare", str(config)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        outcome = campaign(
            config,
            folder / "runs",
            seed=seed,
            kills=arguments.kills,
            each=arguments.each,
            quotas=quotas,
            elastic=not arguments.no_elastic,
            say=lambda line: print(line, flush=True),
        )
    print(f"\n{table(outcome)}\n")
    for run in outcome.runs:
        how = "bit for bit" if run["exact"] else "to 1e-5"
        print(f"{run['run']:14} {run['kills']:3} kills, losses {'equal' if run['equal'] else 'DIFFER'} {how}")
    if not outcome.enough(arguments.kills, arguments.each):
        outcome.problems.append(f"not every phase and target was hit {arguments.each} times")
    for problem in outcome.problems:
        print(f"PROBLEM {problem}")
    if arguments.out is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
        record = {
            "command": " ".join(["python", *sys.argv]),
            "commit": commit.stdout.strip(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
            "minutes": round((time.monotonic() - start) / 60, 1),
            "phases": outcome.hits("phase"),
            "targets": outcome.hits("target"),
            **asdict(outcome),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
