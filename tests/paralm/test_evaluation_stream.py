"""Streaming documents: each token predicted once from its own document, lanes full, memory flat; the text back."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paralm_data import IGNORE, StoreWriter, Tokenizer, TokenStore

from paralm.evaluation.perplexity import split_documents
from paralm.evaluation.stream import pieces, rectangles, select_documents
from paralm.evaluation.text import LossyTokenizerError, count_words, document_pieces, words_in

MakeStore = Callable[[Sequence[int]], TokenStore]


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer.load(prepared / "tokenizer.model")


@pytest.fixture(scope="module")
def make_store(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """``make_store(lengths)``: a store of documents with so many tokens each (BOS and EOS among them)."""

    def make(lengths: Sequence[int]) -> TokenStore:
        rng = np.random.default_rng(sum(lengths))
        with StoreWriter(tmp_path_factory.mktemp("stores") / "store", tokenizer) as writer:
            for length in lengths:
                ids = rng.integers(4, tokenizer.vocab_size, length - 2).tolist()
                writer.add([ids], [len(tokenizer.decode_bytes(ids))])
            return writer.finish()

    return make


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=12),
    rows=st.integers(1, 6),
    chunk=st.integers(1, 40),
    reset_every=st.one_of(st.none(), st.integers(1, 50)),
)
def test_every_token_is_predicted_once_from_what_is_before_it(
    make_store: MakeStore, lengths: list[int], rows: int, chunk: int, reset_every: int | None
) -> None:
    store = make_store(lengths)
    documents = list(range(store.n_documents))
    seen = [np.zeros(length, dtype=int) for length in lengths]
    read: list[list[int]] = []  # by lane: what it has read since its last reset
    for part in rectangles(store, pieces(store, documents, reset_every), rows, chunk):
        height, width = part.tokens.shape
        assert height <= rows
        assert width <= chunk
        read = (
            [[] for _ in range(height)] if not read else [read[i] for i in part.keep] if part.keep is not None else read
        )
        assert len(read) == height
        where = {}
        for segment in part.segments:
            for offset in range(segment.length):
                where[segment.row, segment.column + offset] = (segment.slot, segment.position + offset)
        assert len(where) == part.predictions == int((part.labels != IGNORE).sum())
        for row in range(height):
            for column in range(width):
                if (row, column) not in where:
                    assert part.labels[row, column] == IGNORE
                    continue
                slot, position = where[row, column]
                document = store.document(documents[slot])
                if part.reset[row, column]:
                    read[row] = []
                read[row].append(int(part.tokens[row, column]))
                start = (position - 1) // reset_every * reset_every if reset_every else 0
                assert read[row] == document[start:position].tolist()
                assert part.labels[row, column] == document[position]
                seen[slot][position] += 1
    for counts in seen:
        assert counts[0] == 0  # BOS is never predicted
        assert (counts[1:] == 1).all()


def test_lanes_stay_full_until_documents_run_out(make_store: MakeStore) -> None:
    store = make_store([50, 7, 30, 11, 64, 9, 23, 40])
    parts = list(rectangles(store, pieces(store, range(8)), rows=2, chunk=16))
    total = sum(p.predictions for p in parts)
    assert total == store.n_tokens - store.n_documents
    # Longest first, so the two lanes end within one chunk of each other: no rectangle but the last two has a gap.
    assert all((p.labels != IGNORE).all() for p in parts[:-2])


def test_memory_does_not_depend_on_the_length_of_a_document(make_store: MakeStore) -> None:
    peaks = []
    for length in (20_000, 2_000_000):
        store = make_store([length])
        tracemalloc.start()
        count = sum(p.predictions for p in rectangles(store, pieces(store, [0]), rows=4, chunk=512))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == length - 1
    assert abs(peaks[1] - peaks[0]) < 20_000  # bytes; the longer one has 16 MB of ids


def test_selection_is_fixed_within_the_cap_and_takes_whole_documents(make_store: MakeStore) -> None:
    store = make_store([10 + 7 * (i % 13) for i in range(60)])
    lengths = np.diff(store.doc_ends, prepend=0)
    for cap in (200, 1000, 2000):
        chosen = select_documents(store, cap)
        assert (chosen == select_documents(store, cap)).all()
        assert (np.diff(chosen) > 0).all()
        assert cap - lengths.min() < lengths[chosen].sum() <= cap  # nothing more would have fitted
    assert select_documents(store, 1000)[0] < 20 < 40 < select_documents(store, 1000)[-1]  # not the first ones
    assert len(select_documents(store, None)) == len(select_documents(store, store.n_tokens)) == 60
    assert select_documents(store, 3).tolist() == [int(lengths.argmin())]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_ranks_share_out_disjoint_documents_of_about_equal_size(make_store: MakeStore, parts: int) -> None:
    store = make_store([5 + 3 * (i % 17) for i in range(30)])
    documents = select_documents(store, 600)
    shares = split_documents(store, documents, parts)
    assert len(shares) == parts
    assert sorted(np.concatenate(shares).tolist()) == documents.tolist()
    lengths = np.diff(store.doc_ends, prepend=0)
    loads = [int(lengths[share].sum()) for share in shares]
    assert max(loads) - min(loads) <= int(lengths[documents].max())


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from(" \t\n\u3000\u0085abé水🙂\x1c.,"), max_size=40),
    cuts=st.lists(st.integers(0, 80), max_size=8),
)
def test_words_are_those_of_str_split_however_the_bytes_are_cut(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8")
    places = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    assert words_in(data[a:b] for a, b in itertools.pairwise(places)) == len(text.split())


def test_text_comes_back_from_a_store(prepared: Path, tokenizer: Tokenizer) -> None:
    store = TokenStore.open(prepared / "held_out")
    for document in range(store.n_documents):
        text = tokenizer.decode(store.document(document))
        assert b"".join(document_pieces(store, tokenizer, document)) == text.encode("utf-8")
    words = count_words(store, tokenizer, [0, 2])
    assert words is not None
    assert words.tolist() == [len(tokenizer.decode(store.document(d)).split()) for d in (0, 2)]


def test_a_text_that_does_not_come_back_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", tokenizer) as writer:
        writer.add([tokenizer.encode("a fine text")], [12])  # one byte more than it decodes to
        store = writer.finish()
    with pytest.raises(LossyTokenizerError, match="document 0 decodes to 11 bytes, its text had 12"):
        list(document_pieces(store, tokenizer, 0))
    assert count_words(store, tokenizer, [0]) is None
