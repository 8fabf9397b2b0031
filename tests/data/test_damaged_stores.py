"""Damaged and impossible tokenizers and token stores: one line that names the culprit, before anything is overwritten.

CASES is the list; each builds its damage on a bench (see conftest.py) and gives the call that must fail and what the
message must name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paralm_data import Loader, Tokenizer, TokenizerSpec, TokenStore, inspect

from tests.data.damage import RECORDS, Case, register

CASES: dict[str, Case] = {}
case = register(CASES)


@case
def a_vocabulary_the_corpus_cannot_support(bench: Any) -> Any:
    call = bench.prepare(tokenizer=TokenizerSpec(vocab_size=100_000))
    return call, "vocab_size 100000 is more than this corpus supports (at most "


@case
def a_vocabulary_too_small_for_bytes(bench: Any) -> Any:
    return lambda: TokenizerSpec(vocab_size=200), "vocab_size 200 is out of range: 300"


@case
def a_tokenizer_of_an_unknown_kind(bench: Any) -> Any:
    return lambda: TokenizerSpec(kind="bep"), "tokenizer kind 'bep' is unknown; did you mean 'bpe'?"


@case
def a_tokenizer_model_that_is_not_there(bench: Any) -> Any:
    return bench.prepare(tokenizer=TokenizerSpec(model=bench.folder / "gone.model")), "gone.model: No such file"


@case
def a_tokenizer_model_of_noise(bench: Any) -> Any:
    path = bench.file("noise.model", bytes(range(256)) * 40)
    return bench.prepare(tokenizer=TokenizerSpec(model=path)), "noise.model: not a sentencepiece model"


@case
def an_empty_tokenizer_model(bench: Any) -> Any:
    path = bench.file("empty.model", b"")
    return lambda: Tokenizer.load(path), "empty.model: not a sentencepiece model"


@case
def a_truncated_tokenizer_model(bench: Any) -> Any:
    path = bench.data / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:2000])
    return lambda: Tokenizer.load(path), "tokenizer.model: "


@case
def a_tokenizer_that_was_replaced(bench: Any) -> Any:
    path = bench.data / "tokenizer.model"
    Tokenizer.train(["another text of other words, " * 3 + RECORDS.decode()], path, 300)
    return bench.prepare(out=bench.data), "tokenizer.model: damaged or replaced"


@case
def a_tokenizer_that_went_missing(bench: Any) -> Any:
    (bench.data / "tokenizer.model").unlink()
    return bench.prepare(out=bench.data), "tokenizer.model: missing, though stores beside it were made with it"


@case
def a_tokenizer_without_its_description(bench: Any) -> Any:
    (bench.data / "tokenizer.json").unlink()
    return bench.prepare(out=bench.data), "tokenizer.json: missing"


@case
def a_damaged_description_of_the_tokenizer(bench: Any) -> Any:
    (bench.data / "tokenizer.json").write_text('{"sha256": ')
    return lambda: Tokenizer.load(bench.data / "tokenizer.model"), "tokenizer.json: cannot be read"


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


def opened(bench: Any, verify: Any = "full") -> Callable[[], object]:
    return lambda: TokenStore.open(bench.data / "train", verify=verify)


@case
def a_store_that_is_not_there(bench: Any) -> Any:
    return lambda: TokenStore.open(bench.data / "trian"), "trian: no token store there"


@case
def a_store_without_a_manifest(bench: Any) -> Any:
    (bench.data / "train" / "manifest.json").unlink()
    return opened(bench, "size"), "train/manifest.json: missing"


@case
def a_manifest_cut_short(bench: Any) -> Any:
    path = bench.data / "train" / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    return opened(bench, "size"), "train/manifest.json: cannot be read"


@case
def a_manifest_of_something_else(bench: Any) -> Any:
    (bench.data / "train" / "manifest.json").write_text("[1, 2]")
    return opened(bench, "size"), "train/manifest.json: not the manifest of a token store"


@case
def a_store_of_another_version(bench: Any) -> Any:
    edit_manifest(bench.data / "train", version=99)
    return opened(bench, "size"), "train/manifest.json: format version 99, this release reads 1"


@case
def a_manifest_edited_by_hand(bench: Any) -> Any:
    edit_manifest(bench.data / "train", consistent=False, vocab_size=500)
    return opened(bench, "size"), "train/manifest.json: damaged or edited"


@case
def a_manifest_with_a_count_of_the_wrong_type(bench: Any) -> Any:
    edit_manifest(bench.data / "train", n_tokens="many")
    return opened(bench, "size"), "train/manifest.json: 'n_tokens' is 'many'"


@case
def a_manifest_with_a_field_of_the_future(bench: Any) -> Any:
    edit_manifest(bench.data / "train", shards=3)
    return opened(bench, "size"), "train/manifest.json: not a whole manifest"


@case
def a_manifest_whose_counts_do_not_fit(bench: Any) -> Any:
    edit_manifest(bench.data / "train", n_tokens=7)
    return opened(bench, "size"), "train/manifest.json: tokens.bin should have 14 bytes by the counts"


@case
def a_manifest_with_an_unknown_dtype(bench: Any) -> Any:
    edit_manifest(bench.data / "train", dtype="int4")
    return opened(bench, "size"), "train/manifest.json: dtype 'int4'"


@case
def a_store_without_its_tokens(bench: Any) -> Any:
    (bench.data / "train" / "tokens.bin").unlink()
    return opened(bench, "size"), "train/tokens.bin: No such file"


@case
def truncated_tokens(bench: Any) -> Any:
    path = bench.data / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    return opened(bench, "size"), "train/tokens.bin: has "


@case
def truncated_document_ends(bench: Any) -> Any:
    path = bench.data / "train" / "doc_ends.bin"
    path.write_bytes(path.read_bytes()[:-8])
    return opened(bench, "size"), "train/doc_ends.bin: has "


@case
def tokens_with_something_appended(bench: Any) -> Any:
    path = bench.data / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes() + b"\0\0")
    return opened(bench, "size"), "train/tokens.bin: has "


@case
def a_flipped_bit_in_the_tokens(bench: Any) -> Any:
    flip(bench.data / "train" / "tokens.bin", 1000)
    return opened(bench), "train/tokens.bin: damaged: its SHA-256"


@case
def a_flipped_bit_in_the_document_ends(bench: Any) -> Any:
    flip(bench.data / "train" / "doc_ends.bin", 16)
    return opened(bench), "train/doc_ends.bin: damaged: its SHA-256"


@case
def a_flipped_bit_in_the_document_sizes(bench: Any) -> Any:
    flip(bench.data / "train" / "doc_bytes.bin", 9)
    return opened(bench), "train/doc_bytes.bin: damaged: its SHA-256"


def rewritten(bench: Any, name: str, dtype: str, change: Callable[[Any], None]) -> Callable[[], object]:
    """A store whose writer was wrong: the content is bad and every checksum fits it."""
    path = bench.data / "train" / name
    values = np.fromfile(path, dtype)
    change(values)
    values.tofile(path)
    edit_manifest(bench.data / "train")
    return opened(bench)


@case
def an_id_outside_the_vocabulary(bench: Any) -> Any:
    def change(tokens: Any) -> None:
        tokens[77] = 400

    return rewritten(bench, "tokens.bin", "<u2", change), "train/tokens.bin: id 400 at token 77 is outside"


@case
def a_document_without_its_beginning(bench: Any) -> Any:
    def change(tokens: Any) -> None:
        tokens[0] = 9

    return rewritten(bench, "tokens.bin", "<u2", change), "train/tokens.bin: document 0 does not begin with BOS"


@case
def an_end_inside_a_document(bench: Any) -> Any:
    def change(tokens: Any) -> None:
        tokens[3] = 2

    return rewritten(bench, "tokens.bin", "<u2", change), "train/tokens.bin: id 2, which only bounds documents"


@case
def document_ends_that_go_back(bench: Any) -> Any:
    def change(ends: Any) -> None:
        ends[4] = ends[3]

    return rewritten(bench, "doc_ends.bin", "<u8", change), "train/doc_ends.bin: document 4 ends at"


@case
def document_ends_beyond_the_tokens(bench: Any) -> Any:
    def change(ends: Any) -> None:
        ends[-1] += 1

    return rewritten(bench, "doc_ends.bin", "<u8", change), "train/doc_ends.bin: the last document ends at"


@case
def document_sizes_that_do_not_add_up(bench: Any) -> Any:
    def change(sizes: Any) -> None:
        sizes[5] += 1

    return rewritten(bench, "doc_bytes.bin", "<u8", change), "train/doc_bytes.bin: documents have"


@case
def a_store_of_another_tokenizer(bench: Any) -> Any:
    edit_manifest(bench.data / "held_out", tokenizer_sha256="0" * 64)
    return bench.prepare(out=bench.data), "held_out: made with the tokenizer of SHA-256 000000000000"


@case
def an_inspected_store_with_a_bad_id(bench: Any) -> Any:
    path = bench.data / "train" / "tokens.bin"
    np.fromfile(path, "<u2").tofile(path)
    data = bytearray(path.read_bytes())
    data[21] = 0xFF
    path.write_bytes(data)
    return lambda: inspect(bench.data / "train"), "train: an id is outside the vocabulary of 400"


@case
def a_half_made_folder(bench: Any) -> Any:
    shutil.rmtree(bench.data / "train")
    (bench.data / "train").mkdir()
    return bench.prepare(out=bench.data), "train/manifest.json: missing"


@case
def a_file_in_the_folder_s_place(bench: Any) -> Any:
    bench.file("out", b"precious")
    return bench.prepare(), "out: "


@case
def a_store_shorter_than_a_window(bench: Any) -> Any:
    store = TokenStore.open(bench.data / "train")
    return lambda: Loader(store, store.n_tokens, 1), "train: "


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_line_names_the_culprit_and_nothing_is_overwritten(name: str, refused: Callable[[Case], None]) -> None:
    refused(CASES[name])
