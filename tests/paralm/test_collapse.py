"""The collapse evaluation: it reads and keeps what it says; verdicts reach page and JSON."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paralm_data import Tokenizer, TokenStore

from paralm.errors import UserError
from paralm.evaluation.collapse import Collapse
from paralm.evaluation.collapse_result import CollapseResult, build_result
from paralm.evaluation.collapse_rule import bucket_edges
from paralm.evaluation.collapse_streams import Streams, read_afresh, read_carried
from paralm.evaluation.result import eval_dir, read_json
from paralm.evaluation.state_statistics import effective_rank, state_statistics
from paralm.evaluation.suite import Target, run_suite
from paralm.models import LanguageModel
from paralm.models.mitigations import Mitigation, mitigated
from tests.paralm.small_models import small_model

T, LENGTH = 8, 40
EDGES = bucket_edges(T, LENGTH)


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer.load(prepared / "tokenizer.model")


@pytest.fixture(scope="module")
def store(prepared: Path) -> TokenStore:
    return TokenStore.open(prepared / "train")


def by_hand(model: LanguageModel, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each token's loss from the logits of a whole forward; 0 where there is none to make."""
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits
    wanted = torch.from_numpy(np.maximum(labels, 0))
    losses = -logits.log_softmax(-1).gather(2, wanted.unsqueeze(-1)).squeeze(-1).numpy()
    return np.where(labels >= 0, losses, 0.0)


def test_sums_are_the_losses_of_the_buckets_positions(store: TokenStore, tokenizer: Tokenizer) -> None:
    model = small_model("mamba2", tokenizer.vocab_size, d_state=4)
    streams = Streams(store, tokenizer, "natural", 4, LENGTH, T)
    tokens, labels = streams.read(0, LENGTH)
    losses = by_hand(model, tokens, labels)
    found = read_carried(model, streams, EDGES, 7)
    for bucket, (begin, end) in enumerate(itertools.pairwise(EDGES)):
        np.testing.assert_allclose(np.asarray(found["nats"])[:, bucket], losses[:, begin:end].sum(1), rtol=1e-9)
        assert np.asarray(found["tokens"])[:, bucket].tolist() == (labels[:, begin:end] >= 0).sum(1).tolist()
    assert np.asarray(found["tokens"]).sum() == (labels >= 0).sum()


def test_afresh_is_from_a_state_half_to_one_window_old(store: TokenStore, tokenizer: Tokenizer) -> None:
    model = small_model("mamba2", tokenizer.vocab_size, d_state=4)
    streams = Streams(store, tokenizer, "natural", 4, LENGTH, T)
    tokens, labels = streams.read(0, LENGTH)
    losses = by_hand(model, tokens[:, :T], labels[:, :T])
    for first in range(T, LENGTH, T // 2):
        begin, end = first - T // 2, min(first + T // 2, LENGTH)
        losses = np.concatenate((losses, by_hand(model, tokens[:, begin:end], labels[:, begin:end])[:, T // 2 :]), 1)
    assert losses.shape == (4, LENGTH)
    found = np.asarray(read_afresh(model, streams, EDGES, T, 3)["nats"])
    expected = np.stack([losses[:, begin:end].sum(1) for begin, end in itertools.pairwise(EDGES)], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    carried = np.asarray(read_carried(model, streams, EDGES, 3)["nats"])
    inside = EDGES.index(T)
    np.testing.assert_allclose(found[:, :inside], carried[:, :inside], rtol=1e-9)
    assert not np.allclose(found[:, inside:], carried[:, inside:], rtol=1e-6)


def test_streams_are_documents_end_to_end_that_do_not_overlap(store: TokenStore, tokenizer: Tokenizer) -> None:
    natural = Streams(store, tokenizer, "natural", 3, 200, T)
    whole = natural.read(0, 200)[0]
    parts = [natural.read(begin, begin + 50)[0] for begin in range(0, 200, 50)]
    assert (np.concatenate(parts, 1) == whole).all()
    line = whole.reshape(-1)
    begins = np.flatnonzero(line == natural.bos)
    documents = [store.document(i) for i in range(store.n_documents)]
    for begin, end in itertools.pairwise(begins.tolist()):
        assert any(np.array_equal(line[begin:end], document) for document in documents)
    tokens, labels = natural.read(0, 200)
    assert (labels[tokens == natural.eos] < 0).all()
    assert (labels[tokens != natural.eos] >= 0).all()


def test_repeated_text_and_newlines(store: TokenStore, tokenizer: Tokenizer) -> None:
    repeat = Streams(store, tokenizer, "repeat", 4, 32, T).read(5, 29)[0]
    natural = Streams(store, tokenizer, "natural", 4, 32, T).read(0, T)[0]
    assert (repeat == np.tile(natural, 5)[:, 5:29]).all()
    newlines = Streams(store, tokenizer, "newlines", 4, 32, T)
    ids = newlines.read(0, 10)[0]
    assert ids.shape == (1, 10)
    assert ids[0, 0] == newlines.bos
    assert ids[0, 1:].tolist() == (tokenizer.encode("\n") * 9)[:9]


def test_effective_rank_of_known_matrices() -> None:
    identity, one = torch.eye(5), torch.ones(7, 1) @ torch.arange(1.0, 4.0)[None]
    assert float(effective_rank(identity)) == pytest.approx(5)
    assert float(effective_rank(one)) == pytest.approx(1, abs=1e-5)
    assert float(effective_rank(torch.zeros(3, 4))) == 0
    given = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(given.double())
    p = sigma / sigma.sum(-1, keepdim=True)
    expected = (-(p * p.log()).sum(-1)).exp()
    torch.testing.assert_close(effective_rank(given), expected)
    torch.testing.assert_close(effective_rank(given.mT), expected)


def test_statistics_are_of_heads(tokenizer: Tokenizer) -> None:
    model = small_model("mamba2", tokenizer.vocab_size, d_state=4, head_dim=8)
    state, earlier = model.initial_state(3), model.initial_state(3)
    h = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h[:, 2, 1, 5] = 40.0
    state["layers"][1]["ssm"].copy_(h)
    earlier["layers"][1]["ssm"].copy_(h)
    earlier["layers"][1]["ssm"][:, 3] *= -2
    found = {(f.layer, f.leaf): f for f in state_statistics(model, state, earlier)}
    assert set(found) == {(layer, leaf) for layer in (0, 1) for leaf in ("ssm", "conv")}
    ssm = found[1, "ssm"]
    values = h.numpy().reshape(3, 4, 32)
    np.testing.assert_allclose(ssm.norm, np.linalg.norm(values, axis=-1).T, rtol=1e-9)
    np.testing.assert_allclose(ssm.extreme, np.abs(values).max(-1).T, rtol=1e-9)
    np.testing.assert_allclose(ssm.mean, values.mean((0, 2)), rtol=1e-9)
    np.testing.assert_allclose(ssm.variance, values.var(-1).mean(0), rtol=1e-9)
    assert ssm.cosine == pytest.approx([1, 1, 1, -1])
    assert ssm.channels[2][0] == 1 * 8 + 5
    assert ssm.rank is not None
    assert all(1 <= rank <= 4 for rank in ssm.rank)
    conv = found[1, "conv"]
    assert (len(conv.norm), conv.rank, conv.cosine) == (1, None, [0.0])


@pytest.mark.parametrize("name", ["mamba2", "mlstm"])
def test_statistics_leave_out_what_a_mitigation_keeps_for_itself(name: str, tokenizer: Tokenizer) -> None:
    model = small_model(name, tokenizer.vocab_size)
    ids = torch.zeros(2, 6, dtype=torch.int64)
    plain = [(f.layer, f.leaf) for f in state_statistics(model, model(ids).state)]
    for mitigation in (Mitigation(window=3), Mitigation(clip=1.0), Mitigation(decay=0.5)):
        with mitigated(model, mitigation):
            assert [(f.layer, f.leaf) for f in state_statistics(model, model(ids).state)] == plain


# -- the evaluation in the frame -----------------------------------------------------------------------------


def target_of(model: LanguageModel, tokenizer: Tokenizer, store: TokenStore, folder: Path) -> Target:
    return Target.of(model, tokenizer, run_dir=folder, stores={"held_out": store}, train_seq_len=T)


SETTINGS = {"streams": 4, "length": LENGTH, "mitigations": ["decay=0.5", "clip=0.01", "window=8"]}


def test_it_runs_in_the_frame_and_resumes(store: TokenStore, tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = target_of(small_model("mamba2", tokenizer.vocab_size, d_state=4), tokenizer, store, tmp_path / "a")
    outcome = run_suite(Collapse, target, SETTINGS)
    (result,) = outcome.results
    assert [reading.mitigation for reading in result.readings] == ["", "decay=0.5", "clip=0.01", "window=8"]
    assert [text.text for text in result.texts] == ["natural", "newlines", "repeat"]
    assert result.edges == EDGES
    assert len(result.texts[0].states) == len(EDGES) - 1
    assert (eval_dir(tmp_path / "a") / "collapse_loss.png").stat().st_size > 10_000
    assert (eval_dir(tmp_path / "a") / "collapse_states.png").stat().st_size > 10_000
    assert read_json(CollapseResult, eval_dir(tmp_path / "a") / "collapse.json") == result
    losses = {reading.label: reading.mean()[-1] for reading in result.readings}
    assert len({round(loss, 9) for loss in losses.values()}) == 4  # every switch did something
    page = (eval_dir(tmp_path / "a") / "report.md").read_text()
    assert "clip=0.01" in page
    assert "ollapse" in page
    other = target_of(target.model, tokenizer, store, tmp_path / "b")
    running = Collapse(other, Collapse.Settings.model_validate(SETTINGS))
    names = running.cells()
    cells = {name: running.measure(name) for name in reversed(names)}
    assert running.combine(cells)[0].model_dump_json() == result.model_copy(update={"step": 0}).model_dump_json()
    assert all(mixer.mitigation is None for mixer in target.model.mixers)


def cells_of(rise: float, grow: float, streams: int = 8) -> dict[str, dict[str, Any]]:
    """Of a model of two heads: its loss rises by ``rise`` nats from 2 T on, and its head 1 grows ``grow`` times."""
    draws = np.random.default_rng(0)
    at = np.asarray(EDGES[1:])
    tokens = np.full((streams, len(at)), 10)
    text = draws.normal(3, 1, (streams, len(at)))  # what the text at a position is like
    nats = (text + np.where(at > 2 * T, rise, 0)) * tokens

    def state(position: int) -> dict[str, Any]:
        norm = [[1.0] * streams, [grow if position > 2 * T else 1.0] * streams]
        return {
            "layer": 0, "leaf": "ssm", "norm": norm, "extreme": norm, "mean": [0.0] * 2, "variance": [1.0] * 2,
            "rank": [1.0] * 2, "cosine": None, "channels": [[0]] * 2,
        }  # fmt: skip

    natural = {"nats": nats.tolist(), "tokens": tokens.tolist(), "states": [[state(p)] for p in at]}
    afresh = {"nats": (text * tokens).tolist(), "tokens": tokens.tolist()}
    return {"natural": natural, "afresh": afresh, "natural+clip=1": {**natural, "nats": afresh["nats"]}}


def test_a_collapse_is_told_with_its_onset_its_head_and_what_helps() -> None:
    found = build_result(cells_of(0.5, 10.0), EDGES, T, "held_out")
    assert found.plain.verdict.verdict == "collapse"
    assert found.plain.verdict.onset == 2 * T + 1
    assert found.plain.loss_verdict.verdict != "collapse"  # the text's own ups and downs hide it
    assert {(d.layer, d.leaf, d.head) for d in found.plain.departures} == {(0, "ssm", 1)}
    assert found.plain.heads == 2
    assert found.readings[1].verdict.verdict == "none"
    page = found.page()
    for part in ("Collapse from position 17", "clip=1", "no collapse", "1 of 2", "| 0 | ssm | 1 | norm | 23 | 10 |"):
        assert part in page
    assert found.scalars() == {"collapse": 1.0, "rise_at_the_end": pytest.approx(0.5), "heads_left": 1.0, "onset": 17.0}
    assert found.figures()["loss"].axes[1].get_title() == "As trained: collapse"


def test_no_collapse_is_told_too() -> None:
    found = build_result(cells_of(0.0, 1.5), EDGES, T, "held_out")
    assert found.plain.verdict.verdict == "none"
    assert found.plain.departures == []
    assert "No collapse: no lasting rise above 0.050 nats" in found.page()
    assert "No head" in found.page()
    assert "onset" not in found.scalars()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"length": 12}, "at least 16"),
        ({"length": 10**9}, "too few for 16 streams"),
        ({"streams": 3}, "streams"),
        ({"mitigations": "window=0"}, "window=0: it must be at least 1"),
        ({"mitigations": "decay=1"}, "changes nothing"),
        ({"mitigations": ["clip=1", "clip=1.0"]}, "twice"),
        ({"texts": ["poems"]}, "texts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    settings: dict[str, Any], problem: str, store: TokenStore, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    target = target_of(small_model("mamba2", tokenizer.vocab_size), tokenizer, store, tmp_path)
    with pytest.raises(UserError) as error:
        run_suite(Collapse, target, settings)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert not eval_dir(tmp_path).exists()


def test_models_that_it_does_not_fit_are_refused(store: TokenStore, tokenizer: Tokenizer, tmp_path: Path) -> None:
    growing = target_of(small_model("attention", tokenizer.vocab_size, n_heads=2), tokenizer, store, tmp_path)
    with pytest.raises(UserError, match="grows with the sequence"):
        run_suite(Collapse, growing)
    cell = target_of(small_model("paragru", tokenizer.vocab_size), tokenizer, store, tmp_path)
    with pytest.raises(UserError, match="no window in layer 0, paragru: the decay of its recurrence depends"):
        run_suite(Collapse, cell, {"mitigations": "window=8"})
    unknown = Target.of(cell.model, tokenizer, run_dir=tmp_path, stores={"held_out": store})
    with pytest.raises(UserError, match="give train_seq_len"):
        run_suite(Collapse, unknown)
