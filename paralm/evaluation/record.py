"""``eval/evaluation.json``: what the results in ``eval/`` follow from, and under which circumstances they were made."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from paralm.config import EvalConfig
from paralm.evaluation.result import eval_dir, read_json, write_json

FORMAT = 1


class Basis(BaseModel):
    """What the results follow from: where it is the same, so are they."""

    format: int = FORMAT
    step: int
    checkpoint: str  # SHA-256 of the checkpoint's manifest
    settings: EvalConfig
    reset_every: int | None
    stores: dict[str, str]  # fingerprints by set, held_out first
    scoring: int = 1  # scoring_version


class Record(BaseModel):
    """Written last: where it is, the results are whole."""

    basis: Basis
    parameters: int
    tokens_trained: int
    state_bytes: int | None  # of the state a sequence carries; None: it grows with the sequence
    device: str
    dtype: str
    seconds: float
    files: dict[str, str] = Field(default_factory=dict)  # SHA-256 of each result's JSON, by name


def path_of(run_dir: Path) -> Path:
    """Where a run's record is."""
    return eval_dir(run_dir) / "evaluation.json"


def load(run_dir: Path) -> Record | None:
    """A run's record, None if it has none. RunError, one line, if it is damaged."""
    return read_json(Record, path_of(run_dir))


def save(run_dir: Path, record: Record) -> None:
    """Write the record."""
    write_json(path_of(run_dir), record)


def remove(run_dir: Path) -> None:
    """Before results are replaced: an interruption must not leave new ones under the old record."""
    path_of(run_dir).unlink(missing_ok=True)
