"""Effective memory of models whose memory is known, by construction or by their window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paralm_data import Tokenizer, TokenStore
from torch import Tensor, nn

from paralm.config import ModelConfig
from paralm.errors import UserError
from paralm.evaluation.effective_memory import MemoryResult, distances, first_under, grid
from paralm.evaluation.suite import Part, Target, run_suite
from paralm.models import build_model
from paralm.models.lm import LMOutput
from tests.paralm.small_models import small_model


class LastTokens(nn.Module):
    """Predicts from the last ``span`` tokens and nothing else: the distribution is a hash of them."""

    def __init__(self, span: int, vocab_size: int = 11) -> None:
        super().__init__()
        self.span, self.vocab_size = span, vocab_size
        self.head_weight = nn.Parameter(torch.zeros(vocab_size, 1))

    def initial_state(self, batch: int, device: Any = None) -> Tensor:
        return torch.full((batch, self.span), -1, dtype=torch.int64)

    def forward(self, tokens: Tensor, state: Tensor, last_logits: bool = False) -> LMOutput:
        state = torch.cat([state, tokens], dim=1)[:, -self.span :]
        weights = torch.arange(1, self.span + 1)
        places = (state * weights).sum(1, keepdim=True) * 7 + 3 * torch.arange(self.vocab_size)
        return LMOutput(None, None, torch.sin(places.double()).mul(3)[:, None], state, {})


@pytest.mark.parametrize("span", [1, 4, 16, 32])
def test_a_model_that_reads_the_last_tokens_only_has_that_memory(span: int) -> None:
    tokens = np.random.Generator(np.random.PCG64(0)).integers(0, 11, (40, 64))
    kept = grid(64, 1)
    found = distances(LastTokens(span), tokens, kept, chunk=10)  # type: ignore[arg-type]
    assert kept == [1, 2, 4, 8, 16, 32]
    inside = np.array(kept) >= span
    assert (found[:, inside] == 0).all()
    assert (found[:, ~inside].mean(axis=0) > 0.1).all()
    assert (found <= 1).all()
    assert kept[first_under(found.mean(axis=0), 0.05)] == span


def test_total_variation_against_the_definition() -> None:
    model = small_model("paragru", 40, n_layers=1)
    tokens = np.random.Generator(np.random.PCG64(1)).integers(0, 40, (3, 20))
    found = distances(model, tokens, [1, 5, 19], chunk=6)
    with torch.no_grad():
        whole = model(torch.from_numpy(tokens)).logits[:, -1].softmax(-1)
        for column, k in enumerate([1, 5, 19]):
            part = model(torch.from_numpy(tokens[:, 20 - k :])).logits[:, -1].softmax(-1)
            np.testing.assert_allclose(found[:, column], (part - whole).abs().sum(-1) / 2, rtol=0, atol=1e-12)


def test_a_window_is_the_memory() -> None:
    """One layer of attention over the last 8 tokens, itself included."""
    model = small_model("window_attention", 40, n_layers=1, window=8, n_persistent=0)
    tokens = np.random.Generator(np.random.PCG64(2)).integers(0, 40, (6, 50))
    kept = [1, 2, 4, 7, 8, 16, 32]
    found = distances(model, tokens, kept, chunk=9).mean(axis=0)
    assert (found[:4] > 1e-3).all()
    np.testing.assert_allclose(found[4:], 0, atol=1e-12)


def test_the_grid() -> None:
    assert grid(2, 2) == [1]
    assert grid(65, 2) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64]
    assert grid(10**6, 1)[-1] == 1 << 19


def test_where_a_curve_stays_under() -> None:
    assert first_under(np.array([0.5, 0.01, 0.2, 0.05, 0.0]), 0.05) == 3  # comes under, and back above
    assert first_under(np.array([0.0, 0.0]), 0.05) == 0
    assert first_under(np.array([0.0, 0.1]), 0.05) == 2


@pytest.fixture(scope="module")
def held_out(prepared: Path) -> tuple[TokenStore, Tokenizer]:
    return TokenStore.open(prepared / "held_out"), Tokenizer.load(prepared / "tokenizer.model")


def target(held_out: tuple[TokenStore, Tokenizer], run_dir: Path) -> Target:
    store, tokenizer = held_out
    config = ModelConfig(d_model=16, n_layers=1, mixer={"name": "paragru"})
    model = build_model(config, tokenizer.vocab_size, 0)
    return Target.of(model, tokenizer, run_dir=run_dir, stores={"held_out": store}, train_seq_len=16)


def test_the_evaluation_in_parts_is_that_at_once(held_out: tuple[TokenStore, Tokenizer], tmp_path: Path) -> None:
    settings = ["documents=5", "rows=2", "length=64", "chunk=50"]
    run_suite("memory", target(held_out, tmp_path / "a"), settings, part=Part(2, 2))
    run_suite("memory", target(held_out, tmp_path / "a"), settings)
    found = run_suite("memory", target(held_out, tmp_path / "b"), settings)
    (result,) = found.results
    assert (tmp_path / "a" / "eval" / "memory.json").read_bytes() == (
        tmp_path / "b" / "eval" / "memory.json"
    ).read_bytes()
    assert isinstance(result, MemoryResult)
    assert result.n_documents == 5
    assert result.curve[0].mean == pytest.approx(np.mean([row[0] for row in result.distances]))
    assert result.curve[0].interval[0] <= result.curve[0].mean <= result.curve[0].interval[1]
    report = found.report.read_text()
    assert "Effective memory:" in report
    assert "![Total variation](memory_total_variation.png)" in report
    assert (tmp_path / "b" / "eval" / "memory_total_variation.png").exists()


def test_the_default_length_is_what_enough_documents_have(
    held_out: tuple[TokenStore, Tokenizer], tmp_path: Path
) -> None:
    (result,) = run_suite("memory", target(held_out, tmp_path), ["documents=4"]).results
    lengths = sorted(int(end - start) for start, end in map(held_out[0].bounds, range(held_out[0].n_documents)))
    assert result.length == min(64, lengths[-4] - 1)
    with pytest.raises(UserError, match="at least 2 are needed; the second longest has"):
        run_suite("memory", target(held_out, tmp_path), ["length=100000"])


def test_what_is_beyond_the_grid_is_said(held_out: tuple[TokenStore, Tokenizer], tmp_path: Path) -> None:
    found = run_suite("memory", target(held_out, tmp_path), ["documents=4", "length=32", "threshold=1e-12"])
    (result,) = found.results
    assert (result.effective_memory, result.low, result.high) == (None, None, None)
    assert "more than 23 tokens" in found.report.read_text()
    assert result.scalars()["effective_memory"] == 32
