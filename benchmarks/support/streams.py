"""One long document streamed through a small model of every architecture: its speed, and that memory stays flat."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paralm.config import ModelConfig
from paralm.evaluation.scoring import score
from paralm.models import build_model
from paralm.registry import MIXERS
from tools.memory import forget_peak, held

VOCAB = 64
WARM = 10_000  # tokens; the peak after them is what the peak at the end is compared with
CHUNK = 512
KEYS: dict[str, dict[str, Any]] = {  # small, as the rest of the model
    "window_attention": {"window": 64},
    "titans_mag": {"window": 64},
    "titans_mal": {"window": 64},
}


@dataclass(frozen=True)
class Stream:
    """What :func:`paralm.evaluation.scoring.score` needs of a store: one document of random tokens."""

    tokens: NDArray[np.uint16]

    @classmethod
    def of(cls, count: int, seed: int = 0, vocab_size: int = VOCAB) -> Stream:
        """``count`` predictions."""
        draws = np.random.Generator(np.random.PCG64(seed))
        return cls(draws.integers(0, vocab_size, count + 1, dtype=np.uint16))

    def bounds(self, document: int) -> tuple[int, int]:
        """Where a document lies; there is one."""
        assert document == 0
        return 0, len(self.tokens)


def bounded() -> list[str]:
    """Names of the mixers whose state is bounded."""
    return [name for name, entry in MIXERS.entries().items() if entry.value.bounded_state]


def stream(mixer: str, tokens: int, n_layers: int = 1, d_model: int = 16) -> dict[str, Any]:
    """Score one document of ``tokens`` tokens in this process, which should have done little before.

    ``peak_growth``: bytes by which the peak RSS at the end lies above that after the first ``WARM`` tokens.
    ``rss_growth``: likewise of the RSS itself. The kernel is told to forget the start's peak after a quarter of
    ``WARM``. Tokens a second of the process's own time, so that a busy machine does not count.
    """
    config = ModelConfig(d_model=d_model, n_layers=n_layers, mixer={"name": mixer, **KEYS.get(mixer, {})})
    model = build_model(config, VOCAB, seed=0).eval()
    document = Stream.of(tokens)
    gc.collect()
    seen: dict[str, Any] = {}

    def after(done: int, total: int) -> None:
        if done >= WARM // 4 and not seen:
            # From here on the peak is that of streaming: a higher one of the start would hide what grows later.
            forget_peak()
            seen.update(reset=done)
        if done >= WARM and "warm" not in seen:
            seen.update(warm=held("VmHWM"), rss=held("VmRSS"), done=done, started=time.process_time())

    loss = score(model, document, [0], rows=1, chunk=CHUNK, on_progress=after)  # type: ignore[arg-type]
    seconds = time.process_time() - seen["started"]
    return {
        "mixer": mixer,
        "tokens": tokens,
        "nats_per_token": float(loss.loss[0] / loss.tokens[0]),
        "tokens_per_s": (tokens - seen["done"]) / seconds,
        "peak_rss_warm": seen["warm"],
        "peak_growth": held("VmHWM") - seen["warm"],
        "rss_growth": held("VmRSS") - seen["rss"],
    }


def in_a_process_of_its_own(mixer: str, tokens: int) -> dict[str, Any]:
    """:func:`stream` in a fork: a peak of its own, and torch is there already. One thread, as a fork needs."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        try:
            theirs.send(stream(mixer, tokens))
        except BaseException as error:
            theirs.send({"mixer": mixer, "error": f"{type(error).__name__}: {error}"})
            raise

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        found = {"mixer": mixer, "error": "the process ended without a result"}
    process.join()
    return found


def one_arena() -> bool:
    """Whether glibc keeps one arena here; it must be told before the process starts."""
    return os.environ.get("MALLOC_ARENA_MAX") == "1"
