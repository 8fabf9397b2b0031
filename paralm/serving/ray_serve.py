"""The application as a deployment of Ray Serve.

    from ray import serve
    from paralm.serving.ray_serve import deployment
    serve.run(deployment("runs/NAME"), route_prefix="/")

``paralm serve RUN --ray`` does that and keeps its proxy on 127.0.0.1 unless told otherwise. A replica loads the model
from ``run``, a path that every node sees. Sessions live in the replica that made them, so they exist with one replica
only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralm.errors import UserError
from paralm.serving.settings import ServerSettings, check_address, read_api_key

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application


def _serve() -> Any:
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'paralm[ray-serve]'") from None
    return serve


class _Builder:
    """Makes the application inside a replica. The key itself does not travel: each replica reads it."""

    def __init__(
        self, run: str, settings: ServerSettings, api_key_file: str | None, key_needed: bool, only_local: bool
    ) -> None:
        self.run, self.settings, self.api_key_file = run, settings, api_key_file
        self.key_needed, self.only_local = key_needed, only_local

    def __call__(self) -> FastAPI:
        from paralm.serving.app import create_app
        from paralm.serving.server import load

        key = read_api_key(Path(self.api_key_file) if self.api_key_file is not None else None)
        if self.key_needed and key is None:
            raise UserError("this replica finds no API key: set PARALM_API_KEY on every node, or give a file all see")
        model, tokenizer = load(self.run)
        return create_app(model, tokenizer, self.settings, api_key=key, only_local=self.only_local)


def deployment(
    run: str | Path,
    settings: ServerSettings | None = None,
    *,
    replicas: int = 1,
    gpus: float = 0,
    api_key_file: Path | None = None,
    allow_no_key: bool = False,
    name: str = "paralm",
) -> Application:
    """What ``ray.serve.run`` takes. ``gpus``: of each replica. The key is read from ``api_key_file``, or from
    PARALM_API_KEY, on the node of each replica. UserError, one line."""
    serve = _serve()
    given = settings or ServerSettings()
    if replicas < 1:
        raise UserError(f"replicas is {replicas}; give 1 or more")
    if replicas > 1:
        given = given.model_copy(update={"session_bytes": 0})
    key = read_api_key(api_key_file)
    path = str(api_key_file.resolve()) if api_key_file is not None else None
    builder = _Builder(_absolute(run), given, path, key is not None, not allow_no_key)
    made = serve.deployment(
        serve.ingress(builder)(),
        name=name,
        num_replicas=replicas,
        max_ongoing_requests=given.max_concurrent + given.max_waiting,
        ray_actor_options={"num_gpus": gpus} if gpus else {},
    )
    application: Application = made.bind()
    return application


def _absolute(run: str | Path) -> str:
    """``RUN@STEP`` from the root, since a replica runs in another folder."""
    from paralm.training.session import parse_run

    path, step = parse_run(run)
    return f"{path.resolve()}@{step}" if step is not None else str(path.resolve())


def run(
    target: str | Path,
    settings: ServerSettings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    allow_no_key: bool = False,
    blocking: bool = True,
    **options: Any,
) -> None:
    """Start Ray Serve's proxy on ``host`` and the deployment behind it. UserError, one line."""
    check_address(host, read_api_key(api_key_file), allow_no_key)
    serve = _serve()
    made = deployment(target, settings, api_key_file=api_key_file, allow_no_key=allow_no_key, **options)
    serve.start(http_options={"host": host, "port": port})
    serve.run(made, name="paralm", route_prefix="/", blocking=blocking)
