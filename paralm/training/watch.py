"""What a rank is doing, written where all can see it, and what happens when ranks wait too long for each other.

Every rank keeps ``ranks/note_00000.json`` in the run folder: phase, step, a counter that a thread of its own
moves, and the collective it waits in. A rank that waits in a collective for longer than its limit reads the
others' files, says which of them are missing, writes its stacks and ends the process, so that a launcher can
start the attempt again. A collective cannot be left in any other way: NCCL's and gloo's are native code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType

EXIT_LOST = 4  # ranks waited too long for others; the same command continues from the newest checkpoint
_PHASES = ("start", "load", "step", "validation", "save")
_WIDTH = 512  # bytes of a note: rewritten in place, so that a phase costs no file
_UNFINISHED = {
    "start": "started",
    "load": "loaded the checkpoint",
    "step": "finished step {step}",
    "validation": "finished the validation of step {step}",
    "save": "saved step {step}",
}


@dataclass(frozen=True)
class Note:
    """What one rank is doing. ``waiting``: the collective its training thread is in, if it is in one."""

    rank: int
    pid: int
    host: str
    phase: str = "start"
    step: int = 0
    beats: int = 0
    waiting: str = ""

    @property
    def position(self) -> tuple[int, int]:
        """How far it has come; larger is further."""
        return (self.step if self.phase in _PHASES[2:] else -1, _PHASES.index(self.phase))


def read_note(path: Path) -> Note | None:
    """A rank's note, or None where there is none (or it is being written)."""
    try:
        return Note(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def note_path(ranks: Path, rank: int) -> Path:
    return ranks / f"note_{rank:05d}.json"


def ranks_text(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 2, 5``; long lists are cut."""
    shown = ", ".join(str(rank) for rank in ranks[:16]) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}"


def missing_ranks(before: list[Note | None], after: list[Note | None]) -> list[int]:
    """Which ranks the others wait for, from two readings of all notes with beats between them.

    Those whose process does not move; else those that have come less far than others; else those that are not in
    a collective while others are.
    """
    still = [
        rank
        for rank, (old, new) in enumerate(zip(before, after, strict=True))
        if new is None or (old is not None and old.pid == new.pid and old.beats == new.beats)
    ]
    if still:
        return still
    notes = [note for note in after if note is not None]
    furthest = max(note.position for note in notes)
    behind = [note.rank for note in notes if note.position < furthest]
    if behind:
        return behind
    busy = [note.rank for note in notes if not note.waiting]
    return busy if len(busy) < len(notes) else []


def lost_message(missing: list[int], after: list[Note | None], me: Note, seconds: float) -> str:
    """One line: who has not finished what, where, and for how long the others have waited."""
    hosts = sorted({note.host for rank in missing if (note := after[rank]) is not None})
    where = f" ({', '.join(hosts)})" if hosts else ""
    what = _UNFINISHED[me.phase].format(step=me.step)
    if not missing:
        return f"no rank has {what} after {seconds:.0f} s, and none is missing: see stacks/; ending this attempt"
    verb = "has" if len(missing) == 1 else "have"
    return f"{ranks_text(missing)}{where} {verb} not {what} after {seconds:.0f} s; ending this attempt"


class Watch:
    """This rank's note, and the thread that keeps it and looks at the others'. A context manager.

    ``limit``: seconds without progress. ``on_lost`` gets the one line before the process ends.
    """

    def __init__(
        self, run_dir: Path, rank: int, world_size: int, limit: float, on_lost: Callable[[str], None] | None = None
    ) -> None:
        self._ranks, self._stacks = run_dir / "ranks", run_dir / "stacks"
        self._world_size, self._limit, self._on_lost = world_size, limit, on_lost or _print
        self.period = min(10.0, max(0.2, limit / 20))
        self._note = Note(rank, os.getpid(), socket.gethostname())
        self._file: int | None = None
        self._lock = threading.Lock()
        self._since = time.monotonic()  # what it does now began
        self._waiting_since = math.inf
        self._thread_id = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paralm-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(timeout=5.0)
        with self._lock:
            if self._file is not None:
                path = note_path(self._ranks, self._note.rank)
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(self._file), path.stat()):  # not one that a later attempt has made
                        path.unlink()
                os.close(self._file)
                self._file = None

    def note(self, phase: str, step: int) -> None:
        """Say what begins now. The first call makes the file."""
        self._since, self._waiting_since = time.monotonic(), math.inf
        self._thread_id = threading.get_ident()
        self._write(phase=phase, step=step)

    def _write(self, sync: bool = False, **changes: object) -> None:
        copy = None
        with self._lock, contextlib.suppress(OSError):  # a full disk must not end a run that can do without notes
            self._note = replace(self._note, **changes)  # type: ignore[arg-type]
            if self._file is None:
                if "phase" not in changes:
                    return
                self._ranks.mkdir(parents=True, exist_ok=True)
                path = note_path(self._ranks, self._note.rank)
                path.unlink(missing_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._file, json.dumps(asdict(self._note)).ljust(_WIDTH - 1).encode() + b"\n", 0)
            copy = os.dup(self._file) if sync else None
        if copy is not None:  # to the other nodes; without the lock, so that slow storage holds up no step
            with contextlib.suppress(OSError):
                os.fsync(copy)
            os.close(copy)

    def _run(self) -> None:
        while not self._done.wait(self.period):
            self._beat()
            if self._file is not None and self._world_size > 1 and self._waited() > self._limit:
                self._judge()

    def _beat(self) -> None:
        waiting = self._collective()
        if not waiting:
            self._waiting_since = math.inf
        elif self._waiting_since == math.inf:
            self._waiting_since = time.monotonic()
        self._write(sync=True, beats=self._note.beats + 1, waiting=waiting)

    def _waited(self) -> float:
        """Seconds in this collective. On a GPU it is the device that waits, unseen: seconds in this phase."""
        return time.monotonic() - (self._since if _on_gpu() else self._waiting_since)

    def _collective(self) -> str:
        """The function of torch.distributed, or of time shards that wait, which the training thread is in, or ''."""
        frame = sys._current_frames().get(self._thread_id)
        found = ""
        while frame is not None:
            code = frame.f_code
            if f"torch{os.sep}distributed{os.sep}" in code.co_filename or _waits_in_shards(code):
                found = code.co_name
            frame = frame.f_back
        return found if found != "wrapper" else "a collective"

    def _read(self) -> list[Note | None]:
        return [read_note(note_path(self._ranks, rank)) for rank in range(self._world_size)]

    def _judge(self) -> None:
        since, before = self._since, self._read()
        end = time.monotonic() + 3 * self.period
        while time.monotonic() < end:  # beating on: others read this rank's note now, too
            if self._done.wait(self.period / 2):
                return
            self._beat()
        after = self._read()
        if self._since != since or self._waited() <= self._limit:
            return
        missing = missing_ranks(before, after)
        if not missing and _on_gpu():
            # Everyone works, on something long: a validation, a load, a save. A device that hangs is NCCL's to end.
            self._since = time.monotonic()
            return
        line = lost_message(missing, after, self._note, self._waited())
        present = [rank for rank in range(self._world_size) if rank not in missing]
        with contextlib.suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank_{self._note.rank:05d}.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- {line}\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        try:
            if not present or self._note.rank == present[0]:
                self._on_lost(line)
        finally:  # said or not: on a full disk it may not be
            os._exit(EXIT_LOST)


def _waits_in_shards(code: CodeType) -> bool:
    """Whether it is where time shards wait for what is under way: that is native code, which has no frame."""
    return code.co_filename.endswith(f"paralm_kernels{os.sep}time_shards.py") and code.co_name in ("taken", "settle")


def _on_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _print(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


_current: Watch | None = None
on_lost: Callable[[str], None] | None = None  # what a launcher's worker wants to hear of


@contextlib.contextmanager
def watching(run_dir: Path, rank: int, world_size: int, limit: float) -> Iterator[Watch]:
    """The watch of this process while it trains; :func:`note` speaks to it."""
    global _current
    with Watch(run_dir, rank, world_size, limit, on_lost) as _current:
        try:
            yield _current
        finally:
            _current = None


def note(phase: str, step: int = 0) -> None:
    """Say what this rank begins: ``start``, ``load``, ``step``, ``validation`` or ``save``, of which step."""
    if _current is not None:
        _current.note(phase, step)
