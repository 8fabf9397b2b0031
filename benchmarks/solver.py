"""How fast is the solver, and how near to the least time its bytes can take? Forward and backward, beside its peers.

    python benchmarks/gpu_solver.py                      all of it, on a GPU (make gpu-check)
    python benchmarks/gpu_solver.py --only ours          in parts, where a machine is lent for minutes: ours, loop, ...
    python benchmarks/solver.py --device cpu             tiny shapes, to see that it runs

ParaGRU and ParaLSTM in bf16 over the shapes of SHAPES: a case that forgets (|a| ≤ 0.5, gate bias 0) and one that
remembers (bias −6), by every method. "floor" is the time a plain copy, measured here, takes for the bytes that must
move: forward inputs in and states out, backward inputs, states and the cotangent in, gradients out. Every row is a
number or the error with which it failed; each group runs in a process of its own, so that a crash costs no other.
Every shape is warmed first, inputs take turns. Times are the GPU's, with the host ahead of it (timing.sample); "host
ms" is what issuing a call takes the host. Writes benchmarks/results/solver_DEVICE.json (or that file under $OUT), with
--only PART solver_DEVICE_PART.json, after every group: commit, device, clocks, raw samples.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]

import torch  # noqa: E402
from support import timing  # noqa: E402
from support.peers import LINEAR_SCANS, PEERS, Built, Shape, projected  # noqa: E402

SHAPES: list[Shape] = [(8, 2048, 4096), (32, 512, 2048), (1, 65536, 4096), (1, 1048576, 1024)]
TINY: list[Shape] = [(2, 64, 16), (1, 256, 8)]
LOOP = 512
"""Steps at which the naive loop is compared."""
CELLS = ("paragru", "paralstm")
METHODS = {
    "cuda": ["auto", "triton-walk", "triton-tile", "triton-segments"],
    "cpu": ["auto", "sequential", "newton"],
}
TARGETS = {"forward": 0.75, "backward": 0.60}
"""Fractions of copy bandwidth to reach on an H100 where the cell forgets."""
_ROTATION = 8 << 30
"""Bytes of inputs that may take turns."""


def dtype_of(device: str) -> torch.dtype:
    """bf16 on a GPU; float32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def case_inputs(cell: Any, shape: Shape, bias: float, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs (batch, time, channel) and parameters in ±0.5. bias: of the update gate; for ParaLSTM's first gate, which
    forgets where ParaGRU's updates, with the opposite sign."""
    inputs = [torch.randn(shape, device=device, dtype=dtype_of(device)) for _ in cell.inputs]
    inputs[0] += bias if cell.name == "paragru" else -bias
    return inputs, [torch.rand(shape[2], device=device) - 0.5 for _ in cell.params]


def bytes_to_move(cell: Any, shape: Shape, size: int) -> dict[str, int]:
    """What each pass has to read and write once; the cotangent is of the last component alone."""
    numbers = shape[0] * shape[1] * shape[2]
    inputs, states = len(cell.inputs), len(cell.state)
    return {
        "forward": (inputs + states) * numbers * size,
        "backward": (inputs + states + 1 + inputs) * numbers * size,
    }


def ours(cell_name: str, shape: Shape, bias: float, method: str, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of one cell, shape and method: forward under no_grad, then backward alone."""
    from paralm_kernels import get_cell, solve

    cell, device = get_cell(cell_name), options.device
    dtype = dtype_of(device)
    moved = bytes_to_move(cell, shape, dtype.itemsize)
    turns = max(1, min(4, _ROTATION // moved["backward"]))
    sets = [case_inputs(cell, shape, bias, device) for _ in range(turns)]
    info: dict[str, Any] = {}

    def forward(i: int) -> Callable[[], Any]:
        inputs, params = sets[i % turns]

        def run() -> None:
            with torch.no_grad():
                info["last"] = solve(cell, inputs, params, method=method).info

        return run

    cotangent = torch.randn(shape, device=device, dtype=dtype)

    def backward(i: int) -> Callable[[], Any]:
        inputs, params = ([x.detach().requires_grad_() for x in group] for group in sets[i % turns])
        h = solve(cell, inputs, params, method=method).states[-1]
        return lambda: torch.autograd.grad(h, [*inputs, *params], cotangent)

    label = {"cell": cell_name, "shape": shape, "method": method, "bias": bias, "kind": "ours"}
    for name, prepare in (("forward", forward), ("backward", backward)):
        yield measured({**label, "pass": name, "bytes": moved[name]}, prepare, options)
    last = info.get("last")
    if last is not None:
        details = {key: _plain(value) for key, value in vars(last).items()}
        yield {**label, "pass": "info", "info": details}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value if isinstance(value, int | float | str) else str(value)


def built(label: dict[str, Any], make: Callable[[], Built], options: argparse.Namespace) -> Iterator[dict]:
    """Rows of something that `make` builds: forward under no_grad, then backward alone."""
    moves = label.pop("moves", {})
    try:
        call, leaves = make()
        cotangent = torch.randn_like(call().detach())
    except Exception as error:  # a peer that cannot be imported or run is a row
        for name in ("forward", "backward"):
            yield {**label, "pass": name, "error": timing.failure(error)}
        return

    def forward(_: int) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                call()

        return run

    def backward(_: int) -> Callable[[], Any]:
        y = call()
        return lambda: torch.autograd.grad(y, leaves, cotangent, allow_unused=True)

    for name, prepare in (("forward", forward), ("backward", backward)):
        known = {"bytes": moves[name]} if name in moves else {}
        yield measured({**label, **known, "pass": name}, prepare, options)


def measured(label: dict[str, Any], prepare: Callable[[int], Any], options: argparse.Namespace) -> dict[str, Any]:
    """The row of one measurement: its samples, or its error."""
    try:
        values = timing.samples(prepare, options.device, warm=options.warm, runs=options.runs, seconds=options.seconds)
        return {**label, "samples": values, "host_seconds": timing.host_seconds(prepare, options.device)}
    except Exception as error:  # an error is a row
        return {**label, "error": timing.failure(error)}


def our_layer(cell_name: str, shape: Shape, options: argparse.Namespace) -> Built:
    """Ours with a Linear(C, 3C) before it, as the peers' layers have."""
    from paralm_kernels import get_cell, solve

    cell, device, dtype = get_cell(cell_name), options.device, dtype_of(options.device)
    channels, count = shape[2], len(cell.inputs)
    layer = torch.nn.Linear(channels, count * channels, device=device, dtype=dtype)
    params = [(torch.rand(channels, device=device) - 0.5).requires_grad_() for _ in cell.params]
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    call, leaves = projected(x, layer, lambda x: solve(cell, layer(x).chunk(count, -1), params).states[-1])
    return call, [*leaves, *params]


def naive_loop(cell_name: str, shape: Shape, options: argparse.Namespace) -> Iterator[dict]:
    """The loop over `Cell.step`, forward, at 512 steps, and our methods at the same shape."""
    from paralm_kernels import get_cell
    from paralm_kernels.laws import plain_loop

    cell = get_cell(cell_name)
    inputs, params = case_inputs(cell, shape, 0.0, options.device)
    wide = [x.float() for x in inputs]
    zero = tuple(torch.zeros(shape[0], shape[2], device=options.device) for _ in cell.state)

    def prepare(_: int) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                plain_loop(cell, tuple(wide), tuple(params), zero, None)

        return run

    label = {"cell": cell_name, "shape": shape, "method": "naive loop", "bias": 0.0, "kind": "loop"}
    yield measured({**label, "pass": "forward"}, prepare, options)
    for method in METHODS[options.device]:
        for row in ours(cell_name, shape, 0.0, method, options):
            yield {**row, "kind": "loop"}


def group_rows(group: str, options: argparse.Namespace) -> Iterator[dict]:
    """All rows of a group: "ours:INDEX", "loop", "layers" or "peer:NAME"."""
    kind, _, rest = group.partition(":")
    shapes = options.shapes
    if kind == "ours":
        for cell in CELLS:
            for bias in (0.0, -6.0):
                for method in METHODS[options.device]:
                    yield from guarded(ours(cell, shapes[int(rest)], bias, method, options), cell, method)
                    release(options)
    elif kind == "loop":
        shape = (32, LOOP, 2048) if options.device == "cuda" else (2, 32, 16)
        for cell in CELLS:
            yield from guarded(naive_loop(cell, shape, options), cell, "naive loop")
    elif kind == "layers":
        for cell in CELLS:
            for shape in shapes:
                label = {"kind": "peer", "name": f"paralm {cell}, with projection", "shape": shape}
                yield from built(label, partial(our_layer, cell, shape, options), options)
                release(options)
    elif kind == "peer":
        for shape in shapes:
            dtype = dtype_of(options.device)
            label = {"kind": "peer", "name": rest, "shape": shape}
            if rest in LINEAR_SCANS:  # a, b in and h out; a, h and the cotangent in, two gradients out
                size = shape[0] * shape[1] * shape[2] * dtype.itemsize
                label["moves"] = {"forward": 3 * size, "backward": 5 * size}
            yield from built(label, partial(PEERS[rest], shape, dtype, options.device), options)
            release(options)


def guarded(rows: Iterator[dict], cell: str, method: str) -> Iterator[dict]:
    """The rows, and a row for what stopped them."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield {"kind": "ours", "cell": cell, "method": method, "pass": "all", "error": timing.failure(error)}


def release(options: argparse.Namespace) -> None:
    """Gives memory back between cases; a device that has failed says so in the next row."""
    if options.device == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(timing.failure(error), file=sys.stderr)


def run_group(group: str, options: argparse.Namespace, patience: float) -> list[dict[str, Any]]:
    """The rows of a group, from a process of its own on a GPU that may take ``patience`` seconds."""
    if options.device == "cpu":
        return list(group_rows(group, options))
    command = [sys.executable, str(HERE / "solver.py"), *sys.argv[1:], f"--group={group}", "--device=cuda"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
        text, problem = done.stdout, "" if done.returncode == 0 else f"exit {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        problem = f"took more than {patience:.0f} s"
    rows = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]
    if problem:
        rows.append({"kind": "group", "name": group, "pass": "all", "error": problem})
    return rows


def groups(options: argparse.Namespace) -> list[str]:
    """Names of everything to run."""
    return [
        *(f"ours:{i}" for i in range(len(options.shapes))),
        "loop",
        "layers",
        *(f"peer:{name}" for name in PEERS),
    ]


def report(rows: list[dict[str, Any]], bandwidth: float, targets: bool) -> str:
    """The table: median, quantiles, GB/s and the fraction of copy bandwidth, or the error; and the targets."""
    lines = [f"copy bandwidth {bandwidth / 1e9:.0f} GB/s", ""]
    head = f"{'what':<58}{'shape':<20}{'pass':<10}{'median ms':>10}{'q10':>9}{'q90':>9}{'host ms':>9}{'GB/s':>8}"
    head += f"{'of copy':>9}"
    lines.append(head)
    for row in rows:
        if row["pass"] == "info":
            continue
        what = row.get("name") or f"{row['kind']} {row.get('cell')} {row.get('method')} bias {row.get('bias', 0):g}"
        start = f"{what:<58}{'×'.join(map(str, row.get('shape', ()))):<20}{row['pass']:<10}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        numbers = timing.summary(row["samples"])
        text = start + f"{numbers['median'] * 1e3:>10.3f}{numbers['q10'] * 1e3:>9.3f}{numbers['q90'] * 1e3:>9.3f}"
        text += f"{row['host_seconds'] * 1e3:>9.3f}"
        if "bytes" in row:
            rate = row["bytes"] / numbers["median"]
            text += f"{rate / 1e9:>8.0f}{rate / bandwidth:>9.2f}"
        lines.append(text)
    return "\n".join([*lines, "", *speedups(rows), *(verdicts(rows, bandwidth) if targets else ())])


def speedups(rows: list[dict[str, Any]]) -> list[str]:
    """Over the naive loop, and over the fused walk."""
    lines = []
    for cell in CELLS:
        medians = {
            row["method"]: statistics.median(row["samples"])
            for row in rows
            if row["kind"] == "loop" and row.get("cell") == cell and row["pass"] == "forward" and "samples" in row
        }
        for other in ("naive loop", "triton-walk"):
            if other in medians and "auto" in medians:
                ratio = medians[other] / medians["auto"]
                lines.append(f"{cell}: {ratio:.1f} times as fast as the {other}, forward, at the loop's shape")
    return lines


def verdicts(rows: list[dict[str, Any]], bandwidth: float) -> list[str]:
    """Every target, met or not, for method "auto" on cells that forget."""
    lines = []
    for row in rows:
        if row["kind"] == "ours" and row.get("method") == "auto" and row.get("bias") == 0.0 and "samples" in row:
            fraction = row["bytes"] / statistics.median(row["samples"]) / bandwidth
            target = TARGETS[row["pass"]]
            word = "met" if fraction >= target else "missed"
            where = f"{row['cell']} {row['pass']} {tuple(row['shape'])}"
            lines.append(f"{where}: {fraction:.2f} of copy bandwidth, target {target:.2f} {word}")
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="run the groups whose name contains this")
    parser.add_argument("--shape", action="append", help="batch,time,channels; default: the shapes above")
    parser.add_argument("--warm", type=int, default=3, help="calls that are not counted")
    parser.add_argument("--runs", type=int, default=30, help="counted calls at most")
    parser.add_argument("--seconds", type=float, default=1.5, help="per measurement, about")
    parser.add_argument("--patience", type=float, default=400.0, help="seconds for a group's process")
    timing.add_minutes(parser)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/solver_DEVICE.json, none on a CPU")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    given = [tuple(map(int, text.split(","))) for text in options.shape or ()]
    options.shapes = given or (SHAPES if options.device == "cuda" else TINY)
    return options


def output_of(options: argparse.Namespace) -> Path | None:
    """The file to write by default: one of its own for every part."""
    if options.device == "cpu":
        return None
    part = re.sub(r"\W+", "_", f"{torch.cuda.get_device_name()} {options.only}".strip())
    return timing.results() / f"solver_{part}.json"


def write(output: Path, measured_on: dict[str, Any], rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """All rows so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": " ".join(["python", *sys.argv]), **measured_on, "dtype": str(dtype_of(options.device))}
    output.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs one group (`--group`, rows as JSON lines) or all of them; 0 unless nothing at all could be measured."""
    options = parse(arguments)
    if options.group:
        for row in group_rows(options.group, options):
            timing.emit(row)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("solver.py: torch sees no GPU here; --device cpu runs tiny shapes", file=sys.stderr)
        return 2
    budget = timing.Budget(options.minutes)
    rows: list[dict[str, Any]] = []
    try:
        bandwidth, copies = timing.copy_bandwidth(options.device, 1 << (29 if options.device == "cuda" else 18))
    except Exception as error:  # the other rows are still worth having
        bandwidth, copies = float("nan"), []
        rows.append({"kind": "group", "name": "copy bandwidth", "pass": "all", "error": timing.failure(error)})
    release(options)
    output = options.output or output_of(options)
    chosen = [group for group in groups(options) if options.only in group]
    for number, group in enumerate(chosen):
        if budget.over:
            rows.append({"kind": "group", "name": group, "pass": "all", "error": timing.NOT_MEASURED})
        else:
            print(f"… {group}", file=sys.stderr, flush=True)
            rows += run_group(group, options, min(options.patience, budget.share(len(chosen) - number)))
        if output is not None:
            copy = {"bytes_per_second": bandwidth, "samples": copies}
            write(output, {**timing.environment(options.device), "copy": copy}, rows, options)
    print(report(rows, bandwidth, targets=options.device == "cuda"))
    if output is not None:
        print(f"written: {output}")
    return 0 if any("samples" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
