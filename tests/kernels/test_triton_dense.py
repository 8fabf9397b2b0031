"""The dense recurrences' kernels: their tests under Triton's interpreter in a process of their own, and refusals."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paralm_kernels import ArgumentError, dense_rnn, dry_run
from paralm_kernels.dense_cells import KINDS

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "tests"), [("test_triton_dense_kernels.py", 40), ("test_triton_dense_wide_kernels.py", 20)]
)
def test_kernels_under_the_interpreter(file, tests):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(file))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= tests, summary


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_a_cpu_is_refused_in_one_line():
    inputs, weight = torch.zeros(1, 2, 4, 1, 8), torch.zeros(4, 1, 8, 8)
    with pytest.raises(ArgumentError) as caught:
        dense_rnn("lstm", inputs.requires_grad_(), weight, method="triton")
    assert str(caught.value).startswith("method 'triton' needs a GPU but inputs are on cpu; use method='auto'")
    assert "\n" not in str(caught.value)


L40S = 101376
"""Bytes of shared memory that a program has there, and on an A10, L4 or RTX."""


def told_for(kind, dtype, d_head, heads=1, batch=2):
    """The kernels that "auto" would launch on a GPU, forward."""
    gates = len(KINDS[kind].gates)
    shapes = ((batch, 3, gates, heads, d_head), (gates, heads, d_head, d_head))
    told = []
    with dry_run(lambda name, tensors, pointwise: told.append(name)):
        dense_rnn(kind, *(torch.empty(*shape, device="meta", dtype=dtype) for shape in shapes))
    return told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 128), (torch.float32, 64)], ids=["bf16", "fp32"])
def test_auto_takes_many_multiprocessors_where_one_has_less_shared_memory(kind, dtype, most, monkeypatch):
    from paralm_kernels import triton_dense, triton_dense_wide

    monkeypatch.setattr(triton_dense, "_room", lambda device: L40S, raising=False)
    monkeypatch.setattr(triton_dense_wide, "chip", lambda device: triton_dense_wide.Chip(142, L40S))
    assert told_for(kind, dtype, most) == ["forward_kernel"] * (kind == "elman"), "large heads are asked for by name"
    monkeypatch.setattr(triton_dense_wide, "AUTO", True)
    assert told_for(kind, dtype, most) == ["forward_kernel" if kind == "elman" else "wide_forward_kernel"]
    assert told_for(kind, dtype, most // 2) == ["forward_kernel"]


@pytest.mark.parametrize(
    ("kind", "dtype", "d_head", "heads", "batch", "launches"),
    [
        ("lstm", torch.bfloat16, 1536, 1, 16, 1),
        ("lstm", torch.bfloat16, 2048, 1, 16, 1),  # part of R in registers
        ("lstm", torch.bfloat16, 2064, 1, 16, 0),  # R does not fit
        ("gru", torch.bfloat16, 2112, 1, 1, 1),
        ("lstm", torch.float32, 768, 1, 4, 1),
        ("lstm", torch.float32, 784, 1, 4, 0),
        ("slstm", torch.bfloat16, 256, 16, 16, 1),
        ("lstm", torch.bfloat16, 1024, 1, 256, 4),
        ("lstm", torch.bfloat16, 1024, 1, 257, 0),  # five rounds: the loop is likely faster
        ("lstm", torch.float64, 256, 1, 1, 0),
    ],
)
def test_what_auto_takes_of_an_h100(kind, dtype, d_head, heads, batch, launches, monkeypatch):
    from paralm_kernels import triton_dense_wide

    monkeypatch.setattr(triton_dense_wide, "_HELD", 4)  # as with Triton 3.7
    triton_dense_wide.sizes.cache_clear()
    assert told_for(kind, dtype, d_head, heads, batch) == []
    monkeypatch.setattr(triton_dense_wide, "AUTO", True)
    assert told_for(kind, dtype, d_head, heads, batch) == ["wide_forward_kernel"] * launches


def test_another_triton_is_not_asked_to_hold_tiles_in_registers(monkeypatch):
    from paralm_kernels import triton_dense_wide as wide

    monkeypatch.setattr(wide, "_HELD", 0)
    wide.sizes.cache_clear()
    assert (wide.largest("lstm", 2, wide.H100), wide.largest("gru", 2, wide.H100)) == (1536, 2112)
    wide.sizes.cache_clear()


def test_a_large_head_backward_is_told_too(monkeypatch):
    from paralm_kernels import triton_dense_wide

    monkeypatch.setattr(triton_dense_wide, "AUTO", True)
    inputs, weight = (torch.empty(*s, 256, device="meta", requires_grad=True) for s in ((2, 300, 3, 1), (3, 1, 256)))
    told = []
    with dry_run(lambda name, tensors, pointwise: told.append(name)):
        dense_rnn("gru", inputs, weight)[0].sum().backward()
    assert told == ["wide_forward_kernel", "wide_backward_kernel", "wide_backward_kernel"]  # two pieces of 256 steps


def test_programs_that_wait_for_each_other_are_all_on_the_device():
    """Of every size: never more than it has multiprocessors, nor more shared memory; every column and pair once."""
    from paralm_kernels import triton_dense_wide as wide

    chips = [wide.H100, wide.Chip(108, 166_912), wide.Chip(142, L40S), wide.Chip(14, 232_448)]
    for on, kind, d_head, pairs in itertools.product(chips, KINDS, (129, 300, 768, 1024), ((1, 1), (3, 40), (16, 200))):
        for itemsize, backward in itertools.product((2, 4), (False, True)):
            one = wide.sizes(kind, backward, d_head, *pairs, itemsize, on)
            if one is None:
                continue
            assert one.programs * one.pairs <= on.multiprocessors
            assert one.shared <= on.shared
            assert (one.programs - 1) * one.block_n < d_head <= one.programs * one.block_n
            assert d_head <= wide.SPLIT * (one.block_k * one.chunks + 16 * one.held)
            assert one.launches == -(-pairs[0] * -(-pairs[1] // one.block_b) // one.pairs)
            assert one.chunks * (KINDS[kind].recurrent if backward else 1) % one.stage == 0


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


@pytest.mark.parametrize("given", ["bf16", "fp32"])
def test_the_shared_memory_that_large_heads_are_thought_to_take_is_what_they_take(given):
    """At most it in float32, which goes through registers, and on AMD's, where R does."""
    from paralm_kernels import triton_dense_wide as wide

    rows = json.loads(Path(__file__).with_name("compiled.json").read_text(encoding="utf-8"))
    taken = {(row["kernel"], row["target"]): row["shared"] for row in rows if row["kernel"].startswith("wide_")}
    expected = list(wide.checked(given))
    assert {(target, kind) for target, kind, *_ in expected} == set(itertools.product(wide._CHIPS, KINDS))
    assert given == "fp32" or any(one.held for *_, one in expected)
    for target, kind, backward, d_head, one in expected:
        shared = taken[f"wide_{'backward' if backward else 'forward'}_kernel {kind} {d_head} {given}", target]
        assert shared <= one.shared, (target, kind, backward, d_head)
        assert shared == one.shared or given == "fp32" or target == "gfx942", (target, kind, backward, d_head)


def test_a_head_too_large_for_the_device_is_refused_in_one_line(monkeypatch):
    from paralm_kernels import triton_dense

    monkeypatch.setattr(triton_dense, "check_device", lambda device: None)
    monkeypatch.setattr(triton_dense.triton_dense_wide, "_HELD", 4)  # as with Triton 3.7
    triton_dense.triton_dense_wide.sizes.cache_clear()
    inputs, weight = (torch.zeros(*s, 2304, dtype=torch.bfloat16) for s in ((1, 2, 4, 1), (4, 1, 2304)))
    with pytest.raises(ArgumentError) as caught:
        dense_rnn("lstm", inputs, weight.requires_grad_(), method="triton")
    text = str(caught.value)
    assert "\n" not in text
    for part in ("'lstm'", "torch.bfloat16", "d_head up to 2048", "132 multiprocessors", "got 2304", "method='auto'"):
        assert part in text


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_barrier_that_is_compiled_orders_what_programs_exchange(backward):
    """What no run under the interpreter can show: one thread acquires, all its program's then read past the first
    cache; all have written before one releases."""
    import triton
    from paralm_kernels import triton_dense_wide as wide
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = f"wide_{'backward' if backward else 'forward'}_kernel elman 1024 bf16"
    launch = next(x for x in wide.default_launches("bf16") if x.name == name and x.targets == ("sm_90",))
    aligned = {(launch.function.arg_names.index(at),): [["tt.divisibility", 16]] for at in launch.aligned}
    source = ASTSource(launch.function, dict(launch.signature), dict(launch.constexprs), aligned)
    options = {"num_warps": launch.num_warps, "num_stages": 1}
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    loop = text[text.index("Loop Header") :]
    kinds = {
        "acquire": r"(?:ld|atom)\.global\.gpu\.acquire",
        "together": r"bar\.sync",
        "read": r"ld\.global\.cg",
        "write": r"st\.global",
        "release": r"(?:red|atom)\.global\.gpu\.release",
    }
    found = re.findall("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in kinds.items()), loop)
    events = [next(kind for kind, match in zip(kinds, groups, strict=True) if match) for groups in found]
    events = [kind for kind, _ in itertools.groupby(events)]
    step = events[events.index("acquire") : events.index("release") + 1]
    assert step[:3] == ["acquire", "together", "read"]
    assert step[-3:] == ["write", "together", "release"]
    assert step.count("write") == 1
    assert "read" not in events[: events.index("acquire")] + events[events.index("release") :]
