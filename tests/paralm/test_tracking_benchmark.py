"""The benchmark of state tracking: what it says a run was, beside what was published; it forgets no row."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paralm_data import make_task

from paralm.config import Config
from paralm.config_files import load_config
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
    options = ["--root", str(root), "--out", str(out), "--docs", str(out.parent), "--tasks", "arithmetic"]
    benchmark.main(["--collect", *options])
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_a_row_says_what_the_run_was(root: Path, tmp_path: Path) -> None:
    rows = {row["run"]: row for row in collected(root, tmp_path / "out.json")["rows"]}
    assert list(rows) == ["tracking-arithmetic-paragru", "tracking-arithmetic-paragru_nomlp-s1"]  # no stage
    whole, bare = rows.values()
    assert [(s["max_len"], s["steps"]) for s in whole["stages"]] == [(3, 3), (5, 5)]
    assert [s["max_len"] for s in bare["stages"]] == [5]
    assert (whole["mlp"], bare["mlp"], bare["mixer"], bare["seed"]) == (True, False, "paragru_nomlp", 1)


def test_a_row_names_its_configuration_and_what_differs_from_it(root: Path, tmp_path: Path) -> None:
    whole, bare = collected(root, tmp_path / "out.json")["rows"]
    assert (whole["config"], bare["config"]) == ("tracking/arithmetic_paragru", "tracking/arithmetic_paragru_nomlp")
    differing = {text.partition("=")[0]: text.partition("=")[2] for text in whole["overrides"]}
    assert (differing["model.d_model"], differing["training.max_steps"]) == ("16", "5")
    assert not {"run.seed", "run.name", "run.root", "training.init_from"} & differing.keys()
    assert benchmark.overrides(whole["config"], load_config(whole["config"], ["run.seed=3"]).config) == []
    assert whole["commit"] == json.loads((root / whole["run"] / "environment.json").read_text())["git_commit"]


RESULT = json.loads(benchmark.RESULT.read_text())


@pytest.mark.parametrize("row", RESULT["rows"], ids=lambda row: row["run"])
def test_a_published_row_is_a_run_of_its_committed_configuration(row: dict[str, Any]) -> None:
    """As that stands now: whoever changes it trains again."""
    assert row["config"] == benchmark.config_name(row["task"], row["mixer"])
    config = load_config(row["config"]).config
    expected = benchmark.trained_as(config)
    assert {key: row[key] for key in expected} == expected
    assert row["overrides"] == []
    assert row["steps"] == row["of_steps"]
    assert row["result"]["task"] == make_task(config.data.synthetic or {}).spec
    stages = [(stage["max_len"], stage["steps"], stage["batch"]) for stage in row["stages"][:-1]]
    assert stages == list(benchmark.STAGES.get(row["task"], ()))
    assert re.fullmatch("[0-9a-f]{40}", row["commit"] or row["recorded_in"])


def test_architectures_of_a_task_differ_in_nothing_but_mixer_and_rate() -> None:
    for task in {row["task"] for row in RESULT["rows"]}:
        mine = [row for row in RESULT["rows"] if row["task"] == task and benchmark.NO_MLP not in row["mixer"]]
        keys = ("of_steps", "d_model", "layers", "mlp", "batch")
        assert len({tuple(row[key] for key in keys) for row in mine}) == 1, task


def test_the_readme_has_the_results_table() -> None:
    readme = (BENCHMARKS.parent / "README.md").read_text()
    for line in benchmark.readme_table(RESULT).splitlines():
        assert line in readme, line
    words = " ".join(readme.split())
    six = {mixer: benchmark.over_first(row, "40", 6) for row in RESULT["rows"] if row["task"] == "a5"
           for mixer in [row["mixer"]]}  # fmt: skip
    assert (
        "{paralstm:.0f} (ParaLSTM), {paragru:.0f} (ParaGRU) and {mamba2:.0f} % (Mamba2)".format(
            **{mixer: 100 * share for mixer, share in six.items()}
        )
        in words
    )
    sums = [row for row in RESULT["rows"] if row["task"] == "sums"]
    assert len(sums) == 3
    for row in sums:
        right = " / ".join(f"{100 * benchmark.at(row, size):.1f}" for size in benchmark.SHOWN)
        assert (
            f"{ {'paralstm': 'ParaLSTM is right', 'paragru': 'ParaGRU', 'mamba2': 'Mamba2'}[row['mixer']] } in {right}"
            in words
        )
    for row in (row for row in RESULT["rows"] if row["task"] == "s3"):
        right = " / ".join(f"{100 * benchmark.at(row, size):.0f}" for size in benchmark.SHOWN)
        name = {"slstm": "dense sLSTM", "paragru": "ParaGRU", "paralstm": "ParaLSTM", "mamba2": "Mamba2"}[row["mixer"]]
        assert f"{name} {right}" in words, row["run"]


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
