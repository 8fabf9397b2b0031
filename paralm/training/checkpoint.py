"""Checkpoints: fragments in safetensors, one file a rank, and a manifest that makes them a checkpoint.

    checkpoints/latest                         the name of the newest folder
    checkpoints/step_00001000/rank_00000.safetensors
    checkpoints/step_00001000/manifest.json    written last, by rename: without it the folder is no checkpoint
    checkpoints/step_00001000/passed_over      the run went on from an earlier one (:func:`pass_over`)
    checkpoints/.step_00001000.writing-…       one that is being written, or was when an attempt ended: ignored

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
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from paralm_data.atomic import sync_folder, write_file

from paralm.errors import CheckpointError
from paralm.training.fragments import MASTER
from paralm.training.tensor_file import TensorFile, TensorFileWriter, TensorSpec, by_alignment, sha256_file

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
PASSED_OVER = "passed_over"
_KEPT = 512  # files open at once; a process may have 1,024 on most systems


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, flush to the disk, rename: readers see the old text or the new, whole."""
    write_file(path, text.encode())


# A line of its own; other lines begin otherwise, for those of a nested object are indented by more or by nothing.
_SEAL = re.compile(r',\n "sha256": "([0-9a-f]{64})"(?=[,\n}])')


def seal(content: dict[str, Any]) -> str:
    """JSON text that carries a SHA-256 of the rest of itself, for :func:`read_sealed`. ``content`` is not empty."""
    # Without an indent, which Python's slow encoder writes; manifests of many ranks have a million numbers.
    text = json.dumps(content, sort_keys=True, separators=(",\n", ": "))
    return f'{text[:-1]},\n "sha256": "{_sha256(text)}"}}'


def read_sealed(path: Path, form: int | str) -> dict[str, Any]:
    """What :func:`seal` made of a dictionary whose ``format`` is ``form``.

    Raises CheckpointError, one line that names the file, for every byte that is not as it was written;
    FileNotFoundError.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or content.get("format") != form:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(f"{path}: format {found!r}, this version of paralm reads {form}")
    # Of the text: a flipped blank changes no value, but it is a damaged disk all the same.
    found = _SEAL.search(text)
    if found is None or _sha256(text[: found.start()] + text[found.end() :]) != found[1]:
        raise CheckpointError(f"{path}: its SHA-256 does not match; the file is damaged")
    return content


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
    """Write one rank's file in one pass: streamed, hashed, put on the disk, renamed.

    ``fragments``: (kind, parameter, offset, 1-D tensor), iterated twice: for the header, which has every size, and
    for the data, so that a tensor need not outlive its turn. ``own``: what belongs to the rank alone. Raises OSError
    when the storage refuses; what was written so far is not a checkpoint.
    """
    listed: list[tuple[str, str, int, int]] = []
    middle: list[TensorSpec] = []
    for kind, name, offset, tensor in fragments:
        listed.append((kind, name, offset, tensor.numel()))
        middle.append(TensorSpec(f"{kind}|{name}|{offset}", tensor.dtype, (tensor.numel(),)))
    others = by_alignment(TensorSpec(f"rank|{key}", value.dtype, tuple(value.shape)) for key, value in own.items())
    # The fragments are in fp32: after wider elements and before narrower ones they are aligned.
    first = [spec for spec in others if spec.dtype.itemsize > 4]
    last = others[len(first) :]
    directory.mkdir(parents=True, exist_ok=True)
    with TensorFileWriter(directory / rank_file(rank), [*first, *middle, *last]) as writer:
        for spec in first:
            writer.append(own[spec.key.removeprefix("rank|")])
        for _, _, _, tensor in fragments:
            writer.append(tensor)
        for spec in last:
            writer.append(own[spec.key.removeprefix("rank|")])
        digest = writer.finish()
    return RankFile(rank_file(rank), writer.size, digest, listed)


def write_manifest(directory: Path, files: list[RankFile], meta: dict[str, Any]) -> None:
    """Make the folder a checkpoint. ``meta`` must be JSON and hold ``step`` and ``parameters``. Raises OSError."""
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
    sync_folder(directory)
    write_atomically(directory / MANIFEST, seal(manifest))


def writing_folder(checkpoints: Path, step: int, attempt: int, count: int) -> Path:
    """Where a checkpoint is written before it has its name; no two writes ever share one."""
    return checkpoints / f".{step_name(step)}.writing-{attempt:06d}-{count:06d}"


def install(folder: Path, checkpoints: Path, step: int) -> str | None:
    """Give a whole checkpoint its name, then let ``latest`` name it; returns what :func:`name_latest` does. Raises
    OSError where there is no checkpoint of that name then."""
    final = checkpoints / step_name(step)
    if final.exists():
        remove(final)  # of an earlier course of this run, found damaged when it was resumed
    folder.replace(final)
    sync_folder(checkpoints)
    return name_latest(checkpoints, step)


def name_latest(checkpoints: Path, step: int) -> str | None:
    """Let ``latest`` name a checkpoint; returns why the storage refuses, or None."""
    try:
        write_atomically(checkpoints / LATEST, step_name(step) + "\n")
    except OSError as error:
        return f"{checkpoints / LATEST}: {error.strerror or error}"
    return None


def file_damage(path: Path, size: int, sha256: str) -> str | None:
    """How a file differs from what was recorded of it, or None."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path}: {found} bytes, the manifest says {size}"
        if sha256_file(path) != sha256:
            return f"{path}: its SHA-256 does not match the manifest"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


class Checkpoint:
    """One checkpoint, read by slices: any part of any parameter, whatever grid wrote it."""

    def __init__(self, directory: Path) -> None:
        """Read the manifest and check it; :meth:`verify` checks the files' contents.

        Raises CheckpointError, one line, naming the file.
        """
        self.directory = directory
        path = directory / MANIFEST
        try:
            self.manifest = read_sealed(path, FORMAT)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing, so {directory.name} is no (whole) checkpoint") from None
        self.step: int = self.manifest["step"]
        self._open: dict[int, TensorFile] = {}
        self._kept: OrderedDict[int, FileIO] | None = None

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Within it the files that were read last stay open: at ZeRO-3 every file has a piece of every parameter."""
        kept: OrderedDict[int, FileIO] = OrderedDict()
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None
            for file in kept.values():
                file.close()

    @property
    def world_size(self) -> int:
        return len(self.manifest["files"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape."""
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["parameters"].items()}

    def optimizer_kinds(self, name: str) -> list[str]:
        """The elementwise optimizer states there are of a parameter."""
        keys = (key.rpartition("|") for key in self.manifest["fragments"])
        return [kind for kind, _, parameter in keys if parameter == name and kind != MASTER]

    def damage(self, share: int = 0, shares: int = 1) -> str | None:
        """The first damage found, or None. ``share`` of ``shares`` splits the files over ranks."""
        for index, file in enumerate(self.manifest["files"]):
            if index % shares != share:
                continue
            found = file_damage(self.directory / file["name"], file["bytes"], file["sha256"])
            if found:
                return found
        return self._uncovered()

    def verify(self, find_damage: Callable[[Checkpoint], str | None] | None = None) -> Checkpoint:
        """Raise CheckpointError when a file is missing, truncated or altered, or a parameter is not whole.

        ``find_damage``: default :meth:`damage`; the ranks of a group share the work.
        """
        found = (find_damage or Checkpoint.damage)(self)
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

    def _file(self, index: int) -> TensorFile:
        if index not in self._open:
            path = self.directory / self.manifest["files"][index]["name"]
            try:
                self._open[index] = TensorFile(path)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        return self._open[index]

    def _read(self, index: int, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        file = self._file(index)
        try:
            return file.read(key, start, stop, self._opened(index))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file.path}: cannot be read: {str(error).splitlines()[0]}") from None

    def _opened(self, index: int) -> FileIO | None:
        if self._kept is None:
            return None
        if index not in self._kept:
            self._kept[index] = self._file(index).open()
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)[1].close()
        self._kept.move_to_end(index)
        return self._kept[index]

    def read(self, kind: str, name: str, offset: int, numel: int) -> torch.Tensor:
        """Elements ``[offset, offset + numel)`` of the flattened parameter, 1-D, in the dtype written.

        Raises CheckpointError, one line.
        """
        pieces, want = [], offset
        for start, length, index in self.manifest["fragments"].get(f"{kind}|{name}", []):
            low, high = max(want, start), min(offset + numel, start + length)
            if low >= high:
                continue
            pieces.append(self._read(index, f"{kind}|{name}|{start}", low - start, high - start))
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
        found = [spec for key, spec in file.specs.items() if key.startswith(head)]
        return {spec.key.removeprefix(head): self._read(rank, spec.key).view(spec.shape) for spec in found}


def steps(checkpoints: Path) -> list[int]:
    """Steps that have a manifest, ascending, and those whose folder cannot be looked at: reading says what they are.

    Raises CheckpointError, one line, when ``checkpoints`` itself cannot be.
    """
    found = []
    try:
        names = [entry.name for entry in checkpoints.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{checkpoints}: cannot be read: {error.strerror or error}") from None
    for name in names:
        number = name.removeprefix("step_")
        if number == name or not number.isdecimal():
            continue
        with contextlib.suppress(OSError):  # a file handle that another node has made stale, say
            if not (checkpoints / name / MANIFEST).exists():
                continue
        found.append(int(number))
    return sorted(found)


def has_steps(checkpoints: Path) -> bool:
    """Whether there are :func:`steps`, from the first that is found: every rank asks, of hundreds that were kept."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(checkpoints) as found:
        named = (entry.path for entry in found if entry.name[:5] == "step_" and entry.name[5:].isdigit())
        return any(os.path.exists(f"{path}/{MANIFEST}") for path in named)
    return False


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
    CheckpointError: starting afresh over a run's remains is the user's decision. What :func:`pass_over` has marked
    comes after all others.
    """
    there = steps(checkpoints)
    there.sort(key=lambda step: not os.path.exists(checkpoints / step_name(step) / PASSED_OVER))
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


def pass_over(checkpoints: Path, step: int) -> None:
    """Mark what lies beyond ``step``, from which the run goes on: could it be read again one day, the run would leap
    to it, and its metrics, which are cut at ``step``, would lack what lies between."""
    for later in steps(checkpoints):
        if later > step:
            with contextlib.suppress(OSError):  # storage that refuses to be read may refuse this, too
                (checkpoints / step_name(later) / PASSED_OVER).touch()


def remove(directory: Path) -> str | None:
    """Remove a checkpoint so that no reader ever sees half of it: the manifest goes first. Returns why the storage
    refuses, or None."""
    try:
        (directory / MANIFEST).unlink(missing_ok=True)
    except NotADirectoryError:
        return None
    except OSError as error:  # storage that refuses a removal refuses nothing that matters
        return f"{directory / MANIFEST}: {error.strerror or error}"
    shutil.rmtree(directory, ignore_errors=True)
    return f"{directory}: what is in it stays" if os.path.lexists(directory) else None


def apply_retention(
    checkpoints: Path,
    keep_last: int,
    keep_every: int,
    step: int,
    passed_over: Collection[int] = (),
    refused: Callable[[int, str], object] = lambda step, why: None,
) -> list[int]:
    """Of the checkpoints up to ``step``, remove all but the newest ``keep_last`` and multiples of ``keep_every``.

    Later ones, and those in ``passed_over``, are what an earlier course of the run left, damaged perhaps; they never
    count against the good ones, and go when the run has come as far. ``refused``: told of each that the storage does
    not remove, and why. Returns the removed steps.
    """
    there = [s for s in steps(checkpoints) if s <= step]
    good = [s for s in there if s not in passed_over]
    kept = set(good[-keep_last:]) | {s for s in good if keep_every and s % keep_every == 0}
    failed = {s: remove(checkpoints / step_name(s)) for s in there if s not in kept}
    for old, why in failed.items():
        if why is not None:
            refused(old, why)
    return [old for old, why in failed.items() if why is None]


def remove_unfinished(checkpoints: Path, but: Path | None = None) -> None:
    """Remove what writes left that did not finish: their folders, and folders that lack a manifest.

    ``but``: the folder that is being written. Never while another write is going on that is to succeed.
    """
    for directory in [*checkpoints.glob(".step_*"), *checkpoints.glob("step_*")]:
        with contextlib.suppress(OSError):  # one that cannot be looked at is no reason to leave the others
            if directory.is_dir() and directory != but:
                hidden = directory.name.startswith(".")
                if hidden or not (directory / MANIFEST).exists():
                    shutil.rmtree(directory, ignore_errors=True)
