"""The server as a deployment of Ray Serve: the same answers, on the loopback and nowhere else."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from paralm.config import Config
from paralm.errors import UserError
from paralm.generation import stream_text
from paralm.training.load import load_model
from paralm.training.loop import train
from tests.conftest import settings
from tests.launch.launching import outside_the_loopback

KEY = "a-key-of-24-characters.."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prepared: Path, corpus: Path) -> Path:
    """A run of two steps."""
    root = tmp_path_factory.mktemp("runs")
    train(Config.model_validate(settings(corpus, prepared, root, training={"max_steps": 2})), say=lambda text: None)
    return root / "tiny"


def ask(url: str, key: str | None, **request: Any) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    connection.request("POST", "/v1/completions", json.dumps(request), headers)
    response = connection.getresponse()
    found = response.status, response.read().decode()
    connection.close()
    return found


@pytest.fixture
def process(trained: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``paralm serve RUN --ray local``, a process that has imported no Ray before, and its URL."""
    (tmp_path / "key").write_text(KEY)
    command = [
        sys.executable,
        "-m",
        "paralm_launch",
        "serve",
        trained,
        "max_tokens=40",
        "--ray",
        "local",
        "--port",
        "0",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PARALM_"))}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}  # Ray keeps a token in the home folder
    running = subprocess.Popen(
        [*map(str, command), "--port", "0", "--api-key-file", str(tmp_path / "key")], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=(tmp_path / "stderr").open("w"),
    )  # fmt: skip
    below: list[psutil.Process] = []
    try:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("http://"):
                break
        else:
            pytest.fail((tmp_path / "stderr").read_text()[-3000:])
        below = psutil.Process(running.pid).children(recursive=True)
        yield running, line.split("/v1/")[0]
    finally:
        running.kill()
        running.communicate()
        for one in below:
            if one.is_running():
                one.kill()


@pytest.mark.slow
def test_a_deployment_answers_as_the_model_does_and_listens_on_the_loopback_only(
    trained: Path, process: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    running, url = process
    loaded = load_model(trained)
    assert ask(url, None, prompt="the river")[0] == 401
    status, body = ask(url, KEY, prompt="the river", max_tokens=8, temperature=0, session="new")
    expected = "".join(stream_text(loaded.model, loaded.tokenizer, "the river", 8, temperature=0))
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, expected)
    status, body = ask(url, KEY, prompt=" x", max_tokens=5, session=json.loads(body)["session"], stream=True)
    assert status == 200
    assert body.rstrip().endswith("data: [DONE]")
    assert ask(url, KEY, prompt="x", max_tokens=41)[0] == 400
    me = psutil.Process(running.pid)
    processes = [me, *me.children(recursive=True)]
    assert any(p.name().startswith("ray::ServeReplica") for p in processes)
    assert not outside_the_loopback(processes)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 0, (tmp_path / "stderr").read_text()[-3000:]
    _, left = psutil.wait_procs(processes[1:], timeout=30)
    assert not left


def test_mistakes_are_one_line_before_ray_is_started(trained: Path, tmp_path: Path) -> None:
    from paralm.serving import ray_serve

    with pytest.raises(UserError, match="can be reached from other machines"), ray_serve.running(trained, host="::"):
        pass
    with pytest.raises(UserError, match="replicas is 0"):
        ray_serve.deployment(trained, replicas=0)
    with pytest.raises(UserError, match="cannot be read"):
        ray_serve.deployment(trained, api_key_file=tmp_path / "none")
    for gpus in (-1, 1.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="gpus is"):
            ray_serve.deployment(trained, gpus=gpus)
    for target, message in ((tmp_path / "nowhere", "nowhere: no such run folder"), (f"{trained}@77", "77")):
        with pytest.raises(UserError, match=message) as caught, ray_serve.running(target, port=0):
            pass
        assert "\n" not in str(caught.value)
    import ray

    assert not ray.is_initialized()


def test_a_deployment_that_fails_is_one_line(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray import serve

    from paralm.serving import ray_serve

    def fail(*given: object, **keys: object) -> None:
        raise RuntimeError("Deploying application paralm failed:\nTraceback\n  paralm.errors.RunError: no room\n\n")

    for name in ("start", "delete", "shutdown"):
        monkeypatch.setattr(serve, name, lambda *given, **keys: None)
    monkeypatch.setattr(serve, "run", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    monkeypatch.setattr(ray_serve, "_connect", lambda address: True)
    with pytest.raises(UserError, match="no room") as caught, ray_serve.running(trained, port=0, replicas=2, gpus=1):
        pass
    assert "\n" not in str(caught.value)
    with (
        pytest.raises(UserError, match="3 of 1 GPUs each, and this machine has 2"),
        ray_serve.running(trained, port=0, replicas=3, gpus=1),
    ):
        pass


def test_the_command_line_says_replicas_and_gpus(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paralm_launch import cli
    from paralm_launch.commands import serve

    from paralm.serving import ray_serve

    asked: dict[str, Any] = {}

    @contextlib.contextmanager
    def running(target: Path, *given: object, **keys: object) -> Iterator[str]:
        asked.update(keys)
        yield "http://127.0.0.1:1"

    monkeypatch.setattr(ray_serve, "running", running)
    monkeypatch.setattr(serve, "_wait", lambda: None)
    assert cli.run(["serve", str(trained), "--ray", "local", "--replicas", "3", "--gpus", "0.5"]) == 0
    assert (asked["address"], asked["replicas"], asked["gpus"]) == ("local", 3, 0.5)
