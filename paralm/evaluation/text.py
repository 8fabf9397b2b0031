"""The text of a store's documents, from their tokens, in pieces: bytes for the compressors, words for perplexity."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from paralm_data import Tokenizer, TokenStore

from paralm.errors import UserError

PIECE = 1 << 16  # tokens decoded at once


class LossyTokenizerError(UserError):
    """The tokenizer does not give a document's text back."""


def document_pieces(store: TokenStore, tokenizer: Tokenizer, document: int) -> Iterator[bytes]:
    """UTF-8 bytes of a document's text, in order; a piece may end inside a character. Memory: one piece.

    Raises LossyTokenizerError if the tokenizer loses anything or the bytes are not as many as the store recorded
    when the text was tokenized (the check is made after the last piece).
    """
    if not tokenizer.lossless:
        raise LossyTokenizerError(f"{tokenizer.name}: the tokenizer is lossy: decoding does not give the text back")
    start, end = store.bounds(document)
    total = 0
    for at in range(start + 1, end - 1, PIECE):
        piece = tokenizer.decode_bytes(store.tokens[at : min(at + PIECE, end - 1)].tolist())
        total += len(piece)
        yield piece
    if total != store.document_bytes(document):
        raise LossyTokenizerError(
            f"{store.path}: document {document} decodes to {total} bytes, its text had "
            f"{store.document_bytes(document)}: the tokenizer is lossy"
        )


def count_words(store: TokenStore, tokenizer: Tokenizer, documents: Iterable[int]) -> NDArray[np.int64] | None:
    """Words (what ``str.split`` finds) of each document; None if the tokenizer is lossy."""
    found = []
    try:
        for document in documents:
            found.append(words_in(document_pieces(store, tokenizer, int(document))))
    except LossyTokenizerError:
        return None
    return np.array(found, dtype=np.int64)


def words_in(pieces: Iterable[bytes]) -> int:
    """Words of a text that comes in pieces; a word or a character may span several."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    count, inside = 0, False
    for piece in pieces:
        text = decoder.decode(piece)
        if not text:
            continue
        count += len(text.split()) - (inside and not text[0].isspace())
        inside = not text[-1].isspace()
    return count
