"""The size of the state: what every mixer carries is counted, and lengths come from the other results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from paralm.config import ModelConfig
from paralm.evaluation.capacity import CapacityResult, perplexity_passed, published_fit, state_sizes
from paralm.evaluation.perplexity import Bucket, Documents, PerplexityResult
from paralm.evaluation.result import eval_dir, write_json
from paralm.evaluation.suite import Target, run_suite
from paralm.models import LanguageModel, build_model
from paralm.registry import MIXERS


def model(**keys: Any) -> LanguageModel:
    return build_model(ModelConfig(d_model=32, n_layers=2, **keys), 40, 0).eval()


@pytest.mark.parametrize("name", MIXERS.names())
def test_sizes_are_those_of_the_state(name: str) -> None:
    built = model(mixer={"name": name})
    layers = state_sizes(built, 16)
    assert [layer.mixer for layer in layers] == [name, name]
    bounded = MIXERS.get(name).value.bounded_state
    with torch.no_grad():
        state = built(torch.zeros(3, 16, dtype=torch.int64)).state
    leaves = pytree.tree_leaves(state)
    assert sum(layer.elements for layer in layers) == sum(leaf.numel() for leaf in leaves) // 3
    assert sum(layer.n_bytes for layer in layers) == sum(leaf.numel() * leaf.element_size() for leaf in leaves) // 3
    grows = [leaf for layer in layers for leaf in layer.leaves if leaf.bytes_per_token]
    assert bool(grows) != bounded
    convolutions = sum(leaf.elements for layer in layers for leaf in layer.leaves if leaf.conv)
    weights = [p for key, p in built.named_parameters() if "conv" in key and key.endswith("weight")]
    # A convolution of width w holds the last w - 1 inputs of each of its channels.
    expected = sum(p.shape[0] * (p.shape[-1] - 1) for p in weights)
    assert convolutions == expected + (2 * 32 * 3 if name == "titans_mac" else 0)  # its queries pass through twice


def test_a_hybrid_is_told_layer_by_layer() -> None:
    layers = state_sizes(model(mixers=["mamba2", "attention"]), 8)
    assert [layer.mixer for layer in layers] == ["mamba2", "attention"]
    assert layers[0].elements == 128 * 64 + 3 * 320
    assert {leaf.path: leaf.bytes_per_token for leaf in layers[1].leaves} == {"k": 128, "v": 128, "position": 0}


def test_a_mixer_that_says_bounded_and_grows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MIXERS.get("attention").value, "bounded_state", True)
    with pytest.raises(RuntimeError, match="layer 0: attention declares bounded_state"):
        state_sizes(model(mixer={"name": "attention"}), 4)


def scored(losses: list[tuple[float, float]], train_seq_len: int | None = 16, **keys: Any) -> PerplexityResult:
    """With (loss, half of its interval) of the buckets 1, 2–3, 4–7, …"""
    result = PerplexityResult(
        step=3, train_seq_len=train_seq_len, tokens=1, n_bytes=1, words=None, n_documents=1, of_documents=1,
        reset_every=None, nats_per_token=1, nats_per_token_interval=None, token_perplexity=1,
        token_perplexity_interval=None, bits_per_byte=1, bits_per_byte_interval=None, word_perplexity=None,
        word_perplexity_interval=None, documents=Documents(index=[], nats=[], tokens=[], n_bytes=[], words=[]),
        by_position=[
            Bucket(first=1 << b, last=(2 << b) - 1, tokens=9, nats_per_token=loss, interval=(loss - half, loss + half))
            for b, (loss, half) in enumerate(losses)
        ],
    )  # fmt: skip
    return result.model_copy(update=keys)


@pytest.mark.parametrize(
    ("losses", "passed", "tested"),
    [
        ([4, 3, 2.5, 2, 2, 1.9, 2.05], 127, 127),  # 8 … 15 is the last within 16: 2 ± 0.1
        ([4, 3, 2.5, 2, 2, 2.3, 1.9], 31, 127),  # what comes after the first failure does not count
        ([4, 3, 2.5, 2, 2.21, 2, 2], 15, 127),
        ([4, 3, 2.5, 2, 2.19], 31, 31),  # intervals that touch
    ],
)
def test_how_far_perplexity_passes(losses: list[float], passed: int, tested: int) -> None:
    found = perplexity_passed(scored([(loss, 0.1) for loss in losses]))
    assert found is not None
    assert (found.length, found.tested, found.step) == (passed, tested, 3)


@pytest.mark.parametrize(
    ("longest", "passed"), [(100, 100), (127, 127), (11, 11)]
)  # the last bucket is 64 … 127, that of the training length 8 … 15
def test_no_length_is_reported_that_no_document_has(longest: int, passed: int) -> None:
    documents = Documents(index=[0, 1], nats=[9, 9], tokens=[7, longest], n_bytes=[9, 9], words=[1, 1])
    buckets = longest.bit_length()
    found = perplexity_passed(scored([(2, 0.1)] * buckets, documents=documents))
    assert found is not None
    assert (found.length, found.tested) == (passed, passed)


def test_positions_of_a_model_that_forgets_on_the_way_are_no_lengths() -> None:
    assert perplexity_passed(scored([(2, 0.1)] * 7, reset_every=16)) is None


def test_nothing_is_said_of_lengths_without_a_training_length() -> None:
    assert perplexity_passed(scored([(2, 0.1)] * 6, train_seq_len=None)) is None
    assert perplexity_passed(scored([])) is None


def test_it_is_measured_anew_when_a_length_is_known(tmp_path: Path) -> None:
    target = Target.of(model(mixer={"name": "paragru"}), run_dir=tmp_path)
    first = run_suite("capacity", target)
    (result,) = first.results
    assert isinstance(result, CapacityResult)
    assert result.passed == []
    assert (result.elements, result.conv_elements) == (2 * 32 * 4, 2 * 32 * 3)
    assert result.scalars()["bytes"] == result.n_bytes == 4 * result.elements
    assert run_suite("capacity", target).measured == 0
    write_json(eval_dir(tmp_path) / "perplexity.json", scored([(2, 0.1)] * 7))
    second = run_suite("capacity", target)
    assert [(p.evaluation, p.length) for p in second.results[0].passed] == [("perplexity", 127)]
    assert second.results[0].scalars()["longest_perplexity"] == 127
    report = second.report.read_text()
    assert "256 elements" in report
    assert "127 (all)" in report


def test_the_published_fit_is_given_inside_its_range_only() -> None:
    assert published_fit(500_000) is None
    assert published_fit(100_000_000) is None
    assert published_fit(5_000_000) == pytest.approx(21_391)
