"""Reports say what is in the stores."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from paralm_data import DataError, Prepared, inspect


def test_a_report_counts_what_is_there(prepared: Prepared) -> None:
    report, held_out = inspect(prepared.path, samples=2, sample_tokens=10, top=5)
    store, tokenizer = prepared.train, prepared.tokenizer
    assert (report.path, held_out.path) == (store.path, prepared.held_out.path)
    assert (report.n_documents, report.n_tokens, report.n_bytes) == (store.n_documents, store.n_tokens, store.n_bytes)
    assert report.bytes_per_token == store.n_bytes / (store.n_tokens - 2 * store.n_documents)
    counts = Counter(store.tokens.tolist())
    assert [(c.id, c.count) for c in report.most_frequent] == sorted(counts.items(), key=lambda x: (-x[1], x[0]))[:5]
    assert [c.piece for c in report.most_frequent] == [tokenizer.piece(c.id) for c in report.most_frequent]
    assert report.used_ids == len(counts)
    lengths = np.sort(np.diff(store.doc_ends, prepend=0))
    assert report.length_quantiles[0.0] == lengths.min()
    assert report.length_quantiles[1.0] == lengths.max()
    assert report.length_quantiles[0.5] in (
        np.sort(lengths)[len(lengths) // 2],
        np.sort(lengths)[len(lengths) // 2 - 1],
    )
    assert len(report.samples) == 2
    for sample in report.samples:
        ids = store.document(sample.document)
        assert sample.text == tokenizer.decode(ids[1 : min(11, len(ids) - 1)])
        assert sample.truncated == (len(ids) - 2 > 10)
        assert sample.n_tokens == len(ids)


def test_samples_are_chosen_by_the_seed(prepared: Prepared) -> None:
    first, again, other = (inspect(prepared.train.path, seed=seed)[0].samples for seed in (0, 0, 1))
    assert first == again != other


def test_more_samples_than_documents(prepared: Prepared) -> None:
    samples = inspect(prepared.held_out.path, samples=10_000)[0].samples
    assert sorted(s.document for s in samples) == list(range(prepared.held_out.n_documents))


def test_a_folder_without_stores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a token store"):
        inspect(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        inspect(tmp_path / "absent")


@pytest.mark.parametrize("inside", ["train", "validation/more"])
def test_a_store_may_be_the_working_folder(copied: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    (copied / "validation").mkdir()
    (copied / "held_out").rename(copied / "validation" / "more")
    monkeypatch.chdir(copied / inside)
    assert inspect(".")[0].n_documents == inspect(copied / inside)[0].n_documents
    monkeypatch.chdir(copied / inside / "..")
    assert inspect(Path(inside).name)[0].samples


def test_a_store_without_its_tokenizer_is_refused(copied: Path) -> None:
    (copied / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model: missing"):
        inspect(copied)
