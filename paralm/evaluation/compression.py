"""What general-purpose compressors make of exactly the bytes a model was scored on: the line it has to pass.

Each compressor gets the documents as one stream, in the store's order, and nothing else: no training text, and no
mark between documents. The model starts every document from nothing and also pays for saying where it ends.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import ClassVar, Protocol

import zstandard
from paralm_data import Tokenizer, TokenStore

from paralm.evaluation.result import Result
from paralm.evaluation.text import LossyTokenizerError, document_pieces


class Compressor(Protocol):
    """Of a stream: both return compressed bytes."""

    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class CompressionResult(Result):
    """Bits per byte by compressor; empty, with the reason, when the scored text cannot be had back."""

    kind: ClassVar[str] = "compression"

    set: str = "held_out"
    n_bytes: int
    n_documents: int
    bits_per_byte: dict[str, float]
    reason: str | None = None

    @property
    def name(self) -> str:
        """``compression`` for the held-out split, ``compression_SET`` for another set."""
        return self.kind if self.set == "held_out" else f"{self.kind}_{self.set}"

    def scalars(self) -> dict[str, float]:
        """For TensorBoard: ``gzip_9`` and so on."""
        return {key.replace(" -", "_"): value for key, value in self.bits_per_byte.items()}


def compression(
    store: TokenStore, tokenizer: Tokenizer, documents: Iterable[int], set_name: str = "held_out"
) -> CompressionResult:
    """The baselines for a set, or the reason why there are none (a lossy tokenizer)."""
    indices = sorted(int(d) for d in documents)
    n_bytes = sum(store.document_bytes(d) for d in indices)
    try:
        found, reason = compression_baselines(store, tokenizer, indices), None
    except LossyTokenizerError as error:
        found, reason = {}, str(error)
    return CompressionResult(
        set=set_name, n_bytes=n_bytes, n_documents=len(indices), bits_per_byte=found, reason=reason
    )


def compression_baselines(store: TokenStore, tokenizer: Tokenizer, documents: Iterable[int]) -> dict[str, float]:
    """Bits per byte of gzip -9, bzip2 -9, zstd -19 and xz -9e on the text of ``documents``.

    The text is decoded from the tokens a piece at a time; memory is that of the compressors. Empty when the text
    has no bytes. Raises LossyTokenizerError if the tokens do not give the recorded bytes back.
    """
    indices = sorted(int(d) for d in documents)
    n_bytes = sum(store.document_bytes(d) for d in indices)
    text = (piece for document in indices for piece in document_pieces(store, tokenizer, document))
    sizes = compressed_sizes(text, n_bytes)
    return {name: 8 * size / n_bytes for name, size in sizes.items()} if n_bytes else {}


def compressed_sizes(pieces: Iterator[bytes], n_bytes: int) -> dict[str, int]:
    """Bytes that each compressor makes of the pieces joined, in one pass; ``n_bytes``: how many there are."""
    compressors = _compressors(n_bytes)
    sizes = dict.fromkeys(compressors, 0)
    for piece in pieces:
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(piece))
    for name, compressor in compressors.items():
        sizes[name] += len(compressor.flush())
    return sizes


def _compressors(n_bytes: int) -> dict[str, Compressor]:
    # xz -9 has a dictionary of 64 MiB and takes ten times that in memory; one that holds the whole input is as good.
    dictionary = max(1 << 16, min(1 << 26, 1 << max(0, n_bytes - 1).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return {
        "gzip -9": zlib.compressobj(9, zlib.DEFLATED, 31),  # 31: with gzip's header and checksum
        "bzip2 -9": bz2.BZ2Compressor(9),
        "zstd -19": zstandard.ZstdCompressor(level=19).compressobj(),
        "xz -9e": lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters),
    }
