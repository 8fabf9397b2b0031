"""The YAML that configurations are written in: YAML 1.2's core schema, with the line of every key.

PyYAML reads YAML 1.1, where ``1e-3`` is text, ``no`` is false, ``010`` is eight and ``1:30`` is ninety; the
second of two equal keys wins silently. Here numbers are numbers, only ``true`` and ``false`` are booleans,
equal keys are refused, and no tag constructs an object. Underscores in numbers (``1_000_000``) are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from paralm.errors import ConfigError

Key = tuple[str, ...]

_INT = r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*(?:\.|\.?[eE][-+]?[0-9]+)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_PLAIN = {  # the plain scalars that are not text, in the order in which they are tried
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (_INT, list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
}
_TAG = "tag:yaml.org,2002:"


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute, not inherited)


class _Writer(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or the reader above would not read back as text."""


for _name, (_pattern, _first) in _PLAIN.items():
    for _cls in (_Reader, _Writer):
        _cls.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


def _represent_text(writer: yaml.SafeDumper, text: str) -> yaml.Node:
    # Only the double-quoted style holds a line break (of any of Unicode's kinds) on one line.
    breaks = text.splitlines() not in ([], [text])
    return writer.represent_scalar(_TAG + "str", text, style='"' if breaks else None)


_Writer.add_representer(str, _represent_text)


def read(path: Path, shown: str) -> tuple[dict[str, Any], dict[Key, int]]:
    """Read a YAML file of keys.

    ``shown``: how messages name the file. Returns the data and, for every key of a mapping (nested ones
    included), the line it stands on. Raises ConfigError: one line with file, line and what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{shown}: not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{shown}: {error.strerror or error}") from None
    data, lines = parse(text, shown)
    if data is None:
        raise ConfigError(f"{shown}: empty; expected sections such as 'run:' and 'model:'")
    if not isinstance(data, dict):
        raise ConfigError(f"{shown}: expected sections such as 'run:' and 'model:', got {show(data)}")
    return data, lines


def parse(text: str, shown: str) -> tuple[Any, dict[Key, int]]:
    """YAML text as plain data (None, bool, int, float, str, list, dict with text keys) and the keys' lines.

    ``shown``: what messages call the text; they add the line when there is more than one.
    """
    lines: dict[Key, int] = {}

    def place(line: int) -> str:
        return f"{shown}:{line}" if "\n" in text else shown

    try:
        loader = _Reader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return (None if node is None else _data(node, (), lines, place)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place(mark.line + 1) if mark else shown
        context = f" {error.context}" if error.context else ""
        raise ConfigError(f"{where}: not valid YAML: {error.problem}{context}".replace("\n", " ")) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{shown}: not valid YAML: nested too deeply, or a value that contains itself") from None


def _data(node: yaml.Node, path: Key, lines: dict[Key, int], place: Callable[[int], str]) -> Any:
    if not isinstance(node, yaml.ScalarNode) and node.tag not in (_TAG + "map", _TAG + "seq"):
        raise ConfigError(_tagged(node, ".".join(path), place(node.start_mark.line + 1)))
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            name = f"{'.'.join(path)}{'.' if path else ''}{getattr(key_node, 'value', '?')}"
            if key_node.tag != _TAG + "str":
                raise ConfigError(f"{place(line)}: {name}: keys must be text; put it in quotes")
            key = _text(key_node.value, place(line))
            if key in found:
                first = lines[(*path, key)]
                raise ConfigError(f"{place(line)}: {name}: given twice, first on line {first}; remove one")
            lines[(*path, key)] = line
            found[key] = _data(value_node, (*path, key), lines, place)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_data(item, (*path, str(i)), lines, place) for i, item in enumerate(node.value)]
    return _scalar(node, ".".join(path), place(node.start_mark.line + 1))


def _scalar(node: yaml.Node, name: str, where: str) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    prefix = f"{where}: {name}: " if name else f"{where}: "
    if kind == "str":
        return _text(text, prefix.removesuffix(": "))
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text.replace("_", ""), 0)
        if kind == "float":
            value = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
            if math.isfinite(value):
                return value
            raise ConfigError(f"{prefix}expected a finite number, got {text}")
    except ValueError:
        raise ConfigError(f"{prefix}{text[:40]!r} is not a number that can be read") from None
    raise ConfigError(_tagged(node, name, where))


def _tagged(node: yaml.Node, name: str, where: str) -> str:
    return f"{where}: {name + ': ' if name else ''}the tag {node.tag} is not allowed; write plain values"


def _text(text: str, where: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(f"{where}: {text!r} is not text that UTF-8 can hold")
    return text


def write(data: dict[str, Any]) -> str:
    """Data as YAML that this module and any YAML 1.1 reader read back as the same data."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=110)


def show(value: Any) -> str:
    """A value on one line, as YAML would have it, cut when long."""
    text = " ".join(inline(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def inline(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.dump(value, Dumper=_Writer, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
