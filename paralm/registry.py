"""Things found by name in a configuration: mixers, optimizers, launchers.

An entry is a name, the pydantic class of its own keys, and a value (a class or a factory). A specification is
what a configuration file holds: ``{"name": NAME, **keys}``. Every mistake in one is a one-line ConfigError that
names the key and the nearest valid one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from paralm.errors import ConfigError

if TYPE_CHECKING:
    from paralm.models.mixers.base import Mixer

T = TypeVar("T")


class EntryConfig(BaseModel):
    """Base of an entry's own keys: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered thing: ``value`` is built from a ``config`` instance."""

    name: str
    config: type[BaseModel]
    value: T


class Registry(Generic[T]):
    """Entries by name.

    ``kind``: what they are, for messages ("mixer"). ``key``: where a specification stands in the configuration
    ("model.mixer"). ``derived``: entries that follow from another registry (a mixer for each registered cell),
    asked at every look-up, so that what is registered there later is found here too. ``load``: called before
    the first look-up, to import the built-in entries.
    """

    def __init__(
        self,
        kind: str,
        key: str,
        derived: Callable[[], Mapping[str, Entry[T]]] | None = None,
        load: Callable[[], None] | None = None,
    ) -> None:
        self.kind, self.key = kind, key
        self._own: dict[str, Entry[T]] = {}
        self._derived, self._load = derived, load

    def register(self, name: str, config: type[BaseModel]) -> Callable[[T], T]:
        """Decorator: register a class or factory under ``name`` with the class of its keys.

        Raises ConfigError if the name is taken by something else, or if ``config`` lets unknown keys through.
        Defining the same class again (a notebook, a reload) replaces it.
        """
        if config.model_config.get("extra") != "forbid":
            raise ConfigError(
                f"{self.kind} '{name}': {config.__name__} lets unknown keys through; "
                "derive it from paralm.registry.EntryConfig"
            )

        def add(value: T) -> T:
            taken = self.entries().get(name)
            if taken is not None and _identity(taken.value) != _identity(value):
                raise ConfigError(
                    f"{self.kind} name '{name}' is taken by {_identity(taken.value)}; register it under another name"
                )
            self._own[name] = Entry(name, config, value)
            return value

        return add

    def _all(self) -> dict[str, Entry[T]]:
        derived = self._derived() if self._derived is not None else {}
        return {**derived, **self._own}

    def entries(self) -> dict[str, Entry[T]]:
        """Every entry by name, sorted by name."""
        if self._load is not None:
            self._load()
        return dict(sorted(self._all().items()))

    def names(self) -> list[str]:
        """The valid names, sorted."""
        return list(self.entries())

    def get(self, name: str) -> Entry[T]:
        """The entry of that name; ConfigError naming the nearest valid one otherwise."""
        entries = self.entries()
        if name not in entries:
            raise ConfigError(f"{self.key}.name: no {self.kind} '{name}'{nearest(name, entries)}")
        return entries[name]

    def validate(self, spec: Mapping[str, Any]) -> tuple[Entry[T], BaseModel]:
        """The entry a specification names, and its keys checked and completed with defaults.

        Raises ConfigError, one line: a missing or unknown name, an unknown key, a value of the wrong type.
        """
        keys = dict(spec)
        name = keys.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"{self.key}.name: missing; name one of: {', '.join(self.names())}")
        entry = self.get(name)
        unknown = [key for key in keys if key not in _key_names(entry.config)]
        if unknown:
            hint = nearest(unknown[0], _key_names(entry.config))
            raise ConfigError(f"{self.key}.{unknown[0]}: {self.kind} '{name}' has no such key{hint}")
        try:
            return entry, entry.config.model_validate(keys)
        except ValidationError as error:
            raise ConfigError(f"{self.key}{_first_fault(error)}") from None


def _key_names(config: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in config.model_fields.items()]


def _identity(value: Any) -> str:
    """Module and qualified name of a class or function: equal for the same definition made twice."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean 'NEAREST'? (valid: …)``, the end of a message about a name that does not exist."""
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (valid: {', '.join(sorted(names))})"


def _first_fault(error: ValidationError) -> str:
    """``.KEY: what is wrong, got VALUE`` of the first key at fault, in one line.

    A value that may be of several kinds has a fault for each; their places name pydantic's kinds after the key.
    """
    faults = error.errors(include_url=False)
    place = faults[0]["loc"][:1]
    messages = [fault["msg"].removeprefix("Value error, ") for fault in faults if fault["loc"][:1] == place]
    path = "".join(f".{part}" for part in place)
    given = f", got {faults[0]['input']!r}" if place else ""
    return " ".join(f"{path}: {', or: '.join(messages)}{given}".split())


def _load_mixers() -> None:
    import paralm.models.mixers  # noqa: F401  (registers the built-in mixers; it imports this module)


def _cell_mixers() -> Mapping[str, Entry[type[Mixer]]]:
    from paralm.models.mixers.pararnn import cell_mixers

    return cell_mixers()


MIXERS: Registry[type[Mixer]] = Registry("mixer", "model.mixer", derived=_cell_mixers, load=_load_mixers)
"""Mixers: the built-in ones, a user's own, and one for every registered cell."""


def register_mixer(name: str, config: type[BaseModel]) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a Mixer subclass available as ``model.mixer.name``.

    ``config``: a subclass of EntryConfig with the mixer's own keys.
    """
    return MIXERS.register(name, config)


def get_mixer(name: str) -> Entry[type[Mixer]]:
    """The mixer of that name; ConfigError naming the nearest valid one otherwise."""
    return MIXERS.get(name)


def mixers() -> dict[str, Entry[type[Mixer]]]:
    """Every mixer by name."""
    return MIXERS.entries()


def validate_mixer(spec: Mapping[str, Any]) -> tuple[Entry[type[Mixer]], BaseModel]:
    """The mixer that ``model.mixer`` names and its checked configuration; ConfigError, one line, otherwise."""
    return MIXERS.validate(spec)
