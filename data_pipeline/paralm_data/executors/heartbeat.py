"""The heartbeat of a process that shares a preparation with others: a process of its own, which outlives it a moment.

    python -I heartbeat.py FILE SECONDS ALIVE

Writes FILE anew every SECONDS. When the descriptor ALIVE ends, so when its parent has, however that came, it removes
FILE, and the others see at once that the parent is gone. It ends by itself when FILE is gone: others took the parent
for dead. Signals to the whole group are for the parent to die of.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys


def main(file: str, seconds: float, alive: int) -> None:
    """See the module."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    beats = 0
    while not select.select([alive], [], [], seconds)[0]:
        beats += 1
        try:
            with open(file, "r+b") as opened:
                opened.write(b"%020d" % beats)
        except FileNotFoundError:
            return
        except OSError:
            continue  # a full disk, or a file system that is away for a while: silence says that
    with contextlib.suppress(OSError):
        os.unlink(file)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
