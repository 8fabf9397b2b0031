"""The server's completions: what it answers is what the model says alone, whole or streamed."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from paralm_data import Tokenizer

from paralm.generation import generate, stop_ids_of, stream_text
from paralm.models import LanguageModel
from tests.paralm.serving import MIXERS, ask, client_of, model_of, refused, texts


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


def test_null_is_the_default(client: TestClient) -> None:
    """As clients send what their caller left at None."""
    given = ("n", "best_of", "top_p", "echo", "logprobs", "stop", "stream", "stream_options", "suffix", "logit_bias")
    given += ("max_tokens", "temperature", "top_k", "frequency_penalty", "presence_penalty", "session", "user", "model")
    answer = ask(client, prompt="the river", seed=3, **dict.fromkeys(given))
    assert texts(answer) == texts(ask(client, prompt="the river", seed=3))


def test_prompts_of_ids_and_lists_and_n(client: TestClient, lm: LanguageModel, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("the river")]
    one = ask(client, prompt=ids, max_tokens=8, temperature=0)
    assert texts(one) == texts(ask(client, prompt="the river", max_tokens=8, temperature=0))
    two = ask(client, prompt=["the river", "stone"], max_tokens=8, seed=3, n=2)
    expected = [
        tokenizer.decode(
            generate(
                lm, [tokenizer.bos_id, *tokenizer.encode(prompt)], 8, seed=seed, vocab_size=tokenizer.vocab_size,
                stop_ids=stop_ids_of(tokenizer),
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


@pytest.mark.parametrize("stop", ["ab", "水b"])
def test_scores_come_with_their_text_though_each_token_may_begin_a_stop_string(
    stop: str, client: TestClient, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("of 水aaaab水b")
    drawn = iter(ids)
    monkeypatch.setattr("paralm.batching.sample", lambda *_: next(drawn))
    choice = ask(client, prompt="the", max_tokens=len(ids), logprobs=0, stop=stop)["choices"][0]
    text = "of 水aaaab水b".partition(stop)[0]
    assert choice["text"] == text
    spelled = b""
    for token in ids[: len(choice["logprobs"]["tokens"])]:
        spelled += tokenizer.decode_bytes([token])
    assert spelled.decode("utf-8") == text


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
