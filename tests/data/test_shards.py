"""A source cut into shards is the source: each record once, in order, with its place, wherever the cuts fall."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from paralm_data import DataError, SourceSpec, documents, readers, scratch, shards
from paralm_data.readers import Record, lines_before
from paralm_data.reading import Reading
from paralm_data.scanning import KEPT, ROW, Scan, bad_records
from paralm_data.sources import Shard
from paralm_data.steps import StepsSpec

relaxed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def told(parts: list[Shard], max_bytes: int | None = None) -> list[tuple[str, str | None, str]]:
    """Text, problem and place of every record of the shards."""
    return [(r.text, r.problem, shard.place(r)) for shard in parts for r in shard.records(max_bytes)]


LINE = st.one_of(
    st.text(alphabet="aé\U0001f642 \n", max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
    st.sampled_from([b"", b"  ", b"\r", b"no json", b'{"text": 1}', b'{"text": "na\xefve"}']),
)


@relaxed
@given(st.lists(LINE, min_size=1, max_size=25), st.booleans(), st.integers(1, 400), st.sampled_from([None, 20]))
@example([b'{"text": "abc"}'] * 4, True, 32, None)  # a cut where a line begins
def test_ranges_of_bytes_hold_each_line_once(
    tmp_path: Path, lines: list[bytes], ends: bool, shard_bytes: int, max_bytes: int | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    spec = SourceSpec("jsonl", paths=(str(path),))
    whole = told(shards(spec), max_bytes)
    for _ in range(2):
        assert told(shards(spec, shard_bytes), max_bytes) == whole
    lines_before.cache_clear()  # the file is another one next time
    readers._counted = (None, 0, 0)


def test_all_places_of_bad_records_take_one_reading_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "a.jsonl", 0
    path.write_bytes(b"no json\n\n" * 100)
    scans = [
        Scan(shard, StepsSpec(), True, 100, tmp_path / "scan")
        for shard in shards(SourceSpec("jsonl", paths=(str(path),)), 30)
    ]
    with monkeypatch.context() as scanning:
        scanning.setattr(readers, "lines_before", lambda part: pytest.fail("a worker reads what is before its part"))
        for scan in scans:
            list(scan.run())

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            found = super().read(size)
            read += len(found)
            return found

    monkeypatch.setattr(readers, "open_input", lambda path: Counted(path.read_bytes()))
    places = [place for scan in scans for place, _ in bad_records(scan)]
    assert places == [f"{path}:{line}" for line in range(1, 200, 2)]
    assert 0 < read < path.stat().st_size


def test_reading_again_takes_no_memory_for_each_record(tmp_path: Path) -> None:
    """As of a dataset, which is one shard however many records it has."""
    count = 10_000_000
    for name, size in (("a.fates", count), ("a.rows", count * ROW.itemsize)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)

    class One(Shard):
        def records(self, max_bytes: int | None = None, skip: readers.Skip = None) -> Iterator[Record]:
            assert skip is not None
            assert len(skip) == count
            assert not next(iter(skip))
            yield Record(0, 0, "text")

    marker = tmp_path / "a.json"
    reading = Reading(One(SourceSpec()), StepsSpec(), marker, marker, 4, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="it has 1 records, and had 10,000,000"):
            list(reading.texts({KEPT}))
        assert tracemalloc.get_traced_memory()[1] < 2 * count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shard_bytes", [10, 1000, 20_000, 1 << 20])
def test_row_groups_hold_each_row_once(tmp_path: Path, shard_bytes: int) -> None:
    texts = [f"row {i} " * (i % 7) for i in range(1, 500)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=37, compression="none")
    pq.write_table(pa.table({"text": ["x", "y"]}), tmp_path / "b.parquet")
    spec = SourceSpec("parquet", paths=(str(tmp_path),))
    parts = shards(spec, shard_bytes)
    assert told(parts) == told(shards(spec))
    assert [text for text, _, _ in told(parts)] == [*texts, "x", "y"]
    assert (len(parts) > 2) == (shard_bytes < 20_000)


def test_a_parquet_file_without_row_groups_has_no_rows(tmp_path: Path) -> None:
    pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])).close()
    for shard_bytes in (1, 1 << 20):
        (shard,) = shards(SourceSpec("parquet", paths=(str(tmp_path),)), shard_bytes)
        assert list(shard.records()) == []


def test_large_files_are_cut_and_small_ones_joined(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 20), ("c", 5000), ("d", 30), ("e", 900)):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name * size}"}}\n')
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"f" * 90_000 + b'"}\n', 0))
    parts = shards(SourceSpec("jsonl", paths=(str(tmp_path),)), 1000)
    assert [[p.path.name[0] for p in part.parts if p.path] for part in parts] == [
        ["a", "b"], *[["c"]] * 5, ["d", "e"], ["f"]
    ]  # fmt: skip
    assert len({part.key for part in parts}) == len(parts)
    again = shards(SourceSpec("jsonl", paths=(str(tmp_path),)), 1000)
    assert [part.key for part in again] == [part.key for part in parts]
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n')
    assert shards(SourceSpec("jsonl", paths=(str(tmp_path),)), 1000)[0].key != parts[0].key


def test_the_first_so_many_documents_are_one_shard(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(100)))
    spec = SourceSpec("jsonl", paths=(str(tmp_path),), max_documents=103)
    (part,) = shards(spec, 50)
    assert [record.text for record in part.records()] == [d.text for d in documents(spec)]
    assert len(list(part.records())) == 103


def test_the_text_that_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\nno json\n{"text": "b"}\n')
    (part,) = shards(SourceSpec("jsonl", paths=(str(tmp_path),)))
    assert [(r.text, r.problem) for r in part.records(skip=[True, True, False])] == [
        ("", None),
        ("", None),
        ("b", None),
    ]
    with pytest.raises(DataError, match=r"a.jsonl: changed while it was prepared: it has more than the 2 records"):
        list(part.records(skip=[True, True]))


def test_a_dataset_of_the_hub_that_has_changed_is_read_anew_when_nothing_is_kept_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    monkeypatch.setattr(readers, "_open_dataset", lambda spec, name: [{"text": "a"}, {"text": "b"}])
    here, hub = SourceSpec("jsonl", paths=(str(tmp_path),)), SourceSpec("datasets", dataset="of/the-hub")
    for spec, advice in ((here, "before; the same command"), (hub, "before; remove .work .* and the same command")):
        (part,) = shards(spec)
        with pytest.raises(DataError, match=advice):
            list(part.records(skip=[True]))


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_a_record_that_is_too_long_is_a_bad_one(tmp_path: Path, kind: str) -> None:
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "good"}\n')
    elif kind == "text":
        (tmp_path / "a.txt").write_bytes(b"x" * 3_000_000)
        (tmp_path / "b.txt").write_bytes(b"good")
    else:
        pq.write_table(pa.table({"text": ["é" * 30, "good"]}), tmp_path / "a.parquet")
    (first, second), limit = told(shards(SourceSpec(kind, paths=(str(tmp_path),))), 50), 50
    assert first[0] == ""
    assert first[1] == f"longer than {limit} bytes (data.steps.max_document_bytes)"
    assert second[:2] == ("good", None)


def test_what_stands_for_a_shard_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of some eleven times it is asked for, it was made of all paths that the source names."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    shard = shards(SourceSpec("jsonl", paths=(str(tmp_path / "a.jsonl"),)), 100)[0]
    asked: list[int] = []
    told = SourceSpec.as_dict
    monkeypatch.setattr(SourceSpec, "as_dict", lambda spec: asked.append(1) or told(spec))
    assert len({shard.key, shard.key, pickle.loads(pickle.dumps(shard)).key}) == 1
    assert len(asked) == 1


def test_the_markers_of_many_shards_are_read_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300,000 shards every stage reads as many, a millisecond each on a network, while no worker has work."""
    for number in range(0, 64, 2):
        (tmp_path / f"{number}.json").write_text(f'{{"n": {number}}}')
    together, read = threading.Barrier(scratch.READERS), scratch.read_marker

    def waits(path: Path) -> dict[str, Any] | None:
        together.wait(30)  # for as many as there are readers
        return read(path)

    monkeypatch.setattr(scratch, "read_marker", waits)
    found = scratch.read_markers([tmp_path / f"{number}.json" for number in range(64)])
    assert found == [None if number % 2 else {"n": number} for number in range(64)]
    (tmp_path / "7.json").write_text("{")
    monkeypatch.setattr(scratch, "read_marker", read)
    with pytest.raises(DataError, match=r"7\.json: cannot be read"):
        scratch.read_markers([tmp_path / f"{number}.json" for number in range(64)])
