"""``paralm export``: a checkpoint as one model, in files that other programs read too.

    model-00001-of-00003.safetensors …   the weights, each once, in one dtype
    model.safetensors.index.json         which tensor is in which file
    tokenizer.model                      the sentencepiece model
    config.json                          the model section, vocabulary, format, and every file's size and SHA-256

Whatever world size and ZeRO stage wrote the checkpoint, its fragments are read by pieces and appended to the shard in
hand, so memory holds a piece, not a tensor and not a shard. Everything is written to a folder beside the target, which
gets its name when it is whole. :class:`Exported` reads it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paralm_data.atomic import sync_folder, write_file
from pydantic import ValidationError

from paralm.config import Config
from paralm.errors import CheckpointError, ConfigError, RunError
from paralm.training import checkpoint as ckpt
from paralm.training.fragments import MASTER
from paralm.training.tensor_file import TensorFile, TensorFileWriter, TensorSpec

FORMAT = "paralm export 1"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.model"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_PIECE = 1 << 20  # elements read, converted and written at a time
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export` has written."""

    path: Path
    step: int
    parameters: int
    shards: list[str]
    nbytes: int  # of the shards


def parse_size(text: str) -> int:
    """``5GB``, ``500 MiB`` or a number of bytes. Raises ConfigError, one line."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", text.upper())
    size = int(float(match[1]) * _UNITS.get(match[2] or "", 1)) if match and match[2] != "IB" else 0
    if match and match[2] == "B":
        size = int(float(match[1]))
    if size < 1:
        raise ConfigError(f"shard size {text!r}: give a size such as 5GB, 500MB or 2GiB")
    return size


def plan_shards(specs: Iterable[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Tensors in their order, so many to a shard that it stays within the size; a larger tensor has one of its own."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def export(
    run: str | Path,
    to: str | Path,
    *,
    max_shard_size: int = 5 * 10**9,
    dtype: str | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> ExportResult:
    """Write the model of ``RUN`` (its newest whole checkpoint) or ``RUN@STEP`` to the folder ``to``.

    ``max_shard_size``: bytes. ``dtype``: "bf16" or "fp32"; default: the run's precision. ``force``: replace an
    export that is there. ``on_progress``: called with bytes written and bytes in all. Raises UserError, one line: no
    such run or step, a damaged checkpoint, a target that is in use or cannot be written.
    """
    from paralm.training.load import open_run_model

    target = Path(to)
    _check_target(target, force)
    source = open_run_model(run, None, warn)
    chosen = dtype or source.config.training.precision
    if chosen not in DTYPES:
        raise ConfigError(f"dtype {chosen!r}: give one of {', '.join(DTYPES)}")
    specs = [TensorSpec(name, DTYPES[chosen], shape) for name, shape in source.shapes.items()]
    shards = plan_shards(specs, max_shard_size)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    total = sum(spec.nbytes for spec in specs)
    temporary = target.parent / f".{target.name}.writing-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files: dict[str, dict[str, Any]] = {}
        done = 0
        for name, shard in zip(names, shards, strict=True):
            with TensorFileWriter(temporary / name, shard, {"format": "pt"}) as writer:
                for spec in shard:
                    count = torch.Size(spec.shape).numel()
                    for low in range(0, count, _PIECE):
                        part = source.checkpoint.read(MASTER, spec.key, low, min(_PIECE, count - low))
                        writer.append(part.to(spec.dtype))
                        done += part.numel() * spec.dtype.itemsize
                        if on_progress is not None:
                            on_progress(done, total)
                digest = writer.finish()
            files[name] = {"bytes": writer.size, "sha256": digest}
        where = {spec.key: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(temporary / INDEX, json.dumps(index, indent=1).encode())
        write_file(temporary / TOKENIZER, source.tokenizer_file.read_bytes())
        for name in (INDEX, TOKENIZER):
            path = temporary / name
            files[name] = {"bytes": path.stat().st_size, "sha256": ckpt.sha256_file(path)}
        content = _describe(source.config, source.checkpoint, chosen)
        write_file(temporary / CONFIG, ckpt.seal({**content, "files": files}).encode())
        sync_folder(temporary)
        _install(temporary, target)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parameters = sum(torch.Size(spec.shape).numel() for spec in specs)
    return ExportResult(target, source.checkpoint.step, parameters, names, sum(files[n]["bytes"] for n in names))


def _describe(config: Config, checkpoint: ckpt.Checkpoint, dtype: str) -> dict[str, Any]:
    """What an export says of the model besides its files; no path of the machine it was made on but user modules'."""
    manifest = checkpoint.manifest
    return {
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


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise RunError(f"{target}: a file is there; give a folder")
    if not any(target.iterdir()):
        return
    if not is_export(target):
        raise RunError(f"{target}: not empty, and not an export of paralm; give another folder")
    if not force:
        raise RunError(f"{target}: an export is there already; --force replaces it")


def _install(temporary: Path, target: Path) -> None:
    """Give the new folder its name; the old one is there until that is done."""
    old = target.parent / f".{target.name}.replaced-{os.getpid()}"
    replaced = target.exists()
    if replaced:
        target.replace(old)
    try:
        temporary.replace(target)
    except OSError:
        if replaced:
            with contextlib.suppress(OSError):
                old.replace(target)
        raise
    sync_folder(target.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


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
                {key: self.content[key] for key in ("model", "imports", "run", "training")}
            )
        except (ValidationError, KeyError) as error:
            raise CheckpointError(f"{path / CONFIG}: {str(error).splitlines()[0]}") from None
        self.step: int = self.content["step"]

    def verify(self) -> Exported:
        """Raise CheckpointError, one line, for a file that is missing or not as it was written."""
        for name, entry in self.content["files"].items():
            found = ckpt.file_damage(self.path / name, entry["bytes"], entry["sha256"])
            if found:
                raise CheckpointError(f"damaged export: {found.replace('the manifest', CONFIG)}")
        return self

    @torch.no_grad()
    def fill(self, model: torch.nn.Module) -> None:
        """Copy the weights into a model. Raises CheckpointError, one line, when it is another's."""
        index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {name: TensorFile(self.path / name) for name in set(index.values())}
        for name, parameter in model.named_parameters():
            spec = files[index[name]].specs[name] if name in index else None
            if spec is None or spec.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{self.path}: parameter {name} is {spec.shape if spec else 'absent'} there, "
                    f"{tuple(parameter.shape)} in the model of {CONFIG}"
                )
            low, flat = 0, parameter.view(-1)
            for part in files[index[name]].pieces(name):
                flat[low : low + part.numel()].copy_(part)
                low += part.numel()
