"""Compiles every kernel of every registered cell for the GPUs they are meant for; needs none of them.

    python -m paralm_kernels.compiled [--target sm_90 ...] [--cell paragru ...] [--dtype bf16 ...]

Prints what each kernel takes of registers and shared memory, and what it spills: registers kept in memory instead, the
quiet way for a kernel to be slow. Whatever spills, takes more shared memory than a block may have there, or does not
compile, is named and the exit code is 1.

NVIDIA: `cuobjdump --dump-resource-usage` (it comes with Triton) of the cubin; STACK and LOCAL are bytes per thread in
memory, and these kernels have no other use for it than spills. AMD: the counts that the assembler leaves in the code
object's metadata.

With --record FILE a kernel that the file knows by its fingerprint (the source with all it calls, the constants, the
target, Triton's version) is not compiled again, but for a sixteenth of them (of float32's a sixty-fourth), which must
come out as recorded; --update writes its rows anew.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .cell import Cell, cells
from .cell_library.linear import DiagonalScan, matrix_scan_cell
from .errors import ArgumentError

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
"""Triton's (backend, architecture, threads of a warp)."""

SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a block may have: Triton refuses to launch what takes more."""

DTYPES = ("fp16", "bf16", "fp32", "fp64")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of one target. registers: per thread. spills: bytes per thread on NVIDIA, registers on AMD.
    shared: bytes per block. error: why it did not compile, or empty."""

    cell: str
    kernel: str
    target: str
    warps: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str = ""
    fingerprint: str = ""

    @property
    def wrong(self) -> str:
        """What is wrong with it, or empty."""
        if self.error or self.spills:
            return self.error or f"spills {self.spills}"
        most = SHARED[self.target]
        return f"takes {self.shared} bytes of shared memory, there are {most}" if self.shared > most else ""

    @property
    def ok(self) -> bool:
        return not self.wrong


WRITTEN: dict[str, str] = {
    "chunkwise": "triton_chunkwise_shapes",
    "conv": "triton_conv",
    "dense_rnn": "triton_dense",
    "norm": "triton_norm",
}
"""Kernels that are written, not generated: a name → the module of this package whose `default_launches(dtypes)` lists
their default configurations as `triton_launch.Launch`."""


def checked_cells() -> dict[str, Cell]:
    """The registered cells and the public scans, by name."""
    scans = (DiagonalScan(), matrix_scan_cell(2))
    return {**cells(), **{cell.name: cell for cell in scans}}


def fingerprint(launch: Any, target: str) -> str:
    """Of everything a compilation depends on; 16 hexadecimal digits."""
    import triton

    constexprs = {name: repr(value) for name, value in sorted(launch.constexprs.items())}
    options: list[Any] = [launch.num_warps, launch.num_stages, sorted(launch.aligned), TARGETS[target]]
    options += [triton.__version__, *([launch.maxnreg] if launch.maxnreg else [])]
    parts = [launch.function.cache_key, launch.signature, constexprs, options]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


Record = Mapping[str, Usage]
"""What was compiled before, by fingerprint."""


def read_record(path: Path) -> dict[str, Usage]:
    """A file that :func:`write_record` wrote; empty if there is none."""
    return {usage.fingerprint: usage for usage in _rows(path)}


def _rows(path: Path) -> list[Usage]:
    """Some have the same fingerprint: kernels that see nothing of a cell or of a dtype."""
    return [Usage(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def write_record(path: Path, usages: Iterable[Usage]) -> None:
    """A JSON list, a row a line, of what is as it should be."""
    rows = [json.dumps({k: v for k, v in asdict(u).items() if k not in ("seconds", "error")}) for u in usages if u.ok]
    path.write_text("[\n" + ",\n".join(sorted(rows)) + "\n]\n", encoding="utf-8")


def checked(cell: str, launch: Any, target: str, record: Record) -> Usage:
    """From the record where it knows the launch; a sixteenth of it is compiled nevertheless, of float32's a
    sixty-fourth: they differ from bfloat16's in loads, stores and products only."""
    known = record.get(fingerprint(launch, target))
    if known is not None:  # perhaps by another name: some kernels see nothing of the inputs' dtype
        known = replace(known, cell=cell, kernel=launch.name)
    if known is not None and int(known.fingerprint[:2], 16) >= (4 if launch.name.endswith(" fp32") else 16):
        return known
    usage = compile_launch(cell, launch, target)
    if known is not None and usage.ok and replace(usage, seconds=0.0) != known:
        return replace(usage, error="not as recorded; write the record anew with --update")
    return usage


def compile_launch(cell: str, launch: Any, target: str) -> Usage:
    """Compiles one launch (see `triton_solver.Launch`) for a target; a failure to compile is in the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    blank = Usage(cell, launch.name, target, launch.num_warps, fingerprint=fingerprint(launch, target))
    start = time.perf_counter()
    try:
        names = launch.function.arg_names
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
        source = ASTSource(launch.function, dict(launch.signature), dict(launch.constexprs), aligned)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        if launch.maxnreg is not None:
            options["maxnreg"] = launch.maxnreg
        built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        read = _amd if "amdgcn" in built.asm else _nvidia
        usage = read(built.asm)
    except Exception as error:  # any failure is a row of the table, and the exit code
        last = (str(error).strip() or "no message").splitlines()[-1]
        return replace(blank, error=f"{type(error).__name__}: {last}")
    registers, spills = usage
    return replace(
        blank,
        registers=registers,
        spills=spills,
        shared=int(built.metadata.shared),
        seconds=time.perf_counter() - start,
    )


def _nvidia(asm: dict[str, Any]) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read_resource_usage(text)


def read_resource_usage(text: str) -> tuple[int, int]:
    """Registers and spills in what cuobjdump prints of one kernel."""
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if len(found) != 3:
        raise ArgumentError(f"cuobjdump's resource usage has no REG, STACK and LOCAL: {text.strip()[:200]!r}")
    return found["REG"], max(found["STACK"], found["LOCAL"])


def _amd(asm: dict[str, Any]) -> tuple[int, int]:
    return read_metadata(asm["amdgcn"])


def read_metadata(text: str) -> tuple[int, int]:
    """Registers and spills in the metadata of one AMD code object. Scratch memory of a kernel that spills no vector
    register is counted in registers of four bytes."""
    pattern = r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)"
    found = {key: int(value) for key, value in re.findall(pattern, text, re.MULTILINE)}
    if len(found) != 3:
        raise ArgumentError("the AMD code object's metadata has no vgpr_count, vgpr_spill_count and scratch size")
    spills = max(found["vgpr_spill_count"], -(-found["private_segment_fixed_size"] // 4))
    return found["vgpr_count"], spills


def compile_cell(name: str, target: str, dtypes: Sequence[str], record: Record | None = None) -> list[Usage]:
    """Every kernel of a cell, or of an entry of WRITTEN, in its default configurations, for inputs of these dtypes."""
    if name in WRITTEN:
        launches = importlib.import_module(f".{WRITTEN[name]}", __package__).default_launches(dtypes)
    else:
        from .triton_solver import default_launches

        launches = default_launches(checked_cells()[name], dtypes)
    meant = (launch for launch in launches if not launch.targets or target in launch.targets)
    return [checked(name, launch, target, record or {}) for launch in meant]


def compile_all(
    names: Sequence[str], targets: Sequence[str], dtypes: Sequence[str], jobs: int = 1, record: Record | None = None
) -> list[Usage]:
    """Every cell for every target, in that many processes."""
    tasks = [(name, target, dtypes, record) for name in names for target in targets]
    if jobs == 1:
        return [usage for task in tasks for usage in compile_cell(*task)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return [usage for done in pool.map(compile_cell, *zip(*tasks, strict=True)) for usage in done]


def table(usages: Iterable[Usage]) -> str:
    """Readable rows, one per kernel and target."""
    head = ("cell", "kernel", "target", "warps", "registers", "spills", "shared", "seconds")
    rows = [head]
    for usage in usages:
        start = (usage.cell, usage.kernel, usage.target, str(usage.warps))
        numbers = (str(usage.registers), str(usage.spills), str(usage.shared), f"{usage.seconds:.2f}")
        rows.append((*start, *(numbers if not usage.error else ("–", "–", "–", usage.error))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    return "\n".join("  ".join([*(x.ljust(w) for x, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)


def report(usages: Sequence[Usage]) -> int:
    """Prints the table and what is wrong; the exit code."""
    print(table(usages))
    bad = [usage for usage in usages if not usage.ok]
    for usage in bad:
        print(f"{usage.cell}: {usage.kernel} for {usage.target}: {usage.wrong}", file=sys.stderr)
    fresh = sum(usage.seconds > 0 for usage in usages)
    print(f"{len(usages)} kernels, {fresh} of them compiled now; {len(bad)} not as they should be")
    return 1 if bad or not usages else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("paralm_kernels.compiled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--cell", action="append", choices=[*checked_cells(), *WRITTEN], help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="of the inputs; default: bf16 and fp32")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--record", type=Path, help="JSON of what compiled before, which is not compiled again")
    parser.add_argument("--update", action="store_true", help="compile what is chosen, write its rows of --record anew")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: Triton would interpret instead of compiling; unset it")
    names, targets = options.cell or [*checked_cells(), *WRITTEN], options.target or list(TARGETS)
    if options.update and not options.record:
        parser.error("--update needs --record FILE, the file to write")
    record = read_record(options.record) if options.record and not options.update else None
    dtypes = options.dtype or ["bf16", "fp32"]
    usages = compile_all(names, targets, dtypes, max(1, options.jobs), record)
    if options.update:

        def chosen(u: Usage) -> bool:
            return u.cell in names and u.target in targets and u.kernel.endswith(tuple(dtypes))

        kept = [u for u in _rows(options.record) if not chosen(u)]
        write_record(options.record, [*kept, *usages])
    return report(usages)


if __name__ == "__main__":
    sys.exit(main())
