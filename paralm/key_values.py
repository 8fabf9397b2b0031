"""Settings as they are given on a command line: KEY=VALUE texts, checked by a pydantic model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from paralm.config_yaml import parse
from paralm.errors import ConfigError
from paralm.registry import nearest

M = TypeVar("M", bound=BaseModel)


def read_key_values(schema: type[M], what: str, given: Sequence[str] | Mapping[str, Any]) -> M:
    """``schema`` from ``KEY=VALUE`` texts (values read as YAML; ``a.b=1`` reaches into a section) or from a mapping.

    ``schema`` forbids extra keys. ``what``: whose settings they are, for messages ("evaluation 'passkey'"). Raises
    ConfigError, one line: no '=', an unknown key (the nearest is named), or a value that cannot be.
    """
    values: dict[str, Any] = {}
    if isinstance(given, Mapping):
        values = dict(given)
    else:
        for text in given:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise ConfigError(f"'{text}': give settings of {what} as KEY=VALUE")
            *sections, last = key.split(".")
            place = values
            for section in sections:
                inner = place.setdefault(section, {})
                if not isinstance(inner, dict):
                    raise ConfigError(f"'{text}': {section} was given a value before")
                place = inner
            place[last] = parse(value, f"override '{text}'")[0]
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_fault(schema, what, error)) from None


def _first_fault(schema: type[BaseModel], what: str, error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: {what} has no such setting{nearest(key, schema.model_fields)}"
    message = " ".join(str(fault["msg"]).removeprefix("Value error, ").split())
    if not key:
        return f"{what}: {message}"
    return f"{key}: {message.replace('Input should', 'must')}, got {fault['input']!r}"
