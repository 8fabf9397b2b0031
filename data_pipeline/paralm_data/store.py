"""The token store: a folder of flat files that is mapped, not read.

======================  ==========================================================================================
``tokens.bin``          every document as BOS tokens EOS, end to end; uint16, or uint32 for a vocabulary over 65536
``doc_ends.bin``        uint64: where each document ends (the index after its EOS)
``doc_bytes.bin``       uint64: UTF-8 bytes of each document's text
``manifest.json``       format version, tokenizer SHA-256, dtype, counts, source, each file's size and SHA-256
======================  ==========================================================================================

BOS and EOS occur nowhere but at a document's two ends, so a token alone says where documents begin and end. Opening
checks the manifest and every file's size; ``verify="full"`` reads everything once and checks the SHA-256s, the
document ends and the ids. Nothing is kept in memory per document.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from paralm_data import manifest as manifests
from paralm_data.errors import DataError, reason
from paralm_data.manifest import DOC_BYTES, DOC_ENDS, TOKENS, Manifest
from paralm_data.tokenizer import Tokenizer

Verify = Literal["size", "full"]
BLOCK = 1 << 22  # elements checked at once


class TokenStore:
    """Read-only and safe to share between threads and forked processes. Made by :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._tokens = self._map(TOKENS, manifest.dtype)
        self._ends = self._map(DOC_ENDS, "uint64").view(np.int64)  # no store reaches 2⁶³ tokens
        self._doc_bytes = self._map(DOC_BYTES, "uint64").view(np.int64)

    @classmethod
    def open(cls, path: str | Path, verify: Verify = "full") -> TokenStore:
        """Map the store in folder ``path``.

        Raises DataError, naming the file, for one that is missing, truncated, damaged (found with ``verify="full"``
        wherever it is) or of another format version.
        """
        if verify not in ("size", "full"):
            raise DataError(f"verify is '{verify}'; it must be 'size' or 'full'")
        path = Path(path)
        manifest = manifests.read(path)
        for name, entry in manifest.files.items():
            try:
                size = (path / name).stat().st_size
            except OSError as error:
                raise DataError(f"{path / name}: {reason(error)}; prepare the store again") from error
            if size != entry.size:
                raise DataError(f"{path / name}: has {size} bytes, {entry.size} were written; prepare it again")
        if manifest.n_documents < 1:
            raise DataError(f"{path}: the store has no documents")
        store = cls(path, manifest)
        if int(store._ends[-1]) != manifest.n_tokens:
            raise DataError(
                f"{path / DOC_ENDS}: the last document ends at {int(store._ends[-1])}, not at {manifest.n_tokens}, "
                "the number of tokens"
            )
        if verify == "full":
            store.verify()
        return store

    def verify(self) -> None:
        """Read everything once: SHA-256s, document ends, ids. DataError names the file and what is wrong."""
        for name, entry in self.manifest.files.items():
            if sha256_of(self.path / name) != entry.sha256:
                raise DataError(f"{self.path / name}: damaged: its SHA-256 is not the recorded one; prepare it again")
        self._verify_ends()
        self._verify_tokens()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """DataError unless the store was made with this tokenizer."""
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise DataError(
                f"{self.path}: made with the tokenizer of SHA-256 {self.tokenizer_sha256[:12]}…, and "
                f"{tokenizer.name} is {tokenizer.sha256[:12]}…"
            )

    @property
    def n_tokens(self) -> int:
        """Tokens, BOS and EOS included."""
        return self.manifest.n_tokens

    @property
    def n_documents(self) -> int:
        """Documents."""
        return self.manifest.n_documents

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return self.manifest.n_bytes

    @property
    def vocab_size(self) -> int:
        """The tokenizer's; every id is below it."""
        return self.manifest.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        """Of the ``.model`` file the text was encoded with."""
        return self.manifest.tokenizer_sha256

    @property
    def tokens(self) -> NDArray[Any]:
        """(n_tokens,) uint16 or uint32, mapped read-only."""
        return self._tokens

    @property
    def doc_ends(self) -> NDArray[np.int64]:
        """(n_documents,): the index after each document's EOS, mapped read-only."""
        return self._ends

    @property
    def doc_bytes(self) -> NDArray[np.int64]:
        """(n_documents,): UTF-8 bytes of each document's text, mapped read-only."""
        return self._doc_bytes

    def bounds(self, index: int) -> tuple[int, int]:
        """Where document ``index`` begins and ends in ``tokens``."""
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of {self.n_documents}")
        return int(self._ends[index - 1]) if index else 0, int(self._ends[index])

    def document(self, index: int) -> NDArray[np.int64]:
        """(length,) ids of a document, BOS and EOS included."""
        start, end = self.bounds(index)
        return self._tokens[start:end].astype(np.int64)

    def document_bytes(self, index: int) -> int:
        """UTF-8 bytes of a document's text."""
        self.bounds(index)
        return int(self._doc_bytes[index])

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        try:
            # A plain array over the mapping: numpy's memmap class costs a microsecond at every slice.
            mapped = np.memmap(self.path / name, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
            return np.asarray(mapped)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path / name}: cannot be mapped ({reason(error)})") from error

    def _verify_ends(self) -> None:
        previous, total = 0, 0
        for at in range(0, self.n_documents, BLOCK):
            ends = self._ends[at : at + BLOCK]
            lengths = np.diff(ends, prepend=previous)
            if lengths.min() < 2:
                document = at + int(lengths.argmin())
                raise DataError(
                    f"{self.path / DOC_ENDS}: document {document} ends at {int(self._ends[document])}, less than two "
                    "tokens after the one before it"
                )
            previous = int(ends[-1])
            total += int(self._doc_bytes[at : at + BLOCK].sum())
        if total != self.n_bytes:
            raise DataError(f"{self.path / DOC_BYTES}: documents have {total} bytes, the manifest says {self.n_bytes}")

    def _verify_tokens(self) -> None:
        found = {self.manifest.bos_id: 0, self.manifest.eos_id: 0}
        for at in range(0, self.n_tokens, BLOCK):
            block = self._tokens[at : at + BLOCK]
            largest = int(block.max())
            if largest >= self.vocab_size:
                raise DataError(
                    f"{self.path / TOKENS}: id {largest} at token {at + int(block.argmax())} is outside the "
                    f"vocabulary of {self.vocab_size}"
                )
            for key in found:
                found[key] += int(np.count_nonzero(block == key))
        for at in range(0, self.n_documents, BLOCK):
            ends = self._ends[at : at + BLOCK]
            starts = np.concatenate(([self._ends[at - 1] if at else 0], ends[:-1]))
            for places, key, what in ((starts, self.manifest.bos_id, "begin with BOS"),
                                      (ends - 1, self.manifest.eos_id, "end with EOS")):  # fmt: skip
                wrong = np.flatnonzero(self._tokens[places] != key)
                if len(wrong):
                    raise DataError(f"{self.path / TOKENS}: document {at + int(wrong[0])} does not {what} ({key})")
        for key, count in found.items():
            if count != self.n_documents:
                raise DataError(
                    f"{self.path / TOKENS}: id {key}, which only bounds documents, occurs {count} times in "
                    f"{self.n_documents} documents"
                )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from error
