"""What every test shares: two threads at most, and a tiny prepared corpus made once a session."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Machines are busy, and no test asserts a time.
hypothesis.settings.register_profile("paralm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("paralm")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
os.environ.setdefault("RAY_worker_niceness", "0")  # of 15, Ray's default, a busy machine leaves nothing


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test, or a library in it, sets in the environment ends with it. (A ray.init() leaves RAY_AUTH_MODE=token:
    the next cluster, of another home folder, would look for a token there.)
    """
    before = dict(os.environ)
    yield
    for key in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[key]
    os.environ.update(before)


def ran_alone(file: str, test: str) -> bool:
    """Run a test in a process of its own, and say so; False in that process. Ray keeps what it learned of its first
    cluster, its token and its addresses: the second one that a process starts in another home folder does not come up.
    """
    if os.environ.get("PARALM_TEST_ALONE") == "1":
        return False
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"{file}::{test}"]
    environment["PARALM_TEST_ALONE"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    return True


_WORDS = ["the", "a", "of", "river", "stone", "light", "walks", "under", "over", "and", "then", "never", "sings", "old"]
_WORDS += ["seven", "bridge", "12", "307", "because", "north", "cold", "wind", "letter", "answers", "door", "window"]
_WORDS += ["opens", "closes", "slowly", "é", "ü", "水", "→", ";", ",", ".", "(", ")", "def", "return"]


def write_corpus(folder: Path, documents: int = 120, seed: int = 0) -> Path:
    """Text files of 20 to 400 words, the same on every machine."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        lines = [" ".join(rng.choice(_WORDS) for _ in range(rng.randint(3, 12))) for _ in range(rng.randint(6, 40))]
        (folder / f"{index:04d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: tokenizer, train and held-out stores of the tiny corpus."""
    from paralm_data import SourceSpec, TokenizerSpec, prepare

    out = tmp_path_factory.mktemp("data") / "data"
    prepare(SourceSpec(kind="text", paths=[str(corpus)]), TokenizerSpec(vocab_size=320), out, held_out_fraction=0.1)
    return out


def settings(corpus: Path, data_dir: Path | None, root: Path, **sections: Any) -> dict[str, Any]:
    """A small whole configuration as a plain dict; ``sections`` are merged into it, section by section."""
    base: dict[str, Any] = {
        "run": {"name": "tiny", "root": str(root), "seed": 5},
        "data": {
            "source": {"kind": "text", "paths": [str(corpus)]},
            "tokenizer": {"vocab_size": 320},
            "held_out_fraction": 0.1,
        },
        "model": {"d_model": 32, "n_layers": 2, "mixer": {"name": "paragru", "n_heads": 2}},
        "training": {
            "max_steps": 12,
            "seq_len": 32,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "validate_tokens": 500,
            "threads": 1,
        },
        "checkpoint": {"every": 5},
        "eval": {"max_tokens": 500, "rows": 4, "chunk": 64, "sample_tokens": 8, "prompts": ["the "]},
    }
    if data_dir is not None:
        base["data"]["dir"] = str(data_dir)
    for section, values in sections.items():
        base.setdefault(section, {}).update(values)
    return base


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, but for the lock."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def quiet(_: str) -> None:
    """Where warnings go that a test does not look at."""
