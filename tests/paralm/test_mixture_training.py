"""Runs over mixtures: what is drawn does not depend on stops, ranks or stages, and learning it changes nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paralm_data import DataError, MixtureLoader, SourceSpec, TokenizerSpec, prepare
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paralm.config import Config
from paralm.errors import ConfigError, RunError, StoppedError
from paralm.training.load import load_model
from paralm.training.loop import train
from paralm.training.metrics import read_metrics
from paralm.training.session import Session
from tests.conftest import quiet, settings, write_corpus
from tests.paralm.test_training_ranks import run_ranks

SOURCES = ("code", "prose", "noise")


@pytest.fixture(scope="module")
def folders(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three prepared folders of one tokenizer."""
    root = tmp_path_factory.mktemp("mixture")
    model = TokenizerSpec(model=prepared / "tokenizer.model")
    for seed, name in enumerate(SOURCES):
        text = write_corpus(root / "text" / name, documents=40 + 20 * seed, seed=seed + 1)
        if name == "noise":
            for path in text.glob("*.txt"):
                path.write_text(path.read_text()[::-1])
        prepare(SourceSpec("text", paths=(str(text),)), model, root / name, held_out_fraction=0.2, threads=1)
    return {name: str(root / name) for name in SOURCES}


Make = Callable[..., Config]


@pytest.fixture
def make(corpus: Path, prepared: Path, folders: dict[str, str], tmp_path: Path) -> Make:
    """``make(name, mixture keys, stage, **sections)``; ``data.dir`` is the tiny corpus's, whose tokenizer they have."""

    def make(name: str, mixture: dict[str, Any] | None = None, stage: int = 1, **sections: Any) -> Config:
        base = settings(corpus, prepared, tmp_path, **sections)
        base["run"]["name"] = name
        base["data"].pop("source")
        learned = {"target": "code", "every": 3, "rows": 3} if (mixture or {}).get("weights") in LEARNED else {}
        sources = {source: {"store": path} for source, path in folders.items()}
        base["data"]["mixture"] = {"sources": sources, **learned, **(mixture or {})}
        base["parallel"] = {"zero_stage": stage, **sections.get("parallel", {})}
        if stage == 3:
            base["parallel"]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        return Config.model_validate(base)

    return make


LEARNED = ("exp3", "ucb1")


def rows(config: Config) -> list[dict[str, Any]]:
    return [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == "train"]


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in rows(config)]


def drawn(config: Config) -> list[list[float]]:
    """Of each step: tokens and weight of every source, and the rewards there are."""
    found = []
    for row in rows(config):
        each = row["mixture"].values()
        found.append([value for source in each for key, value in sorted(source.items())])
    return found


def weights(config: Config) -> dict[str, torch.Tensor]:
    return dict(load_model(config.run_dir, dtype=torch.float32).model.named_parameters())


@pytest.mark.parametrize("kind", ["fixed", "temperature", *LEARNED])
def test_interrupted_is_uninterrupted(make: Make, kind: str) -> None:
    """Stopped four times, within rounds and at their ends: the same losses, draws, rewards and weights, to the bit."""
    whole = make("whole", {"weights": kind})
    train(whole, say=quiet)
    stopped = make("stopped", {"weights": kind}, training={"stop_after_seconds": 1e-9})
    for _ in range(4):
        with pytest.raises(StoppedError):
            train(stopped, say=quiet)
    train(make("stopped", {"weights": kind}), say=quiet)
    assert losses(stopped) == losses(whole)
    assert drawn(stopped) == drawn(whole)
    one, two = weights(stopped), weights(whole)
    assert all(torch.equal(one[name], two[name]) for name in two)
    if kind in LEARNED:
        assert len({tuple(row["mixture"][s]["weight"] for s in SOURCES) for row in rows(whole)}) > 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("gradient", ["last_block", "all"])
def test_measuring_changes_nothing_of_training(
    make: Make, stage: int, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws without a measurement give the same weights; the rewards are those of stage 1."""
    from paralm.training import alignment

    found = []
    original = alignment.Alignment.rewards

    def noted(self: Any, arms: list[int], step: int) -> list[float | None]:
        found.append(original(self, arms, step))
        return [0.25 for _ in arms]

    mixture = {"weights": "ucb1", "gradient": gradient}
    steps = {"max_steps": 7}
    monkeypatch.setattr(alignment.Alignment, "rewards", noted)
    train(make("measured", mixture, stage, training=steps, model={"dropout": 0.1}), say=quiet)
    monkeypatch.setattr(alignment.Alignment, "rewards", lambda self, arms, step: [0.25 for _ in arms])
    blind = make("blind", mixture, stage, training=steps, model={"dropout": 0.1})
    train(blind, say=quiet)
    measured = make("measured", mixture, stage)
    assert losses(measured) == losses(blind)
    one, two = weights(measured), weights(blind)
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert [len(rewards) for rewards in found] == [3, 1, 1]
    assert all(reward is not None and 0 < abs(reward) <= 1 for rewards in found for reward in rewards)


@pytest.mark.parametrize(
    ("stage", "training", "parallel"),
    [
        (1, {"precision": "bf16"}, {}),
        (3, {"precision": "bf16", "activation_checkpointing": True}, {}),
        (3, {}, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    ],
)
def test_rewards_are_the_same_however_the_model_is_kept(
    make: Make, stage: int, training: dict[str, Any], parallel: dict[str, Any]
) -> None:
    """bf16 weights, blocks that are run again, weights on the host: the first round's draws and rewards, about."""
    found = []
    for name, more in (("plain", {}), ("kept", {"stage": stage, "parallel": parallel, "training": training})):
        more.setdefault("training", {})["max_steps"] = 4  # type: ignore[index]
        config = make(name, {"weights": "ucb1", "gradient": "all"}, **more)
        train(config, say=quiet)
        found.append([row["mixture"][source]["reward"] for row in rows(config)[:2] for source in SOURCES])
    assert found[1] == pytest.approx(found[0], abs=0.02)


def test_rewards_are_the_cosine_of_gradients(make: Make) -> None:
    """Against autograd on a model by itself, in double precision."""
    from paralm_data import IGNORE, random_windows

    config = make("cosine", {"weights": "ucb1", "gradient": "all", "rows": 5})
    session = Session.open(config, quiet)
    try:
        assert session.learner is not None
        assert isinstance(session.loader, MixtureLoader)
        mine = session.learner.alignment.rewards([0, 1, 2], 9)
        model = session.model.double()
        gradients = []
        target = session.validation["code"]
        stores = [source.store for source in session.loader.sources]
        for store, name in zip([target, *stores], ["target", "0", "1", "2"]):
            batch = random_windows(store, 32, 5, config.run.seed, "alignment", name, 9)
            model.zero_grad()
            loss = model(batch.tokens, labels=batch.labels, reset=batch.reset).loss
            found = torch.autograd.grad(loss / (batch.labels != IGNORE).sum(), list(model.parameters()))
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        expected = [torch.cosine_similarity(gradients[0], other, dim=0).item() for other in gradients[1:]]
    finally:
        session.close()
    assert mine == pytest.approx(expected, abs=2**-10)
    assert mine[0] is not None
    assert mine[2] is not None
    assert mine[0] > mine[2]  # code's own held-out text agrees with it more than text written backwards


@pytest.mark.parametrize("kind", LEARNED)
def test_a_source_like_the_target_wins_over_its_mirror(make: Make, kind: str) -> None:
    config = make(
        "wins", {"weights": kind, "every": 1, "gradient": "all", "beta": 0.3},
        training={"max_steps": 60, "global_batch_size": 2},
    )  # fmt: skip
    train(config, say=quiet)
    last = rows(config)[-1]["mixture"]
    assert last["code"]["tokens"] + last["prose"]["tokens"] > 2 * last["noise"]["tokens"]
    assert sum(source["tokens"] for source in last.values()) == 60 * 2 * 32


def test_every_source_is_seen_in_tensorboard_and_validated_by_itself(make: Make) -> None:
    config = make("board", {"weights": "exp3"})
    train(config, say=quiet)
    board = EventAccumulator(str(config.run_dir / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    for source in SOURCES:
        for key in ("tokens", "weight", "epochs", "probability"):
            assert f"train/mixture/{source}/{key}" in tags
        assert f"validation/{source}/loss" in tags
    assert {tag for tag in tags if tag.endswith("/reward")}
    assert "train/time_alignment" in tags
    last = rows(config)[-1]["mixture"]
    assert sum(source["tokens"] for source in last.values()) == 12 * 4 * 32


def test_weights_by_temperature_follow_the_sizes(make: Make) -> None:
    config = make("warm", {"weights": "temperature", "temperature": 2.0}, training={"max_steps": 1})
    session = Session.open(config, quiet)
    try:
        assert isinstance(session.loader, MixtureLoader)
        sizes = [math.sqrt(source.store.n_tokens) for source in session.loader.sources]
        assert session.loader.weights == pytest.approx([size / sum(sizes) for size in sizes], abs=2e-5)
    finally:
        session.close()


def test_a_fork_learns_anew(make: Make, tmp_path: Path) -> None:
    train(make("first", {"weights": "ucb1"}), say=quiet)
    fork = make(
        "fork", {"weights": "ucb1"}, training={"max_steps": 18, "fork_from": f"{tmp_path / 'first'}@12"}
    )  # fmt: skip
    train(fork, say=quiet)
    found = rows(fork)
    assert [row["step"] for row in found] == list(range(13, 19))
    assert sum(source["tokens"] for source in found[-1]["mixture"].values()) == 6 * 4 * 32


@pytest.mark.parametrize(
    ("mixture", "steps", "complaint"),
    [
        ({"at_end": "stop"}, 5000, r"data\.mixture\.sources\.code: 5000 steps read it .*max_steps to \d+"),
        ({"weights": "exp3", "at_end": "stop"}, 5000, r"5000 steps draw 20,000 windows, and the sources have"),
    ],
)
def test_a_budget_beyond_the_epochs_allowed_is_refused(
    make: Make, mixture: dict[str, Any], steps: int, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        train(make("budget", mixture, training={"max_steps": steps}), say=quiet)


def test_stores_that_do_not_fit_are_refused(make: Make, folders: dict[str, str], tmp_path: Path) -> None:
    for seed in range(30):
        (tmp_path / f"{seed}.txt").write_text(f"number {seed}, of another tokenizer " * 40)
    spec = SourceSpec("text", paths=(str(tmp_path / "*.txt"),))
    prepare(spec, TokenizerSpec(vocab_size=300), tmp_path / "other", held_out_fraction=0.2, threads=1)
    other = {"a": {"store": folders["code"]}, "b": {"store": str(tmp_path / "other")}}
    with pytest.raises(DataError, match="'a' and 'b' were made with different tokenizers"):
        train(make("other", {"sources": other}), say=quiet)
    gone = {"a": {"store": folders["code"]}, "b": {"store": str(tmp_path / "absent")}}
    with pytest.raises(RunError, match=r"absent.*missing"):
        train(make("gone", {"sources": gone}), say=quiet)
    bare = {"a": {"store": f"{folders['code']}/train"}, "b": {"store": folders["prose"]}}
    with pytest.raises(ConfigError, match="source 'a' has no held-out part; name a set that has: held_out, b"):
        train(make("bare", {"sources": bare, "weights": "exp3", "target": "a"}), say=quiet)
    long = {"seq_len": 8192, "validate_tokens": 100}
    with pytest.raises(ConfigError, match="less than one window"):
        train(make("long", {"weights": "exp3"}, training=long), say=quiet)


@pytest.mark.slow
def test_draws_depend_neither_on_the_ranks_nor_on_the_stage(make: Make, tmp_path: Path) -> None:
    """1, 2 and 4 ranks at stages 0, 2 and 3, and a run that moves over all: the same draws, rewards and losses."""
    kinds = ("fixed", *LEARNED)

    def config(name: str, kind: str, stage: int, **training: Any) -> dict[str, Any]:
        shape = {"max_steps": 7, "global_batch_size": 5, **training}
        return json.loads(make(name, {"weights": kind}, stage, training=shape).model_dump_json())  # type: ignore

    grid = {1: 0, 2: 2, 4: 3}  # ranks → stage
    for world, stage in grid.items():
        cases = [config(f"{kind}_{world}", kind, stage) for kind in kinds]
        if world > 1:  # and a run that moves: one step on two ranks, one on four, the rest on one
            cases += [config(f"{kind}_moved", kind, 3 - stage // 2, stop_after_seconds=1e-9) for kind in kinds]
        run_ranks(world, cases, tmp_path)
    run_ranks(1, [config(f"{kind}_moved", kind, 1) for kind in kinds], tmp_path)
    for kind in kinds:
        reference = make(f"{kind}_1", {"weights": kind})
        assert len(rows(reference)) == 7
        for name in (f"{kind}_2", f"{kind}_4", f"{kind}_moved"):
            other = make(name, {"weights": kind})
            assert drawn(other) == drawn(reference), name
            assert losses(other) == pytest.approx(losses(reference), rel=1e-5), name
        assert len(list((tmp_path / f"{kind}_moved" / "attempts").glob("*.json"))) == 3
