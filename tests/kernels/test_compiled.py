"""Every kernel compiles for every target without a GPU and without spills; and what spills is found and named."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from paralm_kernels import ArgumentError, cells, compiled
from paralm_kernels.compiled import (
    SHARED,
    TARGETS,
    WRITTEN,
    Usage,
    main,
    read_metadata,
    read_record,
    read_resource_usage,
    report,
    table,
    write_record,
)

RECORD = Path(__file__).parent / "compiled.json"


def run(*command):
    """A process of its own: Triton decides at import whether it compiles or interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_of_every_cell_compiles_without_spills(target):
    """What tests/kernels/compiled.json knows is compiled in part only; what changed since it was written, all. It is
    written by `python -m paralm_kernels.compiled --record tests/kernels/compiled.json --update`: bfloat16 and float32
    (float16 by hand, with `--dtype fp16`)."""
    options = ("--target", target, "--jobs", "1", "--record", RECORD)
    done = run("-m", "paralm_kernels.compiled", *options)
    print(done.stdout)
    assert not re.search(r" 0 of them compiled now", done.stdout)
    assert done.returncode == 0, done.stderr
    rows = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()[1:-1]]
    names = {row[0] for row in rows}
    assert {*cells(), "diagonal_scan", "matrix_scan_2x2"} <= names
    assert set(WRITTEN) <= names
    for name, dtype in itertools.product(names - set(WRITTEN), ("bf16", "fp32")):
        kernels = " ".join(row[1] for row in rows if row[0] == name and row[1].endswith(dtype))
        for kind in ("walk", "backward", "decode"):
            assert kind in kernels, (name, dtype, kind)


SCRIPT = """
import sys
import triton
import triton.language as tl
from paralm_kernels.compiled import compile_launch, report
from paralm_kernels.triton_launch import Launch


@triton.jit
def greedy(x, y, SIZE: tl.constexpr, STEPS: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b, c = tl.load(x + at), tl.load(x + at + SIZE), tl.load(x + at + 2 * SIZE)
    for _ in range(STEPS):
        a, b, c = b * c, c + a, a - b
    tl.store(y + at, a + b + c)


@triton.jit
def broken(x, y, SIZE: tl.constexpr, STEPS: tl.constexpr):
    tl.store(x, no_such_name)


def launch(function, size):
    signature = {"x": "*fp32", "y": "*fp32", "SIZE": "constexpr", "STEPS": "constexpr"}
    constexprs = {"SIZE": size, "STEPS": 2000}
    return Launch(function.__name__, function, signature, constexprs)


target, large = sys.argv[1], int(sys.argv[2])
for function, size in ((greedy, 64), (greedy, large), (broken, 64)):
    print("exit", report([compile_launch("test", launch(function, size), target)]), flush=True)
"""


def test_of_the_recorded_a_sixteenth_is_compiled_and_must_agree(monkeypatch):
    fresh = Usage("cell", "kernel", "sm_90", 4, registers=32, seconds=1.0)
    for begin, found in (("0", fresh), ("1", None)):
        mark = begin + "f" * 15
        monkeypatch.setattr(compiled, "fingerprint", lambda *_, mark=mark: mark)
        monkeypatch.setattr(compiled, "compile_launch", lambda *_, mark=mark: replace(fresh, fingerprint=mark))
        right = replace(fresh, seconds=0.0, fingerprint=mark)
        wrong = replace(right, registers=255)
        launch, single = SimpleNamespace(name="kernel"), SimpleNamespace(name="kernel fp32")
        taken = [compiled.checked("cell", launch, "sm_90", {mark: row}) for row in (right, wrong)]
        if found is None:
            assert taken == [right, wrong]
        else:
            assert taken[0] == replace(fresh, fingerprint=mark)
            assert taken[1].error.startswith("not as recorded")
            of_single = compiled.checked("cell", single, "sm_90", {mark: wrong})
            assert of_single == replace(wrong, kernel="kernel fp32"), "of float32 fewer; the numbers of its twin"


def test_a_record_is_taken_at_its_word_but_for_a_sixteenth(tmp_path):
    fresh = tmp_path / "record.json"
    command = ("-m", "paralm_kernels.compiled", "--target", "sm_90", "--dtype", "bf16", "--cell", "diagonal_scan")
    first = run(*command, "--jobs", "1", "--record", fresh, "--update")
    assert first.returncode == 0, first.stderr
    rows = list(read_record(fresh).values())
    assert len(rows) > 2
    claimed = [replace(row, registers=255) for row in rows]
    write_record(fresh, claimed)
    assert list(read_record(fresh).values()) == claimed
    again = run(*command, "--jobs", "1", "--record", fresh)
    wrong = [row for row in rows if row.fingerprint.startswith("0")]
    assert again.stderr.count("not as recorded") == len(wrong)
    assert again.stdout.count(" 255 ") == len(rows) - len(wrong)
    strangers = [replace(row, cell="other", fingerprint="f" * 15 + str(n)) for n, row in enumerate(rows)]
    strangers.append(replace(rows[0], kernel="walk_kernel fp32", fingerprint="f" * 16))
    strangers.append(replace(strangers[0], cell="third"))  # a kernel that sees nothing of its cell
    write_record(fresh, strangers)
    done = run(*command, "--jobs", "1", "--record", fresh, "--update")
    assert f"{len(rows)} of them compiled now; 0 not" in done.stdout
    kept = [Usage(**row) for row in json.loads(fresh.read_text())]
    assert all(row in kept for row in strangers), "what was not chosen stays"
    assert sorted(row.fingerprint for row in kept) == sorted(row.fingerprint for row in (*strangers, *rows))


@pytest.mark.parametrize(("target", "large"), [("sm_90", 4096), ("gfx942", 16384)])
def test_what_spills_or_does_not_compile_is_named_and_fails(tmp_path, target, large):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(str(tmp_path / "script.py"), target, str(large))
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == ["exit 0", "exit 1", "exit 1"]
    spills, failure = done.stderr.splitlines()
    assert spills.startswith(f"test: greedy for {target}: spills ")
    assert failure.startswith(f"test: broken for {target}: ")
    assert "no_such_name" in failure


def test_the_readers_take_the_numbers_that_count():
    text = "Function k:\n  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert read_resource_usage(text) == (40, 16)
    metadata = ".private_segment_fixed_size: 0\n .vgpr_count:     10\n .vgpr_spill_count: 3\n"
    assert read_metadata(metadata) == (10, 3)
    assert read_metadata(metadata.replace("size: 0", "size: 20")) == (10, 5)
    for read in (read_resource_usage, read_metadata):
        with pytest.raises(ArgumentError):
            read("nothing of use")


def test_nothing_compiled_is_not_a_success(capsys):
    fine = Usage("cell", "kernel", "sm_90", 4, registers=32)
    assert report([fine]) == 0
    assert report([fine, Usage("cell", "other", "sm_90", 4, spills=8)]) == 1
    assert "cell: other for sm_90: spills 8" in capsys.readouterr().err
    for target, most in SHARED.items():
        assert report([replace(fine, target=target, shared=most)]) == 0
        assert report([replace(fine, target=target, shared=most + 1)]) == 1
        expected = f"cell: kernel for {target}: takes {most + 1} bytes of shared memory, there are {most}"
        assert expected in capsys.readouterr().err
    assert report([]) == 1
    assert "registers" in table([])


def test_interpreting_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as caught:
        main(["--cell", "paragru"])
    assert caught.value.code == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
