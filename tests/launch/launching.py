"""What the tests of the launchers share: a reference run, and ``paralm train`` processes that end with the test."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from paralm.training.metrics import read_metrics

STEPS = 40  # enough of them that a signal or a kill comes before the last
Start = Callable[..., subprocess.Popen[str]]


def losses(run: Path) -> list[float]:
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "one timeline, each step once"
    return [row["loss"] for row in rows]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The rank processes below a launcher."""
    found = []
    for below in psutil.Process(process.pid).children(recursive=True):
        try:
            if below.cmdline()[1:3] == ["-m", "paralm_launch.launchers.worker"]:
                found.append(below)
        except psutil.Error:
            continue
    return found


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b'"kind": "train"') >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"ended before step {step}:\n{process.communicate()[0]}")


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def outside_the_loopback(processes: list[psutil.Process]) -> list[object]:
    """Sockets that listen where other machines reach them."""
    found = []
    for process in processes:
        try:
            sockets = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        found += [s for s in sockets if s.status == psutil.CONN_LISTEN and "127.0.0.1" not in s.laddr.ip]
    return found
