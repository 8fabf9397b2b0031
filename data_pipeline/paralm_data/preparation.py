"""From text to token stores: split, tokenizer, tokens, in one process and bounded memory, each part made once.

::

    out/tokenizer.model, tokenizer.json     the tokenizer, its SHA-256, special ids and what it was made from
    out/train/, out/held_out/               the source's two splits (by content hash)
    out/validation/NAME/                    further sources, whole

The source is read twice when a tokenizer is trained (once for its sample), else once. What is already there and was
made from the same specs is kept; what was made from others is refused. Every part appears by a rename, so an
interruption leaves whole parts only, and the same call again makes those that are missing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paralm_data import manifest as manifests
from paralm_data.atomic import write_file
from paralm_data.errors import DataError, reason
from paralm_data.progress import Meter, Progress
from paralm_data.sources import documents, shards
from paralm_data.specs import Document, SourceSpec, TokenizerSpec, differences
from paralm_data.split import Counts, Distinct, is_held_out
from paralm_data.store import TokenStore
from paralm_data.store_writer import TEMPORARY, StoreWriter
from paralm_data.tokenizer import INFO_NAME, Tokenizer, read_info
from paralm_data.tokenizer_training import Sample, train_model
from paralm_data.tokenizing import tokenize

MODEL_NAME = "tokenizer.model"
SPLITS = ("train", "held_out")
# What a file system without locks says; there, parts still appear whole, by rename.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
ADVICE = "give another data.dir, or remove this one to prepare it anew"


@dataclass(frozen=True)
class Prepared:
    """What is in the folder now. ``skipped``: everything was there already. ``counts``: of the source, if read."""

    path: Path
    tokenizer: Tokenizer
    train: TokenStore
    held_out: TokenStore
    validation: dict[str, TokenStore]
    skipped: bool
    counts: Counts | None = None


@dataclass
class _Plan:
    """The specs of a preparation and the folder they are for."""

    source: SourceSpec
    tokenizer: TokenizerSpec
    out: Path
    held_out_fraction: float
    validation: dict[str, SourceSpec]
    threads: int
    progress: Callable[[Progress], None] | None
    counts: Counts | None = None

    def store_path(self, name: str) -> Path:
        return self.out / name if name in SPLITS else self.out / "validation" / name

    def store_spec(self, name: str) -> dict[str, Any]:
        """What the manifest of a store records of where its text came from."""
        if name in SPLITS:
            return {
                "source": self.source.as_dict(), "held_out_fraction": self.held_out_fraction, "split": name
            }  # fmt: skip
        return {"source": self.validation[name].as_dict()}

    def tokenizer_spec(self) -> dict[str, Any]:
        """What ``tokenizer.json`` records of what the tokenizer was made from."""
        if self.tokenizer.model is not None:
            return {"model_sha256": Tokenizer.load(self.tokenizer.model).sha256}
        return {
            "kind": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            "sample_bytes": self.tokenizer.sample_bytes,
            "source": self.source.as_dict(),
            "held_out_fraction": self.held_out_fraction,
        }

    def names(self) -> list[str]:
        """Every store to make."""
        return [*SPLITS, *self.validation]

    def missing(self) -> list[str]:
        """Stores that are not there. DataError for one that was made from another spec, with both values."""
        absent = []
        for name in self.names():
            path = self.store_path(name)
            if path.exists():
                _same(manifests.read(path).source, self.store_spec(name), path)
            else:
                absent.append(name)
        return absent

    def has_tokenizer(self) -> bool:
        """Whether the tokenizer is there. DataError if it was made from another spec."""
        model, info = self.out / MODEL_NAME, read_info(self.out / INFO_NAME)
        if not model.exists():
            return False
        if "spec" not in info:
            raise DataError(f"{self.out / INFO_NAME}: missing or not whole beside {MODEL_NAME}; {ADVICE}")
        _same(info["spec"], self.tokenizer_spec(), model)
        return True


def prepare(
    source: SourceSpec,
    tokenizer: TokenizerSpec,
    out: str | Path,
    held_out_fraction: float = 0.02,
    validation: Mapping[str, SourceSpec] | None = None,
    progress: Callable[[Progress], None] | None = None,
    threads: int | None = None,
) -> Prepared:
    """Make the tokenizer and the stores below ``out``, as far as they are not there.

    ``threads``: of sentencepiece, default: the processors this process may use; the result does not depend on it.
    Raises DataError for input that cannot be used, a folder made from other specs, or an empty split; what is there
    already is then as it was.
    """
    plan = _plan(source, tokenizer, out, held_out_fraction, validation, progress, threads)
    skipped = not _work_left(plan)
    if not skipped:
        with _locked(plan.out):
            _remove_unfinished(plan)
            if not plan.has_tokenizer():
                _make_tokenizer(plan)
            model = Tokenizer.load(plan.out / MODEL_NAME)
            _make_splits(plan, model, [name for name in plan.missing() if name in SPLITS])
            for name in plan.missing():
                _make_validation(plan, model, name)
    model = Tokenizer.load(plan.out / MODEL_NAME)
    stores = {name: TokenStore.open(plan.store_path(name), verify="size") for name in plan.names()}
    for store in stores.values():
        store.check_tokenizer(model)
    train, held_out = stores.pop("train"), stores.pop("held_out")
    return Prepared(plan.out, model, train, held_out, stores, skipped, plan.counts)


def is_prepared(
    source: SourceSpec,
    tokenizer: TokenizerSpec,
    out: str | Path,
    held_out_fraction: float = 0.02,
    validation: Mapping[str, SourceSpec] | None = None,
) -> bool:
    """Whether :func:`prepare` would have nothing to do. DataError where it would refuse the folder."""
    plan = _plan(source, tokenizer, out, held_out_fraction, validation, None, None)
    return plan.has_tokenizer() and not plan.missing()


def _plan(
    source: SourceSpec,
    tokenizer: TokenizerSpec,
    out: str | Path,
    held_out_fraction: float,
    validation: Mapping[str, SourceSpec] | None,
    progress: Callable[[Progress], None] | None,
    threads: int | None,
) -> _Plan:
    if not 0 < held_out_fraction < 1:
        raise DataError(f"held_out_fraction is {held_out_fraction}; it must be between 0 and 1")
    for name in validation or {}:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in SPLITS:
            raise DataError(f"validation set '{name}': a name is letters, digits and ._- and neither of {SPLITS}")
    if Path(out).exists() and not Path(out).is_dir():
        raise DataError(f"{out}: a file is where the prepared folder (data.dir) would be")
    threads = threads or _processors()
    return _Plan(source, tokenizer, Path(out), held_out_fraction, dict(validation or {}), threads, progress)


def _processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _same(recorded: Any, wanted: dict[str, Any], path: Path) -> None:
    changed = differences(recorded if isinstance(recorded, dict) else {}, wanted)
    if changed:
        raise DataError(f"{path}: made from something else ({'; '.join(changed)}); {ADVICE}")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder: two preparations at once would do the work twice. Released by the system if we are killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("wb")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({reason(error)})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another process is preparing it; wait for that to end") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise DataError(f"{out / '.lock'}: cannot be locked ({reason(error)})") from error
        yield


def _work_left(plan: _Plan) -> bool:
    """Whether anything is missing. DataError, before a byte is written, for a folder or an input that will not do."""
    have_tokenizer, missing = plan.has_tokenizer(), plan.missing()
    if not have_tokenizer and len(missing) < len(plan.names()):
        raise DataError(f"{plan.out / MODEL_NAME}: missing, though stores beside it were made with it; {ADVICE}")
    if have_tokenizer:
        Tokenizer.load(plan.out / MODEL_NAME)
    else:
        plan.tokenizer_spec()
    if any(name in SPLITS for name in missing):
        shards(plan.source)
    for name in missing:
        if name not in SPLITS:
            shards(plan.validation[name])
    return bool(missing) or not have_tokenizer


def _remove_unfinished(plan: _Plan) -> None:
    for folder in (plan.out, plan.out / "validation"):
        for path in folder.glob(f".*{TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _make_tokenizer(plan: _Plan) -> None:
    spec = plan.tokenizer_spec()
    info: dict[str, Any] = {}
    if plan.tokenizer.model is not None:
        model = Tokenizer.load(plan.tokenizer.model)
    else:
        sample = Sample(plan.tokenizer.sample_bytes)
        meter, distinct = Meter("sampling", plan.progress), Distinct()
        for key, document in distinct(documents(plan.source)):
            if not is_held_out(key, plan.held_out_fraction):
                sample.add(key, document.text)
            meter.add(1, len(document.text.encode("utf-8")))
        meter.done()
        _check_splits(plan, distinct.counts)
        meter = Meter("training the tokenizer", plan.progress)
        proto = train_model(sample.texts(), plan.tokenizer.vocab_size, plan.tokenizer.kind)
        meter.add(0, sample.n_bytes)
        meter.done()
        model, info = Tokenizer(proto, MODEL_NAME), {"sampled_bytes": sample.n_bytes}
    ids = {"unk": model.unk_id, "bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id}
    info = {
        "sha256": model.sha256, "vocab_size": model.vocab_size, "ids": ids, "lossless": model.lossless,
        "spec": spec, **info,
    }  # fmt: skip
    # The model last: where it is, what describes it is too.
    write_file(plan.out / INFO_NAME, (json.dumps(info, indent=2) + "\n").encode("utf-8"))
    write_file(plan.out / MODEL_NAME, model.proto)


def _check_splits(plan: _Plan, counts: Counts) -> None:
    """DataError if a split would be empty, which the documents' hashes tell before anything is tokenized."""
    if not counts.kept:
        raise DataError(f"{_name(plan.source)}: no document with text among {counts.read}")
    if counts.least_position >= plan.held_out_fraction:
        advice = "give more, smaller documents (jsonl holds many in one file)"
        if counts.kept > 1 and counts.least_position < 0.5:
            enough = math.ceil(counts.least_position * 1000) / 1000
            advice = f"raise data.held_out_fraction (above {enough:g}) or {advice}"
        raise DataError(
            f"{_name(plan.source)}: the held-out split is empty: held_out_fraction {plan.held_out_fraction} of "
            f"{counts.kept} distinct documents holds none out; {advice}"
        )


def _name(spec: SourceSpec) -> str:
    return spec.dataset or ", ".join(spec.paths) or spec.kind


def _make_splits(plan: _Plan, model: Tokenizer, names: list[str]) -> None:
    if not names:
        return
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(StoreWriter(plan.store_path(name), model, plan.store_spec(name)))
            for name in names
        }
        meter, distinct = Meter("tokenizing", plan.progress), Distinct()

        def wanted() -> Iterator[tuple[StoreWriter | None, Document]]:
            for key, document in distinct(documents(plan.source)):
                yield writers.get(SPLITS[is_held_out(key, plan.held_out_fraction)]), document

        tokenize(wanted(), model, plan.threads, meter)
        plan.counts = distinct.counts
        _check_splits(plan, distinct.counts)
        for name, writer in writers.items():
            if not writer.n_documents:
                raise DataError(f"{_name(plan.source)}: the {name} split is empty; lower data.held_out_fraction")
        for writer in writers.values():
            writer.finish()
        meter.done()


def _make_validation(plan: _Plan, model: Tokenizer, name: str) -> None:
    spec = plan.validation[name]
    with StoreWriter(plan.store_path(name), model, plan.store_spec(name)) as writer:
        meter = Meter(f"tokenizing {name}", plan.progress)
        tokenize(((writer, d) for d in documents(spec) if d.text), model, plan.threads, meter)
        if not writer.n_documents:
            raise DataError(f"validation set '{name}' ({_name(spec)}): no document with text")
        writer.finish()
        meter.done()
