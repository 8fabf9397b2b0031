"""An evaluation that is interrupted between two of its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, evaluation: Any, after: int) -> Iterator[None]:
    """Whoever measures with ``evaluation`` herein gets Ctrl-C after so many pieces, and passes it on."""
    measure, measured = evaluation.measure, list[str]()

    def stopping(self: Any, cell: str) -> dict[str, Any]:
        if len(measured) == after:
            raise KeyboardInterrupt
        measured.append(cell)
        found: dict[str, Any] = measure(self, cell)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "measure", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield
