"""Passkey and needles: exact prompts; an oracle scores 100 %, a blind guesser chance; snapshots change nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from paralm_data import Tokenizer, TokenStore
from paralm_data.passkey import Stream, ids_after, is_evaluation_key, phrasings, texts
from torch import nn

from paralm.config import ModelConfig
from paralm.errors import ConfigError, UserError
from paralm.evaluation.needles import TASKS, Builder, chosen, stored_text
from paralm.evaluation.passkey import Passkey, PasskeyResult, PasskeySettings
from paralm.evaluation.passkey_result import LengthRow, Rate, longest_passed
from paralm.evaluation.proportion import wilson
from paralm.evaluation.retrieval import Reader
from paralm.evaluation.suite import Part, Target, run_suite
from paralm.models import LanguageModel, build_model

LENGTHS = {"passkey": 200, "niah_noise": 240, "niah_prose": 240, "niah_uuid": 640, "niah_multikey": 640,
           "niah_multiquery": 640}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of the passkey texts: one token a digit."""
    return Tokenizer.train(texts(0, 200), tmp_path_factory.mktemp("passkey") / "tokenizer.model", vocab_size=420)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("".join(f"Line {'abcdefgh'[i % 8]} of a story, é and → too.\nThen some more; " for i in range(40)))
    return path


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
    target = Target.of(tiny(MIXERS[0], tokenizer), tokenizer, run_dir=tmp_path)
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


# -- models that know, and that do not -----------------------------------------------------------------------


class Fake(nn.Module):
    """What Target and Reader use of a LanguageModel besides forward."""

    bounded_state = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size + 3  # padded
        self.head_weight = nn.Parameter(torch.zeros(1))
        self.config = ModelConfig()


class Oracle(Fake):
    """Looks the value up in the text, and writes it token by token. The state is every token read."""

    def forward(self, tokens: torch.Tensor, state: Any = None, last_logits: bool = False) -> Any:
        read = tokens if state is None else torch.cat((state["read"], tokens), dim=1)
        places = range(1) if last_logits else range(tokens.shape[1] - 1, -1, -1)
        logits = torch.stack([self.rows(read[:, : read.shape[1] - back]) for back in places], dim=1)
        logits[..., self.tokenizer.vocab_size :] = 1e6  # padding that must never be an answer
        return SimpleNamespace(logits=logits, state={"read": read})

    def rows(self, read: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [nn.functional.one_hot(torch.tensor(self.next(row.tolist())), self.vocab_size) for row in read]
        ).float()

    def next(self, read: list[int]) -> int:
        text = self.tokenizer.decode(read)
        named = re.search(r"What is the number of the (.+?)\? The number of the .+? is ([0-9a-f-]*)$", text)
        plain = re.search(r"What is the pass key\? The pass key is (\d*)$", text)
        if named:
            found, given = re.search(rf"number of the {named[1]} is (\S+)\.\n", text), named[2]
        elif plain:
            found, given = re.search(r"The pass key is (\d+)\. Remember", text), plain[1]
        else:
            return 5
        assert found is not None
        ids = ids_after(self.tokenizer, found[1], "is ").tolist()
        done = next(n for n in range(len(ids) + 1) if self.tokenizer.decode(ids[:n]) == given)
        return [*ids, self.tokenizer.eos_id][done]


class Blind(Fake):
    """Says any digit; remembers nothing."""

    bounded_state = True

    def forward(self, tokens: torch.Tensor, state: Any = None, last_logits: bool = False) -> Any:
        self.draws = getattr(self, "draws", np.random.Generator(np.random.PCG64(0)))
        digits = np.concatenate([ids_after(self.tokenizer, str(digit), "is ") for digit in range(10)])
        said = digits[self.draws.integers(10, size=(len(tokens), 1 if last_logits else tokens.shape[1]))]
        logits = nn.functional.one_hot(torch.from_numpy(said), self.vocab_size).float()
        return SimpleNamespace(logits=logits, state={"none": tokens[:, :0]})


@pytest.mark.parametrize("name", list(TASKS))
def test_an_oracle_scores_everywhere(name: str, tokenizer: Tokenizer, prose: Path, tmp_path: Path) -> None:
    target = Target.of(Oracle(tokenizer), tokenizer, run_dir=tmp_path, train_seq_len=256)  # type: ignore[arg-type]
    settings = {"task": name, "lengths": [LENGTHS[name]], "depths": [0.1, 1.0], "samples": 3, "rows": 2, "chunk": 50,
                "text": str(prose)}  # fmt: skip
    (found,) = run_suite(Passkey, target, settings).results
    assert len(found.cells) == 2
    for cell in found.cells:
        assert cell.teacher_forced.rate == cell.generated.rate == cell.token_accuracy.rate == 1.0
        assert cell.n == 3 * found.queries
        assert cell.not_finite == 0
    assert found.longest_passed == LENGTHS[name]
    assert found.name == ("passkey" if name == "passkey" else f"passkey_{name}")


def test_a_blind_model_scores_chance(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = Target.of(Blind(tokenizer), tokenizer, run_dir=tmp_path)  # type: ignore[arg-type]
    (found,) = run_suite(
        Passkey,
        target,
        {"digits": 2, "lengths": [136], "depths": [0.0, 0.5], "samples": 1000, "rows": 100, "chunk": 128},
    ).results
    assert found.chance == 0.01
    n = sum(c.n for c in found.cells)
    for hits in (sum(c.generated.hits for c in found.cells), sum(c.teacher_forced.hits for c in found.cells)):
        assert hits > 0
        assert abs(hits - n * 0.01) < 4 * (n * 0.01 * 0.99) ** 0.5  # four standard deviations of 2000 guesses
    tokens = sum(c.token_accuracy.hits for c in found.cells)
    assert abs(tokens - 2 * n * 0.1) < 4 * (2 * n * 0.1 * 0.9) ** 0.5
    assert found.longest_passed is None


def test_the_key_counts_wherever_it_stands_if_more_is_generated(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Polite(Oracle):
        """Begins with a word of its own, in both modes."""

        def next(self, read: list[int]) -> int:
            filler = ids_after(tokenizer, "the")[-1]
            if read[-1] == filler:
                return super().next(read[:-1])
            text = tokenizer.decode(read)
            return int(filler) if text.endswith("The pass key is ") else super().next([i for i in read if i != filler])

    target = Target.of(Polite(tokenizer), tokenizer, run_dir=tmp_path)  # type: ignore[arg-type]
    base = {"lengths": [136], "depths": [0.5], "samples": 2, "chunk": 128}
    for extra, expected in ((0, 0.0), (1, 1.0)):
        (found,) = run_suite(Passkey, target, {**base, "extra_tokens": extra}).results
        assert (found.cells[0].teacher_forced.rate, found.cells[0].generated.rate) == (0.0, expected)
        assert found.cells[0].by_token[1:] == [1.0] * 4


def test_logits_that_are_not_finite_are_misses(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Lost(Oracle):
        def rows(self, read: torch.Tensor) -> torch.Tensor:
            return super().rows(read).masked_fill(torch.arange(len(read))[:, None] == 0, torch.nan)

    target = Target.of(Lost(tokenizer), tokenizer, run_dir=tmp_path)  # type: ignore[arg-type]
    (found,) = run_suite(Passkey, target, {"lengths": [136], "depths": [0.5], "samples": 3, "rows": 3}).results
    (cell,) = found.cells
    assert (cell.teacher_forced.hits, cell.generated.hits, cell.not_finite, cell.nats_per_token) == (2, 2, 1, None)
    assert "not finite" in Passkey.page([found])


# -- snapshots, chunks, interruptions ------------------------------------------------------------------------

MIXERS: list[dict[str, Any]] = [
    {"name": "paragru", "n_heads": 2},
    {"name": "paralstm", "n_heads": 2},
    {"name": "mamba2", "head_dim": 8, "d_state": 8, "chunk_size": 16},
    {"name": "mlstm", "n_heads": 2, "chunk_size": 16},
    {"name": "slstm", "n_heads": 2},
    {"name": "window_attention", "window": 20, "n_heads": 2},
    {"name": "titans_mag", "chunk_size": 16, "n_heads": 2, "window": 16},
    {"name": "attention", "n_heads": 2},
]


def tiny(mixer: dict[str, Any], tokenizer: Tokenizer) -> LanguageModel:
    """Random, in float64, far from uniform: verdicts are arbitrary but exact."""
    config = ModelConfig(d_model=16, n_layers=2, mixer=mixer)
    model = build_model(config, tokenizer.vocab_size, seed=3).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: m["name"])
def test_snapshots_and_chunks_change_nothing(mixer: dict[str, Any], tokenizer: Tokenizer) -> None:
    model = tiny(mixer, tokenizer)
    for name, length, queries in (("passkey", 160, None), ("niah_multiquery", 260, 2)):
        made = Builder(tokenizer, chosen(name, haystack="noise", queries=queries), name=name, reach=400)
        cells = [made.prompts(length, depth, 3) for depth in (0.2, 0.7)]
        expected = []  # each prompt with its key, whole, in one call: no state is carried at all
        for prompts in cells:
            for query in range(prompts.queries):
                whole = np.stack(
                    [np.concatenate([prompts.prompt(s, query), prompts.answers[query, s]]) for s in range(3)]
                )
                with torch.no_grad():
                    logits = model(torch.from_numpy(whole[:, :-1])).logits[:, length - 1 :, : tokenizer.vocab_size]
                key = torch.from_numpy(prompts.answers[query])
                expected.append(
                    (logits.argmax(-1) == key, -logits.log_softmax(-1).gather(-1, key[..., None]).sum((1, 2)))
                )
        for snapshots, chunk, rows in ((True, 64, 2), (True, 17, 3), (False, 1000, 1)):
            reader = Reader(model, chunk, tokenizer.vocab_size, snapshots=snapshots)
            found = [answers for prompts in cells for answers in reader.ask(prompts, rows)]
            for answers, (right, nats) in zip(found, expected, strict=True):
                assert (answers.right == right.numpy()).all()
                # float64, after some hundred tokens
                np.testing.assert_allclose(answers.nats, nats.numpy(), rtol=1e-8)
                assert (answers.generated == answers.right.all(axis=1)).all()


def test_greedy_decoding_follows_the_model_not_the_key(tokenizer: Tokenizer) -> None:
    """The generated path feeds back its own tokens: with the model's own continuation as the key, it is a hit."""
    model = tiny(MIXERS[0], tokenizer)
    prompts = Builder(tokenizer, TASKS["passkey"], name="passkey", reach=200).prompts(200, 0.5, 2)
    for sample in range(2):
        ids = prompts.prompt(sample).tolist()
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, : tokenizer.vocab_size].argmax()))
        prompts.answers[0, sample] = ids[-5:]
    (answers,) = Reader(model, 64, tokenizer.vocab_size).ask(prompts, 2)
    assert answers.right.all()
    assert answers.generated.all()


def grid(tmp_path: Path, tokenizer: Tokenizer, **changes: Any) -> tuple[Target, dict[str, Any]]:
    target = Target.of(tiny(MIXERS[2], tokenizer).float(), tokenizer, run_dir=tmp_path, train_seq_len=128)
    return target, {"task": ["passkey", "niah_multikey"], "haystack": "noise", "lengths": [368, 400],
                    "depths": [0.6, 0.1], "samples": 3, "rows": 2, "chunk": 32, **changes}  # fmt: skip


def test_what_is_saved_is_what_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for changes in ({}, {"task": ["niah_multiquery"], "depths": [0.3, 0.6]}):
        _, settings = grid(tmp_path, tokenizer, **changes)
        target = Target.of(Blind(tokenizer), tokenizer, run_dir=tmp_path)  # type: ignore[arg-type]
        read = {}
        for snapshots in (True, False):
            running = Passkey(target, PasskeySettings(**settings, snapshots=snapshots))
            results = running.combine({cell: running.measure(cell) for cell in running.cells()})
            read[snapshots] = running.reader.tokens
            assert sum(r.snapshots.read for r in results) == read[True]  # type: ignore[attr-defined]
        prompts = sum(r.snapshots.prompts for r in results)  # type: ignore[attr-defined]
        lengths = sum(settings["lengths"]) * len(settings["depths"]) * 3 * len(settings["task"])
        if "niah_multiquery" in settings["task"]:
            assert prompts == read[False] == 4 * lengths
            assert prompts / read[True] > 3.5  # four questions, and the shared text; each question is read by itself
        else:
            assert prompts == read[False] == lengths
            # Mean depth 0.35: less than 1/(1 − 0.35), since the needle and the question are every sample's own.
            assert 1.1 < prompts / read[True] < 1 / (1 - 0.35)


def test_interrupted_and_in_parts_equals_uninterrupted(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PasskeyResult, "figures", lambda self: {})  # drawing takes longer than all else here
    files = []
    for way in ("whole", "interrupted", "parts"):
        target, settings = grid(tmp_path / way, tokenizer)
        if way == "interrupted":
            measure, calls = Passkey.measure, list[str]()

            def stopping(self: Passkey, cell: str, measure: Any = measure, calls: list[str] = calls) -> dict[str, Any]:
                if len(calls) == 3:
                    raise KeyboardInterrupt
                calls.append(cell)
                return measure(self, cell)

            with monkeypatch.context() as patched:
                patched.setattr(Passkey, "measure", stopping)
                with pytest.raises(KeyboardInterrupt):
                    run_suite(Passkey, target, settings)
            outcome = run_suite(Passkey, target, settings)
            assert (outcome.kept, outcome.measured) == (3, 5)
        elif way == "parts":
            for index in (3, 1, 2):
                outcome = run_suite(Passkey, target, settings, part=Part(index, 3))
            assert outcome.complete
        else:
            outcome = run_suite(Passkey, target, settings)
            assert outcome.measured == 8
        files.append(
            [(tmp_path / way / "eval" / f"{name}.json").read_bytes() for name in ("passkey", "passkey_niah_multikey")]
        )
    assert files[0] == files[1] == files[2]


def test_another_text_in_the_same_file_is_measured_again(tokenizer: Tokenizer, prose: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose.read_text())
    target = Target.of(Blind(tokenizer), tokenizer, run_dir=tmp_path)  # type: ignore[arg-type]
    settings = {"task": "niah_prose", "text": str(text), "lengths": [240], "depths": [0.5], "samples": 2}
    assert [run_suite(Passkey, target, settings).measured for _ in range(2)] == [1, 0]
    text.write_text("Another story.\n" + prose.read_text())
    assert run_suite(Passkey, target, settings).measured == 1


# -- results and refusals ------------------------------------------------------------------------------------


def test_results_are_written_with_figures_scalars_and_a_page(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target, settings = grid(tmp_path, tokenizer, task="passkey", lengths=[128, 256])
    outcome = run_suite(Passkey, target, settings)
    (found,) = outcome.results
    assert {path.name for path in outcome.files} == {"passkey.json", "passkey_grid.png", "passkey_distance.png"}
    assert PasskeyResult.model_validate(json.loads((tmp_path / "eval" / "passkey.json").read_text())) == found
    assert (found.lengths, found.depths, found.train_seq_len) == ([128, 256], [0.1, 0.6], 128)
    assert [(cell.length, cell.depth) for cell in found.cells] == [(n, d) for n in (128, 256) for d in (0.1, 0.6)]
    assert found.inside_training() == found.by_length[0].generated
    assert set(found.scalars()) == {"teacher_forced", "generated", "longest_passed", "inside_training_length"}
    assert sum(row.generated.n for row in found.by_distance) == 12
    assert all(row.first <= row.last for row in found.by_distance)
    page = Passkey.page(outcome.results)
    assert "passkey_grid.png" in page
    assert "trained at 128" in page
    assert "Read by one process, shared text is read once" in page
    assert page in outcome.report.read_text()


def test_default_lengths_follow_the_training_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = Target.of(tiny(MIXERS[0], tokenizer), tokenizer, run_dir=tmp_path, train_seq_len=300)
    assert Passkey(target, PasskeySettings()).lengths == [144, 296, 600, 1200, 2400]
    short = Target.of(tiny(MIXERS[0], tokenizer), tokenizer, run_dir=tmp_path, train_seq_len=64)
    lengths = Passkey(short, PasskeySettings()).lengths
    assert lengths[-2:] == [256, 512]
    assert lengths[0] > 64  # the shortest prompt that holds its needle


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [100]}, "100 is no multiple of 8; the training split has the other lengths"),
        ({"lengths": [64]}, "lengths: 64 is too short: with this tokenizer task 'passkey' needs"),
        ({"task": "passkeys"}, "task"),
        ({"depths": [1.5]}, "less than or equal to 1"),
        ({"template": 8}, "template: 8 is none of 0 … 7"),
        ({"task": "niah_prose"}, "no set 'held_out' here"),
        ({"task": "niah_prose", "text": "nowhere.txt"}, "nowhere.txt: No such file"),
        ({"queries": 2}, "task 'passkey' has one nameless key"),
        ({"samples": 0}, "samples"),
    ],
)
def test_refusals_are_one_line(changes: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = Target.of(tiny(MIXERS[0], tokenizer), tokenizer, run_dir=tmp_path)
    with pytest.raises((UserError, ConfigError), match=re.escape(message)) as caught:
        run_suite(Passkey, target, changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


def test_a_growing_state_is_bounded_by_a_setting(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = Target.of(tiny(MIXERS[-1], tokenizer), tokenizer, run_dir=tmp_path)
    with pytest.raises(UserError, match="cache_tokens = 150; raise cache_tokens, or leave the length out"):
        Passkey(target, PasskeySettings(lengths=[160], cache_tokens=150))
    running = Passkey(target, PasskeySettings(lengths=[160], depths=[0.5], samples=5, cache_tokens=350))
    seen = []
    ask = running.reader.ask
    running.reader.ask = lambda prompts, rows, progress: seen.append(rows) or ask(prompts, rows, progress)  # type: ignore
    (cell,) = running.cells()
    assert running.measure(cell)["n"] == 5
    assert seen == [2]


def test_a_run_of_the_task_is_measured_with_the_tasks_own_tokenizer(tmp_path: Path) -> None:
    from paralm.config import Config
    from paralm.training.loop import train

    config = Config.model_validate(
        {
            "run": {"name": "keys", "root": str(tmp_path)},
            "data": {"synthetic": {"task": "passkey", "max_length": 120}},
            "model": {"d_model": 16, "n_layers": 1, "mixer": {"name": "paragru", "n_heads": 2}},
            "training": {"max_steps": 2, "seq_len": 126, "global_batch_size": 2, "micro_batch_size": 2, "threads": 1,
                         "validate_tokens": 40},
            "checkpoint": {"every": 2},
        }
    )  # fmt: skip
    train(config, say=lambda text: None)
    outcome = run_suite("passkey", config.run_dir, {"lengths": [104, 256], "depths": [0.5], "samples": 2})
    (found,) = outcome.results
    assert (found.step, found.train_seq_len, found.key_tokens, found.one_token_a_digit) == (2, 126, 5, True)
    assert [cell.length for cell in found.cells] == [104, 256]
    assert "## passkey" in outcome.report.read_text()
