"""Damaged and impossible input: one line that names the culprit, before anything is overwritten.

CASES is the list; each builds its damage in a folder of its own and gives the call that must fail and what the message
must name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from paralm_data import (
    DataError,
    Loader,
    SourceSpec,
    Tokenizer,
    TokenizerSpec,
    TokenStore,
    documents,
    inspect,
    prepare,
)


@dataclass
class Bench:
    """Where a case does its damage: an empty folder, a copy of prepared data, and a good source."""

    folder: Path
    data: Path
    source: SourceSpec

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def read(self, kind: str, path: Path | str, **options: Any) -> Callable[[], object]:
        return lambda: list(documents(SourceSpec(kind, paths=(str(path),), **options)))

    def prepare(self, **changes: Any) -> Callable[[], object]:
        asked: dict[str, Any] = {
            "source": self.source, "tokenizer": TokenizerSpec(vocab_size=400), "out": self.folder / "out",
            "held_out_fraction": 0.2, **changes,
        }  # fmt: skip
        return lambda: prepare(**asked)


Case = Callable[[Bench], tuple[Callable[[], object], str]]
CASES: dict[str, Case] = {}
RECORDS = b"".join(json.dumps({"text": f"record {i} " * 30}).encode() + b"\n" for i in range(200))


def case(function: Case) -> Case:
    CASES[function.__name__.replace("_", " ")] = function
    return function


# -- corpora ---------------------------------------------------------------------------------------------------------


@case
def a_path_that_is_not_there(bench: Bench) -> Any:
    return bench.prepare(source=SourceSpec("text", paths=(str(bench.folder / "gone.txt"),))), "gone.txt: no such file"


@case
def a_pattern_without_a_match(bench: Bench) -> Any:
    return bench.prepare(source=SourceSpec("text", paths=(str(bench.folder / "*.rst"),))), "*.rst: the pattern"


@case
def a_folder_without_such_files(bench: Bench) -> Any:
    return bench.read("parquet", bench.folder), f"{bench.folder}: the folder has no file that ends with .parquet"


@case
def a_text_file_in_another_encoding(bench: Bench) -> Any:
    path = bench.file("old.txt", b"line one\nna\xefve\n")
    return bench.read("text", path), "old.txt:2: not UTF-8"


@case
def a_line_that_is_no_json(bench: Bench) -> Any:
    path = bench.file("a.jsonl", RECORDS + b'{"text": "unfinished\n' + RECORDS)
    return bench.prepare(source=SourceSpec("jsonl", paths=(str(path),))), "a.jsonl:201: not a JSON record"


@case
def a_record_without_the_key(bench: Bench) -> Any:
    path = bench.file("a.jsonl", b'{"text": "a"}\n{"content": "b", "id": 1}\n')
    return bench.read("jsonl", path), "a.jsonl:2: no 'text' (text_key); the record has: content, id"


@case
def a_record_whose_text_is_a_number(bench: Bench) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl", b'{"text": 5}\n')), "a.jsonl:1: 'text' is a int, not text"


@case
def a_record_that_is_a_list(bench: Bench) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl", b'["text"]\n')), "a.jsonl:1: the record is a list"


@case
def a_record_nested_too_deep(bench: Bench) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl", b"[" * 200_000 + b"\n")), "a.jsonl:1: not a JSON record"


@case
def a_record_in_another_encoding(bench: Bench) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl", b'\n{"text": "na\xefve"}\n')), "a.jsonl:2: not UTF-8"


@case
def a_record_with_half_a_surrogate_pair(bench: Bench) -> Any:
    path = bench.file("a.jsonl", b'{"text": "ok \\ud83d"}\n')
    return bench.read("jsonl", path), "a.jsonl:1: 'text' has half a surrogate pair at character 3"


@case
def a_truncated_gzip_file(bench: Bench) -> Any:
    path = bench.file("a.jsonl.gz", gzip.compress(RECORDS)[:-40])
    return bench.read("jsonl", path), "a.jsonl.gz: the compressed file is truncated"


@case
def a_damaged_gzip_file(bench: Bench) -> Any:
    data = bytearray(gzip.compress(RECORDS))
    data[-6] ^= 0x10  # in the checksum
    return bench.read("jsonl", bench.file("a.jsonl.gz", bytes(data))), "a.jsonl.gz: the compressed file is damaged"


@case
def a_plain_file_named_gz(bench: Bench) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl.gz", RECORDS)), "a.jsonl.gz: the compressed file is damaged"


@case
def a_truncated_zst_file(bench: Bench) -> Any:
    path = bench.file("a.jsonl.zst", zstandard.ZstdCompressor().compress(RECORDS)[:-40])
    return bench.read("jsonl", path), "a.jsonl.zst: the compressed file is truncated"


@case
def a_damaged_zst_file(bench: Bench) -> Any:
    path = bench.file("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + RECORDS)
    return bench.read("jsonl", path), "a.jsonl.zst: the compressed file is damaged"


@case
def an_empty_zst_file(bench: Bench) -> Any:
    return bench.read("jsonl", bench.file("a.jsonl.zst", b"")), "a.jsonl.zst: the compressed file is truncated"


def parquet(bench: Bench, values: list[Any], name: str = "text") -> Path:
    path = bench.folder / "a.parquet"
    pq.write_table(pa.table({name: values}), path, write_page_checksum=True, compression="none")
    return path


@case
def a_truncated_parquet_file(bench: Bench) -> Any:
    path = parquet(bench, ["text"] * 1000)
    path.write_bytes(path.read_bytes()[:-100])
    return bench.read("parquet", path), "a.parquet: the parquet file is damaged"


@case
def a_flipped_bit_in_a_parquet_page(bench: Bench) -> Any:
    path = parquet(bench, [f"text number {i}" for i in range(1000)])
    data = bytearray(path.read_bytes())
    data[data.index(b"number 500")] ^= 1
    path.write_bytes(data)
    return bench.read("parquet", path), "a.parquet: the parquet file is damaged"


@case
def a_parquet_file_without_the_column(bench: Bench) -> Any:
    return bench.read("parquet", parquet(bench, ["a"], "body")), "a.parquet: no column 'text' (text_key); it has: body"


@case
def a_parquet_row_without_text(bench: Bench) -> Any:
    return bench.read("parquet", parquet(bench, ["a", None])), "a.parquet:row 2: 'text' is a NoneType, not text"


@case
def a_parquet_column_of_numbers(bench: Bench) -> Any:
    return bench.read("parquet", parquet(bench, [1, 2])), "a.parquet:row 1: 'text' is a int, not text"


@case
def a_dataset_that_is_not_there(bench: Bench) -> Any:
    spec = SourceSpec("datasets", dataset=str(bench.folder / "no-such-set"))
    return lambda: list(documents(spec)), "no-such-set[train]: the dataset cannot be opened"


@case
def a_dataset_without_the_split(bench: Bench) -> Any:
    import datasets

    saved = bench.folder / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(saved)
    return lambda: list(documents(SourceSpec("datasets", dataset=str(saved)))), "saved: no split 'train'; it has: test"


@case
def a_dataset_without_the_key(bench: Bench) -> Any:
    import datasets

    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(bench.folder / "saved")
    spec = SourceSpec("datasets", dataset=str(bench.folder / "saved"))
    return lambda: list(documents(spec)), "saved[train]:0: no 'text' (text_key); the record has: body"


@case
def a_source_of_an_unknown_kind(bench: Bench) -> Any:
    return lambda: SourceSpec("jsonlines"), "source kind 'jsonlines' is unknown; did you mean 'jsonl'?"


@case
def a_source_without_paths(bench: Bench) -> Any:
    return lambda: SourceSpec("parquet"), "source kind 'parquet' needs 'paths'"


@case
def a_corpus_without_text(bench: Bench) -> Any:
    path = bench.file("a.jsonl", b'{"text": ""}\n' * 3)
    return bench.prepare(source=SourceSpec("jsonl", paths=(str(path),))), "a.jsonl: no document with text among 3"


@case
def a_corpus_of_one_document(bench: Bench) -> Any:
    path = bench.file("a.txt", RECORDS)
    return bench.prepare(source=SourceSpec("text", paths=(str(path),))), "a.txt: the held-out split is empty"


@case
def a_validation_set_that_is_not_there(bench: Bench) -> Any:
    return bench.prepare(validation={"v": SourceSpec("text", paths=("/absent.txt",))}), "/absent.txt: no such file"


@case
def a_validation_set_without_text(bench: Bench) -> Any:
    path = bench.file("v.jsonl", b'{"text": ""}\n')
    spec = SourceSpec("jsonl", paths=(str(path),))
    return bench.prepare(out=bench.data, validation={"v": spec}), "validation set 'v'"


# -- tokenizers ------------------------------------------------------------------------------------------------------


@case
def a_vocabulary_the_corpus_cannot_support(bench: Bench) -> Any:
    call = bench.prepare(tokenizer=TokenizerSpec(vocab_size=100_000))
    return call, "vocab_size 100000 is more than this corpus supports (at most "


@case
def a_vocabulary_too_small_for_bytes(bench: Bench) -> Any:
    return lambda: TokenizerSpec(vocab_size=200), "vocab_size 200 is out of range: 300"


@case
def a_tokenizer_of_an_unknown_kind(bench: Bench) -> Any:
    return lambda: TokenizerSpec(kind="bep"), "tokenizer kind 'bep' is unknown; did you mean 'bpe'?"


@case
def a_tokenizer_model_that_is_not_there(bench: Bench) -> Any:
    return bench.prepare(tokenizer=TokenizerSpec(model=bench.folder / "gone.model")), "gone.model: No such file"


@case
def a_tokenizer_model_of_noise(bench: Bench) -> Any:
    path = bench.file("noise.model", bytes(range(256)) * 40)
    return bench.prepare(tokenizer=TokenizerSpec(model=path)), "noise.model: not a sentencepiece model"


@case
def an_empty_tokenizer_model(bench: Bench) -> Any:
    path = bench.file("empty.model", b"")
    return lambda: Tokenizer.load(path), "empty.model: not a sentencepiece model"


@case
def a_truncated_tokenizer_model(bench: Bench) -> Any:
    path = bench.data / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:2000])
    return lambda: Tokenizer.load(path), "tokenizer.model: "


@case
def a_tokenizer_that_was_replaced(bench: Bench) -> Any:
    path = bench.data / "tokenizer.model"
    Tokenizer.train(["another text of other words, " * 3 + RECORDS.decode()], path, 300)
    return bench.prepare(out=bench.data), "tokenizer.model: damaged or replaced"


@case
def a_tokenizer_that_went_missing(bench: Bench) -> Any:
    (bench.data / "tokenizer.model").unlink()
    return bench.prepare(out=bench.data), "tokenizer.model: missing, though stores beside it were made with it"


@case
def a_tokenizer_without_its_description(bench: Bench) -> Any:
    (bench.data / "tokenizer.json").unlink()
    return bench.prepare(out=bench.data), "tokenizer.json: missing"


@case
def a_damaged_description_of_the_tokenizer(bench: Bench) -> Any:
    (bench.data / "tokenizer.json").write_text('{"sha256": ')
    return lambda: Tokenizer.load(bench.data / "tokenizer.model"), "tokenizer.json: cannot be read"


# -- token stores ----------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def edit_manifest(store: Path, consistent: bool = True, **changes: Any) -> None:
    """Change the manifest; with a checksum that fits if it is to be consistent."""
    content = json.loads((store / "manifest.json").read_text())
    content.update(changes)
    for name, entry in content["files"].items():
        if (store / name).exists():
            data = (store / name).read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    if consistent:
        content.pop("checksum")
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (store / "manifest.json").write_text(json.dumps(content))


def opened(bench: Bench, verify: Any = "full") -> Callable[[], object]:
    return lambda: TokenStore.open(bench.data / "train", verify=verify)


@case
def a_store_that_is_not_there(bench: Bench) -> Any:
    return lambda: TokenStore.open(bench.data / "trian"), "trian: no token store there"


@case
def a_store_without_a_manifest(bench: Bench) -> Any:
    (bench.data / "train" / "manifest.json").unlink()
    return opened(bench, "size"), "train/manifest.json: missing"


@case
def a_manifest_cut_short(bench: Bench) -> Any:
    path = bench.data / "train" / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    return opened(bench, "size"), "train/manifest.json: cannot be read"


@case
def a_manifest_of_something_else(bench: Bench) -> Any:
    (bench.data / "train" / "manifest.json").write_text("[1, 2]")
    return opened(bench, "size"), "train/manifest.json: not the manifest of a token store"


@case
def a_store_of_another_version(bench: Bench) -> Any:
    edit_manifest(bench.data / "train", version=99)
    return opened(bench, "size"), "train/manifest.json: format version 99, this release reads 1"


@case
def a_manifest_edited_by_hand(bench: Bench) -> Any:
    edit_manifest(bench.data / "train", consistent=False, vocab_size=500)
    return opened(bench, "size"), "train/manifest.json: damaged or edited"


@case
def a_manifest_with_a_count_of_the_wrong_type(bench: Bench) -> Any:
    edit_manifest(bench.data / "train", n_tokens="many")
    return opened(bench, "size"), "train/manifest.json: 'n_tokens' is 'many'"


@case
def a_manifest_with_a_field_of_the_future(bench: Bench) -> Any:
    edit_manifest(bench.data / "train", shards=3)
    return opened(bench, "size"), "train/manifest.json: not a whole manifest"


@case
def a_manifest_whose_counts_do_not_fit(bench: Bench) -> Any:
    edit_manifest(bench.data / "train", n_tokens=7)
    return opened(bench, "size"), "train/manifest.json: tokens.bin should have 14 bytes by the counts"


@case
def a_manifest_with_an_unknown_dtype(bench: Bench) -> Any:
    edit_manifest(bench.data / "train", dtype="int4")
    return opened(bench, "size"), "train/manifest.json: dtype 'int4'"


@case
def a_store_without_its_tokens(bench: Bench) -> Any:
    (bench.data / "train" / "tokens.bin").unlink()
    return opened(bench, "size"), "train/tokens.bin: No such file"


@case
def truncated_tokens(bench: Bench) -> Any:
    path = bench.data / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    return opened(bench, "size"), "train/tokens.bin: has "


@case
def truncated_document_ends(bench: Bench) -> Any:
    path = bench.data / "train" / "doc_ends.bin"
    path.write_bytes(path.read_bytes()[:-8])
    return opened(bench, "size"), "train/doc_ends.bin: has "


@case
def tokens_with_something_appended(bench: Bench) -> Any:
    path = bench.data / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes() + b"\0\0")
    return opened(bench, "size"), "train/tokens.bin: has "


@case
def a_flipped_bit_in_the_tokens(bench: Bench) -> Any:
    flip(bench.data / "train" / "tokens.bin", 1000)
    return opened(bench), "train/tokens.bin: damaged: its SHA-256"


@case
def a_flipped_bit_in_the_document_ends(bench: Bench) -> Any:
    flip(bench.data / "train" / "doc_ends.bin", 16)
    return opened(bench), "train/doc_ends.bin: damaged: its SHA-256"


@case
def a_flipped_bit_in_the_document_sizes(bench: Bench) -> Any:
    flip(bench.data / "train" / "doc_bytes.bin", 9)
    return opened(bench), "train/doc_bytes.bin: damaged: its SHA-256"


def rewritten(bench: Bench, name: str, dtype: str, change: Callable[[Any], None]) -> Callable[[], object]:
    """A store whose writer was wrong: the content is bad and every checksum fits it."""
    path = bench.data / "train" / name
    values = np.fromfile(path, dtype)
    change(values)
    values.tofile(path)
    edit_manifest(bench.data / "train")
    return opened(bench)


@case
def an_id_outside_the_vocabulary(bench: Bench) -> Any:
    def change(tokens: Any) -> None:
        tokens[77] = 400

    return rewritten(bench, "tokens.bin", "<u2", change), "train/tokens.bin: id 400 at token 77 is outside"


@case
def a_document_without_its_beginning(bench: Bench) -> Any:
    def change(tokens: Any) -> None:
        tokens[0] = 9

    return rewritten(bench, "tokens.bin", "<u2", change), "train/tokens.bin: document 0 does not begin with BOS"


@case
def an_end_inside_a_document(bench: Bench) -> Any:
    def change(tokens: Any) -> None:
        tokens[3] = 2

    return rewritten(bench, "tokens.bin", "<u2", change), "train/tokens.bin: id 2, which only bounds documents"


@case
def document_ends_that_go_back(bench: Bench) -> Any:
    def change(ends: Any) -> None:
        ends[4] = ends[3]

    return rewritten(bench, "doc_ends.bin", "<u8", change), "train/doc_ends.bin: document 4 ends at"


@case
def document_ends_beyond_the_tokens(bench: Bench) -> Any:
    def change(ends: Any) -> None:
        ends[-1] += 1

    return rewritten(bench, "doc_ends.bin", "<u8", change), "train/doc_ends.bin: the last document ends at"


@case
def document_sizes_that_do_not_add_up(bench: Bench) -> Any:
    def change(sizes: Any) -> None:
        sizes[5] += 1

    return rewritten(bench, "doc_bytes.bin", "<u8", change), "train/doc_bytes.bin: documents have"


@case
def a_store_of_another_tokenizer(bench: Bench) -> Any:
    edit_manifest(bench.data / "held_out", tokenizer_sha256="0" * 64)
    return bench.prepare(out=bench.data), "held_out: made with the tokenizer of SHA-256 000000000000"


@case
def an_inspected_store_with_a_bad_id(bench: Bench) -> Any:
    path = bench.data / "train" / "tokens.bin"
    np.fromfile(path, "<u2").tofile(path)
    data = bytearray(path.read_bytes())
    data[21] = 0xFF
    path.write_bytes(data)
    return lambda: inspect(bench.data / "train"), "train: an id is outside the vocabulary of 400"


@case
def a_half_made_folder(bench: Bench) -> Any:
    shutil.rmtree(bench.data / "train")
    (bench.data / "train").mkdir()
    return bench.prepare(out=bench.data), "train/manifest.json: missing"


@case
def a_file_in_the_folder_s_place(bench: Bench) -> Any:
    bench.file("out", b"precious")
    return bench.prepare(), "out: "


@case
def a_store_shorter_than_a_window(bench: Bench) -> Any:
    store = TokenStore.open(bench.data / "train")
    return lambda: Loader(store, store.n_tokens, 1), "train: "


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_line_names_the_culprit_and_nothing_is_overwritten(
    name: str, tmp_path: Path, copied: Path, source: SourceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bench").mkdir()
    call, culprit = CASES[name](Bench(tmp_path / "bench", copied, source))
    before = snapshot(tmp_path)
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert culprit in message
    assert "\n" not in message
    assert len(message) < 500
    after = snapshot(tmp_path)
    made = [path for path in after if path not in before]
    assert {path: after[path] for path in before} == before
    # Only a tokenizer that was finished before the damage was met may have been added.
    assert all(Path(path).name in ("tokenizer.model", "tokenizer.json") for path in made)
