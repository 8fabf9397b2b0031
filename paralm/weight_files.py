"""Weights as safetensors in shards, in a folder that is there whole or not at all: what every export shares.

    model-00001-of-00003.safetensors …   each tensor once, in the order given
    model.safetensors.index.json         which tensor is in which file, as other programs read it

Tensors are read by pieces and appended to the shard in hand, so memory holds a piece, not a tensor and not a shard.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paralm_data.atomic import sync_folder, write_file

from paralm.errors import ConfigError, RunError
from paralm.training.tensor_file import TensorFileWriter, TensorSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

PIECE = 1 << 20
"""Elements read, converted and written at a time."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Read = Callable[[str, int, int], torch.Tensor]
"""(key, offset, count) → that many elements of a tensor, flattened."""
OnProgress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True)
class WeightFiles:
    """What :func:`write_weights` has written."""

    shards: list[str]
    files: dict[str, dict[str, Any]]  # name → its "bytes" and "sha256", shards only

    @property
    def nbytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())


def parse_size(text: str) -> int:
    """``5GB``, ``500 MiB`` or a number of bytes. Raises ConfigError, one line."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", text.upper())
    size = int(float(match[1]) * _UNITS.get(match[2] or "", 1)) if match and match[2] != "IB" else 0
    if match and match[2] == "B":
        size = int(float(match[1]))
    if size < 1:
        raise ConfigError(f"shard size {text!r}: give a size such as 5GB, 500MB or 2GiB")
    return size


def chosen_dtype(name: str) -> torch.dtype:
    """``bf16`` or ``fp32``. Raises ConfigError, one line."""
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: give one of {', '.join(DTYPES)}")
    return DTYPES[name]


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


def write_weights(
    folder: Path,
    specs: Iterable[TensorSpec],
    read: Read,
    max_shard_size: int,
    on_progress: OnProgress | None = None,
    *,
    plain_single: bool = False,
) -> WeightFiles:
    """Write the shards and their index into a folder; each element is converted to its spec's dtype once.

    ``plain_single``: one shard is named as transformers names it, ``model.safetensors``, and has no index. Raises
    OSError.
    """
    shards = plan_shards(specs, max_shard_size)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if plain_single and len(shards) == 1:
        names = [SINGLE]
    done, total = 0, sum(spec.nbytes for shard in shards for spec in shard)
    files: dict[str, dict[str, Any]] = {}
    for name, shard in zip(names, shards, strict=True):
        with TensorFileWriter(folder / name, shard, {"format": "pt"}) as writer:
            for spec in shard:
                count = torch.Size(spec.shape).numel()
                for low in range(0, count, PIECE):
                    part = read(spec.key, low, min(PIECE, count - low))
                    writer.append(part.to(spec.dtype))
                    done += part.numel() * spec.dtype.itemsize
                    if on_progress is not None:
                        on_progress(done, total)
            digest = writer.finish()
        files[name] = {"bytes": writer.size, "sha256": digest}
    if names != [SINGLE]:
        where = {spec.key: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(folder / INDEX, json.dumps(index, indent=1).encode())
    return WeightFiles(names, files)


def check_target(target: Path, force: bool, is_ours: Callable[[Path], bool], what: str) -> None:
    """Refuse, one line (RunError), a target that is in use. ``is_ours``: whether a folder may be replaced by --force;
    ``what``: such a folder, in words."""
    if not target.exists():
        return
    if not target.is_dir():
        raise RunError(f"{target}: a file is there; give a folder")
    if not any(target.iterdir()):
        return
    if not is_ours(target):
        raise RunError(f"{target}: not empty, and not {what}; give another folder")
    if not force:
        raise RunError(f"{target}: {what} is there already; --force replaces it")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target to write into; it gets the target's name when the block ends, and is removed when the
    block raises. An OSError becomes a RunError, one line."""
    temporary = target.parent / f".{target.name}.writing-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        _install(temporary, target)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
