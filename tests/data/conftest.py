"""A small corpus, its tokenizer and its stores, made once; tests that damage something get a copy."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from paralm_data import Prepared, SourceSpec, Tokenizer, TokenizerSpec, TokenStore, prepare
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
