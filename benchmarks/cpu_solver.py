"""How fast is a recurrent layer on a CPU, forward and backward, input projection included?

    make bench                            (or)  .venv/bin/python benchmarks/cpu_solver.py

Every case is y = layer(x), y.backward(g), for x of (batch, time, channels) that needs a gradient, in float32: the
input projection (one Linear from channels to three times channels, or what the peer has in its place) and the
recurrence. Cases run in processes of their own and in turns, each after waiting for a quiet moment; the first runs of
a process are not counted. pararnn-torch pins triton < 3.7, so it gets an environment of its own under
.benchmark-envs/, which sees this environment's torch. Writes benchmarks/results/cpu_solver.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu_solver.json"
PEER_ENV = ROOT / ".benchmark-envs" / "pararnn-torch"
PEER_PACKAGES = ["pararnn-torch>=0.17,<0.18", "triton>=3.6,<3.7"]

OURS = "paralm ParaGRU"
PROJECTION = "projection alone"
LOOP = "ParaGRU loop, no autograd, forward only"
WALK = "paralm ParaGRU, forward only, no projection"
CASES = {
    OURS: "Linear(C, 3C) → paralm_kernels.solve",
    "paralm ParaLSTM": "Linear(C, 3C) → paralm_kernels.solve",
    "pararnn-torch ParaGRU": "its W_x = Linear(C, 3C); ParaRNN(ParaGRU), default NewtonConfig (3 iterations)",
    "pararnn-torch ParaGRU, chunk_len=64": "the same in windows of 64 steps",
    "pararnn-torch ParaLSTM": "its W_x; ParaRNN(ParaLSTM), default NewtonConfig",
    "torch.nn.GRU": "dense recurrence: a (C, 3C) matrix product each step",
    "ParaGRU, autograd through the loop": "Linear(C, 3C) → Cell.step in a Python loop",
    PROJECTION: "Linear(C, 3C), forward and backward: what every layer above pays",
    LOOP: "Cell.step in a Python loop under no_grad, no projection",
    WALK: "paralm_kernels.solve under no_grad, no projection",
}
RIVALS = [name for name in CASES if "ParaGRU" in name and name not in (OURS, LOOP, WALK)] + ["torch.nn.GRU"]


def make_case(name: str, batch: int, steps: int, channels: int) -> Callable[[], None]:
    """One run of a case; imports only what that case needs."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(batch, steps, channels, requires_grad=True)
    grad = torch.randn(batch, steps, channels)
    recurrent = [(0.5 * (2 * torch.rand(channels) - 1)).requires_grad_() for _ in range(5)]
    projection = torch.nn.Linear(channels, 3 * channels)

    def clear() -> None:
        for tensor in (x, *recurrent, *projection.parameters()):
            tensor.grad = None

    def trained(layer: Callable[[], torch.Tensor], parameters: Callable[[], Any] = tuple) -> Callable[[], None]:
        def run() -> None:
            clear()
            for parameter in parameters():
                parameter.grad = None
            layer().backward(grad)

        return run

    def inputs() -> tuple[torch.Tensor, ...]:
        return projection(x).chunk(3, -1)

    if name.startswith("pararnn-torch"):
        from pararnn import NewtonConfig, ParaGRU, ParaLSTM, ParaRNN  # type: ignore[import-not-found]

        config = NewtonConfig(chunk_len=64) if "chunk_len" in name else NewtonConfig()
        peer = ParaRNN((ParaLSTM if "LSTM" in name else ParaGRU)(channels, channels), config=config).train()
        return trained(lambda: peer(x), peer.parameters)
    if name == "torch.nn.GRU":
        dense = torch.nn.GRU(channels, channels, batch_first=True)
        return trained(lambda: dense(x)[0], dense.parameters)
    if name == PROJECTION:
        wide = torch.randn(batch, steps, 3 * channels)

        def project() -> None:
            clear()
            projection(x).backward(wide)

        return project

    from paralm_kernels import get_cell, solve
    from paralm_kernels.laws import plain_loop

    cell = get_cell("paralstm" if "LSTM" in name else "paragru")
    params = tuple(recurrent[: len(cell.params)])
    zero = tuple(torch.zeros(batch, channels) for _ in cell.state)
    if name in (LOOP, WALK):
        fixed = tuple(part.detach() for part in inputs())

        def forward() -> None:
            with torch.no_grad():
                if name == LOOP:
                    plain_loop(cell, fixed, params, zero, None)
                else:
                    solve(cell, fixed, params)

        return forward
    if name == "ParaGRU, autograd through the loop":
        return trained(lambda: plain_loop(cell, inputs(), params, zero, None)[0][-1])
    return trained(lambda: solve(cell, inputs(), params).states[-1])


def run_case(name: str, options: argparse.Namespace) -> list[float]:
    """Seconds of each run in this process, after the first ones."""
    import torch

    torch.set_num_threads(options.threads)
    run = make_case(name, options.batch, options.time, options.channels)
    samples: list[float] = []
    spent = 0.0
    for i in range(options.warm + options.runs):
        if spent > options.seconds and len(samples) >= 2:
            break
        start = time.perf_counter()
        run()
        spent += time.perf_counter() - start
        if i >= options.warm:
            samples.append(time.perf_counter() - start)
    return samples


def peer_python() -> Path:
    """The interpreter of the peer's environment, made on first use: its own triton, everything else from here."""
    python = PEER_ENV / "bin" / "python"
    ready = PEER_ENV / "ready"
    if not ready.exists():
        venv.create(PEER_ENV, with_pip=True, clear=True)
        packages = Path(subprocess.check_output([python, "-c", _PURELIB], text=True).strip())
        (packages / "zz_this_environment.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, *PEER_PACKAGES], check=True)
        ready.write_text("\n".join(PEER_PACKAGES) + "\n")
    return python


_PURELIB = "import sysconfig; print(sysconfig.get_paths()['purelib'])"


def in_a_process(name: str, options: argparse.Namespace) -> list[float]:
    """The samples of a case run in a fresh process; RuntimeError with its last line if it fails."""
    python = peer_python() if name.startswith("pararnn-torch") else Path(sys.executable)
    flags = [f"--{key}={getattr(options, key)}" for key in ("batch", "time", "channels", "threads", "runs", "seconds")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [str(python), __file__, f"--case={name}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    samples: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return samples


def wait_for_quiet(patience: float) -> float:
    """Waits until hardly anything else runs, at most `patience` seconds; returns how busy the cores were at last."""
    import psutil

    end = time.monotonic() + patience
    while True:
        busy = psutil.cpu_percent(interval=0.5) / 100
        if busy < 0.1 or time.monotonic() > end:
            return busy


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Samples of every case, in turns; a case that fails once is not tried again."""
    samples: dict[str, list[float]] = {name: [] for name in CASES}
    busy: dict[str, list[float]] = {name: [] for name in CASES}
    errors: dict[str, str] = {}
    for turn in range(options.turns):
        for name in CASES:
            if name in errors:
                continue
            print(f"\r\033[Kturn {turn + 1} of {options.turns}: {name}", end="", file=sys.stderr, flush=True)
            busy[name].append(wait_for_quiet(options.patience))
            try:
                samples[name] += in_a_process(name, options)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                errors[name] = str(error)
    print("\r\033[K", end="", file=sys.stderr)
    return {"samples": samples, "errors": errors, "busy_before": busy}


def summarise(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and smallest of each case, in seconds."""
    return {
        name: {"median": statistics.median(values), "min": min(values)} for name, values in samples.items() if values
    }


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what this was measured."""
    import torch

    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "cpu": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {"batch": options.batch, "time": options.time, "channels": options.channels},
        "threads": options.threads,
        "dtype": "float32",
    }


def report(where: dict[str, Any], table: dict[str, dict[str, float]], errors: dict[str, str]) -> str:
    """The table and what bounds it."""
    ours = table[OURS]["median"]
    shape = where["shape"]
    lines = [
        f"batch {shape['batch']}, time {shape['time']}, channels {shape['channels']}, float32, "
        f"{where['threads']} threads, {where['cpu']}, torch {where['torch']}",
        f"{'forward + backward with the input projection':<48}{'median':>10}{'min':>10}{'× ours':>9}",
    ]
    for name in CASES:
        if name in table:
            row = table[name]
            ratio = row["median"] / ours
            lines.append(f"{name:<48}{row['median'] * 1e3:>7.0f} ms{row['min'] * 1e3:>7.0f} ms{ratio:>9.2f}")
        else:
            lines.append(f"{name:<48}failed: {errors.get(name, '')}")
    rivals = {name: table[name]["median"] for name in RIVALS if name in table}
    if rivals:
        best = min(rivals, key=lambda name: rivals[name])
        lines.append(f"{rivals[best] / ours:.2f}× faster than the fastest rival, {best}")
    if PROJECTION in table and WALK in table:
        projection, walk = table[PROJECTION]["median"], table[WALK]["median"]
        rest = max(ours - projection - walk, 0.0)
        lines.append(
            f"bounded by: the projection's three matrix products {projection / ours:.0%}, the loop over time "
            f"{walk / ours:.0%} (call overhead: about ten calls a step), adjoint and autograd's joining of the three "
            f"input gradients {rest / ours:.0%} (memory traffic)"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs one case (`--case`, printing its samples as JSON) or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--time", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3, help="processes per case")
    parser.add_argument("--warm", type=int, default=2, help="runs per process that are not counted")
    parser.add_argument("--runs", type=int, default=9, help="counted runs per process")
    parser.add_argument("--seconds", type=float, default=12.0, help="no new run after so long, but at least two")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for a quiet machine, per process")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options)))
        return
    where = describe(options)
    measured = measure(options)
    table = summarise(measured["samples"])
    print(report(where, table, measured["errors"]))
    if max(map(max, measured["busy_before"].values())) > 0.3:
        print("the machine was busy with something else: medians are too large, ratios uncertain; see busy_before")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {**where, "cases": CASES, "seconds": table, **measured}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
