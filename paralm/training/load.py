"""A trained model out of a run folder, for evaluation, generation and export: weights only, no engine."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from paralm_data import Tokenizer

from paralm.config import Config
from paralm.errors import CheckpointError, RunError
from paralm.models import LanguageModel, build_model
from paralm.training.checkpoint import Checkpoint
from paralm.training.run_folder import RunFolder
from paralm.training.session import open_checkpoint, parse_run
from paralm.user_modules import load_modules


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on ``device`` and what belongs to it."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: Config
    step: int
    tokens: int  # trained on
    run_dir: Path
    data_dir: Path


def load_model(
    run: str | Path,
    step: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load ``RUN`` or ``RUN@STEP`` (default: the newest whole checkpoint) from its fragments.

    ``dtype``: of the weights; default: the run's precision. Raises RunError or CheckpointError, one line.
    """
    path, named = parse_run(run)
    folder = RunFolder(path)
    config = folder.saved_config()
    if config is None:
        raise RunError(f"{path}: no config.yaml, so this is not a run folder")
    load_modules(config.imports)
    # The run may have been moved since: what the folder holds is found relative to it.
    data_dir = config.data.dir if config.data.dir is not None else path / "data"
    source: Checkpoint = open_checkpoint(path, step if step is not None else named, warnings.warn)
    tokenizer = Tokenizer.load(data_dir / "tokenizer.model")
    if tokenizer.sha256 != source.manifest["tokenizer_sha256"]:
        raise RunError(f"{data_dir / 'tokenizer.model'}: not the tokenizer that {source.directory} was trained with")
    model = build_model(config.model, tokenizer.vocab_size, seed=config.run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if source.shapes.get(name) != tuple(parameter.shape):
                raise CheckpointError(
                    f"{source.directory}: parameter {name} is {source.shapes.get(name, 'absent')} there, "
                    f"{tuple(parameter.shape)} in the model of {folder.config_file}"
                )
            parameter.copy_(source.tensor(name))
    default = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device=where, dtype=dtype or default).eval()
    return LoadedModel(model, tokenizer, config, source.step, source.manifest["tokens"], path, data_dir)
