"""Configuration from files and the command line: YAML with ``include:``, dotted overrides, and provenance.

A configuration is layers, later over earlier: the schema's defaults, the files a file includes, the file,
the overrides. Mappings are merged key by key; lists and values are replaced; a ``model.mixer`` of another
name replaces the whole mixer, since its keys belong to that name. Every leaf knows where it came from.

    include: [model/paragru_10m, base.yaml]   # presets by name, files relative to this file
    training:
      max_steps: 2000

Relative paths in values (``run.root``, ``data.source.paths``) are meant from the folder the command runs in,
but for ``imports``, whose .py files lie relative to the file that names them.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from paralm import resources
from paralm.config import Config
from paralm.config_errors import one_line, section_at
from paralm.config_yaml import Key, inline, parse, read, show, write
from paralm.errors import ConfigError
from paralm.user_modules import load_modules

_FROZEN_TRAINING = (
    *("seq_len", "global_batch_size", "carry_state", "initial_state", "precision", "init_from", "fork_from"),
    "max_steps",
)
_FROZEN = ("run.seed", "data", "model", "optimizer", *(f"training.{key}" for key in _FROZEN_TRAINING))
_OF_ALL_RANKS = ("run.seed", "run.deterministic", "model", "optimizer", "training", "checkpoint", "parallel", "eval")
_FREE = ("data.verify", "data.executor", "data.workers", "data.shard_bytes", "data.max_bad_records")
_HOME_PATHS = (("run", "root"), ("data", "dir"), ("data", "tokenizer", "model"), ("data", "source", "paths"))


@dataclass(frozen=True)
class Origin:
    """Where a value came from: a line of a file, an override, or (neither given) the default."""

    file: str | None = None
    line: int | None = None
    override: str | None = None

    def __str__(self) -> str:
        if self.file is not None:
            return f"{self.file}:{self.line}" if self.line is not None else self.file
        return f"override '{self.override}'" if self.override is not None else "default"


class LoadedConfig(NamedTuple):
    """A valid configuration, and where each of its dotted leaves came from."""

    config: Config
    provenance: dict[str, Origin]


@dataclass
class _Layer:
    """Data of some files or overrides, not validated yet; ``origins`` has every key, sections included."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)

    def lay(self, top: _Layer) -> None:
        """Put another layer over this one."""
        self._merge(self.data, top.data, ())
        self.origins.update(top.origins)

    def _merge(self, into: dict[str, Any], values: dict[str, Any], path: Key) -> None:
        for key, value in values.items():
            here, old = (*path, key), into.get(key)
            if isinstance(value, dict) and isinstance(old, dict) and not _replaces(here, old, value):
                self._merge(old, value, here)
                continue
            for gone in [k for k in self.origins if k[: len(here)] == here]:
                del self.origins[gone]
            into[key] = copy.deepcopy(value)

    def origin(self, path: Key) -> Origin:
        """The origin of a path, or of the nearest key above it that was written."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return Origin()

    def place(self, path: Key) -> tuple[Any, str]:
        """What an error at a path is sorted by (files by line, then overrides), and where its value stands."""
        found = self.origin(path)
        order = (found.override is not None, found.file or "", found.line or 0)
        return order, "" if found == Origin() else str(found)


def _replaces(path: Key, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if path == ("data", "synthetic"):
        return "task" in new and new["task"] != old.get("task")
    return path == ("model", "mixer") and "name" in new and new["name"] != old.get("name", "paragru")


def load_config(
    source: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), *, build: bool = True
) -> LoadedConfig:
    """Read, merge and validate a configuration.

    ``source``: a YAML file, the name of a preset (``quickstart``), or several, later over earlier.
    ``overrides``: ``section.key=value``, the value read as YAML. ``build=False`` leaves out what needs
    torch: the modules in ``imports``, the mixer's own keys, and whether a model can be made of it all.

    Raises ConfigError, one line, before anything else happens.
    """
    names = [source] if isinstance(source, (str, Path)) else list(source)
    layer = _Layer()
    for name in names:
        layer.lay(_read_file(_locate(str(name), Path()), ()))
    layer.lay(_read_overrides(overrides))
    _expand_home(layer.data)
    config = _validate(layer)
    if build:
        load_modules(config.imports)
        _complete_model(config, layer)
    provenance = {key: layer.origins.get(tuple(key.split(".")), Origin()) for key in flatten(config)}
    return LoadedConfig(config, provenance)


def dump_yaml(config: Config) -> str:
    """The whole configuration as YAML; reading it back gives an equal one."""
    return write(config.model_dump(mode="json"))


def annotate(loaded: LoadedConfig) -> str:
    """The whole configuration as YAML, with a comment behind each value that says where it came from."""
    lines: list[tuple[str, str]] = []

    def visit(values: dict[str, Any], path: str, indent: str) -> None:
        for key, value in values.items():
            here = f"{path}.{key}" if path else key
            if isinstance(value, dict) and value:
                lines.append((f"{indent}{inline(key)}:", ""))
                visit(value, here, indent + "  ")
            else:
                lines.append((f"{indent}{inline(key)}: {inline(value)}", str(loaded.provenance[here])))

    visit(loaded.config.model_dump(mode="json"), "", "")
    column = min(48, max(len(text) for text, _ in lines))
    return "".join(f"{text:{column}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted leaves and their plain values, in the schema's order. Lists and empty mappings are leaves."""
    found: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(inner, f"{path}.{key}" if path else key)
        else:
            found[path] = value

    visit(config.model_dump(mode="json"), "")
    return found


def diff(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, with both values; None for a key that one of them lacks."""
    left, right = flatten(a), flatten(b)
    keys = [*left, *(key for key in right if key not in left)]
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def frozen_differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """The differences that would make ``new`` another run than ``old``: data, model, optimizer, the seed, and
    the shape of training. Where a run lives, how it is parallelised, saved, logged and evaluated may change.
    """

    return [d for d in diff(old, new) if _under(d[0], _FROZEN) and not _under(d[0], _FREE)]


def rank_differences(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
    """The differences with which two ranks would not train one model together. Paths may be each node's own."""
    return [d for d in diff(one, other) if _under(d[0], _OF_ALL_RANKS) and d[0] != "parallel.nvme_path"]


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == p or key.startswith(p + ".") for p in prefixes)


# -- reading -------------------------------------------------------------------------------------------------


def _locate(name: str, folder: Path, where: str = "") -> Path:
    """A file, relative to ``folder``, or a preset; ``where``: the place that named it, for the message."""
    prefix = f"{where}: " if where else ""
    path = folder / Path(name).expanduser()
    if path.is_file():
        return path
    preset = resources.find_preset(name)
    if preset is not None:
        return preset
    if path.is_dir():
        hint = f"; give {path / 'config.yaml'}" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"{prefix}{name}: is a folder, expected a YAML file or a preset{hint}")
    beside = sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    candidates = [*resources.presets(), *(str(Path(name).parent / p.name) for p in beside)]
    near = difflib.get_close_matches(name.removesuffix(".yaml"), candidates, n=1, cutoff=0.4)
    near = near or difflib.get_close_matches(name, candidates, n=1, cutoff=0.4)
    nearest = f"nearest: {near[0]}" if near else "'paralm config list' shows the presets"
    raise ConfigError(f"{prefix}{name}: no such file or preset; {nearest}")


def _read_file(path: Path, above: tuple[Path, ...]) -> _Layer:
    shown, full = _shown(path), path.resolve()
    data, lines = read(path, shown)
    origins = {key: Origin(file=shown, line=line) for key, line in lines.items()}
    layer = _Layer()
    if "include" in data:
        place = str(origins[("include",)])
        included = data.pop("include")
        included = [included] if isinstance(included, str) else included
        if not isinstance(included, list) or not all(isinstance(i, str) for i in included):
            raise ConfigError(f"{place}: include: expected a file or preset, or a list of them, got {show(included)}")
        for name in included:
            target = _locate(name, path.parent, f"{place}: include")
            if target.resolve() in (*above, full):
                chain = " → ".join(_shown(p) for p in (*above, full, target.resolve()))
                raise ConfigError(f"{place}: include: goes round in a circle: {chain}")
            layer.lay(_read_file(target, (*above, full)))
    _drop_empty_sections(data, (), origins)
    if isinstance(data.get("imports"), list):
        data["imports"] = [_beside(path, item) for item in data["imports"]]
    layer.lay(_Layer(data, {k: o for k, o in origins.items() if k[0] != "include"}))
    return layer


def _drop_empty_sections(data: dict[str, Any], path: Key, origins: dict[Key, Origin]) -> None:
    """A section whose keys are all commented out says nothing; it must not wipe out an included one."""
    for key in list(data):
        here = (*path, key)
        if data[key] is None and section_at(here) is not None:
            del data[key], origins[here]
        elif isinstance(data[key], dict):
            _drop_empty_sections(data[key], here, origins)


def _beside(path: Path, item: Any) -> Any:
    """An entry of ``imports`` in a file: a relative .py path is meant from that file, and made absolute."""
    if not isinstance(item, str) or not item.endswith(".py"):
        return item
    return str((path.resolve().parent / Path(item).expanduser()).resolve())


def _read_overrides(overrides: Sequence[str]) -> _Layer:
    layer = _Layer()
    for text in overrides:
        key, equals, value_text = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"override '{text}': expected key=value, such as training.max_steps=100")
        if path[0] == "include":
            raise ConfigError(f"override '{text}': include works in files only")
        value, _ = parse(value_text, f"override '{text}'")
        if path == ("imports",) and isinstance(value, list):
            value = [_beside(Path("override"), item) for item in value]
        for part in reversed(path):
            value = {part: value}
        _merge_override(layer, _Layer(value, dict.fromkeys(_paths(value, ()), Origin(override=text))))
    return layer


def _paths(value: Any, path: Key) -> Iterator[Key]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from _paths(inner, (*path, key))


def _merge_override(layer: _Layer, top: _Layer) -> None:
    """Overrides form one layer: ``model.mixer.d_conv=2 model.mixer.name=x`` means both, in either order."""
    mixer = (top.data.get("model") or {}).get("mixer") if isinstance(top.data.get("model"), dict) else None
    known = (layer.data.get("model") or {}).get("mixer") if isinstance(layer.data.get("model"), dict) else None
    if isinstance(mixer, dict) and isinstance(known, dict) and "name" in mixer:
        known["name"] = mixer["name"]
    layer.lay(top)


def _shown(path: Path) -> str:
    """A path as messages and provenance name it: relative to the working folder when it is inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def _expand_home(data: dict[str, Any]) -> None:
    def expand(value: Any) -> Any:
        if isinstance(value, list):
            return [expand(v) for v in value]
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value

    for *sections, key in _HOME_PATHS:
        at: Any = data
        for part in sections:
            at = at.get(part) if isinstance(at, dict) else None
        if isinstance(at, dict) and key in at:
            at[key] = expand(at[key])


# -- validating ----------------------------------------------------------------------------------------------


def _validate(layer: _Layer) -> Config:
    try:
        # Strict JSON: text is no number, 1 is not true, 2.0 is not 2, but a list may become a tuple.
        return Config.model_validate_json(json.dumps(layer.data), strict=True)
    except ValidationError as error:
        raise ConfigError(one_line(error, layer.place)) from None


def _complete_model(config: Config, layer: _Layer) -> None:
    """Check the task's and the mixer's own keys and fill in their defaults, so that the saved configuration says
    everything; then see that a model, an optimizer and an engine can be made of it, the model on the device that
    allocates nothing.
    """
    from paralm_data import DataError
    from paralm_data.synthetic import check_width

    from paralm.models import build_model  # torch comes with it
    from paralm.models.hybrid import mixer_pattern
    from paralm.registry import validate_mixer
    from paralm.synthetic import checked as checked_task
    from paralm.training.engine import deepspeed_config
    from paralm.training.grid import check_grid
    from paralm.training.initial_states import check_states
    from paralm.training.optimizers import OPTIMIZERS

    where: tuple[str, ...] = ()
    mixture = config.data.mixture
    given = config.data.tokenizer.model is not None  # then its size is known when it has been read
    given = given or (mixture is not None and any(source.store is not None for source in mixture.sources.values()))
    vocab_size = 1 if given else config.data.tokenizer.vocab_size

    def complete(spec: dict[str, Any]) -> dict[str, Any]:
        entry, checked = validate_mixer(spec)
        keys = {key: value for key, value in spec.items() if key != "name"}
        entry.config.model_validate_json(json.dumps(keys), strict=True)
        return {"name": entry.name, **checked.model_dump(mode="json", by_alias=True)}

    try:
        if config.data.synthetic is not None:
            where = ("data", "synthetic")
            task = checked_task(config.data.synthetic)
            config.data.synthetic, vocab_size = task.spec, task.vocab_size
            check_width(task, config.training.seq_len)
        where = ("model", "mixer")
        pattern = mixer_pattern(config.model)
        config.model.mixer = complete(config.model.mixer)
        if config.model.mixers is not None:
            where = ("model", "mixers")
            config.model.mixers = [{**complete(spec), "count": count} for spec, count in pattern]
        blueprint = build_model(config.model, vocab_size, config.run.seed, device="meta")
        check_states(config, blueprint)
        check_grid(config, blueprint)
        if config.optimizer.name not in OPTIMIZERS:
            near = difflib.get_close_matches(config.optimizer.name, OPTIMIZERS, n=1, cutoff=0.0)
            raise ConfigError(f"optimizer.name: no optimizer '{config.optimizer.name}'; nearest: {near[0]}")
        deepspeed_config(config, world_size=1, parameters=1)
    except ValidationError as error:
        raise ConfigError(one_line(error, layer.place, where)) from None
    except (ConfigError, DataError) as error:
        key = re.match(r"[\w.]*", str(error))
        _, place = layer.place(tuple(key.group().split(".")) if key else ())
        raise ConfigError(f"{place}: {error}" if place else str(error)) from None
