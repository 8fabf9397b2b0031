"""The application alone, in one process: ``paralm serve RUN``."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from paralm.errors import UserError
from paralm.serving.settings import ServerSettings, check_address

if TYPE_CHECKING:
    from paralm_data import Tokenizer

    from paralm.models import LanguageModel


def load(run: str | Path, device: str | None = None) -> tuple[LanguageModel, Tokenizer]:
    """What a server needs of ``RUN``, ``RUN@STEP`` or an export. UserError, one line."""
    from paralm.training.load import load_model

    loaded = load_model(run, device=device)
    return loaded.model, loaded.tokenizer


def check(run: str | Path) -> None:
    """UserError, one line, for a run or an export that is not there or not whole; no model is made."""
    from paralm.export import Exported, is_export
    from paralm.training.load import open_run_model
    from paralm.training.session import parse_run

    path, _ = parse_run(run)
    if is_export(path):
        Exported(path).verify()
    else:
        open_run_model(run, None, warnings.warn).tokenizer  # noqa: B018 (raises where there is none)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens soon; port 0: a free one. UserError, one line, if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UserError(f"{host} port {port}: {error.strerror or error}; --port 0 takes a free one") from None
    return found


def serve(
    model: LanguageModel | Callable[[], tuple[LanguageModel, Tokenizer]],
    tokenizer: Tokenizer | None,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_no_key: bool = False,
    on_start: Callable[[str], None] = print,
) -> None:
    """Answer until SIGINT or SIGTERM; then finish what is under way, for ``settings.shutdown_seconds`` at most.

    ``model`` and no ``tokenizer``: what loads both, once the address is had, so that a port that is taken is told
    before a large model is read. ``on_start`` is given the URL once it listens. Raises UserError, one line: an address
    that others reach without a key being asked for, or one that cannot be had.
    """
    check_address(host, api_key, allow_no_key)
    try:
        import uvicorn

        from paralm.serving.app import create_app
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'paralm[serve]'") from None

    with contextlib.closing(bind(host, port)) as listening:
        if tokenizer is None:
            load = cast("Callable[[], tuple[LanguageModel, Tokenizer]]", model)
            model, tokenizer = load()
        app = create_app(model, tokenizer, settings, api_key=api_key, only_local=not allow_no_key)
        url = f"http://{host if ':' not in host else f'[{host}]'}:{listening.getsockname()[1]}"

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    on_start(url)

        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
            server_header=False,
        )
        with contextlib.suppress(KeyboardInterrupt), _sigterm_as_sigint():
            Server(config).run(sockets=[listening])


@contextlib.contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """uvicorn ends in good order on either, and then raises the signal again: here that is no reason to die of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
