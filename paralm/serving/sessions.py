"""States that are kept between requests: a recurrent state has one size however much was read, so they are cheap."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paralm.batching import state_nbytes
from paralm.serving.protocol import ApiError

if TYPE_CHECKING:
    from paralm.models.mixers.base import State

REMEMBERED = 10_000  # names of sessions that were let go, so that the answer says so


@dataclass
class Session:
    """Where a session is: a state, and the tokens it has yet to read. ``tokens``: read or to be read, in all.
    ``nbytes``: of what is kept."""

    name: str
    state: State | None = None
    pending: list[int] = field(default_factory=list)
    tokens: int = 0
    busy: bool = False
    nbytes: int = 0


class Sessions:
    """Sessions by name, at most ``limit`` bytes of them: the one unused for longest goes first. Safe between threads.

    Names are made here and cannot be guessed, so an unknown one never begins a session silently.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Session] = OrderedDict()
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._bytes = 0  # of all that are kept

    def new(self) -> Session:
        """A fresh session, in use until :meth:`put` or :meth:`release`."""
        if not self.limit:
            raise ApiError(400, "session: this server keeps no sessions", "session")
        return Session(secrets.token_urlsafe(18), busy=True)

    def take(self, name: str) -> Session:
        """A session to go on with, in use until :meth:`put` or :meth:`release`.

        ApiError: 409 while another request uses it, 410 if it was let go, 404 if there never was one.
        """
        with self._lock:
            session = self._kept.get(name)
            if session is None:
                raise self._missing(name)
            if session.busy:
                raise ApiError(409, "session: in use by another request", "session", "session_busy")
            session.busy = True
            return session

    def look(self, name: str) -> Session:
        """A session, without taking it; ApiError as :meth:`take`."""
        with self._lock:
            if name not in self._kept:
                raise self._missing(name)
            return self._kept[name]

    def _missing(self, name: str) -> ApiError:
        if name in self._gone:
            return ApiError(
                410, "session: let go, for want of memory or on request; begin a new one", "session", "session_gone"
            )
        return ApiError(404, 'session: no such session; "new" begins one', "session", "session_unknown")

    def put(self, session: Session, state: State, pending: list[int], tokens: int) -> bool:
        """Keep where a session is now. Returns whether it could be kept: one that is larger than the limit alone is
        let go at once, and no other with it."""
        size = state_nbytes(state) + 8 * len(pending)
        with self._lock:
            if session.name in self._gone:
                return False  # deleted meanwhile
            self._bytes += size - (session.nbytes if session.name in self._kept else 0)
            session.state, session.pending, session.busy, session.tokens = state, pending, False, tokens
            session.nbytes = size
            self._kept[session.name] = session
            self._kept.move_to_end(session.name)
            if size > self.limit:
                self._drop(session.name)
            while self._bytes > self.limit:
                idle = next((s for s in self._kept.values() if not s.busy), None)
                if idle is None:
                    break
                self._drop(idle.name)
            return session.name in self._kept

    def release(self, session: Session) -> None:
        """The request that used it came to nothing: the session is as it was."""
        with self._lock:
            session.busy = False

    def delete(self, name: str) -> None:
        """Let a session go; ApiError as :meth:`take`, but one in use may go too (its request ends as usual)."""
        with self._lock:
            if name not in self._kept:
                raise self._missing(name)
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._bytes -= self._kept.pop(name).nbytes
        self._gone[name] = None
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)

    def usage(self) -> tuple[int, int]:
        """How many are kept, and their bytes."""
        with self._lock:
            return len(self._kept), self._bytes
