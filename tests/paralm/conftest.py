"""What the tests of runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paralm.config import Config
from tests.conftest import settings


@pytest.fixture
def make(corpus: Path, prepared: Path, tmp_path: Path) -> Any:
    """``make(name, **sections)``: a configuration whose run is ``tmp_path / name``."""

    def make(name: str, **sections: Any) -> Config:
        base = settings(corpus, prepared, tmp_path, **sections)
        base["run"]["name"] = name
        return Config.model_validate(base)

    return make
