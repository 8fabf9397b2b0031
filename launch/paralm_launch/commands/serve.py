"""``paralm serve``: a trained model behind HTTP."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Annotated

import typer

from paralm_launch.commands.arguments import OverridesArgument, RunArgument, add_command
from paralm_launch.console import say


def add_to(parent: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(parent, serve)


def serve(
    run: RunArgument,
    overrides: OverridesArgument = None,
    host: Annotated[str, typer.Option(help="Where to listen; another than 127.0.0.1 needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the API key; default: the variable PARALM_API_KEY.")
    ] = None,
    allow_no_key: Annotated[bool, typer.Option("--allow-no-key", help="Let anybody ask.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu; default: the first GPU.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="As a deployment of Ray Serve there; local: on a cluster of its own."),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray; more than one keeps no sessions.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="With --ray: of each replica; 0.5 shares one.")] = 0,
) -> None:
    """Answer OpenAI-compatible completions (POST /v1/completions) from a run's model or an export, until Ctrl-C.

    KEY=VALUE changes a limit, such as max_tokens=8192 or session_bytes=4294967296. A request with "session": "new"
    keeps the model's state, and the name it returns goes on from there.
    """
    from paralm.errors import RunError
    from paralm.key_values import read_key_values
    from paralm.serving.settings import ServerSettings, check_address, read_api_key

    settings = read_key_values(ServerSettings, "the server", overrides or [])
    api_key = read_api_key(api_key_file)
    check_address(host, api_key, allow_no_key)  # before the model is loaded
    if ray is not None:
        if device is not None:
            raise RunError(
                f"--device {device} goes without --ray: a replica takes the first GPU that Ray gives it, else the CPU"
            )
        from paralm.serving import ray_serve

        with ray_serve.running(
            run,
            settings,
            address=ray,
            host=host,
            port=port,
            api_key_file=api_key_file,
            allow_no_key=allow_no_key,
            replicas=replicas,
            gpus=gpus,
        ) as url:
            _listening(url)
            _wait()
        return
    for option, value, default in (("--replicas", replicas, 1), ("--gpus", gpus, 0)):
        if value != default:
            raise RunError(f"{option} {value:g} goes with --ray only: without it, one process serves the model")
    from paralm.serving import server

    server.serve(
        lambda: server.load(run, device),
        None,
        settings,
        host=host,
        port=port,
        api_key=api_key,
        allow_no_key=allow_no_key,
        on_start=_listening,
    )


def _listening(url: str) -> None:
    say(f"{url}/v1/completions   (Ctrl-C ends it)")


def _wait() -> None:
    """Until Ctrl-C or SIGTERM."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()
