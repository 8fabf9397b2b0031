"""What a table of ``transformers`` names says of one architecture: its configuration, and where each tensor goes.

A table is an :class:`Architecture`. Its tensors are :class:`Stored` entries: a tensor there is a run of consecutive
elements of one of our parameters, so a parameter may be one tensor there, several (gates that we keep in one matrix,
by rows), or one of another shape with as many elements. Nothing here touches a file (transformers.py does).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from paralm.config import ModelConfig
from paralm.errors import ConfigError
from paralm.models import LanguageModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """``name``, of ``shape`` there, is the elements from ``offset`` on of our ``parameter``, flattened."""

    name: str
    shape: Shape
    parameter: str
    offset: int = 0

    @property
    def stop(self) -> int:
        return self.offset + math.prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """One ``model_type`` of transformers.

    ``model_config``: from the keys of its config.json, our model section and the vocabulary's size; ConfigError, one
    line, for what we do not have. ``keys``: the reverse, for a model whose mixers are all ``mixer``; ConfigError for
    what transformers does not have. ``stored``: every tensor of such a model (it may be on the meta device); each
    element of each parameter exactly once. ``repeats``: tensors that a file of a model with tied embeddings may hold
    besides, and what they repeat. ``renamed``: names of older versions, and today's.
    """

    model_type: str
    class_name: str
    mixer: str
    model_config: Callable[[Keys], tuple[ModelConfig, int]]
    keys: Callable[[LanguageModel], dict[str, Any]]
    stored: Callable[[LanguageModel], list[Stored]]
    repeats: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


class Keys:
    """The keys of a config.json, read with their types; what is absent has the default transformers gives it."""

    def __init__(self, where: str, content: Mapping[str, Any]) -> None:
        self.where, self.content = where, content

    def integer(self, key: str, default: int, least: int = 1) -> int:
        """A whole number, at least ``least``. ConfigError, one line, otherwise; so do the others."""
        value = self.content.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fault(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str, default: float, least: float = 0.0) -> float:
        """A finite number, at least ``least``."""
        value = self.content.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            raise self.fault(key, f"a number of at least {least:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.content.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def one_of(self, key: str, default: str, valid: tuple[str, ...]) -> str:
        """One of some words: those whose meaning we have."""
        value = self.content.get(key, default)
        if value not in valid:
            raise self.fault(key, f"{' or '.join(valid)}, which is what paralm has")
        return str(value)

    def fault(self, key: str, expected: str) -> ConfigError:
        """For a key that cannot be used."""
        return ConfigError(f"{self.where}: {key} is {json.dumps(self.content.get(key))}; expected {expected}")


def whole(name: str, parameter: str, shapes: Mapping[str, Shape], shape: Shape | None = None) -> Stored:
    """A tensor that is the whole of a parameter, in its shape or in another of as many elements."""
    return Stored(name, shapes[parameter] if shape is None else shape, parameter)


def rows(names: tuple[str, ...], counts: tuple[int, ...], parameter: str, shapes: Mapping[str, Shape]) -> list[Stored]:
    """Tensors that are consecutive rows of a parameter: ``counts[k]`` of them ``names[k]``."""
    row = shapes[parameter][1:]
    found, offset = [], 0
    for name, count in zip(names, counts, strict=True):
        found.append(Stored(name, (count, *row), parameter, offset))
        offset = found[-1].stop
    return found
