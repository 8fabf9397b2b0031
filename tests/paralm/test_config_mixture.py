"""What cannot be mixed is refused in one line that names the key, before anything is prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from paralm.config_files import load_config
from paralm.errors import ConfigError

TWO = {"a": {"kind": "text", "paths": ["a"]}, "b": {"store": "b"}}
STORES = {"a": {"store": "a"}, "b": {"store": "b"}}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"mixture": {"sources": {}}}, "'sources' has 0; weights: fixed needs at least one"),
        ({"mixture": {"sources": {"a": STORES["a"]}, "weights": "exp3", "target": "a"}}, "exp3 needs two of them"),
        ({"mixture": {"sources": {"a": {}}}}, "either 'kind' (and where its text is) or 'store'"),
        ({"mixture": {"sources": {"a": {"kind": "text", "store": "x"}}}}, "kind 'text' needs 'paths'"),
        ({"mixture": {"sources": {"a": {"store": "x", "paths": ["y"]}}}}, "'store' is prepared already"),
        ({"mixture": {"sources": {"train": {"store": "x"}}}}, "source 'train': that name is of a split"),
        ({"mixture": {"sources": {"a/b": {"store": "x"}}}}, "a/b"),
        ({"mixture": {"sources": TWO, "weights": "exp4"}}, "nearest: exp3"),
        ({"mixture": {"sources": TWO, "weights": "ucb1"}}, "weights: ucb1 needs target"),
        ({"mixture": {"sources": TWO, "target": "a"}}, "target is of weights: exp3 and ucb1"),
        ({"mixture": {"sources": TWO, "weights": "ucb1", "target": "c"}}, "target is 'c'; it must be one of: a, b"),
        ({"mixture": {"sources": TWO, "temperature": 2.0}}, "temperature 2 needs weights: temperature"),
        (
            {"mixture": {"sources": {**TWO, "c": {"store": "c", "weight": 2.0}}, "weights": "temperature"}},
            "sources.c.weight is of weights: fixed",
        ),
        (
            {"mixture": {"sources": {"a": {"store": "a", "max_epochs": 2.0}}, "at_end": "stop"}},
            "sources.a.max_epochs 2 needs at_end: repeat",
        ),
        (
            {"mixture": {"sources": {"a": {"store": "a", "weight": 0.0}, "b": {"store": "b", "weight": 0}}}},
            "every source has weight 0; at least one needs a weight above 0",
        ),
        ({"mixture": {"sources": TWO}, "order": "lanes"}, "order: lanes is of one"),
        ({"mixture": {"sources": TWO}, "source": {"kind": "text", "paths": ["x"]}}, "'source' and 'mixture' both"),
        ({"mixture": {"sources": TWO}, "validation": {"a": TWO["a"]}}, "'a' is a source of the mixture and"),
        ({"mixture": {"sources": STORES}, "validation": {"c": TWO["a"]}}, "'validation' needs a source of the mixture"),
        ({"mixture": {"sources": TWO}, "synthetic": {"task": "parity"}}, "'mixture' is of text"),
        ({"source": {"kind": "python-stdlib", "subset": "doc"}}, "subset 'doc' is no part of python-stdlib"),
    ],
)  # fmt: skip
def test_one_line_names_what_is_wrong(tmp_path: Path, data: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": data}))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_carried_states_need_one_store(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {"mixture": {"sources": TWO}}, "training": {"carry_state": True}}))
    with pytest.raises(ConfigError, match=r"carry_state needs data\.order: lanes"):
        load_config(path)


def test_the_vocabulary_of_a_store_is_known_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {"mixture": {"sources": TWO}}, "model": {"vocab_size": 512}}))
    assert load_config(path).config.model.vocab_size == 512
    text = {"a": {"kind": "python-stdlib"}}
    path.write_text(yaml.safe_dump({"data": {"mixture": {"sources": text}}, "model": {"vocab_size": 512}}))
    with pytest.raises(ConfigError, match="less than the tokenizer's 4096"):
        load_config(path)
