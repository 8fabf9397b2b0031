"""What this process holds of memory, as Linux counts it. For benchmarks, and tests of memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path


def held(which: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {which}")


def forget_peak() -> None:
    """From here on the peak counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def restart_peak() -> int:
    """Bytes held now, freed memory given back first, from which the peak counts."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # of glibc
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    return held("VmRSS")
