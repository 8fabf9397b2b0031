"""From a run to a folder that transformers loads (``paralm export --format transformers``), and from such a folder to
one that ``paralm.load`` takes (``paralm import``). Weights stream from file to file, by pieces.

A tokenizer travels only as a sentencepiece model: ours is copied beside what is exported, with its special ids in
config.json; a ``tokenizer.model`` beside what is imported is taken, and without one the model takes token ids only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paralm_data import DataError, Tokenizer
from paralm_data.atomic import write_file

from paralm.errors import ConfigError
from paralm.export import FORMAT, TOKENIZER, ExportResult, is_export, write_export
from paralm.interop.transformers import TransformersFolder, write_transformers
from paralm.models import build_model
from paralm.training.fragments import MASTER
from paralm.training.load import open_run_model
from paralm.weight_files import OnProgress, check_target, chosen_dtype

Warn = Callable[[str], None]


def _silent(message: str) -> None:
    pass


def export_transformers(
    run: str | Path,
    to: str | Path,
    *,
    max_shard_size: int = 5 * 10**9,
    dtype: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    warn: Warn = _silent,
) -> ExportResult:
    """As :func:`paralm.export.export`, in the files and names that transformers' ``from_pretrained`` takes.

    Raises UserError, one line; a ConfigError for a model that transformers does not have.
    """
    source = open_run_model(run, None, warn)
    chosen = dtype or source.config.training.precision
    model = build_model(source.config.model, source.tokenizer.vocab_size, seed=0, device="meta")
    assert source.shapes  # which also says that the checkpoint is of this model
    tokenizer = source.tokenizer
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    with source.checkpoint.kept_open():
        written = write_transformers(
            Path(to),
            model,
            lambda name, low, count: source.checkpoint.read(MASTER, name, low, count),
            chosen_dtype(chosen),
            max_shard_size=max_shard_size,
            special_tokens=tokens,
            force=force,
            on_progress=on_progress,
            finish=lambda folder: write_file(folder / TOKENIZER, tokenizer.proto),
        )
    warn(f"{TOKENIZER} is a sentencepiece model; transformers' AutoTokenizer does not find it by itself")
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    return ExportResult(Path(to), source.checkpoint.step, parameters, written.shards, written.nbytes)


def import_transformers(
    folder: str | Path,
    to: str | Path,
    *,
    tokenizer: str | Path | None = None,
    max_shard_size: int = 5 * 10**9,
    dtype: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    warn: Warn = _silent,
) -> ExportResult:
    """Make a folder as ``paralm export`` makes it of one as transformers writes it; transformers is not needed.

    ``tokenizer``: a sentencepiece model; default: the folder's ``tokenizer.model``, or none, of which ``warn`` is
    told. ``dtype``: "bf16" or "fp32"; default: the file's (fp32 for float16). ``max_shard_size``: bytes. ``force``:
    replace an export that is there. Raises UserError, one line; see :class:`TransformersFolder`.
    """
    target = Path(to)
    check_target(target, force, is_export, "an export of paralm")
    source = TransformersFolder(folder)
    chosen = dtype or ("bf16" if source.dtype == torch.bfloat16 else "fp32")
    chosen_dtype(chosen)
    found = _tokenizer(source, tokenizer, warn)
    content: dict[str, Any] = {
        "format": FORMAT,
        "model": source.config.model_dump(mode="json"),
        "vocab_size": found.vocab_size if found is not None else source.vocab_size,
        "dtype": chosen,
        "imports": [],
        "run": {"name": re.sub(r"[^A-Za-z0-9._-]+|^[._-]+", "", source.path.resolve().name) or "imported", "seed": 0},
        "training": {"precision": chosen},
        "step": 0,
        "tokens": 0,
        "source": {"format": "transformers", "model_type": source.model_type},
        "checkpoint_sha256": None,
        "tokenizer_sha256": found.sha256 if found is not None else None,
    }
    proto = found.proto if found is not None else None
    return write_export(target, source.shapes, source.read, content, proto, max_shard_size, on_progress)


def _tokenizer(source: TransformersFolder, given: str | Path | None, warn: Warn) -> Tokenizer | None:
    """The tokenizer that goes with the model; one that was given must do, one that lies there may."""
    path = source.path / TOKENIZER if given is None else Path(given)
    advice = "text needs one: --tokenizer FILE, a sentencepiece model"
    if given is None and not path.is_file():
        warn(f"{source.path}: no {TOKENIZER} came along, so the model takes token ids only; {advice}")
        return None
    try:
        tokenizer = Tokenizer.load(path)
    except DataError as error:
        if given is not None:
            raise
        warn(f"{error}; so the model takes token ids only; {advice}")
        return None
    if tokenizer.vocab_size > source.vocab_size:
        raise ConfigError(
            f"{path}: {tokenizer.vocab_size} pieces, and the model has {source.vocab_size} tokens; they do not belong "
            "together"
        )
    return tokenizer
