"""Which documents are worth training on: by length, language and the field's published quality heuristics.

Length is in characters. Languages are py3langid's, on the first LOOK characters. The quality rules, whose limits are
those of the papers:

``gopher``             Rae et al. 2021 (arXiv 2112.11446), appendix A1.1: number and mean length of words, symbols,
                       bullets, ellipses, alphabetic words, stop words
``gopher_repetition``  the same, table A1: repeated lines, paragraphs and n-grams
``c4``                 Raffel et al. 2020 (arXiv 1910.10683), section 2.2, of whole documents: a curly brace, "lorem
                       ipsum", fewer than five sentences (its rules for single lines would edit documents)

A rule is a function of the text alone, and a document's fate is the first rule that it breaks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from paralm_data.errors import DataError
from paralm_data.steps import LanguageRule, StepsSpec

LOOK = 4096  # characters that the language is told from
EXTRA = "install paralm[corpus]"

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_LENGTH, MAX_MEAN_LENGTH = 3, 10
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES, MAX_ELLIPSIS_LINES = 0.9, 0.3
MIN_ALPHABETIC_WORDS = 0.8
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
MIN_STOP_WORDS = 2
BULLETS = ("•", "-", "*", "‣")
MAX_DUPLICATE_LINES = MAX_DUPLICATE_PARAGRAPHS = 0.3
MAX_DUPLICATE_LINE_CHARACTERS = MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.2
TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
MIN_SENTENCES = 5
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")
_PARAGRAPH = re.compile(r"\n\s*\n")


def gopher(text: str) -> str | None:
    """What of the quality rules a text breaks, None for a good one."""
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return "words"
    if not MIN_MEAN_LENGTH <= sum(map(len, words)) / len(words) <= MAX_MEAN_LENGTH:
        return "mean word length"
    if max(text.count("#"), text.count("...") + text.count("…")) > MAX_SYMBOLS_PER_WORD * len(words):
        return "symbols"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(BULLETS) for line in lines) > MAX_BULLET_LINES * len(lines):
        return "bullets"
    if sum(line.endswith(("...", "…")) for line in lines) > MAX_ELLIPSIS_LINES * len(lines):
        return "ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) < MIN_ALPHABETIC_WORDS * len(words):
        return "alphabetic words"
    if len(STOP_WORDS.intersection(word.lower().strip(".,;:!?\"'()") for word in words)) < MIN_STOP_WORDS:
        return "stop words"
    return None


def gopher_repetition(text: str) -> str | None:
    """Which repetition rule a text breaks, None for a good one."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    paragraphs = [part for part in map(str.strip, _PARAGRAPH.split(text)) if part]
    for parts, most, most_characters, name in (
        (lines, MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS, "lines"),
        (paragraphs, MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS, "paragraphs"),
    ):
        again, characters = _repeated(parts)
        if again > most * len(parts) or characters > most_characters * len(text):
            return f"duplicate {name}"
    words = text.split()
    total = sum(map(len, words))
    for size, most in TOP_NGRAMS:
        if _top(words, size) > most * total:
            return f"top {size}-gram"
    for size, most in DUPLICATE_NGRAMS:
        if _duplicated(words, size) > most * total:
            return f"duplicate {size}-grams"
    return None


def c4(text: str) -> str | None:
    """Which rule of C4 for whole documents a text breaks, None for a good one."""
    if "{" in text:
        return "curly brace"
    if "lorem ipsum" in text.lower():
        return "lorem ipsum"
    return "sentences" if len(_SENTENCE_END.findall(text)) < MIN_SENTENCES else None


def _repeated(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts occurred before, and their characters."""
    seen: set[str] = set()
    again = characters = 0
    for part in parts:
        if part in seen:
            again += 1
            characters += len(part)
        seen.add(part)
    return again, characters


def _top(words: Sequence[str], size: int) -> int:
    """Characters in all occurrences of the most frequent n-gram; of equally frequent ones, the longest."""
    counts = Counter(zip(*(words[i:] for i in range(size))))
    if not counts:
        return 0
    often = max(counts.values())
    return 0 if often < 2 else often * max(sum(map(len, gram)) for gram, count in counts.items() if count == often)


def _duplicated(words: Sequence[str], size: int) -> int:
    """Characters of the words that are in an n-gram which occurred before, each word counted once."""
    seen: set[tuple[str, ...]] = set()
    characters = counted = 0  # words up to ``counted`` are
    for at, gram in enumerate(zip(*(words[i:] for i in range(size)))):
        if gram in seen:
            characters += sum(map(len, words[max(at, counted) : at + size]))
            counted = at + size
        seen.add(gram)
    return characters


QUALITY: dict[str, Callable[[str], str | None]] = {"gopher": gopher, "gopher_repetition": gopher_repetition, "c4": c4}


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(f"data.steps.language needs py3langid ({error}); {EXTRA}") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def algorithm(steps: StepsSpec) -> str:
    """What the fates depend on beside the text and the steps: another release may tell languages otherwise."""
    return f"py3langid {version('py3langid')}" if steps.language.keep else ""


def language(text: str) -> tuple[str, float]:
    """The ISO 639-1 code of a text's language, and its probability."""
    found, probability = _identifier().classify(text[:LOOK])
    return str(found), float(probability)


def check(steps: StepsSpec) -> None:
    """DataError for a language that is not known, or a library that is not installed."""
    if steps.language.keep:
        known = sorted(_identifier().labels)
        for code in steps.language.keep:
            if code not in known:
                raise DataError(f"language '{code}' is unknown (one of: {' '.join(known)})")


def broken_rule(text: str, steps: StepsSpec) -> str | None:
    """The first rule of ``steps`` that a (normalised) text breaks, as ``rule`` or ``rule: part``; None for none."""
    length = steps.length
    if len(text) < length.min_characters or len(text) > (length.max_characters or math.inf):
        return "length"
    if steps.language.keep and not _in(steps.language, text):
        return "language"
    for name in steps.quality:
        part = QUALITY[name](text)
        if part is not None:
            return f"{name}: {part}"
    return None


def _in(rule: LanguageRule, text: str) -> bool:
    code, probability = language(text)
    return code in rule.keep and probability >= rule.min_probability
