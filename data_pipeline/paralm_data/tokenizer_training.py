"""Training a sentencepiece model, and the sample of a corpus it is trained on.

The sample is a bottom-k sketch: the corpus's train documents are cut into pieces of a few KiB, each piece has a key
(a hash of its document's digest and its number), and the pieces with the smallest keys, up to ``sample_bytes``, are
kept. It is uniform over the whole corpus, needs memory for itself only, and depends on neither order nor workers.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from paralm_data.errors import DataError, reason

SPACE = "▁"  # U+2581: how sentencepiece writes a space inside a piece
PIECE = 8192  # characters of one sampled piece
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
N_RESERVED = 4 + 256  # the special pieces and the bytes

# A line's end with the indent of the next line, as one piece: sentencepiece never joins the two by itself, because a
# space begins a new word. A tab is a boundary inside its trainer and enters the vocabulary in no other way.
LINE_STARTS = tuple("\n" + SPACE * n for n in (4, 8, 12, 16, 20, 24, 28, 32))
USER_SYMBOLS = ("\t", "\t\t", "\n\t", "\n\t\t", *LINE_STARTS)
SYMBOLS_FROM = 1024  # smaller vocabularies have no room for them

# Characters that mean something inside sentencepiece's trainer: a sentence with one is dropped or misread.
RESERVED = frozenset("\t\0\u2581\u2585")
COVERAGE = 0.9999  # of the characters' occurrences get a piece of their own; the rest are bytes


class Sample:
    """The pieces with the smallest keys, of at least ``limit`` bytes of UTF-8 in all if there are as many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._heap: list[tuple[int, bytes]] = []  # (-key, UTF-8 text): the largest key comes off first

    def add(self, digest: bytes, text: str) -> None:
        """Offer a document. ``digest``: :func:`paralm_data.split.digest` of its text."""
        for key, piece in keyed_pieces(digest, text):
            self.add_piece(key, piece.encode("utf-8"))

    def add_piece(self, key: int, data: bytes) -> None:
        """Offer one piece of :func:`keyed_pieces`, as UTF-8."""
        if self._bytes >= self._limit and -key < self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-key, data))
        self._bytes += len(data)
        while self._bytes - len(self._heap[0][1]) >= self._limit:
            self._bytes -= len(heapq.heappop(self._heap)[1])

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes kept."""
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether it has as much as it may; otherwise it holds all that it was offered."""
        return self._bytes >= self._limit

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """(key, UTF-8 text) of each, in no order."""
        return ((-key, data) for key, data in self._heap)

    def texts(self) -> Iterator[str]:
        """The pieces, in an order that is a function of the sample."""
        for _, data in sorted(self._heap, reverse=True):
            yield data.decode("utf-8")


def keyed_pieces(digest: bytes, text: str) -> Iterator[tuple[int, str]]:
    """The pieces of a document, each with its key: 64 bits, a function of the document's digest and its number."""
    for number, piece in enumerate(cut(text, PIECE)):
        salted = hashlib.blake2b(digest + number.to_bytes(8, "big"), digest_size=8, person=b"sample").digest()
        yield int.from_bytes(salted, "big"), piece


def cut(text: str, size: int) -> Iterator[str]:
    """``text`` in pieces of at most ``size`` characters, cut after a line's end where there is one."""
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1
        end = end if end > start else start + size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def train_model(texts: Iterable[str], vocab_size: int, kind: str) -> bytes:
    """The content of a ``.model`` file, a function of the texts. Raises DataError if they cannot support it."""
    pieces = [piece for text in texts for piece in cut(text, PIECE)]
    if not pieces:
        raise DataError("there is no text to train a tokenizer on")
    if not any(" " in piece for piece in pieces):
        pieces.append(" ")  # without a piece of its own a space would come back as U+2581
    symbols = list(USER_SYMBOLS) if vocab_size >= SYMBOLS_FROM else []
    alphabet = _alphabet(pieces, vocab_size - N_RESERVED - len(symbols))
    others = re.compile(f"[^{re.escape(alphabet)}]+")
    sentences = (fragment for piece in pieces for fragment in others.split(piece) if fragment)
    options: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": vocab_size,
        "character_coverage": 1.0,  # of what is left of the pieces
        "user_defined_symbols": symbols,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        "split_digits": True,
        "split_by_unicode_script": False,
        "max_sentence_length": 4 * PIECE + 1,  # bytes; a longer sentence would be dropped
        "num_threads": 1,
        "unk_id": UNK_ID,
        "bos_id": BOS_ID,
        "eos_id": EOS_ID,
        "pad_id": PAD_ID,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **options)
    except Exception as error:  # sentencepiece raises plain RuntimeErrors with a source line in front
        raise DataError(_explain(error, vocab_size)) from error
    return model.getvalue()


def _alphabet(pieces: list[str], room: int) -> str:
    """The characters that get a piece of their own: the most frequent ones, up to COVERAGE of all occurrences.

    Never more than half the free pieces: a vocabulary of characters alone compresses nothing.
    """
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece)
    wanted, covered, chosen = COVERAGE * counts.total(), 0, [" "]
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted or len(chosen) > max(room // 2, 1):
            break
        if character not in RESERVED and character != " ":
            chosen.append(character)
        covered += count
    return "".join(chosen)


def _explain(error: Exception, vocab_size: int) -> str:
    limit = re.search(r"Vocabulary size too high.*?<= (\d+)", str(error))
    if limit:
        return (
            f"vocab_size {vocab_size} is more than this corpus supports (at most {limit[1]}); "
            "lower data.tokenizer.vocab_size or give more text"
        )
    return f"the tokenizer cannot be trained with vocab_size {vocab_size} ({reason(error)})"
