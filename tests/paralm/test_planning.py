"""``paralm plan`` in parts: traces that repeat, communication as it was counted, remedies that are tried, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paralm.config import Config, ModelConfig
from paralm.config_files import load_config
from paralm.errors import ConfigError, UserError
from paralm.models import build_mixer, build_model
from paralm.models.mixers.base import shard_time
from paralm.planning import Planner, device_of
from paralm.planning.cost import FRAGMENTED, HOP, RESERVED, exchange
from paralm.planning.ledger import Ledger
from paralm.planning.memory import optimizer_costs, sizes_of
from paralm.planning.search import search
from paralm.planning.shards import CountedShards
from paralm.planning.trace import trace

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 512


def configuration(mixer: dict[str, Any] | None = None, **sections: Any) -> Config:
    base: dict[str, Any] = {
        "model": {"d_model": 64, "n_layers": 3, "mixer": mixer or {"name": "paragru"}},
        "training": {"seq_len": 64, "micro_batch_size": 2, "global_batch_size": 16, "precision": "bf16"},
    }
    for section, values in sections.items():
        base.setdefault(section, {}).update(values)
    return Config.model_validate(base)


def planner(config: Config, gpus: int = 8, **more: Any) -> Planner:
    return Planner(config, VOCABULARY, device_of("h100"), gpus, more.get("efficiency", 0.8))


COUNTED = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", COUNTED["rows"], ids=lambda row: f"{row['ranks']} ranks, ZeRO {row['stage']}")
def test_communication_is_what_was_counted(row: dict[str, Any]) -> None:
    """benchmarks/scaling.py; what differs is a few numbers (the loss, tokens, norms) and padding."""
    shape = COUNTED["shape"]
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if row["stage"] == 3 else {}
    config = Config.model_validate(
        {
            "model": {"d_model": shape["width"], "n_layers": shape["layers"], "mixer": {"name": "paragru"}},
            "training": dict.fromkeys(("global_batch_size", "micro_batch_size"), shape["rows"]),
            "optimizer": {"name": shape["optimizer"]},
            "parallel": {"zero_stage": row["stage"], "deepspeed": raw},
        }
    )
    model = build_model(config.model, 4096, 0, "meta")
    found = exchange(config, sizes_of(model), {}, row["ranks"]).by_kind()
    counted = {kind: size for kind, (_, size) in row["collectives"].items() if size > 1000}
    assert set(found) == set(counted)
    for kind, size in counted.items():
        assert found[kind] == pytest.approx(size, rel=1e-4), kind


def test_collectives_cost_their_way_round_the_ring() -> None:
    """Once a step at stage 1, every micro-batch at 2, for every weight at 3: the more ranks, the longer each."""
    shape = {"global_batch_size": 64, "micro_batch_size": 2}
    made = {
        stage: planner(configuration(training=shape, parallel={"zero_stage": stage}), 8).plan() for stage in (1, 2, 3)
    }
    assert made[1].exchange.reductions == 2
    assert made[2].exchange.reductions == 2 * made[2].micro_batches
    small = {"stage3_param_persistence_threshold": 0}
    raw = {"zero_stage": 3, "deepspeed": {"zero_optimization": small}}
    cut = planner(configuration(training=shape, parallel=raw), 8).plan()
    tensors = len(list(planner(cut.config).model.parameters()))
    assert cut.exchange.gathers == tensors * cut.micro_batches + 1
    two, eight = (planner(configuration(training={"global_batch_size": 2 * n}, parallel=raw), n).plan() for n in (2, 8))
    waiting = eight.time.communication - two.time.communication
    assert waiting > 0.99 * HOP * 6 * (eight.exchange.gathers + eight.exchange.reductions)


def test_a_ledger_counts_what_lives_and_forgets_what_is_gone() -> None:
    ledger = Ledger()
    with ledger:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100)[:, :50]  # the same memory
        c = torch.empty(500, device="meta") + torch.empty(500, device="meta")
        assert ledger.live == 6000
        del a
        assert ledger.live == 6000
        del b
        assert ledger.live == 2000
        ledger.mark("after")
        assert bool(torch.empty((), dtype=torch.bool, device="meta")) is False
        assert float(torch.ones(())) == 1.0
    assert ledger.segments[0].peak == 4000 + 3 * 2000
    assert ledger.segments[0].end == 2000
    assert [work.moved for work in ledger.segments[0].work] == [6000]
    del c


@pytest.mark.parametrize("mixer", ["paragru", "mamba2", "mlstm", "attention", "window_attention"])
def test_a_layer_more_is_one_repetition_more(mixer: str) -> None:
    """Kinds are traced once; a model with all layers traced would give the same."""
    config = configuration({"name": mixer}, training={"activation_checkpointing": mixer == "mlstm"})
    traced = trace(config, VOCABULARY)
    assert traced.layers == [0, 0, 0]
    assert len(traced.forward) == 1
    block = traced.forward[0]
    assert block.end > block.begin
    assert block.peak >= block.end
    assert sum(work.flops for work in block.work) > 0
    kept, freed = block.end - block.begin, traced.backward[0].begin - traced.backward[0].end
    if mixer in ("paragru", "mamba2", "attention"):  # of others the way to the state, never gone back, is left
        assert freed == pytest.approx(kept, rel=0.2)
    assert freed <= kept
    model = build_model(config.model, VOCABULARY, 0, "meta")
    layers = 3 * traced.backward[0].gradients
    ends = traced.head_backward.gradients + traced.embedding_backward.gradients
    assert layers + ends == sum(p.numel() for p in model.parameters())


def test_a_hybrid_has_a_trace_of_each_kind() -> None:
    config = configuration(model={"mixers": ["mamba2*2", "paragru"]})
    traced = trace(config, VOCABULARY)
    assert traced.layers == [0, 0, 1]
    assert len(traced.forward) == len(traced.backward) == 2


def test_what_walks_through_time_is_continued() -> None:
    """A recurrence that no kernel takes, step by step: four times the steps, four times the work and the memory."""
    mixer = {"name": "lstm", "d_head": 64, "method": "torch"}
    short, long = (trace(configuration(mixer, training={"seq_len": n}), VOCABULARY) for n in (256, 1024))
    kept = [t.forward[0].end - t.forward[0].begin for t in (short, long)]
    moved = [t.backward[0].moved for t in (short, long)]
    assert kept[1] / kept[0] == pytest.approx(4, rel=0.05)
    assert moved[1] / moved[0] == pytest.approx(4, rel=0.15)
    assert long.tokens == 2 * 1024


@pytest.mark.parametrize("mixer", ["paragru", "attention", "window_attention"])
def test_checkpointing_keeps_inputs_and_runs_blocks_again(mixer: str) -> None:
    plain, again = (
        trace(configuration({"name": mixer}, training={"activation_checkpointing": on}), VOCABULARY)
        for on in (False, True)
    )
    rows, steps, width = 2, 64, 64
    states = again.state_bytes / 3 if mixer != "window_attention" else 2 * rows * 2048 * width * 2
    assert again.forward[0].end - again.forward[0].begin < 1.6 * rows * steps * width * 4 + states
    forward, backward = (sum(w.flops for w in s.work) for s in (plain.forward[0], plain.backward[0]))
    # All but the last product, whose result nothing needs.
    mlp = build_model(configuration().model, VOCABULARY, 0, "meta").layers[0].mlp
    assert mlp is not None
    last = 2 * rows * steps * width * mlp.d_ff
    assert sum(w.flops for w in again.backward[0].work) == pytest.approx(forward + backward - last)


@pytest.mark.parametrize("mixer", ["paragru", "mamba2", "attention"])
def test_some_blocks_that_run_again_lie_between_none_and_all(mixer: str) -> None:
    """Memory falls (until it is one block's own that is most) and time rises with every block more; all of them, by
    number, are the plan of `true`."""
    made = planner(configuration({"name": mixer}, training={"seq_len": 512}))
    found = [made.plan({"training.activation_checkpointing": blocks}) for blocks in range(4)]
    again = [plan.time.compute for plan in found]
    assert again == sorted(set(again))
    kept = [max(moment.kinds["activations"] for moment in plan.memory.moments) for plan in found]
    assert kept[0] > kept[1] > max(kept[2:])
    for number, setting in ((0, False), (3, True)):
        other = made.plan({"training.activation_checkpointing": setting})
        assert (found[number].memory, found[number].time) == (other.memory, other.time)
    assert found[1].traced.again == [False, True]
    assert [found[1].traced.again[kind] for kind in found[1].traced.layers] == [True, False, False]


def test_auto_takes_the_fewest_blocks_that_fit() -> None:
    made = planner(configuration(training={"seq_len": 512}))
    peaks = [made.plan({"training.activation_checkpointing": n}).memory.peak.total for n in range(4)]
    assert peaks[0] > peaks[1] > peaks[2]
    for peak in peaks:
        memory = (peak + RESERVED) / (1 - FRAGMENTED) + 1
        small = Planner(made.config, VOCABULARY, replace(made.device, memory=memory), 8, 0.8)
        settled = small.plan({"training.activation_checkpointing": "auto"})
        assert settled.value("training.activation_checkpointing") == peaks.index(next(p for p in peaks if p <= peak))
        assert settled.fits
    none = Planner(made.config, VOCABULARY, replace(made.device, memory=RESERVED), 8, 0.8)
    assert none.plan({"training.activation_checkpointing": "auto"}).value("training.activation_checkpointing") == 3


def test_time_shards_count_what_a_rank_sends() -> None:
    """Of the size of states: twice as long sequences send as much (paralm_kernels.time_shards)."""
    mixer = {"name": "mamba2", "d_state": 16, "head_dim": 16}
    found = [
        trace(configuration(mixer, parallel={"time": 2}, training={"seq_len": n}), VOCABULARY).sent for n in (64, 128)
    ]
    assert found[0] == found[1]
    assert found[0]["state"] > 0
    alone = trace(configuration(mixer), VOCABULARY)
    assert not alone.sent
    half = trace(configuration(mixer, parallel={"time": 2}), VOCABULARY)
    assert half.tokens * 2 == alone.tokens


def test_ranks_that_take_turns_wait_for_each_other() -> None:
    """A dense recurrence over t shards with micro-batches of one row is no faster than on one rank."""
    lstm = {"name": "lstm", "n_heads": 1}
    shape = {"global_batch_size": 8, "micro_batch_size": 1, "seq_len": 512}
    alone = planner(configuration(lstm, training=shape), 1).plan()
    turns = planner(configuration(lstm, training=shape, parallel={"time": 4}), 4).plan()
    joined = planner(configuration(training=shape, parallel={"time": 4}), 4).plan()
    assert turns.traced.relays == [True]
    assert joined.traced.relays == [False]
    assert turns.time.compute > 0.9 * alone.time.compute


@pytest.mark.parametrize("sections", [{"parallel": {"time": 2}}, {"training": {"initial_state": "passed"}}])
def test_a_model_that_looks_at_its_state_is_planned_too(sections: dict[str, Any]) -> None:
    mixer = {"name": "titans_mag", "n_heads": 2, "n_attention_heads": 2, "window": 16, "chunk_size": 16}
    traced = trace(configuration(mixer, **sections), VOCABULARY)
    assert traced.resets
    assert traced.state_bytes > 0
    assert traced.relays == ["parallel" in sections]


@pytest.mark.parametrize("kept", [{"training": {"initial_state": "passed"}}, None])
def test_states_that_rows_go_on_from_are_held_for_every_micro_batch(kept: dict[str, Any] | None) -> None:
    """Carried or passed: what the trace of one micro-batch does not see."""
    sections: dict[str, Any] = kept or {"training": {"carry_state": True}, "data": {"order": "lanes"}}
    mixer = {"name": "mamba2", "d_state": 16, "head_dim": 16}
    config = configuration(mixer, **sections)
    one, eight = (planner(config).plan({"training.global_batch_size": rows}) for rows in (16, 128))
    assert (one.micro_batches, eight.micro_batches) == (1, 8)
    states = [plan.memory.moments[0].kinds["states"] for plan in (one, eight)]
    assert states[1] - states[0] == 7 * one.traced.state_bytes > 0


def test_cuts_that_documents_decide_are_left_out_or_refused() -> None:
    """Titans MAC cuts time where sequences start; nobody can say where without values."""
    mixer = {"name": "titans_mac", "n_heads": 2, "n_attention_heads": 2, "chunk_size": 16}
    assert not trace(configuration(mixer), VOCABULARY).resets
    with pytest.raises(ConfigError, match="depends on values, so it cannot be planned") as caught:
        trace(configuration(mixer, parallel={"time": 2}), VOCABULARY)
    assert "\n" not in str(caught.value)


def test_the_optimizers_states_are_those_it_makes() -> None:
    model = build_model(configuration().model, VOCABULARY, 0, "meta")
    total = sizes_of(model).total
    adam = optimizer_costs(configuration(), model, 4)
    assert adam.per_element == pytest.approx(2, rel=1e-3)
    assert adam.state == pytest.approx(8 * total / 4, rel=1e-3)
    muon = optimizer_costs(configuration(optimizer={"name": "muon"}), model, 4)
    assert muon.per_element == pytest.approx(2 - sizes_of(model).matrices / total, rel=1e-3)


def test_a_fused_update_moves_less_and_needs_no_room() -> None:
    """Four tensors read and three written, 28 bytes an element; the other way makes temporary ones."""
    model = build_model(configuration().model, VOCABULARY, 0, "meta")
    costs = {
        fused: optimizer_costs(configuration(optimizer={"fused": fused}), model, 4) for fused in (None, True, False)
    }
    assert costs[None] == costs[True]
    elements = costs[True].state / 8
    assert costs[True].moved == pytest.approx(28 * elements, rel=0.01)
    assert costs[True].workspace == 0
    assert costs[False].workspace > 0
    assert costs[False].moved > 1.5 * costs[True].moved
    assert costs[False].state == pytest.approx(costs[True].state, rel=1e-3)
    muon = optimizer_costs(configuration(optimizer={"name": "muon"}), model, 4)
    assert muon.workspace > 0


def test_shares_fall_with_the_stage_and_the_ranks() -> None:
    def held(stage: int, gpus: int) -> dict[str, int]:
        config = configuration(parallel={"zero_stage": stage}, training={"global_batch_size": 2 * gpus})
        return dict(planner(config, gpus).plan().memory.moments[0].kinds)

    n = sizes_of(build_model(configuration().model, VOCABULARY, 0, "meta")).total
    assert held(0, 8)["optimizer"] == pytest.approx(12 * n, rel=0.01)
    assert held(1, 8)["optimizer"] == pytest.approx(12 * n / 8, rel=0.01)
    assert held(1, 8)["gradients"] == 6 * n
    assert held(2, 8)["gradients"] == 0
    assert held(3, 8)["weights"] == pytest.approx(2 * n / 8, rel=0.01)
    assert held(2, 16)["optimizer"] * 2 == pytest.approx(held(2, 8)["optimizer"], rel=0.01)


def preset(name: str, *overrides: str, gpus: int = 8, device: str = "h100") -> Planner:
    given = ["training.precision=bf16", "training.seq_len=2048", "training.micro_batch_size=1"]
    config = load_config(f"model/{name}", [*given, "training.global_batch_size=256", *overrides]).config
    return Planner(config, 4096, device_of(device), gpus, 0.8)


def test_paragru_7b_on_one_node() -> None:
    """ZeRO 1 and a micro-batch of 1 do not fit 8 × 80 GB; with activation checkpointing they do."""
    made = preset("paragru_7b")
    found = made.plan()
    assert not found.fits
    remedy = made.remedy()
    assert remedy is not None
    changes, better = remedy
    assert changes == {"training.activation_checkpointing": "auto"}
    assert better.fits
    blocks = better.value("training.activation_checkpointing")
    assert 0 < blocks < 36
    assert not made.plan({"training.activation_checkpointing": blocks - 1}).fits
    every = made.plan({"training.activation_checkpointing": True})
    others = made.others(changes)
    assert [other[0] for other in others][:2] == [{"parallel.zero_stage": 2}, {"parallel.zero_stage": 3}]
    assert all(other.fits for _, other in others)
    kept = found.memory.peak.kinds["activations"]
    assert every.memory.peak.total < found.memory.peak.total - 0.85 * kept
    assert every.time.step > better.time.step > found.time.step
    assert 0.2 < every.mfu < better.mfu < found.mfu < 0.8
    assert preset("paragru_7b", device="h200").plan().fits
    # 6.9 billion parameters: weights 2 bytes, their gradients 2 and 4, masters and two moments 12 / 8
    n = found.sizes.total
    always = found.memory.moments[0]
    assert sum(always.kinds[kind] for kind in ("weights", "gradients", "optimizer")) == pytest.approx(9.5 * n, rel=0.01)


def test_remedies_are_tried_in_order() -> None:
    found = preset("paragru_7b", "training.activation_checkpointing=true", "parallel.zero_stage=0").remedy()
    assert found is not None
    assert found[0] == {"parallel.zero_stage": 1}
    alone = preset("paragru_7b", "parallel.zero_stage=3", "training.activation_checkpointing=true", gpus=1)
    assert not alone.plan().fits
    offloaded = alone.remedy()
    assert offloaded is not None
    assert offloaded[0]["parallel.offload_optimizer"] == "cpu"
    # Of two groups, 6.7 and 0.26 billion, masters and gradients in 32 + 1 GiB each, weights in half; and two moments.
    found = preset("paragru_7b", "parallel.zero_stage=2", "parallel.offload_optimizer=cpu", gpus=1).plan()
    assert found.memory.host == pytest.approx(82.5 * 2**30 + 8 * found.sizes.total, rel=0.01)
    assert offloaded[1].memory.host > 80e9


def test_a_checkpoint_that_waits_in_the_hosts_memory_is_counted_there() -> None:
    config = configuration(checkpoint={"asynchronous": True}, model={"n_layers": 1})
    found = planner(config).plan()
    assert found.memory.host == 12 * -(-found.sizes.total // 8)  # masters and two moments, of a rank


def test_more_gpus_take_less_time() -> None:
    eight, more = (planner(configuration(training={"global_batch_size": 512}), gpus).plan() for gpus in (8, 64))
    assert eight.micro_batches == 8 * more.micro_batches
    assert more.time.compute == pytest.approx(eight.time.compute / 8)
    wide = configuration(model={"d_model": 2048, "n_layers": 1})  # products take longer than their launch
    fast, slow = (planner(wide, 8, efficiency=share).plan() for share in (0.8, 0.1))
    assert slow.time.compute > fast.time.compute


def test_a_last_micro_batch_counts_by_its_rows() -> None:
    """Nine rows in micro-batches of eight are no sixteen, of work and of what time shards send."""
    made = planner(configuration(training={"micro_batch_size": 8, "global_batch_size": 8}, parallel={"time": 8}), 8)
    eight, nine = (made.plan({"training.global_batch_size": rows}) for rows in (8, 9))
    assert (eight.micro_batches, nine.micro_batches) == (1, 2)
    assert nine.time.compute == pytest.approx(9 / 8 * eight.time.compute)
    assert nine.exchange.between_shards == pytest.approx(9 / 8 * eight.exchange.between_shards, abs=1)


@pytest.mark.parametrize("time", [3, 4])
def test_a_sequence_on_two_nodes_goes_through_their_ports(time: int) -> None:
    """Shards of three on nodes of eight: the third sequence's lie on two; those of four never do."""
    made = planner(configuration(parallel={"time": time}), 24)
    slow, fast = (made.on(device=replace(made.device, port=port)).plan() for port in (60e9, 120e9))
    assert (slow.time.communication > fast.time.communication) == (time == 3)


@pytest.mark.parametrize(
    ("config", "gpus", "says"),
    [
        (configuration(), 12, "--gpus: 12 is no number of whole nodes of 8"),
        (configuration(), 0, "--gpus: 0"),
        (configuration(parallel={"time": 3}), 8, "parallel.time: 3 time shards do not divide 8 ranks"),
        (configuration({"name": "attention"}, parallel={"time": 2}), 8, "its state grows with the sequence"),
    ],
)
def test_what_cannot_be_planned_is_one_line(config: Config, gpus: int, says: str) -> None:
    with pytest.raises((UserError, ConfigError)) as caught:
        planner(config, gpus)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_device_is_told_the_list() -> None:
    with pytest.raises(UserError, match="h100, h200, a100, mi300x"):
        device_of("b300")
    assert device_of("H100") == device_of("h100")


SHARDED = [
    {"name": "paragru"},
    {"name": "paralstm"},
    {"name": "mamba2", "d_state": 8, "head_dim": 16},
    {"name": "mlstm", "n_heads": 2},
    {"name": "lstm", "n_heads": 2},
    {"name": "window_attention", "window": 17, "n_heads": 2},
]


@pytest.fixture(scope="module")
def really_sent(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    """By the second of three ranks, of each of SHARDED."""
    meeting = tmp_path_factory.mktemp("shards") / "meeting"
    command = [sys.executable, "-m", "tests.paralm.planning_shards_worker"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "3", str(meeting), json.dumps(SHARDED)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    found = [rank.communicate(timeout=200) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), found[1][1][-2000:]
    sent: list[dict[str, int]] = json.loads(found[1][0].strip().splitlines()[-1])
    return sent


@pytest.mark.parametrize("index", range(len(SHARDED)), ids=[spec["name"] for spec in SHARDED])
def test_what_is_counted_between_shards_is_what_is_sent(index: int, really_sent: list[dict[str, int]]) -> None:
    from paralm_kernels import dry_run

    from tests.paralm.planning_shards_worker import sent_by

    with dry_run():
        counted = sent_by(SHARDED[index], CountedShards(3), "meta")
    assert counted == really_sent[index]


@pytest.mark.parametrize("spec", [{"name": "paragru"}, {"name": "window_attention", "window": 17, "n_heads": 2}])
def test_a_second_forward_sends_no_second_gradient(spec: dict[str, Any]) -> None:
    from paralm_kernels import dry_run
    from torch.utils.checkpoint import checkpoint

    def sent(again: bool) -> dict[str, int]:
        mixer, shards = build_mixer(spec, ModelConfig(d_model=32, n_layers=1), 0).to("meta"), CountedShards(4)
        shard_time(mixer, shards)
        x = torch.zeros(2, 64, 32, device="meta", requires_grad=True)

        def outputs(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = mixer.over_time(x, None, None)[0]
            return y

        with dry_run():
            (checkpoint(outputs, x, use_reentrant=False) if again else outputs(x)).sum().backward()
        return dict(shards.bytes_sent)

    once, twice = sent(False), sent(True)
    back = {kind for kind in once if kind.endswith("gradient") or kind == "cotangents"}
    assert back
    assert {kind: size * (1 if kind in back else 2) for kind, size in once.items()} == twice


def test_nothing_is_proposed_that_no_configuration_may_be() -> None:
    """Compiled blocks have no stage 3, an offloaded optimizer no stage 0."""
    compiled = planner(configuration(training={"compile": True}), 8)
    for step in compiled._remedies():
        for changes in step:
            if changes.get("parallel.zero_stage") == 3:
                with pytest.raises(ConfigError, match="stage 0, 1 or 2"):
                    compiled.plan(changes)
    stages = {plan.value("parallel.zero_stage") for plan in search(compiled, (1,), (1,)).plans}
    assert 3 not in stages
    offloaded = planner(configuration(parallel={"zero_stage": 2, "offload_optimizer": "cpu"}), 8)
    assert {plan.value("parallel.zero_stage") for plan in search(offloaded, (1,), (1,)).plans} == {1, 2, 3}
