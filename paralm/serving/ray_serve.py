"""The application as a deployment of Ray Serve.

    from ray import serve
    from paralm.serving.ray_serve import deployment
    serve.run(deployment("runs/NAME"), route_prefix="/")

``paralm serve RUN --ray local`` does that on a cluster of its own, all of which is on the loopback (but for the proxy,
where it is told otherwise). A cluster that is there listens where it listens. A replica loads the model from ``run``, a
path that every node sees. Sessions live in the replica that made them, so they exist with one replica only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralm.errors import UserError
from paralm.serving.server import bind, check, load
from paralm.serving.settings import ServerSettings, check_address, read_api_key

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application


def _serve() -> Any:
    # Ray takes these from the environment when it is imported: no statistics to others, and 127.0.0.1 stays what it is
    # (Ray would turn it into the machine's outer address, and listen at all of them).
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # a busy machine takes more than Ray's 30 s
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'paralm[ray-serve]'") from None
    return serve


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
    if not gpus >= 0 or (gpus > 1 and not float(gpus).is_integer()):
        raise UserError(f"gpus is {gpus}; give a share of one GPU, such as 0.5, or a whole number of them")
    if replicas > 1:
        given = given.model_copy(update={"session_bytes": 0})
    key_needed = read_api_key(api_key_file) is not None
    place, key_file = _absolute(run), api_key_file.resolve() if api_key_file is not None else None

    def build() -> FastAPI:  # inside a replica, before it listens; the key itself does not travel
        from paralm.serving.app import create_app

        _stay_on_the_loopback()
        key = read_api_key(key_file)
        if key_needed and key is None:
            raise UserError("this replica finds no API key: set PARALM_API_KEY on every node, or give a file all see")
        return create_app(lambda: load(place), None, given, api_key=key, only_local=not allow_no_key)

    made = serve.deployment(
        serve.ingress(build)(),
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


def _stay_on_the_loopback() -> None:
    """On a node that is 127.0.0.1, let a replica's internal port be there too: Ray 2.60 opens it at ``[::]``."""
    import ray
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    original = replica.add_port_to_grpc_server

    def add(server: Any, address: str) -> Any:
        return original(server, address.replace("[::]:", "127.0.0.1:"))

    replica.add_port_to_grpc_server = add


@contextlib.contextmanager
def running(
    target: str | Path,
    settings: ServerSettings | None = None,
    *,
    address: str = "local",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    allow_no_key: bool = False,
    **options: Any,
) -> Iterator[str]:
    """Ray Serve's proxy on ``host`` and the deployment behind it, until the block ends; gives the URL.

    ``address``: of a Ray cluster ("auto": the one of this machine); "local": one of its own here, on the loopback,
    that ends with the block. ``port`` 0: a free one. ``options``: as of :func:`deployment`. Raises UserError, one line.
    """
    check_address(host, read_api_key(api_key_file), allow_no_key)
    serve = _serve()
    made = deployment(target, settings, api_key_file=api_key_file, allow_no_key=allow_no_key, **options)
    with contextlib.closing(bind(host, port)) as probe:  # one line for a port that is taken
        port = probe.getsockname()[1]
    if not address.startswith("ray://"):  # then this is a machine of the cluster, which sees the run
        check(target)
    own = _connect(address)
    try:
        serve.start(http_options={"host": host, "port": port})
        if own:
            _check_gpus(options.get("gpus", 0), options.get("replicas", 1))
        try:
            serve.run(made, name="paralm", route_prefix="/")
        except RuntimeError as error:
            raise UserError(f"Ray Serve: {_reason(error)}") from None
        yield f"http://{host}:{port}"
    finally:
        serve.delete("paralm")
        if own:
            import ray

            serve.shutdown()
            ray.shutdown()


def _check_gpus(gpus: float, replicas: int) -> None:
    """UserError where a cluster of our own has too few: Ray would wait for ever for more machines."""
    import ray

    found = ray.cluster_resources().get("GPU", 0)
    if gpus * replicas > found:
        raise UserError(f"replicas: {replicas} of {gpus:g} GPUs each, and this machine has {found:g}")


def _reason(error: Exception) -> str:
    """One line of several: what a replica died of stands last among those that are not empty."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _connect(address: str) -> bool:
    """Whether a cluster was started, which is ours to end."""
    import ray

    if ray.is_initialized():
        return False
    if address != "local":
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
        return False
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
    )
    return True
