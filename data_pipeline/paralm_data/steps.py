"""What is done to a document before it becomes tokens: plain, comparable, JSON-able values, in the order of the fields.

Their names and defaults are those of the configuration section ``data.steps``. With the defaults a document is left
out only if it is empty or its text occurred before.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from paralm_data.errors import DataError
from paralm_data.specs import known

NORMALIZATIONS = ("none", "nfc", "nfkc")
QUALITY_RULES = ("gopher", "gopher_repetition", "c4")


@dataclass(frozen=True)
class LengthRule:
    """How long a document may be, in characters."""

    min_characters: int = 0
    max_characters: int | None = None

    def __post_init__(self) -> None:
        if self.max_characters is not None and self.max_characters < max(1, self.min_characters):
            raise DataError(f"max_characters {self.max_characters} is below min_characters {self.min_characters} or 1")


@dataclass(frozen=True)
class LanguageRule:
    """Languages that are kept (ISO 639-1 codes; none: no detection), with at least this probability."""

    keep: tuple[str, ...] = ()
    min_probability: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))


@dataclass(frozen=True)
class MinHashRule:
    """Near-duplicates by locality-sensitive hashing: ``bands`` bands of ``rows`` minima each, over sets of n-grams of
    ``ngram`` words. Two documents of Jaccard similarity s share a band with probability 1 - (1 - s^rows)^bands.
    """

    enabled: bool = False
    bands: int = 14
    rows: int = 8
    ngram: int = 5
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("bands", "rows", "ngram"):
            if getattr(self, name) < 1:
                raise DataError(f"minhash.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class StepsSpec:
    """See the module. Raises DataError for an unknown name or an impossible value."""

    max_document_bytes: int = 1 << 30
    normalize: str = "none"
    length: LengthRule = field(default_factory=LengthRule)
    language: LanguageRule = field(default_factory=LanguageRule)
    quality: tuple[str, ...] = ()
    exact_duplicates: str = "drop"
    minhash: MinHashRule = field(default_factory=MinHashRule)
    shuffle: str = "none"
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "quality", tuple(self.quality))
        known("normalisation", self.normalize, NORMALIZATIONS)
        for name in self.quality:
            known("quality rule", name, QUALITY_RULES)
        known("exact_duplicates", self.exact_duplicates, ("drop", "keep"))
        known("shuffle", self.shuffle, ("none", "shards"))
        if self.max_document_bytes < 1:
            raise DataError(f"max_document_bytes is {self.max_document_bytes}; it must be at least 1")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StepsSpec:
        """From nested plain values, as a configuration has them."""
        rules = {"length": LengthRule, "language": LanguageRule, "minhash": MinHashRule}
        return cls(**{key: rules[key](**value) if key in rules else value for key, value in values.items()})

    def as_dict(self) -> dict[str, Any]:
        """What differs from the defaults, JSON-able: for manifests, where no entry means none of these steps."""
        return _changes(self, StepsSpec())

    def without_shuffle(self) -> StepsSpec:
        """What decides which documents there are, and their text, but not their order."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self) if not entry.name.startswith("shuffle")}
        return StepsSpec(**own)

    def normalized(self, text: str) -> str:
        """The text as it is kept."""
        return text if self.normalize == "none" else unicodedata.normalize(self.normalize.upper(), text)  # type: ignore[arg-type]


def _changes(value: Any, default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in fields(value):
        own, usual = getattr(value, entry.name), getattr(default, entry.name)
        if own == usual:
            continue
        if is_dataclass(own):
            found[entry.name] = _changes(own, usual)
        else:
            found[entry.name] = list(own) if isinstance(own, tuple) else own
    return found
