"""A process of the local executor: runs the tasks it is given, one after another.

    python -m paralm_data.executors.worker CONNECTION ALIVE

CONNECTION: a descriptor of a `multiprocessing` connection: in come (index, task), out go ("delta", Delta), and at a
task's end ("result", dict) or ("error", DataError or a traceback). ALIVE: a pipe whose end is the parent's end.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from paralm_data.errors import DataError


def _end_with(descriptor: int) -> None:
    os.read(descriptor, 1)
    os._exit(1)  # in the middle of whatever it is: what counts appears by a rename


def main(arguments: list[str]) -> None:
    """See the module."""
    connection, alive = Connection(int(arguments[0])), int(arguments[1])
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    while True:
        try:
            _, task = connection.recv()
        except EOFError:
            return
        running = task.run()
        try:
            while True:
                connection.send(("delta", next(running)))
        except StopIteration as end:
            connection.send(("result", end.value))
        except DataError as error:
            connection.send(("error", error))
        except (BrokenPipeError, ConnectionResetError):
            return
        except BaseException:
            connection.send(("error", traceback.format_exc()))


if __name__ == "__main__":
    main(sys.argv[1:])
