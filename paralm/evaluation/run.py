"""The evaluation of a run: every validation set, the compressors beside it, samples, and the report.

What is measured is kept in ``eval/`` with a record of what it was measured on, so that the same call again does
nothing but write the report anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paralm_data import DataError, TokenStore
from torch.utils import _pytree as pytree

from paralm.config import Config, EvalConfig
from paralm.data_sets import validation_paths
from paralm.errors import RunError
from paralm.evaluation import record as records
from paralm.evaluation import result as results
from paralm.evaluation.cells import file_digest
from paralm.evaluation.compression import compression
from paralm.evaluation.curves import read_curves
from paralm.evaluation.perplexity import PerplexityResult, perplexity
from paralm.evaluation.record import Basis, Record
from paralm.evaluation.report import ResultSet, read_results, write_report
from paralm.evaluation.result import Result
from paralm.evaluation.samples import samples
from paralm.evaluation.scoring import scoring_version
from paralm.evaluation.suite_report import write_suite_report
from paralm.evaluation.target import checkpoint_digest
from paralm.export import is_export
from paralm.models import LanguageModel
from paralm.training.load import LoadedModel, load_model, saved_config
from paralm.training.session import parse_run
from paralm.user_modules import load_modules

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`run_evaluation` found, or found done."""

    run_dir: Path
    step: int
    results: ResultSet
    report: Path
    skipped: bool  # everything was measured already
    seconds: float

    @property
    def held_out(self) -> PerplexityResult:
        """On the held-out split."""
        return self.results.perplexity["held_out"]


def run_evaluation(
    run: str | Path,
    settings: EvalConfig | None = None,
    *,
    again: bool = False,
    reset_every: int | None = None,
    data_dir: Path | None = None,
    device: str | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure ``RUN`` (its newest checkpoint) or ``RUN@STEP`` and write ``eval/`` and ``report.md``.

    An export's folder is measured too; it has no course of training, so there is no report, only ``eval/``.

    ``settings``: default: the run's own ``eval`` section. ``again``: measure even if the results of the same
    checkpoint, settings and text are there. ``reset_every``: forget after every so many tokens of a document;
    default: never, except that a model whose state grows (attention) forgets after its training length.
    ``data_dir``: where the stores are, for an export; default: its own ``data/``.

    Raises UserError, one line, before anything is changed: no such run, no metrics or a damaged line in them, no
    checkpoint, a store that is missing, damaged, or of another tokenizer.
    """
    started = time.monotonic()
    path, named = parse_run(run)
    config = saved_config(path)
    if data_dir is not None:
        config.data.dir = data_dir
    load_modules(config.imports)
    exported = is_export(path)
    if not exported:
        read_curves(path)
    elif config.data.dir is None and not (path / "data").is_dir():
        raise RunError(f"{path}: an export has no text; name the data folder of its run: data.dir=DIR")
    step, digest = checkpoint_digest(path, named)
    try:
        stores = _open_stores(config, path)
        basis = Basis(
            step=step,
            checkpoint=digest,
            settings=settings or config.eval,
            reset_every=reset_every
            or (settings or config.eval).reset_every
            or (None if _bounded(config) else config.training.seq_len),
            stores={name: store.manifest.fingerprint for name, store in stores.items()},
            scoring=max(_scoring(config, store) for store in stores.values()),
        )
        done = _done(path, basis) if not again else None
        if done is None:
            loaded = load_model(path, named, device=device)
            if loaded.step != step:  # the newest was damaged, and an older whole one was taken
                basis = basis.model_copy(
                    update={"step": loaded.step, "checkpoint": checkpoint_digest(path, loaded.step)[1]}
                )
            _measure(loaded, basis, stores, on_progress or (lambda what, done, total: None))
    except DataError as error:
        raise RunError(str(error)) from None
    write_suite_report(path)
    report = records.path_of(path) if exported else write_report(path)
    found = done or read_results(path)
    return Evaluation(path, basis.step, found, report, done is not None, time.monotonic() - started)


def _open_stores(config: Config, run: Path) -> dict[str, TokenStore]:
    """Every validation set by name, the held-out split first."""
    data_dir = config.data.dir if config.data.dir is not None else run / "data"
    paths = validation_paths(config.data, data_dir)
    return {name: TokenStore.open(path, verify=config.data.verify) for name, path in paths.items()}


def _scoring(config: Config, store: TokenStore) -> int:
    tokens = store.manifest.vocab_size
    return scoring_version(config.model.vocab_size or tokens, tokens)


def _bounded(config: Config) -> bool:
    """Whether the state of the run's model is bounded, known from its mixers without building it."""
    from paralm.models.hybrid import layer_mixers
    from paralm.registry import get_mixer

    return all(get_mixer(spec["name"]).value.bounded_state for spec in layer_mixers(config.model))


def _done(run: Path, basis: Basis) -> ResultSet | None:
    """The results that are there, if they follow from the same basis and are whole."""
    try:
        record = records.load(run)
        if record is None or record.basis != basis:
            return None
        folder = results.eval_dir(run)
        if any(file_digest(folder / name) != digest for name, digest in record.files.items()):
            return None  # replaced since, as by `paralm eval perplexity` with other settings
        found = read_results(run)
    except RunError:
        return None  # damaged: measured again
    complete = list(found.perplexity) == list(basis.stores) == list(found.compression) and found.samples is not None
    return found if complete else None


def _measure(loaded: LoadedModel, basis: Basis, stores: dict[str, TokenStore], on_progress: Progress) -> None:
    """Measure everything, then write everything; the record comes last."""
    started, settings = time.monotonic(), basis.settings
    found: list[Result] = []
    for name, store in stores.items():
        found += _measure_set(loaded, basis, name, store, on_progress)
    found.append(
        samples(
            loaded.model,
            loaded.tokenizer,
            settings.prompts,
            settings.sample_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            on_progress=lambda done, total: on_progress("sampling", done, total),
        )
    )
    records.remove(loaded.run_dir)
    files = results.save((result.model_copy(update={"step": loaded.step}) for result in found), loaded.run_dir)
    weight = loaded.model.head_weight
    records.save(
        loaded.run_dir,
        Record(
            basis=basis,
            parameters=sum(p.numel() for p in loaded.model.parameters()),
            tokens_trained=loaded.tokens,
            state_bytes=state_bytes(loaded.model),
            device=str(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."),
            seconds=time.monotonic() - started,
            files={path.name: file_digest(path) or "" for path in files if path.suffix == ".json"},
        ),
    )


def _measure_set(
    loaded: LoadedModel, basis: Basis, name: str, store: TokenStore, on_progress: Progress
) -> list[Result]:
    """The model and the compressors on one set."""
    settings = basis.settings
    scored = perplexity(
        loaded.model,
        store,
        loaded.tokenizer,
        settings.max_tokens,
        settings.rows,
        settings.chunk,
        reset_every=basis.reset_every,
        set_name=name,
        train_seq_len=loaded.train_seq_len,
        on_progress=lambda done, total: on_progress(f"scoring {name}", done, total),
    )
    on_progress(f"compressing {name}", 0, scored.n_bytes)
    compressed = compression(store, loaded.tokenizer, scored.documents.index, name)
    on_progress(f"compressing {name}", scored.n_bytes, scored.n_bytes)
    return [scored, compressed]


def state_bytes(model: LanguageModel) -> int | None:
    """Bytes of the state that one sequence carries; None if it grows with the sequence."""
    if not model.bounded_state:
        return None
    leaves: list[Any] = pytree.tree_leaves(model.initial_state(1))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
