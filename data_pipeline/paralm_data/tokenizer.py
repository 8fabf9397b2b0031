"""A sentencepiece model that loses nothing: ``decode(encode(text)) == text`` for every text that UTF-8 can hold.

Models trained here (:mod:`paralm_data.tokenizer_training`) use identity normalisation, no dummy prefix, byte fallback
and split digits, and keep all whitespace. One thing sentencepiece itself loses: it writes a space as U+2581 (``▁``)
inside pieces, so a text's own U+2581 would come back as a space. Here that character is always its three bytes.

Special ids of models trained here: 0 ``<unk>`` (never produced), 1 ``<s>`` (BOS), 2 ``</s>`` (EOS), 3 ``<pad>``. No
text encodes to them, whatever it spells. Any sentencepiece model with BOS and EOS can be used in place; ``lossless``
says whether it keeps the law above.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from paralm_data.atomic import write_file
from paralm_data.errors import DataError, reason
from paralm_data.tokenizer_training import SPACE, train_model

SEGMENT = 4096  # characters sentencepiece is given at once: bounded memory, and half as fast again on long documents
GROUP = 1024  # segments encoded at once
INFO_NAME = "tokenizer.json"
_PROBES = (
    "a", " a", "a ", "  a  b ", "\n", "a\n\n  b\r\n\tc", "\t", "1234", "ﬁ½①Å", "e\u0301é", "日本語🙂\u200d", "\0\x07",
    "▁a▁", "\u3000\u00a0",
)  # fmt: skip


_NOTHING = np.empty(0, np.int32)


class Tokenizer:
    """Text to ids and back; see the module. Safe to share between threads; pickles with its model."""

    def __init__(self, proto: bytes, name: str = "tokenizer") -> None:
        """``proto``: the content of a ``.model`` file. Raises DataError, which says ``name``."""
        self.name = name
        self._proto = proto
        self.sha256 = hashlib.sha256(proto).hexdigest()
        if not proto:
            raise DataError(f"{name}: not a sentencepiece model (the file is empty)")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            size = self._model.get_piece_size()
        except Exception as error:  # sentencepiece raises plain RuntimeErrors and TypeErrors
            raise DataError(f"{name}: not a sentencepiece model, or damaged ({reason(error)})") from error
        if not size:
            raise DataError(f"{name}: not a sentencepiece model (it has no pieces)")
        self.vocab_size: int = size
        self.unk_id: int = self._model.unk_id()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            missing = "BOS" if self.bos_id < 0 else "EOS"
            raise DataError(f"{name}: the model has no {missing} piece, and documents are BOS tokens EOS")
        self.pad_id: int = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        self._bytes = [self._piece_bytes(i) for i in range(size)]
        self._marker = self._byte_ids(SPACE)
        self._exact = self._marker is not None
        self._exact = self._exact and all(self._round_trip(probe) for probe in _PROBES)
        self.lossless: bool = self._exact or all(self._round_trip(probe) for probe in _PROBES)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a ``.model`` file. Beside a ``tokenizer.json``, its SHA-256 must be the one recorded there."""
        path = Path(path)
        try:
            tokenizer = cls(path.read_bytes(), str(path))
        except OSError as error:
            raise DataError(f"{path}: {reason(error)}") from error
        recorded = read_info(path.parent / INFO_NAME).get("sha256") if path.name == "tokenizer.model" else None
        if recorded is not None and recorded != tokenizer.sha256:
            raise DataError(
                f"{path}: damaged or replaced: its SHA-256 begins {tokenizer.sha256[:12]}, and "
                f"{path.parent / INFO_NAME} records {str(recorded)[:12]}"
            )
        return tokenizer

    @staticmethod
    def train(texts: Iterable[str], path: str | Path, vocab_size: int = 4096, kind: str = "bpe") -> Tokenizer:
        """Train on ``texts`` (held in memory) and write ``path``; the same texts give the same file."""
        proto = train_model(texts, vocab_size, kind)
        write_file(Path(path), proto)
        return Tokenizer(proto, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS. DataError for half a surrogate pair, which is no text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text, on ``threads`` threads; equal to :meth:`encode` of each."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads)]

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """As :meth:`encode_batch`, as arrays: four bytes an id, for documents of any length."""
        plan = [list(self._segments(text)) for text in texts]
        segments = [segment for parts in plan for segment in parts]
        pieces: list[NDArray[np.int32]] = []
        for at in range(0, len(segments), GROUP):
            pieces += self._encode_segments(segments[at : at + GROUP], threads)
        found, done = [], 0
        for parts in plan:
            own = pieces[done : done + len(parts)]
            found.append(own[0] if len(own) == 1 else np.concatenate([_NOTHING, *own]))
            done += len(parts)
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control pieces (BOS, EOS, pad) are nothing, bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if self._exact:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        self._check_ids(ids)
        return str(self._model.decode(ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes each id stands for, joined: for streaming, where a character may span ids."""
        ids = [int(i) for i in ids]
        self._check_ids(ids)
        return b"".join([self._bytes[i] for i in ids])

    def piece(self, index: int) -> str:
        """The piece as sentencepiece writes it (``▁`` is a space, ``<0x0A>`` a byte)."""
        self._check_ids([index])
        return str(self._model.id_to_piece(int(index)))

    @property
    def proto(self) -> bytes:
        """The content of the ``.model`` file."""
        return self._proto

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, str]]:
        return Tokenizer, (self._proto, self.name)

    def _check_ids(self, ids: list[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise DataError(f"{self.name}: id {wrong} is outside the vocabulary of {self.vocab_size}")

    def _piece_bytes(self, index: int) -> bytes:
        if self._model.is_control(index):
            return b""
        piece = self._model.id_to_piece(index)
        if self._model.is_byte(index):
            return bytes([int(piece[1:-1], 16)])
        return b" \xe2\x81\x87 " if self._model.is_unknown(index) else piece.replace(SPACE, " ").encode("utf-8")

    def _byte_ids(self, text: str) -> list[int] | None:
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode("utf-8")]
        return ids if all(self._model.is_byte(i) for i in ids) else None

    def _segments(self, text: str) -> Iterator[str]:
        """``text`` in parts that are encoded each by itself: its own U+2581s, and what is between them.

        What is between is cut to SEGMENT characters, before a line's end where there is one.
        """
        if not self._exact:
            yield text
            return
        for number, part in enumerate(text.split(SPACE)):
            if number:
                yield SPACE
            start = 0
            while len(part) - start > SEGMENT:
                end = part.rfind("\n", start + 1, start + SEGMENT)
                end = end if end > 0 else start + SEGMENT
                yield part[start:end]
                start = end
            if start < len(part):
                yield part[start:]

    def _encode_segments(self, segments: list[str], threads: int) -> list[NDArray[np.int32]]:
        try:
            pieces = self._model.encode(segments, num_threads=threads, out_type="numpy")
        except Exception:
            _check_utf8(segments)
            raise
        if self._exact:
            marker = np.array(self._marker, np.int32)
            pieces = [marker if s == SPACE else ids for s, ids in zip(segments, pieces, strict=True)]
        return list(pieces)

    def _round_trip(self, text: str) -> bool:
        return self.decode(self.encode(text)) == text


def _check_utf8(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = f"at character {error.start} of {text[:20]!r}…"
            raise DataError(f"half a surrogate pair, which UTF-8 cannot hold, {where}") from error


def read_info(path: Path) -> dict[str, Any]:
    """What ``tokenizer.json`` records; empty when there is no such file."""
    try:
        info = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    if not isinstance(info, dict):
        raise DataError(f"{path}: not a JSON object")
    return info
