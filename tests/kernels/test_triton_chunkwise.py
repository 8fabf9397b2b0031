"""chunkwise's fused kernels: their tests under Triton's interpreter, in a process of their own; and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paralm_kernels import ArgumentError, chunkwise, chunkwise_torch, dry_run

from .test_chunkwise import Case

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_under_the_interpreter():
    """Runs test_triton_chunkwise_kernels.py, test_triton_conv_kernels.py and test_triton_norm_kernels.py."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    tests = [str(Path(__file__).with_name(f"test_triton_{name}_kernels.py")) for name in ("chunkwise", "conv", "norm")]
    done = subprocess.run([*command, *tests], env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= 40 + 28 + 34, summary


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_a_cpu_is_refused_in_one_line():
    case = Case(False)
    with pytest.raises(ArgumentError) as caught:
        chunkwise(*case.inputs, method="triton")
    assert str(caught.value).startswith("method 'triton' needs a GPU but inputs are on cpu; use method='auto'")
    assert "\n" not in str(caught.value)


def test_a_segment_has_no_more_chunks_than_a_grid_takes():
    """A small state over a million steps."""
    from paralm_kernels import triton_chunkwise

    x, gate, state = (torch.empty(1, *shape, device="meta") for shape in ((1 << 20, 1, 16), (1 << 20, 1), (1, 16, 16)))
    plan = chunkwise_torch.Plan(False, 16, 1e-6, torch.float32)
    segments = triton_chunkwise.Problem(plan, None, (x, x, x, gate, gate, state)).segments()
    assert segments == [(0, 65535 * 16), (65535 * 16, 1 << 20)]


@pytest.mark.parametrize(("given", "taken"), [(1, 16), (24, 16), (64, 64), (100, 128), (1000, 256), (None, 64)])
def test_auto_takes_the_nearest_chunk_of_the_kernels(given, taken):
    """Another chunk_size is no reason to leave them for torch, which is many times slower on a GPU; none is theirs."""
    case, states = Case(False, time=2000, dtype=torch.float32), []
    with dry_run(lambda name, tensors, _: states.extend(tensors if name == "states_kernel" else ())):
        chunkwise(*(x.to("meta") for x in case.inputs), chunk_size=given)
    assert (8, -(-2000 // taken), 5, 4) in [tuple(x.shape) for x in states]


@pytest.mark.parametrize(
    ("d_k", "d_v", "shared", "time", "chunk"),
    [
        (128, 64, 64, 4096, 256),
        (256, 512, 1, 4096, 256),
        (64, 64, 1, 4096, 128),
        (5, 4, 1, 4096, 64),
        (256, 512, 1, 9, 64),
    ],
)
def test_the_chunk_follows_from_what_is_multiplied_and_moved(d_k, d_v, shared, time, chunk):
    """Wide states, many bytes for each chunk, take long chunks, but not beyond the text."""
    from paralm_kernels.triton_chunkwise_shapes import fastest_chunk

    assert fastest_chunk(d_k, d_v, shared, time) == chunk


def test_without_triton_the_method_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "paralm_kernels.triton_chunkwise", None)
    monkeypatch.delattr("paralm_kernels.triton_chunkwise", raising=False)
    with pytest.raises(ArgumentError, match="method 'triton' needs the package triton"):
        chunkwise(*Case(False).inputs, method="triton")
