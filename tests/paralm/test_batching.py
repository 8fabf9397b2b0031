"""Sequences side by side give what each gives alone, for every mixer: nothing leaks from a neighbour or padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from paralm.batching import Batch, Stream, StreamText, read_prompts, state_nbytes, take_rows
from paralm.config import ModelConfig
from paralm.errors import UserError
from paralm.evaluation.likelihood import continuation_likelihoods
from paralm.generation import generate
from paralm.models import LanguageModel, build_model
from paralm.registry import MIXERS

NAMES = MIXERS.names()
FEW = ["paragru", "mlstm", "attention"]
PROMPTS = [[1, 5, 9, 2, 30], [1], [1, 7], [1, 5, 9, 2, 31], [3] * 17, [1, 8, 8, 8, 20, 4, 33, 12, 11]]


def model(name: str, **keys: Any) -> LanguageModel:
    config = ModelConfig(d_model=16, n_layers=2, mixer={"name": name, **keys}, tie_embeddings=False)
    lm = build_model(config, 40, seed=0).double().eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.5)
        lm.head_weight.mul_(10)  # so that untrained logits differ by more than a little
    return lm


def streams(**keys: Any) -> list[Stream]:
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_k": 5, "seed": 4},
        {"temperature": 1.0, "top_p": 0.8, "seed": 5, "stop_ids": (7, 11)},
        {"temperature": 0.0},
        {"temperature": 1.5, "seed": 6},
    ]
    return [
        Stream(prompt, 3 + 2 * n, **option, **keys)
        for n, (prompt, option) in enumerate(zip(PROMPTS, options, strict=True))
    ]


def alone(lm: LanguageModel, stream: Stream) -> list[int]:
    keys = {key: getattr(stream, key) for key in ("temperature", "top_k", "top_p", "seed", "stop_ids")}
    return list(generate(lm, stream.prompt, stream.max_tokens, **keys))


@pytest.mark.parametrize("name", NAMES)
def test_streams_side_by_side_are_each_as_if_alone(name: str) -> None:
    lm = model(name)
    expected = [alone(lm, stream) for stream in streams()]
    for rows, chunk in ((6, 512), (2, 4)):
        given = streams()
        batch = Batch(lm, rows=rows, chunk=chunk)
        for stream in given:
            batch.add(stream)
        done = list(batch.run())
        assert sorted(map(id, done)) == sorted(map(id, given))
        assert [stream.tokens for stream in given] == expected
        assert {stream.finished for stream in given} <= {"length", "stop"}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_read_side_by_side_leave_the_state_of_each_alone(name: str) -> None:
    lm = model(name)
    for chunk in (512, 3):
        logits, states = read_prompts(lm, PROMPTS, chunk=chunk)
        for prompt, row, state in zip(PROMPTS, logits, states, strict=True):
            with torch.no_grad():
                output = lm(torch.tensor([prompt]))
                # What follows must be the same too: a state may hold what no logit shows yet.
                further = torch.tensor([[4, 5, 6, 7]])
                then, expected = lm(further, state=state).logits, lm(further, state=output.state).logits
            # float64; a Newton solve stops at about 1e-11 of the state
            torch.testing.assert_close(row, output.logits[0, -1], rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(then, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", FEW)
def test_streams_that_come_and_go_between_steps(name: str) -> None:
    lm = model(name)
    expected = [alone(lm, stream) for stream in streams()]
    given = streams()
    batch, pending, steps = Batch(lm, rows=3, chunk=4), list(given), 0
    cancelled = Stream([1, 2, 3], 50, seed=9)
    batch.add(cancelled)
    while len(batch) or pending:
        if pending and steps % 2 == 0:
            batch.add(pending.pop(0))
        if steps == 3:
            cancelled.cancel()
        batch.step()
        steps += 1
    assert [stream.tokens for stream in given] == expected
    assert cancelled.finished == "cancelled"
    assert cancelled.tokens == alone(lm, cancelled)[: len(cancelled.tokens)]
    assert 0 < len(cancelled.tokens) < 50


@pytest.mark.parametrize("name", FEW)
def test_a_stream_may_begin_as_the_last_one_is_cancelled(name: str) -> None:
    lm = model(name)
    first, second = Stream(PROMPTS[0], 20), streams()[1]
    batch = Batch(lm, rows=1)
    batch.add(first)
    batch.add(second)
    batch.step()
    first.cancel()
    assert first in batch.step()
    list(batch.run())
    assert (len(first.tokens), second.tokens) == (1, alone(lm, second))


@pytest.mark.parametrize("name", FEW)
def test_a_kept_state_goes_on_where_it_ended(name: str) -> None:
    lm = model(name)
    whole = list(generate(lm, PROMPTS[0], 12, temperature=0))
    first, other = Stream(PROMPTS[0], 5, temperature=0, keep_state=True), Stream(PROMPTS[4], 9)
    batch = Batch(lm)
    batch.add(first)
    batch.add(other)
    list(batch.run())
    assert first.tokens == whole[:5]
    assert first.unread == whole[4:5]
    second = Stream(first.unread, 7, temperature=0, state=first.state)
    batch.add(second)
    list(batch.run())
    assert second.tokens == whole[5:]
    # And from the prompt's own state, everything again
    again = Stream(whole[:5], 7, temperature=0, state=first.prompt_state)
    batch.add(again)
    list(batch.run())
    assert again.tokens == whole[5:]
    assert other.state is None  # held by nobody
    assert state_nbytes(first.state) > 0


def test_after_a_stop_id_the_state_has_read_everything() -> None:
    lm = model("paragru")
    plain = list(generate(lm, PROMPTS[0], 12, temperature=0))
    stop = plain[6]
    stream = Stream(PROMPTS[0], 12, temperature=0, stop_ids=(stop,), keep_state=True)
    batch = Batch(lm)
    batch.add(stream)
    list(batch.run())
    count = plain.index(stop)
    assert (stream.tokens, stream.finished, stream.unread) == (plain[:count], "stop", [])
    _, (state,) = read_prompts(lm, [[*PROMPTS[0], *plain[:count]]])
    for got, expected in zip(pytree.tree_leaves(stream.state), pytree.tree_leaves(state), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FEW)
def test_copies_share_a_prompt_that_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(name)
    copies = [Stream(PROMPTS[5], 6, seed=seed) for seed in range(1, 4)]
    stream = Stream(PROMPTS[5], 6, seed=0, copies=copies)
    expected = [alone(lm, s) for s in (stream, *copies)]
    read = 0
    forward = lm.forward

    def counting(tokens: torch.Tensor, *args: Any, **keys: Any) -> Any:
        nonlocal read
        read += tokens.numel()
        return forward(tokens, *args, **keys)

    monkeypatch.setattr(lm, "forward", counting)
    batch = Batch(lm)
    batch.add(stream)
    list(batch.run())
    assert [s.tokens for s in (stream, *copies)] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1
    assert read == len(PROMPTS[5]) + 4 * 5


def test_scores_are_the_log_probabilities_of_rereading_everything() -> None:
    lm = model("paragru")
    prompt = PROMPTS[5]
    stream = Stream(prompt, 6, seed=1, top_scores=3, prompt_scores=True)
    batch = Batch(lm, chunk=4)
    batch.add(stream)
    batch.add(Stream(PROMPTS[0], 4))
    list(batch.run())
    ids = [*prompt, *stream.tokens]
    with torch.no_grad():
        expected = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [*stream.of_prompt, *stream.scores]
    assert [score.token for score in found] == ids[1:]
    for position, score in enumerate(found):
        assert score.logprob == pytest.approx(float(expected[position, score.token]), abs=1e-7)
        values, tops = expected[position].topk(3)
        assert [i for i, _ in score.top] == tops.tolist()
        assert [v for _, v in score.top] == pytest.approx(values.tolist(), abs=1e-7)


def test_a_failing_stream_takes_no_other_with_it() -> None:
    lm = model("paragru")
    good, bad = streams()[0], Stream([1, 2, 3], 5)
    expected = alone(lm, good)
    state = lm.initial_state(1, dtype=torch.float64)
    bad.state = pytree.tree_map(lambda leaf: torch.full_like(leaf, float("nan")), state)
    batch = Batch(lm)
    batch.add(bad)
    batch.add(good)
    list(batch.run())
    assert bad.finished == "error"
    assert isinstance(bad.error, UserError)
    assert good.tokens == expected


@pytest.mark.parametrize(
    "asked", [{"max_tokens": 0}, {"max_tokens": 0, "prompt_scores": True}, {"max_tokens": 2, "prompt_scores": True}]
)
@pytest.mark.parametrize("chunk", [2, 512])
def test_logits_that_are_not_finite_are_an_error_though_no_token_is_drawn(asked: dict[str, Any], chunk: int) -> None:
    lm = model("paragru")
    keys = {**asked, "top_scores": 0}
    alone, good, bad, copy = (Stream([1, 2, 3], **keys) for _ in range(4))
    bad.copies = [copy]
    bad.state = pytree.tree_map(lambda leaf: torch.full_like(leaf, float("nan")), lm.initial_state(1))
    for together in ([alone], [bad, good]):
        batch = Batch(lm, chunk=chunk)
        for stream in together:
            batch.add(stream)
        finished = list(batch.run())
        assert set(finished) == {*together, *(copy for stream in together for copy in stream.copies)}
    for stream in (bad, copy):
        assert stream.finished == "error"
        assert "not finite" in str(stream.error)
        assert not stream.of_prompt + stream.scores
    assert (good.finished, good.tokens) == ("length", alone.tokens)
    assert [s.logprob for s in good.of_prompt] == pytest.approx([s.logprob for s in alone.of_prompt], abs=1e-9)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_options_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stream(**{"prompt": [1], "max_tokens": 3, **keys})


def test_a_prompt_outside_the_vocabulary_is_one_line() -> None:
    with pytest.raises(UserError, match="prompt token 40 is outside the vocabulary of 40"):
        Batch(model("paragru")).add(Stream([1, 40], 3))
    with pytest.raises(UserError, match="prompt token 39 is outside the vocabulary of 30"):
        Batch(model("paragru")).add(Stream([1, 39], 3, vocab_size=30))


class Letters:
    """A tokenizer of letters: ids 0 … 25."""

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(97 + i for i in ids)


def test_text_ends_before_a_stop_string_and_cancels_the_stream() -> None:
    stream = Stream([1], 20)
    text = StreamText(stream, Letters(), ["cd", "zz"])  # type: ignore[arg-type]
    found = ""
    for token in (0, 1, 2, 2, 3, 4):
        stream.tokens.append(token)
        found += text.take()
    assert found == "abc"
    assert text.stopped
    assert stream.finished == "cancelled"
    assert text.take() == ""
    # Held back, and not a stop string after all: it comes when the stream ends.
    stream = Stream([1], 20)
    text = StreamText(stream, Letters(), ["cd"])  # type: ignore[arg-type]
    stream.tokens += [0, 2]
    assert text.take() == "a"
    stream.finished = "length"
    assert (text.take(), text.take()) == ("c", "")
    with pytest.raises(UserError, match="stop string is empty"):
        StreamText(stream, Letters(), [""])  # type: ignore[arg-type]


def test_likelihoods_of_a_model_that_diverged_are_an_error() -> None:
    """NaN is as large as nothing: what compares answers would choose one all the same."""
    lm = model("paragru")
    pairs = [([1, 5], [2]), ([1, 5], [2, 7, 9])]
    assert all(torch.isfinite(torch.tensor([one.logprob for one in continuation_likelihoods(lm, pairs)])))
    with torch.no_grad():
        lm.head_weight[11] = float("nan")  # of one token that none of them asks for
    for pair in pairs:
        with pytest.raises(UserError, match="logits are not finite"):
            continuation_likelihoods(lm, [pair])


def test_take_rows_repeats_and_orders() -> None:
    state = {"a": torch.arange(3)[:, None], "b": (torch.arange(3) * 10,)}
    taken = take_rows(state, [2, 0, 2])
    assert taken["a"][:, 0].tolist() == [2, 0, 2]
    assert taken["b"][0].tolist() == [20, 0, 20]
