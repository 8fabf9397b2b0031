"""Every kind of source gives its documents, in a fixed order, with their text untouched."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from paralm_data import DataError, SourceSpec, documents, shards, stdlib

TEXTS = ["one\n", "two\r\n\ttabs", " drei ÄÖ ", "四🙂", "\ufeffa mark", "nul \0 here"]


def read(spec: SourceSpec) -> list[str]:
    return [document.text for document in documents(spec)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def test_text_files_are_documents_byte_for_byte(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    assert read(SourceSpec("text", paths=(str(tmp_path),))) == TEXTS
    assert read(SourceSpec("text", paths=(str(tmp_path / "*.txt"),))) == TEXTS
    assert read(SourceSpec("text", paths=(str(tmp_path / "3.txt"), str(tmp_path)))) == [
        TEXTS[3],
        *TEXTS[:3],
        *TEXTS[4:],
    ]


def test_a_folder_is_read_below_and_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/z/1.txt", ".git/x.txt", "b/.x.txt", "c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert read(SourceSpec("text", paths=(str(tmp_path),))) == ["a/z/1.txt", "b/2.txt", "c.txt"]


def test_a_folder_is_read_through_links_and_none_of_them_twice(tmp_path: Path) -> None:
    for name in ("corpus/a.txt", "corpus/part/b.txt", "elsewhere/sub/c.txt", "elsewhere/.hidden/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, target in (("link", "elsewhere"), ("part/again", "elsewhere/sub"), ("part/loop", "corpus")):
        (tmp_path / "corpus" / link).symlink_to(tmp_path / target)
    source = SourceSpec("text", paths=(str(tmp_path / "corpus"),))
    assert read(source) == ["corpus/a.txt", "elsewhere/sub/c.txt", "corpus/part/b.txt"]
    (tmp_path / "corpus" / "part" / "gone.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"part/gone\.txt: a link to a file that is not there"):
        read(source)


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*.txt"
    path.write_text("plain")
    assert read(SourceSpec("text", paths=(str(path),))) == ["plain"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", "frames.zst", "members.gz"])
def test_jsonl_compressed_or_not(tmp_path: Path, ending: str) -> None:
    data = jsonl(TEXTS)
    in_parts = ending.startswith(("frames", "members"))  # several compressed streams end to end
    path = tmp_path / f"a.jsonl{Path(ending).suffix if in_parts else ending}"
    pieces = [data[i : i + 37] for i in range(0, len(data), 37)] if in_parts else [data]
    compress = {"": bytes, "z": gzip.compress, "t": zstandard.ZstdCompressor().compress}[ending[-1:]]
    path.write_bytes(b"".join(compress(piece) for piece in pieces))
    found = list(documents(SourceSpec("jsonl", paths=(str(tmp_path),))))
    assert [d.text for d in found] == TEXTS
    assert [d.origin for d in found] == [f"{path}:{line}" for line in range(1, len(TEXTS) + 1)]


def test_a_long_compressed_stream(tmp_path: Path) -> None:
    texts = [f"{i} " * 5000 for i in range(400)]  # 10 MB: many times every buffer
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(jsonl(texts)))
    assert read(SourceSpec("jsonl", paths=(str(path),))) == texts


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(["a"]) + b"\n  \n" + jsonl(["b"]).rstrip())
    assert read(SourceSpec("jsonl", paths=(str(path),))) == ["a", "b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = TEXTS * 700  # more than one batch and one row group
    table = pa.table({"content": pa.array(texts, kind), "n": list(range(len(texts)))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    found = list(documents(SourceSpec("parquet", paths=(str(tmp_path),), text_key="content")))
    assert [d.text for d in found] == texts
    assert found[-1].origin.endswith(f"a.parquet:row {len(texts)}")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_local_folder_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(jsonl(TEXTS))
    spec = SourceSpec("datasets", dataset=str(tmp_path / "set"), streaming=streaming)
    assert read(spec) == TEXTS


def test_a_saved_dataset_and_one_of_its_splits(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": TEXTS})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert read(SourceSpec("datasets", dataset=str(tmp_path / "one"))) == TEXTS
    assert read(SourceSpec("datasets", dataset=str(tmp_path / "two"), split="test")) == TEXTS[1:2]


def test_the_standard_library() -> None:
    found = list(documents(SourceSpec("python-stdlib")))
    origins = [d.origin for d in found]
    assert origins == [d.origin for d in documents(SourceSpec("python-stdlib"))]
    assert "argparse.py" in origins
    assert not any("site-packages" in o or "__pycache__" in o for o in origins)
    assert sum(len(d.text) for d in found) > 5_000_000
    assert all("\0" not in d.text for d in found)


def test_the_standard_library_in_parts(tmp_path: Path) -> None:
    """Docstrings are prose, what is left of their files is code, and no part holds text of another."""
    module = (
        '"""Of the\nmodule."""\nimport os\n\n\nclass A:\n    """Of A."""\n\n    def f(self):\n        """Of f."""\n'
    )
    module += '        return "no docstring"\n\n    async def g(self): "on the line"\n'
    for name, text in {
        "a.py": module, "broken.py": '"""no\n', "test/b.py": '"""Of a test."""\n', "d/e.rst": "prose", "d/f.json": "{}",
        "g.h": "int x;\n", "empty.py": "x = 1\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {part: {d.origin: d.text for d in stdlib.documents(tmp_path, part)} for part in ("code", "docs", "tests")}
    assert found["docs"] == {"a.py": "Of the\nmodule.\n\nOf A.\n\nOf f.", "d/e.rst": "prose"}
    code = 'import os\n\n\nclass A:\n\n    def f(self):\n        return "no docstring"\n\n'
    code += '    async def g(self): "on the line"\n'
    assert found["code"] == {"a.py": code, "broken.py": '"""no\n', "empty.py": "x = 1\n", "g.h": "int x;\n"}
    assert found["tests"] == {"test/b.py": '"""Of a test."""\n'}
    with pytest.raises(DataError, match="subset 'doc' is unknown; did you mean 'docs'"):
        SourceSpec("python-stdlib", subset="doc")
    sizes = {part: sum(len(d.text) for d in documents(SourceSpec("python-stdlib", subset=part))) for part in found}
    if not (stdlib.root() / "test" / "test_grammar.py").exists():
        del sizes["tests"]  # Debian's Python has its tests in a package of their own
    assert min(sizes.values()) > 500_000


@pytest.mark.parametrize("mark", ["\f", "\x1c", "\u2028", "\r"])
def test_docstrings_are_cut_where_python_counts_lines(mark: str) -> None:
    source = f'x = 1\n#{mark}\ndef f():\n    """Of f."""\n    return 1\n'
    assert stdlib.split_docstrings(source) == (f"x = 1\n#{mark}\ndef f():\n    return 1\n", "Of f.")


def test_the_standard_library_leaves_out_what_is_no_text(tmp_path: Path) -> None:
    for name, data in {
        "a.py": b"x = 1\r\n", "latin.py": b"\xe9", "nul.txt": b"a\0", "site-packages/b.py": b"b",
        "d/__pycache__/c.py": b"c", "d/e.rst": "Größe".encode(), "image.png": b"text", "lib.so": b"text",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert [(d.origin, d.text) for d in stdlib.documents(tmp_path)] == [("a.py", "x = 1\r\n"), ("d/e.rst", "Größe")]


def test_max_documents_ends_the_stream(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS) + b"no record\n")
    assert read(SourceSpec("jsonl", paths=(str(tmp_path),), max_documents=2)) == TEXTS[:2]


def test_shards_are_the_source_in_parts_and_travel_to_workers(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name, name * 2]))
    spec = SourceSpec("jsonl", paths=(str(tmp_path),))
    parts = pickle.loads(pickle.dumps(shards(spec)))
    assert [[d.text for d in part.documents()] for part in parts] == [["a", "aa"], ["b", "bb"]]


def test_paths_are_checked_before_the_first_document_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        documents(SourceSpec("text", paths=(str(tmp_path / "absent"),)))
