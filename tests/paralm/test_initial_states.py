"""What rows start from in training: passed states and fitted noise, the same after a restart, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from paralm.config import Config, ModelConfig
from paralm.errors import ConfigError, RunError, StoppedError
from paralm.models import LanguageModel, build_model
from paralm.training.initial_states import RATE, StateNoise
from paralm.training.loop import train
from paralm.training.metrics import read_metrics
from tests.conftest import quiet

CPU = torch.device("cpu")


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == "train"]


def mamba2(seed: int = 0) -> LanguageModel:
    config = ModelConfig(d_model=32, n_layers=2, mixer={"name": "mamba2", "head_dim": 16, "d_state": 64})
    return build_model(config, 50, seed=seed)


@pytest.mark.parametrize("kind", ["passed", "noise"])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(make: Any, kind: str) -> None:
    training = {"initial_state": kind, "max_steps": 4}
    whole = make("whole", training=training)
    train(whole, say=quiet)
    with pytest.raises(StoppedError):
        train(make("part", training={**training, "stop_after_seconds": 1e-9}), say=quiet)
    part = make("part", training=training)
    train(part, say=quiet)
    assert losses(part) == losses(whole)
    zero = make("zero", training={"max_steps": 4})
    train(zero, say=quiet)
    assert losses(zero)[0] == losses(whole)[0]  # the first step has nothing to start from
    assert all(a != b for a, b in zip(losses(zero)[1:], losses(whole)[1:], strict=True))


def test_passed_states_are_those_of_the_same_row_a_step_before(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = LanguageModel.forward, []

    def forward(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self.training:
            seen.append((kwargs["state"], output.state, kwargs["reset"]))
        return output

    monkeypatch.setattr(LanguageModel, "forward", forward)
    train(make("a", training={"initial_state": "passed", "max_steps": 3, "micro_batch_size": 2}), say=quiet)
    assert len(seen) == 6  # a batch of 4 rows in two parts
    assert seen[0][0] is None
    assert not all(bool(reset[:, 0].all()) for _, _, reset in seen)  # rows go on: they are not reset
    for (_, after, _), (before, _, _) in zip(seen, seen[2:], strict=False):
        for a, b in zip(pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True):
            assert torch.equal(a, b)
            assert not b.requires_grad


def test_noise_has_the_moments_of_the_states_by_leaf_and_head() -> None:
    model = mamba2()
    noise = StateNoise(model, 0, CPU)
    assert noise.draw(0, [0]) is None
    state = model.initial_state(8)
    draws, means, deviations = torch.Generator().manual_seed(0), [], []
    for layer in state["layers"]:
        heads = layer["ssm"].shape[1]
        mean, deviation = torch.linspace(-2, 2, heads), torch.linspace(0.1, 3, heads)
        layer["ssm"].normal_(generator=draws).mul_(deviation.view(1, -1, 1, 1)).add_(mean.view(1, -1, 1, 1))
        layer["conv"].fill_(7.0)  # is not noise
        means.append(mean)
        deviations.append(deviation)
    noise.add(pytree.tree_map(lambda leaf: leaf[:5], state))
    noise.add(pytree.tree_map(lambda leaf: leaf[5:], state))
    noise.finish(lambda tensor: None, good=True)
    drawn = noise.draw(3, range(8))
    for layer, mean, deviation in zip(drawn["layers"], means, deviations, strict=True):
        assert layer["ssm"].shape == (8, 4, 64, 16)
        torch.testing.assert_close(layer["ssm"].mean((0, 2, 3)), mean, rtol=0, atol=0.12)
        torch.testing.assert_close(layer["ssm"].std((0, 2, 3)), deviation, rtol=0.05, atol=0)
        assert not layer["conv"].any()


def fitted() -> StateNoise:
    noise = StateNoise(mamba2(), 5, CPU)
    noise.load([[0.5] * 8, [4.0] * 8])
    return noise


def test_a_draw_depends_on_seed_step_and_row_alone() -> None:
    noise = fitted()
    together = noise.draw(7, [0, 1, 2])["layers"][1]["ssm"]
    for row in range(3):
        assert torch.equal(fitted().draw(7, [row])["layers"][1]["ssm"][0], together[row])
    others = [noise.draw(8, [0]), noise.draw(7, [3])]
    noise.seed = 6
    others.append(noise.draw(7, [0]))
    assert all(not torch.equal(other["layers"][1]["ssm"][0], together[0]) for other in others)


def test_moments_follow_slowly_and_a_bad_step_leaves_no_trace() -> None:
    noise = fitted()
    before = noise.state()
    state = pytree.tree_map(lambda leaf: leaf + 10.0, noise.model.initial_state(2))
    noise.add(state)
    noise.finish(lambda tensor: None, good=False)
    assert noise.state() == before
    noise.add(pytree.tree_map(lambda leaf: leaf * float("nan"), state))
    noise.finish(lambda tensor: None, good=True)
    assert noise.state() == before
    noise.add(state)
    noise.finish(lambda tensor: tensor.mul_(2), good=True)  # two ranks with the same rows: the same moments
    mean, square = noise.state() or ([], [])
    assert mean == pytest.approx([0.5 + RATE * 9.5] * 8)
    assert square == pytest.approx([4.0 + RATE * 96] * 8)


def test_what_cannot_be_is_refused_in_one_line(make: Any) -> None:
    with pytest.raises(ValueError, match="both say what rows start from"):
        make("a", data={"order": "lanes"}, training={"carry_state": True, "initial_state": "noise"})
    for kind in ("passed", "noise"):
        config = make("b", training={"initial_state": kind}, model={"mixer": {"name": "attention", "n_heads": 2}})
        with pytest.raises(ConfigError, match=r"training.initial_state: the state of mixer attention grows"):
            train(config, say=quiet)
    config = make("c", training={"initial_state": "noise"}, model={"mixer": {"name": "slstm", "n_heads": 2}})
    with pytest.raises(ConfigError, match="names no free leaf"):
        train(config, say=quiet)


def test_what_rows_start_from_stays_what_it_was(make: Any) -> None:
    train(make("a", training={"max_steps": 2}), say=quiet)
    with pytest.raises(RunError, match=r"training.initial_state: the run .* was started with .zero., now .passed."):
        train(make("a", training={"max_steps": 2, "initial_state": "passed"}), say=quiet)
