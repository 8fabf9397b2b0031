"""The server as a process: it streams, forgets who goes away, and ends cleanly."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paralm_data import Tokenizer

from paralm.generation import generate, stop_ids_of, stream_text
from paralm.models import LanguageModel
from tests.paralm.serving import texts, wait_until

_PROCESS = """
import sys, torch
sys.path.insert(0, {root!r})
from paralm_data import Tokenizer
from paralm.serving.server import serve
from paralm.serving.settings import ServerSettings
from tests.paralm.serving import model_of
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


def endless(model: LanguageModel, tokenizer: Tokenizer) -> str:
    """A prompt after which greedy decoding goes round in circles and never draws the end of the document."""
    stops = stop_ids_of(tokenizer)
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
