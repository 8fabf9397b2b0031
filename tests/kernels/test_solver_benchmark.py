"""The solver's benchmark runs from end to end without a GPU, and every peer is a row: a number or its error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_on_a_cpu_and_every_peer_is_a_row(tmp_path):
    output = tmp_path / "solver.json"
    flags = ["--device=cpu", "--shape=1,16,4", "--warm=1", "--runs=3", "--seconds=0", f"--output={output}"]
    command = [sys.executable, str(ROOT / "benchmarks" / "solver.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert {"commit", "device", "clocks", "torch", "triton", "copy", "rows"} <= content.keys()
    rows = content["rows"]
    for row in rows:
        assert row["pass"] == "info" or ("error" in row) != ("samples" in row), row
        assert all(value > 0 for value in row.get("samples", ()))
    peers = {row["name"] for row in rows if row["kind"] == "peer"}
    for name in ("pararnn-torch", "cuDNN", "accelerated-scan", "Mamba2", "diagonal_scan"):
        assert any(name in peer for peer in peers), name
    for cell in ("paragru", "paralstm"):
        for bias in (0.0, -6.0):
            mine = [row for row in rows if (row.get("cell"), row.get("bias"), row["kind"]) == (cell, bias, "ours")]
            assert {row["pass"] for row in mine if "samples" in row} == {"forward", "backward"}
        assert any(row["kind"] == "loop" and row["method"] == "naive loop" for row in rows)
    assert "paragru" in done.stdout


@pytest.fixture
def solver(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import solver

    return solver


def test_what_takes_long_is_not_repeated(solver, monkeypatch):
    calls = []
    monkeypatch.setattr(solver.timing, "SLOW", 0.0)
    assert len(solver.timing.samples(lambda i: lambda: calls.append(i), "cpu", warm=3, runs=30, seconds=9.0)) == 1
    assert calls == [0, 1], "the first may have compiled"
    solver.timing.host_seconds(lambda i: lambda: calls.append(i), "cpu")
    assert len(calls) == 3
