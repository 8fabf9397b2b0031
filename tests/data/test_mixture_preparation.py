"""The data folder of a mixture: one tokenizer, every source by itself, their held-out documents, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paralm_data import (
    DataError,
    Prepared,
    PreparedMixture,
    Progress,
    SourceSpec,
    Tokenizer,
    TokenizerSpec,
    TokenStore,
    inspect,
    minhash,
    prepare,
    prepare_mixture,
)
from paralm_data.holding import locked
from paralm_data.preparation import Execution
from paralm_data.steps import MinHashRule, StepsSpec

from tests.data.conftest import sentences, snapshot

SPEC = TokenizerSpec(vocab_size=400)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceSpec]:
    """Two corpora of 80 and 50 documents."""
    folder, found = tmp_path_factory.mktemp("two"), {}
    for name, seeds in (("one", range(80)), ("two", range(200, 250))):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": sentences(seed, 1 + seed % 30)}) + "\n" for seed in seeds))
        found[name] = SourceSpec("jsonl", paths=(str(path),))
    return found


@pytest.fixture
def given(prepared: Prepared) -> TokenizerSpec:
    """A tokenizer that is there, which takes no time."""
    return TokenizerSpec(model=prepared.path / "tokenizer.model")


def make(sources: dict[str, Any], out: Path, spec: TokenizerSpec = SPEC, **more: Any) -> PreparedMixture:
    return prepare_mixture(sources, spec, out, 0.2, **more)


def documents(store: TokenStore) -> list[list[int]]:
    return [store.document(i).tolist() for i in range(store.n_documents)]


def test_each_source_is_prepared_with_the_tokenizer_of_all(two: dict[str, SourceSpec], tmp_path: Path) -> None:
    found = make(two, tmp_path / "data")
    assert not found.skipped
    held_out = []
    for name, source in two.items():
        alone = prepare(source, TokenizerSpec(model=tmp_path / "data" / "tokenizer.model"), tmp_path / name, 0.2)
        assert alone.train.manifest.fingerprint == found.train[name].manifest.fingerprint
        held_out += documents(alone.held_out)
        assert not (tmp_path / "data" / "mixture" / name / ".work").exists()
    assert documents(found.held_out) == held_out
    assert found.held_out.n_bytes == int(np.sum(found.held_out.doc_bytes))
    found.held_out.verify()
    assert {store.tokenizer_sha256 for store in found.train.values()} == {found.tokenizer.sha256}
    assert [r.path.relative_to(tmp_path / "data").as_posix() for r in inspect(tmp_path / "data", samples=0)] == [
        "held_out", "mixture/one/train", "mixture/one/held_out", "mixture/two/train", "mixture/two/held_out",
    ]  # fmt: skip


def test_the_tokenizer_is_of_the_sample_of_all_text(two: dict[str, SourceSpec], tmp_path: Path) -> None:
    """With one file of both corpora the same tokenizer is trained; with few bytes a part of it is sampled."""
    lines = [Path(source.paths[0]).read_text() for source in two.values()]
    both = tmp_path / "both.jsonl"
    both.write_text("".join(lines))
    for sample_bytes in (20_000_000, 30_000):
        spec = TokenizerSpec(vocab_size=400, sample_bytes=sample_bytes)
        out = tmp_path / str(sample_bytes)
        mixed = make(two, out, spec)
        whole = prepare(SourceSpec("jsonl", paths=(str(both),)), spec, out / "whole", 0.2)
        assert mixed.tokenizer.sha256 == whole.tokenizer.sha256


def test_twice_is_once_and_an_end_in_between_is_made_good(
    two: dict[str, SourceSpec], given: TokenizerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paralm_data import mixture_preparation

    make(two, tmp_path / "whole", given)
    before = snapshot(tmp_path / "whole")
    again = make(two, tmp_path / "whole", given)
    assert again.skipped
    assert snapshot(tmp_path / "whole") == before

    original, calls = mixture_preparation.prepare, []

    def fails(*arguments: Any) -> Prepared:
        calls.append(arguments[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(mixture_preparation, "prepare", fails)
    with pytest.raises(KeyboardInterrupt):
        make(two, tmp_path / "cut", given)
    monkeypatch.setattr(mixture_preparation, "prepare", original)
    assert not make(two, tmp_path / "cut", given).skipped
    assert [v for k, v in sorted(snapshot(tmp_path / "cut").items())] == [v for k, v in sorted(before.items())]


def test_a_source_prepared_before_is_used_where_it_is(
    two: dict[str, SourceSpec], prepared: Prepared, tmp_path: Path
) -> None:
    found = make({"old": prepared.path, "new": two["one"]}, tmp_path / "data")
    assert found.tokenizer.sha256 == prepared.tokenizer.sha256
    assert found.train["old"].path == prepared.path / "train"
    assert documents(found.held_out)[: prepared.held_out.n_documents] == documents(prepared.held_out)
    assert not (tmp_path / "data" / "mixture" / "old").exists()
    bare = make({"old": prepared.path / "train", "new": two["one"]}, tmp_path / "bare")
    assert bare.train["old"].path == prepared.path / "train"
    assert bare.held_out.n_documents == found.held_out.n_documents - prepared.held_out.n_documents


def test_validation_sets_lie_beside_the_first_text(
    two: dict[str, SourceSpec], given: TokenizerSpec, tmp_path: Path
) -> None:
    shutil.copy(two["two"].paths[0], tmp_path / "more.jsonl")
    more = SourceSpec("jsonl", paths=(str(tmp_path / "more.jsonl"),))
    make(two, tmp_path / "data", given, validation={"more": more})
    store = TokenStore.open(tmp_path / "data" / "mixture" / "one" / "validation" / "more")
    assert store.n_documents == 50
    assert store.tokenizer_sha256 == Tokenizer.load(tmp_path / "data" / "tokenizer.model").sha256


def test_a_validation_set_that_a_source_trains_on_is_refused(
    two: dict[str, SourceSpec], prepared: Prepared, given: TokenizerSpec, tmp_path: Path
) -> None:
    line = r"^validation set 'more': .* is read by the source, too"
    for spec in (SPEC, given):
        with pytest.raises(DataError, match=line):
            make(two, tmp_path / "data", spec, validation={"more": two["two"]})
    of_old = SourceSpec(**prepared.train.manifest.source["source"])
    with pytest.raises(DataError, match=line):
        make({"old": prepared.path, "new": two["one"]}, tmp_path / "data", given, validation={"more": of_old})
    assert not (tmp_path / "data").exists()


def test_held_out_text_is_no_source(two: dict[str, SourceSpec], prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sources\.old: .*held_out is held-out text: .*; give .*, or its train"):
        make({"old": prepared.path / "held_out", "new": two["one"]}, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_steps_and_workers_are_those_of_every_source(
    two: dict[str, SourceSpec], given: TokenizerSpec, tmp_path: Path
) -> None:
    steps = StepsSpec.of({"length": {"min_characters": 200}})
    one = make(two, tmp_path / "one", given, steps=steps, execution=Execution(workers=1))
    many = make(two, tmp_path / "many", given, steps=steps, execution=Execution(workers=2, shard_bytes=4096))
    assert one.train["two"].n_documents < 50
    for name in two:
        assert one.train[name].manifest.fingerprint == many.train[name].manifest.fingerprint


def test_what_is_refused(two: dict[str, SourceSpec], prepared: Prepared, tmp_path: Path) -> None:
    other = prepare(two["one"], TokenizerSpec(vocab_size=300), tmp_path / "other", 0.2)
    with pytest.raises(DataError, match=r"sources\.b: .*other/train was made with tokenizer .* prepare it again"):
        make({"a": prepared.path, "b": other.path}, tmp_path / "data")
    with pytest.raises(DataError, match="no source has a held-out part"):
        make({"a": prepared.path / "train"}, tmp_path / "none")
    make(two, tmp_path / "made")
    with pytest.raises(DataError, match="vocab_size: was 400, is 500"):
        make(two, tmp_path / "made", TokenizerSpec(vocab_size=500))
    fewer = {**two, "two": SourceSpec("jsonl", paths=two["two"].paths, max_documents=20)}
    with pytest.raises(DataError, match="max_documents: was None, is 20"):
        make(fewer, tmp_path / "made")
    shutil.rmtree(tmp_path / "made" / "mixture" / "two")
    model = TokenizerSpec(model=tmp_path / "made" / "tokenizer.model")
    with pytest.raises(DataError, match="made from something else"):
        make(fewer, tmp_path / "made", model)


@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_no_source_trains_on_what_another_holds_out(
    two: dict[str, SourceSpec], given: TokenizerSpec, tmp_path: Path, fraction: float
) -> None:
    """Both have the same documents: those between the two fractions would be trained on and scored."""
    before = prepare(two["one"], given, tmp_path / "before", fraction)
    least, most = sorted(["before", "new"], key={"before": fraction, "new": 0.2}.__getitem__)
    words = f"{least} has held_out_fraction {min(fraction, 0.2)}, and {most} has {max(fraction, 0.2)}"
    with pytest.raises(DataError, match=words):
        make({"before": before.path, "new": two["one"]}, tmp_path / "data", given)
    assert not (tmp_path / "data").exists()
    if fraction < 0.2:
        make({"before": before.path}, tmp_path / "alone", given)  # its own fraction is that of all
    else:  # of one store nothing is scored, and it trains on less than the other
        make({"before": before.path / "train", "new": two["one"]}, tmp_path / "bare", given)


def test_what_a_killed_one_left_is_removed(two: dict[str, SourceSpec], given: TokenizerSpec, tmp_path: Path) -> None:
    whole = snapshot(make(two, tmp_path / "data", given).path)
    (tmp_path / "data" / "held_out").rename(tmp_path / "data" / ".held_out.tmp-1")
    (tmp_path / "data" / ".tokenizer.json.tmp-2").write_bytes(b"{")
    assert not make(two, tmp_path / "data", given).skipped
    assert snapshot(tmp_path / "data") == whole


def test_two_at_once_are_refused_and_two_that_find_all_there_are_not(
    two: dict[str, SourceSpec], tmp_path: Path
) -> None:
    refused = []

    def again(_: Progress) -> None:
        with pytest.raises(DataError, match=f"^{tmp_path / 'data'}: another process is preparing it"):
            make(two, tmp_path / "data")
        refused.append(1)

    make(two, tmp_path / "data", progress=again)
    assert refused
    with locked(tmp_path / "data"):
        assert make(two, tmp_path / "data").skipped


def test_every_source_is_looked_at_before_the_work_on_any(
    two: dict[str, SourceSpec], given: TokenizerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = SourceSpec("jsonl", paths=(str(tmp_path / "absent.jsonl"),))
    for spec in (SPEC, given):
        with pytest.raises(DataError, match=r"absent\.jsonl"):
            make({"one": two["one"], "b": absent}, tmp_path / "data", spec)
        with pytest.raises(DataError, match=r"absent\.jsonl"):
            make(two, tmp_path / "data", spec, validation={"more": absent})
    monkeypatch.setitem(sys.modules, "rensa", None)
    minhash._library.cache_clear()
    steps = StepsSpec(minhash=MinHashRule(enabled=True))
    for spec in (SPEC, given):
        with pytest.raises(DataError, match="minhash"):
            make(two, tmp_path / "data", spec, steps=steps)
    assert not (tmp_path / "data").exists()


def test_a_text_that_is_gone_when_all_is_made_is_not_asked_for(
    two: dict[str, SourceSpec], given: TokenizerSpec, tmp_path: Path
) -> None:
    shutil.copy(two["one"].paths[0], tmp_path / "one.jsonl")
    mine = {"one": SourceSpec("jsonl", paths=(str(tmp_path / "one.jsonl"),)), "two": two["two"]}
    make(mine, tmp_path / "data", given)
    (tmp_path / "one.jsonl").unlink()
    assert make(mine, tmp_path / "data", given).skipped
    shutil.rmtree(tmp_path / "data" / "held_out")
    assert not make(mine, tmp_path / "data", given).skipped


def test_a_tokenizer_without_its_description_is_named(
    two: dict[str, SourceSpec], given: TokenizerSpec, tmp_path: Path
) -> None:
    make(two, tmp_path / "data", given)
    (tmp_path / "data" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: missing or not whole beside tokenizer\.model"):
        make(two, tmp_path / "data", given)
