"""One rank of a launch: ``python -m paralm_launch.launchers.worker EXCHANGE``, or :func:`run_rank` in Ray's worker.

A rank that ended for good (a result, or an error that another start would repeat) writes so and leaves with 0, so
that no launcher starts it again; for anything else it leaves with another code, and the launcher may.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

from paralm.errors import StoppedError
from paralm_launch import discovery
from paralm_launch.launchers.exchange import LOST, Exchange, describe, describe_result, trace_of

EXIT_AGAIN = 1
# What gloo, NCCL and the store say in the ranks that remain when one has gone.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|socket closed|remote process|failed to recv|"
    r"gloo|nccl|store",
    re.IGNORECASE,
)


def die_with_parent() -> None:
    """Let the kernel end this process when its parent ends, however that happens."""
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or parent == 1:
        os._exit(EXIT_AGAIN)  # it ended before it could be asked for


def run_rank(folder: Path) -> bool:
    """Train as this rank of the launch in ``folder``; returns whether it ended for good."""
    exchange = Exchange(folder)
    if exchange.outcomes():
        return True  # some rank has ended for good; this start, made for another reason, would too
    rank = int(os.environ.get("RANK", "0"))
    try:
        import torch.distributed

        from paralm.training import control, watch
        from paralm.training.loop import train
    except Exception as error:
        exchange.fail(rank, f"{type(error).__name__}: {error}", trace_of(error))
        raise
    try:
        config = exchange.config()
        control.stop_file = exchange.stop_file
        watch.on_lost = lambda line: exchange.fail(rank, line)
        if rank == 0 and (again := exchange.count_start()):
            _say_again(exchange, again, config.launcher.max_failures)
        result = train(
            config,
            on_progress=(lambda row: exchange.progress("row", row)),
            say=(lambda line: exchange.progress("say", line)) if rank == 0 else (lambda line: None),
        )
        exchange.end(rank, result=describe_result(result))
        return True
    except BaseException as error:
        known = describe(error)
        preempted = isinstance(error, StoppedError) and not exchange.stop_file.exists()
        again = preempted and config.launcher.preemption == "restart" and "stop_after_seconds" not in str(error)
        if known is not None and known["error"] != "LostRanksError" and not again:
            exchange.end(rank, **known)
            return True
        if known is not None:
            exchange.fail(rank, known["message"])
        elif isinstance(error, (RuntimeError, torch.distributed.DistError)) and _LOST.search(str(error)):
            exchange.fail(rank, f"{LOST}: {_first_sentence(error)}")
        else:
            exchange.fail(rank, f"{type(error).__name__}: {' '.join(str(error).split())}", trace_of(error))
        return False


def _first_sentence(error: Exception) -> str:
    """Without the source file that gloo and NCCL begin with, and without what they advise after it."""
    return re.sub(r"^\[[^\]]*\] *", "", str(error).splitlines()[0]).split(". ")[0]


def _say_again(exchange: Exchange, again: int, most: int) -> None:
    failures = exchange.failures()
    own = [f for f in failures if not f["line"].startswith(LOST)] or failures
    why = f" (rank {own[-1]['rank']}: {own[-1]['line']})" if own else ""
    exchange.progress("say", f"ranks were lost{why}; start {again} of at most {most}, from the newest checkpoint")


def main() -> None:
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))  # held until training answers it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the launcher answers
    discovery.settle()
    done = run_rank(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    if not done:
        os._exit(EXIT_AGAIN)  # leaving a broken process group in order can hang
    from paralm.training.rendezvous import leave

    leave()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        mpi.Finalize()  # mpirun ends every rank when one leaves without it
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
