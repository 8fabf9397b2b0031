"""Damaged and impossible corpora: one line that names the culprit, before anything is overwritten.

CASES is the list; each builds its damage on a bench (see conftest.py) and gives the call that must fail and what the
message must name.
"""

from __future__ import annotations

import gzip
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from paralm_data import DataError, SourceSpec, documents
from paralm_data.atomic import write_file
from paralm_data.scratch import Files

from tests.data.damage import RECORDS, Case, register
from tests.data.test_executors import SCRIPT, Counting, environment, run
from tests.data.test_executors import big as big

CASES: dict[str, Case] = {}
case = register(CASES)


@case
def a_path_that_is_not_there(bench: Any) -> Any:
    return bench.prepare(source=SourceSpec("text", paths=(str(bench.folder / "gone.txt"),))), "gone.txt: no such file"


@case
def a_pattern_without_a_match(bench: Any) -> Any:
    return bench.prepare(source=SourceSpec("text", paths=(str(bench.folder / "*.rst"),))), "*.rst: the pattern"


@case
def a_folder_without_such_files(bench: Any) -> Any:
    return bench.read("parquet", bench.folder), f"{bench.folder}: the folder has no file that ends with .parquet"


@case
def a_text_file_in_another_encoding(bench: Any) -> Any:
    path = bench.file("old.txt", b"line one\nna\xefve\n")
    return bench.read("text", path), "old.txt:2: not UTF-8"


@case
def a_line_that_is_no_json(bench: Any) -> Any:
    path = bench.file("a.jsonl", RECORDS + b'{"text": "unfinished\n' + RECORDS)
    return bench.prepare(source=SourceSpec("jsonl", paths=(str(path),))), "a.jsonl:201: not a JSON record"


@case
def a_record_without_the_key(bench: Any) -> Any:
    path = bench.file("a.jsonl", b'{"text": "a"}\n{"content": "b", "id": 1}\n')
    return bench.read("jsonl", path), "a.jsonl:2: no 'text' (text_key); the record has: content, id"


@case
def a_record_whose_text_is_a_number(bench: Any) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl", b'{"text": 5}\n')), "a.jsonl:1: 'text' is a int, not text"


@case
def a_record_that_is_a_list(bench: Any) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl", b'["text"]\n')), "a.jsonl:1: the record is a list"


@case
def a_record_nested_too_deep(bench: Any) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl", b"[" * 200_000 + b"\n")), "a.jsonl:1: not a JSON record"


@case
def a_record_in_another_encoding(bench: Any) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl", b'\n{"text": "na\xefve"}\n')), "a.jsonl:2: not UTF-8"


@case
def a_record_with_half_a_surrogate_pair(bench: Any) -> Any:
    path = bench.file("a.jsonl", b'{"text": "ok \\ud83d"}\n')
    return bench.read("jsonl", path), "a.jsonl:1: 'text' has half a surrogate pair at character 3"


@case
def a_truncated_gzip_file(bench: Any) -> Any:
    path = bench.file("a.jsonl.gz", gzip.compress(RECORDS)[:-40])
    return bench.read("jsonl", path), "a.jsonl.gz: the compressed file is truncated"


@case
def an_empty_file_named_gz(bench: Any) -> Any:
    path = bench.file("a.jsonl.gz", b"")
    return bench.read("jsonl", path), "a.jsonl.gz: the compressed file is truncated"


@case
def a_damaged_gzip_file(bench: Any) -> Any:
    data = bytearray(gzip.compress(RECORDS))
    data[-6] ^= 0x10  # in the checksum
    return bench.read("jsonl", bench.file("a.jsonl.gz", bytes(data))), "a.jsonl.gz: the compressed file is damaged"


@case
def a_plain_file_named_gz(bench: Any) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl.gz", RECORDS)), "a.jsonl.gz: the compressed file is damaged"


@case
def a_truncated_zst_file(bench: Any) -> Any:
    path = bench.file("a.jsonl.zst", zstandard.ZstdCompressor().compress(RECORDS)[:-40])
    return bench.read("jsonl", path), "a.jsonl.zst: the compressed file is truncated"


@case
def a_damaged_zst_file(bench: Any) -> Any:
    path = bench.file("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + RECORDS)
    return bench.read("jsonl", path), "a.jsonl.zst: the compressed file is damaged"


@case
def an_empty_zst_file(bench: Any) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl.zst", b"")), "a.jsonl.zst: the compressed file is truncated"


def parquet(bench: Any, values: list[Any], name: str = "text") -> Path:
    path = bench.folder / "a.parquet"
    pq.write_table(pa.table({name: values}), path, write_page_checksum=True, compression="none")
    return path


@case
def a_truncated_parquet_file(bench: Any) -> Any:
    path = parquet(bench, ["text"] * 1000)
    path.write_bytes(path.read_bytes()[:-100])
    return bench.read("parquet", path), "a.parquet: the parquet file is damaged"


@case
def a_flipped_bit_in_a_parquet_page(bench: Any) -> Any:
    path = parquet(bench, [f"text number {i}" for i in range(1000)])
    data = bytearray(path.read_bytes())
    data[data.index(b"number 500")] ^= 1
    path.write_bytes(data)
    return bench.read("parquet", path), "a.parquet: the parquet file is damaged"


@case
def a_parquet_file_without_the_column(bench: Any) -> Any:
    return bench.read("parquet", parquet(bench, ["a"], "body")), "a.parquet: no column 'text' (text_key); it has: body"


@case
def a_parquet_row_without_text(bench: Any) -> Any:
    return bench.read("parquet", parquet(bench, ["a", None])), "a.parquet:row 2: 'text' is a NoneType, not text"


@case
def a_parquet_column_of_numbers(bench: Any) -> Any:
    return bench.read("parquet", parquet(bench, [1, 2])), "a.parquet:row 1: 'text' is a int, not text"


@case
def a_dataset_that_is_not_there(bench: Any) -> Any:
    spec = SourceSpec("datasets", dataset=str(bench.folder / "no-such-set"))
    return lambda: list(documents(spec)), "no-such-set[train]: the dataset cannot be opened"


@case
def a_dataset_without_the_split(bench: Any) -> Any:
    import datasets

    saved = bench.folder / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(saved)
    return lambda: list(documents(SourceSpec("datasets", dataset=str(saved)))), "saved: no split 'train'; it has: test"


@case
def a_dataset_without_the_key(bench: Any) -> Any:
    import datasets

    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(bench.folder / "saved")
    spec = SourceSpec("datasets", dataset=str(bench.folder / "saved"))
    return lambda: list(documents(spec)), "saved[train]:0: no 'text' (text_key); the record has: body"


@case
def a_source_of_an_unknown_kind(bench: Any) -> Any:
    return lambda: SourceSpec("jsonlines"), "source kind 'jsonlines' is unknown; did you mean 'jsonl'?"


@case
def a_source_without_paths(bench: Any) -> Any:
    return lambda: SourceSpec("parquet"), "source kind 'parquet' needs 'paths'"


@case
def a_corpus_without_text(bench: Any) -> Any:
    path = bench.file("a.jsonl", b'{"text": ""}\n' * 3)
    return bench.prepare(source=SourceSpec("jsonl", paths=(str(path),))), "a.jsonl: no document with text among 3"


@case
def a_corpus_of_one_document(bench: Any) -> Any:
    path = bench.file("a.txt", RECORDS)
    return bench.prepare(source=SourceSpec("text", paths=(str(path),))), "a.txt: the held-out split is empty"


@case
def a_validation_set_that_is_not_there(bench: Any) -> Any:
    return bench.prepare(validation={"v": SourceSpec("text", paths=("/absent.txt",))}), "/absent.txt: no such file"


@case
def a_validation_set_without_text(bench: Any) -> Any:
    path = bench.file("v.jsonl", b'{"text": ""}\n')
    spec = SourceSpec("jsonl", paths=(str(path),))
    return bench.prepare(out=bench.data, validation={"v": spec}), "validation set 'v'"


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_line_names_the_culprit_and_nothing_is_overwritten(name: str, refused: Callable[[Case], None]) -> None:
    refused(CASES[name])


@pytest.mark.parametrize(("most", "what"), [(4_000, ".work/scan-"), (100_000, ".train.tmp-")])
def test_a_disk_that_is_full_is_one_line(big: Path, tmp_path: Path, most: int, what: str) -> None:
    """Files may have ``most`` bytes, which is an error in the same places."""
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
    whole = [sys.executable, "-c", limit + SCRIPT, str(big), str(tmp_path / "out"), "local", "1"]
    own = {
        **environment(),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # it would be cut off, for all that come later
    done = subprocess.run(whole, env=own, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"paralm_data.errors.DataError: {tmp_path / 'out'}")
    assert what in last
    assert last.endswith(": cannot be written (File too large)")
    assert not list((tmp_path / "out").rglob("*.tmp-*"))


def test_a_disk_that_is_full_names_the_file_that_was_begun(tmp_path: Path) -> None:
    """What is buffered meets the disk at a seek, or when the file is closed; the system names no file then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with Files(tmp_path / "a.json") as files:
            files.write(".rows", bytes(200))
            with pytest.raises(DataError, match=r"a\.rows: cannot be written \(File too large\)"):
                files.overwrite(".rows", 0, b"x")
        with pytest.raises(OSError, match=r"File too large: '.*plan\.json'"):
            write_file(tmp_path / "plan.json", bytes(200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "lost", "words"),
    [
        ("Scan", "scan-*/*.keys", "damaged: 1 entries, and"),
        ("Partition", "partition-*/*.later", "cannot be mapped"),
        ("Draw", "draw-*/*.pieces", "damaged: 1 entries, and"),
        ("Draw", "draw-*/*.texts", "damaged: 16 entries, and"),
    ],
)
def test_work_in_progress_that_lost_a_part_is_not_taken_for_less_work(
    big: Path, tmp_path: Path, stage: str, lost: str, words: str
) -> None:
    """Such as on a file system that does not show on one node what another has written."""
    with pytest.raises(KeyboardInterrupt):
        run(big, tmp_path / "out", Counting(stage, 1), 1)
    (path,) = (tmp_path / "out" / ".work").glob(lost)
    path.write_bytes(path.read_bytes()[: 24 if stage == "Scan" else 16]) if "damaged" in words else path.unlink()
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: {words}"):
        run(big, tmp_path / "out", "local", 1)
