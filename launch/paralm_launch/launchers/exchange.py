"""The files through which a launcher and its ranks speak: configuration, progress, requests, how it ended.

They lie in the run folder, which every rank sees, in a folder of this launch alone that goes when it ends:

    launches/HOST-PID-TOKEN/config.json     what to train
                            progress.jsonl  rows of metrics and lines to say, from rank 0
                            starts          a line for each start of rank 0
                            stop            the number of a signal: save and leave
                            rank_00000.json how a rank ended for good: a result, or an error another start would repeat
                            failures.jsonl  why ranks ended otherwise
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralm import errors as paralm_errors
from paralm.config import Config
from paralm.errors import RunError, UserError
from paralm_launch.errors import user_error

if TYPE_CHECKING:
    from paralm.training.loop import TrainResult


LOST = "lost the other ranks"  # how the failure of a rank begins that only met another's


class Exchange:
    """The folder of one launch; made by the launcher, opened by the ranks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stop_file = path / "stop"
        self._progress = path / "progress.jsonl"
        self._starts = path / "starts"
        self._failures = path / "failures.jsonl"

    @classmethod
    def create(cls, config: Config) -> Exchange:
        """A new folder. Raises RunError where the run folder cannot be written. Remains of dead launches go."""
        launches = config.run_dir / "launches"
        host = socket.gethostname()
        exchange = cls((launches / f"{host}-{os.getpid()}-{secrets.token_hex(4)}").absolute())
        try:
            exchange.path.mkdir(parents=True)
            (exchange.path / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        except OSError as error:
            raise RunError(f"{config.run_dir}: cannot be written: {error.strerror or error}") from None
        for other in launches.glob(f"{host}-*-*"):
            pid = other.name.removeprefix(f"{host}-").split("-")[0]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(other, ignore_errors=True)
        return exchange

    def remove(self) -> None:
        """The folder, and what of the run folder is empty but for it."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()  # a start that was refused leaves nothing

    def config(self) -> Config:
        return Config.model_validate_json((self.path / "config.json").read_text(encoding="utf-8"))

    # -- from the launcher -----------------------------------------------------------------------------------

    def ask_to_stop(self, number: int) -> None:
        """Ask every rank to save and leave, as the signal ``number`` would."""
        unfinished = self.path / "stop.tmp"
        unfinished.write_text(str(number), encoding="utf-8")
        unfinished.rename(self.stop_file)

    # -- from the ranks --------------------------------------------------------------------------------------

    def count_start(self) -> int:
        """Rank 0 starts; returns how often it had before."""
        with self._starts.open("a+", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
            file.flush()
            file.seek(0)
            return len(file.readlines()) - 1

    def progress(self, kind: str, value: Any) -> None:
        """A row (``row``) or a line (``say``) for whoever watches; on a full disk it is lost."""
        with contextlib.suppress(OSError):
            _append(self._progress, {kind: value})

    def end(self, rank: int, **outcome: Any) -> None:
        """How this rank ended, when another start would end alike."""
        path = self.path / f"rank_{rank:05d}.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"time": time.time(), **outcome}), encoding="utf-8")
        unfinished.rename(path)

    def fail(self, rank: int, line: str, trace: str = "") -> None:
        """Why this rank ended, when another start may go well."""
        _append(self._failures, {"rank": rank, "line": line, "trace": trace})

    # -- read by both ----------------------------------------------------------------------------------------

    def outcomes(self) -> list[dict[str, Any]]:
        """How ranks ended for good; errors first, then as they came."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.path.glob("rank_*.json"))]
        return sorted(found, key=lambda outcome: ("result" in outcome, outcome["time"]))

    def failures(self) -> list[dict[str, Any]]:
        return list(_lines(self._failures))

    def starts(self) -> int:
        """How often rank 0 has started."""
        try:
            return len(self._starts.read_text(encoding="utf-8").splitlines())
        except OSError:
            return 0

    def read_progress(self, position: int) -> tuple[list[dict[str, Any]], int]:
        """What was written since ``position``, and the position after it."""
        try:
            with self._progress.open("rb") as file:
                file.seek(position)
                data = file.read()
        except OSError:
            return [], position
        whole = data[: data.rfind(b"\n") + 1]
        return list(_objects(whole.decode("utf-8", "replace"))), position + len(whole)


def _append(path: Path, value: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:  # one write: ranks append to one file
        file.write(json.dumps(value) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return
    yield from _objects(text)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Of each line, but for those that a full disk tore."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


# -- errors, there and back ------------------------------------------------------------------------------------


def describe(error: BaseException) -> dict[str, Any] | None:
    """An error that the user can mend, as JSON; None for any other."""
    known = user_error(error)
    return None if known is None else {"error": type(error).__name__, "message": known[0], "exit_code": known[1]}


def restore_error(outcome: dict[str, Any]) -> UserError:
    """The error that :func:`describe` described: of its own class if that is one of paralm's."""
    kind = getattr(paralm_errors, outcome["error"], UserError)
    error: UserError = kind(outcome["message"])
    error.exit_code = outcome["exit_code"]
    return error


def describe_result(result: TrainResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(result), "run_dir": str(result.run_dir)}


def restore_result(outcome: dict[str, Any]) -> TrainResult:
    from paralm.training.loop import TrainResult

    values = dict(outcome["result"])
    return TrainResult(**{**values, "run_dir": Path(values["run_dir"])})


def trace_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
