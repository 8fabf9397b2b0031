"""Who does what, where processes of any machines share a folder and nothing else.

::

    workers/NAME        a process that takes part; rewritten by its heartbeat (heartbeat.py), gone when it has left
    TASK.claim-0, -1 …  symbolic links to the workers that took a task, one after the other; the last one does it

A link is made in one step that only one process can win, and says whose it is. To take a task over from a worker that
is gone is to make the next link, so no two processes can both do that. A worker whose file has not changed for
SILENT_SECONDS is taken for dead: its file is removed, which everyone sees, itself included, if it lives after all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from paralm_data.errors import DataError, reason

BEAT_SECONDS = 10.0
SILENT_SECONDS = 120.0  # a shared file system may be away for a minute
POLL_SECONDS = 1.0  # between two looks at what others have done

_HEARTBEAT = Path(__file__).with_name("heartbeat.py")


class Member:
    """This process among the workers of ``folder``, from now until :meth:`leave` or its death."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            for _ in range(3):  # the last of earlier workers may remove the folder just now
                with contextlib.suppress(FileNotFoundError):
                    folder.mkdir(parents=True, exist_ok=True)
                    self.path.write_bytes(b"%020d" % 0)
                    break
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({reason(error)})") from error
        alive, self._mine = os.pipe()
        try:
            self._heart = subprocess.Popen(
                [sys.executable, "-I", str(_HEARTBEAT), str(self.path), str(BEAT_SECONDS), str(alive)],
                pass_fds=(alive,),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(alive)

    def is_known(self) -> bool:
        """Whether the others count on this process."""
        return self._heart.poll() is None and self.path.exists()

    @property
    def heartbeat_code(self) -> int:
        """Of a heartbeat that ended by itself; 0 where it beats, or ended because the file was gone."""
        return self._heart.poll() or 0

    def leave(self) -> None:
        """What is claimed and not done is the others' from now on."""
        os.close(self._mine)
        try:
            self._heart.wait(timeout=5.0)
        except subprocess.TimeoutExpired:  # the file system is away
            self._heart.kill()
            self._heart.wait()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


@dataclass
class _Seen:
    content: bytes
    looked: float
    silent: float = 0.0  # seconds that it was looked at, and did not change


class Watch:
    """Which workers live, by this process's own clock."""

    def __init__(self) -> None:
        self._seen: dict[Path, _Seen] = {}

    def lives(self, worker: Path) -> bool:
        """Whether a worker is there and not silent; the file of a silent one is removed."""
        now = time.monotonic()
        seen = self._seen.get(worker)
        if seen is not None and now - seen.looked < POLL_SECONDS / 2:
            return True
        try:
            content = worker.read_bytes()  # opened anew each time: a file system may remember attributes for a minute
        except FileNotFoundError:
            self._seen.pop(worker, None)
            return False
        except OSError:
            return True
        if seen is None or seen.content != content:
            self._seen[worker] = _Seen(content, now)
            return True
        # While nobody looked (this process was suspended, perhaps with the other) there was no silence.
        seen.silent, seen.looked = seen.silent + min(now - seen.looked, 2 * POLL_SECONDS), now
        if seen.silent <= SILENT_SECONDS:
            return True
        with contextlib.suppress(OSError):
            worker.unlink(missing_ok=True)
        return False


def take(marker: Path, worker: Path, watch: Watch) -> bool:
    """Whether what ends with ``marker`` is this worker's to do, from now on. DataError where links cannot be made."""
    if not worker.exists():
        return False
    for number in itertools.count():
        claim = marker.with_suffix(f".claim-{number}")
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            claim.symlink_to(os.path.relpath(worker, marker.parent))
            return True
        except FileExistsError:
            owner = _owner(claim)
        except OSError as error:
            raise DataError(
                f"{claim}: cannot be made ({reason(error)}); data.executor: shared needs a folder that may be written "
                "and has symbolic links"
            ) from error
        if owner == Path(os.path.normpath(worker)):
            return True  # given again, after a process of this worker's was lost
        if owner is not None and watch.lives(owner):
            return False
    raise AssertionError


def is_taken(marker: Path, watch: Watch) -> bool:
    """Whether a worker that lives has taken it."""
    for number in itertools.count():
        owner = _owner(marker.with_suffix(f".claim-{number}"))
        if owner is None:
            return False
        if watch.lives(owner):
            return True
    raise AssertionError


def _owner(claim: Path) -> Path | None:
    """The worker of a claim; None where there is no claim."""
    try:
        return Path(os.path.normpath(claim.parent / os.readlink(claim)))
    except FileNotFoundError:
        return None
