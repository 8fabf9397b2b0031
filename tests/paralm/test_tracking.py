"""Runs of synthetic tasks: trained by the ordinary loop, stopped, moved and resumed; and ``paralm eval tracking``."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from paralm_data import IGNORE, SyntheticLoader, make_task
from torch import Tensor, nn

from paralm.config import Config
from paralm.config_files import dump_yaml, load_config
from paralm.errors import ConfigError, RunError, StoppedError, UserError
from paralm.evaluation.answers import answer, validate_answers
from paralm.evaluation.compare_tracking import compare_tracking
from paralm.evaluation.report import write_report
from paralm.evaluation.suite import Part, Target, run_suite
from paralm.evaluation.tracking import Tracking, TrackingResult, TrackingSettings, measure_size
from paralm.export import export
from paralm.models import build_model
from paralm.training.load import load_model
from paralm.training.loop import train
from paralm.training.metrics import read_metrics
from tests.paralm.test_training_ranks import run_ranks

CPU = torch.device("cpu")


class Output(NamedTuple):
    logits: Tensor
    state: Tensor


class Oracle(nn.Module):
    """Parity's answer, with the count of ones as its state; ``wrong``: it fails from so many tokens on."""

    def __init__(self, wrong: int | None = None) -> None:
        super().__init__()
        self.vocab_size, self.wrong = 3, wrong

    def forward(self, tokens: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> Output:
        if state is None:
            assert reset is not None
            assert reset[:, 0].all()
            state = torch.zeros(len(tokens), 2, dtype=torch.int64)
        read = state[:, :1] + torch.arange(1, tokens.shape[1] + 1)
        ones = state[:, 1:] + (tokens == 1).cumsum(1)
        said = ones % 2
        if self.wrong is not None:
            said = torch.where(read >= self.wrong, 1 - said, said)
        return Output(nn.functional.one_hot(said, 3) * 50.0, torch.stack([read[:, -1], ones[:, -1]], 1))


class Guesser(nn.Module):
    """One of the possible answers at random."""

    def __init__(self, classes: int, vocab_size: int) -> None:
        super().__init__()
        self.classes, self.vocab_size, self.draw = classes, vocab_size, torch.Generator().manual_seed(0)

    def forward(self, tokens: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> Output:
        said = torch.randint(self.classes, tokens.shape, generator=self.draw)
        return Output(nn.functional.one_hot(said, self.vocab_size).float(), torch.zeros(len(tokens), 1))


def score(model: nn.Module, task: Any, **settings: Any) -> TrackingResult:
    """Every cell and the result, without a run."""
    running = object.__new__(Tracking)
    running.settings, running.task, running.mixer, running.layers = TrackingSettings(**settings), task, "none", 1
    running.target = SimpleNamespace(model=model, device=CPU, config=Config())  # type: ignore[assignment]
    cells = {cell: json.loads(json.dumps(running.measure(cell))) for cell in running.cells()}
    (found,) = running.combine(cells)
    assert isinstance(found, TrackingResult)
    return found


def test_an_oracle_is_always_right() -> None:
    found = score(Oracle(), make_task({"task": "parity", "labels": "every"}), samples=40, chunk=37)
    assert {s.accuracy for s in found.sizes} == {s.sequence_accuracy for s in found.sizes} == {1.0}
    assert {s.scaled_accuracy for s in found.sizes} == {1.0}
    assert found.solved == max(s.longest for s in found.sizes) == 640
    for s in found.sizes:
        assert s.interval[1] == s.sequence_interval[1] == 1.0
        assert 0.9 < s.interval[0] < 0.92  # 40 examples, however many answers
        assert s.nats_per_answer < 1e-6


def test_guessing_is_chance() -> None:
    task = make_task({"task": "cycle_navigation", "labels": "every"})
    found = score(Guesser(5, task.vocab_size), task, sizes=["40", "80"], samples=300)
    for s in found.sizes:
        assert abs(s.accuracy - 0.2) < 0.02
        assert abs(s.scaled_accuracy) < 0.025
        assert s.interval[0] < 0.2 < s.interval[1]
        assert s.sequence_accuracy == 0.0
    assert found.solved == 0


def test_where_it_breaks_is_seen() -> None:
    """Right up to 99 tokens, wrong behind: by length, by position, by example."""
    task = make_task({"task": "parity", "labels": "every"})
    found = score(Oracle(wrong=100), task, sizes=["40", "99", "100", "200"], samples=8)
    assert [s.accuracy for s in found.sizes] == [1.0, 1.0, 0.99, 99 / 200]
    assert [s.sequence_accuracy for s in found.sizes] == [1.0, 1.0, 0.0, 0.0]
    assert found.solved == 100
    by_position = {(b.first, b.last): b.accuracy for b in found.sizes[-1].by_position}
    assert by_position[(33, 64)] == 1.0
    assert by_position[(65, 128)] == 35 / 64
    assert by_position[(129, 200)] == 0.0
    assert sum(b.answers for b in found.sizes[-1].by_position) == found.sizes[-1].answers == 8 * 200


@pytest.mark.parametrize("mixer", ["paragru", "mamba2", "slstm", "attention", "titans_mac"])
def test_neither_chunks_nor_rows_change_an_answer(mixer: str) -> None:
    task = make_task({"task": "words", "group": "S3", "max_len": 20})
    config = load_config([], ["data.synthetic={task: words}", "training.seq_len=40", "model.d_model=32",
                              "model.n_layers=2", f"model.mixer.name={mixer}"]).config  # fmt: skip
    model = build_model(config.model, task.vocab_size, seed=1).eval()
    examples = task.examples(0, "test", np.arange(6), size="20-50")
    options: dict[str, Any] = {"vocab_size": task.vocab_size, "device": CPU}
    whole = answer(model, examples, rows=6, chunk=10**6, **options)
    assert whole.asked.sum() == examples.lengths.sum()
    for rows, chunk in ((6, 7), (2, 13), (1, 1)):
        part = answer(model, examples, rows=rows, chunk=chunk, **options)
        assert np.array_equal(part.right, whole.right)
        assert np.allclose(part.loss, whole.loss, rtol=1e-4)
    logits = model(torch.from_numpy(examples.tokens)).logits
    labels = torch.from_numpy(examples.labels)
    direct = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    assert float(whole.loss.sum()) == pytest.approx(float(direct.detach()), rel=1e-5)
    assert whole.right.sum() == int((logits.argmax(-1) == labels).sum())


def test_few_logits_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paralm.evaluation.answers._LOGITS", 100)
    widths: list[int] = []
    oracle = Oracle()
    oracle.register_forward_pre_hook(lambda module, args: widths.append(args[0].numel() * 3))
    task = make_task({"task": "parity"})
    examples = task.examples(0, "test", np.arange(4), size="50")
    assert answer(oracle, examples, vocab_size=3, rows=4, chunk=512, device=CPU).whole.all()
    assert max(widths) <= 100


def test_what_is_not_finite_is_no_answer() -> None:
    """The likeliest of NaNs is id 0: parity's answer in half of the examples, which reads as a model that guesses."""

    class Lost(Oracle):
        def forward(self, tokens: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> Output:
            output = super().forward(tokens, state, reset)
            return output._replace(logits=output.logits * torch.nan)

    examples = make_task({"task": "parity"}).examples(0, "test", np.arange(32), size="16")
    found = answer(Lost(), examples, vocab_size=3, rows=32, chunk=16, device=CPU)
    assert not found.right.any()
    assert np.isnan(found.loss).all()


# -- through the ordinary loop -------------------------------------------------------------------------------


def settings(root: Path, name: str, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "run": {"name": name, "root": str(root), "seed": 3},
        "data": {"synthetic": {"task": "parity", "max_len": 12, "labels": "every"}},
        "model": {"d_model": 16, "n_layers": 1, "init": "released", "tie_embeddings": False, "embedding_std": 1.0},
        "training": {"max_steps": 6, "seq_len": 12, "global_batch_size": 5, "micro_batch_size": 3,
                     "validate_tokens": 240, "validate_every": 3, "threads": 1},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 2},
    }  # fmt: skip
    for section, values in sections.items():
        base.setdefault(section, {}).update(values)
    return base


def run(root: Path, name: str, **sections: Any) -> Config:
    config = Config.model_validate(settings(root, name, **sections))
    train(config, say=lambda text: None)
    return config


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs"), "trained").run_dir


def test_a_run_needs_nothing_prepared(trained: Path) -> None:
    found = rows(trained, "validation")
    assert [row["step"] for row in found] == [3, 6]
    for row in found:
        assert row["set"] == "held_out"
        assert 0 <= row["sequence_accuracy"] <= row["accuracy"] <= 1
        assert "bits_per_byte" not in row
    assert not (trained / "data").exists()
    config = load_config(trained / "config.yaml").config
    model = build_model(config.model, 3, seed=3)
    batch = SyntheticLoader(make_task({"task": "parity", "max_len": 12, "labels": "every"}), 12, 5, seed=3).batch(0)
    loss = model(batch.tokens, labels=batch.labels, reset=batch.reset).loss / (batch.labels != IGNORE).sum()
    assert rows(trained)[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_validation_is_of_the_held_out_split(trained: Path) -> None:
    loaded = load_model(trained)
    task = make_task({"task": "parity", "max_len": 12, "labels": "every"})
    sums = validate_answers(
        loaded.model, task, 20, vocab_size=loaded.model.vocab_size, seed=3, rows=4, chunk=5, device=CPU
    )
    last = rows(trained, "validation")[-1]
    assert last["tokens"] == sums.answers
    assert last["accuracy"] == pytest.approx(sums.right / sums.answers, abs=1e-12)
    assert last["loss"] == pytest.approx(sums.loss / sums.answers, rel=1e-5)
    options: dict[str, Any] = {"vocab_size": 3, "seed": 3, "rows": 9, "chunk": 50, "device": CPU, "world_size": 3}
    parts = [validate_answers(loaded.model, task, 20, rank=rank, **options) for rank in range(3)]
    assert sum(p.examples for p in parts) == 20
    assert sum(p.right for p in parts) == sums.right
    assert sum(p.loss for p in parts) == pytest.approx(sums.loss, rel=1e-6)


def test_stopped_and_continued_equals_uninterrupted(trained: Path, tmp_path: Path) -> None:
    for limit in (1e-9, 1e-9, None):
        if limit is None:
            run(tmp_path, "part")
        else:
            with pytest.raises(StoppedError):
                run(tmp_path, "part", training={"stop_after_seconds": limit})
    assert [row["loss"] for row in rows(tmp_path / "part")] == [row["loss"] for row in rows(trained)]
    assert rows(tmp_path / "part", "validation") == rows(trained, "validation")


def test_another_task_is_another_run(trained: Path) -> None:
    with pytest.raises((ConfigError, RunError), match=r"data\.synthetic\.labels"):
        run(trained.parent, "trained", data={"synthetic": {"task": "parity", "max_len": 12, "labels": "last"}})


@pytest.mark.slow
def test_a_run_moves_over_world_sizes(tmp_path: Path) -> None:
    """Two ranks at stage 3 (which validates in lockstep, on an odd number of examples), then one at stage 1."""
    still = run(tmp_path, "still", training={"validate_tokens": 84})
    small = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    first = settings(tmp_path, "moved", training={"validate_tokens": 84, "stop_after_seconds": 1e-9})
    first["parallel"] = {"zero_stage": 3, **small}
    stage3 = settings(tmp_path, "stage3", training={"validate_tokens": 84}, parallel={"zero_stage": 3, **small})
    run_ranks(2, [first, stage3], tmp_path)
    run(tmp_path, "moved", training={"validate_tokens": 84})
    for name in ("moved", "stage3"):
        mine, theirs = rows(tmp_path / name), rows(still.run_dir)
        assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], rel=1e-5), name
    for one, two in zip(rows(tmp_path / "stage3", "validation"), rows(still.run_dir, "validation"), strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


# -- the evaluation ------------------------------------------------------------------------------------------

CHEAP = {"samples": 20, "sizes": ["12", "24-30", "40"]}


def test_evaluation_of_a_run(trained: Path) -> None:
    found = run_suite("tracking", trained, CHEAP)
    (result,) = found.results
    assert isinstance(result, TrackingResult)
    assert [s.size for s in result.sizes] == CHEAP["sizes"]
    assert [(s.shortest, s.longest) for s in result.sizes][::2] == [(12, 12), (40, 40)]
    assert (result.chance, result.trained, result.step, result.mixer) == (0.5, 12, 6, "paragru")
    page = found.report.read_text()
    assert "24-30" in page
    for figure in ("by_length", "by_position"):
        assert (trained / "eval" / f"tracking_{figure}.png").stat().st_size > 5000
        assert f"tracking_{figure}.png" in page
    assert set(result.scalars()) >= {"solved", "accuracy/12", "sequence_accuracy/24-30"}
    report = write_report(trained).read_text()
    assert "eval/tracking_by_length.png" in report
    assert "task | parity" in report or "parity" in report
    assert "paralm generate" not in report
    assert run_suite("tracking", trained, CHEAP).measured == 0


def test_parts_and_interruptions_change_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_suite("tracking", trained, {**CHEAP, "seed": 1}, again=True).results[0]
    first = run_suite("tracking", trained, {**CHEAP, "seed": 1, "chunk": 9, "rows": 7}, part=Part(2, 2))
    assert not first.complete
    second = run_suite("tracking", trained, {**CHEAP, "seed": 1, "chunk": 9, "rows": 7})
    assert second.kept == 1
    for mine, theirs in zip(second.results[0].sizes, whole.sizes, strict=True):
        assert mine.model_copy(update={"nats_per_answer": 0.0}) == theirs.model_copy(update={"nats_per_answer": 0.0})
        assert mine.nats_per_answer == pytest.approx(theirs.nats_per_answer, rel=1e-4)


def test_an_export_is_measured_too(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "out")
    from_run = run_suite("tracking", trained, CHEAP).results[0]
    assert run_suite("tracking", tmp_path / "out", CHEAP).results[0].sizes == from_run.sizes


def test_runs_side_by_side(trained: Path, tmp_path: Path) -> None:
    other = run(tmp_path, "other", model={"mixer": {"name": "mamba2", "head_dim": 8, "d_state": 4}}).run_dir
    with pytest.raises(RunError, match="not measured yet; paralm eval tracking"):
        compare_tracking([trained, other], tmp_path / "a.png")
    for path in (trained, other):
        run_suite("tracking", path, CHEAP)
    found = compare_tracking([trained, other], tmp_path / "a.png")
    assert found.figure.stat().st_size > 5000
    assert found.header[-3:] == CHEAP["sizes"]
    assert [row[:2] for row in found.cells] == [["trained", "paragru"], ["other", "mamba2"]]
    assert "| other" in found.markdown()
    with pytest.raises(RunError, match="given twice; compare different runs"):
        compare_tracking([trained, other, trained], tmp_path / "b.png")
    with pytest.raises(RunError, match="1 run to compare"):
        compare_tracking([trained], tmp_path / "b.png")
    with pytest.raises(RunError, match=r"ends in \.png"):
        compare_tracking([trained, other], tmp_path / "b.pdf")
    assert not list(tmp_path.glob("b.*"))
    third = run(tmp_path, "third", data={"synthetic": {"task": "cycle_navigation", "max_len": 12}}).run_dir
    run_suite("tracking", third, CHEAP)
    with pytest.raises(RunError, match="compare runs of one task"):
        compare_tracking([trained, third], tmp_path / "a.png")


# -- what is refused -----------------------------------------------------------------------------------------


def test_refused_in_one_line(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sizes: size '12:4' of task 'parity': give a length"):
        run_suite("tracking", trained, {"sizes": ["12:4"]})
    config = Config()
    model = build_model(config.model.model_copy(update={"d_model": 16, "n_layers": 1}), 300, seed=0)
    with pytest.raises(UserError, match=r"trained on text; 'tracking' measures runs of a task"):
        run_suite("tracking", Target.of(model, run_dir=tmp_path), {})
    for loaded in (load_model(trained), Target.open(trained)):
        with pytest.raises(RunError, match="trained on task 'parity', which has token ids and no text"):
            _ = loaded.tokenizer


def test_the_saved_configuration_says_everything(tmp_path: Path) -> None:
    loaded = load_config("tracking/parity_paralstm", [f"run.root={tmp_path}"]).config
    assert loaded.data.synthetic == {"task": "parity", "min_len": 3, "max_len": 40, "labels": "every"}
    (tmp_path / "again.yaml").write_text(dump_yaml(loaded))
    assert load_config(tmp_path / "again.yaml").config == loaded
    other = load_config("tracking/parity_paralstm", ["data.synthetic={task: words, group: S4}"]).config
    assert other.data.synthetic == {"task": "words", "min_len": 3, "max_len": 40, "labels": "every", "group": "S4"}


def test_a_cell_is_a_pure_function(trained: Path) -> None:
    target, task = Target.open(trained), make_task({"task": "parity", "max_len": 12, "labels": "every"})
    one, two = (measure_size(task, "24-30", TrackingSettings(samples=12), target) for _ in range(2))
    assert one == two
