"""The hold on a prepared folder, and what a preparation that was killed left half written in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from paralm_data.errors import DataError, reason
from paralm_data.scratch import NAME as SCRATCH
from paralm_data.store_writer import TEMPORARY

# What a file system without locks says; there, parts still appear whole, by rename.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def locked(out: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder: two preparations at once would do the work twice. Released by the system if we are killed.

    ``shared``: with others that hold it so; then nobody holds it alone.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a+b")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({reason(error)})") from error
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another process is preparing it; wait for that to end") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise DataError(f"{out / '.lock'}: cannot be locked ({reason(error)})") from error
        yield


def remove_unfinished(out: Path, tasks: bool = True) -> None:
    """Remove what a preparation that was killed left half written; nobody else may be writing there.

    ``tasks``: also what its tasks left in the work in progress, of which nobody else may be doing one.
    """
    for folders in (".", "validation", *([f"{SCRATCH}/*"] if tasks else [])):
        for path in out.glob(f"{folders}/.*{TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
