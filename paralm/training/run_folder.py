"""A run is a folder: what lies where, who may write there, and what may not change when it continues.

config.yaml  environment.json  metrics.jsonl  tensorboard/  checkpoints/  eval/  report.md  *.png
attempts/000001.json   one file per start; a later file tells an earlier attempt to leave
ranks/, stacks/        process ids and stack dumps of the ranks
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paralm.config import Config
from paralm.config_errors import one_line
from paralm.config_yaml import read
from paralm.errors import ConfigError, RunError
from paralm.training.checkpoint import has_steps, write_atomically

_PACKAGES = ("paralm", "torch", "triton", "deepspeed", "numpy", "sentencepiece", "datasets", "safetensors")


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.attempts = path / "attempts"
        self.stacks = path / "stacks"
        self.ranks = path / "ranks"
        self.profile = path / "profile"
        self._token_file: Path | None = None

    def saved_config(self) -> Config | None:
        """The configuration the run was started with, or None for a new run."""
        if not self.config_file.exists():
            return None
        try:
            data, lines = read(self.config_file, str(self.config_file))
            return Config.model_validate(data)
        except ConfigError as error:
            raise RunError(str(error)) from None
        except ValidationError as error:
            where = str(self.config_file)
            wrong = one_line(error, lambda key: (lines.get(key, 0), f"{where}:{lines[key]}" if key in lines else where))
            raise RunError(wrong) from None

    def check_same_run(self, config: Config, frozen: Callable[[Config, Config], list[tuple[str, Any, Any]]]) -> None:
        """Refuse to continue a run under keys that would make it another run; both values are named.

        Without a checkpoint there is nothing to continue, and the configuration may still be mended.
        """
        saved = self.saved_config() if has_steps(self.checkpoints) else None
        if saved is None:
            return
        differences = frozen(saved, config)
        if differences:
            key, old, new = differences[0]
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise RunError(
                f"{key}: the run {self.path} was started with {old!r}, now {new!r}{more}; "
                "use another run.name, or training.fork_from"
            )

    def begin_attempt(self) -> int:
        """Register this start and return its number. Of two starts at once the higher number stays."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        number = max((int(p.stem) for p in self.attempts.glob("*.json") if p.stem.isdigit()), default=0)
        text = json.dumps(environment(), indent=1)
        while True:
            number += 1
            try:
                with (self.attempts / f"{number:06d}.json").open("x", encoding="utf-8") as file:
                    file.write(text)
                break
            except FileExistsError:
                continue
        write_atomically(self.path / "environment.json", text)
        return number

    def superseded(self, attempt: int) -> bool:
        """Whether a later attempt has started; this one must not write any more."""
        return (self.attempts / f"{attempt + 1:06d}.json").exists()

    def prove_shared(self, rank: int, broadcast: Callable[[Any], Any], patience: float = 60.0) -> str | None:
        """Whether this rank sees what rank 0 writes here; returns what is wrong, or None.

        ``broadcast(value)`` returns rank 0's value on every rank.
        """
        token_file = self._token_file = self.path / f".shared-{secrets.token_hex(4)}" if rank == 0 else None
        token = secrets.token_hex(16)
        if token_file is not None:
            with contextlib.suppress(OSError):  # a token that was not written is one that no rank will see
                token_file.write_text(token, encoding="utf-8")
        name, expected = broadcast((token_file.name, token) if token_file is not None else None)
        deadline = time.monotonic() + patience
        found = ""
        while time.monotonic() < deadline:
            try:
                found = (self.path / name).read_text(encoding="utf-8")
            except OSError:
                found = ""
            if found == expected:
                return None
            time.sleep(0.2)
        return f"rank {rank} on {socket.gethostname()} does not see {self.path / name}; run.root must be shared"

    def end_proof(self) -> None:
        """Remove this attempt's token; of another attempt, its ranks may still look for theirs."""
        if self._token_file is not None:
            self._token_file.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions, machine, git commit and command line of this start."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the tree paralm was imported from, '+' if files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
