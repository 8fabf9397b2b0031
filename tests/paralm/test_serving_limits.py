"""What the server refuses: limits, keys, names, mistakes; each is one line, in one form."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from paralm_data import Tokenizer
from pydantic import ValidationError

from paralm.errors import UserError
from paralm.models import LanguageModel
from paralm.serving.protocol import ApiError, CompletionRequest, parse_request
from paralm.serving.server import bind
from paralm.serving.settings import check_address, read_api_key
from tests.paralm.serving import KEY, ask, client_of, refused, texts


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
        for host, status in (
            ("127.0.0.1:80", 200),
            ("localhost", 200),
            ("[::1]:9", 200),
            ("evil.example", 403),
            ('a"b.evil.example', 403),
        ):
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
        (("max_token=3",), "max_token: the server has no such setting; did you mean 'max_tokens'?"),
        (("max_tokens",), "'max_tokens': give settings of the server as KEY=VALUE"),
        (("max_tokens=many",), "max_tokens: must be a valid integer"),
        (("--device", "foo"), "device 'foo': no such name; give cpu, cuda, or one GPU as cuda:1"),
        (("--device", f"cuda:{torch.cuda.device_count()}"), "not to be had on this machine"),
        (("--device", "cpu", "--ray", "local"), "--device cpu goes without --ray"),
        (("max_concurrent=0",), "max_concurrent"),
        (("--replicas", "2"), "--replicas 2 goes with --ray"),
        (("--gpus", "0.5"), "--gpus 0.5 goes with --ray"),
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
    assert cli.run(["serve", str(tmp_path / "nowhere"), "--port", "0", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port 0 takes a free one"):
            bind("127.0.0.1", taken.getsockname()[1])


def faults(body: bytes) -> int:
    try:
        CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": [1.5] * 999}, "prompt: must be text"),
        ({"prompt": ["x", 1] * 999}, "prompt: must be text"),
        ({"prompt": [[1.5] * 999] * 9}, "prompt: must be text"),
        ({"prompt": [[1, {}]] * 999}, "prompt: must be text"),
        ({"stop": [1] * 999}, "stop: "),
        ({"logit_bias": {str(token): "x" for token in range(999)}}, "logit_bias: "),
        ({f"field_{number}": 0 for number in range(999)}, "field_0: not supported"),
        ({"stream": True, "stream_options": {str(n): 0 for n in range(999)}}, "stream_options.0: not supported"),
    ],
)
def test_a_request_that_is_wrong_a_thousand_times_has_a_few_faults(request_: dict[str, Any], message: str) -> None:
    """Each fault is held in memory and described, so a body of megabytes may not make one of every element."""
    body = json.dumps(request_).encode()
    assert faults(body) <= 4
    with pytest.raises(ApiError) as caught:
        parse_request(body)
    assert caught.value.status == 400
    assert caught.value.message.startswith(message)


def test_every_error_has_one_form(lm: LanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Any) -> Any:
        raise RuntimeError("something of ours")

    with client_of(lm, tokenizer) as client:
        monkeypatch.setattr(client.app.state.engine, "prepare", fail)  # type: ignore[attr-defined]
        nowhere, wrong = client.get("/v1/nowhere"), client.get("/v1/completions")
        broken = client.post("/v1/completions", json={"prompt": "x"})
        for answer, status, kind, message in (
            (nowhere, 404, "invalid_request_error", "GET /v1/nowhere: Not Found"),
            (wrong, 405, "invalid_request_error", "GET /v1/completions: Method Not Allowed"),
            (broken, 500, "server_error", "internal error: RuntimeError"),
        ):
            assert answer.status_code == status
            assert answer.json() == {"error": {"message": message, "type": kind, "param": None, "code": None}}
        assert wrong.headers["allow"] == "POST"


def test_a_port_that_is_taken_is_told_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paralm_launch import cli

    from paralm.serving import server

    monkeypatch.delenv("PARALM_API_KEY", raising=False)
    monkeypatch.setattr(server, "load", lambda *given: pytest.fail("the model was read"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.run(["serve", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "--port 0 takes a free one" in capsys.readouterr().err
