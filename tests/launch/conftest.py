"""Fixtures of the launchers' tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import settings
from tests.launch.launching import STEPS, Start, losses


@pytest.fixture(scope="session")
def reference(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one rank, in this process."""
    from paralm.config import Config
    from paralm.training.loop import train

    folder = tmp_path_factory.mktemp("reference")
    train(Config.model_validate(settings(corpus, prepared, folder, training={"max_steps": STEPS})))
    return losses(folder / "tiny")


@pytest.fixture
def start(corpus: Path, prepared: Path, tmp_path: Path) -> Iterator[Start]:
    """``start(*overrides, prefix=[])``: a ``paralm train`` of the run ``tmp_path / "tiny"``; ended with the test."""
    path = tmp_path / "run.yaml"
    made = settings(corpus, prepared, tmp_path, training={"max_steps": STEPS}, checkpoint={"every": 4})
    path.write_text(yaml.safe_dump(made))
    started: list[subprocess.Popen[str]] = []

    def go(*overrides: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-m", "paralm_launch", "train", str(path), *overrides]
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        )
        return started[-1]

    yield go
    for process in started:
        if process.poll() is None:
            for below in [*psutil.Process(process.pid).children(recursive=True), process]:
                below.kill()
        process.wait()
