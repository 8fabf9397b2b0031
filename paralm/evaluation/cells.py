"""``eval/NAME.cells/``: an evaluation's pieces of work, each one small file once it is measured.

Every file says what it follows from (the basis: weights, settings, texts), so cells of two bases are never combined,
whatever is in the folder and whoever else writes there. A cell is written whole or not at all: an interrupted
evaluation goes on with the cells that are missing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paralm_data.atomic import write_file
from pydantic import BaseModel, ConfigDict, ValidationError

from paralm.evaluation.result import eval_dir

FORMAT = 1


class SuiteRecord(BaseModel):
    """Written last: where it is, the results are whole. ``files``: SHA-256 of each result's files, by name."""

    digest: str
    basis: dict[str, Any]
    files: dict[str, str]
    cells: int
    device: str
    dtype: str
    parameters: int
    seconds: float  # of all cells, wherever they were measured


class StepRecord(BaseModel):
    """Of one checkpoint: what was measured, in single numbers named ``RESULT/KEY``, to follow them over steps."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    step: int
    basis: dict[str, Any]
    scalars: dict[str, float]


class Cells:
    """The measured cells of one evaluation under one basis."""

    def __init__(self, run_dir: Path, name: str, basis: dict[str, Any]) -> None:
        self.folder = eval_dir(run_dir) / f"{name}.cells"
        self.basis = basis
        self.digest = digest_of(basis)

    def prepare(self, again: bool = False) -> int:
        """Make the folder; remove what follows from another basis (``again``: from this one too). Returns how many
        cells were removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        removed = 0
        for path in self.folder.glob("*.json"):
            if path.name == "record.json":
                continue
            if again or _digest_in(path) != self.digest:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def get(self, cell: str) -> dict[str, Any] | None:
        """What was measured, None if it was not (or under another basis, or the file is damaged)."""
        content = _content(self._path(cell))
        if content.get("basis") != self.digest or content.get("cell") != cell:
            return None
        found = content.get("found")
        return found if isinstance(found, dict) else None

    def seconds(self, names: Sequence[str]) -> float:
        """Time that the cells took, all together."""
        return float(sum(_content(self._path(cell)).get("seconds", 0.0) for cell in names))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the cells that are not measured."""
        return [cell for cell in names if self.get(cell) is None]

    def put(self, cell: str, found: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Keep what was measured; returns it as it will be read back (lists for tuples, text for keys)."""
        content = {"format": FORMAT, "basis": self.digest, "cell": cell, "seconds": seconds, "found": found}
        text = json.dumps(content)
        write_file(self._path(cell), (text + "\n").encode("utf-8"))
        kept: dict[str, Any] = json.loads(text)["found"]
        return kept

    def record(self) -> SuiteRecord | None:
        """The record of whole results of this basis whose files are as they were written."""
        found = load_record(self.folder)
        if found is None or found.digest != self.digest:
            return None
        whole = all(file_digest(self.folder.parent / name) == digest for name, digest in found.files.items())
        return found if whole else None

    def unfinish(self) -> None:
        """Before cells of this basis are measured again: what is there is no longer whole."""
        found = load_record(self.folder)
        if found is not None and found.digest == self.digest:
            (self.folder / "record.json").unlink(missing_ok=True)

    def finish(self, record: SuiteRecord) -> None:
        """Write the record."""
        write_file(self.folder / "record.json", (record.model_dump_json(indent=1) + "\n").encode("utf-8"))

    def remember(self, step: int, scalars: dict[str, float]) -> None:
        """Keep a step's numbers beside those of other steps."""
        record = StepRecord(step=step, basis=self.basis, scalars=scalars)
        folder = _steps_folder(self.folder.parent.parent, self.folder.stem)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f"step_{step:08d}.json", (record.model_dump_json(indent=1) + "\n").encode("utf-8"))

    def _path(self, cell: str) -> Path:
        plain = re.sub(r"[^A-Za-z0-9._=+-]", "_", cell)[:100]
        if plain != cell or plain == "record" or plain.startswith("."):
            plain = f"{plain.lstrip('.')}-{hashlib.sha256(cell.encode()).hexdigest()[:8]}"
        return self.folder / f"{plain}.json"


def load_record(folder: Path) -> SuiteRecord | None:
    """The record in a cells' folder; None if there is none, or a damaged one."""
    try:
        return SuiteRecord.model_validate_json((folder / "record.json").read_bytes())
    except (OSError, ValidationError):
        return None


def _steps_folder(run_dir: Path, name: str) -> Path:
    return eval_dir(run_dir) / f"{name}.steps"


def load_steps(run_dir: Path, name: str) -> dict[int, StepRecord]:
    """What is known of an evaluation's numbers over steps, ascending; damaged files are left out."""
    found = {}
    for path in sorted(_steps_folder(run_dir, name).glob("step_*.json")):
        try:
            record = StepRecord.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        found[record.step] = record
    return dict(sorted(found.items()))


def digest_of(basis: dict[str, Any]) -> str:
    """SHA-256 of what results follow from."""
    text = json.dumps({"format": FORMAT, **basis}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file, None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _content(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest_in(path: Path) -> str | None:
    found = _content(path).get("basis")
    return found if isinstance(found, str) else None
