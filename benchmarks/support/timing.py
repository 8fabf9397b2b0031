"""Timing one call after another on a GPU or a CPU: warmed, on inputs that take turns, every sample kept."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"


class Budget:
    """The minutes a benchmark may take, all of its rows together; without minutes, as long as it takes."""

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def share(self, left: int) -> float:
        """Seconds that the next of so many cases may take: twice an equal part of what is left, as most take less."""
        return max(0.0, self.end - time.monotonic()) * min(1.0, 2 / max(1, left))

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end


NOT_MEASURED = "not measured: the minutes were over"


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """The option --minutes."""
    text = "for all of it: what is not measured by then is a row that says so; default: as long as it takes"
    parser.add_argument("--minutes", type=float, help=text)


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


COVER = 4_000_000
"""Cycles that a GPU is kept busy before a call that is timed: two milliseconds."""


SLOW = 3.0
"""Seconds of a call from which on it is not repeated."""


def sample(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call; on a GPU what it takes there when the host is ahead of it, as it is in training: the call is
    issued while the GPU still waits. What takes the host longer than that to issue counts as it is."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(COVER)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def samples(
    prepare: Callable[[int], Callable[[], Any]], device: str, *, warm: int, runs: int, seconds: float
) -> list[float]:
    """Seconds of up to `runs` calls, at least three, within about `seconds`, after `warm` that are not counted. Of
    calls of more than SLOW the second is the only one that counts: the first may have compiled.

    prepare(i) makes the i-th call ready, outside the clock.
    """
    result: list[float] = []
    for i in range(warm):
        once = sample(prepare(i), device)
        if i and once > SLOW:
            return [once]
    start = time.perf_counter()
    for i in range(runs):
        if len(result) >= 3 and time.perf_counter() - start > seconds:
            break
        result.append(sample(prepare(warm + i), device))
    return result


def host_seconds(prepare: Callable[[int], Callable[[], Any]], device: str, calls: int = 5) -> float:
    """What a call keeps the host busy until it returns, the device's work not waited for; median of some calls, one
    where it takes the device more than SLOW.
    """
    values = []
    for i in range(calls):
        run = prepare(i)
        synchronise(device)
        start = time.perf_counter()
        run()
        values.append(time.perf_counter() - start)
        synchronise(device)
        if time.perf_counter() - start > SLOW:
            break
    return statistics.median(values)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 10 % and 90 % quantiles and the smallest, in seconds."""
    ordered = sorted(values)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    return {"median": statistics.median(ordered), "q10": at(0.1), "q90": at(0.9), "min": ordered[0]}


def copy_bandwidth(device: str, numbers: int) -> tuple[float, list[float]]:
    """Bytes per second of copying a tensor, read and write counted, from the median; and the samples."""
    source = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    values = samples(lambda _: lambda: target.copy_(source), device, warm=3, runs=20, seconds=2.0)
    return 4 * numbers / statistics.median(values), values


def environment(device: str) -> dict[str, Any]:
    """Commit, device, clocks and versions."""
    try:
        import triton

        with_triton = triton.__version__
    except ImportError as error:
        with_triton = f"absent: {error}"
    return {
        "commit": commit(),
        "uncommitted": _output("git", "-C", str(ROOT), "status", "--short", "--", "kernels", "benchmarks"),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "clocks": _output("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader") if device == "cuda" else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": with_triton,
        "python": platform.python_version(),
    }


def results() -> Path:
    """Where results go by default: benchmarks/results, or the folder that $OUT names."""
    return Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")


def commit() -> str:
    """What is checked out; where that is a copy without its repository, what $PARALM_COMMIT says."""
    return os.environ.get("PARALM_COMMIT") or _output("git", "-C", str(ROOT), "rev-parse", "HEAD")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"unknown: {done.stderr.strip()[:200]}"


def failure(error: BaseException) -> str:
    """One line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def emit(row: dict[str, Any]) -> None:
    """A result as one line that the parent process reads; a crash later loses nothing."""
    print("ROW " + json.dumps(row), flush=True)
