"""From text to token stores: rules, duplicates, split, tokenizer, tokens, in bounded memory, each part made once.

::

    out/tokenizer.model, tokenizer.json     the tokenizer, its SHA-256, special ids and what it was made from
    out/train/, out/held_out/               the source's two splits (by content hash)
    out/validation/NAME/                    further sources, whole and as they are
    out/preparation.json                    what became of the source's records, by number
    out/quarantine.jsonl                    its bad records, with their places; quarantine-NAME.jsonl of another's
    out/.work/                              what is not whole yet

The work is a list of tasks (:mod:`paralm_data.stages`), which an executor runs anywhere in any order; the result does
not depend on that. What is already there and was made from the same specs is kept; what was made from others is
refused. Every part appears by a rename, so an interruption leaves whole parts and finished tasks only, and the same
call again does what is missing.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paralm_data import manifest as manifests
from paralm_data import minhash, rules
from paralm_data.atomic import write_file
from paralm_data.errors import DataError
from paralm_data.executors import Executor, make_executor
from paralm_data.progress import Progress
from paralm_data.sampling import sample_of
from paralm_data.scratch import NAME as SCRATCH
from paralm_data.sources import check_apart, shards
from paralm_data.specs import SourceSpec, TokenizerSpec
from paralm_data.split import Counts
from paralm_data.stages import SPLITS, Stages, Survey
from paralm_data.steps import StepsSpec
from paralm_data.store import TokenStore
from paralm_data.store_writer import StoreWriter
from paralm_data.tokenizer import Tokenizer
from paralm_data.tokenizer_making import ADVICE, MODEL_NAME, check_same, has_tokenizer, train_on, write_tokenizer
from paralm_data.tokenizing import Tokenize

COUNTS_NAME = "preparation.json"


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


@dataclass(frozen=True)
class Execution:
    """How a preparation is carried out; the result depends on none of it.

    ``executor``: local, shared (any number of processes make the same call), ray (this process is connected to a
    cluster), mpi (every rank makes the same call), or one that is open already. ``workers``: tasks at a time, default
    all there is. ``shard_bytes``: of input that one task reads, about; it decides the order of documents where shards
    are shuffled, and nothing else. ``max_bad_records``: of a source; one more ends the preparation. ``threads``: of
    sentencepiece in a task, default: the processors that other tasks leave.
    """

    executor: str | Executor = "local"
    workers: int | None = None
    shard_bytes: int = 64 << 20
    max_bad_records: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("shard_bytes", 1), ("max_bad_records", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def open(self, stack: contextlib.ExitStack) -> Executor:
        """The executor, opened until ``stack`` closes if it is not open already."""
        if isinstance(self.executor, str):
            return stack.enter_context(make_executor(self.executor, self.workers))
        return self.executor


@dataclass
class _Plan:
    """The specs of a preparation and the folder they are for."""

    source: SourceSpec
    tokenizer: TokenizerSpec
    out: Path
    held_out_fraction: float
    validation: dict[str, SourceSpec]
    steps: StepsSpec
    execution: Execution
    progress: Callable[[Progress], None] | None

    def store_path(self, name: str) -> Path:
        return self.out / name if name in SPLITS else self.out / "validation" / name

    def store_spec(self, name: str) -> dict[str, Any]:
        """What the manifest of a store records of where its text came from."""
        if name not in SPLITS:
            return {"source": self.validation[name].as_dict()}
        spec = {"source": self.source.as_dict(), "held_out_fraction": self.held_out_fraction, "split": name}
        steps = self.steps.as_dict()
        if self.steps.shuffle != "none":
            steps["shard_bytes"] = self.execution.shard_bytes
        return {**spec, "steps": steps} if steps else spec

    def tokenizer_spec(self) -> dict[str, Any]:
        """What ``tokenizer.json`` records of what the tokenizer was made from."""
        if self.tokenizer.model is not None:
            return {"model_sha256": Tokenizer.load(self.tokenizer.model).sha256}
        steps = self.steps.without_shuffle().as_dict()
        return {
            "kind": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            "sample_bytes": self.tokenizer.sample_bytes,
            "source": self.source.as_dict(),
            "held_out_fraction": self.held_out_fraction,
            **({"steps": steps} if steps else {}),
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
                check_same(manifests.read(path).source, self.store_spec(name), path)
            else:
                absent.append(name)
        return absent

    def has_tokenizer(self) -> bool:
        """Whether the tokenizer is there. DataError if it was made from another spec."""
        return has_tokenizer(self.out, self.tokenizer_spec())

    def work_left(self) -> bool:
        """Whether anything is missing. DataError, before a byte is written, for a folder or an input that will not
        do."""
        missing = self.missing()  # before the tokenizer, which is there first: another process may be making them
        have_tokenizer = self.has_tokenizer()
        if not have_tokenizer and len(missing) < len(self.names()):
            raise DataError(f"{self.out / MODEL_NAME}: missing, though stores beside it were made with it; {ADVICE}")
        if have_tokenizer:
            Tokenizer.load(self.out / MODEL_NAME)
        if any(name in SPLITS for name in missing):
            rules.check(self.steps)
            minhash.check(self.steps.minhash)
            shards(self.source)
        for name in missing:
            if name not in SPLITS:
                shards(self.validation[name])
                check_apart(self.source, name, self.validation[name])
        return bool(missing) or not have_tokenizer


def prepare(
    source: SourceSpec,
    tokenizer: TokenizerSpec,
    out: str | Path,
    held_out_fraction: float = 0.02,
    validation: Mapping[str, SourceSpec] | None = None,
    progress: Callable[[Progress], None] | None = None,
    threads: int | None = None,
    steps: StepsSpec | None = None,
    execution: Execution | None = None,
) -> Prepared:
    """Make the tokenizer and the stores below ``out``, as far as they are not there.

    ``steps``: what is done to the source's documents; ``execution``: who does the work, with ``threads`` of
    sentencepiece in each task; the result depends on neither of the last two. Raises DataError for input that cannot
    be used, a validation set that is read from where the source is, a folder made from other specs, or an empty split;
    what is there already is then as it was.
    """
    execution = execution or Execution(threads=threads)
    plan = _plan(source, tokenizer, out, held_out_fraction, validation, steps, execution, progress)
    counts, skipped = None, False

    def make(left: bool) -> tuple[Counts | None, bool]:
        made = None
        if left:
            arguments = (plan.steps, execution.shard_bytes, execution.max_bad_records, execution.threads)
            made = _Preparation(plan, executor, Stages(plan.out / SCRATCH, executor, progress, *arguments)).run()
        executor.clear(plan.out / SCRATCH)
        return made, not left

    with contextlib.ExitStack() as stack:
        executor = execution.open(stack)
        if executor.leads:
            counts, skipped = executor.make(plan.out, plan.work_left, make)
        else:
            executor.follow()
    model = Tokenizer.load(plan.out / MODEL_NAME)
    stores = {name: TokenStore.open(plan.store_path(name), verify="size") for name in plan.names()}
    for store in stores.values():
        store.check_tokenizer(model)
    train, held_out = stores.pop("train"), stores.pop("held_out")
    return Prepared(plan.out, model, train, held_out, stores, skipped, counts)


def is_prepared(
    source: SourceSpec,
    tokenizer: TokenizerSpec,
    out: str | Path,
    held_out_fraction: float = 0.02,
    validation: Mapping[str, SourceSpec] | None = None,
    steps: StepsSpec | None = None,
    execution: Execution | None = None,
) -> bool:
    """Whether :func:`prepare` would have nothing to do. DataError where it would refuse the folder or an input."""
    plan = _plan(source, tokenizer, out, held_out_fraction, validation, steps, execution or Execution(), None)
    return not plan.work_left()


def _plan(
    source: SourceSpec,
    tokenizer: TokenizerSpec,
    out: str | Path,
    held_out_fraction: float,
    validation: Mapping[str, SourceSpec] | None,
    steps: StepsSpec | None,
    execution: Execution,
    progress: Callable[[Progress], None] | None,
) -> _Plan:
    if not 0 < held_out_fraction < 1:
        raise DataError(f"held_out_fraction is {held_out_fraction}; it must be between 0 and 1")
    for name in validation or {}:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in SPLITS:
            raise DataError(f"validation set '{name}': a name is letters, digits and ._- and neither of {SPLITS}")
    if Path(out).exists() and not Path(out).is_dir():
        raise DataError(f"{out}: a file is where the prepared folder (data.dir) would be")
    sources = dict(validation or {})
    return _Plan(source, tokenizer, Path(out), held_out_fraction, sources, steps or StepsSpec(), execution, progress)


class _Preparation:
    """What is missing, made."""

    def __init__(self, plan: _Plan, executor: Executor, stages: Stages) -> None:
        self._plan, self._executor, self._stages = plan, executor, stages
        self._survey: Survey | None = None

    def run(self) -> Counts | None:
        """Returns the source's counts, if it was read."""
        plan = self._plan
        if not plan.has_tokenizer():
            self._make_tokenizer()
        model = Tokenizer.load(plan.out / MODEL_NAME)
        splits = [name for name in plan.missing() if name in SPLITS]
        if splits:
            self._make_splits(model, splits)
        for name in plan.missing():
            self._make_validation(model, name)
        return self._survey.counts if self._survey is not None else None

    def _source(self) -> Survey:
        if self._survey is None:
            self._survey = self._stages.survey(self._plan.source, held_out=self._plan.held_out_fraction)
            _check_splits(self._plan, self._survey)
        return self._survey

    def _make_tokenizer(self) -> None:
        plan, limit = self._plan, self._plan.tokenizer.sample_bytes
        drawn = [] if plan.tokenizer.model is not None else self._stages.draw(self._source(), limit)

        def write() -> None:
            if plan.tokenizer.model is not None:
                write_tokenizer(plan.out, Tokenizer.load(plan.tokenizer.model), plan.tokenizer_spec(), {})
            else:
                model, more = train_on(sample_of(drawn, limit), plan.tokenizer, plan.progress)
                write_tokenizer(plan.out, model, plan.tokenizer_spec(), more)

        self._executor.alone(plan.out, "tokenizer", plan.has_tokenizer, write)

    def _make_splits(self, model: Tokenizer, names: Sequence[str]) -> None:
        plan, survey = self._plan, self._source()
        tasks = self._stages.tokenize(
            survey, plan.out / MODEL_NAME, model.sha256, names, "tokenizing", plan.steps.without_shuffle()
        )

        def write() -> None:
            _quarantine(plan.out / "quarantine.jsonl", survey.bad())
            counts = json.dumps(survey.counts.as_dict(), indent=2) + "\n"
            write_file(plan.out / COUNTS_NAME, counts.encode("utf-8"))
            self._write_stores(tasks, names, model)

        self._write_alone("stores", names, write)

    def _make_validation(self, model: Tokenizer, name: str) -> None:
        plan = self._plan
        survey = self._stages.survey(plan.validation[name], name)
        if not survey.counts.kept:
            raise DataError(f"validation set '{name}' ({_name(plan.validation[name])}): no document with text")
        steps = StepsSpec(max_document_bytes=plan.steps.max_document_bytes)
        tasks = self._stages.tokenize(survey, plan.out / MODEL_NAME, model.sha256, [name], f"tokenizing {name}", steps)

        def write() -> None:
            _quarantine(plan.out / f"quarantine-{name}.jsonl", survey.bad())
            self._write_stores(tasks, [name], model)

        self._write_alone(f"validation-{name}", [name], write)

    def _write_alone(self, step: str, names: Sequence[str], write: Callable[[], None]) -> None:
        plan = self._plan
        self._executor.alone(plan.out, step, lambda: not set(names) & set(plan.missing()), write)

    def _write_stores(self, tasks: Sequence[Tokenize], names: Sequence[str], model: Tokenizer) -> None:
        plan = self._plan
        for name in [name for name in plan.missing() if name in names]:
            with StoreWriter(plan.store_path(name), model, plan.store_spec(name)) as writer:
                self._stages.join(tasks, name, writer, model)
                writer.finish()


def _quarantine(path: Path, bad: Iterable[tuple[str, str]]) -> None:
    """List bad records, a JSON object a line; no file where there are none."""
    lines = [json.dumps({"place": place, "problem": problem}, ensure_ascii=False) + "\n" for place, problem in bad]
    if lines:
        # Half a surrogate pair, of a key or of a file name that is not UTF-8, becomes JSON's own escape of it.
        write_file(path, "".join(lines).encode("utf-8", "backslashreplace"))


def _check_splits(plan: _Plan, survey: Survey) -> None:
    """DataError if a split would be empty, which the documents' hashes tell before anything is tokenized."""
    counts = survey.counts
    if not counts.kept:
        left_out = sum(counts.rules.values())
        why = f" ({left_out} break a rule of data.steps)" if left_out else ""
        raise DataError(f"{_name(plan.source)}: no document with text among {counts.read}{why}")
    if counts.least_position >= plan.held_out_fraction:
        advice = "give more, smaller documents (jsonl holds many in one file)"
        if counts.kept > 1 and counts.least_position < 0.5:
            enough = math.ceil(counts.least_position * 1000) / 1000
            advice = f"raise data.held_out_fraction (above {enough:g}) or {advice}"
        raise DataError(
            f"{_name(plan.source)}: the held-out split is empty: held_out_fraction {plan.held_out_fraction} of "
            f"{counts.kept} distinct documents holds none out; {advice}"
        )
    if not sum(found["train"] for found in survey.chosen):
        raise DataError(f"{_name(plan.source)}: the train split is empty; lower data.held_out_fraction")


def _name(spec: SourceSpec) -> str:
    return spec.dataset or ", ".join(spec.paths) or spec.kind
