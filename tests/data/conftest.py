"""A small corpus, its tokenizer and its stores, made once; tests that damage something get a copy."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from paralm_data import DataError, Prepared, SourceSpec, Tokenizer, TokenizerSpec, TokenStore, documents, prepare
from paralm_data.store_writer import StoreWriter

SYLLABLES = ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "xu"]
CODE = ["def", "return", "self.state", "(x)", "if", "=", "42", "x_1", "é", "日本", "🙂", "\t#"]
_draw = random.Random(0)
WORDS = [*CODE, *("".join(_draw.choices(SYLLABLES, k=_draw.randint(1, 4))) for _ in range(400))]


def sentences(seed: int, count: int) -> str:
    """Deterministic text with lines, indents, digits, tabs and characters of several bytes."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        lines.append(" " * draw.choice([0, 0, 4, 8]) + " ".join(draw.choices(WORDS, k=draw.randint(1, 9))))
    return "\n".join(lines)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Distinct documents of one to forty lines."""
    return [sentences(seed, 1 + seed % 40) for seed in range(160)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The documents as a jsonl file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def source(corpus: Path) -> SourceSpec:
    return SourceSpec("jsonl", paths=(str(corpus),))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, source: SourceSpec) -> Prepared:
    """The corpus, prepared; not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(source, TokenizerSpec(vocab_size=400), out, held_out_fraction=0.2, threads=1)


@pytest.fixture(scope="session")
def tokenizer(prepared: Prepared) -> Tokenizer:
    return prepared.tokenizer


@pytest.fixture
def copied(prepared: Prepared, tmp_path: Path) -> Path:
    """A copy of the prepared folder that a test may damage."""
    return Path(shutil.copytree(prepared.path, tmp_path / "data"))


@pytest.fixture
def make_store(tmp_path: Path, tokenizer: Tokenizer) -> Callable[[list[list[int]]], TokenStore]:
    """Builds a store whose documents have the given ids (without BOS and EOS)."""
    made = 0

    def make(documents: list[list[int]]) -> TokenStore:
        nonlocal made
        made += 1
        with StoreWriter(tmp_path / f"store{made}", tokenizer) as writer:
            writer.add(documents, [2 * len(ids) for ids in documents])
            return writer.finish()

    return make


@dataclass
class Bench:
    """Where a case does its damage: an empty folder, a copy of prepared data, and a good source."""

    folder: Path
    data: Path
    source: SourceSpec

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def read(self, kind: str, path: Path | str, **options: Any) -> Callable[[], object]:
        return lambda: list(documents(SourceSpec(kind, paths=(str(path),), **options)))

    def prepare(self, **changes: Any) -> Callable[[], object]:
        asked: dict[str, Any] = {
            "source": self.source, "tokenizer": TokenizerSpec(vocab_size=400), "out": self.folder / "out",
            "held_out_fraction": 0.2, **changes,
        }  # fmt: skip
        return lambda: prepare(**asked)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but for the lock."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture
def refused(
    tmp_path: Path, copied: Path, source: SourceSpec, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Bench], tuple[Callable[[], object], str]]], None]:
    """Checks a case of damaged input: a one-line DataError that names the culprit, and every file as it was."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bench").mkdir()

    def check(case: Callable[[Bench], tuple[Callable[[], object], str]]) -> None:
        call, culprit = case(Bench(tmp_path / "bench", copied, source))
        before = snapshot(tmp_path)
        with pytest.raises(DataError) as caught:
            call()
        message = str(caught.value)
        assert culprit in message
        assert "\n" not in message
        assert len(message) < 500
        after = snapshot(tmp_path)
        assert {path: after.get(path) for path in before} == before
        # Only a tokenizer that was finished before the damage was met may have been added, and work for another try.
        made = {Path(path).name for path in after if path not in before and ".work" not in Path(path).parts}
        assert made <= {"tokenizer.model", "tokenizer.json"}

    return check
