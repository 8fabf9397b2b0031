"""Which of the exact algorithms to launch, and into how many pieces to cut time: measurements, and a model where there
are none.

MEASURED maps (cell, batch, time, channels) to the fastest method; `python benchmarks/solver.py` prints the times. It is
empty: since the kernels have this form no GPU was at hand. The model is arithmetic on figures of an H100 (the constants
below). A walk costs its latency a step as long as its warps are fewer than the device holds, so it is bound by time ×
latency or by bytes, whichever is more. Segments make warps out of time; they walk about a tenth again, and launch a few
kernels. A tile costs some iterations of a scan, which is slower than walking its steps unless a step is very slow.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED: dict[tuple[str, int, int, int], str] = {}
STEP = 105e-9
"""Seconds a step of a walk takes from state to state: 165 to 195 cycles of ParaGRU's compiled loop, at 1.75 GHz."""
WARPS = 132 * 14
"""Warps that the device runs side by side: more wait until the first are through. ParaLSTM's walk of a piece takes 137
registers of a thread, which leaves room for 14 on a multiprocessor."""
FEW = 132 * 8
"""Warps up to which a walk waits for its loads, and asks for them early at the price of registers."""
LANES = 32
BANDWIDTH = 3e12
"""Bytes a second."""
LAUNCH = 4e-6
"""Seconds a further kernel costs."""
AGAIN = 0.1
"""The fraction of steps walked again, for cells that forget."""
ROUNDS = 5
"""Rounds of joining and walking again before what is left is walked in order: one for cells that forget, five for a
gate with a bias of −6."""
SHORTEST = 256
"""Steps of the shortest piece: shorter ones are walked again as a whole."""
LARGEST = 256
"""Pieces at most: joining goes through them one by one."""


@dataclass(frozen=True)
class Choice:
    """method: walk, tile or segments. pieces: of time; 1 unless segments."""

    method: str
    pieces: int = 1


def pieces_for(batch: int, time: int, channels: int) -> int:
    """As many pieces as the device holds at once, none shorter than SHORTEST."""
    warps = max(1, batch * -(-channels // LANES))
    return max(1, min(WARPS // warps, time // SHORTEST, LARGEST))


def choose(cell: str, batch: int, time: int, channels: int, bytes_per_step: int) -> Choice:
    """The algorithm for a shape; bytes_per_step: read and written for one step of one channel."""
    pieces = pieces_for(batch, time, channels)
    measured = MEASURED.get((cell, batch, time, channels))
    if measured is not None:
        return Choice(measured, pieces if measured == "segments" else 1)
    warps = batch * -(-channels // LANES)
    transfer = batch * time * channels * bytes_per_step / BANDWIDTH
    walk = max(time * STEP * max(1.0, warps / WARPS), transfer)
    if pieces < 2:
        return Choice("walk")
    spread = max(1.0, warps * pieces / WARPS)
    again = (1 + AGAIN) * max(time / pieces * STEP * spread, transfer)
    segments = again + 2 * (ROUNDS + 1) * LAUNCH
    return Choice("segments", pieces) if segments < walk else Choice("walk")
