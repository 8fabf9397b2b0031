"""The dense recurrences' kernels: their tests under Triton's interpreter in a process of their own, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paralm_kernels import ArgumentError, dense_rnn, dry_run
from paralm_kernels.dense_cells import KINDS

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_under_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    tests = Path(__file__).with_name("test_triton_dense_kernels.py")
    done = subprocess.run(
        [*command, str(tests)], env=environment, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= 40, summary


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_a_cpu_is_refused_in_one_line():
    inputs, weight = torch.zeros(1, 2, 4, 1, 8), torch.zeros(4, 1, 8, 8)
    with pytest.raises(ArgumentError) as caught:
        dense_rnn("lstm", inputs.requires_grad_(), weight, method="triton")
    assert str(caught.value).startswith("method 'triton' needs a GPU but inputs are on cpu; use method='auto'")
    assert "\n" not in str(caught.value)


L40S = 101376
"""Bytes of shared memory that a program has there, and on an A10, L4 or RTX."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 128), (torch.float32, 64)], ids=["bf16", "fp32"])
def test_auto_takes_the_loop_where_a_device_has_less_shared_memory(kind, dtype, most, monkeypatch):
    from paralm_kernels import triton_dense

    monkeypatch.setattr(triton_dense, "_room", lambda device: L40S, raising=False)
    gates = len(KINDS[kind].gates)
    for d_head, fits in ((most, kind == "elman"), (most // 2, True)):
        inputs, weight = (
            torch.empty(*s, d_head, device="meta", dtype=dtype) for s in ((2, 3, gates, 1), (gates, 1, d_head))
        )
        told = []
        with dry_run(lambda name, tensors, pointwise, told=told: told.append(name)):
            dense_rnn(kind, inputs, weight)
        assert told == ["forward_kernel"] * fits


def test_the_shared_memory_that_kernels_are_thought_to_take_is_what_they_take():
    from paralm_kernels import triton_dense

    rows = json.loads(Path(__file__).with_name("compiled.json").read_text(encoding="utf-8"))
    taken = {
        row["kernel"].split()[1]: row["shared"]
        for row in rows
        if row["cell"] == "dense_rnn" and row["target"] in ("sm_80", "sm_90") and " 128 bf16" in row["kernel"]
    }
    expected = {kind: len(cell.gates) * triton_dense._GATE + triton_dense._REST for kind, cell in KINDS.items()}
    assert taken == expected


def test_without_triton_the_method_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "paralm_kernels.triton_dense", None)
    monkeypatch.delattr("paralm_kernels.triton_dense", raising=False)
    with pytest.raises(ArgumentError, match="method 'triton' needs the package triton"):
        dense_rnn("elman", torch.zeros(1, 2, 1, 1, 8), torch.zeros(1, 1, 8, 8), method="triton")
