"""Laws of every registered evaluation with every registered mixer: how a text is read, and in which order and by how
many processes the pieces are measured, changes no result. Whoever registers a mixer is tested here; whoever registers
an evaluation says in ``CHEAP`` how it is measured in a moment.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from paralm_data import StoreWriter, Tokenizer, TokenStore

from paralm.config import Config
from paralm.evaluation.result import eval_dir
from paralm.evaluation.suite import MODULES, Part, Target, evaluations, read_settings, run_suite
from paralm.registry import MIXERS
from tests.conftest import _WORDS
from tests.paralm.interrupting import interrupted
from tests.paralm.small_models import small_model

T = 8  # the training length
CHEAP: dict[str, dict[str, Any]] = {
    "capacity": {"tokens": 3},
    "collapse": {"streams": 4, "length": 23, "texts": ["repeat"]},
    "lm-eval": {"tasks": ["own_texts", "own_choices", "own_words"]},
    "memory": {"documents": 3, "length": 20},
    "passkey": {"lengths": [104], "depths": [0.3, 0.8], "samples": 2},
    "perplexity": {"parts": 2, "max_tokens": 220},
    "tracking": {"sizes": ["11", "12-30"], "samples": 3},
}
"""Settings under which an evaluation of the built-in ones has at least two pieces, but for one that has one only."""

ONE_PIECE = {"capacity"}
ONE_WAY = {"capacity"}
"""What reads its tokens in one way: the size of a state (tests/paralm/test_evaluation_capacity.py has its law)."""

WAYS: list[dict[str, Any]] = [
    {"chunk": 10_000, "rows": 100, "snapshots": False},
    {"chunk": 5, "rows": 2, "snapshots": True},
]
"""Settings, of those that an evaluation has, that say how it reads: everything at once, and in pieces."""
HOW = {"channels", "reference", "snapshots"}
"""Keys of results that no law is of: extreme channels and the bucket of the least loss, which rounding decides where
several are alike, and how much reading was saved."""

GROWING = {"collapse"}  # refuses a state that grows (test_models_that_it_does_not_fit_are_refused)
QUICK = ("paragru", "mamba2", "attention")
"""Mixers with which lm_eval's own runner, which takes seconds, is tried; its reading has its law over every mixer in
tests/paralm/test_lm_eval.py."""
CASES = [
    (evaluation, mixer)
    for evaluation in evaluations()
    for mixer, entry in MIXERS.entries().items()
    if (entry.value.bounded_state or evaluation not in GROWING) and (evaluation != "lm-eval" or mixer in QUICK)
]


@pytest.fixture(scope="module")
def store(corpus: Path, passkey_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Documents of 2 to some 80 tokens."""
    texts = [file.read_text() for file in sorted(corpus.iterdir())[:12]]
    with StoreWriter(tmp_path_factory.mktemp("registry") / "store", passkey_tokenizer) as writer:
        for text, characters in zip(texts, (90, 0, 60, 1, 70, 9, 80, 15, 50, 33, 44, 20), strict=True):
            ids = passkey_tokenizer.encode(text[:characters])
            writer.add([ids], [len(text[:characters].encode())])
        return writer.finish()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of lm_eval, of each kind one: texts, answers to choose from, text to go on with."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": " ".join(_WORDS[at : at + 3]), "a": _WORDS[at + 4 : at + 7], "gold": at % 3} for at in range(0, 20, 7)
    ]
    kinds: dict[str, dict[str, Any]] = {
        "own_texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}",
                      "metric_list": [{"metric": "bits_per_byte"}]},
        "own_choices": {"output_type": "multiple_choice", "doc_to_text": "{{q}} is", "doc_to_choice": "{{a}}",
                        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}]},
        "own_words": {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a[0]}}",
                      "generation_kwargs": {"until": [" "], "max_gen_toks": 4, "do_sample": False},
                      "metric_list": [{"metric": "exact_match"}]},
    }  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, kind in kinds.items():
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **kind}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


class Bench:
    """Measures any evaluation of any mixer's model."""

    def __init__(self, tokenizer: Tokenizer, store: TokenStore, tasks: Path) -> None:
        self.tokenizer, self.store, self.tasks = tokenizer, store, tasks
        self.model = functools.cache(lambda mixer: small_model(mixer, tokenizer.vocab_size))

    def target(self, mixer: str, run_dir: Path) -> Target:
        """With a text, a tokenizer and a task: whatever an evaluation may ask for."""
        synthetic = {"task": "words", "group": "S3", "max_len": 12}
        model = self.model(mixer)
        config = Config.model_validate({"data": {"synthetic": synthetic}, "model": model.config.model_dump()})
        stores = {"held_out": self.store}
        return Target.of(model, self.tokenizer, run_dir=run_dir, stores=stores, config=config, train_seq_len=T)

    def settings(self, evaluation: str, way: Mapping[str, Any] = WAYS[1]) -> dict[str, Any]:
        """``CHEAP``, read in one of the ways."""
        known = evaluations()[evaluation].Settings.model_fields
        found = CHEAP[evaluation] | {key: value for key, value in way.items() if key in known}
        return found | ({"include_path": str(self.tasks)} if evaluation == "lm-eval" else {})

    def running(self, evaluation: str, mixer: str, run_dir: Path, way: Mapping[str, Any] = WAYS[1]) -> Any:
        """The evaluation, before its first piece."""
        chosen = evaluations()[evaluation]
        return chosen(self.target(mixer, run_dir), read_settings(chosen, self.settings(evaluation, way)))


@pytest.fixture(scope="module")
def bench(passkey_tokenizer: Tokenizer, store: TokenStore, tasks: Path) -> Bench:
    return Bench(passkey_tokenizer, store, tasks)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a JSON-able tree, but those of ``HOW``."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {path: tree}
    return {k: v for key, part in items if key not in HOW for k, v in leaves(part, f"{path}/{key}").items()}


def assert_same(found: Any, expected: Any) -> None:
    """Numbers to the rounding of float64 after some tens of tokens (solvers stop at 1e-10 of a state)."""
    mine, theirs = leaves(found), leaves(expected)
    assert mine.keys() == theirs.keys()
    assert mine
    for path, value in mine.items():
        if isinstance(value, float) and isinstance(theirs[path], float):
            assert math.isclose(value, theirs[path], rel_tol=1e-7, abs_tol=1e-8), (path, value, theirs[path])
        else:
            assert value == theirs[path], path


def skip_without_lm_eval(evaluation: str) -> None:
    if evaluation == "lm-eval" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")


def test_every_evaluation_is_held_to_the_laws(bench: Bench, tmp_path: Path) -> None:
    """Each has its row here, at least two pieces, and at least two ways of being read."""
    built_in = {name for name, entry in evaluations().items() if entry.__module__ in MODULES}
    assert built_in == set(CHEAP)
    for name in built_in - {"lm-eval"}:
        assert len(bench.running(name, "paragru", tmp_path).cells()) > (name not in ONE_PIECE), name
    read_in_pieces = {name for name in built_in if "chunk" in evaluations()[name].Settings.model_fields}
    assert read_in_pieces == built_in - ONE_WAY


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(("evaluation", "mixer"), CASES)
def test_chunked_is_whole_and_a_piece_is_the_same_whenever_it_is_measured(
    evaluation: str, mixer: str, bench: Bench, tmp_path: Path
) -> None:
    """Results to rounding, read at once and in chunks; pieces to the bit, in order by one process and backwards by one
    process each."""
    skip_without_lm_eval(evaluation)
    whole, pieces = (bench.running(evaluation, mixer, tmp_path, way) for way in WAYS)
    in_order = {cell: json.dumps(pieces.measure(cell)) for cell in pieces.cells()}
    for cell in reversed(pieces.cells()):
        assert json.dumps(bench.running(evaluation, mixer, tmp_path).measure(cell)) == in_order[cell]
    if evaluation not in ONE_WAY:
        at_once = {cell: json.dumps(whole.measure(cell)) for cell in whole.cells()}
        assert_same(combined(pieces, in_order), combined(whole, at_once))


def combined(running: Any, cells: Mapping[str, str]) -> list[Any]:
    """The results, of pieces as JSON."""
    results = running.combine({name: json.loads(content) for name, content in cells.items()})
    return [result.model_dump(mode="json") for result in results]


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("evaluation", sorted(set(evaluations()) - ONE_PIECE))
def test_interrupted_and_in_parts_is_uninterrupted(
    evaluation: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the frame, to the byte of the result's files."""
    skip_without_lm_eval(evaluation)
    chosen, settings = evaluations()[evaluation], bench.settings(evaluation)
    for result in chosen.Results:  # drawing takes longer than all else here
        monkeypatch.setattr(result, "figures", lambda self: {})

    def run(way: str, part: Part | None = None) -> Any:
        return run_suite(chosen, bench.target("paragru", tmp_path / way), settings, part=part)

    cells = run("whole").measured
    with interrupted(monkeypatch, chosen, after=1):
        run("interrupted")
    assert not list(eval_dir(tmp_path / "interrupted").glob("*.json"))
    resumed = run("interrupted")
    assert (resumed.kept, resumed.measured) == (1, cells - 1)
    assert not run("parts", Part(2, 2)).complete
    assert run("parts", Part(1, 2)).complete
    results = [
        {file.name: file.read_bytes() for file in eval_dir(tmp_path / way).glob("*.json")}
        for way in ("whole", "interrupted", "parts")
    ]
    assert results[0]
    assert results[0] == results[1] == results[2]
