"""What a token store says about itself: ``manifest.json``, typed, checked, with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from paralm_data.errors import DataError, reason

FORMAT = "paralm token store"
VERSION = 1
NAME = "manifest.json"
TOKENS, DOC_ENDS, DOC_BYTES = "tokens.bin", "doc_ends.bin", "doc_bytes.bin"
DTYPES = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class FileEntry:
    """One file of the store: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Counts are whole-store totals; ``n_bytes`` is UTF-8 bytes of the text, ``n_tokens`` counts BOS and EOS."""

    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    dtype: str
    n_tokens: int
    n_documents: int
    n_bytes: int
    files: dict[str, FileEntry]
    source: dict[str, Any] = field(default_factory=dict)  # where the text came from and which part of it this is
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> bytes:
        """The file's content, with the checksum."""
        content = asdict(self)
        content["checksum"] = _checksum(content)
        # A path that is not UTF-8 has half surrogate pairs: written as JSON escapes them.
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

    def file_sizes(self) -> dict[str, int]:
        """What the counts say each file's size must be."""
        return {
            TOKENS: self.n_tokens * DTYPES[self.dtype],
            DOC_ENDS: self.n_documents * 8,
            DOC_BYTES: self.n_documents * 8,
        }

    @property
    def fingerprint(self) -> str:
        """Stands for the tokens and where documents end, not for where they came from or where they lie."""
        return hashlib.sha256((self.files[TOKENS].sha256 + self.files[DOC_ENDS].sha256).encode("ascii")).hexdigest()


def read(folder: Path) -> Manifest:
    """The manifest of the store in ``folder``. DataError if there is none, or it is damaged or of another version."""
    path = folder / NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: no token store there; run 'paralm data prepare' first")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, so {folder} is not a whole token store; prepare it again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}); prepare the store again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a token store")
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: format version {content.get('version')!r}, this release reads {VERSION}; prepare it again"
        )
    if content.pop("checksum", None) != _checksum(content):
        raise DataError(f"{path}: damaged or edited: its content does not match its checksum")
    try:
        return _typed(content, path)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a whole manifest ({reason(error)})") from error


def _typed(content: dict[str, Any], path: Path) -> Manifest:
    files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
    manifest = Manifest(files=files, **content)
    for entry in fields(Manifest):
        wanted = {"int": int, "str": str}.get(str(entry.type))
        if wanted and type(getattr(manifest, entry.name)) is not wanted:
            raise DataError(f"{path}: '{entry.name}' is {getattr(manifest, entry.name)!r}, not an {entry.type}")
    if manifest.dtype not in DTYPES:
        raise DataError(f"{path}: dtype '{manifest.dtype}' is unknown (one of: {', '.join(DTYPES)})")
    for name, size in manifest.file_sizes().items():
        if name not in files:
            raise DataError(f"{path}: says nothing about {name}")
        if files[name].size != size:
            raise DataError(f"{path}: {name} should have {size} bytes by the counts, {files[name].size} are recorded")
    return manifest


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
