"""Passkey and needles: an oracle scores 100 %, a blind guesser chance; snapshots and chunks change nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from paralm_data import Tokenizer
from paralm_data.passkey import ids_after

from paralm.errors import ConfigError, UserError
from paralm.evaluation.needles import TASKS, Builder, chosen
from paralm.evaluation.passkey import Passkey, PasskeyResult, PasskeySettings
from paralm.evaluation.retrieval import Reader
from paralm.evaluation.suite import Part, Target, run_suite
from paralm.registry import MIXERS
from tests.paralm.interrupting import interrupted
from tests.paralm.passkey_models import LENGTHS, Blind, Oracle
from tests.paralm.small_models import small_model


@pytest.fixture(scope="module")
def tokenizer(passkey_tokenizer: Tokenizer) -> Tokenizer:
    return passkey_tokenizer


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


@pytest.mark.parametrize("mixer", MIXERS.names())
def test_snapshots_and_chunks_change_nothing(mixer: str, tokenizer: Tokenizer) -> None:
    model = small_model(mixer, tokenizer.vocab_size)
    tasks = [("passkey", 160, None), ("niah_multiquery", 260, 2)]
    for name, length, queries in tasks if mixer in ("paragru", "mamba2", "attention") else tasks[:1]:
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
    model = small_model("paragru", tokenizer.vocab_size)
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


def test_shared_text_is_read_in_the_same_calls_whatever_was_read_before(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call begins at a multiple of ``chunk``: with chunked mixers the last bits depend on where calls begin."""
    calls: list[tuple[int, int]] = []

    def step(self: Reader, tokens: np.ndarray, state: int | None, last: bool = True) -> SimpleNamespace:
        calls.append((state or 0, tokens.shape[1]))
        return SimpleNamespace(state=sum(calls[-1]))

    monkeypatch.setattr(Reader, "_step", step)
    made = Builder(tokenizer, chosen("passkey", haystack="noise"), name="passkey", reach=400)
    cells = [made.prompts(400, depth, 1) for depth in (0.31, 0.52, 0.83)]
    assert len({prompts.prefix % 32 for prompts in cells} | {0}) == 4, "none ends where a call does"
    reader = Reader(None, 32, tokenizer.vocab_size)
    assert [reader._shared(prompts) for prompts in cells] == [prompts.prefix for prompts in cells]
    assert all(start % 32 == 0 for start, _ in calls)
    assert sum(count for _, count in calls) < 400, "it goes on from what was kept"
    together, calls[:] = set(calls), []
    for prompts in cells:
        Reader(None, 32, tokenizer.vocab_size)._shared(prompts)
    assert together == set(calls)


def grid(tmp_path: Path, tokenizer: Tokenizer, **changes: Any) -> tuple[Target, dict[str, Any]]:
    target = Target.of(
        small_model("mamba2", tokenizer.vocab_size).float(), tokenizer, run_dir=tmp_path, train_seq_len=128
    )
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
            with interrupted(monkeypatch, Passkey, after=3):
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
    figure = found.model_copy(update={"task": "niah_multiquery"}).figures()["grid"]
    figure.canvas.draw()
    left, right = (axes.title.get_window_extent() for axes in figure.axes[:2])
    assert left.x1 < right.x0
    page = Passkey.page(outcome.results)
    assert "passkey_grid.png" in page
    assert "trained at 128" in page
    assert "Read by one process, shared text is read once" in page
    assert page in outcome.report.read_text()


def test_default_lengths_follow_the_training_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = Target.of(small_model("paragru", tokenizer.vocab_size), tokenizer, run_dir=tmp_path, train_seq_len=300)
    assert Passkey(target, PasskeySettings()).lengths == [144, 296, 600, 1200, 2400]
    short = Target.of(small_model("paragru", tokenizer.vocab_size), tokenizer, run_dir=tmp_path, train_seq_len=64)
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
    target = Target.of(small_model("paragru", tokenizer.vocab_size), tokenizer, run_dir=tmp_path)
    with pytest.raises((UserError, ConfigError), match=re.escape(message)) as caught:
        run_suite(Passkey, target, changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


def test_a_growing_state_is_bounded_by_a_setting(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = Target.of(small_model("attention", tokenizer.vocab_size), tokenizer, run_dir=tmp_path)
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


def test_the_readme_says_what_the_recorded_grid_says() -> None:
    """benchmarks/results/passkey_mamba2.json, by the tokens between needle and question."""
    root = Path(__file__).resolve().parents[2]
    cells = json.loads((root / "benchmarks" / "results" / "passkey_mamba2.json").read_text())["result"]["cells"]
    hits: dict[int, list[int]] = {}
    for cell in cells:
        total = hits.setdefault(cell["needles"][0]["distance"], [0, 0])
        total[0], total[1] = total[0] + cell["generated"]["hits"], total[1] + cell["n"]
    missed = sorted(distance for distance, (right, n) in hits.items() if right < n)
    exact = max(distance for distance in hits if distance < missed[0])
    none = max(distance for distance, (right, _) in hits.items() if right) + 1
    none = min(distance for distance in hits if distance >= none)
    about = [sum(pair) for pair in zip(*(hits[d] for d in hits if 950 < d < 1050), strict=True)]
    assert 0.2 < about[0] / about[1] < 0.3
    readme = " ".join((root / "README.md").read_text().split())
    share = f"{100 * hits[missed[0]][0] / hits[missed[0]][1]:.0f} %"
    said = f"every key at up to {exact} tokens, {share} at {missed[0]}, about a quarter at 1,000, none from {none:,}."
    assert said in readme, said
