"""Sessions: they go on as if everything were said at once, are bounded in bytes, and are nobody else's."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
import torch
from paralm_data import Tokenizer

from paralm.generation import generate, stop_ids_of
from paralm.models import LanguageModel
from paralm.serving.engine import Engine, tokens_of
from paralm.serving.protocol import ApiError
from paralm.serving.sessions import Sessions
from paralm.serving.settings import ServerSettings
from tests.paralm.serving import MIXERS, ask, client_of, model_of, refused, texts, wait_until


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_session_goes_on_as_if_everything_were_said_at_once(mixer: str, tokenizer: Tokenizer) -> None:
    model = model_of(mixer, tokenizer)

    def expected(said: list[int], count: int) -> list[int]:
        stops = stop_ids_of(tokenizer)
        return list(generate(model, said, count, temperature=0, stop_ids=stops, vocab_size=tokenizer.vocab_size))

    with client_of(model, tokenizer) as client:
        first = ask(client, prompt="the river", max_tokens=7, temperature=0, session="new")
        said = [tokenizer.bos_id, *tokenizer.encode("the river")]
        got = expected(said, 7)
        assert texts(first) == [tokenizer.decode(got)]
        said += got
        # With a stop string: the session is where the returned text ends, not where the model had got to.
        ids = tokenizer.encode(" stone")
        whole = tokenizer.decode(expected([*said, *ids], 12))
        stop = whole[len(whole) // 2 :][:2]
        assert stop
        second = ask(client, prompt=" stone", max_tokens=12, temperature=0, session=first["session"], stop=stop)
        text = whole.split(stop)[0]
        assert texts(second) == [text]
        assert second["session"] == first["session"]
        drawn = expected([*said, *ids], 12)
        said += [*ids, *tokens_of(tokenizer, drawn, text)]
        assert tokenizer.decode(said) == "the river" + tokenizer.decode(got) + " stone" + text
        third = ask(client, prompt=tokenizer.encode(" light"), max_tokens=5, temperature=0, session=first["session"])
        said += tokenizer.encode(" light")
        assert texts(third) == [tokenizer.decode(expected(said, 5))]
        shown = client.get(f"/v1/sessions/{first['session']}").json()
        assert shown["tokens"] == len(said) + len(expected(said, 5))
        # Deleted: gone, and said so
        assert client.delete(f"/v1/sessions/{first['session']}").json()["deleted"]
        refused(client, 410, "let go", prompt="x", session=first["session"])


def test_sessions_are_bounded_in_bytes_and_the_one_unused_for_longest_goes(
    lm: LanguageModel, tokenizer: Tokenizer
) -> None:
    with client_of(lm, tokenizer) as client:
        name = ask(client, prompt="the", max_tokens=1, session="new")["session"]
        size = client.get(f"/v1/sessions/{name}").json()["bytes"]
        long = ask(client, prompt="the river " * 50, max_tokens=1, session="new")["session"]
        assert client.get(f"/v1/sessions/{long}").json()["bytes"] == size  # however much it has read
    with client_of(lm, tokenizer, session_bytes=int(2.5 * size)) as client:
        first, second = (ask(client, prompt="the", max_tokens=1, session="new")["session"] for _ in range(2))
        ask(client, prompt="x", max_tokens=1, session=first)
        third = ask(client, prompt="the", max_tokens=1, session="new")["session"]
        refused(client, 410, "let go", prompt="x", session=second)
        for name in (first, third):
            ask(client, prompt="x", max_tokens=1, session=name)
        assert client.get("/v1/models").json()["data"][0]["session_bytes"] <= 2.5 * size
    with client_of(lm, tokenizer, session_bytes=size // 2) as client:
        assert ask(client, prompt="the", max_tokens=1, session="new")["session"] is None  # alone it is too large
    with client_of(lm, tokenizer, session_bytes=0) as client:
        refused(client, 400, "keeps no sessions", prompt="x", session="new")


def test_a_session_is_never_begun_or_shared_silently(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    settings = ServerSettings()
    with client_of(lm, tokenizer) as client:
        refused(client, 404, "no such session", prompt="x", session="mine")
        refused(client, 400, "one prompt and n=1", prompt="x", session="new", n=2)
        name = ask(client, prompt="the", max_tokens=2, temperature=0, session="new")["session"]
        engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
        held = engine.sessions.take(name)
        refused(client, 409, "in use", prompt="x", session=name)
        engine.sessions.release(held)
        # A request that is refused leaves it as it was, and free.
        before = client.get(f"/v1/sessions/{name}").json()
        refused(client, 400, "max_tokens", prompt="x", session=name, max_tokens=settings.max_tokens + 1)
        refused(client, 400, "outside the vocabulary", prompt=[10**6], session=name)
        assert client.get(f"/v1/sessions/{name}").json() == before
        ask(client, prompt="x", max_tokens=1, session=name)


def test_a_request_that_is_dropped_while_its_prompt_is_encoded_holds_no_session(
    lm: LanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray Serve drops a request whose client went away: its task is cancelled."""
    with client_of(lm, tokenizer) as client:
        name = ask(client, prompt="the", max_tokens=2, session="new")["session"]
        engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
        prepare, entered, go_on = engine.prepare, threading.Event(), threading.Event()

        def slow(request: Any) -> Any:
            entered.set()
            assert go_on.wait(30)
            return prepare(request)

        monkeypatch.setattr(engine, "prepare", slow)
        body = json.dumps({"prompt": "x", "session": name, "max_tokens": 4000}).encode()

        async def dropped() -> None:
            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(message: Any) -> None:
                raise AssertionError(f"an answer to nobody: {message}")

            scope = {
                "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": [
                    (b"host", b"127.0.0.1"), (b"content-type", b"application/json")
                ], "scheme": "http", "server": ("127.0.0.1", 80), "http_version": "1.1", "app": client.app,
            }  # fmt: skip
            task = asyncio.ensure_future(client.app(scope, receive, send))  # type: ignore[arg-type]
            while not entered.is_set():
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            go_on.set()

        assert client.portal is not None
        client.portal.call(dropped)
        wait_until(lambda: not engine.sessions.look(name).busy)
        wait_until(lambda: engine.under_way == 0)


def test_tokens_of_a_text_that_ends_inside_a_token_or_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the 水→ river")
    for length in range(len("the 水→ river") + 1):
        text = "the 水→ river"[:length]
        found = tokens_of(tokenizer, ids, text)
        assert tokenizer.decode(found) == text
        common = next((i for i, (a, b) in enumerate(zip(found, ids)) if a != b), min(len(found), len(ids)))
        assert len(found) - common <= len(text.encode())


def test_a_session_larger_than_the_limit_goes_alone_and_the_bytes_are_those_that_are_kept() -> None:
    def put(sessions: Sessions, count: int, name: str | None = None) -> tuple[str, bool]:
        session = sessions.new() if name is None else sessions.take(name)
        return session.name, sessions.put(session, {"state": torch.zeros(1, count)}, [1, 2], tokens=2)

    sessions = Sessions(300)
    (first, kept), (second, _) = put(sessions, 10), put(sessions, 20)
    assert kept
    assert sessions.usage() == (2, 40 + 80 + 2 * 16)
    large, kept = put(sessions, 75)
    assert not kept
    assert sessions.usage() == (2, 152)  # 316 bytes would not fit beside nobody: nobody went for it
    with pytest.raises(ApiError, match="let go"):
        sessions.take(large)
    put(sessions, 30, first)
    assert sessions.usage() == (2, 232)
    put(sessions, 35)  # 388 bytes: the one unused for longest goes
    with pytest.raises(ApiError, match="let go"):
        sessions.look(second)
    assert put(sessions, 75, first) == (first, False)  # it grew past the limit: gone, and its bytes with it
    (left,) = sessions._kept.values()
    assert sessions.usage() == (1, left.nbytes)
    sessions.delete(left.name)
    assert sessions.usage() == (0, 0)
