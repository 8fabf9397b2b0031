"""The server: what it answers is what the model says alone; limits, sessions, keys; a process that ends cleanly."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from paralm_data import Tokenizer

from paralm.config import ModelConfig
from paralm.errors import UserError
from paralm.generation import generate, stream_text
from paralm.models import LanguageModel, build_model

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from paralm.serving.app import create_app
from paralm.serving.engine import Engine, tokens_of
from paralm.serving.server import bind
from paralm.serving.settings import ServerSettings, check_address, read_api_key

KEY = "a-key-of-24-characters.."
MIXERS = ["paragru", "mlstm", "attention"]


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer.load(prepared / "tokenizer.model")


def model_of(mixer: str, tokenizer: Tokenizer) -> LanguageModel:
    config = ModelConfig(d_model=16, n_layers=2, mixer={"name": mixer}, tie_embeddings=False)
    model = build_model(config, tokenizer.vocab_size, seed=3).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model.head_weight.mul_(4)
    return model


@contextmanager
def client_of(model: LanguageModel, tokenizer: Tokenizer, **keys: Any) -> Iterator[TestClient]:
    app_keys = {key: keys.pop(key) for key in ("api_key", "only_local") if key in keys}
    app = create_app(model, tokenizer, ServerSettings(**keys), **app_keys)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def lm(tokenizer: Tokenizer) -> LanguageModel:
    return model_of("paragru", tokenizer)


@pytest.fixture(scope="module")
def client(lm: LanguageModel, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with client_of(lm, tokenizer, chunk=8) as found:
        yield found


def ask(client: TestClient, **request: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=request)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def refused(client: TestClient, status: int, message: str, **request: Any) -> None:
    answer = client.post("/v1/completions", json=request)
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert message in error["message"]
    assert "\n" not in error["message"]


# -- completions ---------------------------------------------------------------------------------------------


def test_a_completion_is_the_text_of_generate(client: TestClient, lm: LanguageModel, tokenizer: Tokenizer) -> None:
    for request in (
        {"prompt": "the river", "max_tokens": 20, "temperature": 0},
        {"prompt": "stone light walks", "max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"prompt": "", "max_tokens": 9, "seed": 1, "top_k": 7},
        {"prompt": "12 307", "max_tokens": 30, "temperature": 0, "stop": ["e", "水"]},
    ):
        keys = {key: value for key, value in request.items() if key not in ("prompt", "max_tokens", "stop")}
        expected = "".join(
            stream_text(lm, tokenizer, request["prompt"], request["max_tokens"], stop=request.get("stop", ()), **keys)  # type: ignore[arg-type]
        )
        answer = ask(client, **request)
        assert texts(answer) == [expected]
        assert answer["object"] == "text_completion"
        assert answer["usage"]["prompt_tokens"] == 1 + len(tokenizer.encode(str(request["prompt"])))
        assert answer["usage"]["completion_tokens"] <= int(request["max_tokens"])
        ended = "length" if answer["usage"]["completion_tokens"] == request["max_tokens"] else "stop"
        assert answer["choices"][0]["finish_reason"] == ended or "stop" in request


def test_prompts_of_ids_and_lists_and_n(client: TestClient, lm: LanguageModel, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("the river")]
    one = ask(client, prompt=ids, max_tokens=8, temperature=0)
    assert texts(one) == texts(ask(client, prompt="the river", max_tokens=8, temperature=0))
    two = ask(client, prompt=["the river", "stone"], max_tokens=8, seed=3, n=2)
    expected = [
        tokenizer.decode(
            generate(
                lm, [tokenizer.bos_id, *tokenizer.encode(prompt)], 8, seed=seed, vocab_size=tokenizer.vocab_size,
                stop_ids=(tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id),
            )
        )
        for prompt in ("the river", "stone")
        for seed in (3, 4)
    ]  # fmt: skip
    assert texts(two) == expected
    assert two["usage"]["prompt_tokens"] == 2 + len(tokenizer.encode("the river")) + len(tokenizer.encode("stone"))
    assert (
        texts(ask(client, prompt=[ids, ids[:3]], max_tokens=4, temperature=0))[0]
        == texts(one)[0][:0] + texts(ask(client, prompt=ids, max_tokens=4, temperature=0))[0]
    )


def events(answer: Any) -> list[Any]:
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_streamed_is_whole(client: TestClient) -> None:
    request = {"prompt": "the é", "max_tokens": 25, "seed": 4, "n": 2, "stop": ["zz"], "logprobs": 2, "echo": True}
    whole = ask(client, **request)
    answer = client.post("/v1/completions", json={**request, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len(chunks) > 4
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own][-1] == choice["finish_reason"]
        assert {part["finish_reason"] for part in own[:-1]} <= {None}
        for key, values in choice["logprobs"].items():
            joined = [value for part in own for value in part["logprobs"][key]]
            # The other completion ends at another step, so products have other sizes.
            assert joined == pytest.approx(values, abs=1e-9) if key == "token_logprobs" else len(joined) == len(values)


@pytest.mark.parametrize("mixer", MIXERS)
def test_requests_side_by_side_get_what_each_gets_alone(mixer: str, tokenizer: Tokenizer) -> None:
    requests = [
        {"prompt": "the river " * n, "max_tokens": 3 + 2 * n, "seed": n, "temperature": 0.9 if n % 2 else 0}
        for n in range(9)
    ]
    with client_of(model_of(mixer, tokenizer), tokenizer, chunk=8, max_concurrent=4) as client:
        alone = [texts(ask(client, **request)) for request in requests]
        found: list[Any] = [None] * len(requests)
        beside = []

        def one(index: int) -> None:
            found[index] = texts(ask(client, **requests[index]))

        def watch() -> None:
            engine = client.app.state.engine  # type: ignore[attr-defined]
            while any(thread.is_alive() for thread in threads):
                beside.append(engine.under_way)
                time.sleep(0.001)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        watch()
        assert found == alone
        assert max(beside) > 1


def test_scoring_clients_get_the_log_probabilities_of_the_prompt(
    client: TestClient, lm: LanguageModel, tokenizer: Tokenizer
) -> None:
    """``echo`` with ``max_tokens`` 0, or 1 as lm_eval's local-completions asks."""
    ids = [tokenizer.bos_id, *tokenizer.encode("the river sings 307")]
    with torch.no_grad():
        expected = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = ask(client, prompt=ids, max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the river sings 307", "length")
    scores = choice["logprobs"]
    assert scores["token_logprobs"][0] is None
    own = [float(expected[i, token]) for i, token in enumerate(ids[1:])]
    assert scores["token_logprobs"][1:] == pytest.approx(own, abs=1e-6)
    assert len(scores["tokens"]) == len(scores["top_logprobs"]) == len(scores["text_offset"]) == len(ids)
    for position, top in enumerate(scores["top_logprobs"][1:]):
        assert max(top.values()) == pytest.approx(float(expected[position].max()), abs=1e-6)
    assert "".join(scores["tokens"][1:]) == "the river sings 307"
    assert [choice["text"][at:].startswith(t) for at, t in zip(scores["text_offset"][1:], scores["tokens"][1:])]
    # A text is the same, but BOS, which it does not say, is not among the tokens: its first token has a likelihood.
    text = ask(client, prompt="the river sings 307", max_tokens=0, echo=True, logprobs=2)["choices"][0]["logprobs"]
    assert text["token_logprobs"] == pytest.approx(scores["token_logprobs"][1:], abs=1e-9)
    assert text["text_offset"][0] == 0

    pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    context = 4
    reply = ask(client, prompt=[ids, ids[:6]], max_tokens=1, temperature=0, echo=True, logprobs=1)
    found = LocalCompletionsAPI.parse_logprobs(reply, tokens=[ids, ids[:6]], ctxlens=[context, context])
    for (value, greedy), given in zip(found, (ids, ids[:6]), strict=True):
        rows = expected[context - 1 : len(given) - 1]
        assert value == pytest.approx(sum(float(r[t]) for r, t in zip(rows, given[context:])), abs=1e-6)
        assert greedy == (rows.argmax(-1).tolist() == given[context:])


def test_a_stop_string_takes_its_scores_with_it(client: TestClient) -> None:
    request = {"prompt": "the river", "max_tokens": 40, "temperature": 0, "logprobs": 0}
    whole = ask(client, **request)["choices"][0]
    stop = whole["text"][10:13]
    cut = ask(client, **request, stop=stop)["choices"][0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["logprobs"]["tokens"] == whole["logprobs"]["tokens"][: len(cut["logprobs"]["tokens"])]
    assert cut["logprobs"]["tokens"]
    assert all(at < len(cut["text"]) for at in cut["logprobs"]["text_offset"])


# -- sessions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_session_goes_on_as_if_everything_were_said_at_once(mixer: str, tokenizer: Tokenizer) -> None:
    model = model_of(mixer, tokenizer)

    def expected(said: list[int], count: int) -> list[int]:
        stops = (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
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


# -- limits, keys, mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"prompt": "x", "max_tokens": 51}, 400, "max_tokens: 51 is more than this server's 50"),
        ({"prompt": "x " * 80}, 400, "are more than this server's 60"),
        ({"prompt": ["the river " * 5] * 4}, 400, "are more than this server's 60"),
        ({"prompt": "x", "n": 9}, 400, "1 to 8"),
        ({"prompt": []}, 400, "1 to 8"),
        ({"prompt": [[]]}, 400, "no tokens"),
        ({"prompt": [1, 10**7]}, 400, "outside the vocabulary"),
        ({"prompt": [1, -3]}, 400, "outside the vocabulary"),
        ({"prompt": {"a": 1}}, 400, "prompt: must be text, token ids, or a list of either"),
        ({"prompt": "\ud800"}, 400, "Invalid JSON"),
        ({"prompt": "x", "logprobs": 99}, 400, "logprobs: 99"),
        ({"prompt": "x", "stop": [""]}, 400, "stop"),
        ({"prompt": "x", "stop": ["a"] * 20}, 400, "stop: 20"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "top_p": 0}, 400, "top_p"),
        ({"prompt": "x", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"prompt": "x", "best_of": 3}, 400, "best_of"),
        ({"prompt": "x", "stream_options": {}}, 400, "stream_options"),
        ({"prompt": "x", "beams": 3}, 400, "beams: not supported"),
        ({"prompt": "x", "model": "other"}, 404, "there is no 'other' here, only 'mine'"),
    ],
)
def test_limits_are_one_line(
    request_: dict[str, Any], status: int, message: str, lm: LanguageModel, tokenizer: Tokenizer
) -> None:
    limits = {"max_tokens": 50, "max_prompt_tokens": 60, "max_choices": 8, "model_name": "mine"}
    with client_of(lm, tokenizer, **limits) as client:
        answer = client.post(
            "/v1/completions", content=json.dumps(request_).encode(), headers={"content-type": "application/json"}
        )
        assert (answer.status_code, message in answer.text) == (status, True), answer.text
        assert "\n" not in answer.json()["error"]["message"]
        assert client.app.state.engine.under_way == 0  # type: ignore[attr-defined]


def test_bodies_are_bounded_and_of_json(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    with client_of(lm, tokenizer, max_body_bytes=200) as client:
        refused(client, 413, "longer than this server's 200 bytes", prompt="x" * 300)
        many = client.post(
            "/v1/completions",
            content=iter([b'{"prompt": "'] + [b"x" * 50] * 20),  # of no declared length
            headers={"content-type": "application/json"},
        )
        assert many.status_code == 413
        plain = client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
        assert plain.status_code == 415
        broken = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert broken.status_code == 400


def test_too_many_at_once_are_told_to_come_again(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    with client_of(lm, tokenizer, max_concurrent=2, max_waiting=1) as client:
        refused(client, 429, "try again", prompt="x", n=4)
        assert len(texts(ask(client, prompt="x", n=3, max_tokens=2))) == 3  # the third waits


def test_the_key_is_asked_for_and_told_to_nobody(
    lm: LanguageModel, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with client_of(lm, tokenizer, api_key=KEY) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
            for answer in (
                client.get("/v1/models", headers=headers),
                client.get("/v1/sessions/x", headers=headers),
                client.delete("/v1/sessions/x", headers=headers),
                client.post("/v1/completions", json={"prompt": "x"}, headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert KEY not in answer.text
        good = {"Authorization": f"Bearer {KEY}"}
        assert client.get("/v1/models", headers=good).json()["data"][0]["id"] == "paralm"
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=good).status_code == 200
        assert client.get("/openapi.json").status_code == client.get("/docs").status_code == 404
    assert KEY not in caplog.text


def test_without_a_key_only_this_machines_names_are_answered(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    with client_of(lm, tokenizer) as client:
        for host, status in (("127.0.0.1:80", 200), ("localhost", 200), ("[::1]:9", 200), ("evil.example", 403)):
            assert client.get("/v1/models", headers={"host": host}).status_code == status, host
    with client_of(lm, tokenizer, only_local=False) as client:
        assert client.get("/v1/models", headers={"host": "server.example"}).status_code == 200


def test_others_reach_it_only_with_a_key_or_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.9"):
        check_address(host, None, False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "server.example"):
        with pytest.raises(UserError, match="can be reached from other machines"):
            check_address(host, None, False)
        check_address(host, KEY, False)
        check_address(host, None, True)
    monkeypatch.delenv("PARALM_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("PARALM_API_KEY", KEY)
    assert read_api_key(None) == KEY
    (tmp_path / "key").write_text("another-key-of-27-characters\n")
    assert read_api_key(tmp_path / "key") == "another-key-of-27-characters"
    for wrong in ("short", "has a space in it, though long", ""):
        (tmp_path / "key").write_text(wrong)
        with pytest.raises(UserError, match="16 printable") as caught:
            read_api_key(tmp_path / "key")
        assert not wrong or wrong not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_api_key(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "can be reached from other machines"),
        (("max_token=3",), "'max_token=3': no such limit; did you mean 'max_tokens'?"),
        (("max_tokens=many",), "max_tokens: Input should be a valid integer"),
        (("max_concurrent=0",), "max_concurrent"),
        (("--api-key-file", "/nowhere/key"), "cannot be read"),
        ((), "nowhere: no config.yaml"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from paralm_launch import cli

    monkeypatch.delenv("PARALM_API_KEY", raising=False)
    (tmp_path / "nowhere").mkdir()
    assert cli.run(["serve", str(tmp_path / "nowhere"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port 0 takes a free one"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_diverged_weights_are_an_error_and_take_no_other_request_with_them(tokenizer: Tokenizer) -> None:
    model = model_of("paragru", tokenizer)
    with client_of(model, tokenizer) as client:
        with torch.no_grad():
            kept = model.head_weight.clone()
            model.head_weight.fill_(float("nan"))
        refused(client, 500, "not finite", prompt="x")
        answer = client.post("/v1/completions", json={"prompt": "x", "stream": True})
        assert "not finite" in answer.text
        assert "[DONE]" not in answer.text
        with torch.no_grad():
            model.head_weight.copy_(kept)
        ask(client, prompt="x", max_tokens=2)


# -- a real process ------------------------------------------------------------------------------------------

_PROCESS = """
import sys, torch
sys.path.insert(0, {root!r})
from paralm_data import Tokenizer
from paralm.serving.server import serve
from paralm.serving.settings import ServerSettings
from tests.paralm.test_serving import model_of
torch.set_num_threads(1)
tokenizer = Tokenizer.load({tokenizer!r})
serve(model_of("paragru", tokenizer), tokenizer, ServerSettings(max_tokens=100000), port=0,
      on_start=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


@pytest.fixture
def process(prepared: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    root = Path(__file__).resolve().parents[2]
    code = _PROCESS.format(root=str(root), tokenizer=str(prepared / "tokenizer.model"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PARALM_API_KEY", None)
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert running.stdout is not None
        line = running.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), line + (running.stderr.read() if running.stderr else "")
        yield running, int(line.rsplit(":", 1)[1])
    finally:
        running.kill()
        running.communicate()


def connect(port: int, request: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
    return connection


def under_way(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/models")
    found = json.loads(connection.getresponse().read())["data"][0]["under_way"]
    connection.close()
    return int(found)


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited a minute"
        time.sleep(0.05)


def endless(model: LanguageModel, tokenizer: Tokenizer) -> str:
    """A prompt after which greedy decoding goes round in circles and never draws the end of the document."""
    stops = (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    for prompt in ("the", "river", "stone", "light", "walks", "under", "over", "and", "never", "sings", "old"):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        drawn = list(
            generate(model, ids, 300, temperature=0, stop_ids=stops, vocab_size=tokenizer.vocab_size)
        )  # fmt: skip
        if any(drawn[-n:] * 4 == drawn[-5 * n : -n] for n in range(1, 50)):
            return prompt
    raise AssertionError("every prompt comes to an end")


def test_a_process_streams_forgets_who_goes_away_and_ends_cleanly(
    process: tuple[subprocess.Popen[str], int], lm: LanguageModel, tokenizer: Tokenizer
) -> None:
    running, port = process
    connection = connect(port, {"prompt": "the river", "max_tokens": 12, "temperature": 0})
    answer = json.loads(connection.getresponse().read())
    assert texts(answer) == ["".join(stream_text(lm, tokenizer, "the river", 12, temperature=0))]
    connection.close()
    # A client that goes away, streaming or waiting, is worked for no longer.
    long = {"prompt": endless(lm, tokenizer), "max_tokens": 100_000, "temperature": 0}
    streaming = connect(port, {**long, "stream": True})
    response = streaming.getresponse()
    assert response.readline().startswith(b"data: ")
    waiting = connect(port, long)
    wait_until(lambda: under_way(port) == 2)
    for gone in (streaming, waiting):
        if gone.sock is not None:
            gone.sock.shutdown(socket.SHUT_RDWR)
        gone.close()
    response.close()
    wait_until(lambda: under_way(port) == 0)
    # What is under way when it is asked to stop is finished.
    last = connect(port, {**long, "max_tokens": 400})
    wait_until(lambda: under_way(port) == 1)
    running.send_signal(signal.SIGTERM)  # SIGINT is what uvicorn and Python make of it
    finished = json.loads(last.getresponse().read())
    assert finished["choices"][0]["finish_reason"] in ("length", "stop")
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert "ended" in out
    assert "Traceback" not in err
