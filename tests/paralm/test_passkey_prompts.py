"""Prompts of the passkey and needle tasks are exact: length, where the key lies, what it is. And the intervals."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paralm_data import Tokenizer, TokenStore
from paralm_data.passkey import Stream, is_evaluation_key, phrasings

from paralm.errors import UserError
from paralm.evaluation.needles import TASKS, Builder, chosen, stored_text
from paralm.evaluation.passkey import Passkey
from paralm.evaluation.passkey_result import LengthRow, Rate, longest_passed
from paralm.evaluation.proportion import wilson
from paralm.evaluation.suite import Target, run_suite
from tests.paralm.passkey_models import LENGTHS
from tests.paralm.small_models import small_model


@pytest.fixture(scope="module")
def tokenizer(passkey_tokenizer: Tokenizer) -> Tokenizer:
    return passkey_tokenizer


def builder(tokenizer: Tokenizer, name: str, prose: Path | TokenStore | None, **changes: Any) -> Builder:
    return Builder(tokenizer, chosen(name, **changes), name=name, reach=2000, prose=prose)


# -- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TASKS))
def test_prompts_have_exactly_their_length_and_hide_the_key_at_its_depth(
    name: str, tokenizer: Tokenizer, prose: Path
) -> None:
    made, filler_lines = builder(tokenizer, name, prose), 40  # tokens of the longest line, about
    for length in (made.shortest, made.shortest + 1, LENGTHS[name], 2000):
        for depth in (0.0, 0.3, 1.0):
            prompts = made.prompts(length, depth, 3)
            room = length - made.shortest
            assert prompts.prefix == min(prompts.needles)
            # The first asked needle: after the instruction, the filler before it, and the distractors there.
            before = prompts.needles[0] - len(made.wording.instruction)
            others = tokenizer.decode(prompts.prompt(0)[: prompts.prefix]).count("Record:")
            filler = before - made.needle_tokens * others
            assert depth * room - filler_lines <= filler <= round(depth * room)
            first = prompts.prompt(0)[: prompts.prefix]
            for sample in range(3):
                for query in range(prompts.queries):
                    tokens = prompts.prompt(sample, query)
                    assert len(tokens) == length
                    assert tokens[: prompts.prefix].tolist() == first.tolist()
                    start = prompts.needles[query]
                    text = tokenizer.decode(tokens[start : start + made.needle_tokens])
                    key = prompts.keys[query][sample]
                    assert key in text
                    assert text.endswith("\n")
                    assert tokenizer.decode(prompts.answers[query, sample]) == key
                    assert is_evaluation_key(key)
                    distance = length - made.question_tokens - start - made.needle_tokens
                    assert prompts.distances[query] == distance >= 0
                    stated = 2 if name == "passkey" else 1
                    assert tokenizer.decode(tokens).count(key) == stated
            whole = np.stack([prompts.prompt(s)[: prompts.context] for s in range(3)])
            assert (prompts.read(slice(1, 3), 3, prompts.context - 2) == whole[1:3, 3:-2]).all()
            assert len({key for keys in prompts.keys for key in keys}) == 3 * prompts.queries


def test_prompts_are_a_function_of_seed_length_depth_and_sample(tokenizer: Tokenizer) -> None:
    made = builder(tokenizer, "passkey", None)
    few, many = made.prompts(200, 0.5, 2), builder(tokenizer, "passkey", None).prompts(200, 0.5, 5)
    assert few.keys[0] == many.keys[0][:2]
    assert (few.prompt(1) == many.prompt(1)).all()
    assert few.keys != made.prompts(200, 0.25, 2).keys
    assert few.keys != made.prompts(208, 0.5, 2).keys
    other = Builder(tokenizer, TASKS["passkey"], name="passkey", reach=200, seed=1)
    assert few.keys != other.prompts(200, 0.5, 2).keys


def test_the_passkey_prompt_reads_as_it_should(tokenizer: Tokenizer) -> None:
    prompts = builder(tokenizer, "passkey", None).prompts(160, 0.5, 1)
    text, key = tokenizer.decode(prompts.prompt(0)), prompts.keys[0][0]
    usual = phrasings("evaluation")[0]
    assert text.startswith(usual.instruction)
    assert usual.needle.replace("{value}", key) in text
    assert text.endswith(usual.question)
    assert len(key) == 5


def test_the_needle_haystack_and_names(tokenizer: Tokenizer, prose: Path) -> None:
    """Multi-key in a haystack of needles: every line a record, names and values UUIDs, none twice."""
    made = Builder(
        tokenizer, chosen("niah_multikey", haystack="needles", value="uuid"), name="niah_multikey", reach=3000
    )
    text = tokenizer.decode(made.prompts(3000, 0.5, 1).prompt(0))
    records = re.findall(r"Record: the number of the (\S+) is (\S+)\.\n", text)
    assert len(records) >= 12
    assert len({name for name, _ in records}) == len(records)
    asked = re.search(r"What is the number of the (\S+)\?", text)
    assert asked is not None
    assert [name for name, _ in records].count(asked[1]) == 1
    queries = builder(tokenizer, "niah_multiquery", prose).prompts(1000, 0.2, 1)
    assert len({tokenizer.decode(question) for question in queries.questions[:, 0]}) == 4
    assert queries.needles == sorted(queries.needles)


def test_names_that_run_out_are_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Before anything is measured, whether the lengths are given or follow from what the needles need."""
    names = builder(tokenizer, "niah_noise", None).names
    assert names is not None
    there = len(names._ids)
    assert len({name.tobytes() for name in names.draw(Stream("all"), there)}) == there
    with pytest.raises(UserError, match=f"queries: 1 names are wanted and 0 are left of {there}; give fewer"):
        names.draw(Stream("more"), 1, list(names._ids))
    target = Target.of(small_model("paragru", tokenizer.vocab_size), tokenizer, run_dir=tmp_path)
    for lengths in (None, [40_000]):
        with pytest.raises(UserError, match=f"queries: 600 names are wanted and {there} are left"):
            run_suite(Passkey, target, {"task": "niah_noise", "queries": 600, "lengths": lengths})
    assert not list(tmp_path.rglob("*.json"))


def test_a_store_without_documents_has_no_prose(tokenizer: Tokenizer, tmp_path: Path) -> None:
    empty = SimpleNamespace(n_documents=0, path=tmp_path)
    assert stored_text(empty, 10).tolist() == []  # type: ignore[arg-type]


def test_prose_comes_from_a_store_without_its_documents_ends(prepared: Path) -> None:
    own, store = Tokenizer.load(prepared / "tokenizer.model"), TokenStore.open(prepared / "held_out")
    made = Builder(own, TASKS["niah_prose"], name="niah_prose", reach=1000, prose=store)
    tokens = made.prompts(1000, 1.0, 1).prompt(0)
    assert not np.isin(tokens[1:], [own.bos_id, own.eos_id]).any()
    start = len(made.wording.instruction)
    assert tokens[start : start + 100].tolist() == np.concatenate(
        [store.document(d)[1:-1] for d in range(3)]
    )[:100].tolist()  # fmt: skip


# -- intervals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "low"), [(5, 0.57), (20, 0.84), (50, 0.93), (200, 0.98)])
def test_wilson_at_all_right(n: int, low: float) -> None:
    assert wilson(n, n) == (pytest.approx(low, abs=0.005), 1.0)
    assert wilson(0, n) == (0.0, pytest.approx(1 - low, abs=0.005))


def test_wilson_in_between_solves_its_equation() -> None:
    """(p̂ − p)² = z² p (1 − p)/n at both ends."""
    for hits, n in ((1, 10), (8, 10), (50, 100), (3, 400)):
        for end in wilson(hits, n):
            assert (hits / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-5)
    with pytest.raises(ValueError, match="6 of 5"):
        wilson(6, 5)


def test_the_longest_length_passed_is_before_the_first_failure() -> None:
    def rows(*hits: int) -> list[LengthRow]:
        rates = [Rate.of(h, 20) for h in hits]
        return [LengthRow(length=8 * i, teacher_forced=r, generated=r, token_accuracy=r) for i, r in enumerate(rates)]

    assert longest_passed(rows(20, 19, 18, 20), 0.95) == 8
    assert longest_passed(rows(18, 20), 0.95) is None
    assert longest_passed(rows(20, 20), 0.95) == 8
