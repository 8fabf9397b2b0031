"""The fused kernels: their tests under Triton's interpreter, in processes of their own; and what needs neither it nor a
GPU: refusals, and that what the registered cells do not use compiles too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paralm_kernels import ArgumentError, Cell, ParaGRU, cells, solve
from paralm_kernels.laws import random_case

pytest.importorskip("triton")
SHARDS = 3
"""Processes that share the cells, so that two workers are busy for about as long."""


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_kernels_under_the_interpreter(shard):
    """Runs test_triton_kernels.py over every third registered cell; the first process runs what is not about one."""
    chosen = list(cells())[shard::SHARDS]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PARALM_TEST_CELLS": ",".join(chosen),
        "PARALM_TEST_REST": str(int(shard == 0)),
    }
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    tests = Path(__file__).with_name("test_triton_kernels.py")
    done = subprocess.run(
        [*command, str(tests)], env=environment, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= 10 * len(chosen), summary


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
@pytest.mark.parametrize("method", ["triton", "triton-walk", "triton-tile", "triton-segments"])
def test_a_cpu_is_refused_in_one_line(method):
    case = random_case(ParaGRU(), time=3)
    with pytest.raises(ArgumentError) as caught:
        solve(case.cell, case.inputs, case.params, method=method)
    assert str(caught.value).startswith("method 'triton' needs a GPU but inputs are on cpu; use method='auto', or set")
    assert "\n" not in str(caught.value)


def test_auto_on_a_cpu_never_takes_the_kernels(monkeypatch):
    case = random_case(ParaGRU(), time=3)
    assert solve(case.cell, case.inputs, case.params).info.method == "sequential"


def test_without_triton_the_method_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "paralm_kernels.triton_solver", None)
    monkeypatch.delattr("paralm_kernels.triton_solver", raising=False)
    case = random_case(ParaGRU(), time=3)
    with pytest.raises(ArgumentError, match="method 'triton' needs the package triton"):
        solve(case.cell, case.inputs, case.params, method="triton")


class Wide(Cell):
    """Every elementwise function once."""

    name = "wide"
    state = ("h",)
    inputs = ("x",)
    params = ("a",)

    def step(self, state, inputs, params):
        (h,), (x,), (a,) = state, inputs, params
        u = torch.log1p(x * x) * torch.erf(a * h) + torch.expm1(-torch.abs(x)) * torch.sin(h)
        v = torch.sqrt(1 + h * h) - torch.rsqrt(2 + x * x) + torch.cos(a * h) * torch.log(2 + x * x)
        w = torch.maximum(torch.minimum(u, v), torch.tanh(x)) / (1.5 + torch.sigmoid(h))
        return (torch.where((x > 0) & ~(h > 0.1), w, torch.exp(-w * w)) + torch.sign(h) * (1 + h * h) ** 1.7,)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
@pytest.mark.parametrize("target", ["cuda", "hip"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_every_function_of_a_step_compiles_for_both_vendors(target, dtype):
    """From no vendor's library in float32; the decode kernel runs each once."""
    import triton
    from paralm_kernels.triton_solver import default_launches
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = {"cuda": "sm_90", "hip": "gfx942"}[target]
    every = default_launches(Wide(), (dtype,))
    (launch,) = [each for each in every if each.name.startswith("decode_kernel") and name in each.targets]
    source = ASTSource(launch.function, launch.signature, launch.constexprs)
    where = GPUTarget("cuda", 90, 32) if target == "cuda" else GPUTarget("hip", "gfx942", 64)
    compiled = triton.compile(source, target=where, options={"num_warps": launch.num_warps})
    assert compiled.asm["cubin" if target == "cuda" else "hsaco"]
