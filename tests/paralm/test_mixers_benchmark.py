"""The benchmark of the mixers from end to end on the smallest case; limits, failures, and going on after a stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from paralm.registry import MIXERS
from tests.peers import FOREIGN

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import mixers as benchmark
    from support import mixer_case, mixer_report
    from support.mixer_subjects import subjects
finally:
    sys.path.remove(str(BENCHMARKS))

TINY = ["--device=cpu", "--d-model=16", "--lengths", "8", "16", "--seconds=0"]


def run(output: Path, *flags: str) -> dict[str, Any]:
    assert benchmark.main([*TINY, f"--output={output}", *flags]) == 0
    content: dict[str, Any] = json.loads(output.read_text())
    return content


def test_every_registered_mixer_is_run_and_every_named_peer_stands_beside_one() -> None:
    known = subjects()
    assert {f"paralm {name}" for name in MIXERS.names()} <= known.keys()
    for name in ("transformers", "mamba_ssm", "mlstm_kernels triton_xl_chunk", "titans-pytorch", "flashrnn"):
        assert any(subject.startswith(name) for subject in known), name
    for name, subject in known.items():
        assert name.startswith("paralm ") == (not subject.beside)
        assert not subject.beside or subject.beside in known


def test_one_subject_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers for ours; a row with the reason for a peer that is not there; then more is added."""
    monkeypatch.setattr("tests.peers.PEERS", tmp_path / "none")
    output = tmp_path / "mixers.json"
    content = run(output, "--lengths=8", "--only", "paralm elman", "flashrnn elman")
    assert {"command", "commit", "device", "torch", "basis", "summary"} <= content.keys()
    rows = {(row["subject"], row["length"]): row for row in content["rows"]}
    own = rows["paralm elman", 8]
    assert len(own["samples"]) >= 3
    assert all(value > 0 for value in own["samples"])
    assert own["seconds"]["min"] <= own["seconds"]["median"]
    assert len(own["passed"]) == len(own["samples"])
    assert own["memory_bytes"] >= 0
    assert own["parameters"] == 3 * 16 * 16 + 16
    assert "make peers" in rows["flashrnn elman, cuda_fused", 8]["error"]
    monkeypatch.setattr(benchmark, "run_process", lambda name, *_: [{"length": 8, "over": 60.0}])
    content = run(output, "--only", "paralm tanh")
    assert not output.with_suffix(".partial").exists()
    assert {row["subject"] for row in content["rows"]} == {s for s, _ in rows} | {"paralm tanh"}
    assert benchmark.main([*TINY, f"--output={output}", "--only=gru", "--d-model=8"]) == 2  # would replace it all
    assert json.loads(output.read_text()) == content


def test_what_minutes_leave_out_stays_as_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was never measured says so."""
    measured = {"samples": [1.0], "seconds": {"median": 1.0}, "memory_bytes": 1}
    monkeypatch.setattr(benchmark, "run_process", lambda *_: [{"length": 8, **measured}])
    output, only = tmp_path / "mixers.json", ["--only", "paralm elman", "--lengths"]
    before = run(output, *only, "8")
    assert benchmark.main([*TINY, f"--output={output}", *only, "8", "16", "--minutes=1e-9"]) == 0
    rows = {row["length"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows[8] == before["rows"][0]
    assert "the minutes were over" in rows[16]["error"]


def test_past_the_limit_a_case_ends_and_longer_ones_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    options, tried = benchmark.parse([*TINY, "--limit=0.0005"]), []
    run_process = benchmark.run_process

    def process(name: str, subject: Any, batch: int, lengths: list[int], *rest: Any) -> list[dict[str, Any]]:
        tried.append(lengths)
        return run_process(name, subject, batch, lengths, *rest)

    monkeypatch.setattr(benchmark, "run_process", process)
    rows = list(benchmark.measure_all({"paralm gru": subjects()["paralm gru"]}, {}, options))
    assert tried == [[8]]
    assert [row["over"] for row in rows] == [0.0005, 0.0005]
    assert rows[1]["since"] == 8


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is kept, what failed is tried again, and other settings start anew."""
    output, asked = tmp_path / "mixers.json", []

    def process(name: str, subject: object, batch: int, lengths: list[int], *_: object) -> list[dict[str, Any]]:
        asked.append((name, lengths[0]))
        if len(asked) == 4:
            raise KeyboardInterrupt
        if name == "paralm gru":
            return [{"length": lengths[0], "error": "once"}]
        return [{"length": lengths[0], "samples": [1.0], "seconds": {"median": 1.0}, "memory_bytes": 1}]

    monkeypatch.setattr(benchmark, "run_process", process)
    only = ["--only", "paralm elman", "paralm gru", "paralm tanh"]
    with pytest.raises(KeyboardInterrupt):
        run(output, *only)
    first = [("paralm elman", 8), ("paralm elman", 16), ("paralm gru", 8)]
    assert asked[:3] == first
    with output.with_suffix(".partial").open("a") as file:
        file.write('{"subject": "cut in the mid')
    asked[:] = [("", 0)] * 4
    content = run(output, *only)
    again = [entry for entry in asked[4:] if entry[0] != "paralm tanh"]
    assert again == [("paralm gru", 8), ("paralm gru, 1 head", 8), ("paralm gru, 1 head", 16)]
    assert sum(row["subject"] == "paralm elman" for row in content["rows"]) == 2


def test_a_peer_beside_another_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    options = benchmark.parse([*TINY, "--case=paralm elman", "--absent=json"])
    mixer_case.run_case(options)
    row = json.loads(capsys.readouterr().out.removeprefix("ROW "))
    assert "json is imported" in row["error"]
    assert "transformers" in FOREIGN


def test_growth_and_rate() -> None:
    def row(length: int, seconds: float, memory: int) -> dict[str, Any]:
        numbers = {"seconds": {"median": seconds}, "memory_bytes": memory, "samples": [seconds]}
        return {"subject": "a", "batch": 2, "length": length, **numbers}

    (found,) = mixer_report.summaries([row(1024, 0.5, 1), row(8192, 1.0, 10), row(65536, 64.0, 80)])
    assert found["tokens_per_s"] == 4096
    assert found["time_exponent"] == pytest.approx(2.0)
    assert found["memory_exponent"] == pytest.approx(1.0)
    assert mixer_report.cell_text(row(8, 0.00123, 5_000_000)) == "1.23 ms*  5 MB"
    assert mixer_report.cell_text({**row(8, 2.0, 2 * 10**9), "samples": [2.0] * 3}) == "2.00 s  2.0 GB"
    assert mixer_report.cell_text({"over": 60.0}) == "over 60 s"
