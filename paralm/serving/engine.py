"""One thread that steps every request together, and tells each what became of it.

Requests come in and are cancelled from any thread; the model is touched by this one alone. What a completion says does
not depend on the requests beside it (see :mod:`paralm.batching`).
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paralm.batching import Batch, Stream, StreamText, TokenScore
from paralm.errors import UserError
from paralm.generation import stop_ids_of
from paralm.serving.protocol import NEW_SESSION, ApiError, CompletionRequest
from paralm.serving.sessions import Session, Sessions
from paralm.serving.settings import ServerSettings

if TYPE_CHECKING:
    from paralm_data import Tokenizer

    from paralm.models import LanguageModel


@dataclass(frozen=True)
class Piece:
    """What is new of one completion. ``finish``: ``stop`` or ``length`` at its end; ``error``: it came to nothing."""

    index: int
    text: str
    scores: Sequence[TokenScore | int] = ()
    finish: str | None = None
    tokens: int = 0  # generated, at the end
    session: str | None = None  # kept under this name
    error: ApiError | None = None


@dataclass(eq=False)
class Choice:
    """One completion under way."""

    index: int
    text: StreamText
    echo: str | None  # of the prompt, before the rest
    own: list[int]  # the prompt's tokens that the request gave, BOS before a text not among them
    scored: int = 0  # tokens whose scores were handed out
    begun: bool = False


@dataclass(eq=False)
class Job:
    """A request's completions, and who is told."""

    request: CompletionRequest
    choices: list[Choice]
    prompt_tokens: int
    session: Session | None = None
    deliver: Callable[[Piece], None] = lambda piece: None
    left: set[int] = field(default_factory=set)
    cancelled: bool = False

    @property
    def streams(self) -> list[Stream]:
        """Of every choice."""
        return [choice.text.stream for choice in self.choices]


class Engine:
    """Around a model. :meth:`start` it, :meth:`submit` jobs, :meth:`stop` it."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.sessions = Sessions(settings.session_bytes)
        self._batch = Batch(model, rows=settings.max_concurrent, chunk=settings.chunk)
        self._jobs: dict[Stream, tuple[Job, Choice]] = {}
        self._inbox: deque[tuple[str, Job]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._under_way = 0
        self._thread = threading.Thread(target=self._run, name="paralm-engine", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more, tell what is under way that it ends here, and wait for the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are worked on."""
        return self._thread.is_alive() and not self._stopping

    @property
    def under_way(self) -> int:
        """Completions that run or wait."""
        return self._under_way

    # -- from any thread -------------------------------------------------------------------------------------

    def prepare(self, request: CompletionRequest) -> Job:
        """Check a request against every limit and make a job of it. ApiError, one line. A session is taken here:
        :meth:`submit` the job, or :meth:`abandon` it."""
        s, name = self.settings, request.model
        if name is not None and name != s.model_name:
            raise ApiError(404, f"model: there is no {name!r} here, only {s.model_name!r}", "model", "model_not_found")
        prompts = request.prompts
        if not prompts or len(prompts) * request.n > s.max_choices:
            raise ApiError(400, f"prompt: {len(prompts)} prompts times n={request.n}; 1 to {s.max_choices}", "prompt")
        for key, value, limit in (
            ("max_tokens", request.max_tokens, s.max_tokens),
            ("logprobs", request.logprobs or 0, s.max_logprobs),
            ("stop", len(request.stops), s.max_stop),
        ):
            if value > limit:
                raise ApiError(400, f"{key}: {value} is more than this server's {limit}", key)
        if any(not 0 < len(stop) <= 256 for stop in request.stops):
            raise ApiError(400, "stop: a stop string has 1 to 256 characters", "stop")
        if request.session is not None and (len(prompts) > 1 or request.n > 1):
            raise ApiError(400, "session: takes one prompt and n=1", "session")
        session = None
        if request.session is not None:
            session = self.sessions.new() if request.session == NEW_SESSION else self.sessions.take(request.session)
        try:
            return self._job(request, prompts, session)
        except BaseException:
            if session is not None:
                self.sessions.release(session)
            raise

    def _job(self, request: CompletionRequest, prompts: Sequence[str | list[int]], session: Session | None) -> Job:
        fresh = session is None or not session.tokens
        own = [self._ids(prompt) for prompt in prompts]
        total = sum(map(len, own))
        if total > self.settings.max_prompt_tokens:
            raise ApiError(
                400, f"prompt: {total} tokens are more than this server's {self.settings.max_prompt_tokens}", "prompt"
            )
        seed = request.seed if request.seed is not None else secrets.randbits(62)
        choices: list[Choice] = []
        try:
            for number, (prompt, ids) in enumerate(zip(prompts, own, strict=True)):
                before = [self.tokenizer.bos_id] if fresh and isinstance(prompt, str) else []
                if session is not None:
                    before += session.pending
                echo = None
                if request.echo:
                    echo = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
                for copy in range(request.n):
                    stream = self._stream(request, [*before, *ids], seed + copy, session)
                    text = StreamText(stream, self.tokenizer, request.stops)
                    choices.append(Choice(number * request.n + copy, text, echo, ids))
        except UserError as error:
            raise ApiError(400, f"prompt: {error}" if "prompt" in str(error) else str(error)) from None
        for first in range(0, len(choices), request.n):
            choices[first].text.stream.copies = [c.text.stream for c in choices[first + 1 : first + request.n]]
        counted = sum(len(choice.text.stream.prompt) for choice in choices[:: request.n])
        return Job(request, choices, counted, session, left={choice.index for choice in choices})

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.tokenizer.encode(prompt)
            except Exception as error:  # half a surrogate pair, which JSON can spell
                raise ApiError(400, f"prompt: {error}", "prompt") from None
        outside = next((i for i in prompt if not 0 <= i < self.tokenizer.vocab_size), None)
        if outside is not None:
            raise ApiError(
                400, f"prompt: token {outside} is outside the vocabulary of {self.tokenizer.vocab_size}", "prompt"
            )
        return list(prompt)

    def _stream(self, request: CompletionRequest, prompt: list[int], seed: int, session: Session | None) -> Stream:
        return Stream(
            prompt,
            request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=seed % (1 << 63),
            stop_ids=stop_ids_of(self.tokenizer),
            vocab_size=self.tokenizer.vocab_size,
            state=session.state if session is not None else None,
            top_scores=request.logprobs,
            prompt_scores=request.echo and request.logprobs is not None,
            keep_state=session is not None,
        )

    def submit(self, job: Job, deliver: Callable[[Piece], None]) -> None:
        """Hand a job over. ``deliver`` is called from the engine's thread. ApiError 429 or 503 if it is refused."""
        job.deliver = deliver
        with self._wake:
            if not self.alive:
                self._release(job)
                raise ApiError(503, "the server is stopping")
            if self._under_way + len(job.choices) > self.settings.max_concurrent + self.settings.max_waiting:
                self._release(job)
                raise ApiError(429, "too many requests at once; try again later", code="overloaded")
            self._under_way += len(job.choices)
            self._inbox.append(("add", job))
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more. What is finished stays as it is."""
        with self._wake:
            self._inbox.append(("cancel", job))
            self._wake.notify()

    def abandon(self, job: Job) -> None:
        """A job that was prepared will not be submitted."""
        self._release(job)

    def _release(self, job: Job) -> None:
        if job.session is not None:
            self.sessions.release(job.session)

    # -- the engine's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._inbox and not self._stopping and not len(self._batch):
                    self._wake.wait()
                inbox = list(self._inbox)
                self._inbox.clear()
                stopping = self._stopping
            for what, job in inbox:
                if what == "add":
                    self._add(job)
                else:
                    self._cancel(job)
            if stopping:
                for job in list({id(job): job for job, _ in self._jobs.values()}.values()):
                    self._end_all(job, ApiError(503, "the server is stopping"))
                return
            try:
                for stream in self._batch.step():
                    self._advance(stream)
            except Exception as error:  # a bug; requests must not wait for ever, and later ones get a fresh start
                for job in list({id(job): job for job, _ in self._jobs.values()}.values()):
                    self._end_all(job, ApiError(500, f"internal error: {type(error).__name__}"))
                self._batch = Batch(self.model, rows=self.settings.max_concurrent, chunk=self.settings.chunk)

    def _add(self, job: Job) -> None:
        for choice in job.choices:
            self._jobs[choice.text.stream] = (job, choice)
        for choice in job.choices[:: job.request.n]:
            self._batch.add(choice.text.stream)

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        for choice in job.choices:
            if choice.index in job.left:
                choice.text.stream.cancel()

    def _end_all(self, job: Job, error: ApiError) -> None:
        for choice in job.choices:
            choice.text.stream.cancel()
            self._finish(job, choice, Piece(choice.index, "", error=error))

    def _advance(self, stream: Stream) -> None:
        """Tell a request what is new of a stream."""
        found = self._jobs.get(stream)
        if found is None:
            return
        job, choice = found
        text = choice.text.take()
        scores = self._scores(job, choice)
        if not choice.begun:
            choice.begun = True
            text = (choice.echo or "") + text
        if stream.error is not None:
            known = isinstance(stream.error, UserError)
            message = str(stream.error) if known else f"internal error: {type(stream.error).__name__}"
            self._finish(job, choice, Piece(choice.index, "", error=ApiError(500, message)))
        elif stream.finished is not None:
            if job.cancelled and not choice.text.stopped:
                self._finish(job, choice, Piece(choice.index, "", error=ApiError(499, "cancelled")))
                return
            reason = "length" if stream.finished == "length" and not choice.text.stopped else "stop"
            kept = self._keep(job, choice)
            self._finish(job, choice, Piece(choice.index, text, scores, reason, len(stream.tokens), kept))
        elif text or scores:
            job.deliver(Piece(choice.index, text, scores))

    def _scores(self, job: Job, choice: Choice) -> list[TokenScore | int]:
        """Of the tokens whose text is out. Those that a stop string may hold wait, and fall away with it."""
        if job.request.logprobs is None:
            return []
        stream, found = choice.text.stream, list[TokenScore | int]()
        if not choice.begun and job.request.echo:
            known = stream.of_prompt[max(0, len(stream.of_prompt) - len(choice.own)) :] if choice.own else []
            first = len(choice.own) - len(known)  # 1 where nothing came before the prompt's first token
            found += [*choice.own[:first], *known]
        upto = choice.text.out
        found += stream.scores[choice.scored : upto]
        choice.scored = upto
        return found

    def _keep(self, job: Job, choice: Choice) -> str | None:
        """Leave the session where the answer ends: at the text that was returned."""
        session, stream = job.session, choice.text.stream
        if session is None:
            return None
        job.session = None  # it is put, so it is not to be released
        if choice.text.stopped:
            # The state has read the stop string: back to the prompt's, and what was returned is read with what comes.
            state, pending = stream.prompt_state, tokens_of(self.tokenizer, stream.tokens, choice.text.text)
        else:
            state, pending = stream.state, stream.unread
        read = session.tokens - len(session.pending) + len(stream.prompt)
        total = read + (len(pending) if choice.text.stopped else len(stream.tokens))
        return session.name if self.sessions.put(session, state, pending, total) else None

    def _finish(self, job: Job, choice: Choice, piece: Piece) -> None:
        if choice.index not in job.left:
            return
        job.left.discard(choice.index)
        self._jobs.pop(choice.text.stream, None)
        with self._wake:
            self._under_way -= 1
        if not job.left:
            self._release(job)
        job.deliver(piece)


def tokens_of(tokenizer: Tokenizer, drawn: Sequence[int], text: str) -> list[int]:
    """The drawn tokens as far as they spell the beginning of ``text``, and what is left of it encoded anew."""
    data, spelled, whole = text.encode("utf-8"), b"", (0, 0)
    for count, token in enumerate(drawn, 1):
        spelled += tokenizer.decode_bytes([token])
        if not data.startswith(spelled):
            break
        try:
            data[len(spelled) :].decode("utf-8")
        except UnicodeDecodeError:
            continue  # it ends inside a character
        whole = (count, len(spelled))
    return [*drawn[: whole[0]], *tokenizer.encode(data[whole[1] :].decode("utf-8"))]
