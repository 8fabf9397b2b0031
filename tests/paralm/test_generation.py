"""Generation: draws what it should, stops where it should, streams whole characters, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from paralm.config import ModelConfig
from paralm.errors import UserError
from paralm.generation import generate, sample, stream_text, until_stop, whole_characters
from paralm.models import LanguageModel, build_model

NAMES = ["paragru", "paralstm", "attention"]


def model(name: str = "paragru", vocab_size: int = 40, **keys: Any) -> LanguageModel:
    config = ModelConfig(d_model=32, n_layers=2, mixer={"name": name}, tie_embeddings=False, **keys)
    lm = build_model(config, vocab_size, seed=0)
    with torch.no_grad():
        lm.head_weight.mul_(20)  # so that untrained logits differ by more than a little
    return lm


class Bytes:
    """A tokenizer of bytes: ids 4 … 259, after unk, bos, eos, pad."""

    unk_id, bos_id, eos_id, pad_id, vocab_size = 0, 1, 2, 3, 260

    def encode(self, text: str) -> list[int]:
        return [byte + 4 for byte in text.encode()]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i - 4 for i in ids if i >= 4)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_greedy_is_the_argmax_of_rereading_everything(name: str, chunk: int) -> None:
    lm = model(name).double()
    ids = [1, 5, 9, 2, 30]
    got = list(generate(lm, ids, 12, temperature=0, chunk=chunk))
    with torch.no_grad():
        for expected in got:
            assert int(lm(torch.tensor([ids])).logits[0, -1].argmax()) == expected
            ids.append(expected)
    assert len(got) == 12


def test_a_seed_decides_the_text() -> None:
    lm = model()

    def text(seed: int) -> list[int]:
        torch.manual_seed(torch.seed() % 1000)  # the global generator must not matter
        return list(generate(lm, [1], 20, seed=seed))

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_drawing_leaves_the_global_generator_and_the_mode_alone() -> None:
    lm = model().train()
    before = torch.get_rng_state()
    for _ in generate(lm, [1], 4, seed=1):
        assert torch.is_grad_enabled()  # between tokens the caller's own setting holds
    assert torch.equal(before, torch.get_rng_state())
    assert lm.training
    stream = generate(lm, [1], 4, seed=1)
    next(stream)
    stream.close()
    assert lm.training


def test_sample_follows_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    draws = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(logits, draws, temperature=0.7)] += 1
    expected = (logits / 0.7).softmax(0) * 4000
    # χ² of 3 degrees of freedom is above 16.3 once in a thousand; the seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3


def drawn(logits: torch.Tensor, **options: Any) -> set[int]:
    draws = torch.Generator().manual_seed(0)
    return {sample(logits, draws, **{"temperature": 1.0, **options}) for _ in range(500)}


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert drawn(logits) == {0, 1, 2, 3}
    assert drawn(logits, top_k=2) == {1, 3}
    assert drawn(logits, top_k=99) == {0, 1, 2, 3}
    assert drawn(logits, top_p=0.39) == {1}
    assert drawn(logits, top_p=0.41) == {1, 3}
    assert drawn(logits, top_p=0.75) == {1, 2, 3}
    assert drawn(logits, top_k=3, top_p=0.5) == {1, 3}  # of the 3 kept, 4/9 and 3/9 reach one half
    assert drawn(logits, top_p=1e-9) == {1}
    assert drawn(logits, temperature=0) == {1}
    assert drawn(logits, temperature=1e-30) == {1}


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    lm = model(vocab_size=10)
    assert max(generate(lm, [1], 200, temperature=50.0, vocab_size=6)) < 6


def test_stops() -> None:
    lm = model()
    tokens = list(generate(lm, [1], 30, seed=2))
    stop = tokens[10]
    assert list(generate(lm, [1], 30, seed=2, stop_ids=[stop])) == tokens[: tokens.index(stop)]
    assert list(generate(lm, [1], 0)) == []


@pytest.mark.parametrize("name", ["paragru", "paralstm"])
def test_memory_does_not_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state handed on has the size of the first, however long the prompt and the text."""
    lm = model(name)
    sizes: list[int] = []
    inner = lm.forward

    def forward(*given: Any, **keys: Any) -> Any:
        output = inner(*given, **keys)
        sizes.append(sum(leaf.untyped_storage().nbytes() for leaf in pytree.tree_leaves(output.state)))
        assert output.logits.shape[1] == 1
        return output

    monkeypatch.setattr(lm, "forward", forward)
    list(generate(lm, [1] * 300, 100, chunk=64))
    assert len(sizes) == 5 + 99
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"prompt_ids": []}, ["no tokens"]),
        ({"prompt_ids": [1, 40]}, ["40", "outside the vocabulary"]),
        ({"temperature": -1.0}, ["temperature", "-1.0"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"top_k": -2}, ["top_k", "-2"]),
        ({"top_p": 0.0}, ["top_p", "0.0"]),
        ({"top_p": 1.5}, ["top_p", "1.5"]),
        ({"max_tokens": -1}, ["max_tokens", "-1"]),
        ({"seed": 1 << 64}, ["seed", "18446744073709551616"]),
    ],
)
def test_impossible_options_are_refused_at_the_call(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        generate(model(), **{"prompt_ids": [1], "max_tokens": 4, **options})
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_diverged_weights_are_said_to_be() -> None:
    lm = model()
    with torch.no_grad():
        lm.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        list(generate(lm, [1], 4))


TEXTS = ["plain", "zwölf Größen", "水 → 🙂 e\u0301", "\U0010ffff\u0000\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_never_split(text: str) -> None:
    tokenizer = Bytes()
    pieces = list(whole_characters(iter(tokenizer.encode(text)), tokenizer))  # type: ignore[arg-type]
    assert pieces == list(text)


@pytest.mark.parametrize(
    "data", [b"\xff\xff", b"a\xe6\xb0", b"\xe6\xb0a\xe6\xb0\xb4", b"\xf0\x9f\x99\x82\x82", b"\xc3" * 9]
)
def test_broken_bytes_come_as_from_decoding_at_once(data: bytes) -> None:
    pieces = whole_characters(iter([byte + 4 for byte in data]), Bytes())  # type: ignore[arg-type]
    assert "".join(pieces) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("aaac", ["aab"], "aaac"),
        ("abc", ["abcd"], "abc"),
        ("abc", [], "abc"),
        ("stop", ["stop"], ""),
        ("abcabd", ["abd", "cab"], "ab"),
        ("abcd", ["abcd", "bc"], "a"),  # complete first, whatever comes in one piece
        ("abcd", ["bcd", "abcd"], ""),
    ],
)
def test_stop_strings_may_span_pieces(text: str, stop: list[str], expected: str, size: int) -> None:
    pieces = (text[i : i + size] for i in range(0, len(text), size))
    assert "".join(until_stop(pieces, stop)) == expected


def test_text_is_held_back_only_while_it_may_be_a_stop() -> None:
    def pieces() -> Iterator[str]:
        for piece in ("x", "\n", "y", "\n", "\nz"):
            given.append(piece)
            yield piece

    given: list[str] = []
    seen = [(piece, len(given)) for piece in until_stop(pieces(), ["\n\n"])]
    assert seen == [("x", 1), ("\ny", 3)]


def test_stream_text_is_the_decoded_tokens() -> None:
    lm, tokenizer = model(vocab_size=260), Bytes()
    prompt = tokenizer.encode("é")
    ids = list(generate(lm, [1, *prompt], 60, seed=5, temperature=1.5, stop_ids=(1, 2, 3)))
    pieces = list(stream_text(lm, tokenizer, "é", 60, seed=5, temperature=1.5))  # type: ignore[arg-type]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) > 1
    whole = "".join(pieces)
    stop = whole[4:6]
    cut = "".join(stream_text(lm, tokenizer, "é", 60, seed=5, temperature=1.5, stop=[stop]))  # type: ignore[arg-type]
    assert cut == whole[: whole.index(stop)]
    with pytest.raises(UserError, match="stop string is empty"):
        stream_text(lm, tokenizer, "é", 60, stop=[""])  # type: ignore[arg-type]
