"""What is done to documents before they become tokens: bad records, rules, duplicates, the tokenizer's sample."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paralm_data import (
    DataError,
    SourceSpec,
    TokenizerSpec,
    TokenStore,
    documents,
    is_prepared,
    minhash,
    prepare,
    rules,
)
from paralm_data.duplicates import fates_of
from paralm_data.executors.local import LocalExecutor
from paralm_data.preparation import Execution, Prepared
from paralm_data.sampling import sample_of
from paralm_data.scanning import DUPLICATE, HELD_OUT, KEPT
from paralm_data.scratch import map_array
from paralm_data.split import Distinct, digest, is_held_out
from paralm_data.stages import Stages
from paralm_data.steps import LanguageRule, LengthRule, MinHashRule, StepsSpec
from paralm_data.tokenizer_training import Sample

from tests.data.conftest import sentences

SPEC = TokenizerSpec(vocab_size=400)
ENGLISH = (
    "The bridge over the river was built to last, and the people of the town have always been proud of that. "
    "Every spring they walk across it with their children, and they tell the old stories again. "
    "It is said that the builder never slept while the stones were being set. "
    "Nobody knows whether that is true, but it is a good story. "
    "On the other side there is a small garden, where the flowers open before those in the valley do. "
)
GERMAN = (
    "Die Brücke über den Fluss wurde gebaut, um zu halten, und die Leute der Stadt sind immer stolz darauf gewesen. "
    "Jeden Frühling gehen sie mit ihren Kindern hinüber und erzählen die alten Geschichten noch einmal. "
)


def jsonl(path: Path, texts: list[str]) -> SourceSpec:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceSpec("jsonl", paths=(str(path),))


def decoded(store: TokenStore, prepared: Prepared) -> list[str]:
    return [prepared.tokenizer.decode(store.document(i)) for i in range(store.n_documents)]


def kept(prepared: Prepared) -> set[str]:
    return {*decoded(prepared.train, prepared), *decoded(prepared.held_out, prepared)}


# -- bad records -------------------------------------------------------------------------------------------------

BAD = {
    3: (b'{"text": "na\xefve"}', "not UTF-8 text (byte 0xef)"),
    40: (b'{"text": "unfinished', "not a JSON record (Invalid control character at: line 1 column 21 (char 20))"),
    41: (b'{"text": 5}', "'text' is a int, not text"),
    90: (b'{"body": "x"}', "no 'text' (text_key); the record has: body"),
    150: (b'{"text": "ok \\ud83d"}', "'text' has half a surrogate pair at character 3"),
    151: (b'["text"]', "the record is a list, not an object with a 'text'"),
    152: (b'{"text": "' + b"x" * 3000 + b'"}', "longer than 3000 bytes (data.steps.max_document_bytes)"),
}


@pytest.fixture
def with_bad(tmp_path: Path, texts: list[str]) -> SourceSpec:
    """The documents, with a bad record at each line of BAD."""
    good = iter(text for text in texts if len(json.dumps({"text": text})) < 2900)
    number, lines = 0, []
    for number in range(1, 153):
        lines.append(BAD[number][0] if number in BAD else json.dumps({"text": next(good, f"more {number}")}).encode())
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return SourceSpec("jsonl", paths=(str(path),))


@pytest.mark.parametrize(("shard_bytes", "workers"), [(1 << 26, 1), (5_000, 1), (5_000, 2)])
def test_bad_records_are_listed_with_their_places_and_the_others_are_kept(
    with_bad: SourceSpec, tmp_path: Path, shard_bytes: int, workers: int
) -> None:
    execution = Execution("local", workers, shard_bytes, max_bad_records=len(BAD))
    result = prepare(
        with_bad, SPEC, tmp_path / "out", 0.2, steps=StepsSpec(max_document_bytes=3000), execution=execution
    )
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    path = with_bad.paths[0]
    assert listed == [{"place": f"{path}:{line}", "problem": problem} for line, (_, problem) in BAD.items()]
    assert result.counts is not None
    assert (result.counts.read, result.counts.bad) == (152, len(BAD))
    assert len(kept(result)) == result.counts.kept == 152 - len(BAD) - result.counts.duplicates


def test_half_a_surrogate_pair_in_what_is_told_of_a_bad_record_is_listed(tmp_path: Path, texts: list[str]) -> None:
    corpus = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))  # a name that is not UTF-8
    lines = [b'{"\\ud83d": 1}', *(json.dumps({"text": text}).encode() for text in texts)]
    corpus.write_bytes(b"\n".join(lines) + b"\n")
    execution = Execution("local", 1, max_bad_records=1)
    result = prepare(SourceSpec("jsonl", (str(corpus),)), SPEC, tmp_path / "out", 0.2, execution=execution)
    listed = (tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8")
    assert json.loads(listed) == {"place": f"{corpus}:1", "problem": "no 'text' (text_key); the record has: \ud83d"}
    assert result.train.manifest.source["source"]["paths"] == [str(corpus)]


@pytest.mark.parametrize("shard_bytes", [1 << 26, 3_000])
@pytest.mark.parametrize("limit", [0, 1, 6])
def test_one_bad_record_too_many_ends_it_with_one_line(
    with_bad: SourceSpec, tmp_path: Path, limit: int, shard_bytes: int
) -> None:
    steps, where = StepsSpec(max_document_bytes=3000), list(BAD)[limit]
    with pytest.raises(DataError) as caught:
        prepare(
            with_bad, SPEC, tmp_path / "out", 0.2, steps=steps,
            execution=Execution("local", 1, shard_bytes, max_bad_records=limit),
        )  # fmt: skip
    message = str(caught.value)
    # The first of all that is too many, or of a shard that has so many by itself.
    found = next(line for line in BAD if message.startswith(f"{with_bad.paths[0]}:{line}: {BAD[line][1]}"))
    assert found == where or (shard_bytes == 3_000 and found > where)
    assert ("data.max_bad_records allows" in message) == (limit > 0)
    assert "\n" not in message
    assert not (tmp_path / "out" / "train").exists()
    more = Execution("local", 1, shard_bytes, max_bad_records=7)
    assert prepare(with_bad, SPEC, tmp_path / "out", 0.2, steps=steps, execution=more).counts is not None


def test_a_damaged_file_is_no_bad_record(tmp_path: Path) -> None:
    import gzip

    data = gzip.compress(b"".join(b'{"text": "record %d"}\n' % i for i in range(5000)))
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-40])
    source = SourceSpec("jsonl", paths=(str(tmp_path),))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: the compressed file is truncated"):
        prepare(source, SPEC, tmp_path / "out", 0.2, execution=Execution(max_bad_records=10**6))


# -- rules -------------------------------------------------------------------------------------------------------


def test_normalisation_comes_before_everything_else(tmp_path: Path, texts: list[str]) -> None:
    twice = ["e\u0301 " * 30, "é " * 30, "ﬁne " * 30]
    source = jsonl(tmp_path / "a.jsonl", [*texts, *twice])
    plain = prepare(source, SPEC, tmp_path / "plain", 0.2)
    composed = prepare(source, SPEC, tmp_path / "nfc", 0.2, steps=StepsSpec(normalize="nfc"))
    compatible = prepare(source, SPEC, tmp_path / "nfkc", 0.2, steps=StepsSpec(normalize="nfkc"))
    assert kept(plain) >= set(twice)
    assert kept(composed) >= set(twice[1:])
    assert twice[0] not in kept(composed)
    assert "fine " * 30 in kept(compatible)
    assert composed.counts is not None
    assert composed.counts.duplicates == 1
    assert composed.train.manifest.source["steps"] == {"normalize": "nfc"}
    assert "steps" not in plain.train.manifest.source


def test_length_is_in_characters(tmp_path: Path, texts: list[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", [*texts, "é" * 10, "é" * 11, "x" * 5000, "y" * 5001])
    result = prepare(source, SPEC, tmp_path / "out", 0.2, steps=StepsSpec(length=LengthRule(11, 5000)))
    found = kept(result)
    assert {"é" * 11, "x" * 5000} <= found
    assert not {"é" * 10, "y" * 5001} & found
    assert result.counts is not None
    assert result.counts.rules == {"length": 2 + sum(not 11 <= len(text) <= 5000 for text in texts)}


def test_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    assert rules.language(ENGLISH)[0] == "en"
    assert rules.language(GERMAN)[0] == "de"
    texts = [f"{text} {i}" for i in range(40) for text in (ENGLISH, GERMAN)]
    steps = StepsSpec(language=LanguageRule(("de",)))
    source = jsonl(tmp_path / "a.jsonl", texts)
    result = prepare(source, TokenizerSpec(vocab_size=300), tmp_path / "out", 0.2, steps=steps)
    assert kept(result) == set(texts[1::2])
    with pytest.raises(DataError, match="language 'english' is unknown"):
        rules.check(StepsSpec(language=LanguageRule(("english",))))


QUALITY: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "too few words": ("gopher", "words", lambda good: good[:200]),
    "long words": ("gopher", "mean word length", lambda good: good + "x" * 3000),
    "symbols": ("gopher", "symbols", lambda good: good + "# " * 40),
    "bullets": ("gopher", "bullets", lambda good: "\n".join(f"- {part}" for part in good.split(". "))),
    "ellipses": ("gopher", "ellipses", lambda good: "\n".join(part + "…" for part in good.split(". "))),
    "numbers": ("gopher", "alphabetic words", lambda good: good + "123 456 " * 40),
    "no stop words": ("gopher", "stop words", lambda good: "purple elephants dancing quietly " * 30),
    "lines again": ("gopher_repetition", "duplicate lines", lambda good: "a line\n" * 3 + "another line\nmore\nless"),
    "paragraphs again": (
        "gopher_repetition", "duplicate paragraphs",
        lambda good: "\n".join(f"line {i} of its own" for i in range(40)) + "\n\nonce\n\nonce",
    ),
    "one word": ("gopher_repetition", "top 2-gram", lambda good: good + "well well " * 60),
    "a part again": ("gopher_repetition", "duplicate 5-grams", lambda good: ENGLISH + "So be it. " + ENGLISH[:300]),
    "code": ("c4", "curly brace", lambda good: good + "{"),
    "lorem": ("c4", "lorem ipsum", lambda good: good + "Lorem Ipsum dolor."),
    "four sentences": ("c4", "sentences", lambda good: "One. Two! Three? Four."),
}  # fmt: skip


@pytest.mark.parametrize("name", QUALITY)
def test_a_quality_rule_says_what_a_text_breaks(name: str) -> None:
    rule, part, spoil = QUALITY[name]
    good = ENGLISH + "One more sentence, which is not like the others, ends it. "
    assert rules.QUALITY[rule](good) is None
    assert rules.broken_rule(spoil(good), StepsSpec(quality=(rule,))) == f"{rule}: {part}"


def test_rules_are_counted_by_what_was_broken(tmp_path: Path) -> None:
    texts = [f"Number {i}. {ENGLISH}" for i in range(30)] + ["short {", *(f"{ENGLISH} {{{i}" for i in range(4))]
    steps = StepsSpec(quality=("c4",))
    result = prepare(
        jsonl(tmp_path / "a.jsonl", texts), TokenizerSpec(vocab_size=300), tmp_path / "out", 0.2, steps=steps
    )
    recorded = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert recorded["rules"] == {"c4: curly brace": 5}
    assert (recorded["read"], recorded["kept"]) == (35, 30)
    assert kept(result) == set(texts[:30])


@pytest.mark.parametrize(
    ("steps", "library"),
    [(StepsSpec(minhash=MinHashRule(enabled=True)), "rensa"), (StepsSpec(language=LanguageRule(("en",))), "py3langid")],
)
def test_a_library_that_is_not_installed_is_one_line(
    tmp_path: Path, source: SourceSpec, monkeypatch: pytest.MonkeyPatch, steps: StepsSpec, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.langid", None)
    minhash._library.cache_clear()
    rules._identifier.cache_clear()
    with pytest.raises(DataError, match=rf"needs {library} .*; install paralm\[corpus\]$"):
        prepare(source, SPEC, tmp_path / "out", 0.2, steps=steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepsSpec(normalize="NFC "), "normalisation 'NFC ' is unknown"),
        (lambda: StepsSpec(quality=("gofer",)), "quality rule 'gofer' is unknown; did you mean 'gopher'"),
        (lambda: StepsSpec(length=LengthRule(10, 5)), "max_characters 5 is below"),
        (lambda: StepsSpec(minhash=MinHashRule(bands=0)), "minhash.bands is 0"),
        (lambda: StepsSpec(shuffle="documents"), "shuffle 'documents' is unknown"),
    ],
)
def test_a_step_that_is_none_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_a_folder_made_with_other_steps_is_refused(tmp_path: Path, source: SourceSpec) -> None:
    steps = StepsSpec(length=LengthRule(20))
    prepare(source, SPEC, tmp_path / "out", 0.2, steps=steps)
    assert is_prepared(source, SPEC, tmp_path / "out", 0.2, steps=steps)
    with pytest.raises(DataError, match=r"steps: was \{'length': \{'min_characters': 20\}\}, is None"):
        prepare(source, SPEC, tmp_path / "out", 0.2)
    other = StepsSpec(length=LengthRule(21))
    with pytest.raises(DataError, match=r"steps.length.min_characters: was 20, is 21"):
        prepare(source, SPEC, tmp_path / "out", 0.2, steps=other)


# -- duplicates --------------------------------------------------------------------------------------------------


def near(text: str, changes: int, seed: int) -> str:
    """The text with words replaced."""
    draw, words = random.Random(seed), text.split(" ")
    for at in draw.sample(range(len(words)), changes):
        words[at] = f"changed{draw.randint(0, 10**9)}"
    return " ".join(words)


@pytest.mark.parametrize("shard_bytes", [2_000, 1 << 26])
def test_of_near_duplicates_the_first_is_kept(
    tmp_path: Path, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rensa")
    monkeypatch.setattr("paralm_data.stages.PARTITION", 100)  # many partitions
    monkeypatch.setattr("paralm_data.duplicates.MERGED", 400)  # of keys of several shards
    monkeypatch.setattr("paralm_data.scanning.RUN", 64)  # many runs
    base = [sentences(seed, 40) for seed in range(60)]
    far = [near(text, 60, i) for i, text in enumerate(base[:20])]  # of about 200 words: hardly any 5-gram is left
    close = [near(text, 1, i) for i, text in enumerate(base[20:40])]
    everything = [*base, *far, *close, base[5]]
    steps = StepsSpec(minhash=MinHashRule(enabled=True))
    result = prepare(
        jsonl(tmp_path / "a.jsonl", everything), SPEC, tmp_path / "out", 0.2, steps=steps,
        execution=Execution(shard_bytes=shard_bytes),
    )  # fmt: skip
    assert result.counts is not None
    assert (result.counts.duplicates, result.counts.near_duplicates) == (1, len(close))
    assert kept(result) == {*base, *far}


def test_no_two_documents_that_are_kept_share_a_key_and_every_other_has_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rensa")
    monkeypatch.setattr("paralm_data.stages.PARTITION", 200)
    monkeypatch.setattr("paralm_data.duplicates.MERGED", 900)
    draw, rule = random.Random(5), MinHashRule(enabled=True, bands=20, rows=3)
    texts = [sentences(seed, 20) for seed in range(30)]
    for _ in range(120):
        texts.append(near(draw.choice(texts), draw.randint(1, 12), draw.randint(0, 10**6)))
    draw.shuffle(texts)
    result = prepare(
        jsonl(tmp_path / "a.jsonl", texts), SPEC, tmp_path / "out", 0.2, steps=StepsSpec(minhash=rule),
        execution=Execution(shard_bytes=9_000),
    )  # fmt: skip
    seen: set[bytes] = set()
    wanted = []
    for text in texts:
        keys = set(minhash.band_keys(text, rule))
        if not keys & seen:
            wanted.append(text)
        seen |= keys
    assert 10 < len(wanted) < len(texts) - 30
    assert kept(result) == set(wanted)


def test_neither_shards_look_in_every_partition_nor_partitions_in_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100,000 shards and 1,000 partitions that would open 10⁸ files, each way."""
    opened = []

    def counted(path: Path, *arguments: Any) -> Any:
        opened.append(path.suffix)
        return map_array(path, *arguments)

    monkeypatch.setattr("paralm_data.stages.PARTITION", 8)
    monkeypatch.setattr("paralm_data.stages.GROUP", 10)
    monkeypatch.setattr("paralm_data.duplicates.MERGED", 40)
    monkeypatch.setattr("paralm_data.duplicates.map_array", counted)
    texts = [f"text {number * number % 41} of some length" for number in range(100)]
    stages = Stages(tmp_path / "work", LocalExecutor(1), None, StepsSpec(), 250, 0, 1)
    survey = stages.survey(jsonl(tmp_path / "a.jsonl", texts), held_out=0.3)
    fates = [HELD_OUT if is_held_out(digest(text), 0.3) else KEPT for text in texts]
    wanted = [DUPLICATE if text in texts[:i] else fate for i, (text, fate) in enumerate(zip(texts, fates))]
    assert [int(fate) for marker in survey.choices for fate in fates_of(marker)] == wanted
    partitions = len(list(tmp_path.glob("work/partition-*/*.later")))
    assert len(survey.shards) == 14
    assert partitions > 5
    assert opened.count(".later") == 2 * partitions + 14
    merged = len(list(tmp_path.glob("work/merge-*/*.keys")))
    assert merged == 3
    assert opened.count(".keys") == merged * partitions + 14


def test_a_signature_does_not_depend_on_the_process() -> None:
    pytest.importorskip("rensa")
    script = "from paralm_data.minhash import *; from paralm_data.steps import *;"
    script += "print([k.hex() for k in band_keys('one two three four five six seven eight', MinHashRule())])"
    found = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed, "PYTHONPATH": "data_pipeline"}, text=True,
            capture_output=True, check=True, cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1
    # With another signature an interrupted preparation would compare what cannot be compared.
    assert minhash.algorithm() == "rensa.RMinHash 2"
    assert found.pop().startswith("['756cef5b29542782b6c9a23ca8b92bf0', '7dfdfeaa5cc0bceece97ef96a6174be2'")


def test_shingles_are_of_words_without_case_and_punctuation() -> None:
    assert minhash.shingles("One, two; THREE (four).", 3) == {"one two three", "two three four"}
    assert minhash.shingles("one two", 3) == {"one two"}
    assert minhash.shingles(" -- ... ", 3) == set()
    assert minhash.band_keys("...", MinHashRule()) == []


def test_equal_texts_may_be_kept(tmp_path: Path, texts: list[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", [*texts, *texts[:10]])
    result = prepare(source, SPEC, tmp_path / "out", 0.2, steps=StepsSpec(exact_duplicates="keep"))
    assert result.train.n_documents + result.held_out.n_documents == len(texts) + 10


# -- order and sample ----------------------------------------------------------------------------------------------


def test_shards_are_shuffled_whole(tmp_path: Path, texts: list[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts)
    asked: dict[str, Any] = {"execution": Execution(shard_bytes=5_000)}
    plain = decoded((p := prepare(source, SPEC, tmp_path / "plain", 0.2, **asked)).train, p)
    steps = StepsSpec(shuffle="shards")
    one = decoded((p := prepare(source, SPEC, tmp_path / "one", 0.2, steps=steps, **asked)).train, p)
    steps = StepsSpec(shuffle="shards", shuffle_seed=1)
    two = decoded((p := prepare(source, SPEC, tmp_path / "two", 0.2, steps=steps, **asked)).train, p)
    assert sorted(one) == sorted(two) == sorted(plain)
    assert len({tuple(plain), tuple(one), tuple(two)}) == 3
    breaks = sum(plain.index(b) != plain.index(a) + 1 for a, b in itertools.pairwise(one))
    assert breaks < len(plain) / 2, "documents of a shard stay together"


@pytest.mark.parametrize("limit", [1_000, 40_000, 10**9])
@pytest.mark.parametrize("shard_bytes", [4_000, 1 << 26])
def test_the_drawn_sample_is_that_of_the_whole_stream(
    tmp_path: Path, texts: list[str], limit: int, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paralm_data.sampling.PIECE", 10)  # so that the bound leaves pieces out
    source = jsonl(tmp_path / "a.jsonl", [*texts, *texts[:20]])
    wanted = Sample(limit)
    for key, document in Distinct()(documents(source)):
        if not is_held_out(key, 0.2):
            wanted.add(key, document.text)
    stages = Stages(tmp_path / "work", LocalExecutor(1), None, StepsSpec(), shard_bytes, 0, 1)
    found = sample_of(stages.draw(stages.survey(source, held_out=0.2), limit), limit)
    assert list(found.texts()) == list(wanted.texts())
    assert found.n_bytes == wanted.n_bytes


def test_a_bound_that_gives_too_little_is_raised(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[int] = []

    def too_low(limit: int, total: int) -> int:
        bounds.append(limit)
        return 1 << 50

    source = jsonl(tmp_path / "a.jsonl", texts)
    stages = Stages(tmp_path / "work", LocalExecutor(1), None, StepsSpec(), 1 << 20, 0, 1)
    survey = stages.survey(source, held_out=0.2)
    wanted = list(sample_of(stages.draw(survey, 20_000), 20_000).texts())
    monkeypatch.setattr("paralm_data.stages.bound_for", too_low)
    assert list(sample_of(stages.draw(survey, 20_000), 20_000).texts()) == wanted
    assert bounds == [20_000]
