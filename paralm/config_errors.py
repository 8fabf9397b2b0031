"""What the schema found wrong, as one line: the place, the key, what was expected, the nearest valid name."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from paralm.config import Config
from paralm.config_yaml import Key, show

NAME = "NAME"  # stands for a name of the user's choice in known_keys()

_EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list, such as [a, b]",
    "dict_type": "keys with values, such as {a: b}",
    "model_type": "keys with values, such as {a: b}",
    "model_attributes_type": "keys with values, such as {a: b}",
}


def section_at(path: Key) -> type[BaseModel] | None:
    """The section of the schema at a path of keys; None where there is a value or nothing."""
    section: type[BaseModel] = Config
    for i, key in enumerate(path):
        if key not in section.model_fields:
            return None
        kind, inner = _kind(section.model_fields[key].annotation)
        if inner is None:
            return None
        if kind == "named":
            return inner if len(path) == i + 2 else None
        section = inner
    return section


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of the schema, sections included; names of the user's choice appear as ``NAME``."""
    return tuple(_keys(Config, ()))


def _keys(section: type[BaseModel], path: Key) -> Iterable[str]:
    for name, field in section.model_fields.items():
        here = (*path, name)
        yield ".".join(here)
        kind, inner = _kind(field.annotation)
        if inner is not None:
            yield from _keys(inner, here if kind == "section" else (*here, NAME))


def _kind(annotation: Any) -> tuple[str, type[BaseModel] | None]:
    """("section", class), ("named", class) for sections under free names, or ("value", None)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((k for k in map(_kind, typing.get_args(annotation)) if k[1]), ("value", None))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section", annotation
    if typing.get_origin(annotation) is dict:
        inner = typing.get_args(annotation)[1]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return "named", inner
    return "value", None


def nearest_key(path: Key) -> str | None:
    """The valid key that an unknown one was most likely meant to be; None when nothing is near.

    A misspelt neighbour first, then a key of the same name in another section, then anything similar.
    """
    name, dotted, above = path[-1], ".".join(path), ".".join(path[:-1])
    section = section_at(path[:-1])
    siblings = [f"{above}.{key}" if above else key for key in section.model_fields] if section else []

    def like(candidates: list[str], cutoff: float) -> str | None:
        by_name = {k.rsplit(".", 1)[-1]: k for k in reversed(candidates)}
        found = difflib.get_close_matches(name, by_name, n=1, cutoff=cutoff)
        return by_name[found[0]] if found else None

    same_name = [k for k in known_keys() if k.rsplit(".", 1)[-1] == name]
    return (
        like(siblings, 0.8)
        or next(iter(difflib.get_close_matches(dotted, same_name, n=1, cutoff=0.0)), None)
        or like(siblings, 0.6)
        or like(list(known_keys()), 0.7)
    )


def unknown_key(path: Key) -> str:
    """``model.d_modle: unknown key; nearest: model.d_model``."""
    near = nearest_key(path)
    if near:
        return f"{'.'.join(path)}: unknown key; nearest: {near}"
    section = section_at(path[:-1])
    here = f" in '{'.'.join(path[:-1])}'" if path[:-1] else ""
    valid = ", ".join(section.model_fields) if section else ""
    return f"{'.'.join(path)}: unknown key; the keys{here} are {valid}"


def one_line(error: ValidationError, origin: Callable[[Key], tuple[Any, str]], under: Key = ()) -> str:
    """The first of a validation's errors, and how many more there are.

    ``origin(path)``: what the error at a path is sorted by (first is what the user reads first), and the
    place, such as ``run.yaml:12``, that the message begins with. ``under``: the key whose value was validated.
    """
    details = error.errors(include_url=False)
    for detail in details:
        detail["loc"] = (*under, *detail["loc"])
    located = sorted(((*origin(_path(d)), i) for i, d in enumerate(details)), key=lambda x: (x[0], x[2]))
    _, place, index = located[0]
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    prefix = f"{place}: " if place else ""
    return f"{prefix}{_message(details[index])}{more}"


def _path(detail: ErrorDetails) -> Key:
    path = tuple(str(part) for part in detail["loc"])
    if path or detail["type"] != "value_error":
        return path
    # A rule over several sections names its key at the front of the message.
    words = detail["msg"].removeprefix("Value error, ").split()
    first = words[0].rstrip(":,") if words else ""
    return tuple(first.split(".")) if first in known_keys() else ()


def _message(detail: ErrorDetails) -> str:
    kind, path, context = detail["type"], _path(detail), detail.get("ctx", {})
    key = ".".join(path)
    got = f", got {show(detail['input'])}"
    if kind == "extra_forbidden":
        return unknown_key(path)
    if kind in ("value_error", "assertion_error"):
        text = " ".join(detail["msg"].split(", ", 1)[-1].split())
        return text if not detail["loc"] else f"{key}: {text}"
    if kind in _EXPECTED:
        hint = ""
        if kind == "string_type" and not isinstance(detail["input"], (dict, list)):
            hint = " (put it in quotes)"
        if kind.startswith("int_") and isinstance(detail["input"], float) and detail["input"].is_integer():
            hint = f" (write {int(detail['input'])})"
        return f"{key}: expected {_EXPECTED[kind]}{got}{hint}"
    if kind == "literal_error":
        choices = [c.strip("'") for c in str(context["expected"]).replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(detail["input"]), choices, n=1, cutoff=0.5)
        nearest = f"; nearest: {near[0]}" if near else ""
        return f"{key}: expected {context['expected']}{got}{nearest}"
    if kind in ("missing", "too_long", "too_short"):
        key = ".".join(path[:-1]) if kind == "missing" else key
        return f"{key}: expected {_tuple_length(key.split('.'))} values{got}"
    if kind == "string_pattern_mismatch":
        return f"{key}: may hold letters, digits, '.', '_' and '-' only (pattern {context['pattern']}){got}"
    return f"{key or 'configuration'}: {detail['msg'].replace('Input should', 'must')}{got}"


def _tuple_length(path: Sequence[str]) -> int | str:
    """How many values the tuple at a path holds."""
    section = section_at(tuple(path[:-1]))
    annotation = section.model_fields[path[-1]].annotation if section else None
    options = (annotation, *typing.get_args(annotation))
    return next((len(typing.get_args(o)) for o in options if typing.get_origin(o) is tuple), "other")
