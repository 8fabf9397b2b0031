"""The tokenizer of a prepared folder: whether it is there and made from the same spec, trained on a sample, written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paralm_data.atomic import write_file
from paralm_data.errors import DataError
from paralm_data.progress import Meter, Progress
from paralm_data.specs import TokenizerSpec, differences
from paralm_data.tokenizer import INFO_NAME, Tokenizer, read_info
from paralm_data.tokenizer_training import Sample, train_model

MODEL_NAME = "tokenizer.model"
ADVICE = "give another data.dir, or remove this one to prepare it anew"


def check_same(recorded: Any, wanted: Mapping[str, Any], path: Path) -> None:
    """DataError, with both values, if what is at ``path`` was made from something else."""
    changed = differences(recorded if isinstance(recorded, dict) else {}, dict(wanted))
    if changed:
        raise DataError(f"{path}: made from something else ({'; '.join(changed)}); {ADVICE}")


def has_tokenizer(out: Path, spec: Mapping[str, Any]) -> bool:
    """Whether the folder has its tokenizer. DataError if that was made from another spec, or nothing says from which.

    ``spec``: what :func:`write_tokenizer` records.
    """
    model = out / MODEL_NAME
    if not model.exists():
        return False
    info = read_info(out / INFO_NAME)  # it is there first
    if "spec" not in info:
        raise DataError(f"{out / INFO_NAME}: missing or not whole beside {MODEL_NAME}; {ADVICE}")
    check_same(info["spec"], spec, model)
    return True


def train_on(
    sample: Sample, spec: TokenizerSpec, progress: Callable[[Progress], None] | None
) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer of a sample, and what there is to record of that."""
    meter = Meter("training the tokenizer", progress)
    proto = train_model(sample.texts(), spec.vocab_size, spec.kind)
    meter.add(0, sample.n_bytes)
    meter.done()
    return Tokenizer(proto, MODEL_NAME), {"sampled_bytes": sample.n_bytes}


def write_tokenizer(out: Path, model: Tokenizer, spec: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Write the model and what describes it: ``spec``, what it was made from, and ``more``."""
    ids = {"unk": model.unk_id, "bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id}
    info = {
        "sha256": model.sha256, "vocab_size": model.vocab_size, "ids": ids, "lossless": model.lossless,
        "spec": spec, **more,
    }  # fmt: skip
    # The model last: where it is, what describes it is too.
    write_file(out / INFO_NAME, (json.dumps(info, indent=2) + "\n").encode("utf-8"))
    write_file(out / MODEL_NAME, model.proto)
