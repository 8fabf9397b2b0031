"""Where the texts of a run lie: the stores that are trained on and the validation sets, of one source or of a mixture.

::

    DATA/tokenizer.model                       of all
    DATA/train/, DATA/held_out/                of one source (data.source)
    DATA/mixture/NAME/train/, …/held_out/      of each source of a mixture; all their held-out parts: DATA/held_out/
    DATA/validation/NAME/                      further sets (data.validation); of a mixture, beside its first text
"""

from __future__ import annotations

from pathlib import Path

from paralm_data import Bandit, Exp3, Loader, MixtureLoader, MixtureSource, TokenStore, Ucb1, temperature_weights

from paralm.config import Config, DataConfig
from paralm.errors import RunError

HELD_OUT = "held_out"


def prepared_folder(data: DataConfig, folder: Path, name: str) -> Path:
    """Where source ``name`` of the mixture is prepared; ``folder``: the run's data folder."""
    assert data.mixture is not None
    store = data.mixture.sources[name].store
    return folder / "mixture" / name if store is None else store.expanduser()


def train_paths(data: DataConfig, folder: Path) -> dict[str, Path]:
    """The store of each source by name; ``train`` is the name of the only one without a mixture."""
    if data.mixture is None:
        return {"train": folder / "train"}
    found = {name: prepared_folder(data, folder, name) for name in data.mixture.sources}
    return {name: path if (path / "manifest.json").exists() else path / "train" for name, path in found.items()}


def validation_paths(data: DataConfig, folder: Path) -> dict[str, Path]:
    """Every validation set by name: the held-out split, the sources' own parts of it, and ``data.validation``."""
    found = {HELD_OUT: folder / HELD_OUT}
    for name in data.mixture.sources if data.mixture is not None else ():
        path = prepared_folder(data, folder, name) / HELD_OUT
        if path.is_dir() or (data.mixture is not None and data.mixture.sources[name].store is None):
            found[name] = path
    beside = folder
    if data.mixture is not None and data.validation:
        texts = [name for name, source in data.mixture.sources.items() if source.store is None]
        beside = folder / "mixture" / texts[0]
    return found | {name: beside / "validation" / name for name in data.validation}


def check_prepared(data: DataConfig, folder: Path) -> None:
    """RunError, one line, if something that training reads is not there."""
    for path in (
        folder / "tokenizer.model",
        *train_paths(data, folder).values(),
        *validation_paths(data, folder).values(),
    ):
        if not path.exists():
            raise RunError(f"{path}: missing; run 'paralm data prepare' first")


def open_loader(
    config: Config, folder: Path, rank: int = 0, world_size: int = 1, part: slice | None = None
) -> Loader | MixtureLoader:
    """The loader of the run's text, of all or a ``part`` of the steps of a rank's rows. Of the stores it checks the
    sizes. Raises DataError, one line; see :class:`MixtureLoader`.
    """
    training, data = config.training, config.data
    stores = {name: TokenStore.open(path, verify="size") for name, path in train_paths(data, folder).items()}
    rows = (training.seq_len, training.global_batch_size, config.run.seed)
    mixture = data.mixture
    if mixture is None:
        return Loader(stores["train"], *rows, order=data.order, rank=rank, world_size=world_size, part=part)
    weights = [1.0 if source.weight is None else source.weight for source in mixture.sources.values()]
    if mixture.weights == "temperature":
        weights = temperature_weights([store.n_tokens for store in stores.values()], mixture.temperature)
    once = 1.0 if mixture.at_end == "stop" else None
    sources = [
        MixtureSource(name, stores[name], weight, once if source.max_epochs is None else source.max_epochs)
        for (name, source), weight in zip(mixture.sources.items(), weights, strict=True)
    ]
    bandit: Bandit | None = None
    if mixture.learned:
        bandit = Exp3(len(sources)) if mixture.weights == "exp3" else Ucb1(len(sources), mixture.beta)
    loader = MixtureLoader(sources, *rows, rank, world_size, bandit=bandit, every=mixture.every, part=part)
    loader.check_budget(training.max_steps)
    return loader
