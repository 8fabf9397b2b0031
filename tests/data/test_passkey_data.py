"""Passkey wording, keys and the training split: what training sees, evaluation never asks; lengths are exact."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from paralm_data import IGNORE, DataError, SyntheticLoader, Tokenizer, make_task
from paralm_data.passkey import (
    NOISE,
    Filler,
    Stream,
    TrainingSamples,
    Values,
    Wording,
    ids_after,
    is_evaluation_key,
    is_evaluation_length,
    noise,
    phrasings,
    texts,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train(texts(0, 200), tmp_path_factory.mktemp("passkey") / "tokenizer.model", vocab_size=400)


class Joining:
    """A tokenizer that puts a mark before every text, and joins digits in pairs from the left: keys differ in length
    with their zeros."""

    name, vocab_size, bos_id, eos_id = "joining", 1000, 1, 2

    def encode(self, text: str) -> list[int]:
        found, at = [3], 0
        while at < len(text):
            pair = text[at : at + 2]
            joined = len(pair) == 2 and pair.isdigit() and "0" not in pair
            found.append(600 + int(pair) if joined else ord(text[at]))
            at += 2 if joined else 1
        return found


def test_the_splits_are_disjoint_in_keys_sentences_and_lengths(tokenizer: Tokenizer) -> None:
    keys = {}
    for split in ("train", "evaluation"):
        values = Values(tokenizer, "digits", 2, split)
        keys[split] = {values.draw(Stream(split, i))[0] for i in range(2500)}
    assert not keys["train"] & keys["evaluation"]
    assert keys["train"] | keys["evaluation"] == {f"{i:02d}" for i in range(100)}
    # A quarter, to four standard deviations.
    assert sum(is_evaluation_key(f"{i:05d}") for i in range(100_000)) == pytest.approx(25_000, abs=550)
    train, evaluation = phrasings("train"), phrasings("evaluation")
    for part in ("instruction", "needle", "question"):
        assert not {getattr(p, part) for p in train} & {getattr(p, part) for p in evaluation}
    assert len(evaluation) == 8
    # The words of evaluation's sentences are all known from training.
    known = {word for p in train for word in (p.needle + p.question).split()}
    assert {word for p in evaluation for word in (p.needle + p.question).split()} <= known
    lengths = TrainingSamples(tokenizer, 200).lengths
    assert lengths
    assert not [n for n in lengths if is_evaluation_length(n)]


@pytest.mark.parametrize("loss", ["answer", "key", "all"])
def test_a_training_document_is_what_it_says(tokenizer: Tokenizer, loss: str) -> None:
    samples = TrainingSamples(tokenizer, 220, loss=loss)
    seen = set()
    for word in range(60):
        length = samples.length(word * 7919)
        found = samples.sample(word, length)
        text = tokenizer.decode(found.tokens)
        assert len(found.tokens) == length + samples.end == length + 6
        assert tokenizer.decode(found.tokens[length:-1]) == found.key
        assert (found.tokens[0], found.tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert text.count(found.key) >= 3  # twice in the needle, once as the answer
        assert not is_evaluation_key(found.key)
        asked = np.flatnonzero(found.labels != IGNORE)
        assert (found.labels[asked] == found.tokens[asked + 1]).all()
        expected = {"answer": 5, "key": 10, "all": len(found.tokens) - 1}[loss]
        assert len(asked) == expected
        assert set(range(length - 1, length + 4)) <= set(asked.tolist())  # the key, from the question's last token on
        if loss == "key":
            first = int(asked[0])
            assert tokenizer.decode(found.tokens[first + 1 : first + 6]) == found.key
            assert text.index(found.key) < len(tokenizer.decode(found.tokens[: first + 1]))  # the second time
        seen.add((found.needle, length))
    assert len(seen) > 50  # depths and lengths vary
    again = samples.sample(5, samples.length(5 * 7919))
    assert again.tokens.tolist() == samples.sample(5, samples.length(5 * 7919)).tokens.tolist()
    assert again.key != samples.sample(6, samples.length(5 * 7919)).key


def test_the_lines_of_a_long_document_are_measured_once(tokenizer: Tokenizer) -> None:
    measured = 0

    class Line(np.ndarray[Any, Any]):
        def __len__(self) -> int:
            nonlocal measured
            measured += 1
            return super().__len__()

    samples = TrainingSamples(tokenizer, 4001, 4001)
    samples._noise = [line.view(Line) for line in samples._noise]
    samples.sample(5, 4001)
    assert 100 < measured < 4001  # a line has more than two tokens


def test_sizes_that_do_not_fit_are_refused_in_one_line(tokenizer: Tokenizer) -> None:
    least = TrainingSamples(tokenizer, 300).min_length
    for arguments, message in (
        ({"max_length": 20}, "max_length is 20; a prompt has at least"),
        ({"max_length": 300, "min_length": least - 1}, f"min_length is {least - 1}; a prompt without filler"),
        ({"max_length": 300, "loss": "keys"}, "loss is 'keys'; it must be one of: answer, key, all"),
        ({"max_length": 300, "digits": 0}, "digits is 0; it must be 1 to 18"),
        ({"max_length": 304, "min_length": 304}, "no multiple of 8"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            TrainingSamples(tokenizer, **arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_key_has_one_token_a_digit_where_digits_are_split(tokenizer: Tokenizer) -> None:
    values = Values(tokenizer, "digits", 5)
    assert values.one_token_a_digit
    assert values.n_tokens == 5
    assert values.chance == 1e-5
    drawn = [values.draw(Stream(i))[0] for i in range(3000)]
    assert {key[0] for key in drawn} == set("0123456789")  # leading zeros too: all 10⁵ keys
    for key in drawn[:20]:
        assert tokenizer.decode(values.draw(Stream(drawn.index(key)))[1]) == key


def test_where_digits_are_joined_keys_of_one_length_are_drawn_and_chance_says_so() -> None:
    tokenizer = Joining()
    values = Values(tokenizer, "digits", 4, "train")  # type: ignore[arg-type]
    assert not values.one_token_a_digit
    assert values.n_tokens == 2  # two pairs, as most keys have: 0.9⁴ = 66 %
    for i in range(50):
        key, ids = values.draw(Stream(i))
        assert len(ids) == 2
        assert tokenizer.encode("is " + key)[4:] == ids.tolist()  # without the mark, which belongs to a text's start
        assert not is_evaluation_key(key)
    assert values.chance == pytest.approx(1 / (0.9**4 * 10**4), rel=0.1)


def test_uuids_have_their_form_and_one_length(tokenizer: Tokenizer) -> None:
    values = Values(tokenizer, "uuid", split="evaluation")
    drawn = [values.draw(Stream(i)) for i in range(30)]
    assert {len(ids) for _, ids in drawn} == {values.n_tokens}
    for text, ids in drawn:
        assert [len(part) for part in text.split("-")] == [8, 4, 4, 4, 12]
        assert (text[14], text[19] in "89ab") == ("4", True)
        assert tokenizer.decode(ids) == text
        assert is_evaluation_key(text)
    assert 0 < values.chance < 1e-30


def test_a_tokenizer_that_marks_a_texts_start_gives_pieces_without_the_mark() -> None:
    assert ids_after(Joining(), "ab").tolist() == [ord("a"), ord("b")]  # type: ignore[arg-type]


def test_filler_goes_on_without_end_and_needles_stand_at_line_ends(tokenizer: Tokenizer) -> None:
    filler = noise(tokenizer)
    period = len(filler.ids)
    assert tokenizer.decode(filler.tokens(0, period)) == "".join(NOISE)
    assert filler.tokens(period - 3, 2 * period + 4).tolist() == [*filler.ids[-3:], *filler.ids, *filler.ids[:4]]
    limit = 3 * period + 5
    for position in range(0, limit + 1, 3):
        end = filler.line_end(position, limit)
        assert end <= position
        if position not in (0, limit):
            assert tokenizer.decode(filler.tokens(0, end)).endswith(("\n",) if end else ("",))
            assert b"\n" not in tokenizer.decode_bytes(filler.tokens(end, position)[:-1])
    assert filler.line_end(limit, limit) == limit
    with pytest.raises(DataError, match="no tokens"):
        Filler.of([])


def test_the_needle_states_its_value_where_it_says(tokenizer: Tokenizer) -> None:
    for phrasing in (*phrasings("train")[::17], *phrasings("evaluation")):
        wording = Wording(tokenizer, phrasing)
        value = Values(tokenizer, "digits", 4).draw(Stream("x"))[1]
        needle = wording.needle(value[None])[0]
        places = wording.stated(4)
        assert len(places) == 2
        for place in places:
            assert needle[place : place + 4].tolist() == value.tolist()
        assert tokenizer.decode(needle) == phrasing.needle.replace("{value}", tokenizer.decode(value))
        assert tokenizer.decode(wording.question(value[None])[0]) == phrasing.question


def test_streams_are_the_same_everywhere() -> None:
    stream = Stream("passkey", 1, 0.5)
    assert [stream.below(1000) for _ in range(10)] == [Stream("passkey", 1, 0.5).below(1000), *_rest()]
    assert len({Stream("a", i).word() for i in range(1000)}) == 1000


def _rest() -> list[int]:
    stream = Stream("passkey", 1, 0.5)
    stream.word()
    return [stream.below(1000) for _ in range(9)]


def test_the_tokenizer_texts_have_no_evaluation_sentence() -> None:
    told = "".join(texts(3, 300))
    for phrasing in phrasings("evaluation"):
        assert phrasing.question not in told
        assert phrasing.instruction not in told
        assert not re.search(re.escape(phrasing.needle).replace(r"\{value\}", r"\d+"), told)
    known = [re.escape(p.needle).replace(r"\{value\}", r"\d+") for p in phrasings("train")]
    assert re.search("|".join(known), told)


def test_the_task_trains_on_documents_of_the_split() -> None:
    task = make_task({"task": "passkey", "max_length": 140})
    assert task.tokenizer is not None
    assert task.max_len == 146
    batch = SyntheticLoader(task, 160, 12, seed=3).batch(5)
    lengths = set()
    for tokens, labels in zip(batch.tokens.numpy(), batch.labels.numpy()):
        end = int(np.flatnonzero(tokens == task.tokenizer.eos_id)[0])
        prompt, key = end - 5, task.tokenizer.decode(tokens[end - 5 : end])
        assert prompt % 8
        lengths.add(prompt)
        assert not is_evaluation_key(key)
        assert task.tokenizer.decode(tokens[:end]).count(key) == 3
        assert (tokens[end:] == task.pad_id).all()
        asked = np.flatnonzero(labels != IGNORE)
        assert (labels[asked] == tokens[asked + 1]).all()
        assert asked[-5:].tolist() == list(range(prompt - 1, prompt + 4))
        assert len(asked) == 10
    assert len(lengths) > 6
    assert max(lengths) <= 140


def test_the_task_says_what_it_follows_from_and_refuses_what_cannot_be() -> None:
    task = make_task({"task": "passkey", "max_length": 140})
    assert task.fingerprint == make_task({"task": "passkey", "max_length": 140}).fingerprint
    assert task.fingerprint != make_task({"task": "passkey", "max_length": 140, "vocab_size": 420}).fingerprint
    far = task.examples(0, "test", np.arange(4), size=task.test_sizes()[-1])
    assert far.lengths.min() > 2 * task.max_len
    assert all(not is_evaluation_length(int(n) - 6) for n in far.lengths)
    with pytest.raises(DataError, match="size '150': no document"):
        task.examples(0, "test", np.arange(1), size="150")  # a prompt of 144
    with pytest.raises(DataError, match="size '64:4': give a number"):
        task.examples(0, "test", np.arange(1), size="64:4")
    with pytest.raises(DataError, match=r"data\.synthetic: max_length is 20"):
        make_task({"task": "passkey", "max_length": 20})
