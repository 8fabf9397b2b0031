"""Preparing a corpus: nothing lost, nothing twice, each part made once, an interruption leaves whole parts only."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import paralm_data.tokenizer_making
import pytest
from paralm_data import (
    DataError,
    Execution,
    Prepared,
    Progress,
    SourceSpec,
    Tokenizer,
    TokenizerSpec,
    TokenStore,
    is_prepared,
    prepare,
)
from paralm_data.sources import check_apart
from paralm_data.split import digest, is_held_out
from paralm_data.stages import Stages

from tests.conftest import tree

SPEC = TokenizerSpec(vocab_size=400)


def decoded(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(store.document(i)) for i in range(store.n_documents)]


def jsonl(path: Path, texts: list[str]) -> SourceSpec:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceSpec("jsonl", paths=(str(path),))


def test_every_document_is_in_one_split_with_its_text_and_bytes(prepared: Prepared, texts: list[str]) -> None:
    held_out = [text for text in texts if is_held_out(digest(text), 0.2)]
    train = [text for text in texts if text not in held_out]
    assert decoded(prepared.train, prepared.tokenizer) == train
    assert decoded(prepared.held_out, prepared.tokenizer) == held_out
    for store, part in ((prepared.train, train), (prepared.held_out, held_out)):
        assert [store.document_bytes(i) for i in range(len(part))] == [len(text.encode()) for text in part]
        assert store.n_bytes == sum(len(text.encode()) for text in part)
        TokenStore.open(store.path, verify="full")
    assert prepared.counts is not None
    assert prepared.counts.kept == len(texts)
    assert not prepared.skipped


@pytest.mark.parametrize("shard_bytes", [64 << 20, 10_000])
def test_the_defaults_are_what_they_were(
    tmp_path: Path, texts: list[str], shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which documents, in which order, and what the tokenizer is trained on: as release 0.1 had it, which read a source
    as one stream. The hashes were made by that code, on this corpus."""
    samples: list[str] = []

    def train_model(pieces: Iterator[str], vocab_size: int, kind: str) -> bytes:
        samples.extend(pieces)
        return prepared_model(iter(samples), vocab_size, kind)

    prepared_model = paralm_data.tokenizer_making.train_model
    monkeypatch.setattr("paralm_data.tokenizer_making.train_model", train_model)
    source = jsonl(tmp_path / "a.jsonl", [*texts, "", *texts[:9]])
    spec = TokenizerSpec(vocab_size=400, sample_bytes=20_000)
    result = prepare(source, spec, tmp_path / "out", 0.2, execution=Execution("local", 1, shard_bytes))
    found = [hashlib.sha256((store.path / "doc_bytes.bin").read_bytes()).hexdigest()
             for store in (result.train, result.held_out)]  # fmt: skip
    assert found == [
        "eb404f4b07272707964cc56088e56063aa63bc8725aa7b4386e6d2101d3b16bb",
        "736ef1a54383f5d445a017efdc94ec79a2589638ee3ec5484ac5403f01d8d22e",
    ]
    sample = hashlib.sha256("\0".join(samples).encode()).hexdigest()
    assert sample == "71966d8e5acc7ced59952f6fec5e880619f51ee9481506496a09936010286862"
    assert result.train.manifest.source == {
        "source": source.as_dict(), "held_out_fraction": 0.2, "split": "train"
    }  # fmt: skip


def test_duplicates_and_empty_documents_are_left_out(tmp_path: Path, texts: list[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", [texts[0], "", *texts, texts[3], ""])
    result = prepare(source, SPEC, tmp_path / "out", 0.2)
    assert result.train.n_documents + result.held_out.n_documents == len(texts)
    assert result.counts is not None
    assert (result.counts.empty, result.counts.duplicates) == (2, 2)


def test_what_is_done_is_not_done_again(tmp_path: Path, source: SourceSpec) -> None:
    assert not is_prepared(source, SPEC, tmp_path / "out", 0.2)
    prepare(source, SPEC, tmp_path / "out", 0.2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    said: list[Progress] = []
    assert prepare(source, SPEC, tmp_path / "out", 0.2, progress=said.append).skipped
    assert is_prepared(source, SPEC, tmp_path / "out", 0.2)
    assert said == []
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize("missing", ["train", "held_out", "validation/more", "all but the tokenizer"])
def test_a_missing_part_alone_is_made_again(tmp_path: Path, source: SourceSpec, texts: list[str], missing: str) -> None:
    validation = {"more": jsonl(tmp_path / "more.jsonl", ["more", "and more"])}
    prepare(source, SPEC, tmp_path / "out", 0.2, validation)
    whole = tree(tmp_path / "out")
    gone = ["train", "held_out", "validation/more"] if missing.startswith("all") else [missing]
    for name in gone:
        for path in (tmp_path / "out" / name).iterdir():
            path.unlink()
        (tmp_path / "out" / name).rmdir()
    assert not is_prepared(source, SPEC, tmp_path / "out", 0.2, validation)
    assert not prepare(source, SPEC, tmp_path / "out", 0.2, validation).skipped
    assert tree(tmp_path / "out") == whole


def test_threads_batches_and_the_order_of_documents_change_no_document(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare(jsonl(tmp_path / "a.jsonl", texts), SPEC, tmp_path / "one", 0.2, threads=1)
    monkeypatch.setattr("paralm_data.tokenizing.BATCH_BYTES", 1000)
    shuffled = random.Random(0).sample(texts, len(texts))
    two = prepare(jsonl(tmp_path / "a.jsonl", shuffled), SPEC, tmp_path / "two", 0.2, threads=3)
    assert one.tokenizer.sha256 == two.tokenizer.sha256
    for a, b in ((one.train, two.train), (one.held_out, two.held_out)):
        assert sorted(decoded(a, one.tokenizer)) == sorted(decoded(b, one.tokenizer))
        assert (a.n_tokens, a.n_bytes) == (b.n_tokens, b.n_bytes)


def test_the_tokenizer_has_not_seen_the_held_out_text(tmp_path: Path, texts: list[str]) -> None:
    kept = [text for text in texts if not is_held_out(digest(text), 0.2)]
    one = prepare(jsonl(tmp_path / "a.jsonl", texts), SPEC, tmp_path / "one", 0.2)
    with pytest.raises(DataError, match="held-out split is empty"):
        prepare(jsonl(tmp_path / "b.jsonl", kept), SPEC, tmp_path / "two", 0.2)
    alone = Tokenizer.train(kept, tmp_path / "alone.model", 400)
    assert alone.vocab_size == one.tokenizer.vocab_size
    assert sorted(map(alone.piece, range(400))) == sorted(map(one.tokenizer.piece, range(400)))


def test_validation_sets_are_whole(tmp_path: Path, source: SourceSpec, texts: list[str]) -> None:
    extra = [texts[0], "new", "", "new"]
    result = prepare(source, SPEC, tmp_path / "out", 0.2, {"extra": jsonl(tmp_path / "e.jsonl", extra)})
    assert decoded(result.validation["extra"], result.tokenizer) == [texts[0], "new", "new"]
    assert result.validation["extra"].path == tmp_path / "out" / "validation" / "extra"
    second = jsonl(tmp_path / "second.jsonl", texts)  # what the source trains on, but another file
    later = {"extra": SourceSpec("jsonl", paths=(str(tmp_path / "e.jsonl"),)), "second": second}
    assert not prepare(source, SPEC, tmp_path / "out", 0.2, later).skipped
    assert (tmp_path / "out" / "validation" / "second").is_dir()


def test_a_validation_set_of_what_is_trained_on_is_refused(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "a").mkdir()
    first, second = jsonl(tmp_path / "a/1.jsonl", texts), jsonl(tmp_path / "a/2.jsonl", texts[:9])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a/2.jsonl")
    os.utime(tmp_path / "a/1.jsonl", ns=(7, 7))
    source = SourceSpec("jsonl", paths=(str(tmp_path / "a"),))
    link = SourceSpec("jsonl", paths=(str(tmp_path / "link.jsonl"),))
    for validation, told in ((first, "a/1.jsonl"), (link, "link.jsonl"), (SourceSpec("text", paths=second.paths), "2")):
        with pytest.raises(DataError, match=f"^validation set 'v': .*{told}.* is read by the source, too: it would be"):
            prepare(source, SPEC, tmp_path / "out", 0.2, {"v": validation})
    with pytest.raises(DataError, match="the standard library is read by the source"):
        prepare(SourceSpec(), SPEC, tmp_path / "out", 0.2, {"v": SourceSpec(subset="docs")})
    hub = SourceSpec("datasets", dataset="d", split="train")
    with pytest.raises(DataError, match=r"d\[train\] is read by the source"):
        check_apart(hub, "v", hub)
    check_apart(hub, "v", replace(hub, split="test"))
    check_apart(SourceSpec(subset="code"), "v", SourceSpec(subset="docs"))
    check_apart(source, "v", replace(second, text_key="title"))  # other text of the same records
    assert not (tmp_path / "out").exists()


def test_a_given_model_is_used_as_it_is(tmp_path: Path, source: SourceSpec, prepared: Prepared) -> None:
    given = TokenizerSpec(model=prepared.path / "tokenizer.model")
    result = prepare(source, given, tmp_path / "out", 0.2)
    assert result.tokenizer.sha256 == prepared.tokenizer.sha256
    assert (result.train.path / "tokens.bin").read_bytes() == (prepared.train.path / "tokens.bin").read_bytes()
    assert prepare(source, given, tmp_path / "out", 0.2).skipped


def test_what_the_tokenizer_is_is_recorded(prepared: Prepared, source: SourceSpec) -> None:
    info = json.loads((prepared.path / "tokenizer.json").read_text())
    assert info["sha256"] == prepared.tokenizer.sha256
    assert info["ids"] == {"unk": 0, "bos": 1, "eos": 2, "pad": 3}
    assert info["lossless"] is True
    assert info["spec"]["source"] == source.as_dict()


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({"held_out_fraction": 0.3}, "0.2", "0.3"),
        ({"tokenizer": TokenizerSpec(vocab_size=500)}, "400", "500"),
        ({"tokenizer": TokenizerSpec(vocab_size=400, kind="unigram")}, "'bpe'", "'unigram'"),
        ({"source": SourceSpec("python-stdlib")}, "'jsonl'", "'python-stdlib'"),
        ({"text_key": "content"}, "'text'", "'content'"),
    ],
)
def test_a_folder_made_from_other_specs_is_refused_with_both_values(
    copied: Path, source: SourceSpec, change: dict[str, Any], old: str, new: str
) -> None:
    asked: dict[str, Any] = {"source": source, "tokenizer": SPEC, "held_out_fraction": 0.2, **change}
    if "text_key" in change:
        asked["source"] = SourceSpec("jsonl", source.paths, text_key=asked.pop("text_key"))
    before = tree(copied)
    for call in (prepare, is_prepared):
        with pytest.raises(DataError) as caught:
            call(out=copied, **asked)
        assert f"was {old}" in str(caught.value)
        assert f"is {new}" in str(caught.value)
    assert tree(copied) == before


def test_an_empty_held_out_split_says_which_fraction_would_do(tmp_path: Path, texts: list[str]) -> None:
    few = [text for text in texts if 0.1 < int.from_bytes(digest(text)[:8], "big") / 2**64 < 0.45][:6]
    source = jsonl(tmp_path / "a.jsonl", few)
    with pytest.raises(
        DataError, match=r"held-out split is empty.*raise data.held_out_fraction \(above (0\.\d+)\)"
    ) as e:
        prepare(source, TokenizerSpec(vocab_size=300), tmp_path / "out", 0.02)
    fraction = float(str(e.value).split("above ")[1].split(")")[0])
    assert prepare(source, TokenizerSpec(vocab_size=300), tmp_path / "out", fraction).held_out.n_documents == 1


def test_progress_counts_what_was_done(tmp_path: Path, source: SourceSpec, texts: list[str]) -> None:
    said: list[Progress] = []
    result = prepare(source, SPEC, tmp_path / "out", 0.2, progress=said.append)
    ends = {step.stage: step for step in said if step.done}
    stages = ["reading", "sampling", "training the tokenizer", "tokenizing", "writing train", "writing held_out"]
    assert list(ends) == stages
    assert all(step.fraction in (None, 1.0) for step in ends.values())
    last = ends["tokenizing"]
    assert last.documents == len(texts)
    assert last.bytes == sum(len(text.encode()) for text in texts)
    assert last.tokens == result.train.n_tokens + result.held_out.n_tokens
    assert last.mb_per_s > 0


def test_a_failure_on_the_way_leaves_whole_parts_only(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts)
    whole = tree(prepare(source, SPEC, tmp_path / "whole", 0.2).path)
    monkeypatch.setattr("paralm_data.tokenizing.BATCH_BYTES", 10_000)
    monkeypatch.setattr("paralm_data.progress.Meter.EVERY", 0.0)

    def stop(step: Progress) -> None:
        if step.stage == "tokenizing" and step.documents > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, SPEC, tmp_path / "out", 0.2, progress=stop)
    whole_parts = {name for name in tree(tmp_path / "out") if not name.startswith(".work/")}
    assert whole_parts == {"tokenizer.model", "tokenizer.json"}
    prepare(source, SPEC, tmp_path / "out", 0.2)
    assert tree(tmp_path / "out") == whole


KILLED = """
import os, signal, sys
from paralm_data import SourceSpec, TokenizerSpec, prepare
left = int(sys.argv[3])
def step(*_):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
original = os.fsync
os.fsync = lambda descriptor: (step(), original(descriptor))
prepare(SourceSpec("jsonl", paths=(sys.argv[1],)), TokenizerSpec(vocab_size=400), sys.argv[2], 0.2, threads=1)
"""


@pytest.mark.parametrize("steps", [0, 3, 6, 12])
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, corpus: Path, prepared: Prepared, steps: int) -> None:
    # The process kills itself at the given fsync; each file and each folder is made durable by one.
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(corpus), str(out), str(steps)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    for name in ("train", "held_out"):
        if (out / name).exists():
            TokenStore.open(out / name, verify="full")
    source = SourceSpec("jsonl", paths=(str(corpus),))
    assert not prepare(source, SPEC, out, 0.2, threads=1).skipped
    assert tree(out) == tree(prepared.path)


def test_what_tasks_that_were_killed_left_half_written_goes_when_it_goes_on(tmp_path: Path, source: SourceSpec) -> None:
    out = tmp_path / "out"

    def stop(progress: Progress) -> None:
        if progress.stage == "tokenizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, SPEC, out, 0.2, threads=1, progress=stop)
    (marker,) = out.glob(".work/choose-*/*.json")
    half = marker.with_name(".00000000.fates.tmp-0123456789abcdef")
    half.write_bytes(bytes(1000))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, SPEC, out, 0.2, threads=1, progress=stop)
    assert marker.exists()
    assert not half.exists()


def test_a_saved_dataset_that_was_replaced_is_read_anew(tmp_path: Path, texts: list[str]) -> None:
    import datasets

    source = SourceSpec("datasets", dataset=str(tmp_path / "set"))
    few, spec = [f"few {i}" for i in range(20)], TokenizerSpec(vocab_size=400)
    datasets.Dataset.from_dict({"text": few}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="more than this corpus supports"):
        prepare(source, spec, tmp_path / "out", 0.2, threads=1)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "set")
    result = prepare(source, spec, tmp_path / "out", 0.2, threads=1)
    assert result.counts is not None
    assert result.counts.read == len(texts)


def test_two_preparations_at_once_are_refused(tmp_path: Path, source: SourceSpec) -> None:
    def again(step: Progress) -> None:
        with pytest.raises(DataError, match="another process is preparing it"):
            prepare(source, SPEC, tmp_path / "out", 0.2)

    prepare(source, SPEC, tmp_path / "out", 0.2, progress=again)


@pytest.mark.parametrize("name", ["a/b", "..", "", "train", "held_out", ".x"])
def test_a_validation_set_has_a_plain_name(tmp_path: Path, source: SourceSpec, name: str) -> None:
    with pytest.raises(DataError, match="validation set"):
        prepare(source, SPEC, tmp_path / "out", 0.2, {name: source})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["sampling", "tokenizing", "tokenizing more"])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: lines[:50], "it has 50 records, and had 160"),
        (lambda lines: [*lines, lines[0]], "it has more than the 160 records it had before"),
        (lambda lines: [line.replace("a", "aa") for line in lines], r"bytes, and had [\d,]+"),
        (lambda lines: [line.replace("a", "o") for line in lines], r"jsonl:\d+: changed .*: its text is another"),
        (lambda lines: ["no json\n", *lines[1:]], r"jsonl:1: changed while it was prepared: not a JSON record"),
    ],
)
def test_text_that_changes_under_a_preparation_is_refused(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, stage: str, change: Any, complaint: str
) -> None:
    """Between the reading that decides what is kept and a later one; what is stored is what was counted."""
    good = jsonl(tmp_path / "good.jsonl", texts)
    source = jsonl(tmp_path / "a.jsonl", texts)
    one, more = (good, source) if stage.endswith("more") else (source, good)
    original = Stages.run

    def run(self: Stages, title: str, *arguments: Any, **options: Any) -> Any:
        if title == stage:
            lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "a.jsonl").write_text("".join(change(lines)))
        return original(self, title, *arguments, **options)

    monkeypatch.setattr(Stages, "run", run)
    with pytest.raises(DataError, match=complaint) as caught:
        prepare(one, SPEC, tmp_path / "out", 0.2, {"more": more})
    assert "changed while it was prepared" in str(caught.value)
    assert "\n" not in str(caught.value)
    stores = {"train", "held_out", "validation"} if not stage.endswith("more") else {"validation/more"}
    assert not any((tmp_path / "out" / name).exists() for name in stores)
    monkeypatch.undo()
    jsonl(tmp_path / "a.jsonl", texts)
    assert tree(prepare(one, SPEC, tmp_path / "out", 0.2, {"more": more}).path)
