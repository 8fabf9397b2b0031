"""A trained model out of a run folder or an export, for evaluation and generation: weights only, no engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from paralm_data import Tokenizer

from paralm.config import Config
from paralm.errors import CheckpointError, RunError
from paralm.export import TOKENIZER, Exported, is_export
from paralm.models import LanguageModel, build_model
from paralm.synthetic import task_of
from paralm.training.checkpoint import Checkpoint
from paralm.training.rng import whole_float32
from paralm.training.run_folder import RunFolder
from paralm.training.session import open_checkpoint, parse_run
from paralm.user_modules import digests, edited, load_modules


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on ``device`` and what belongs to it."""

    model: LanguageModel
    own_tokenizer: Tokenizer | None  # None: imported without one, or trained on a task that has no text
    config: Config
    step: int
    tokens: int  # trained on
    train_seq_len: int | None  # tokens trained on at a time; None: imported, and nobody says
    run_dir: Path  # or the export's folder
    data_dir: Path

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RunError, one line, where none came along."""
        return required_tokenizer(self.own_tokenizer, self.config, self.run_dir)


def required_tokenizer(own: Tokenizer | None, config: Config, run_dir: Path) -> Tokenizer:
    """The tokenizer that came along with the model of ``run_dir``. Raises RunError, one line, where none did."""
    if own is not None:
        return own
    if config.data.synthetic is not None:
        raise RunError(
            f"{run_dir}: trained on task '{config.data.synthetic['task']}', which has token ids and no text; measure "
            "it with paralm eval tracking"
        )
    raise RunError(
        f"{run_dir}: imported without a tokenizer, so it takes token ids only (paralm.load(…).model); import it again "
        "with --tokenizer FILE, a sentencepiece model"
    )


@dataclass(frozen=True)
class RunModel:
    """A checkpoint of a run, verified, and what a model is made from; no weights are read yet."""

    path: Path
    config: Config
    checkpoint: Checkpoint
    own_tokenizer: Tokenizer | None  # None: trained on a task that has no text
    vocab_size: int
    data_dir: Path

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RunError, one line, where the run has none."""
        if self.own_tokenizer is None:
            raise RunError(f"{self.path}: trained on a task of token ids (data.synthetic), so it has no tokenizer")
        return self.own_tokenizer

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape, in the model's order. Raises CheckpointError when the checkpoint is of another."""
        model = build_model(self.config.model, self.vocab_size, seed=0, device="meta")
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, shape in shapes.items():
            if self.checkpoint.shapes.get(name) != shape:
                raise CheckpointError(
                    f"{self.checkpoint.directory}: parameter {name} is {self.checkpoint.shapes.get(name, 'absent')} "
                    f"there, {shape} in the model of {RunFolder(self.path).config_file}"
                )
        return shapes


def saved_config(path: Path) -> Config:
    """The configuration of a run's folder, or as much of it as an export says. Raises RunError or CheckpointError."""
    config = Exported(path).config if is_export(path) else RunFolder(path).saved_config()
    if config is None:
        raise RunError(f"{path}: no config.yaml, so this is not a run folder (nor an export)")
    return config


def open_run_model(run: str | Path, step: int | None, warn: Callable[[str], None]) -> RunModel:
    """``RUN`` or ``RUN@STEP`` (default: the newest whole checkpoint). Raises RunError or CheckpointError, one line."""
    path, named = parse_run(run)
    if is_export(path):
        raise RunError(f"{path}: an export; give the run it was made from")
    config = saved_config(path)
    load_modules(config.imports)
    # The run may have been moved since: what the folder holds is found relative to it.
    data_dir = config.data.dir if config.data.dir is not None else path / "data"
    source = open_checkpoint(path, step if step is not None else named, warn)
    if found := edited(digests(config.imports), source.manifest):
        warn(f"{source.directory}: {found}")
    task = task_of(config.data)
    if task is not None:
        if task.fingerprint != source.manifest["tokenizer_sha256"]:
            raise RunError(f"{path}: task '{task.name}' now makes other examples than {source.directory} learnt")
        return RunModel(path, config, source, task.tokenizer, task.vocab_size, data_dir)
    tokenizer = Tokenizer.load(data_dir / "tokenizer.model")
    if tokenizer.sha256 != source.manifest["tokenizer_sha256"]:
        raise RunError(f"{data_dir / 'tokenizer.model'}: not the tokenizer that {source.directory} was trained with")
    return RunModel(path, config, source, tokenizer, tokenizer.vocab_size, data_dir)


def load_model(
    run: str | Path,
    step: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load ``RUN`` or ``RUN@STEP`` (default: the newest whole checkpoint) from its fragments, or an export's folder.

    ``device``: default: the first GPU, else the CPU. ``dtype``: of the weights; default: the run's precision. Raises
    RunError or CheckpointError, one line; for a device that is not there, before anything is read.
    """
    path, named = parse_run(run)
    device = _usable(device)
    if is_export(path):
        return _load_export(path, step if step is not None else named, device, dtype)
    source = open_run_model(run, step, warnings.warn)
    config = source.config
    model = _empty(config, source.vocab_size, device, dtype)
    with torch.no_grad(), source.checkpoint.kept_open():
        shapes = source.shapes
        for name, parameter in model.named_parameters():
            parameter.copy_(source.checkpoint.tensor(name).view(shapes[name]))
    tokens = source.checkpoint.manifest["tokens"]
    seq_len = config.training.seq_len
    return LoadedModel(
        model, source.own_tokenizer, config, source.checkpoint.step, tokens, seq_len, path, source.data_dir
    )


def _usable(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        named = torch.device(device)
    except RuntimeError:
        raise RunError(f"device '{device}': no such name; give cpu, cuda, or one GPU as cuda:1") from None
    try:
        return torch.empty(0, device=named).device
    except (RuntimeError, AssertionError) as error:  # not compiled in, no such GPU, no driver
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"device '{device}': not to be had on this machine ({reason}); give another") from None


def _load_export(path: Path, step: int | None, device: torch.device, dtype: torch.dtype | None) -> LoadedModel:
    source = Exported(path).verify()
    if step is not None and step != source.step:
        raise RunError(f"{path}: an export of step {source.step}, there is no step {step} in it")
    load_modules(source.config.imports)
    tokenizer = Tokenizer.load(path / TOKENIZER) if TOKENIZER in source.content["files"] else None
    vocab_size = source.content["vocab_size"] if tokenizer is None else tokenizer.vocab_size
    model = _empty(source.config, vocab_size, device, dtype)
    source.fill(model)
    seq_len, tokens = source.content["training"].get("seq_len"), source.content["tokens"]
    return LoadedModel(model, tokenizer, source.config, source.step, tokens, seq_len, path, path)


def _empty(config: Config, vocab_size: int, device: torch.device, dtype: torch.dtype | None) -> LanguageModel:
    """The model in eval mode, without values yet."""
    whole_float32()
    default = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    model = build_model(config.model, vocab_size, seed=0, device="meta", dtype=dtype or default)
    model.to_empty(device=device)
    return model.eval()
