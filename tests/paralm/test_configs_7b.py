"""The 7B runs: complete, alike but for their scale, and each fits its GPUs with room as the best that was searched."""

from __future__ import annotations

from functools import cache

import pytest

from paralm import resources
from paralm.config import Config
from paralm.config_files import load_config
from paralm.planning import Planner, device_of
from paralm.planning.cost import with_room
from paralm.planning.run import value_of
from paralm.planning.search import CHOSEN, NEAR, ROOM, search

MODELS = ("paragru", "paralstm", "mamba2", "xlstm", "titans_mag", "transformer")
GPUS = (8, 64, 256)
STATED = (
    *CHOSEN,
    *(f"training.{key}" for key in ("max_steps", "seq_len", "global_batch_size", "precision")),
    *(f"optimizer.{key}" for key in ("name", "lr", "betas", "weight_decay", "clip_grad_norm")),
    *(f"optimizer.schedule.{key}" for key in ("kind", "warmup", "min_ratio")),
    *("checkpoint.every", "cluster.nodes", "cluster.gpus_per_node", "cluster.time", "run.name", "model.mixer.name"),
)
SLOW = [pytest.param(name, marks=[pytest.mark.slow] if name == "titans_mag" else []) for name in MODELS]


def config(model: str, gpus: int) -> Config:
    return load_config(f"7b/{model}_{gpus}").config


@cache
def planner(model: str) -> Planner:
    """What was traced of a model serves all its scales."""
    made = config(model, 8)
    return Planner(made, made.data.tokenizer.vocab_size, device_of("h100"), 8, 0.8)


def chosen(made: Config) -> dict[str, object]:
    return {key: value_of(made, key) for key in CHOSEN}


def test_there_is_one_for_each_model_and_scale() -> None:
    runs = {name for name in resources.presets() if name.startswith("7b/") and name.count("/") == 1}
    assert runs == {"7b/base", *(f"7b/{model}_{gpus}" for model in MODELS for gpus in GPUS)}


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("model", MODELS)
def test_each_states_all_that_decides_a_run(model: str, gpus: int) -> None:
    loaded = load_config(f"7b/{model}_{gpus}")
    assert [key for key in STATED if loaded.provenance[key].file is None] == []
    made = loaded.config
    training = made.training
    assert made.run.name == f"7b-{model.replace('_', '-')}-{gpus}"
    assert made.cluster.ranks == gpus
    assert training.global_batch_size * training.seq_len == 4_194_304
    rows, rest = divmod(training.global_batch_size, gpus // made.parallel.time)
    assert (rest, rows % training.micro_batch_size) == (0, 0), "every rank has the same number of whole micro-batches"
    tokens = training.max_steps * 4_194_304
    parameters = sum(p.numel() for p in planner(model).model.parameters())
    assert 18.5 <= tokens / parameters <= 21
    assert made.optimizer.schedule.warmup > 0


@pytest.mark.parametrize("model", MODELS)
def test_the_scales_of_a_model_learn_the_same(model: str) -> None:
    one, *others = (config(model, gpus) for gpus in GPUS)
    free = {"micro_batch_size", "activation_checkpointing"}
    for other in others:
        assert (other.model, other.data, other.optimizer) == (one.model, one.data, one.optimizer)
        assert other.training.model_dump(exclude=free) == one.training.model_dump(exclude=free)
    reference = config("paragru", 8)
    assert one.data == reference.data, "one text, one tokenizer, prepared once"
    assert one.training.max_steps == reference.training.max_steps


@pytest.mark.parametrize("model", SLOW)
def test_each_fits_with_room(model: str) -> None:
    for gpus in GPUS:
        here = planner(model).on(gpus, with_room(device_of("h100"), ROOM))
        assert here.plan(chosen(config(model, gpus))).fits, gpus


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in MODELS if name != "titans_mag"])
def test_none_of_the_grid_is_better(model: str) -> None:
    """Not asked of Titans, whose traces take minutes: `paralm plan 7b/titans_mag_8 --search`."""
    for gpus in GPUS:
        found = search(planner(model).on(gpus))
        assert found.best is not None
        made = config(model, gpus)
        given = chosen(made)
        again = given["training.activation_checkpointing"]
        assert {**given, "training.activation_checkpointing": int(again)} == {  # type: ignore[call-overload]
            key: found.best.value(key) for key in CHOSEN
        }
        assert found.best.time.step <= (1 + NEAR) * found.plans[0].time.step


def test_a_search_leaves_out_what_cannot_be() -> None:
    """Attention's state grows: no time shards. At stage 0 a GPU would hold 16 bytes a parameter."""
    found = search(planner("transformer"), (1, 2), micro_batches=(1,))
    assert {plan.value("parallel.time") for plan in found.plans} == {1}
    stages = [plan.value("parallel.zero_stage") for plan in search(planner("paragru"), micro_batches=(1,)).plans]
    assert sorted(stages) == [1, 2, 3]
    assert all(plan.fits for plan in found.plans)
    usable = device_of("h100").usable
    assert with_room(device_of("h100"), 0.25).usable == pytest.approx(0.75 * usable)
