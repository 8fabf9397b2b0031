"""Real training steps of a configuration in this process: their losses, seconds, and what the GPU held."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

from paralm.config import Config
from tools import synthetic

WARM = 2
"""Steps before memory and seconds count: they allocate the optimizer's state and compile kernels."""


def take(config: Config, vocabulary: int, steps: int, rate: float = 1e-4) -> dict[str, Any]:
    """``losses`` of ``WARM + steps`` steps (nats a token), and of the later ones ``samples`` (seconds), their median
    ``seconds``, and ``bytes``, the allocator's peak above what stood before; None without a GPU.
    """
    gc.collect()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if gpu else 0
    stepper = synthetic.stepper(config, vocabulary)
    training, losses, seconds = config.training, [], []
    for step in range(WARM + steps):
        if step == WARM and gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        batch = synthetic.batch(step, training.global_batch_size, training.seq_len, min(4096, vocabulary))
        start = time.perf_counter()
        losses.append(stepper.run(batch, step, rate, lambda: 0, timed=True).loss)
        if step >= WARM:
            seconds.append(time.perf_counter() - start)
    held = torch.cuda.max_memory_allocated() - before if gpu else None
    stepper.engine.destroy()
    return {"bytes": held, "seconds": statistics.median(seconds), "samples": seconds, "losses": losses}
