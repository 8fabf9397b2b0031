"""A store gives back exactly what was written, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paralm_data import DataError, Tokenizer, TokenStore
from paralm_data.store_writer import StoreWriter

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
documents = st.lists(st.lists(st.integers(4, 399), max_size=20), min_size=1, max_size=20)


def write(path: Path, tokenizer: Any, batches: list[list[list[int]]]) -> TokenStore:
    with StoreWriter(path, tokenizer, {"from": "here"}) as writer:
        for batch in batches:
            writer.add(batch, [3 * len(ids) for ids in batch])
        return writer.finish()


@settings(relaxed, max_examples=30)
@given(batches=st.lists(documents, min_size=1, max_size=4))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, batches: list[list[list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("store") / "a"
    write(path, tokenizer, batches)
    store = TokenStore.open(path, verify="full")
    flat = [ids for batch in batches for ids in batch]
    assert store.n_documents == len(flat)
    assert store.n_tokens == sum(len(ids) + 2 for ids in flat) == len(store.tokens)
    assert store.n_bytes == 3 * sum(map(len, flat))
    for index, ids in enumerate(flat):
        assert store.document(index).tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]
        assert store.document(index).dtype == np.int64
        assert store.document_bytes(index) == 3 * len(ids)
    assert np.concatenate([store.document(i) for i in range(len(flat))]).tolist() == store.tokens.tolist()


def test_the_batches_a_store_was_written_in_do_not_show(tmp_path: Path, tokenizer: Tokenizer) -> None:
    flat = [[5, 6], [], [7]]
    one = write(tmp_path / "one", tokenizer, [flat])
    two = write(tmp_path / "two", tokenizer, [[ids] for ids in flat])
    assert one.manifest == two.manifest
    for name in one.manifest.files:
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_the_manifest_describes_the_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = write(tmp_path / "a", tokenizer, [[[5, 6], [7]]])
    content = json.loads((store.path / "manifest.json").read_text())
    assert content["version"] == 1
    assert content["dtype"] == "uint16"
    assert content["tokenizer_sha256"] == tokenizer.sha256 == store.tokenizer_sha256
    assert content["source"] == {"from": "here"}
    assert content["vocab_size"] == tokenizer.vocab_size == store.vocab_size
    assert (content["n_tokens"], content["n_documents"], content["n_bytes"]) == (7, 2, 9)
    assert {name: entry["size"] for name, entry in content["files"].items()} == {
        "tokens.bin": 14, "doc_ends.bin": 16, "doc_bytes.bin": 16
    }  # fmt: skip
    assert sorted(path.name for path in store.path.iterdir()) == sorted([*content["files"], "manifest.json"])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_the_vocabulary_decides_the_width_of_an_id(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    names = SimpleNamespace(vocab_size=vocab_size, bos_id=1, eos_id=2, sha256="0" * 64)
    store = write(tmp_path / "a", names, [[[vocab_size - 1, 3]]])
    assert store.tokens.dtype == dtype
    assert TokenStore.open(tmp_path / "a").document(0).tolist() == [1, vocab_size - 1, 3, 2]


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [([400], "id 400"), ([-1], "id -1"), ([5, 1], "BOS"), ([2, 5], "EOS")],
)
def test_ids_that_no_text_has_are_refused(tmp_path: Path, tokenizer: Tokenizer, ids: list[int], complaint: str) -> None:
    with StoreWriter(tmp_path / "a", tokenizer) as writer, pytest.raises(DataError, match=complaint):
        writer.add([[5], ids], [1, 1])
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_store_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with StoreWriter(tmp_path / "a", tokenizer) as writer:
        writer.add([[5]], [1])
        assert [path.name.startswith(".a.tmp") for path in tmp_path.iterdir()] == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_never_overwritten_and_never_empty(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a", tokenizer, [[[5]]])
    with pytest.raises(DataError, match="exists already"):
        StoreWriter(tmp_path / "a", tokenizer)
    with StoreWriter(tmp_path / "b", tokenizer) as writer, pytest.raises(DataError, match="no documents"):
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_documents_are_counted_from_zero(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = write(tmp_path / "a", tokenizer, [[[5], [6]]])
    for index in (-1, 2):
        with pytest.raises(IndexError):
            store.document(index)
        with pytest.raises(IndexError):
            store.document_bytes(index)


def test_a_store_cannot_be_changed_through_its_arrays(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = write(tmp_path / "a", tokenizer, [[[5]]])
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 0


def test_another_tokenizer_is_noticed(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    store = write(tmp_path / "a", tokenizer, [[[5]]])
    store.check_tokenizer(tokenizer)
    other = Tokenizer.train(texts, tmp_path / "o.model", 350)
    with pytest.raises(DataError, match=f"{tmp_path / 'a'}.*{tokenizer.sha256[:12]}.*{other.sha256[:12]}"):
        store.check_tokenizer(other)


def test_the_fingerprint_is_the_tokens_and_the_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = write(tmp_path / "one", tokenizer, [[[5], [6]]]).manifest.fingerprint
    assert write(tmp_path / "same", tokenizer, [[[5], [6]]]).manifest.fingerprint == one
    assert write(tmp_path / "other", tokenizer, [[[5], [7]]]).manifest.fingerprint != one
