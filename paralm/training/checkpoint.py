"""Checkpoints: fragments in safetensors, one file a rank, and a manifest that makes them a checkpoint.

    checkpoints/latest                         the name of the newest folder
    checkpoints/step_00001000/rank_00000.safetensors
    checkpoints/step_00001000/manifest.json    written last, by rename: without it the folder is no checkpoint

A tensor's key is ``kind|parameter|offset``: ``master`` (fp32 weights) or the name of an optimizer state, and
where its elements lie in the flattened parameter. ``rank|…`` holds what belongs to a rank (RNG, carried
states). The manifest lists every fragment, every file's size and SHA-256, and carries a SHA-256 of itself, so
any truncation and any flipped bit is found before training starts. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paralm_data.atomic import sync_folder, write_file
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paralm.errors import CheckpointError
from paralm.training.fragments import MASTER

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, flush to the disk, rename: readers see the old text or the new, whole."""
    write_file(path, text.encode())


def _dump(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True)


def _digest(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(_dump(body).encode()).hexdigest()


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class RankFile:
    """What one rank wrote: its file, and the fragments in it as (kind, name, offset, numel)."""

    name: str
    size: int
    sha256: str
    fragments: list[tuple[str, str, int, int]]


def write_rank_file(
    directory: Path,
    rank: int,
    fragments: Iterable[tuple[str, str, int, torch.Tensor]],
    own: dict[str, torch.Tensor],
) -> RankFile:
    """Write one rank's file.

    ``fragments``: (kind, parameter, offset, 1-D tensor); ``own``: what belongs to the rank alone. Raises
    OSError when the storage refuses; what was written so far is not a checkpoint.
    """
    tensors: dict[str, torch.Tensor] = {f"rank|{key}": value.detach().cpu().contiguous() for key, value in own.items()}
    listed = []
    for kind, name, offset, tensor in fragments:
        tensors[f"{kind}|{name}|{offset}"] = tensor.detach().to("cpu", copy=True).contiguous()
        listed.append((kind, name, offset, tensor.numel()))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / rank_file(rank)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{temporary}: {error}") from error
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    digest, size = sha256_file(temporary), temporary.stat().st_size
    temporary.replace(path)
    return RankFile(path.name, size, digest, listed)


def write_manifest(directory: Path, files: list[RankFile], meta: dict[str, Any]) -> None:
    """Make the folder a checkpoint. ``meta`` must be JSON and hold ``step`` and ``parameters``."""
    fragments: dict[str, list[list[Any]]] = {}
    for index, file in enumerate(files):
        for kind, name, offset, numel in file.fragments:
            fragments.setdefault(f"{kind}|{name}", []).append([offset, numel, index])
    manifest = {
        "format": FORMAT,
        **meta,
        "files": [{"name": f.name, "bytes": f.size, "sha256": f.sha256} for f in files],
        "fragments": {key: sorted(value) for key, value in sorted(fragments.items())},
    }
    manifest["sha256"] = _digest(manifest)
    sync_folder(directory)
    write_atomically(directory / MANIFEST, _dump(manifest))
    write_atomically(directory.parent / LATEST, directory.name + "\n")


class Checkpoint:
    """One checkpoint, read by slices: any part of any parameter, whatever grid wrote it."""

    def __init__(self, directory: Path) -> None:
        """Read the manifest and check it; :meth:`verify` checks the files' contents.

        Raises CheckpointError, one line, naming the file.
        """
        self.directory = directory
        path = directory / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            self.manifest: dict[str, Any] = json.loads(text)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing, so {directory.name} is no (whole) checkpoint") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            found = self.manifest.get("format") if isinstance(self.manifest, dict) else None
            raise CheckpointError(f"{path}: format {found!r}, this version of paralm reads {FORMAT}")
        # Compared as text too: a flipped blank changes no value, but it is a damaged disk all the same.
        if self.manifest.get("sha256") != _digest(self.manifest) or text != _dump(self.manifest):
            raise CheckpointError(f"{path}: its SHA-256 does not match; the manifest is damaged")
        self.step: int = self.manifest["step"]
        self._open: dict[int, Any] = {}

    @property
    def world_size(self) -> int:
        return len(self.manifest["files"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape."""
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["parameters"].items()}

    def damage(self, share: int = 0, shares: int = 1) -> str | None:
        """The first damage found, or None. ``share`` of ``shares`` splits the files over ranks."""
        for index, file in enumerate(self.manifest["files"]):
            if index % shares != share:
                continue
            path = self.directory / file["name"]
            try:
                size = path.stat().st_size
                if size != file["bytes"]:
                    return f"{path}: {size} bytes, the manifest says {file['bytes']}"
                if sha256_file(path) != file["sha256"]:
                    return f"{path}: its SHA-256 does not match the manifest"
            except OSError as error:
                return f"{path}: {error.strerror or error}"
        return self._uncovered()

    def verify(self) -> Checkpoint:
        """Raise CheckpointError when a file is missing, truncated or altered, or a parameter is not whole."""
        found = self.damage()
        if found:
            raise CheckpointError(f"damaged checkpoint: {found}")
        return self

    def _uncovered(self) -> str | None:
        for name, shape in self.shapes.items():
            end = 0
            for offset, numel, _ in self.manifest["fragments"].get(f"{MASTER}|{name}", []):
                if offset != end:
                    break
                end += numel
            if end != torch.Size(shape).numel():
                return f"{self.directory / MANIFEST}: fragments of {name} end at element {end} of {list(shape)}"
        return None

    def _file(self, index: int) -> Any:
        if index not in self._open:
            path = self.directory / self.manifest["files"][index]["name"]
            try:
                self._open[index] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        return self._open[index]

    def read(self, kind: str, name: str, offset: int, numel: int) -> torch.Tensor:
        """Elements ``[offset, offset + numel)`` of the flattened parameter, 1-D, in the dtype written."""
        pieces, want = [], offset
        for start, length, index in self.manifest["fragments"].get(f"{kind}|{name}", []):
            low, high = max(want, start), min(offset + numel, start + length)
            if low >= high:
                continue
            part = self._file(index).get_slice(f"{kind}|{name}|{start}")
            pieces.append(part[low - start : high - start])
            want = high
        if want != offset + numel:
            raise CheckpointError(f"{self.directory}: {kind} of {name} lacks elements {want} to {offset + numel}")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)

    def tensor(self, name: str, kind: str = MASTER) -> torch.Tensor:
        """A whole parameter (or optimizer state) in its shape."""
        shape = torch.Size(self.shapes[name])
        return self.read(kind, name, 0, shape.numel()).view(shape)

    def rank_tensors(self, rank: int, prefix: str) -> dict[str, torch.Tensor]:
        """What rank ``rank`` stored for itself under ``prefix/``."""
        file, head = self._file(rank), f"rank|{prefix}/"
        return {key.removeprefix(head): file.get_tensor(key) for key in file.keys() if key.startswith(head)}  # noqa: SIM118


def steps(checkpoints: Path) -> list[int]:
    """Steps that have a manifest, ascending."""
    found = [p.parent.name for p in checkpoints.glob(f"step_*/{MANIFEST}")]
    return sorted(int(name.removeprefix("step_")) for name in found if name.removeprefix("step_").isdigit())


def open_step(checkpoints: Path, step: int) -> Checkpoint:
    """A given step's checkpoint; CheckpointError names the steps there are."""
    there = steps(checkpoints)
    if step not in there:
        known = ", ".join(map(str, there)) if there else "none"
        raise CheckpointError(f"{checkpoints}: no checkpoint of step {step}; there are: {known}")
    return Checkpoint(checkpoints / step_name(step))


def newest_whole(
    checkpoints: Path,
    warn: Callable[[str], None],
    find_damage: Callable[[Checkpoint], str | None] = Checkpoint.damage,
) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None when there is none at all.

    A damaged one is passed over with a warning that says how it is damaged. If every one is damaged,
    CheckpointError: starting afresh over a run's remains is the user's decision.
    """
    there = steps(checkpoints)
    newest: str | None = None
    for step in reversed(there):
        try:
            candidate = Checkpoint(checkpoints / step_name(step))
            found = find_damage(candidate)
        except CheckpointError as error:
            found = str(error)
        if found is None:
            return candidate
        newest = newest or found
        if step != there[0]:
            warn(f"damaged checkpoint passed over: {found}")
    if there:
        raise CheckpointError(f"every checkpoint is damaged ({newest}); move {checkpoints} away to start afresh")
    if (checkpoints / LATEST).exists():
        raise CheckpointError(
            f"{checkpoints}: '{LATEST}' names a checkpoint, but no folder there has a {MANIFEST}; "
            f"restore it, or move {checkpoints} away to start afresh"
        )
    return None


def remove(directory: Path) -> None:
    """Remove a checkpoint so that no reader ever sees half of it: the manifest goes first."""
    with contextlib.suppress(OSError):  # storage that refuses a removal refuses nothing that matters
        (directory / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


def apply_retention(checkpoints: Path, keep_last: int, keep_every: int, step: int) -> list[int]:
    """Of the checkpoints up to ``step``, remove all but the newest ``keep_last`` and multiples of ``keep_every``.

    Later ones are what an earlier course of the run left, damaged perhaps; they never count against the good ones.
    Returns the removed steps.
    """
    there = [s for s in steps(checkpoints) if s <= step]
    kept = set(there[-keep_last:]) | {s for s in there if keep_every and s % keep_every == 0}
    removed = [s for s in there if s not in kept]
    for step in removed:
        remove(checkpoints / step_name(step))
    return removed


def remove_unfinished(checkpoints: Path) -> None:
    """Remove folders without a manifest: writes that an earlier attempt did not finish."""
    for directory in checkpoints.glob("step_*"):
        if directory.is_dir() and not (directory / MANIFEST).exists():
            shutil.rmtree(directory, ignore_errors=True)
