"""The stages of a preparation, each a list of tasks for an executor; what a stage did before is not done again.

::

    scan       a shard: records, rules, digests, signatures          scanning.py
    merge      some shards: their keys in one file                   duplicates.py
    partition  a range of keys: which documents are later ones       duplicates.py
    gather     some shards: what all ranges say of them              duplicates.py
    choose     a shard: the fate of each record                      duplicates.py
    draw       a shard: pieces for the tokenizer's sample            sampling.py
    tokenize   a shard: its tokens                                   tokenizing.py

then the leading process joins the shards' tokens, in order, to stores.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paralm_data import minhash, rules
from paralm_data.atomic import write_file
from paralm_data.duplicates import GROUP, MERGED, PARTITION, Choose, Gather, Keys, Merge, Partition, groups_of
from paralm_data.errors import DataError
from paralm_data.executors import Executor, Task
from paralm_data.permutation import random_permutation
from paralm_data.progress import Meter, Progress
from paralm_data.sampling import EVERY_KEY, Draw, bound_for
from paralm_data.scanning import HELD_OUT, KEPT, Scan, bad_records, too_many
from paralm_data.scratch import blocks, key_of, read_marker, read_markers
from paralm_data.sources import Shard, shards
from paralm_data.specs import SourceSpec
from paralm_data.split import Counts
from paralm_data.steps import StepsSpec
from paralm_data.store_writer import StoreWriter, dtype_of
from paralm_data.tokenizer import Tokenizer
from paralm_data.tokenizing import Tokenize

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Survey:
    """A source, every record of which has its fate: per shard, in order, the marker of its fates and what it holds, and
    the scan."""

    shards: list[Shard]
    choices: list[Path]
    chosen: list[dict[str, Any]]
    scans: list[Scan]
    counts: Counts

    def bad(self) -> Iterator[tuple[str, str]]:
        """(place, problem) of each bad record."""
        return itertools.chain.from_iterable(map(bad_records, self.scans))

    def size(self, shard: int, stores: Sequence[str]) -> int:
        """Bytes of text of a shard that go to these stores."""
        return sum(self.chosen[shard][f"{name}_bytes"] for name in stores)


class Stages:
    """Runs stages in ``scratch``. ``shard_bytes`` and ``max_bad_records`` as in :class:`paralm_data.Execution`."""

    def __init__(
        self,
        scratch: Path,
        executor: Executor,
        report: Callable[[Progress], None] | None,
        steps: StepsSpec,
        shard_bytes: int,
        max_bad_records: int,
        threads: int | None,
    ) -> None:
        self._scratch, self._executor, self._report = scratch, executor, report
        self._steps, self._shard_bytes, self._limit = steps, shard_bytes, max_bad_records
        self._threads = threads

    def run(self, title: str, tasks: Sequence[Task], quiet: bool = False) -> list[dict[str, Any]]:
        """The results of tasks, in order; only those without a marker are run."""
        results = read_markers([task.marker for task in tasks])
        left = [i for i, result in enumerate(results) if result is None]
        total = sum(task.weight for task in tasks)
        before = total - sum(tasks[i].weight for i in left)
        meter = Meter(title, None if quiet else self._report, total, before)
        worked = [0.0] * len(tasks)
        with contextlib.closing(self._executor.run([tasks[i] for i in left])) as events:
            for event in events:
                index = left[event.task]
                work = event.delta.work if event.result is None else tasks[index].weight - worked[index]
                worked[index] += work
                meter.add(event.delta.documents, event.delta.bytes, event.delta.tokens, work)
                if event.result is not None:
                    results[index] = event.result
        meter.done()
        return [result for result in results if result is not None]

    def survey(self, source: SourceSpec, name: str = "", held_out: float | None = None) -> Survey:
        """Decide the fate of every record. ``held_out``: the fraction; None for a set that is kept whole, but for its
        empty documents. DataError for a bad record that is one too many.
        """
        whole = held_out is None
        steps = self._steps if not whole else StepsSpec(max_document_bytes=self._steps.max_document_bytes)
        parts = shards(source, self._shard_bytes)
        libraries = [minhash.algorithm() if steps.minhash.enabled else "", rules.algorithm(steps)]
        stage = key_of("scan", steps.without_shuffle().as_dict(), libraries, whole)
        scans = [Scan(shard, steps, whole, self._limit, self._scratch / f"scan-{stage}") for shard in parts]
        scanned = self._scan(f"reading {name}".rstrip(), scans)
        plan_key = key_of(stage, [shard.key for shard in parts])
        keys = sum(found["runs"][-1] for found in scanned)
        later = self._later(plan_key, scans, scanned, keys)
        folder = self._scratch / f"choose-{key_of(plan_key, held_out)}"
        choices = [
            Choose(scan.marker, i, shard.label, later[i], held_out, folder)
            for i, (shard, scan) in enumerate(zip(parts, scans))
        ]
        chosen = self.run("choosing", choices, quiet=True)
        counts = _counts(scanned, chosen)
        return Survey(parts, [c.marker for c in choices], chosen, scans, counts)

    def _scan(self, title: str, scans: list[Scan]) -> list[dict[str, Any]]:
        scanned = self.run(title, scans)
        bad = sum(found["bad"] for found in scanned)
        if bad > self._limit:
            every = itertools.chain.from_iterable(map(bad_records, scans))
            raise too_many(next(itertools.islice(every, self._limit, None)), bad, self._limit)
        return scanned

    def _later(
        self, plan_key: str, scans: list[Scan], scanned: list[dict[str, Any]], keys: int
    ) -> Sequence[Path | None]:
        """Of each shard, where its records that are not the first of their keys are found."""
        if not keys:
            return [None] * len(scans)
        files = [Keys(scan.marker, found["runs"], i) for i, (scan, found) in enumerate(zip(scans, scanned))]
        count = -(-keys // PARTITION)
        if count > 1:
            files = self._merged(plan_key, files)
        plan = self._scratch / f"plan-{plan_key}.json"
        content = json.dumps([[str(marker), runs, shard] for marker, runs, shard in files]).encode()
        if not plan.exists() or plan.read_bytes() != content:  # others that read it would lose it to a new one
            write_file(plan, content)
        folder = self._scratch / f"partition-{key_of(plan_key, count)}"
        tasks = [Partition(plan, i, count, folder) for i in range(count)]
        self.run("finding duplicates", tasks, quiet=count == 1)
        if count == 1:
            return [tasks[0].marker.with_suffix(".later")] * len(scans)
        gathered = self._scratch / f"gather-{key_of(plan_key, count, GROUP)}"
        groups = [Gather(folder, count, i, min(i + GROUP, len(scans)), gathered) for i in range(0, len(scans), GROUP)]
        self.run("gathering duplicates", groups, quiet=True)
        return [groups[i // GROUP].marker.with_suffix(".later") for i in range(len(scans))]

    def _merged(self, plan_key: str, files: list[Keys]) -> list[Keys]:
        """The same keys in fewer files."""
        groups, folder = groups_of(files), self._scratch / f"merge-{key_of(plan_key, MERGED)}"
        tasks = [Merge(tuple(group), folder) for group in groups if len(group) > 1]
        made = iter(zip(tasks, self.run("sorting keys", tasks, quiet=True), strict=True))
        found = []
        for group in groups:
            if len(group) > 1:
                task, result = next(made)
                found.append(Keys(task.marker, [0, result["keys"]], group[0].shard))
            else:
                found += group
        return found

    def draw(self, survey: Survey, limit: int) -> list[Draw]:
        """Draw pieces of the train text for a uniform sample of ``limit`` bytes, or all there is; returns the tasks
        that did.
        """
        sizes = [found["train_bytes"] for found in survey.chosen]
        bound = bound_for(limit, sum(sizes))
        while True:
            key = key_of("draw", bound, *self._texts(survey))
            folder = self._scratch / f"draw-{key}"
            tasks = [
                Draw(shard, self._steps, scan.marker, choice, size, folder, bound)
                for shard, scan, choice, size in zip(survey.shards, survey.scans, survey.choices, sizes)
            ]
            drawn = self.run("sampling", tasks)
            if bound >= EVERY_KEY or sum(found["bytes"] for found in drawn) >= limit:
                return tasks
            bound = min(EVERY_KEY, 2 * bound)  # chance had it that too few keys are below it

    def tokenize(
        self, survey: Survey, model: Path, sha256: str, stores: Sequence[str], title: str, steps: StepsSpec
    ) -> list[Tokenize]:
        """Make the tokens of the documents that go to ``stores``, of each shard; returns the tasks that did."""
        folder, fates = self._tokens_of(SPLITS, survey, sha256)
        if not set(stores) < set(SPLITS) or not folder.exists():  # what was made for both splits does for one of them
            folder, fates = self._tokens_of(stores, survey, sha256)
        names = [SPLITS[(KEPT, HELD_OUT).index(fate)] for fate in fates]
        threads = self._threads or self._executor.threads(len(survey.shards))
        tasks = [
            Tokenize(shard, steps, scan.marker, choice, survey.size(i, names), folder, fates, model, sha256, threads)
            for i, (shard, scan, choice) in enumerate(zip(survey.shards, survey.scans, survey.choices))
        ]
        self.run(title, tasks)
        return tasks

    def _tokens_of(self, stores: Sequence[str], survey: Survey, sha256: str) -> tuple[Path, dict[int, str]]:
        """Where the tokens of the documents that go to ``stores`` lie, and the store of each fate."""
        fates = {KEPT: stores[0]} if not set(stores) & set(SPLITS) else dict(zip((KEPT, HELD_OUT), SPLITS))
        fates = {fate: name for fate, name in fates.items() if name in stores}
        return self._scratch / f"tokenize-{key_of(sha256, sorted(fates.items()), *self._texts(survey))}", fates

    def _texts(self, survey: Survey) -> list[Any]:
        """Stands for the text of the documents that are kept, and for which those are."""
        return [
            self._steps.normalize, [shard.key for shard in survey.shards], [c["digest"] for c in survey.chosen]
        ]  # fmt: skip

    def join(self, tasks: Sequence[Tokenize], name: str, writer: StoreWriter, model: Tokenizer) -> None:
        """Append the tokens of all shards to a store, in their order or in the shuffled one."""
        order: Sequence[int] = range(len(tasks))
        if self._steps.shuffle == "shards" and name in SPLITS:
            shuffled = random_permutation(len(tasks), self._steps.shuffle_seed, 0, "shards")
            order = shuffled(np.arange(len(tasks))).tolist()
        meter = Meter(f"writing {name}", self._report, float(len(tasks)))
        tokens_dtype = f"<{np.dtype(dtype_of(model)).str[1:]}"
        for index in order:
            marker = tasks[index].marker
            written = (read_marker(marker) or {})[name]
            tokens, *ends = [
                _as_written(marker.with_suffix(f".{name}.{what}"), dtype, *written[what])
                for what, dtype in (("tokens", tokens_dtype), ("lengths", "<u8"), ("bytes", "<u8"))
            ]
            for block in tokens:
                writer.append(block)
                meter.add(0, 0, len(block))
            for lengths, n_bytes in zip(*ends, strict=True):
                writer.append_documents(lengths, n_bytes)
                meter.add(len(lengths), int(n_bytes.sum()))
            meter.add(0, 0, 0, 1.0)
        meter.done()


def _as_written(path: Path, dtype: str, count: int, digest: str) -> Iterator[NDArray[Any]]:
    """A file of numbers, a block at a time. DataError after the last one unless they are those that were written."""
    told = hashlib.sha256()
    for block in blocks(path, dtype):
        told.update(block.data)
        yield block
    if told.hexdigest() != digest:
        what = path.suffix[1:] if path.suffix == ".tokens" else "entries"
        raise DataError(
            f"{path}: damaged: not the {count} {what} that were written; remove {path.parent} and the same command "
            "makes them again"
        )


def _counts(scanned: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> Counts:
    broken: Counter[str] = Counter()
    for found in scanned:
        broken.update(found["rules"])
    return Counts(
        read=sum(found["records"] for found in scanned),
        bad=sum(found["bad"] for found in chosen),
        empty=sum(found["empty"] for found in chosen),
        rules=dict(sorted(broken.items())),
        duplicates=sum(found["duplicates"] for found in chosen),
        near_duplicates=sum(found["near_duplicates"] for found in chosen),
        kept=sum(found["train"] + found["held_out"] for found in chosen),
        least_position=min((found["least_position"] for found in chosen), default=1.0),
    )
