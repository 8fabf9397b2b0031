"""The data folder of a mixture: one tokenizer for all sources, each source prepared by itself, their held-out parts.

::

    out/tokenizer.model, tokenizer.json     given, that of a source that was prepared before, or trained on all sources
    out/mixture/NAME/                       each source that is text, as :func:`paralm_data.prepare` makes it
    out/mixture/FIRST/validation/NAME/      further sets, beside the first of them
    out/held_out/                           the held-out documents of all sources, one source after the other

A source may be a folder that was prepared before (or one store in it); it is used where it is, and must have been made
with the same tokenizer and held-out fraction. As with one source, what is there and was made from the same specs is
kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paralm_data import manifest as manifests
from paralm_data import minhash, rules
from paralm_data.errors import DataError
from paralm_data.executors import Executor
from paralm_data.inspection import tokenizer_of
from paralm_data.preparation import Execution, is_prepared, prepare
from paralm_data.progress import Progress
from paralm_data.sampling import Draw, sample_of
from paralm_data.scratch import NAME as SCRATCH
from paralm_data.sources import check_apart, shards
from paralm_data.specs import SourceSpec, TokenizerSpec
from paralm_data.stages import Stages
from paralm_data.steps import StepsSpec
from paralm_data.store import TokenStore
from paralm_data.store_writer import StoreWriter
from paralm_data.tokenizer import Tokenizer
from paralm_data.tokenizer_making import MODEL_NAME, check_same, has_tokenizer, train_on, write_tokenizer

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
    different tokenizers or held-out fractions, and if no source has a held-out part.
    """
    execution = execution or Execution()
    skipped = True
    with contextlib.ExitStack() as stack:
        executor = execution.open(stack)
        execution = replace(execution, executor=executor)
        arguments = (held_out_fraction, dict(validation or {}), progress, steps or StepsSpec(), execution)
        plan = _Plan(sources, tokenizer, Path(out), *arguments)
        if executor.leads:
            skipped = executor.make(plan.out, lambda: _work_left(plan), lambda left: _make(plan, executor))
        else:
            executor.follow()
    train = {name: TokenStore.open(_train(plan.folder(name)), verify="size") for name in sources}
    held_out = TokenStore.open(plan.out / "held_out", verify="size")
    return PreparedMixture(plan.out, Tokenizer.load(plan.out / MODEL_NAME), train, held_out, skipped)


def _work_left(plan: _Plan) -> bool:
    """Whether anything is missing. DataError, before a byte is written, for a folder or a text that will not do."""
    there = plan.there()
    _check_held_out(there)
    _check_fractions(plan, there)
    _check_validation(plan, there)
    have = has_tokenizer(plan.out, _tokenizer_spec(plan, _given(plan, there)))
    model = plan.out / MODEL_NAME if have else plan.tokenizer.model
    texts, further = plan.texts(), plan.validation
    if model is None:  # then every text is read
        if texts:
            rules.check(plan.steps)
            minhash.check(plan.steps.minhash)
        for source in (*texts.values(), *further.values()):
            shards(source)
        return True
    done = [have, (plan.out / "held_out").exists()]
    for name, source in texts.items():
        fraction, given = plan.held_out_fraction, TokenizerSpec(model=model)
        done.append(is_prepared(source, given, plan.folder(name), fraction, further, plan.steps, plan.execution))
        further = {}
    return not all(done)


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
    skipped = not _union(plan, model, executor) and skipped
    executor.clear(plan.out / SCRATCH)  # also what processes that shared an earlier part of it have left
    return skipped


def _check_held_out(there: Mapping[str, TokenStore]) -> None:
    """DataError for a source that was held out to be scored."""
    for name, store in there.items():
        if store.manifest.source.get("split") == "held_out":
            raise DataError(
                f"data.mixture.sources.{name}: {store.path} is held-out text: trained on, it measures nothing; give "
                f"{store.path.parent}, or its train (prepared with a lower data.held_out_fraction, to train on more)"
            )


def _check_validation(plan: _Plan, there: Mapping[str, TokenStore]) -> None:
    """DataError for a validation set, still to be made, that a source trains on."""
    texts = plan.texts()
    made = next((plan.folder(name) / "validation" for name in texts), plan.out)
    for name, validation in plan.validation.items():
        if not (made / name).exists():
            for source in (*texts.values(), *filter(None, map(_text_of, there.values()))):
                check_apart(source, name, validation)


def _text_of(store: TokenStore) -> SourceSpec | None:
    """What a store was made from, if that is there to be read."""
    try:
        spec = SourceSpec(**store.manifest.source["source"])
        shards(spec)
    except (KeyError, TypeError, DataError):
        return None
    return spec


def _check_fractions(plan: _Plan, there: Mapping[str, TokenStore]) -> None:
    """DataError if one source trains on documents that another, of a larger fraction, holds out."""
    trained = dict.fromkeys(plan.texts(), plan.held_out_fraction)
    held_out, parts = dict(trained), _held_out_parts(plan)
    for name, store in there.items():
        made = store.manifest.source
        if made.get("split") == "train" and "held_out_fraction" in made:
            trained[name] = made["held_out_fraction"]
            if name in parts:
                held_out[name] = trained[name]
    if not held_out:
        return
    least, most = min(trained, key=lambda name: trained[name]), max(held_out, key=lambda name: held_out[name])
    if trained[least] < held_out[most]:
        raise DataError(
            f"data.mixture.sources: {least} has held_out_fraction {trained[least]}, and {most} has {held_out[most]}: "
            "a document of both would be trained on and scored as held out; prepare them with one "
            "data.held_out_fraction"
        )


def _held_out_parts(plan: _Plan) -> dict[str, Path]:
    """The held-out stores that are there, by source."""
    folders = {name: plan.folder(name) for name in plan.sources}
    return {
        name: folder / "held_out"
        for name, folder in folders.items()
        if _train(folder) != folder and (folder / "held_out").is_dir()
    }


def _train(folder: Path) -> Path:
    """The store of a prepared folder; itself, if it is one."""
    return folder if (folder / manifests.NAME).exists() else folder / "train"


def _tokenizer(plan: _Plan, there: Mapping[str, TokenStore], executor: Executor) -> tuple[Tokenizer, bool]:
    """The mixture's tokenizer, written to the folder, and whether it was there. DataError if that is another one."""
    found = _given(plan, there)
    spec = _tokenizer_spec(plan, found)
    if has_tokenizer(plan.out, spec):
        return Tokenizer.load(plan.out / MODEL_NAME), True
    drawn = _drawn(plan, executor) if found is None else []

    def write() -> None:
        if found is not None:
            write_tokenizer(plan.out, found, spec, {})
        else:
            model, more = train_on(sample_of(drawn, plan.tokenizer.sample_bytes), plan.tokenizer, plan.progress)
            write_tokenizer(plan.out, model, spec, more)

    executor.alone(plan.out, "tokenizer", lambda: has_tokenizer(plan.out, spec), write)
    return Tokenizer.load(plan.out / MODEL_NAME), False


def _given(plan: _Plan, there: Mapping[str, TokenStore]) -> Tokenizer | None:
    """The tokenizer that is there: the configuration's, or that of the first source that was prepared before."""
    if plan.tokenizer.model is not None:
        return Tokenizer.load(plan.tokenizer.model)
    return tokenizer_of(next(iter(there.values()))) if there else None


def _tokenizer_spec(plan: _Plan, given: Tokenizer | None) -> dict[str, Any]:
    """What the tokenizer is made from: it is given, or trained on the sources."""
    if given is not None:
        return {"model_sha256": given.sha256}
    steps = plan.steps.without_shuffle().as_dict()
    return {
        "kind": plan.tokenizer.kind,
        "vocab_size": plan.tokenizer.vocab_size,
        "sample_bytes": plan.tokenizer.sample_bytes,
        "mixture": {name: source.as_dict() for name, source in plan.texts().items()},
        "held_out_fraction": plan.held_out_fraction,
        **({"steps": steps} if steps else {}),
    }


def _drawn(plan: _Plan, executor: Executor) -> list[Draw]:
    """The tasks that drew pieces of all sources' train text, for a sample that is uniform over it.

    Each source is read by the stages of its own preparation, which then has less to do.
    """
    how = plan.execution
    drawn: list[Draw] = []
    for name, source in plan.texts().items():
        arguments = (plan.steps, how.shard_bytes, how.max_bad_records, how.threads)
        stages = Stages(plan.folder(name) / SCRATCH, executor, plan.progress, *arguments)
        survey = stages.survey(source, held_out=plan.held_out_fraction)
        drawn += stages.draw(survey, plan.tokenizer.sample_bytes)
    return drawn


def _union(plan: _Plan, model: Tokenizer, executor: Executor) -> bool:
    """Put all sources' held-out documents in one store; whether that was still to do."""
    parts = {name: TokenStore.open(path, verify="size") for name, path in _held_out_parts(plan).items()}
    if not parts:
        raise DataError("data.mixture: no source has a held-out part; give one as text, or as a folder that has one")
    path = plan.out / "held_out"
    spec = {"mixture": {name: store.manifest.fingerprint for name, store in parts.items()}, "split": "held_out"}
    if path.exists():
        check_same(manifests.read(path).source, spec, path)
        return False

    def write() -> None:
        with StoreWriter(path, model, spec) as writer:
            for store in parts.values():
                for first, last in _blocks(store.n_documents):
                    ids = [store.document(i)[1:-1] for i in range(first, last)]
                    writer.add(ids, store.doc_bytes[first:last].tolist())
            writer.finish()

    executor.alone(plan.out, "held_out", path.exists, write)
    return True


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, COPIED):
        yield first, min(first + COPIED, count)
