"""The frame of the evaluation suite: resumed = uninterrupted, parts = one, nothing mixed, one line for mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from pydantic import Field

from paralm.config import ModelConfig
from paralm.errors import ConfigError, RunError, UserError
from paralm.evaluation import suite
from paralm.evaluation.cells import Cells
from paralm.evaluation.result import Result, eval_dir
from paralm.evaluation.suite import (
    Evaluation,
    EvaluationSettings,
    Part,
    Target,
    read_settings,
    register_evaluation,
    run_suite,
)
from paralm.evaluation.suite_report import write_suite_report
from paralm.models import build_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NormsSettings(EvaluationSettings):
    power: float = Field(default=2.0, gt=0, description="of the norm")
    names: list[str] = Field(default_factory=lambda: ["a", "b/c", "d e", "record"], description="cells")


class NormsResult(Result):
    kind: ClassVar[str] = "norms_of_tests"
    values: dict[str, float]

    def scalars(self) -> dict[str, float]:
        return {"sum": sum(self.values.values())}

    def figures(self) -> dict[str, Figure]:
        from paralm.evaluation import figures

        figure, axes = figures.new("cell", "norm")
        axes.plot(list(self.values.values()))
        return {"norms": figure}


class Norms(Evaluation):
    """Norms of the embedding, for tests.

    More that no list shows.
    """

    name = "norms_of_tests"
    Settings = NormsSettings
    Results = (NormsResult,)
    measured: ClassVar[list[str]] = []
    stop_at: ClassVar[str | None] = None

    def __init__(self, target: Target, settings: NormsSettings) -> None:
        super().__init__(target, settings)
        if settings.power == 13:
            raise UserError("power is 13; give another")

    def cells(self) -> list[str]:
        return list(self.settings.names)

    def measure(self, cell: str) -> dict[str, Any]:
        if cell == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append(cell)
        self.on_progress(1, 2)
        norm = self.target.model.embedding.weight.detach().norm(p=self.settings.power)
        return {"norm": float(norm) * len(cell)}

    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        assert list(cells) == self.cells()
        return [NormsResult(values={name: found["norm"] for name, found in cells.items()})]

    @classmethod
    def page(cls, results: Sequence[NormsResult]) -> str:
        return f"Sum {results[0].scalars()['sum']:.3f}\n\n![Norms]({cls.name}_norms.png)"


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    Norms.measured.clear()
    Norms.stop_at = None
    register_evaluation(Norms)
    yield
    suite._REGISTERED.pop(Norms.name, None)


def target(run_dir: Path, seed: int = 0) -> Target:
    config = ModelConfig(d_model=16, n_layers=1, mixer={"name": "paragru", "n_heads": 2})
    return Target.of(build_model(config, 40, seed), run_dir=run_dir, train_seq_len=32, step=7)


def files(run_dir: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(eval_dir(run_dir).iterdir()) if p.is_file()}


def test_results_figures_scalars_and_report_are_written(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = run_suite(Norms.name, target(tmp_path), on_progress=lambda *call: seen.append(call))
    assert found.complete
    assert found.measured == 4
    assert (found.results[0].step, found.results[0].train_seq_len) == (7, 32)
    assert set(files(tmp_path)) == {"norms_of_tests.json", "norms_of_tests_norms.png", "report.md"}
    report = found.report.read_text()
    assert "## norms_of_tests" in report
    assert "Norms of the embedding, for tests." in report
    assert "![Norms](norms_of_tests_norms.png)" in report
    assert "Measured after step 7" in report
    assert list((tmp_path / "tensorboard" / "eval").iterdir())
    assert ("norms_of_tests 2/4 b/c", 1, 2) in seen


def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    Norms.stop_at = "d e"
    with pytest.raises(KeyboardInterrupt):
        run_suite(Norms.name, target(tmp_path / "a"))
    assert not (eval_dir(tmp_path / "a") / "norms_of_tests.json").exists()
    Norms.stop_at = None
    Norms.measured.clear()
    found = run_suite(Norms.name, target(tmp_path / "a"))
    assert (found.measured, found.kept) == (2, 2)
    assert Norms.measured == ["d e", "record"]
    run_suite(Norms.name, target(tmp_path / "b"))
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    first.pop("report.md"), second.pop("report.md")  # says how long it took
    assert first == second


def test_the_same_call_again_measures_nothing_and_again_measures_all(tmp_path: Path) -> None:
    first = run_suite(Norms.name, target(tmp_path))
    second = run_suite(Norms.name, target(tmp_path))
    assert (second.measured, second.kept) == (0, 4)
    assert second.results == first.results
    assert run_suite(Norms.name, target(tmp_path), again=True).measured == 4


def test_measured_again_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a mended mistake that nobody gave a new version."""
    run_suite(Norms.name, target(tmp_path))
    monkeypatch.setattr(Norms, "measure", lambda self, cell: {"norm": 1.0})
    assert set(run_suite(Norms.name, target(tmp_path), again=True).results[0].values.values()) == {1.0}
    assert b'"a":1.0' in (eval_dir(tmp_path) / "norms_of_tests.json").read_bytes().replace(b" ", b"")


@pytest.mark.parametrize("change", ["settings", "weights", "version", "scoring"])
def test_a_changed_basis_discards(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_suite(Norms.name, target(tmp_path), part=Part(1, 2))
    if change == "version":
        monkeypatch.setattr(Norms, "version", 2)
    if change == "scoring":
        monkeypatch.setattr(suite, "scoring_version", lambda vocab_size, n_tokens: 9)
    found = run_suite(
        Norms.name, target(tmp_path, seed=int(change == "weights")), ["power=3"] if change == "settings" else []
    )
    assert (found.discarded, found.measured, found.kept) == (2, 4, 0)


def test_scores_are_of_another_version_where_the_vocabulary_is_padded(tmp_path: Path) -> None:
    config = ModelConfig(d_model=16, n_layers=1, mixer={"name": "paragru", "n_heads": 2}, vocab_size=64)
    padded = Target.of(build_model(config, 40, 0), run_dir=tmp_path)
    assert [suite._basis(Norms(t, NormsSettings())).get("scoring") for t in (target(tmp_path), padded)] == [None, 2]


def test_cells_of_another_basis_are_never_combined_whoever_writes_them(tmp_path: Path) -> None:
    """Another process with other settings writes into the same folder at the same time."""
    mine, other = target(tmp_path), target(tmp_path)
    run_suite(Norms.name, mine, part=Part(1, 2))
    before = {p.name: p.read_bytes() for p in (eval_dir(tmp_path) / "norms_of_tests.cells").glob("*.json")}
    run_suite(Norms.name, other, ["power=1"])
    for name, content in before.items():
        (eval_dir(tmp_path) / "norms_of_tests.cells" / name).write_bytes(content)
    found = run_suite(Norms.name, mine)
    assert (found.measured, found.kept) == (2, 2)
    run_suite(Norms.name, target(tmp_path / "alone"))
    assert (eval_dir(tmp_path) / "norms_of_tests.json").read_bytes() == (
        eval_dir(tmp_path / "alone") / "norms_of_tests.json"
    ).read_bytes()


def test_cells_that_another_evaluation_removes_meanwhile_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it begins, with other settings, during the second cell."""
    other, measure, name = Cells(tmp_path, Norms.name, {"power": 1}), Norms.measure, "norms_of_tests.json"
    run_suite(Norms.name, target(tmp_path / "alone"))
    Norms.measured.clear()

    def disturbed(self: Norms, cell: str) -> dict[str, Any]:
        if len(self.measured) == 1:
            assert other.prepare() == 1
        return measure(self, cell)

    monkeypatch.setattr(Norms, "measure", disturbed)
    found = run_suite(Norms.name, target(tmp_path))
    assert (found.complete, found.measured, found.kept) == (True, 4, 0)
    assert Norms.measured == ["a", "b/c", "d e", "record", "a"]
    assert (eval_dir(tmp_path) / name).read_bytes() == (eval_dir(tmp_path / "alone") / name).read_bytes()


def test_a_call_whose_cells_are_always_removed_does_not_end_as_if_it_were_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, measure = Cells(tmp_path, Norms.name, {"power": 1}), Norms.measure

    def disturbed(self: Norms, cell: str) -> dict[str, Any]:
        other.prepare()
        return measure(self, cell)

    monkeypatch.setattr(Norms, "measure", disturbed)
    with pytest.raises(RunError, match="another evaluation with other settings runs in this folder") as caught:
        run_suite(Norms.name, target(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (eval_dir(tmp_path) / "norms_of_tests.json").exists()
    assert run_suite(Norms.name, target(tmp_path / "parts"), part=Part(1, 2)).missing == 2


def test_a_cell_is_read_under_its_own_basis_and_name_only(tmp_path: Path) -> None:
    """The guard behind the clearing of the folder: another process may write between the two."""
    mine, other = (Cells(tmp_path, "passkey", {"power": power}) for power in (1, 2))
    mine.prepare()
    mine.put("a", {"norm": 1.0}, 0.0)
    assert mine.get("a") == {"norm": 1.0}
    assert other.get("a") is None
    assert mine.get("b") is None


def test_a_damaged_cell_is_measured_again(tmp_path: Path) -> None:
    run_suite(Norms.name, target(tmp_path))
    cell = eval_dir(tmp_path) / "norms_of_tests.cells" / "a.json"
    cell.write_text(cell.read_text()[:20])
    assert run_suite(Norms.name, target(tmp_path)).measured == 1


def test_replaced_results_are_combined_again_from_the_cells(tmp_path: Path) -> None:
    """The run's standard evaluation writes eval/perplexity.json too."""
    run_suite(Norms.name, target(tmp_path))
    path = eval_dir(tmp_path) / "norms_of_tests.json"
    whole = path.read_bytes()
    path.write_text(NormsResult(values={"z": 1.0}).model_dump_json())
    found = run_suite(Norms.name, target(tmp_path))
    assert found.measured == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 1, 2]])
def test_parts_in_any_order_are_one(tmp_path: Path, order: list[int]) -> None:
    run_suite(Norms.name, target(tmp_path / "one"))
    for done, index in enumerate(order):
        found = run_suite(Norms.name, target(tmp_path / "parts"), part=Part(index, 3))
        assert found.complete == (done == 2)
        assert (eval_dir(tmp_path / "parts") / "norms_of_tests.json").exists() == (done == 2)
    assert (eval_dir(tmp_path / "parts") / "norms_of_tests.json").read_bytes() == (
        eval_dir(tmp_path / "one") / "norms_of_tests.json"
    ).read_bytes()


def test_parts_are_disjoint_and_whole() -> None:
    names = [str(i) for i in range(11)]
    shares = [Part(i, 4).of(names) for i in range(1, 5)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert Part(5, 9).of(["x"]) == []


def test_where_a_part_is_asked_from() -> None:
    assert Part.parse("2/5") == Part(2, 5)
    assert Part.parse("rank", {"RANK": "3", "WORLD_SIZE": "4"}) == Part(4, 4)
    array = {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10"}
    assert Part.parse("array", {**array, "SLURM_ARRAY_TASK_STEP": "2"}) == Part(3, 3)
    # --array=3,5: SLURM counts two tasks, and the second has number 5.
    for task in ("3", "5"):
        irregular = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"}
        with pytest.raises(UserError, match="arrays must be regular, such as 0-7"):
            Part.parse("array", {**irregular, "SLURM_ARRAY_TASK_MAX": "5"})
    with pytest.raises(UserError, match="arrays must be regular, such as 0-7"):
        Part.parse("array", irregular)
    assert Part.parse("array", {**array, "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_MAX": "14"}) == Part(3, 3)
    for text in ("0/3", "4/3", "1", "1/x", "rank", "array"):
        with pytest.raises(UserError, match="part"):
            Part.parse(text, {})


def test_settings_and_their_mistakes() -> None:
    assert read_settings(Norms, ["power=1.5", "names=[x, y]"]) == NormsSettings(power=1.5, names=["x", "y"])
    for given, parts in [
        ("powr=2", ["powr", "norms_of_tests", "did you mean 'power'"]),
        ("power=-1", ["power", "greater than 0", "-1"]),
        ("power", ["power", "KEY=VALUE"]),
    ]:
        with pytest.raises(ConfigError) as error:
            read_settings(Norms, [given])
        assert "\n" not in str(error.value)
        assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_misspelt_name_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation 'norm_of_test'; did you mean 'norms_of_tests'"):
        run_suite("norm_of_test", target(tmp_path))
    with pytest.raises(UserError, match="power is 13"):
        run_suite(Norms.name, target(tmp_path), ["power=13"])
    assert not eval_dir(tmp_path).exists()


def test_what_cannot_stand_in_the_frame_is_refused() -> None:
    class NoPage(Norms):
        name = "no_page"

        def page(self, results: Sequence[Any]) -> str:  # type: ignore[override]
            return ""

    with pytest.raises(ConfigError, match="page"):
        register_evaluation(NoPage)


def test_the_report_shows_any_subset_and_names_a_damaged_file(tmp_path: Path) -> None:
    report = write_suite_report(tmp_path)
    assert "None yet" in report.read_text()
    run_suite(Norms.name, target(tmp_path))
    whole = report.read_text()
    report.unlink()
    assert write_suite_report(tmp_path).read_text() == whole
    (eval_dir(tmp_path) / "norms_of_tests.json").write_text(json.dumps({"step": "x"}))
    assert "norms_of_tests.json` cannot be read" in write_suite_report(tmp_path).read_text()


def test_a_store_opened_while_measuring_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not be part of what the cells follow from."""
    monkeypatch.setattr(Norms, "measure", lambda self, cell: self.target.store("held_out"))
    with pytest.raises(RuntimeError, match="open it in the evaluation's __init__"):
        run_suite(Norms.name, target(tmp_path))


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    first, second = target(tmp_path), target(tmp_path)
    assert first.digest == second.digest
    with torch.no_grad():
        second.model.embedding.weight[0, 0] += 1
    assert Target.of(second.model).digest != first.digest
