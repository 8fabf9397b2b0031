"""What the tests of runs and of the server share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paralm_data import Tokenizer
from paralm_data.passkey import texts

from paralm.config import Config
from tests.conftest import settings


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    """Of the tiny corpus."""
    return Tokenizer.load(prepared / "tokenizer.model")


@pytest.fixture(scope="session")
def passkey_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of the passkey texts: one token a digit."""
    return Tokenizer.train(texts(0, 200), tmp_path_factory.mktemp("passkey") / "tokenizer.model", vocab_size=420)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file for needles to lie in."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("".join(f"Line {'abcdefgh'[i % 8]} of a story, é and → too.\nThen some more; " for i in range(40)))
    return path


@pytest.fixture(scope="module")
def lm(tokenizer: Tokenizer) -> Any:
    """What the tests of the server serve."""
    from tests.paralm.serving import model_of

    return model_of("paragru", tokenizer)


@pytest.fixture(scope="module")
def client(lm: Any, tokenizer: Tokenizer) -> Iterator[Any]:
    """A client of it."""
    from tests.paralm.serving import client_of

    with client_of(lm, tokenizer, chunk=8) as found:
        yield found


@pytest.fixture
def make(corpus: Path, prepared: Path, tmp_path: Path) -> Any:
    """``make(name, **sections)``: a configuration whose run is ``tmp_path / name``."""

    def make(name: str, **sections: Any) -> Config:
        base = settings(corpus, prepared, tmp_path, **sections)
        base["run"]["name"] = name
        return Config.model_validate(base)

    return make
