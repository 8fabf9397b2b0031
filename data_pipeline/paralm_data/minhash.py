"""Keys that near-duplicates share: bands of a MinHash signature (Broder 1997; Leskovec et al., Mining of Massive
Datasets, section 3.4).

A document is the set of its n-grams of words (lower case, without punctuation at their ends); a shorter one is a single
n-gram of all its words, one without words has no keys. The signature is rensa's, a function of the set and the seed.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np

from paralm_data.errors import DataError
from paralm_data.rules import EXTRA
from paralm_data.steps import MinHashRule

_EDGES = " \t.,;:!?\"'()[]{}<>«»„“”‘’…-–—*_#"


@cache
def _library() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise DataError(f"data.steps.minhash needs rensa ({error}); {EXTRA}") from None
    return rensa.RMinHash


def check(rule: MinHashRule) -> None:
    """DataError if near-duplicates are asked for and the library is not installed."""
    if rule.enabled:
        _library()


def algorithm() -> str:
    """What a signature depends on beside the text and the rule: another library's would not compare."""
    return f"rensa.RMinHash {_library().ALGORITHM_VERSION}"


def shingles(text: str, size: int) -> set[str]:
    """The n-grams of a text."""
    words = [word for word in (w.strip(_EDGES) for w in text.lower().split()) if word]
    if len(words) < size:
        return {" ".join(words)} if words else set()
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}


def band_keys(text: str, rule: MinHashRule) -> list[bytes]:
    """16 bytes a band; two documents share the key of band i exactly if they agree in all its minima."""
    found = shingles(text, rule.ngram)
    if not found:
        return []
    minhash = _library()(rule.bands * rule.rows, rule.seed)
    minhash.update(list(found))
    signature = np.array(minhash.digest(), "<u4").reshape(rule.bands, rule.rows)
    return [
        hashlib.blake2b(i.to_bytes(4, "little") + band.tobytes(), digest_size=16, person=b"minhash").digest()
        for i, band in enumerate(signature)
    ]
