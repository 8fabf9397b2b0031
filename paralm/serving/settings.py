"""What a server allows, who may ask it, and where it listens."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from paralm.errors import UserError

KEY_VARIABLE = "PARALM_API_KEY"


class ServerSettings(BaseModel):
    """Limits; every one is checked before the model is asked anything."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_name: str = Field(default="paralm", min_length=1, description="what requests call the model")
    max_concurrent: int = Field(default=32, ge=1, description="completions drawn side by side; further ones wait")
    max_waiting: int = Field(default=256, ge=0, description="completions that may wait; further ones are refused (429)")
    max_choices: int = Field(default=64, ge=1, description="prompts times n of one request")
    max_prompt_tokens: int = Field(default=131_072, ge=1, description="of all prompts of a request together")
    max_tokens: int = Field(default=4096, ge=0, description="generated for one completion")
    max_stop: int = Field(default=16, ge=0, description="stop strings of a request, each of 256 characters at most")
    max_logprobs: int = Field(default=20, ge=0, description="likeliest tokens reported at each position")
    max_body_bytes: int = Field(default=8 << 20, ge=1, description="of a request")
    session_bytes: int = Field(default=1 << 30, ge=0, description="of all states kept for sessions; 0: no sessions")
    chunk: int = Field(default=512, ge=1, description="prompt tokens read between two steps of the others")
    shutdown_seconds: float = Field(default=10.0, ge=0, description="for requests under way when the server stops")


def read_api_key(file: Path | None) -> str | None:
    """The key from ``file``, else from the environment (PARALM_API_KEY); None if neither says one.

    Raises UserError, one line, which never holds the key.
    """
    if file is not None:
        try:
            key, where = file.read_text(encoding="utf-8").strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: the API key cannot be read ({type(error).__name__})") from None
    elif KEY_VARIABLE in os.environ:
        key, where = os.environ[KEY_VARIABLE].strip(), KEY_VARIABLE
    else:
        return None
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where}: an API key is 16 printable ASCII characters or more, without spaces")
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, api_key: str | None, allow_no_key: bool) -> None:
    """UserError, one line, for an address that others reach while no key is asked for."""
    if not is_loopback(host) and api_key is None and not allow_no_key:
        raise UserError(
            f"host {host} can be reached from other machines, and there is no API key: set {KEY_VARIABLE}, give "
            "--api-key-file FILE, or say --allow-no-key"
        )
