"""lm_eval with this project's models: its own runner, its own command line, on tasks that lie here.

The tasks are files that the tests write; nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from paralm_data import StoreWriter, Tokenizer, TokenStore

from paralm.config import ModelConfig
from paralm.errors import ConfigError, UserError
from paralm.evaluation.likelihood import continuation_likelihoods, encode_pair, text_likelihoods
from paralm.evaluation.perplexity import perplexity
from paralm.generation import stream_text
from paralm.models import LanguageModel, build_model
from paralm.registry import MIXERS

pytest.importorskip("lm_eval")

WORDS = ["the", "river", "stone", "light", "walks", "under", "12", "307", "because", "é", "水", "→", "(", "return"]


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer.load(prepared / "tokenizer.model")


def model_of(mixer: str, tokenizer: Tokenizer, **keys: Any) -> LanguageModel:
    config = ModelConfig(d_model=16, n_layers=2, mixer={"name": mixer, **keys}, tie_embeddings=False)
    model = build_model(config, tokenizer.vocab_size, seed=3).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the uniform predictions of a new model
            parameter.mul_(1.5)
        model.head_weight.mul_(4)
    return model


def text_of(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(1)
    return [text_of(rng, n) for n in (40, 1, 90, 13)] + ["  begins and ends with white space\n\n"]


@pytest.fixture(scope="module")
def tasks(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks: texts, questions with answers to choose from, and text to go on with."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(2)
    questions = [
        {"q": text_of(rng, 5 + i), "a": [text_of(rng, 1 + j) for j in range(3)], "gold": i % 3} for i in range(6)
    ]

    def task(name: str, rows: list[dict[str, Any]], **keys: Any) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / f"{name}.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "metadata": {"version": 1.0},
            **keys,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))

    task(
        "own_texts", [{"text": text} for text in texts], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )  # fmt: skip
    task(
        "own_choices", questions, output_type="multiple_choice", doc_to_text="{{q}} is", doc_to_choice="{{a}}",
        doc_to_target="{{gold}}", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    task(
        "own_words", questions, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a[0]}}",
        generation_kwargs={"until": [" "], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=given) for given in arguments]


def run(model: Any, tasks: Path, *names: str) -> dict[str, dict[str, Any]]:
    """lm_eval's own runner."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    return found["results"]


@pytest.fixture(scope="module")
def store(texts: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    with StoreWriter(tmp_path_factory.mktemp("texts") / "store", tokenizer) as writer:
        ids = [np.array(tokenizer.encode(text)) for text in texts]
        writer.add(ids, [len(text.encode()) for text in texts])
        return writer.finish()


# -- the same number as paralm's own perplexity --------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["paragru", "mamba2", "attention"])
@pytest.mark.parametrize("reset_every", [None, 11])
def test_lm_evals_runner_gives_the_bits_per_byte_of_eval_perplexity(
    mixer: str, reset_every: int | None, texts: list[str], tasks: Path, store: TokenStore, tokenizer: Tokenizer
) -> None:
    from paralm.evaluation.harness import ParalmLM

    model = model_of(mixer, tokenizer)
    own = perplexity(model, store, tokenizer, rows=2, chunk=16, reset_every=reset_every)
    # With the end of each document counted, as perplexity does, it is the same number.
    lm = ParalmLM.of(model, tokenizer, batch_size=3, chunk=7, reset_every=reset_every, score_eos=True)
    theirs = run(lm, tasks, "own_texts")["own_texts"]
    assert theirs["bits_per_byte,none"] == pytest.approx(own.bits_per_byte, rel=1e-9)
    # Without, as lm_eval's other models, it is the same but for the losses of the ends, which are computed here alone.
    plain = run(
        ParalmLM.of(model, tokenizer, batch_size=3, chunk=7, reset_every=reset_every), tasks, "own_texts"
    )["own_texts"]  # fmt: skip
    ends = sum(loss_of_end(model, tokenizer, text, reset_every) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert n_bytes == own.n_bytes
    assert plain["bits_per_byte,none"] == pytest.approx(own.bits_per_byte - ends / math.log(2) / n_bytes, rel=1e-9)
    assert plain["bits_per_byte,none"] < theirs["bits_per_byte,none"]
    # Words: lm_eval's are one more where white space begins or ends a text.
    words = sum(len(text.split()) for text in texts) + 2
    nats = own.bits_per_byte * math.log(2) * n_bytes
    assert theirs["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=1e-6)


def loss_of_end(model: LanguageModel, tokenizer: Tokenizer, text: str, reset_every: int | None) -> float:
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    start = (len(ids) - 1) // reset_every * reset_every if reset_every else 0
    with torch.no_grad():
        logits = model(torch.tensor([ids[start:]])).logits[0, -1]
    return -float(logits.log_softmax(-1)[tokenizer.eos_id])


def test_max_length_gives_the_windows_that_lm_eval_cuts(texts: list[str], tokenizer: Tokenizer) -> None:
    """Written out: windows of N predictions, the last one reaching back to be as long as the others."""
    from paralm.evaluation.harness import ParalmLM

    model, length = model_of("paragru", tokenizer), 11
    expected = []
    for text in texts:
        ids, total = tokenizer.encode(text), 0.0
        for start in range(0, len(ids), length):
            stop = min(start + length, len(ids))
            first = max(0, stop - length)
            read = ([tokenizer.bos_id, *ids])[first:stop]
            with torch.no_grad():
                log = model(torch.tensor([read])).logits[0].log_softmax(-1)
            total += sum(float(log[i - first, ids[i]]) for i in range(start, stop))
        expected.append(total)
    lm = ParalmLM.of(model, tokenizer, max_length=length, batch_size=4, chunk=5)
    assert lm.loglikelihood_rolling(requests(*((text,) for text in texts))) == pytest.approx(expected, rel=1e-9)


def test_a_text_without_tokens_has_nothing_to_score(tokenizer: Tokenizer) -> None:
    from paralm.evaluation.harness import ParalmLM

    model = model_of("paragru", tokenizer)
    assert ParalmLM.of(model, tokenizer).loglikelihood_rolling(requests(("",), ("the",)))[0] == 0.0
    assert ParalmLM.of(model, tokenizer, max_length=4).loglikelihood_rolling(requests(("",))) == [0.0]
    assert ParalmLM.of(model, tokenizer, score_eos=True).loglikelihood_rolling(requests(("",)))[0] < 0
    assert text_likelihoods(model, []) == []


# -- continuations -------------------------------------------------------------------------------------------


def directly(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From the logits of both together."""
    with torch.no_grad():
        log = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    total = sum(float(row[token]) for row, token in zip(log, continuation, strict=True))
    return total, log.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("mixer", MIXERS.names())
def test_a_likelihood_is_that_of_context_and_continuation_together(mixer: str, tokenizer: Tokenizer) -> None:
    model, rng = model_of(mixer, tokenizer), random.Random(4)

    def ids(length: int) -> list[int]:
        return [rng.randrange(4, tokenizer.vocab_size) for _ in range(length)]

    contexts = [[tokenizer.bos_id, *ids(n)] for n in (0, 3, 9, 9, 30)]
    pairs = [(context, ids(n)) for context in contexts for n in (1, 4, 12, 0)]
    with torch.no_grad():  # one that is what greedy decoding gives
        likeliest = [int(model(torch.tensor([contexts[1]])).logits[0, -1].argmax())]
        likeliest += [int(model(torch.tensor([contexts[1] + likeliest])).logits[0, -1].argmax())]
    pairs.append((contexts[1], likeliest))
    rng.shuffle(pairs)
    expected = [directly(model, *pair) for pair in pairs]
    assert {greedy for _, greedy in expected} == {True, False}
    for rows, chunk in ((1, 512), (3, 4), (16, 512)):
        found = continuation_likelihoods(model, pairs, rows=rows, chunk=chunk)
        assert [one.greedy for one in found] == [greedy for _, greedy in expected]
        # float64; a Newton solve stops at about 1e-11 of the state
        assert [one.logprob for one in found] == pytest.approx([value for value, _ in expected], rel=1e-7, abs=1e-7)


def test_a_context_is_read_once_for_all_its_continuations(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("paragru", tokenizer)
    read, forward = 0, model.forward

    def counting(tokens: torch.Tensor, *args: Any, **keys: Any) -> Any:
        nonlocal read
        read += tokens.numel()
        return forward(tokens, *args, **keys)

    monkeypatch.setattr(model, "forward", counting)
    context = [tokenizer.bos_id, *range(10, 60)]
    continuation_likelihoods(model, [(context, [i]) for i in range(20, 30)])
    assert read == 51  # ten answers of one token cost nothing more
    read = 0
    continuation_likelihoods(model, [(context, [i, i + 1, i + 2]) for i in range(20, 30)])
    assert read == 51 + 10 * 2


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("the river", " walks"), ("the river ", "walks"), ("", "the river"), ("  ", "stone"), ("the riv", "er walks"),
        ("def f(", "x): return"), ("12", "3"), ("é", "é 水"), ("a\n\n", "b"), ("the", ""), ("under the r", "iver"),
    ],
)  # fmt: skip
def test_the_boundary_falls_between_context_and_continuation(
    context: str, continuation: str, tokenizer: Tokenizer
) -> None:
    first, second = encode_pair(tokenizer, context, continuation)
    moved = context[len(context.rstrip()) :]
    assert first[0] == tokenizer.bos_id
    assert tokenizer.decode(first[1:]) == context.rstrip()
    assert tokenizer.decode(second) == moved + continuation
    whole = tokenizer.encode(context + continuation)
    spanned = tokenizer.encode(context.rstrip()) != whole[: len(first) - 1]
    assert spanned == ([*first[1:], *second] != whole)


def test_a_token_that_would_span_the_boundary_is_not_scored_as_a_whole(tokenizer: Tokenizer) -> None:
    """The case that makes cutting by counts wrong: there the context's own tokens are no beginning of the whole's."""
    spanning = [
        (word[:cut], word[cut:])
        for word in WORDS
        for cut in range(1, len(word))
        if tokenizer.encode(word)[: len(tokenizer.encode(word[:cut]))] != tokenizer.encode(word[:cut])
    ]
    assert spanning
    for context, continuation in spanning:
        assert encode_pair(tokenizer, context, continuation)[1] == tokenizer.encode(continuation)


def test_choices_by_lm_evals_runner_are_those_of_the_likelihoods(tasks: Path, tokenizer: Tokenizer) -> None:
    from paralm.evaluation.harness import ParalmLM

    model = model_of("paralstm", tokenizer)
    found = run(ParalmLM.of(model, tokenizer, batch_size=4), tasks, "own_choices")["own_choices"]
    right = 0
    rows = [json.loads(line) for line in (tasks / "own_choices.jsonl").read_text().splitlines()]
    for row in rows:
        scores = [directly(model, *encode_pair(tokenizer, f"{row['q']} is", f" {answer}"))[0] for answer in row["a"]]
        right += int(np.argmax(scores)) == row["gold"]
    assert found["acc,none"] == right / len(rows)
    assert 0 <= found["acc_norm,none"] <= 1


# -- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["paragru", "attention"])
def test_generated_text_is_what_generate_gives_alone(mixer: str, tokenizer: Tokenizer) -> None:
    from paralm.evaluation.harness import ParalmLM

    model = model_of(mixer, tokenizer)
    contexts = ["the river", "", "stone light walks under", "12 307 because é"]
    until = [[" "], [], ["e", "水"], ["\n\n"]]
    given = [{"until": u, "max_gen_toks": 6 + n, "do_sample": False} for n, u in enumerate(until)]
    lm = ParalmLM.of(model, tokenizer, batch_size=3, chunk=4)
    found = lm.generate_until(requests(*zip(contexts, given, strict=True)))
    expected = [
        "".join(stream_text(model, tokenizer, context, 6 + n, temperature=0, stop=u))
        for n, (context, u) in enumerate(zip(contexts, until, strict=True))
    ]
    assert found == expected
    assert any(found)


def test_sampled_text_depends_on_the_seed_and_on_nothing_beside_it(tokenizer: Tokenizer) -> None:
    from paralm.evaluation.harness import ParalmLM

    model = model_of("paragru", tokenizer)
    given = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    asked = requests(("the", given), ("the", given), ("river stone", given))
    first = ParalmLM.of(model, tokenizer).generate_until(asked)
    assert ParalmLM.of(model, tokenizer, batch_size=1).generate_until(asked) == first
    assert ParalmLM.of(model, tokenizer).generate_until(asked[::-1])[0] == first[2]
    assert first[0] != first[1]  # the same request again is another draw
    assert ParalmLM.of(model, tokenizer, seed=1).generate_until(asked) != first
    with pytest.raises(UserError, match="num_beams=4 is not supported"):
        ParalmLM.of(model, tokenizer).generate_until(requests(("the", {**given, "num_beams": 4})))


# -- its command line, and paralm's --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prepared: Path, corpus: Path) -> Path:
    """A run of two steps."""
    from paralm.config import Config
    from paralm.training.loop import train
    from tests.conftest import settings

    root = tmp_path_factory.mktemp("runs")
    train(Config.model_validate(settings(corpus, prepared, root, training={"max_steps": 2})), say=lambda text: None)
    return root / "tiny"


def test_lm_evals_command_line_finds_the_model(
    trained: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    from paralm.evaluation.lm_eval_cli import main

    # Looking through lm_eval's own 14,000 tasks takes 16 s and shows nothing here.
    index = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *a, **k: index(self, *a, **{**k, "include_defaults": False})
    )

    def cli(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, arguments)])
        return main()

    own = ("--tasks", "own_texts,own_choices,own_words", "--include_path", tasks, "--output_path", tmp_path / "out")
    assert cli("run", "--model", "paralm", "--model_args", f"run={trained},score_eos=True", *own) == 0
    shown = capsys.readouterr().out
    assert "bits_per_byte" in shown
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model"] == "paralm"
    # And `paralm eval lm-eval` gives the same numbers.
    from paralm.evaluation.suite import run_suite

    names = ["own_texts", "own_choices", "own_words"]
    outcome = run_suite("lm-eval", trained, {"tasks": names, "include_path": str(tasks), "score_eos": True})
    assert outcome.complete
    (result,) = outcome.results
    for score in result.scores:
        # float32 in batches of other sizes
        assert results["results"][score.task][f"{score.metric},{score.filter}"] == pytest.approx(score.value, rel=1e-5)
    assert {(s.task, s.metric) for s in result.scores} >= {
        ("own_texts", "bits_per_byte"), ("own_choices", "acc"), ("own_words", "exact_match")
    }  # fmt: skip
    page = outcome.report.read_text()
    assert "own_choices" in page
    assert "texts are read whole, with the state carried. In rolling tasks the end of a document counts." in page
    assert (trained / "eval" / "lm-eval_scores.png").is_file()
    again = run_suite("lm-eval", trained, {"tasks": names, "include_path": str(tasks), "score_eos": True})
    assert (again.measured, again.kept) == (0, 3)
    # What lm_eval is and what the folder holds are no settings, so following the run leaves the step out too.
    from paralm.evaluation.follow import follow
    from paralm.evaluation.suite import get_evaluation

    assert "made_of" not in get_evaluation("lm-eval").Settings.model_fields
    asked = {"tasks": names, "include_path": str(tasks), "score_eos": True}
    assert list(follow(get_evaluation("lm-eval"), trained, asked)) == []
    # A changed text is another task.
    (tasks / "own_texts.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    changed = run_suite("lm-eval", trained, {"tasks": names[:1], "include_path": str(tasks), "score_eos": True})
    assert changed.measured == 1

    capsys.readouterr()
    for wrong, message in (
        (f"run={trained},chunks=3", "model_args: no such key 'chunks'"),
        (f"run={tmp_path / 'none'}", "none"),
        ("chunk=3", "run is missing"),
        (f"run={trained},dtype=fp8", "dtype is 'fp8'"),
    ):
        assert cli("run", "--model", "paralm", "--model_args", wrong, *own) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tasks: name at least one"),
        ({"tasks": ["a", "a"]}, "'a' is named twice"),
        ({"tasks": ["a"], "seed": 1 << 32}, "seed"),  # numpy's are of 32 bits
        ({"tasks": ["a"], "include_path": "/nowhere/at/all"}, "is no folder"),
        ({"tasks": ["a"], "limits": 3}, "no such setting; did you mean 'limit'"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(
    settings: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from paralm.evaluation.suite import Target, run_suite

    target = Target.of(model_of("paragru", tokenizer), tokenizer, run_dir=tmp_path)
    with pytest.raises((UserError, ConfigError), match=message):
        run_suite("lm-eval", target, settings)
    assert not list(tmp_path.rglob("*.json"))


def test_a_task_by_itself_and_in_a_group_is_listed_once(tasks: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from paralm.evaluation.downstream import LmEval, LmEvalSettings, TaskScore
    from paralm.evaluation.suite import Target

    def score(task: str, filter: str = "none") -> dict[str, Any]:
        known = {"stderr": None, "documents": 6, "num_fewshot": 0, "version": "1"}
        return TaskScore(task=task, metric="acc", filter=filter, value=0.5, **known).model_dump()

    shutil.copyfile(tasks / "own_choices.yaml", tmp_path / "own_choices.yaml")
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "own_group", "task": ["own_choices"]}))
    asked = LmEvalSettings(tasks=["own_group", "own_choices"], include_path=tmp_path)
    evaluation = LmEval(Target.of(model_of("paragru", tokenizer), tokenizer), asked)
    member = [score("own_choices"), score("own_choices", "strict")]
    (found,) = evaluation.combine(
        {"own_group": {"scores": [score("own_group"), *member]}, "own_choices": {"scores": member}}
    )
    assert list(found.scalars()) == ["own_group/acc", "own_choices/acc", "own_choices/acc/strict"]


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it\nand more"), FileNotFoundError("Couldn't reach it")]
)
def test_data_that_cannot_be_had_is_one_line(
    error: Exception, tasks: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    from paralm.evaluation.suite import Target, run_suite

    def fail(**given: Any) -> None:
        raise error

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
    target = Target.of(model_of("paragru", tokenizer), tokenizer, run_dir=tmp_path)
    with pytest.raises(UserError) as caught:
        run_suite("lm-eval", target, {"tasks": ["own_texts"], "include_path": str(tasks)})
    assert str(caught.value) == "tasks: the data of 'own_texts' cannot be had (Couldn't reach it)"
