"""The benchmark of state tracking: what it says a run was, beside what was published; it forgets no row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paralm_data import make_task

from paralm.config import Config
from paralm.evaluation.suite import run_suite
from paralm.training.loop import train

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import tracking as benchmark
finally:
    sys.path.remove(str(BENCHMARKS))


def run(root: Path, name: str, length: int, before: str | None = None, **model: Any) -> Path:
    config = Config.model_validate(
        {
            "run": {"name": name, "root": str(root), "seed": 1},
            "data": {"synthetic": {"task": "modular_arithmetic", "labels": "every", "max_len": length}},
            "model": {"d_model": 16, "n_layers": 1, "tie_embeddings": False, **model},
            "training": {"max_steps": length, "seq_len": length, "global_batch_size": 2, "micro_batch_size": 2,
                         "validate_tokens": 40, "threads": 1, "init_from": before},
        }
    )  # fmt: skip
    train(config, say=lambda text: None)
    return config.run_dir


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a stage before it, and one without an MLP; both measured, the stage not."""
    root = tmp_path_factory.mktemp("runs")
    first = run(root, "tracking-arithmetic-paragru-len3", 3)
    for folder in (
        run(root, "tracking-arithmetic-paragru", 5, str(first)),
        run(root, "tracking-arithmetic-paragru_nomlp-s1", 5, mlp={"enabled": False}),
    ):
        run_suite("tracking", folder, {"sizes": ["40", "40-256"], "samples": 20})
    return root


def collected(root: Path, out: Path) -> dict[str, Any]:
    benchmark.main(["--collect", "--root", str(root), "--out", str(out), "--tasks", "arithmetic"])
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_a_row_says_what_the_run_was(root: Path, tmp_path: Path) -> None:
    rows = {row["run"]: row for row in collected(root, tmp_path / "out.json")["rows"]}
    assert list(rows) == ["tracking-arithmetic-paragru", "tracking-arithmetic-paragru_nomlp-s1"]  # no stage
    whole, bare = rows.values()
    assert [(s["max_len"], s["steps"]) for s in whole["stages"]] == [(3, 3), (5, 5)]
    assert [s["max_len"] for s in bare["stages"]] == [5]
    assert (whole["mlp"], bare["mlp"], bare["mixer"], bare["seed"]) == (True, False, "paragru_nomlp", 1)


def test_what_the_commonest_answer_reaches(root: Path, tmp_path: Path) -> None:
    """Counted here without the benchmark, among the very examples that were tested; products make 0 the commonest."""
    row = collected(root, tmp_path / "out.json")["rows"][0]
    labels = make_task({"task": "modular_arithmetic", "labels": "every"}).examples(0, "test", np.arange(20), size="40")
    asked = labels.labels[labels.labels >= 0]
    assert row["commonest"]["40"] == max(float(np.mean(asked == digit)) for digit in range(5)) > row["result"]["chance"]
    assert len(asked) == next(s["answers"] for s in row["result"]["sizes"] if s["size"] == "40")


def test_published_beside_ours(root: Path, tmp_path: Path) -> None:
    content = collected(root, tmp_path / "out.json")
    found = content["compared"]["arithmetic"]
    assert found["cells"].keys() == {"paragru", "paragru_nomlp"}
    for cell, row in zip(found["cells"].values(), content["rows"], strict=True):
        assert cell["published"] == 63
        accuracy = {size["size"]: size["accuracy"] for size in row["result"]["sizes"]}
        assert cell["ours_40-256"] == [round(100 * accuracy["40-256"], 1)]
    assert found["chance"] == 20.0
    assert len(found["why"]) > 100
    assert content["compared"].keys() == {"arithmetic"}


def test_rows_of_other_runs_stay(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    first = collected(root, out)["rows"]
    first[0]["run"], first[1]["steps"] = "tracking-arithmetic-elsewhere", 99
    out.write_text(json.dumps({"rows": first}))
    rows = {row["run"]: row for row in collected(root, out)["rows"]}
    assert rows.keys() == {"tracking-arithmetic-elsewhere", *(f.name for f in benchmark.found_runs("arithmetic", root))}
    assert rows["tracking-arithmetic-paragru_nomlp-s1"]["steps"] == 5


def test_the_configurations_of_the_table_are_there() -> None:
    pairs = benchmark.configured(list(benchmark.PUBLISHED), None)
    for task, known in benchmark.PUBLISHED.items():
        assert {(task, mixer) for mixer in known} <= set(pairs)
    assert ("cycle", "paralstm_nomlp") in pairs
    assert benchmark.run_name("cycle", "paralstm_nomlp", 2) == "tracking-cycle-paralstm_nomlp-s2"
