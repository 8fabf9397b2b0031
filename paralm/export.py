"""``paralm export``: a checkpoint as one model, in files that other programs read too.

    model-00001-of-00003.safetensors …   the weights, each once, in one dtype
    model.safetensors.index.json         which tensor is in which file
    tokenizer.model                      the sentencepiece model
    my_cell.py …                         the .py files of the run's ``imports:``, and what they import beside them
    config.json                          the model section, vocabulary, format, and every file's size and SHA-256

Whatever world size and ZeRO stage wrote the checkpoint, its fragments are read by pieces and appended to the shard in
hand, so memory holds a piece, not a tensor and not a shard. Everything is written to a folder beside the target, which
gets its name when it is whole. :class:`Exported` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from paralm_data.atomic import write_file
from pydantic import ValidationError

from paralm.config import Config
from paralm.errors import CheckpointError
from paralm.training import checkpoint as ckpt
from paralm.training.fragments import MASTER
from paralm.training.tensor_file import TensorFile, TensorSpec
from paralm.user_modules import helpers, is_file, loaded_files
from paralm.weight_files import INDEX, OnProgress, Read, check_target, chosen_dtype, new_folder, write_weights

FORMAT = "paralm export 1"
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export` has written."""

    path: Path
    step: int
    parameters: int
    shards: list[str]
    nbytes: int  # of the shards


def export(
    run: str | Path,
    to: str | Path,
    *,
    max_shard_size: int = 5 * 10**9,
    dtype: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> ExportResult:
    """Write the model of ``RUN`` (its newest whole checkpoint) or ``RUN@STEP`` to the folder ``to``.

    ``max_shard_size``: bytes. ``dtype``: "bf16" or "fp32"; default: the run's precision. ``force``: replace an
    export that is there. ``on_progress``: called with bytes written and bytes in all. ``warn``: told of a module that
    cannot be carried, since ``imports:`` names it by its package. Raises UserError, one line: no such run or step, a
    damaged checkpoint, a target that is in use or cannot be written.
    """
    from paralm.training.load import open_run_model

    target = Path(to)
    check_target(target, force, is_export, "an export of paralm")
    source = open_run_model(run, None, warn)
    chosen = dtype or source.config.training.precision
    chosen_dtype(chosen)
    modules, beside = _carried(source.config.imports)
    for name in source.config.imports:
        if name not in modules:
            warn(f"imports: {name} is not in the export, being no .py file; install it where the export is loaded")
    with source.checkpoint.kept_open():
        return write_export(
            target,
            source.shapes,
            lambda name, low, count: source.checkpoint.read(MASTER, name, low, count),
            {**_describe(source.config, source.checkpoint, chosen), "modules": modules, "helpers": beside},
            source.own_tokenizer.proto if source.own_tokenizer is not None else None,
            max_shard_size,
            on_progress,
        )


def _carried(imports: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Of each .py file among ``imports`` the name of its copy in an export, and its helpers, which keep their names;
    two files of one name get two."""
    names = list(dict.fromkeys(filter(is_file, imports)))
    beside = {name: helpers(Path(name)) for name in names}
    taken = set().union(*beside.values())
    modules: dict[str, str] = {}
    for name in names:
        path, number = Path(name), 1
        copy = path.name
        while copy in taken:
            number += 1
            copy = f"{path.stem}_{number}.py"
        modules[name] = copy
        taken.add(copy)
    return modules, beside


def write_export(
    target: Path,
    shapes: dict[str, tuple[int, ...]],
    read: Read,
    content: dict[str, Any],
    tokenizer: bytes | None,
    max_shard_size: int,
    on_progress: OnProgress | None = None,
) -> ExportResult:
    """Write an export's folder. ``content``: what ``config.json`` says besides the files; its dtype is the weights',
    and its modules and helpers are copied. ``tokenizer``: of a sentencepiece model, or None. Raises RunError, one line.
    """
    specs = [TensorSpec(name, chosen_dtype(content["dtype"]), shape) for name, shape in shapes.items()]
    with new_folder(target) as folder:
        written = write_weights(folder, specs, read, max_shard_size, on_progress)
        if tokenizer is not None:
            write_file(folder / TOKENIZER, tokenizer)
        copies = {copy: Path(name) for name, copy in content.get("modules", {}).items()}
        for name, beside in content.get("helpers", {}).items():
            copies = {helper: Path(name).resolve().parent / helper for helper in beside} | copies
        for copy, original in copies.items():
            (folder / copy).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / copy, original.read_bytes())
        files = dict(written.files)
        own = (TOKENIZER,) if tokenizer is not None else ()
        for name in (INDEX, *own, *copies):
            path = folder / name
            files[name] = {"bytes": path.stat().st_size, "sha256": ckpt.sha256_file(path)}
        write_file(folder / CONFIG, ckpt.seal({**content, "files": files}).encode())
    parameters = sum(torch.Size(spec.shape).numel() for spec in specs)
    return ExportResult(target, content["step"], parameters, written.shards, written.nbytes)


def _describe(config: Config, checkpoint: ckpt.Checkpoint, dtype: str) -> dict[str, Any]:
    """What an export says of the model besides its files; no path of the machine it was made on but user modules'."""
    manifest = checkpoint.manifest
    task = {"data": {"synthetic": config.data.synthetic}} if config.data.synthetic is not None else {}
    return {
        **task,
        "format": FORMAT,
        "model": config.model.model_dump(mode="json"),
        "vocab_size": manifest["vocab_size"],
        "dtype": dtype,
        "imports": config.imports,
        "run": {"name": config.run.name, "seed": config.run.seed},
        "training": {"seq_len": config.training.seq_len, "precision": config.training.precision},
        "step": checkpoint.step,
        "tokens": manifest["tokens"],
        "checkpoint_sha256": manifest["sha256"],
        "tokenizer_sha256": manifest["tokenizer_sha256"],
    }


def is_export(path: Path) -> bool:
    """Whether a folder is an export of ours, whole or damaged."""
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A damaged config.json beside shards and no run's configuration: an export still, and refused as damaged.
        return (path / CONFIG).is_file() and (path / INDEX).is_file()
    return isinstance(content, dict) and str(content.get("format", "")).startswith("paralm export")


class Exported:
    """An export, read back and verified."""

    def __init__(self, path: Path) -> None:
        """Reads and checks ``config.json`` and the index. Raises CheckpointError, one line."""
        self.path = path
        try:
            self.content = ckpt.read_sealed(path / CONFIG, FORMAT)
        except FileNotFoundError:
            raise CheckpointError(f"{path / CONFIG}: missing, so {path} is no export") from None
        try:
            self.config = Config.model_validate(
                {key: self.content[key] for key in ("model", "run", "training")}
                | {"imports": [self._module(name) for name in self.content["imports"]]}
                | ({"data": self.content["data"]} if "data" in self.content else {})
            )
        except (ValidationError, KeyError) as error:
            raise CheckpointError(f"{path / CONFIG}: {str(error).splitlines()[0]}") from None
        self.step: int = self.content["step"]

    def _module(self, name: str) -> str:
        """Where one of the run's imports is loaded from: the file that was exported if it and its helpers are still
        there as they were, or if a copy of it is loaded already (what is in it must not register twice), else the
        export's copy. Raises CheckpointError, one line, for one that is not as it was written."""
        copy = self.content.get("modules", {}).get(name)
        if copy is None:
            return name
        beside = self.content.get("helpers", {}).get(name, [])
        for path in (Path(name), *loaded_files()):
            originals = {copy: path} | {helper: path.resolve().parent / helper for helper in beside}
            if not any(self._differs(original, file) for file, original in originals.items()):
                return str(path)
        for file in (copy, *beside):
            if found := self._damage_of(file):
                raise CheckpointError(found)
        return str(self.path / copy)

    def _differs(self, path: Path, file: str) -> str | None:
        """How ``path`` differs from a file of the export, or None."""
        entry = self.content["files"][file]
        return ckpt.file_damage(path, entry["bytes"], entry["sha256"])

    def damage(self, share: int = 0, shares: int = 1) -> str | None:
        """The first file that is missing or not as it was written, or None. ``share`` of ``shares`` splits the files
        over ranks."""
        return next(filter(None, map(self._damage_of, sorted(self.content["files"])[share::shares])), None)

    def _damage_of(self, name: str) -> str | None:
        found = self._differs(self.path / name, name)
        return f"damaged export: {found.replace('the manifest', CONFIG)}" if found else None

    def verify(self) -> Exported:
        """Raise CheckpointError, one line, for a file that is missing or not as it was written."""
        found = self.damage()
        if found:
            raise CheckpointError(found)
        return self

    @cached_property
    def _files(self) -> dict[str, TensorFile]:
        """Parameter name → its file."""
        try:
            index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {name: TensorFile(self.path / name) for name in set(index.values())}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {str(error).splitlines()[0]}") from None
        return {key: files[name] for key, name in index.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape. Raises CheckpointError, one line."""
        return {name: file.specs[name].shape for name, file in self._files.items()}

    def read(self, kind: str, name: str, offset: int, numel: int) -> torch.Tensor:
        """As :meth:`paralm.training.checkpoint.Checkpoint.read`; the only kind there is, is the weights themselves."""
        assert kind == MASTER
        try:
            return self._files[name].read(name, offset, offset + numel)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._files[name].path}: cannot be read: {error}") from None

    @torch.no_grad()
    def fill(self, model: torch.nn.Module) -> None:
        """Copy the weights into a model. Raises CheckpointError, one line, when it is another's."""
        shapes = self.shapes
        for name, parameter in model.named_parameters():
            if shapes.get(name) != tuple(parameter.shape):
                raise CheckpointError(
                    f"{self.path}: parameter {name} is {shapes.get(name, 'absent')} there, "
                    f"{tuple(parameter.shape)} in the model of {CONFIG}"
                )
            low, flat = 0, parameter.view(-1)
            for part in self._files[name].pieces(name):
                flat[low : low + part.numel()].copy_(part)
                low += part.numel()
