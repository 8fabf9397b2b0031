"""Perplexity: streamed equals whole, whatever the rows, chunk or ranks; the numbers are what their names say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from paralm_data import DataError, StoreWriter, Tokenizer, TokenStore

from paralm.config import ModelConfig
from paralm.errors import UserError
from paralm.evaluation.bootstrap import ratio_interval_by_moments, ratio_intervals
from paralm.evaluation.perplexity import PerplexityResult, perplexity, validate
from paralm.evaluation.result import eval_dir, read_json, save
from paralm.evaluation.scoring import score
from paralm.evaluation.stream import select_documents
from paralm.models import LanguageModel, build_model

MIXERS = ["paragru", "paralstm", "attention"]


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer.load(prepared / "tokenizer.model")


@pytest.fixture(scope="module")
def store(prepared: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Documents of very different lengths, the shortest with no text at all."""
    source = TokenStore.open(prepared / "held_out")
    with StoreWriter(tmp_path_factory.mktemp("evaluation") / "store", tokenizer) as writer:
        for document, length in enumerate((120, 0, 100, 1, 64, 9, 130, 15)):
            ids = source.document(document)[1 : 1 + length].tolist()
            writer.add([ids], [len(tokenizer.decode_bytes(ids))])
        return writer.finish()


def model_of(mixer: str, tokenizer: Tokenizer, dtype: torch.dtype = torch.float64) -> LanguageModel:
    config = ModelConfig(d_model=16, n_layers=2, mixer={"name": mixer, "n_heads": 2}, loss_chunk=50)
    model = build_model(config, tokenizer.vocab_size, seed=3).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # far from the uniform predictions of a new model
            parameter.mul_(2.0)
    return model


def whole(model: LanguageModel, store: TokenStore, document: int, reset_every: int | None = None) -> np.ndarray:
    """Each token's loss from the logits of whole documents (or windows), one at a time: no streaming, no labels."""
    ids = torch.from_numpy(store.document(document))
    step = reset_every or len(ids)
    found = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, step):
            part = ids[start : start + step + 1]
            logits = model(part[None, :-1]).logits[0].double()
            found.append(-logits.log_softmax(-1).gather(1, part[1:, None])[:, 0])
    return torch.cat(found).numpy()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("reset_every", [None, 13])
def test_streamed_equals_whole_whatever_rows_and_chunk(
    mixer: str, reset_every: int | None, store: TokenStore, tokenizer: Tokenizer
) -> None:
    model = model_of(mixer, tokenizer).eval()
    expected = [whole(model, store, d, reset_every) for d in range(store.n_documents)]
    # With three rows a lane that is not the last one runs out first: states must be kept by row, not by count.
    for rows, chunk in ((1, 1000), (1, 7), (3, 7), (3, 16), (20, 64)):
        found = score(model, store, range(store.n_documents), rows=rows, chunk=chunk, reset_every=reset_every)
        # float64: sums of up to 200 losses of about 6 nats, so 1e-9 is far above rounding and far below any mistake
        np.testing.assert_allclose(found.loss, [e.sum() for e in expected], rtol=0, atol=1e-9)
        assert found.tokens.tolist() == [len(e) for e in expected]
        for bucket in range(9):
            inside = [e[(1 << bucket) - 1 : (2 << bucket) - 1] for e in expected]
            assert found.bucket_tokens[bucket] == sum(map(len, inside))
            assert found.bucket_loss[bucket] == pytest.approx(sum(i.sum() for i in inside), abs=1e-9)
        assert found.bucket_tokens.sum() == found.tokens.sum()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precisions_agree_within_their_rounding(
    mixer: str, dtype: torch.dtype, tolerance: float, store: TokenStore, tokenizer: Tokenizer
) -> None:
    # The weights are the same numbers in both: those that the lower precision holds.
    low = model_of(mixer, tokenizer, dtype)
    exact = model_of(mixer, tokenizer)
    exact.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    found = perplexity(low, store, tokenizer, rows=3, chunk=32)
    assert found.nats_per_token == pytest.approx(perplexity(exact, store, tokenizer).nats_per_token, rel=tolerance)


def test_the_numbers_are_what_their_names_say(store: TokenStore, tokenizer: Tokenizer) -> None:
    model = model_of("paragru", tokenizer)
    found = perplexity(model, store, tokenizer, rows=3, chunk=16)
    nats = sum(whole(model.eval(), store, d).sum() for d in range(store.n_documents))
    texts = [tokenizer.decode(store.document(d)) for d in range(store.n_documents)]
    n_bytes, words = sum(len(t.encode()) for t in texts), sum(len(t.split()) for t in texts)
    predictions = store.n_tokens - store.n_documents  # all but each BOS; each EOS counts
    assert (found.tokens, found.n_bytes, found.words, found.n_documents) == (predictions, n_bytes, words, 8)
    assert found.nats_per_token == pytest.approx(nats / predictions, rel=1e-12)
    assert found.token_perplexity == pytest.approx(math.exp(nats / predictions), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)
    assert found.word_perplexity == pytest.approx(math.exp(nats / words), rel=1e-12)
    assert sum(found.documents.nats) == pytest.approx(nats, rel=1e-12)
    assert found.documents.n_bytes == [len(t.encode()) for t in texts]
    assert found.bits_per_byte_interval is not None
    assert found.bits_per_byte_interval[0] < found.bits_per_byte < found.bits_per_byte_interval[1]
    assert sum(b.tokens for b in found.by_position) == predictions
    assert found.by_position[0].tokens == 8
    assert sum(b.tokens * b.nats_per_token for b in found.by_position) == pytest.approx(nats, rel=1e-12)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary(store: TokenStore, tokenizer: Tokenizer) -> None:
    model = model_of("paragru", tokenizer)
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert perplexity(model, store, tokenizer).token_perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-12)


@pytest.mark.parametrize("world_size", [2, 3, 11])
def test_validation_sums_do_not_depend_on_the_number_of_ranks(
    world_size: int, store: TokenStore, tokenizer: Tokenizer
) -> None:
    model = model_of("paragru", tokenizer)
    one = validate(model, store, 300, rows=4, chunk=16)
    parts = [validate(model, store, 300, 4, 16, rank=r, world_size=world_size) for r in range(world_size)]
    assert sum(p.loss_sum for p in parts) == pytest.approx(one.loss_sum, abs=1e-9)
    assert sum(p.tokens for p in parts) == one.tokens
    assert sum(p.n_bytes for p in parts) == one.n_bytes
    assert sum(p.documents for p in parts) == one.documents
    full = perplexity(model, store, tokenizer, 300)
    assert full.tokens == one.tokens
    assert full.bits_per_byte == pytest.approx(one.loss_sum / one.n_bytes / math.log(2), rel=1e-12)


def test_the_cap_holds_at_whole_documents(store: TokenStore, tokenizer: Tokenizer) -> None:
    found = perplexity(model_of("paragru", tokenizer), store, tokenizer, 100)
    assert found.documents.index == select_documents(store, 100).tolist()
    assert found.tokens + found.n_documents <= 100
    assert found.of_documents == 8


def test_dropout_is_off_while_scoring_and_the_mode_is_put_back(store: TokenStore, tokenizer: Tokenizer) -> None:
    config = ModelConfig(d_model=16, n_layers=1, mixer={"name": "paragru", "n_heads": 2}, dropout=0.5)
    model = build_model(config, tokenizer.vocab_size, seed=0).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (validate(model, store, 300, rows=4, chunk=16).loss_sum for _ in range(2))
    assert first == second
    assert model.training
    assert torch.equal(before, torch.get_rng_state())  # validation must not change what training draws next


def test_progress_ends_with_everything_done(store: TokenStore, tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, int]] = []
    model = model_of("paragru", tokenizer)
    found = perplexity(model, store, tokenizer, rows=2, chunk=16, on_progress=lambda *p: seen.append(p))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (found.tokens, found.tokens)


def test_what_cannot_work_is_refused_in_one_line(
    store: TokenStore, tokenizer: Tokenizer, corpus: Path, tmp_path: Path
) -> None:
    model = model_of("paragru", tokenizer)
    for sizes in ({"rows": 0}, {"chunk": 0}, {"max_tokens": 0}, {"reset_every": -1}):
        with pytest.raises(UserError, match=f"{next(iter(sizes))} is .*; it must be at least 1"):
            perplexity(model, store, tokenizer, **sizes)
    small = build_model(ModelConfig(d_model=16, n_layers=1, mixer={"name": "paragru", "n_heads": 2}), 300, seed=0)
    with pytest.raises(UserError, match="vocabulary of 320, the model one of 300"):
        perplexity(small, store, tokenizer)
    texts = [p.read_text(encoding="utf-8") for p in sorted(corpus.iterdir())[:30]]
    other = Tokenizer.train(texts, tmp_path / "other.model", vocab_size=310)
    with pytest.raises(DataError, match="made with the tokenizer of SHA-256"):
        perplexity(model, store, other)
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    with pytest.raises(UserError, match="the model's loss on document 0 is nan") as caught:
        perplexity(model, store, tokenizer)
    assert "\n" not in str(caught.value)
    assert math.isnan(validate(model, store, 300, rows=4, chunk=16).loss_sum)  # training decides what to do


# -- intervals -----------------------------------------------------------------------------------------------


def test_the_bootstrap_covers_what_it_says() -> None:
    """Ratios of sums of made-up documents, whose true ratio is 2: of 200 intervals of 95 %, about 190 hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        size = rng.lognormal(3.0, 0.7, 60)
        interval = ratio_intervals(size * rng.normal(2.0, 0.4, 60), [size], seed=trial)[0]
        assert interval is not None
        held += interval[0] <= 2.0 <= interval[1]
    assert 0.89 * 200 <= held <= 199  # five standard deviations below, and not always


def test_intervals_from_sums_are_the_bootstraps_and_add_up() -> None:
    draws = np.random.Generator(np.random.PCG64(5))
    weight = draws.integers(1, 200, 400).astype(float)
    loss = weight * draws.normal(3, 0.4, 400)

    def moments(which: slice) -> np.ndarray:
        part, n = loss[which], weight[which]
        return np.array([part.sum(), n.sum(), (part**2).sum(), (part * n).sum(), (n**2).sum(), len(part)])

    whole = ratio_interval_by_moments(moments(slice(None)))
    assert whole is not None
    (expected,) = ratio_intervals(loss, [weight])
    assert expected is not None
    assert whole == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))
    parts = moments(slice(0, 130)) + moments(slice(130, None))
    assert ratio_interval_by_moments(parts) == pytest.approx(whole, rel=1e-9)
    assert ratio_interval_by_moments([3.0, 2.0, 9.0, 6.0, 4.0, 1.0]) is None
    low, high = ratio_interval_by_moments([1.0, 2.0, 1.0, 1.0, 2.0, 2.0]) or (-1.0, -1.0)
    assert (low, round(high, 2)) == (0.0, 1.48), "losses of 0 and 1: what lies below 0 is none"


def test_intervals_are_reproducible_and_none_where_there_is_nothing_to_draw() -> None:
    loss, size = np.arange(1.0, 9.0), np.arange(2.0, 10.0)
    assert ratio_intervals(loss, [size], 5) == ratio_intervals(loss, [size], 5)
    assert ratio_intervals(loss, [size], 5) != ratio_intervals(loss, [size], 6)
    assert ratio_intervals(loss, [loss], 0) == [(1.0, 1.0)]
    assert ratio_intervals(loss[:1], [size[:1], size[:1]]) == [None, None]
    assert ratio_intervals(loss, [np.zeros(8)]) == [None]


# -- writing -------------------------------------------------------------------------------------------------


def test_a_result_is_written_as_json_scalars_and_figure_and_read_back(
    store: TokenStore, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = model_of("paragru", tokenizer)
    found = perplexity(model, store, tokenizer, train_seq_len=32).model_copy(update={"step": 7})
    overflown = found.model_copy(update={"set": "other", "token_perplexity": math.inf})
    files = save([found, overflown], tmp_path)
    assert [f.name for f in files] == [
        "perplexity.json", "perplexity_by_position.png", "perplexity_other.json", "perplexity_other_by_position.png",
    ]  # fmt: skip
    assert all(f.parent == eval_dir(tmp_path) for f in files)
    assert read_json(PerplexityResult, files[0]) == found
    assert read_json(PerplexityResult, files[2]) == overflown
    assert read_json(PerplexityResult, tmp_path / "nowhere.json") is None
    assert files[1].read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(tmp_path / "tensorboard" / "eval"))
    board.Reload()
    event = board.Scalars("eval/perplexity/bits_per_byte")[0]
    assert event.step == 7
    assert event.value == pytest.approx(found.bits_per_byte, rel=1e-6)  # TensorBoard keeps float32
    files[0].write_text(files[0].read_text(encoding="utf-8").replace('"tokens": ', '"tokens": "x', 1))
    with pytest.raises(UserError, match=r"perplexity\.json: damaged") as caught:
        read_json(PerplexityResult, files[0])
    assert "\n" not in str(caught.value)
