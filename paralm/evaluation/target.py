"""What an evaluation measures: a model, its tokenizer, its texts, and the folder its results go to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from paralm_data import DataError, Tokenizer, TokenStore

from paralm.config import Config
from paralm.data_sets import train_paths, validation_paths
from paralm.errors import CheckpointError, RunError, UserError
from paralm.export import Exported, is_export
from paralm.models import LanguageModel
from paralm.training import checkpoint as ckpt

if TYPE_CHECKING:
    from paralm.training.load import LoadedModel


@dataclass(frozen=True)
class Target:
    """A model in evaluation mode on its device, and what belongs to it. Made by :meth:`open`, or :meth:`of` by hand.

    ``run_dir``: the run's folder, or the export's; results go to its ``eval/``. ``data_dir``: where the stores are.
    ``train_seq_len``: tokens that the model was trained on at a time; None where nobody says. ``digest``: SHA-256 of
    the checkpoint's manifest (of an export: of its description), so that results of other weights are not mixed.
    """

    model: LanguageModel
    own_tokenizer: Tokenizer | None
    config: Config
    train_seq_len: int | None
    step: int
    tokens_trained: int
    run_dir: Path
    data_dir: Path | None
    digest: str
    stores: dict[str, TokenStore] = field(default_factory=dict)  # opened so far, by name
    sealed: list[bool] = field(default_factory=list, repr=False)  # not empty: the stores are part of the basis

    @classmethod
    def open(
        cls,
        target: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        data_dir: Path | None = None,
    ) -> Target:
        """``RUN`` (its newest whole checkpoint), ``RUN@STEP`` or an export's folder.

        Sharded checkpoints of any world size are read. ``device``: default: the first GPU, else the CPU. ``dtype``:
        of the weights; default: the run's precision. ``data_dir``: where the stores are; default: the run's own.
        Raises UserError, one line.
        """
        from paralm.training.load import load_model

        return cls._from(load_model(target, device=device, dtype=dtype), data_dir)

    @classmethod
    def _from(cls, loaded: LoadedModel, data_dir: Path | None) -> Target:
        return cls(
            model=loaded.model,
            own_tokenizer=loaded.own_tokenizer,
            config=loaded.config,
            train_seq_len=loaded.train_seq_len,
            step=loaded.step,
            tokens_trained=loaded.tokens,
            run_dir=loaded.run_dir,
            data_dir=data_dir or loaded.data_dir,
            digest=checkpoint_digest(loaded.run_dir, loaded.step)[1],
        )

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        run_dir: str | Path = ".",
        stores: Mapping[str, TokenStore] | None = None,
        config: Config | None = None,
        train_seq_len: int | None = None,
        step: int = 0,
    ) -> Target:
        """From a model in memory; it is set to evaluation mode. The digest is that of its weights."""
        return cls(
            model=model.eval(),
            own_tokenizer=tokenizer,
            config=config or Config(model=model.config),
            train_seq_len=train_seq_len,
            step=step,
            tokens_trained=0,
            run_dir=Path(run_dir),
            data_dir=None,
            digest=weights_digest(model),
            stores=dict(stores or {}),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RunError, one line, where none came along."""
        from paralm.training.load import required_tokenizer

        return required_tokenizer(self.own_tokenizer, self.config, self.run_dir)

    @property
    def device(self) -> torch.device:
        """Where the model is, and tokens must go."""
        return self.model.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.head_weight.dtype

    @property
    def validation_sets(self) -> list[str]:
        """The names of the run's validation sets, ``held_out`` first."""
        if self.data_dir is None:
            return ["held_out", *self.config.data.validation]
        return list(validation_paths(self.config.data, self.data_dir))

    def store(self, name: str = "held_out") -> TokenStore:
        """``held_out``, ``train``, or a validation set of the run. Open it in the evaluation's ``__init__``: what is
        opened there becomes part of what the results follow from, and later a new one is refused.

        Raises UserError, one line: no such set, a missing or damaged store, or one of another tokenizer.
        """
        if name in self.stores:
            return self.stores[name]
        if self.sealed:
            raise RuntimeError(f"store '{name}' opened while measuring; open it in the evaluation's __init__")
        if self.data_dir is None:
            raise UserError(f"no set '{name}' here; there is {', '.join(self.stores) or 'none'}")
        known = validation_paths(self.config.data, self.data_dir)
        if self.config.data.mixture is None:  # otherwise there are several, and a source's name is of its held-out part
            known |= train_paths(self.config.data, self.data_dir)
        if is_export(self.run_dir) and not (self.data_dir / "held_out").is_dir():
            raise RunError(f"{self.run_dir}: an export has no text; name the data folder of its run: data.dir=DIR")
        path = known.get(name, self.data_dir / "validation" / name)
        if name not in known and not path.is_dir():
            raise UserError(f"no set '{name}' in {self.data_dir}; there is {', '.join(known)}")
        try:
            found = TokenStore.open(path, verify=self.config.data.verify)
            if self.own_tokenizer is not None:
                found.check_tokenizer(self.own_tokenizer)
        except DataError as error:
            raise RunError(str(error)) from None
        if found.vocab_size > self.model.n_tokens:
            raise UserError(f"{path}: has a vocabulary of {found.vocab_size}, the model one of {self.model.n_tokens}")
        self.stores[name] = found
        return found


def checkpoint_digest(run: Path, step: int | None) -> tuple[int, str]:
    """Step and manifest digest of a checkpoint (None: the newest), without reading its weights; "" if damaged.

    Raises CheckpointError, one line: there is none, or the named one is damaged.
    """
    if is_export(run):
        exported = Exported(run)
        return exported.step, str(exported.content["sha256"])
    folder = run / "checkpoints"
    steps = ckpt.steps(folder)
    if not steps:
        raise CheckpointError(f"{run}: no checkpoint yet; train the run first")
    chosen = step if step is not None else steps[-1]
    try:
        return chosen, str(ckpt.open_step(folder, chosen).manifest["sha256"])
    except CheckpointError:
        if step is not None:
            raise
        return chosen, ""  # loading takes an older one, and says so


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of every parameter's and buffer's name, shape, dtype and bytes."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
