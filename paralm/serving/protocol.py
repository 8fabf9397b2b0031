"""Requests and answers, as clients of OpenAI's completions know them, with ``session`` beside."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator
from pydantic_core import PydanticUseDefault

from paralm.batching import TokenScore

if TYPE_CHECKING:
    from paralm_data import Tokenizer

NEW_SESSION = "new"


class ApiError(Exception):
    """An answer that is an error: HTTP status, one line, and the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _AtFirstFault(FailFast):
    """A list is given up at its first wrong element: a fault for each of a million would take gigabytes."""

    __hash__ = object.__hash__  # a dataclass that compares has none, and a union of annotated types asks for it


_AT_FIRST = _AtFirstFault()
_Ids = Annotated[list[int], _AT_FIRST]
_Texts = Annotated[list[str], _AT_FIRST]


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="allow")  # as in CompletionRequest

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """``POST /v1/completions``.

    ``prompt``: text, token ids, or a list of either. A text begins a document (BOS is put before it); ids are read as
    they are. ``session``: ``"new"`` keeps the state after the answer and returns its name; that name goes on from
    there, so ``prompt`` is only what is new. The fields at the end may only have the values that change nothing. null
    is a field's default, as OpenAI has it.
    """

    # Unknown fields are refused by parse_request, the first of them, not as a fault for each.
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    prompt: str | _Ids | _Texts | Annotated[list[_Ids], _AT_FIRST] = ""
    max_tokens: int = Field(default=16, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1)
    stop: str | _Texts | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    session: str | None = Field(default=None, min_length=1, max_length=64)
    user: str | None = None
    best_of: int | None = None
    suffix: Literal[None, ""] = None
    frequency_penalty: Literal[None, 0] = None
    presence_penalty: Literal[None, 0] = None
    logit_bias: dict[str, Any] | None = Field(default=None, max_length=0)

    @field_validator("max_tokens", "temperature", "top_p", "top_k", "n", "echo", "stream", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any) -> Any:
        if value is None:
            raise PydanticUseDefault
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """As a list."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and isinstance(given[0], int):
            return [given]
        return given  # type: ignore[return-value]

    @property
    def stops(self) -> list[str]:
        """As a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def parse_request(body: bytes) -> CompletionRequest:
    """ApiError 400, one line, for what is no request."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = str(fault["loc"][0]) if fault["loc"] else None
        what = "must be text, token ids, or a list of either" if place == "prompt" else fault["msg"]
        raise ApiError(400, " ".join(f"{place or 'the request'}: {what}".split()), place) from None
    for where, given in (("", request), ("stream_options.", request.stream_options)):
        for unknown in (given.model_extra if given is not None else None) or {}:
            raise ApiError(400, " ".join(f"{where}{unknown}: not supported".split()), f"{where}{unknown}")
    if request.best_of not in (None, request.n):
        raise ApiError(400, "best_of: only as many as n are supported", "best_of")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream=true", "stream_options")
    return request


def token_text(data: bytes, piece: str) -> str:
    """A token as a client sees it: its text, its bytes where they are no whole characters, its name if it has none."""
    if not data:
        return piece
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LogprobWriter:
    """OpenAI's four lists for the tokens of one completion, piece by piece.

    ``text_offset`` is where a token begins in the completion's text (a character of several tokens begins with its
    first); ``top``: how many of the likeliest are reported, the token itself beside them.
    """

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer, self._top, self._offset = tokenizer, top, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def _name(self, token: int) -> str:
        return token_text(self._tokenizer.decode_bytes([token]), self._tokenizer.piece(token))

    def write(self, scores: Sequence[TokenScore | int]) -> dict[str, list[Any]]:
        """Of the next tokens; a bare id where nothing predicted the token."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            token = score if isinstance(score, int) else score.token
            value: float | None = None
            tops: dict[str, float] | None = None
            if not isinstance(score, int):
                value, tops = score.logprob, {}
                for other, likelihood in (*score.top[: self._top], (score.token, score.logprob)):
                    tops.setdefault(self._name(other), likelihood)  # the likelier of two that look alike
            for key, item in zip(found, (self._name(token), value, tops, self._offset), strict=True):
                found[key].append(item)
            self._offset += len(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        return found
