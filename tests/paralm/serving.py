"""What the tests of the server share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from paralm_data import Tokenizer

from paralm.config import ModelConfig
from paralm.models import LanguageModel, build_model

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from paralm.serving.app import create_app
from paralm.serving.settings import ServerSettings

KEY = "a-key-of-24-characters.."
MIXERS = ["paragru", "mlstm", "attention"]


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


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited a minute"
        time.sleep(0.05)
