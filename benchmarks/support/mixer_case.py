"""One case of the benchmark of the mixers, in a process of its own: a subject, and the lengths it is measured at."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import timing
from support.mixer_subjects import Call, subjects

from tools.memory import held, restart_peak

SLOW = 10.0
"""Seconds of a call from which on it is run once only."""
SHORT = 256
"""Tokens of the call before memory is counted."""
COMPILING = 120.0
"""Seconds that a first call on a GPU may take beyond the limit."""

Sample = tuple[float, float]
"""What counts of a call, and the time that went by, in seconds."""


def limit_memory(gigabytes: float) -> None:
    """Lets an allocation beyond it fail, on a machine that others use too."""
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


class Clock:
    """Seconds of calls. On a CPU those that the thread computed, which others on the machine disturb less than the
    time that went by; the limit counts the process's, so that a busy machine decides no result. (With a limit set,
    Linux tells the process's seconds only to the tick of 4 ms, the thread's exactly.) Of several threads all compute,
    so there it is the time that went by."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.cuda = options.device == "cuda"
        self.computing = not self.cuda and options.threads == 1
        self.timer = signal.ITIMER_PROF if self.computing else signal.ITIMER_REAL
        self.now = time.thread_time if self.computing else time.perf_counter

    def limit(self, seconds: float) -> None:
        """The process ends by SIGPROF or SIGALRM after so long, wherever it is; 0: it does not."""
        signal.setitimer(self.timer, seconds)

    def sample(self, run: Callable[[], Any]) -> Sample:
        """One call."""
        before = self.now()
        passed = timing.sample(run, "cuda" if self.cuda else "cpu")
        return (self.now() - before if self.computing else passed), passed


def repeated(run: Callable[[], Any], options: argparse.Namespace, clock: Clock, spent: float) -> list[Sample]:
    """Samples: at least three, one if a call is slow, and no more than the limit leaves time for."""
    begin, found = clock.now(), list[Sample]()
    while len(found) < options.runs:
        gone, last = clock.now() - begin, found[-1][0] if found else 0.0
        if last > SLOW or (found and gone + spent + last > 0.9 * options.limit):
            break
        if len(found) >= 3 and gone > options.seconds:
            break
        found.append(clock.sample(run))
    return found


def measure(call: Call, parameters: list[torch.Tensor], length: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one length. Past the limit the process ends."""
    dtype, cuda, clock = getattr(torch, options.dtype), options.device == "cuda", Clock(options)
    torch.manual_seed(0)
    x = torch.randn(options.batch[0], length, options.d_model, dtype=dtype, device=options.device).requires_grad_()
    grad = torch.randn_like(x)

    def run(tokens: int = length) -> None:
        torch.autograd.grad(call(x[:, :tokens]), [x, *parameters], grad[:, :tokens], allow_unused=True)

    clock.limit(options.limit + COMPILING * cuda)
    if not cuda:
        run(min(length, SHORT))
    before = 0 if cuda else restart_peak()
    first = clock.sample(run)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        clock.limit(options.limit)
    once = not cuda and (first[0] > SLOW or 1.9 * first[0] > 0.9 * options.limit)
    found = [first] if once else repeated(run, options, clock, 0.0 if cuda else first[0])
    clock.limit(0)
    peak = torch.cuda.max_memory_allocated() if cuda else held("VmHWM")
    values, passed = map(list, zip(*found, strict=True))
    return {
        "first": first[0],
        "samples": values,
        "passed": passed,
        "seconds": timing.summary(values),
        "memory_bytes": peak - before,
        "parameters": sum(p.numel() for p in parameters),
    }


def run_case(options: argparse.Namespace) -> None:
    """All given lengths of one subject, a line of JSON for each; ends with the first that fails."""
    row: dict[str, Any] = {"length": options.lengths[0]}
    try:
        for name in filter(None, options.absent.split(",")):
            if name in sys.modules:
                raise RuntimeError(f"{name} is imported, and could be run in the place of what is measured")
            sys.modules[name] = None  # type: ignore[assignment]  # cannot be imported, nor found
        torch.set_num_threads(options.threads)
        if options.device == "cpu":
            limit_memory(options.memory)
        call, parameters = subjects()[options.case].make(options.d_model, options.device, getattr(torch, options.dtype))
        for length in options.lengths:
            row = {"length": length}
            timing.emit({**row, **measure(call, parameters, length, options)})
            if options.device == "cuda":
                torch.cuda.empty_cache()
    except Exception as error:  # a case that fails is a result
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}, {frame.name}"
        timing.emit({**row, "error": f"{timing.failure(error)} ({place})"})
