"""docs/scaling.md is what benchmarks/scaling_study.py makes of the code there is: some of it made again in every run of
the tests, more of it in the slow ones; all of it by `make scaling-study`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import scaling_study
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return scaling_study


@pytest.fixture(scope="module")
def document(study: Any) -> str:
    text: str = study.DOCUMENT.read_text(encoding="utf-8")
    return text


def parts_of(text: str) -> set[str]:
    """Rows of tables and paragraphs."""
    return {line for line in text.splitlines() if line.strip()}


def test_the_document_is_whole(study: Any, document: str) -> None:
    assert document.startswith(study.HEADER + "\n\n## ")
    assert list(study.sections_of(document)) == list(study.SECTIONS)
    assert "(scaling.png)" in document
    assert study.FIGURE.is_file()


@pytest.mark.parametrize("title", ["What the numbers rest on", "If the assumptions are wrong"])
def test_a_section_made_again_is_the_same(title: str, study: Any, document: str) -> None:
    assert study.SECTIONS[title]() == study.sections_of(document)[title]


def test_the_runs_made_again_are_the_same(study: Any, document: str) -> None:
    """Not Titans', whose traces take minutes."""
    models = ("paragru", "xlstm", "transformer")
    again = study.configurations(models)
    assert parts_of(again) <= parts_of(study.sections_of(document)["The eighteen runs"])
    assert sum(line.startswith("| `7b/") for line in again.splitlines()) == 2 * 3 * len(models)


@pytest.mark.slow
def test_plans_made_again_are_the_same(study: Any, document: str) -> None:
    known = study.sections_of(document)
    assert parts_of(study.more_gpus(("transformer",))) <= parts_of(known["More GPUs"])
    longest = study.best("paragru", 64, 2**20)
    assert longest is not None
    row = study.plans_table("context", [("1M", longest)]).splitlines()[-1]
    assert row in known["Longer sequences"].splitlines()
    assert longest.value("parallel.time") >= 16
