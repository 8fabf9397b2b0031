"""What does it send, and what does it save, when the time of a sequence lies on several ranks?

    make bench                            (or)  .venv/bin/python benchmarks/time_shards.py

One layer, forward and backward, whose sequence of 1K to 64K steps lies on 1, 2 or 4 gloo ranks of this machine, one
thread a rank, float32. Counted on every rank: bytes given to collectives and neighbours (`TimeShards.bytes_sent`), the
rounds of walks, and the peak of memory above what stands before (Linux's, of the process, after a short call that
brings libraries into memory). Seconds are of one call on shared cores. Peaks include torch's own buffers, so short
sequences say little about 1/t.

Besides, every call once more over links of which each message takes --delay milliseconds longer: `waited` is, by kind,
what a rank in the middle then waited for of that time, 1 where nothing was computed while a message was under way.
Writes benchmarks/results/time_shards.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "time_shards.json"
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

MIXERS: dict[str, dict[str, Any]] = {
    "paragru": {},
    "paragru, remembering": {"gate_spread": -6.0},
    "paralstm": {},
    "mamba2": {"d_state": 16},
    "mlstm": {"n_heads": 2},
    "slstm": {"n_heads": 4},
    "window_attention": {"window": 256, "n_heads": 2},
}
"""The last two hand their state from rank to rank, over as many micro-batches as there are ranks."""


def slow_shards(delay: float) -> Any:
    """TimeShards whose messages take longer; `waited` has the seconds by kind, and `begun` the number."""
    from paralm_kernels import TimeShards

    class Slow(TimeShards):
        def __init__(self) -> None:
            super().__init__()
            self.waited: dict[str, float] = {}
            self.begun: dict[str, int] = {}

        def _slow(self, kind: str, message: Any) -> Any:
            arrives, take = time.perf_counter() + delay, message.taken
            self.begun[kind] = self.begun.get(kind, 0) + 1

            def taken() -> Any:
                late = max(0.0, arrives - time.perf_counter())
                self.waited[kind] = self.waited.get(kind, 0.0) + late
                time.sleep(late)
                return take()

            message.taken = taken
            return message

        def gather(self, kind: str, *tensors: Any) -> Any:
            return self._slow(kind, super().gather(kind, *tensors))

        def pass_on(self, kind: str, tensor: Any, offset: int) -> Any:
            return self._slow(kind, super().pass_on(kind, tensor, offset))

    return Slow()


def measure(options: argparse.Namespace) -> None:
    """One rank: a row for each case, printed by the first."""
    import torch
    import torch.distributed as dist
    from paralm_kernels import TimeShards

    from paralm.config import ModelConfig
    from paralm.models import build_mixer
    from paralm.models.mixers.base import shard_time
    from paralm.models.parameters import initialize
    from tools.memory import held, restart_peak

    torch.set_num_threads(1)
    store = dist.FileStore(options.store, options.ranks)
    dist.init_process_group("gloo", store=store, rank=options.rank, world_size=options.ranks)
    for label in options.mixers:
        name, keys = label.partition(",")[0], MIXERS[label]
        mixer = build_mixer({"name": name, **keys}, ModelConfig(d_model=options.width), 0)
        with torch.no_grad():
            initialize(mixer, 0)
        for length in options.lengths:
            shards = TimeShards() if options.ranks > 1 else None
            shard_time(mixer, shards)
            steps = length // options.ranks
            draws = torch.Generator().manual_seed(options.rank)
            x = torch.randn(options.batch, steps, options.width, generator=draws).requires_grad_()

            def run(part: torch.Tensor, mixer: Any = mixer) -> None:
                y, _ = mixer.over_time(part, None, None)
                y.sum().backward()

            run(x[:, : min(steps, 64)])
            mixer.zero_grad()
            if shards is not None:
                shards.bytes_sent.clear()
            dist.barrier()
            before, start = restart_peak(), time.perf_counter()
            run(x)
            seconds, peak = time.perf_counter() - start, held("VmHWM") - before
            sent = {} if shards is None else dict(shards.bytes_sent)
            waited = {}
            if shards is not None:
                slow = slow_shards(options.delay / 1000)
                shard_time(mixer, slow)
                dist.barrier()
                run(x)
                slow.settle()
                waited = {
                    kind: round(slow.waited[kind] / (count * options.delay / 1000), 3)
                    for kind, count in slow.begun.items()
                }
            every: list[Any] = [None] * options.ranks
            dist.all_gather_object(every, (peak, sum(sent.values()), seconds, waited))
            row = {
                "mixer": label,
                "ranks": options.ranks,
                "length": length,
                "sent": sent,
                "bytes_sent_most": max(each[1] for each in every),
                "peak_bytes_most": max(each[0] for each in every),
                "seconds_most": max(each[2] for each in every),
                "waited": every[options.ranks // 2][3],
                "rounds": mixer.stats.get("newton_iterations") if shards is not None else None,
            }
            if options.rank == 0:
                print("ROW " + json.dumps(row), flush=True)
    dist.destroy_process_group()


def spread(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        given = {key: getattr(options, key) for key in ("batch", "width", "delay")}
        given |= {"ranks": ranks, "store": f"{folder}/store"}
        command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in given.items())]
        command += ["--lengths", *map(str, options.lengths), "--mixers", *options.mixers]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen([*command, f"--rank={rank}"], env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        texts = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"time_shards.py: ranks ended with {[process.returncode for process in processes]}")
    return [json.loads(line[4:]) for line in texts[0].splitlines() if line.startswith("ROW ")]


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Bytes by length, and memory beside one rank's."""
    print(f"one layer, d_model {options.width}, batch {options.batch}; bytes that a rank sends, forward and backward")
    print(f"{'mixer':<24}{'ranks':>6}" + "".join(f"{length:>14}" for length in options.lengths))
    cells = {(row["mixer"], row["ranks"], row["length"]): row for row in rows}
    for what, form in (("bytes_sent_most", "{:,.0f}"), ("peak_bytes_most", "{:,.1f} MB"), ("seconds_most", "{:.2f} s")):
        print(f"\n{what}")
        for mixer in options.mixers:
            for ranks in options.all_ranks:
                values = [cells[mixer, ranks, length][what] for length in options.lengths]
                scale = 1e6 if what.startswith("peak") else 1
                print(f"{mixer:<24}{ranks:>6}" + "".join(f"{form.format(value / scale):>14}" for value in values))

    print(f"\nwaited for of a delay of {options.delay:g} ms a message, by kind")
    for mixer in options.mixers:
        for ranks in (ranks for ranks in options.all_ranks if ranks > 1):
            for kind in cells[mixer, ranks, options.lengths[-1]]["waited"]:
                values = [cells[mixer, ranks, length]["waited"].get(kind, 0.0) for length in options.lengths]
                print(f"{mixer:<24}{ranks:>6}" + "".join(f"{value:>14.2f}" for value in values) + f"  {kind}")


def main(arguments: list[str] | None = None) -> int:
    """All numbers of ranks, or one rank of one (`--rank`)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all-ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--delay", type=float, default=5.0, help="milliseconds")
    parser.add_argument("--output", type=Path, default=RESULT)
    for hidden in ("--rank", "--ranks"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank is not None:
        measure(options)
        return 0
    rows = [row for ranks in options.all_ranks for row in spread(ranks, options)]
    show(rows, options)
    from support import timing

    content = {
        "command": " ".join(["python", *sys.argv]),
        **timing.environment("cpu"),
        "d_model": options.width,
        "batch": options.batch,
        "dtype": "float32",
        "delay_ms": options.delay,
        "mixers": {name: MIXERS[name] for name in options.mixers},
        "rows": rows,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
