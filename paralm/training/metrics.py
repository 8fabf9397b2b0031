"""Metrics: a JSON object a line in ``metrics.jsonl``, the same numbers in TensorBoard, peaks for MFU.

A line is written whole or not at all as far as a reader is concerned: a run that continues from a checkpoint
cuts every line past it (and a line that a crash left unfinished) and purges TensorBoard from that step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from paralm_data.atomic import write_file

from paralm.errors import RunError

_BLOCK = 1 << 16  # bytes read at once from the end

# Dense peaks of bf16 and of fp32 products, FLOP/s (vendors' data sheets). In fp32 no TF32: rng.whole_float32.
_PEAK_FLOPS = {
    "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835.5e12, 60e12),
    "H200 NVL": (835.5e12, 60e12),
    "H100": (989.4e12, 66.9e12),
    "H200": (989.4e12, 66.9e12),
    "H800": (989.4e12, 66.9e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "MI300X": (1307.4e12, 163.4e12),
    "MI250X": (191.5e12, 47.85e12),  # of one of its two dies, each of which is a device
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak dense FLOP/s, in ``training.precision``, of a device we know, otherwise None (a CPU's is not known)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((value for key, value in _PEAK_FLOPS.items() if all(part in name for part in key.split())), None)
    return found[precision == "fp32"] if found else None


def memory_bytes(device: torch.device) -> int:
    """Peak allocated bytes on a GPU since the start, resident bytes of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines. A last line without its newline is what a crash left, and is passed over.

    Raises RunError, naming file and line, for a damaged line elsewhere.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [_row(line, path, number) for number, line in enumerate(file, start=1) if line.endswith(b"\n")]


def _row(line: bytes, path: Path, number: int | None = None) -> dict[str, Any]:
    """A line's object. Raises RunError, which says the line's ``number`` (None: it is looked for)."""
    try:
        row = json.loads(line)
        whole = isinstance(row, dict) and isinstance(row.get("step"), int)
        problem = None if whole else "a metrics row (no integer 'step')"
    except ValueError:
        problem = "a JSON object"
    if problem is None:
        return row
    if number is None:
        number = path.read_bytes().splitlines(keepends=True).index(line) + 1
    raise RunError(f"{path}:{number}: not {problem}; restore or remove the line")


def last_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines, the last one first, each with the byte after it; what is not asked for is not read.

    Raises RunError as :func:`read_metrics` does.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        end = at = file.seek(0, os.SEEK_END)
        data = b""  # from ``at`` to ``end``
        while at or data:
            begin = data.rfind(b"\n", 0, max(0, len(data) - 1)) + 1
            if at and not begin:  # the last line of ``data`` may begin before it
                size = min(_BLOCK, at)
                at -= size
                file.seek(at)
                data = file.read(size) + data
                continue
            line, data = data[begin:], data[:begin]
            if line.endswith(b"\n"):
                yield end, _row(line, path)
            end -= len(line)


def cut_metrics(path: Path, step: int, validates: bool = False) -> None:
    """Drop rows of steps past ``step`` and an unfinished last line; with ``validates``, its validation too, which is
    going to be made again.

    Steps ascend, so only what is dropped is read as JSON; the other lines are copied: an earlier attempt that lives on
    has the old file. Raises RunError for one that is dropped, or is no object.
    """
    if not path.exists():
        return

    def goes(row: dict[str, Any]) -> bool:
        return bool(row["step"] > step or (validates and row["step"] == step and row.get("kind") == "validation"))

    end = next((end for end, row in last_rows(path) if not goes(row)), 0)
    write_file(path, _lines(path, end))


def _lines(path: Path, end: int) -> Iterator[bytes]:
    """The lines up to byte ``end``."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            end -= len(line)
            if end < 0:
                return
            if not (line.startswith(b"{") and line.endswith(b"}\n")):
                _row(line, path, number)
            yield line


class MetricsWriter:
    """Rank 0's writer. ``step`` counts finished optimizer steps; ``validates``: its validation is yet to come."""

    def __init__(self, metrics: Path, tensorboard: Path, step: int, validates: bool = False) -> None:
        metrics.parent.mkdir(parents=True, exist_ok=True)
        cut_metrics(metrics, step, validates)
        self._path = metrics
        self._file = metrics.open("a", encoding="utf-8")
        self._whole = 0  # bytes of the file before the row in hand
        self._tensorboard = tensorboard
        self._board: Any = None
        self._open_board(step + 1 if tensorboard.exists() else None)

    def _open_board(self, purge: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._tensorboard), purge_step=purge, flush_secs=10)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; every number in it becomes a scalar ``kind/key`` (nested: ``kind/key/sub``).

        Raises OSError, which names the file or TensorBoard's folder, when the storage refuses; the file then ends with
        its last whole row, or does when it next takes one.
        """
        if self._file.closed:  # the storage refused to be mended, too
            self._mend()
        self._whole = self._path.stat().st_size
        try:
            self._file.write(json.dumps(_plain(row)) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()  # it would write what it still holds
            with contextlib.suppress(OSError):
                self._mend()
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        name = f"{row['kind']}/{row['set']}" if "set" in row else str(row["kind"])
        try:
            if self._board is None:
                self._open_board()
            self._scalars(name, {k: v for k, v in row.items() if k not in ("kind", "step", "set")}, row["step"])
        except OSError as error:
            self._board = None  # its thread has ended, and what it still holds is lost: the next row opens another
            raise OSError(error.errno, error.strerror, str(self._tensorboard)) from None

    def _mend(self) -> None:
        """Cut off what there is of a row that was refused, and open the file again."""
        os.truncate(self._path, self._whole)
        self._file = self._path.open("a", encoding="utf-8")

    def _scalars(self, prefix: str, values: dict[str, Any], step: int) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                self._scalars(f"{prefix}/{key}", value, step)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{prefix}/{key}", value, step)

    def close(self) -> None:
        """Raises OSError when the storage refuses the last of TensorBoard's scalars; the file has every row."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become strings, so that every line is valid JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
