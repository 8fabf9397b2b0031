"""The one error of this package: what was given, where, and what to change, in one line."""

from __future__ import annotations


class DataError(ValueError):
    """A source, record, tokenizer or token store that cannot be used. The message is one line."""


def reason(error: BaseException, limit: int = 200) -> str:
    """Another library's error as one short line, for the end of a message of ours."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
