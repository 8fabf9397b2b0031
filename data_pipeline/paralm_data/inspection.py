"""What is in a token store or in a prepared folder: statistics and decoded samples, as plain data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paralm_data import manifest as manifests
from paralm_data.errors import DataError
from paralm_data.permutation import random_permutation
from paralm_data.store import BLOCK, TokenStore, Verify
from paralm_data.tokenizer import Tokenizer

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class TokenCount:
    """A piece and how often it occurs."""

    id: int
    piece: str
    count: int


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document, decoded; ``truncated``: it goes on."""

    document: int
    n_tokens: int
    n_bytes: int
    text: str
    truncated: bool


@dataclass(frozen=True)
class StoreReport:
    """Statistics of one store. ``length_quantiles``: tokens of a document, at each of QUANTILES."""

    path: Path
    source: dict[str, object]
    n_documents: int
    n_tokens: int
    n_bytes: int
    bytes_per_token: float  # text bytes over tokens, BOS and EOS not counted
    vocab_size: int
    used_ids: int
    dtype: str
    tokenizer_sha256: str
    length_quantiles: dict[float, int]
    most_frequent: list[TokenCount]
    samples: list[Excerpt]
    verified: str


def inspect(
    path: str | Path, samples: int = 3, sample_tokens: int = 200, top: int = 20, seed: int = 0, verify: Verify = "size"
) -> list[StoreReport]:
    """Reports on the store at ``path``, or on every store of a prepared folder.

    ``samples`` documents are chosen by ``seed`` and decoded up to ``sample_tokens``. Raises DataError for a path with
    no store, a damaged store, or one whose tokenizer is not beside it.
    """
    path = Path(path)
    return [_report(store, samples, sample_tokens, top, seed, verify) for store in find_stores(path)]


def find_stores(path: Path) -> list[Path]:
    """``path`` itself if it is a store, else the stores that :func:`paralm_data.prepare` made below it."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    if (path / manifests.NAME).exists():
        return [path]
    folders = [path, *sorted((path / "mixture").glob("[!.]*"))]
    candidates = [
        candidate
        for folder in folders
        for candidate in (folder / "train", folder / "held_out", *sorted((folder / "validation").glob("[!.]*")))
    ]
    found = [folder for folder in candidates if folder.is_dir()]
    if not found:
        raise DataError(f"{path}: neither a token store nor a folder with prepared data")
    return found


def tokenizer_of(store: TokenStore) -> Tokenizer:
    """The tokenizer that a prepared store lies beside. DataError if there is none or it is another one."""
    path = Path(os.path.abspath(store.path))  # for pathlib the parent of "." is "."
    for folder in (path.parent, path.parent.parent):
        model = folder / "tokenizer.model"
        if model.exists():
            tokenizer = Tokenizer.load(model)
            store.check_tokenizer(tokenizer)
            return tokenizer
    raise DataError(f"{path.parent / 'tokenizer.model'}: missing, so {path.name} cannot be decoded")


def _report(path: Path, samples: int, sample_tokens: int, top: int, seed: int, verify: Verify) -> StoreReport:
    store = TokenStore.open(path, verify=verify)
    tokenizer = tokenizer_of(store)
    counts = np.zeros(store.vocab_size, np.int64)
    for at in range(0, store.n_tokens, BLOCK):
        block = np.bincount(store.tokens[at : at + BLOCK], minlength=store.vocab_size)
        if len(block) > store.vocab_size:
            raise DataError(f"{path}: an id is outside the vocabulary of {store.vocab_size}; verify the store in full")
        counts += block
    lengths = np.diff(store.doc_ends, prepend=0)
    quantiles = np.quantile(lengths, QUANTILES, method="nearest")
    order = random_permutation(store.n_documents, seed, 0, "inspect")
    chosen = order(np.arange(min(samples, store.n_documents)))
    return StoreReport(
        path=path,
        source=store.manifest.source,
        n_documents=store.n_documents,
        n_tokens=store.n_tokens,
        n_bytes=store.n_bytes,
        bytes_per_token=store.n_bytes / max(1, store.n_tokens - 2 * store.n_documents),
        vocab_size=store.vocab_size,
        used_ids=int(np.count_nonzero(counts)),
        dtype=store.manifest.dtype,
        tokenizer_sha256=store.tokenizer_sha256,
        length_quantiles={q: int(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
        most_frequent=[
            TokenCount(int(i), tokenizer.piece(int(i)), int(counts[i]))
            for i in np.argsort(-counts, kind="stable")[:top]
            if counts[i]
        ],
        samples=[_excerpt(store, tokenizer, int(i), sample_tokens) for i in chosen],
        verified=verify,
    )


def _excerpt(store: TokenStore, tokenizer: Tokenizer, index: int, limit: int) -> Excerpt:
    ids = store.document(index)
    return Excerpt(
        document=index,
        n_tokens=len(ids),
        n_bytes=store.document_bytes(index),
        text=tokenizer.decode(ids[: limit + 1].tolist()),
        truncated=len(ids) > limit + 2,
    )
