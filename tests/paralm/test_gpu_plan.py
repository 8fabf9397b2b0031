"""The benchmark of the plan on a GPU, as far as it runs without one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paralm.planning import Planner, cost, device_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_plan

    monkeypatch.setattr(gpu_plan, "VOCABULARY", 512)
    return gpu_plan


@pytest.mark.parametrize("name", ["NVIDIA B300", "NVIDIA GH200 480GB"])
def test_no_unknown_gpu_is_planned_as_another(
    gpu_plan: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(sys, "argv", ["gpu_plan.py", "--only", "long", "--out", str(tmp_path / "plan.json")])
    with pytest.raises(SystemExit, match=r"'NVIDIA .*--device"):
        gpu_plan.main()
    monkeypatch.setattr(gpu_plan, "measured", lambda case, device, host: {"error": device.name})
    monkeypatch.setattr(gpu_plan, "line", str)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpu_plan.main() == 0
    assert json.loads((tmp_path / "plan.json").read_text())["rows"] == [{"error": "H100 SXM 80 GB"}]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    assert gpu_plan.main() == 1
    assert "the minutes were over" in json.loads((tmp_path / "plan.json").read_text())["rows"][0]["error"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--presets", "paragru_131m"])
    with pytest.raises(SystemExit, match="--presets: no 'paragru_131m' among paragru_130m"):
        gpu_plan.main()


def test_a_model_that_fits_neither_gpu_nor_host_keeps_its_width(gpu_plan: Any) -> None:
    case = gpu_plan.Case("large", "paragru_10m", 64, 1, 2, True, 1, offload=True, shrinks=True)
    h100 = device_of("h100")
    config, whole, left_out = gpu_plan.planned(case, h100, 1e12)
    assert left_out == 0
    limit = 0.9 * whole.memory.host
    small, plan, left_out = gpu_plan.planned(case, h100, limit)
    assert left_out >= 1
    assert small.model.n_layers == config.model.n_layers - left_out
    assert small.model.d_model == config.model.d_model
    assert plan.memory.host <= limit
    one_more = case.configuration(**{"model.n_layers": small.model.n_layers + 1})
    assert Planner(one_more, 512, h100, 1, cost.EFFICIENCY).plan().memory.host > limit
    tight = (whole.memory.peak.total - 1e6 + cost.RESERVED) / (1 - cost.FRAGMENTED)
    _, plan, left_out = gpu_plan.planned(case, replace(h100, memory=tight), 1e12)
    assert left_out >= 1
    assert plan.fits
    with pytest.raises(RuntimeError, match="paragru_10m: not even one layer fits"):
        gpu_plan.planned(case, h100, 1e5)
    assert gpu_plan.planned(replace(case, shrinks=False), h100, 1e5)[2] == 0


def test_a_device_that_has_failed_costs_no_row(gpu_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call of CUDA raises."""

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_plan, "measured", fails)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    out = tmp_path / "plan.json"
    monkeypatch.setattr(sys, "argv", ["gpu_plan.py", "--only", "large", "--out", str(out)])
    assert gpu_plan.main() == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["preset"] for row in rows] == [f"{name}_7b" for name in gpu_plan.MIXERS]
    assert all("illegal memory access" in row["error"] for row in rows)


@pytest.mark.slow
def test_steps_with_an_offloaded_optimizer_learn(
    gpu_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = gpu_plan.Case("large", "paragru_10m", 32, 1, 2, True, 18, offload=True, shrinks=True)
    broken = replace(case, preset="paragru_11m")
    monkeypatch.setattr(gpu_plan, "cases", lambda options: [broken, case])
    monkeypatch.setattr(sys, "argv", ["gpu_plan.py", "--device", "h100", "--out", str(tmp_path / "plan.json")])
    seen, is_available = [], torch.cuda.is_available
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not seen and bool(seen.append(1) or True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert not is_available()
    assert gpu_plan.main() == 1, "one of the two failed"
    first, second = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert "paragru_11m" in first["error"]
    assert second["learns"]
    assert len(second["measured"]["losses"]) == 20
    assert second["measured"]["losses"][-1] < second["measured"]["losses"][0] - 0.5
    assert "paragru_10m" in capsys.readouterr().out
