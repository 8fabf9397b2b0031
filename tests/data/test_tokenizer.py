"""Nothing is lost between text and ids, whatever the text; training is a function of the text."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paralm_data import DataError, Tokenizer
from paralm_data.split import digest
from paralm_data.tokenizer import SEGMENT
from paralm_data.tokenizer_training import Sample, cut

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
_draw = random.Random(1)
WORDS = ["".join(_draw.choices("abcdefghij", k=_draw.randint(2, 8))) for _ in range(300)]
NASTY = [
    "\t", "\n", "\r\n", "\r", "\0", " ", "  ", "▁", "▁▁", "\u2585", "\u3000", "\u00a0", "\ufeff", "\u2028", "\x85",
    "🙂", "👩‍👩‍👧", "e\u0301", "é", "ﬁ", "Å", "日本語", "<unk>", "<s>", "</s>", "<pad>", "<0x41>", "42", "\x7f",
    "\U0010ffff", "\n        ", "\n\t\t", "def f(x):\n    return x\n",
]  # fmt: skip
any_text = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=3))).map("".join))


def default_model(**options: object) -> bytes:
    """A sentencepiece model as others train them: NFKC, a dummy prefix, no bytes."""
    model = io.BytesIO()
    lines = ["hello wide world, " + " ".join(WORDS[i : i + 5]) for i in range(len(WORDS))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=100, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return Tokenizer.train(texts, path, vocab_size=400, kind=request.param)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary that has room for the pieces of tabs and indents."""
    texts = [Path(sentencepiece.__file__).read_text(), Path(np.__file__).read_text(), Path(io.__file__).read_text()]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("large") / "t.model", vocab_size=1200)


@relaxed
@given(text=any_text)
def test_nothing_is_lost(trained: Tokenizer, large: Tokenizer, text: str) -> None:
    for tokenizer in (trained, large):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


@relaxed
@given(text=any_text)
def test_no_text_encodes_to_a_special_id(trained: Tokenizer, text: str) -> None:
    special = {trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id}
    assert not special & set(trained.encode(text))


@relaxed
@given(texts=st.lists(any_text, max_size=5), threads=st.integers(1, 3))
def test_a_batch_is_each_by_itself(trained: Tokenizer, texts: list[str], threads: int) -> None:
    assert trained.encode_batch(texts, threads) == [trained.encode(text) for text in texts]


@settings(relaxed, max_examples=10)
@given(unit=st.sampled_from(["x", "line\n", "\n    a ▁", "日本\r\n", "🙂"]), length=st.integers(0, 3 * SEGMENT))
def test_long_documents_lose_nothing(trained: Tokenizer, unit: str, length: int) -> None:
    text = (unit * (length // len(unit) + 1))[:length]
    assert trained.decode(trained.encode(text)) == text


def test_cutting_a_long_document_costs_little(large: Tokenizer) -> None:
    text = Path(pickle.__file__).read_text()
    whole = large._model.encode(text)
    assert len(large.encode(text)) <= len(whole) * 1.01


def test_special_ids(trained: Tokenizer) -> None:
    assert (trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2, 3)
    assert trained.vocab_size == 400
    assert trained.lossless
    assert trained.decode([trained.bos_id, *trained.encode("a"), trained.eos_id, trained.pad_id]) == "a"


def test_digits_are_single_pieces(trained: Tokenizer) -> None:
    assert [trained.piece(i) for i in trained.encode("4242")] == list("4242")


def test_indents_and_tabs_are_pieces(large: Tokenizer) -> None:
    assert [large.piece(i) for i in large.encode("\n    \n\t\t")] == ["\n▁▁▁▁", "\n\t\t"]


def test_a_character_may_span_ids(trained: Tokenizer) -> None:
    ids = trained.encode("\U0001f9ff")
    assert len(ids) == 4
    assert trained.decode(ids[:2]) == "\ufffd"
    assert trained.decode_bytes(ids[:2]) + trained.decode_bytes(ids[2:]) == "\U0001f9ff".encode()


def test_half_a_surrogate_pair_is_no_text(trained: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        trained.encode("a\ud800")


def test_ids_outside_the_vocabulary_are_refused(trained: Tokenizer) -> None:
    for ids in ([400], [5, -1]):
        with pytest.raises(DataError, match=f"id {ids[-1]} is outside"):
            trained.decode(ids)


def test_training_is_a_function_of_the_texts(tmp_path: Path, texts: list[str]) -> None:
    for kind in ("bpe", "unigram"):
        one = Tokenizer.train(texts, tmp_path / "one.model", 350, kind)
        two = Tokenizer.train(iter(texts), tmp_path / "two.model", 350, kind)
        assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
        assert one.sha256 == two.sha256 == Tokenizer.load(tmp_path / "one.model").sha256


def test_long_lines_and_reserved_characters_are_trained_on(tmp_path: Path) -> None:
    # sentencepiece drops sentences that are long, and what it reserves for itself (a tab, U+2585) splits or drops them.
    text = "\u2585\t".join(["zyzzyva"] * 20_000) + "\t".join(WORDS) + "a" * 20_000
    tokenizer = Tokenizer.train([text], tmp_path / "t.model", 300)
    assert len(tokenizer.encode("zyzzyva")) == 1


def test_a_vocabulary_smaller_than_the_alphabet(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(500)) + " ".join(WORDS) * 5
    tokenizer = Tokenizer.train([text], tmp_path / "t.model", 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("size", "kind"), [(300, "bpe"), (1100, "bpe"), (296, "unigram")])
def test_text_without_a_space_makes_a_tokenizer_that_keeps_spaces(tmp_path: Path, size: int, kind: str) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("ACGT", k=500)) for _ in range(40)]
    tokenizer = Tokenizer.train(texts, tmp_path / "t.model", size, kind)
    assert tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("AC  GT \n    A▁")) == "AC  GT \n    A▁"


def test_another_s_model_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "other.model").write_bytes(default_model())
    tokenizer = Tokenizer.load(tmp_path / "other.model")
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert tokenizer.pad_id == tokenizer.eos_id  # it has none


def test_a_tokenizer_travels_to_workers(trained: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.sha256 == trained.sha256
    assert copy.encode("state 1") == trained.encode("state 1")


def test_numpy_ids_decode(trained: Tokenizer) -> None:
    assert trained.decode(np.array(trained.encode("a cell"))) == "a cell"


@relaxed
@given(st.text(max_size=300), st.integers(1, 40))
def test_cutting_loses_nothing(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)


@relaxed
@given(st.lists(st.text(min_size=1, max_size=60), unique=True), st.integers(1, 200), st.randoms(use_true_random=False))
def test_the_sample_does_not_depend_on_order(texts: list[str], limit: int, random: object) -> None:
    def sample(of: list[str]) -> Sample:
        result = Sample(limit)
        for text in of:
            result.add(digest(text), text)
        return result

    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = sample(texts), sample(shuffled)
    assert list(one.texts()) == list(two.texts())
    size = sum(len(text.encode()) for text in one.texts())
    assert size == one.n_bytes
    assert size >= min(limit, sum(len(text.encode()) for text in texts))
    assert size < limit + 60 * 4


def test_the_sample_covers_one_long_document_evenly() -> None:
    text = "".join(f"{i:07d}\n" for i in range(1_000_000))
    sample = Sample(800_000)
    sample.add(digest(text), text)
    places = sorted(int(piece[:7]) for piece in sample.texts())
    assert len(places) > 90
    assert max(np.diff(places)) < 150_000  # the largest gap of 100 uniform places exceeds 0.15 with probability 1e-5
