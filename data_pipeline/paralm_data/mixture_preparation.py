"""The data folder of a mixture: one tokenizer for all sources, each source prepared by itself, their held-out parts.

::

    out/tokenizer.model, tokenizer.json     given, that of a source that was prepared before, or trained on all sources
    out/mixture/NAME/                       each source that is text, as :func:`paralm_data.prepare` makes it
    out/mixture/FIRST/validation/NAME/      further sets, beside the first of them
    out/held_out/                           the held-out documents of all sources, one source after the other

A source may be a folder that was prepared before (or one store in it); it is used where it is, and must have been made
with the same tokenizer. As with one source, what is there and was made from the same specs is kept.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paralm_data import manifest as manifests
from paralm_data.atomic import write_file
from paralm_data.errors import DataError
from paralm_data.executors import Executor, make_executor
from paralm_data.inspection import tokenizer_of
from paralm_data.preparation import ADVICE, MODEL_NAME, Execution, prepare
from paralm_data.progress import Meter, Progress
from paralm_data.scratch import NAME as SCRATCH
from paralm_data.specs import SourceSpec, TokenizerSpec, differences
from paralm_data.stages import Stages
from paralm_data.steps import StepsSpec
from paralm_data.store import TokenStore
from paralm_data.store_writer import StoreWriter
from paralm_data.tokenizer import INFO_NAME, Tokenizer, read_info
from paralm_data.tokenizer_training import Sample, train_model

COPIED = 1024  # documents copied at once


@dataclass(frozen=True)
class PreparedMixture:
    """What is in the folder now: the sources' stores by name, and all their held-out documents."""

    path: Path
    tokenizer: Tokenizer
    train: dict[str, TokenStore]
    held_out: TokenStore
    skipped: bool


@dataclass
class _Plan:
    sources: Mapping[str, SourceSpec | Path]
    tokenizer: TokenizerSpec
    out: Path
    held_out_fraction: float
    validation: Mapping[str, SourceSpec]
    progress: Callable[[Progress], None] | None
    steps: StepsSpec
    execution: Execution

    def texts(self) -> dict[str, SourceSpec]:
        """The sources that are to be prepared."""
        return {name: source for name, source in self.sources.items() if isinstance(source, SourceSpec)}

    def folder(self, name: str) -> Path:
        """Where a source is prepared, or was."""
        source = self.sources[name]
        return source if isinstance(source, Path) else self.out / "mixture" / name

    def there(self) -> dict[str, TokenStore]:
        """The stores of those that are prepared already."""
        paths = {name: source for name, source in self.sources.items() if isinstance(source, Path)}
        return {name: TokenStore.open(_train(path), verify="size") for name, path in paths.items()}


def prepare_mixture(
    sources: Mapping[str, SourceSpec | Path],
    tokenizer: TokenizerSpec,
    out: str | Path,
    held_out_fraction: float = 0.02,
    validation: Mapping[str, SourceSpec] | None = None,
    progress: Callable[[Progress], None] | None = None,
    steps: StepsSpec | None = None,
    execution: Execution | None = None,
) -> PreparedMixture:
    """Make the tokenizer and the stores below ``out``, as far as they are not there.

    Arguments as of :func:`paralm_data.prepare`, for each source by name. Raises DataError as that does, for sources of
    different tokenizers, and if no source has a held-out part.
    """
    execution = execution or Execution()
    skipped = True
    with contextlib.ExitStack() as stack:
        executor = execution.executor
        if isinstance(executor, str):
            executor = stack.enter_context(make_executor(executor, execution.workers))
        execution = replace(execution, executor=executor)
        arguments = (held_out_fraction, dict(validation or {}), progress, steps or StepsSpec(), execution)
        plan = _Plan(sources, tokenizer, Path(out), *arguments)
        if executor.leads:
            skipped = _make(plan, executor)
        else:
            executor.follow()
    train = {name: TokenStore.open(_train(plan.folder(name)), verify="size") for name in sources}
    held_out = TokenStore.open(plan.out / "held_out", verify="size")
    return PreparedMixture(plan.out, Tokenizer.load(plan.out / MODEL_NAME), train, held_out, skipped)


def _make(plan: _Plan, executor: Executor) -> bool:
    """Make what is missing; whether nothing was."""
    there = plan.there()
    model, skipped = _tokenizer(plan, there, executor)
    for name, store in there.items():
        if store.tokenizer_sha256 != model.sha256:
            raise DataError(
                f"data.mixture.sources.{name}: {store.path} was made with tokenizer {store.tokenizer_sha256[:12]}…, "
                f"the mixture's is {model.sha256[:12]}…; prepare it again with data.tokenizer.model: "
                f"{plan.out / MODEL_NAME}"
            )
    given = TokenizerSpec(model=plan.out / MODEL_NAME)
    further = plan.validation
    for name, source in plan.texts().items():
        made = prepare(
            source, given, plan.folder(name), plan.held_out_fraction, further, plan.progress, None, plan.steps,
            plan.execution,
        )  # fmt: skip
        skipped, further = skipped and made.skipped, {}
    return not _union(plan, model) and skipped


def _train(folder: Path) -> Path:
    """The store of a prepared folder; itself, if it is one."""
    return folder if (folder / manifests.NAME).exists() else folder / "train"


def _tokenizer(plan: _Plan, there: Mapping[str, TokenStore], executor: Executor) -> tuple[Tokenizer, bool]:
    """The mixture's tokenizer, written to the folder, and whether it was there. DataError if that is another one."""
    found = _given(plan, there)
    spec = _tokenizer_spec(plan) if found is None else {"model_sha256": found.sha256}
    model, info = plan.out / MODEL_NAME, read_info(plan.out / INFO_NAME)
    if model.exists():
        changed = differences(info.get("spec", {}), spec)
        if changed:
            raise DataError(f"{model}: made from something else ({'; '.join(changed)}); {ADVICE}")
        return Tokenizer.load(model), True
    made, more = _trained(plan, executor) if found is None else (found, {})
    ids = {"unk": made.unk_id, "bos": made.bos_id, "eos": made.eos_id, "pad": made.pad_id}
    described = {
        "sha256": made.sha256, "vocab_size": made.vocab_size, "ids": ids, "lossless": made.lossless, "spec": spec,
        **more,
    }  # fmt: skip
    plan.out.mkdir(parents=True, exist_ok=True)
    write_file(plan.out / INFO_NAME, (json.dumps(described, indent=2) + "\n").encode("utf-8"))
    write_file(model, made.proto)
    return made, False


def _given(plan: _Plan, there: Mapping[str, TokenStore]) -> Tokenizer | None:
    """The tokenizer that is there: the configuration's, or that of the first source that was prepared before."""
    if plan.tokenizer.model is not None:
        return Tokenizer.load(plan.tokenizer.model)
    return tokenizer_of(next(iter(there.values()))) if there else None


def _tokenizer_spec(plan: _Plan) -> dict[str, Any]:
    """What a tokenizer is made from that is trained on the sources."""
    steps = plan.steps.without_shuffle().as_dict()
    return {
        "kind": plan.tokenizer.kind,
        "vocab_size": plan.tokenizer.vocab_size,
        "sample_bytes": plan.tokenizer.sample_bytes,
        "mixture": {name: source.as_dict() for name, source in plan.texts().items()},
        "held_out_fraction": plan.held_out_fraction,
        **({"steps": steps} if steps else {}),
    }


def _trained(plan: _Plan, executor: Executor) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer of a sample that is uniform over all sources' train text.

    Each source is read by the stages of its own preparation, which then has less to do.
    """
    limit, how = plan.tokenizer.sample_bytes, plan.execution
    sample = Sample(limit)
    for name, source in plan.texts().items():
        arguments = (plan.steps, how.shard_bytes, how.max_bad_records, how.threads)
        stages = Stages(plan.folder(name) / SCRATCH, executor, plan.progress, *arguments)
        part = stages.sample(stages.survey(source, held_out=plan.held_out_fraction), limit)
        for key, data in part.pieces():
            sample.add_piece(key, data)
    meter = Meter("training the tokenizer", plan.progress)
    proto = train_model(sample.texts(), plan.tokenizer.vocab_size, plan.tokenizer.kind)
    meter.add(0, sample.n_bytes)
    meter.done()
    return Tokenizer(proto, MODEL_NAME), {"sampled_bytes": sample.n_bytes}


def _union(plan: _Plan, model: Tokenizer) -> bool:
    """Put all sources' held-out documents in one store; whether that was still to do."""
    folders = {name: plan.folder(name) for name in plan.sources}
    parts = {
        name: TokenStore.open(folder / "held_out", verify="size")
        for name, folder in folders.items()
        if _train(folder) != folder and (folder / "held_out").is_dir()
    }
    if not parts:
        raise DataError("data.mixture: no source has a held-out part; give one as text, or as a folder that has one")
    path = plan.out / "held_out"
    spec = {"mixture": {name: store.manifest.fingerprint for name, store in parts.items()}, "split": "held_out"}
    if path.exists():
        changed = differences(manifests.read(path).source, spec)
        if changed:
            raise DataError(f"{path}: made from something else ({'; '.join(changed)}); {ADVICE}")
        return False
    with StoreWriter(path, model, spec) as writer:
        for store in parts.values():
            for first, last in _blocks(store.n_documents):
                ids = [store.document(i)[1:-1] for i in range(first, last)]
                writer.add(ids, store.doc_bytes[first:last].tolist())
        writer.finish()
    return True


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, COPIED):
        yield first, min(first + COPIED, count)
