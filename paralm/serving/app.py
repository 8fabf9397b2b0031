"""The FastAPI application: ``POST /v1/completions``, ``GET /v1/models``, ``/health``, ``/v1/sessions/NAME``.

It runs alone (:mod:`paralm.serving.server`) or inside a deployment of Ray Serve (:mod:`paralm.serving.ray_serve`).
Errors have OpenAI's form, one line each, and come before the model is asked anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from paralm.serving.engine import Engine, Job, Piece
from paralm.serving.protocol import ApiError, LogprobWriter, parse_request
from paralm.serving.settings import ServerSettings, is_loopback

if TYPE_CHECKING:
    from paralm_data import Tokenizer

    from paralm.models import LanguageModel


def create_app(
    model: LanguageModel | Callable[[], tuple[LanguageModel, Tokenizer]],
    tokenizer: Tokenizer | None = None,
    settings: ServerSettings | None = None,
    *,
    api_key: str | None = None,
    only_local: bool = True,
) -> FastAPI:
    """The application around a model, or around what a function loads when the application starts.

    ``api_key``: asked of every request but ``/health``, as ``Authorization: Bearer KEY``; None: of none.
    ``only_local``: without a key, answer only requests that name this machine (``Host: 127.0.0.1``, ``localhost``),
    so that a web page open in a browser here cannot reach the model under a name of its own.
    """
    given = settings or ServerSettings()
    expected = None if api_key is None else _digest(api_key)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if tokenizer is not None:
            found: Any = (model, tokenizer)
        else:
            found = await asyncio.to_thread(model)
        engine = Engine(found[0], found[1], given)
        engine.start()
        app.state.engine = engine
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    async def authorize(request: Request) -> None:
        if expected is None:
            # Starlette puts the server's own address where it cannot read what was asked for: then the two differ.
            host = request.headers.get("host")
            if only_local and (request.url.netloc != host or not is_loopback(request.url.hostname or "")):
                raise ApiError(
                    403, f"no API key is set, so only requests to this machine's own names are answered, not to {host}"
                )
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip()), expected):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    app = FastAPI(title="paralm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.created = int(time.time())
    guarded = [Depends(authorize)]
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/v1/models", _models, methods=["GET"], dependencies=guarded)
    app.add_api_route("/v1/completions", _completions, methods=["POST"], dependencies=guarded)
    app.add_api_route("/v1/sessions/{name}", _session, methods=["GET"], dependencies=guarded)
    app.add_api_route("/v1/sessions/{name}", _delete_session, methods=["DELETE"], dependencies=guarded)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    return app


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: a path that is not there, a method that a path does not take."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"internal error: {type(error).__name__}").body(), 500)


async def _health(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    return JSONResponse({"status": "ok" if engine.alive else "stopping"}, 200 if engine.alive else 503)


async def _models(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    count, size = engine.sessions.usage()
    model = {
        "id": engine.settings.model_name,
        "object": "model",
        "created": request.app.state.created,
        "owned_by": "paralm",
        "under_way": engine.under_way,
        "sessions": count,
        "session_bytes": size,
    }
    return JSONResponse({"object": "list", "data": [model]})


async def _session(request: Request, name: str) -> Response:
    session = request.app.state.engine.sessions.look(name)
    return JSONResponse(
        {"id": name, "object": "session", "tokens": session.tokens, "bytes": session.nbytes, "busy": session.busy}
    )


async def _delete_session(request: Request, name: str) -> Response:
    request.app.state.engine.sessions.delete(name)
    return JSONResponse({"id": name, "object": "session", "deleted": True})


async def _read_body(request: Request, limit: int) -> bytes:
    """ApiError 413 as soon as it is too long, 415 for what a browser may send without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send Content-Type: application/json")
    too_long = ApiError(413, f"the request is longer than this server's {limit} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > limit:
        raise too_long
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_long
    return bytes(body)


async def _completions(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    body = await _read_body(request, engine.settings.max_body_bytes)
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

    def deliver(piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    def begin() -> Job:
        job = engine.prepare(parse_request(body))
        engine.submit(job, deliver)
        return job

    # Not in the event loop: a long prompt takes a while to encode. If this request is dropped meanwhile, the job that
    # was begun is told so, or it would hold its session.
    beginning = asyncio.ensure_future(asyncio.to_thread(begin))
    try:
        job = await asyncio.shield(beginning)
    except asyncio.CancelledError:
        beginning.add_done_callback(lambda done: None if done.exception() else engine.cancel(done.result()))
        raise
    answer = _Answer(engine, job)
    if job.request.stream:
        return StreamingResponse(_events(request, engine, job, pieces, answer), media_type="text/event-stream")
    async with contextlib.aclosing(_until_gone(request, engine, job, pieces)) as arriving:
        async for piece in arriving:
            if piece.error is not None:
                raise piece.error
            answer.add(piece)
    return JSONResponse(answer.whole())


async def _until_gone(
    request: Request, engine: Engine, job: Job, pieces: asyncio.Queue[Piece]
) -> AsyncGenerator[Piece]:
    """The pieces of a job until its last one; the job is cancelled when the client goes away, or the caller does."""
    left = len(job.choices)
    gone = asyncio.create_task(_gone(request))
    try:
        while left:
            arriving = asyncio.create_task(pieces.get())
            await asyncio.wait({arriving, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not arriving.done():
                arriving.cancel()
                raise ApiError(499, "the client went away")
            piece = arriving.result()
            left -= piece.finish is not None or piece.error is not None
            yield piece
    finally:
        gone.cancel()
        if left:
            engine.cancel(job)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    request: Request, engine: Engine, job: Job, pieces: asyncio.Queue[Piece], answer: _Answer
) -> AsyncIterator[str]:
    """Server-sent events: a chunk as text becomes certain, the usage if asked for, and [DONE]."""
    try:
        async with contextlib.aclosing(_until_gone(request, engine, job, pieces)) as arriving:
            async for piece in arriving:
                if piece.error is not None:
                    raise piece.error
                yield _event(answer.chunk(piece))
    except ApiError as error:
        yield _event(error.body())
        return
    options = job.request.stream_options
    if options is not None and options.include_usage:
        yield _event(answer.frame([], usage=answer.usage()))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Answer:
    """A job's answer in the making."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job = engine, job
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._texts = {choice.index: "" for choice in job.choices}
        self._finish: dict[int, str | None] = {}
        self._lists: dict[int, dict[str, list[Any]]] = {}
        self._generated = 0
        self._session: str | None = None
        top = job.request.logprobs
        self._writers = {c.index: LogprobWriter(engine.tokenizer, top) for c in job.choices} if top is not None else {}

    def add(self, piece: Piece) -> dict[str, list[Any]] | None:
        """Take a piece in; its log-probabilities, if they were asked for."""
        self._texts[piece.index] += piece.text
        self._generated += piece.tokens
        self._session = piece.session or self._session
        if piece.finish is not None:
            self._finish[piece.index] = piece.finish
        if not self._writers:
            return None
        lists = self._writers[piece.index].write(piece.scores)
        if not self._job.request.stream:
            whole = self._lists.setdefault(piece.index, {key: [] for key in lists})
            for key, values in lists.items():
                whole[key] += values
        return lists

    def usage(self) -> dict[str, int]:
        """Tokens read and generated; a prompt that several completions share counts once."""
        prompt = self._job.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }

    def frame(self, choices: list[dict[str, Any]], **further: Any) -> dict[str, Any]:
        """What is around choices."""
        found = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._engine.settings.model_name,
            "choices": choices,
            **further,
        }
        return found if self._job.request.session is None else {**found, "session": self._session}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece as one event."""
        lists = self.add(piece)
        return self.frame(
            [{"index": piece.index, "text": piece.text, "logprobs": lists, "finish_reason": piece.finish}]
        )

    def whole(self) -> dict[str, Any]:
        """Everything at once."""
        choices = [
            {"index": i, "text": text, "logprobs": self._lists.get(i), "finish_reason": self._finish[i]}
            for i, text in sorted(self._texts.items())
        ]
        return self.frame(choices, usage=self.usage())
