"""How long does a mixer take, forward and backward, and how much memory, as sequences grow, beside others' code?

    make bench                            (or)  .venv/bin/python benchmarks/mixers.py [--only mamba2] [--batch 1 8]
    make gpu-check                        (or)  .venv/bin/python benchmarks/gpu_mixers.py

Every registered mixer at one d_model, its own keys at their defaults, and its peers (benchmarks/support/
mixer_subjects.py says what each is); bfloat16 on a GPU, float32 and one thread on a CPU. What is timed is y = mixer(x)
and the gradients of x and of all parameters, on a CPU in seconds that the one thread computed (support/mixer_case.py);
medians of three calls at least. The call before them is not counted, unless it takes more than 10 s: then it is the
only one. Each subject and length runs in a process of its own (on a GPU
all lengths of a subject in one, so that kernels are tuned once), a peer's where no other peer can be imported. Memory
is the peak above what stands before a call (parameters, x, the gradient of y): of the process on a CPU, after a short
call that brings libraries into memory; of what torch has allocated on a GPU. Lengths grow until a case fails or is not
through after --limit seconds; that is then the result of the longer ones too.

Results are kept as they come in OUTPUT.partial, and the same command again goes on from there. Writes
benchmarks/results/mixers_DEVICE.json. Peers: `make peers`; mamba_ssm is laid into .benchmark-envs on first use, without
its compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from support import timing
from support.mixer_case import COMPILING, run_case
from support.mixer_report import Key, Row, failed, key_of, show, summaries
from support.mixer_subjects import Subject, subjects

HERE = Path(__file__).resolve().parent
LENGTHS = {"cpu": [1024, 8192, 65536], "cuda": [1024, 2048, 4096, 8192, 16384, 32768, 65536]}
STARTING = 300.0
"""Seconds that a process may take until it measures: imports, initial values."""
LAID = HERE.parent / ".benchmark-envs"
MAMBA_SSM = ["mamba-ssm==2.3.2.post1"]


def peer_folder(peer: str) -> Path:
    """Where a peer's modules are. Raises FileNotFoundError or RuntimeError, one line."""
    from tests.peers import PEERS

    if peer == "mamba_ssm" and not (PEERS / peer).is_dir():
        return laid_mamba_ssm()
    if not (PEERS / peer).is_dir():
        raise FileNotFoundError(f"not in {PEERS}; `make peers` lays it there")
    return PEERS / peer


def laid_mamba_ssm() -> Path:
    """mamba_ssm's Python and Triton code, laid on first use: nothing is compiled, which Mamba2 does not need."""
    folder = LAID / "mamba_ssm"
    if not (folder / "ready").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*install, "--no-build-isolation", "--upgrade", "--target", str(folder), *MAMBA_SSM]
        flags = {**os.environ, "MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}
        done = subprocess.run(command, env=flags, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"cannot be installed here: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        (folder / "ready").write_text("\n".join(MAMBA_SSM) + "\n")
    return folder


def run_process(
    name: str, subject: Subject, batch: int, lengths: list[int], options: argparse.Namespace, seconds: float
) -> list[Row]:
    """The rows of these lengths of a subject, from a process of its own that may take ``seconds``; lengths after one
    that failed have none."""
    from tests.peers import FOREIGN

    try:
        folder = peer_folder(subject.peer) if subject.peer else None
    except (FileNotFoundError, RuntimeError) as error:
        return [{"length": lengths[0], "error": f"{subject.peer}: {error}"}]
    meant = {subject.peer.replace("-", "_"), *subject.importable}
    given = {key: getattr(options, key) for key in ("device", "dtype", "d_model", "threads", "limit", "memory")}
    given |= {"runs": options.runs, "seconds": options.seconds, "batch": batch, "case": name}
    command = [sys.executable, str(HERE / "mixers.py"), *(f"--{k.replace('_', '-')}={v}" for k, v in given.items())]
    command += ["--absent=" + ",".join(n for n in FOREIGN if n not in meant), "--lengths", *map(str, lengths)]
    path = os.pathsep.join(filter(None, [folder and str(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(options.threads)}
    patience = STARTING + len(lengths) * (10 * options.limit + COMPILING)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=min(seconds, patience),
            check=False,
        )  # fmt: skip
        text, problem = done.stdout, {}
        if done.returncode in (-signal.SIGALRM, -signal.SIGPROF):
            problem = {"over": options.limit}
        elif done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1][:300]
            ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
            problem = {"error": f"{ended}: {last}"}
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        text = out.decode(errors="replace") if isinstance(out, bytes) else out
        problem = {"error": timing.NOT_MEASURED if seconds < patience else f"nothing measured after {patience:.0f} s"}
    rows: list[Row] = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]
    if problem and len(rows) < len(lengths):
        rows.append({"length": lengths[len(rows)], **problem})
    return rows


def measure_all(chosen: dict[str, Subject], done: dict[Key, Row], options: argparse.Namespace) -> Iterable[Row]:
    """Every row that is not in ``done``, as it comes."""
    import psutil

    budget = timing.Budget(options.minutes)
    for number, (name, subject) in enumerate(chosen.items()):
        for batch in options.batch:
            todo = list(options.lengths)
            while todo:
                known = done.get((name, batch, todo[0]))
                if known is None:
                    lengths = todo if options.device == "cuda" else todo[:1]
                    print(f"… {name}, batch {batch}, {lengths[0]} tokens", file=sys.stderr, flush=True)
                    commit = timing.commit()  # a benchmark that goes on may go on with another one
                    busy = psutil.cpu_percent(interval=0.2) / 100
                    if budget.over:
                        rows = [{"length": lengths[0], "error": timing.NOT_MEASURED}]
                    else:
                        rows = run_process(name, subject, batch, lengths, options, budget.share(len(chosen) - number))
                    if not rows:
                        rows = [{"length": lengths[0], "error": "its process ended without a result"}]
                else:
                    rows, commit = [known], known["commit"]
                for row in rows:
                    todo.remove(row["length"])
                    if row is not known:
                        row = {"subject": name, "batch": batch, **row, "busy_before": busy, "commit": commit}
                        yield row
                if failed(row):
                    why = {key: row[key] for key in ("error", "over") if key in row}
                    for length in todo:
                        if (name, batch, length) not in done:
                            more = {"subject": name, "batch": batch, "length": length, **why}
                            yield {**more, "since": row.get("since", row["length"]), "commit": commit}
                    break


def basis_of(options: argparse.Namespace, where: Row) -> Row:
    """What two results must share to stand in one file."""
    keys = ("d_model", "dtype", "threads", "limit", "memory", "runs", "seconds")
    return {
        **{key: getattr(options, key) for key in keys},
        **{key: where[key] for key in ("device", "torch", "triton")},
    }


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def started(partial: Path, basis: Row) -> dict[Key, Row]:
    """What an interrupted run with the same settings has left; what failed there is tried again."""
    lines = partial.read_text().splitlines() if partial.exists() else []
    if not lines or json.loads(lines[0]) != basis:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(basis) + "\n")
        return {}
    rows = []
    for line in lines[1:]:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut in the middle of a line
            partial.write_text("\n".join([lines[0], *map(json.dumps, rows)]) + "\n")
            break
    return {key_of(row): row for row in rows if "error" not in row}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; defaults by device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--d-model", type=int, help="default: 256 on a CPU, 2048 on a GPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 1K to 64K")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="subjects whose name contains one of these, in this order"
    )
    parser.add_argument("--limit", type=float, help="seconds for a case; default: 30 on a CPU, 20 on a GPU")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB a case may allocate on a CPU")
    parser.add_argument("--runs", type=int, help="counted calls at most; default: 5 on a CPU, 20 on a GPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a case's counted calls, about, but at least 3")
    timing.add_minutes(parser)
    parser.add_argument("--threads", type=int, default=1, help="of a case on a CPU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/mixers_DEVICE.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--absent", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if cpu else "bfloat16")
    options.d_model = options.d_model or (256 if cpu else 2048)
    options.limit = options.limit or (30.0 if cpu else 20.0)
    options.runs = options.runs or (5 if cpu else 20)
    options.lengths = sorted(options.lengths or LENGTHS[options.device])
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs one subject (`--case`, rows as JSON lines) or all of them; 0 unless nothing at all could be measured."""
    options = parse(arguments)
    if options.case:
        run_case(options)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("mixers.py: torch sees no GPU here; --device cpu runs on the CPU", file=sys.stderr)
        return 2
    chosen = {name: s for text in options.only for name, s in subjects().items() if text.lower() in name.lower()}
    if not chosen:
        print(f"mixers.py: --only: no subject has {options.only} in its name: {', '.join(subjects())}", file=sys.stderr)
        return 2
    where = timing.environment(options.device)
    basis = basis_of(options, where)
    output = options.output
    if output is None:
        name = "cpu" if options.device == "cpu" else where["device"].replace(" ", "_")
        output = timing.results() / f"mixers_{name}.json"
    before = json.loads(output.read_text()) if output.exists() else {}
    same = before.get("basis") == basis
    if before and not same and len(chosen) < len(subjects()):
        print(f"mixers.py: {output} has other settings, and --only would leave little of it: --output", file=sys.stderr)
        return 2
    partial = output.with_suffix(".partial")
    done = started(partial, basis)
    with partial.open("a") as file:
        for row in measure_all(chosen, done, options):
            done[key_of(row)] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    known = subjects()
    if same:  # what was not measured anew stays
        kept = {key_of(row): row for row in before["rows"]}
        over = {key for key in kept if done.get(key, {}).get("error") == timing.NOT_MEASURED}
        done = {**kept, **{key: row for key, row in done.items() if key not in over}}
    order = list(known)
    rows = [row for row in done.values() if row["subject"] in known]
    rows.sort(key=lambda row: (order.index(row["subject"]), row["batch"], row["length"]))
    show([r for r in rows if r["subject"] in chosen], chosen, f"d_model {options.d_model}, {options.dtype}")
    content = {
        "command": " ".join(["python", *sys.argv]),
        **where,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "basis": basis,
        "subjects": {name: {"what": s.what, "beside": s.beside} for name, s in known.items()},
        "summary": summaries(rows),
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=1) + "\n")
    partial.unlink()
    print(f"written: {output}")
    return 0 if any("samples" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
