"""The solver's benchmark runs from end to end without a GPU, and every peer is a row: a number or its error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_what_is_measured_is_kept_when_the_time_ends_and_parts_have_files_of_their_own(solver, monkeypatch, tmp_path):
    def run_group(group, options, patience):
        if group == "ours:1":
            raise KeyboardInterrupt
        return [{"kind": "group", "name": group, "pass": "all", "error": "not measured here"}]

    monkeypatch.setattr(solver, "run_group", run_group)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("OUT", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        solver.main(["--device=cuda"])
    assert solver.main(["--device=cuda", "--only=peer:torch.nn.GRU"]) == 1
    assert solver.main(["--device=cuda", "--only=loop"]) == 1
    of = {path.name: [row["name"] for row in json.loads(path.read_text())["rows"]] for path in tmp_path.iterdir()}
    base = "solver_NVIDIA_H100_80GB_HBM3"
    assert of.keys() == {f"{base}.json", f"{base}_peer_torch_nn_GRU.json", f"{base}_loop.json"}
    assert of[f"{base}.json"][-1] == "ours:0"


def test_in_limited_minutes_a_group_has_its_share_and_the_rest_says_why_it_is_missing(solver, monkeypatch, tmp_path):
    now, patiences = [100.0], []
    monkeypatch.setattr(solver.timing.time, "monotonic", lambda: now[0])

    def run_group(group, options, patience):
        patiences.append(patience)
        now[0] += 50.0
        return []

    monkeypatch.setattr(solver, "run_group", run_group)
    monkeypatch.setattr(solver, "groups", lambda options: ["a", "b", "c", "d"])
    output = tmp_path / "solver.json"
    solver.main(["--device=cpu", "--minutes=2", f"--output={output}"])
    assert patiences == [pytest.approx(2 * 120 / 4), pytest.approx(2 * 70 / 3), pytest.approx(20.0)]
    assert json.loads(output.read_text())["rows"] == [
        {"kind": "group", "name": "d", "pass": "all", "error": solver.timing.NOT_MEASURED}
    ]


def test_what_takes_long_is_not_repeated(solver, monkeypatch):
    calls = []
    monkeypatch.setattr(solver.timing, "SLOW", 0.0)
    assert len(solver.timing.samples(lambda i: lambda: calls.append(i), "cpu", warm=3, runs=30, seconds=9.0)) == 1
    assert calls == [0, 1], "the first may have compiled"
    solver.timing.host_seconds(lambda i: lambda: calls.append(i), "cpu")
    assert len(calls) == 3
