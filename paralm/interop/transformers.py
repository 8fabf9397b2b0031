"""Folders as ``transformers`` writes them, read and written without it.

    config.json                                        model_type and the architecture's keys
    model.safetensors, or shards and their index       the weights; pickles (.bin) are refused

What an architecture calls its tensors is in a table of its own (mamba2.py, …; see architecture.py). Everything is
checked against the table before a weight is read: each tensor there, of its shape, and none besides. Weights stream by
pieces, so memory holds the model that is filled and nothing else, or, from folder to folder, a piece.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from paralm_data.atomic import write_file
from pydantic import ValidationError
from torch import Tensor

from paralm.errors import ConfigError
from paralm.interop.architecture import Architecture, Keys, Stored
from paralm.models import LanguageModel, build_model
from paralm.models.hybrid import layer_mixers, mixer_names
from paralm.training.tensor_file import TensorFile, TensorSpec
from paralm.weight_files import INDEX, PIECE, SINGLE, OnProgress, Read, WeightFiles, check_target, new_folder
from paralm.weight_files import write_weights as write_shards

CONFIG = "config.json"
_TABLES = {"mamba2": "paralm.interop.mamba2:MAMBA2", "xlstm": "paralm.interop.xlstm:XLSTM"}
"""model_type → where its table is."""
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def supported() -> list[str]:
    """The model_types that can be read and written."""
    return sorted(_TABLES)


def architecture(model_type: str) -> Architecture:
    """The table of a supported model_type."""
    module, name = _TABLES[model_type].split(":")
    found: Architecture = getattr(import_module(module), name)
    return found


class TransformersFolder:
    """A folder as transformers writes it, checked; weights are read when they are asked for, in our names."""

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError, one line: what is no such folder, another architecture, a tensor that is missing,
        unknown or of another shape, weights that are pickles or damaged."""
        self.path = Path(path)
        keys = Keys(str(self.path / CONFIG), _read_json(self.path / CONFIG))
        self.model_type = keys.content.get("model_type")
        if self.model_type not in _TABLES:
            raise ConfigError(
                f"{keys.where}: model_type {self.model_type!r} is not supported; supported: {', '.join(supported())}"
            )
        self.table = architecture(self.model_type)
        try:
            self.config, self.vocab_size = self.table.model_config(keys)
            self.model = build_model(self.config, self.vocab_size, seed=0, device="meta")
            """Of shapes without values."""
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in ("model", *fault["loc"]))
            raise ConfigError(f"{keys.where}: {key} would be {fault['input']!r}: {fault['msg']}") from None
        except ConfigError as error:
            raise error if keys.where in str(error) else ConfigError(f"{keys.where}: {error}") from None
        self._files = self._open()
        self._stored = self.table.stored(self.model)
        self._parts: dict[str, list[Stored]] = {}
        for stored in sorted(self._stored, key=lambda stored: stored.offset):
            self._parts.setdefault(stored.parameter, []).append(stored)
        self._check()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape, in the model's order."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights; where they differ, the narrowest that holds all of them."""
        specs = (self._files[stored.name][0].specs[self._files[stored.name][1]] for stored in self._stored)
        return reduce(torch.promote_types, (spec.dtype for spec in specs))

    def _open(self) -> dict[str, tuple[TensorFile, str]]:
        """Today's name of each tensor → its file, and its name there."""
        index = self.path / INDEX
        if index.is_file():
            where = _read_json(index).get("weight_map")
            if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
                raise ConfigError(f"{index}: no weight_map of tensors to files")
            if any(Path(name).name != name for name in where.values()):
                raise ConfigError(f"{index}: names a file that is not in its folder")
            files = {name: _tensor_file(self.path / name) for name in sorted(set(where.values()))}
            for key, name in where.items():
                if key not in files[name].specs:
                    raise ConfigError(f"{index}: tensor {key} is not in {name}")
        elif (self.path / SINGLE).is_file():
            files = {SINGLE: _tensor_file(self.path / SINGLE)}
            where = dict.fromkeys(files[SINGLE].specs, SINGLE)
        else:
            pickles = sorted(p.name for p in self.path.glob("*.bin")) if self.path.is_dir() else []
            hint = f"{pickles[0]} is a pickle, which is never loaded; save it as safetensors" if pickles else "missing"
            raise ConfigError(f"{self.path / SINGLE}: {hint}")
        return {self.table.renamed.get(key, key): (files[name], key) for key, name in where.items()}

    def _check(self) -> None:
        expected = {stored.name: stored.shape for stored in self._stored}
        found = {name: file.specs[key] for name, (file, key) in self._files.items()}
        repeats = {name for name, of in self.table.repeats.items() if name not in expected and of in expected}
        for name in repeats & set(found):
            expected[name] = expected[self.table.repeats[name]]
        for name, shape in expected.items():
            if name not in found:
                raise ConfigError(f"{self.path}: tensor {name} is missing; {CONFIG} says it is {shape}")
            if found[name].shape != shape:
                raise ConfigError(f"{self.path}: tensor {name} is {found[name].shape}, and {CONFIG} says {shape}")
            if not found[name].dtype.is_floating_point:
                raise ConfigError(f"{self.path}: tensor {name} is {found[name].dtype}, not floating-point")
        for name in found:
            if name not in expected:
                raise ConfigError(
                    f"{self.path}: tensor {name} of shape {found[name].shape} has no place in the {self.model_type} "
                    f"model that {CONFIG} describes"
                )
        for name in sorted(repeats & set(found)):
            self._check_repeat(name, self.table.repeats[name])

    def _check_repeat(self, name: str, of: str) -> None:
        """Tied weights may be stored twice, but they must be the same."""
        (first, key), (second, other) = self._files[name], self._files[of]
        try:
            same = all(torch.equal(a, b) for a, b in zip(first.pieces(key), second.pieces(other), strict=True))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: tensor {name}: {error}") from None
        if not same:
            raise ConfigError(f"{self.path}: {name} differs from {of}, and {CONFIG} says that they are tied")

    def read(self, parameter: str, offset: int, count: int) -> Tensor:
        """Elements of a parameter of ours, flattened, in the dtype of the file. Raises ConfigError: a damaged file."""
        parts, stop = [], offset + count
        for stored in self._parts[parameter]:
            low, high = max(offset, stored.offset), min(stop, stored.stop)
            if low < high:
                file, key = self._files[stored.name]
                try:
                    parts.append(file.read(key, low - stored.offset, high - stored.offset))
                except (OSError, ValueError) as error:
                    raise ConfigError(f"{file.path}: tensor {key}: {error}") from None
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def load_transformers(
    folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of a folder that transformers' ``save_pretrained`` wrote, in eval mode; transformers is not needed.

    ``device``: default: the CPU. ``dtype``: of the weights; default: the file's. Raises ConfigError, one line; see
    :class:`TransformersFolder`.
    """
    source = TransformersFolder(folder)
    model = source.model.to(dtype or source.dtype).to_empty(device=device or "cpu")
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        for low in range(0, flat.numel(), PIECE):
            count = min(PIECE, flat.numel() - low)
            flat[low : low + count].copy_(source.read(name, low, count))
    return model.eval()


def save_transformers(
    model: LanguageModel,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    special_tokens: dict[str, int] | None = None,
    force: bool = False,
) -> None:
    """Write a model so that transformers' ``from_pretrained`` loads it; transformers is not needed.

    ``dtype``: of the weights; default: the model's. ``max_shard_size``: bytes. ``special_tokens``: ids for
    config.json, such as ``{"eos_token_id": 2}``. ``force``: replace a folder of that kind that is there. Raises
    ConfigError for a model that transformers does not have, RunError for a folder that cannot be written; one line.
    """
    parameters = {name: parameter.detach().view(-1) for name, parameter in model.named_parameters()}
    write_transformers(
        Path(folder),
        model,
        lambda name, low, count: parameters[name][low : low + count],
        dtype or model.embedding.weight.dtype,
        max_shard_size=max_shard_size,
        special_tokens=special_tokens,
        force=force,
    )


def write_transformers(
    target: Path,
    model: LanguageModel,
    read: Read,
    dtype: torch.dtype,
    *,
    max_shard_size: int,
    special_tokens: dict[str, int] | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> WeightFiles:
    """As :func:`save_transformers`, from weights that ``read`` gives in our names; ``model`` may be on the meta device.
    ``finish``: adds what else belongs into the folder."""
    if dtype not in _DTYPE_NAMES:
        raise ConfigError(f"dtype {dtype}: transformers' weights are {', '.join(_DTYPE_NAMES.values())}")
    table = _table_of(model)
    tokens: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    content = {
        "architectures": [table.class_name],
        "model_type": table.model_type,
        "dtype": _DTYPE_NAMES[dtype],
        **table.keys(model),
        **tokens,
        **(special_tokens or {}),
    }
    stored = {entry.name: entry for entry in table.stored(model)}
    missed = sum(p.numel() for p in model.parameters()) - sum(math.prod(entry.shape) for entry in stored.values())
    if missed:
        raise AssertionError(f"the table of {table.model_type} leaves out {missed} elements")
    check_target(target, force, _is_transformers, "a folder as transformers writes it")
    specs = [TensorSpec(name, dtype, entry.shape) for name, entry in stored.items()]

    def read_stored(name: str, low: int, count: int) -> Tensor:
        return read(stored[name].parameter, stored[name].offset + low, count)

    with new_folder(target) as folder:
        written = write_shards(folder, specs, read_stored, max_shard_size, on_progress, plain_single=True)
        write_file(folder / CONFIG, json.dumps(content, indent=2, sort_keys=True).encode())
        finish(folder)
    return written


def _table_of(model: LanguageModel) -> Architecture:
    """The architecture whose mixer every layer is."""
    names = {str(spec["name"]) for spec in layer_mixers(model.config)}
    for model_type in supported():
        table = architecture(model_type)
        if names == {table.mixer}:
            return table
    raise ConfigError(
        f"model.mixer: transformers has no model of {mixer_names(model.config)} that paralm can write; those it can: "
        f"{', '.join(f'{architecture(t).mixer} ({t})' for t in supported())}"
    )


def _is_transformers(path: Path) -> bool:
    try:
        return "model_type" in _read_json(path / CONFIG)
    except ConfigError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing, so {path.parent} is no folder as transformers writes it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a JSON {type(content).__name__}, expected an object")
    return content


def _tensor_file(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
