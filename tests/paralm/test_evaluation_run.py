"""Evaluating a run: what lands in its folder, what is skipped, what the report says, what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from paralm_data import StoreWriter, Tokenizer, TokenStore

from paralm.config import Config
from paralm.errors import RunError, UserError
from paralm.evaluation import markdown
from paralm.evaluation import record as records
from paralm.evaluation import result as results
from paralm.evaluation import run as run_module
from paralm.evaluation.compression import CompressionResult, compressed_sizes, compression, compression_baselines
from paralm.evaluation.report import read_results, write_report
from paralm.evaluation.run import run_evaluation
from paralm.evaluation.samples import samples
from paralm.export import export
from paralm.training.load import load_model
from paralm.training.loop import train
from tests.conftest import settings


@pytest.fixture(scope="module")
def trained(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a few steps, with two checkpoints and three validations; never changed."""
    base = settings(corpus, prepared, tmp_path_factory.mktemp("runs"), checkpoint={"every": 4})
    base["training"] |= {"max_steps": 8, "validate_every": 3}
    base["eval"]["prompts"] = ["the ", "`` tick"]
    config = Config.model_validate(base)
    train(config, say=lambda text: None)
    return config.run_dir


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, evaluated; never changed."""
    path = tmp_path_factory.mktemp("evaluated") / "tiny"
    shutil.copytree(trained, path)
    run_evaluation(path)
    return path


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of the evaluated run, to change."""
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here; tests that are not about the report go without."""
    monkeypatch.setattr(run_module, "write_report", lambda path: path / "report.md")


# -- compressors ---------------------------------------------------------------------------------------------


def test_compressors_see_exactly_the_scored_text_as_one_stream(prepared: Path) -> None:
    store, tokenizer = TokenStore.open(prepared / "held_out"), Tokenizer.load(prepared / "tokenizer.model")
    documents = [7, 2, 5]
    text = "".join(tokenizer.decode(store.document(d)) for d in sorted(documents)).encode("utf-8")
    found = compression_baselines(store, tokenizer, documents)
    # gzip's header holds a file name or a time, but has a fixed size without a name.
    assert found["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert found["bzip2 -9"] == 8 * len(bz2.compress(text, 9)) / len(text)
    # xz's dictionary is cut to the text's size, which may move a header field.
    assert found["xz -9e"] == pytest.approx(
        8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text), 0.01
    )
    # zstd is told the size when everything is there at once, and a stream is not.
    whole = len(zstandard.ZstdCompressor(level=19).compress(text))
    assert found["zstd -19"] == pytest.approx(8 * whole / len(text), 0.01)
    result = compression(store, tokenizer, documents)
    assert (result.n_bytes, result.n_documents, result.bits_per_byte) == (len(text), 3, found)


def test_compressed_sizes_do_not_depend_on_how_the_text_comes() -> None:
    text = bytes(range(256)) * 40 + b"the river sings under the bridge; " * 900
    sizes = [
        compressed_sizes((text[i : i + step] for i in range(0, len(text), step)), len(text))
        for step in (len(text), 1000, 37)
    ]
    for name in ("gzip -9", "bzip2 -9", "xz -9e"):
        assert sizes[0][name] == sizes[1][name] == sizes[2][name]
    assert sizes[1]["zstd -19"] == pytest.approx(sizes[2]["zstd -19"], rel=0.02)


def test_there_are_no_baselines_for_a_lossy_tokenizer(prepared: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer.model")
    with StoreWriter(tmp_path / "store", tokenizer) as writer:
        writer.add([tokenizer.encode("ab")], [5])
        store = writer.finish()
    found = compression(store, tokenizer, [0])
    assert found.bits_per_byte == {}
    assert found.reason is not None
    assert "lossy" in found.reason


# -- samples -------------------------------------------------------------------------------------------------


def test_samples_are_reproducible_text_with_ends_noticed(trained: Path) -> None:
    loaded = load_model(trained)
    first, second = (samples(loaded.model, loaded.tokenizer, ["the ", ""], 12, seed=4) for _ in range(2))
    assert first == second
    assert [s.prompt for s in first.samples] == ["the ", ""]
    for sample in first.samples:
        assert sample.tokens <= 12
        assert sample.ended == (sample.tokens < 12)
    assert samples(loaded.model, loaded.tokenizer, ["the "], 12, seed=5).samples != first.samples[:1]


# -- the whole -----------------------------------------------------------------------------------------------


def test_an_evaluation_leaves_its_results_and_a_report(evaluated: Path) -> None:
    found = read_results(evaluated)
    assert found.record is not None
    assert found.record.basis.step == 8
    assert found.record.parameters == sum(p.numel() for p in load_model(evaluated).model.parameters())
    model = load_model(evaluated).model
    state = model(torch.tensor([[1, 5, 9]])).state
    assert found.record.state_bytes == sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(state))
    scored, compressed = found.perplexity["held_out"], found.compression["held_out"]
    assert scored.step == compressed.step == 8
    assert scored.n_bytes == compressed.n_bytes
    assert scored.train_seq_len == 32
    assert scored.reset_every is None
    assert len(found.samples.samples) == 2  # type: ignore[union-attr]
    report = (evaluated / "report.md").read_text(encoding="utf-8")
    for figure in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", report):
        assert (evaluated / figure).read_bytes().startswith(b"\x89PNG")
    assert {"loss.png", "throughput.png", "optimization.png", "eval/perplexity_by_position.png"} <= set(
        re.findall(r"\]\(([^)]+\.png)\)", report)
    )
    assert f"**{scored.bits_per_byte:.3f}**" in report
    for name, bits in compressed.bits_per_byte.items():
        assert f"| {name} | {bits:.3f} |" in report
    assert f"the same {scored.n_bytes:,} bytes" in report
    assert f"{scored.token_perplexity:.2f}" in report
    assert "trained on nothing" in report
    assert f"paralm generate {evaluated}" in report
    # The fence of a sample is longer than any run of backticks in it, so the block cannot end early.
    assert "### ``` `` tick ```" in report
    for sample in found.samples.samples:  # type: ignore[union-attr]
        assert f"\n{markdown.fence(sample.prompt + sample.text)}\n" in report


@pytest.mark.usefixtures("no_report")
def test_evaluating_again_does_nothing_until_something_changed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    original = run_module.load_model
    monkeypatch.setattr(run_module, "load_model", lambda *a, **k: loads.append(a) or original(*a, **k))
    before = {p.name: p.read_bytes() for p in (run / "eval").iterdir()}
    again = run_evaluation(run)
    assert again.skipped
    assert not loads
    assert {p.name: p.read_bytes() for p in (run / "eval").iterdir()} == before
    config = load_model(run).config
    other = config.eval.model_copy(update={"max_tokens": 300})
    changed = run_evaluation(run, other)
    assert not changed.skipped
    assert changed.held_out.tokens < again.held_out.tokens
    assert run_evaluation(run, other).skipped
    earlier = run_evaluation(f"{run}@4", other)
    assert (earlier.skipped, earlier.step) == (False, 4)
    assert earlier.held_out.nats_per_token > changed.held_out.nats_per_token  # it had learnt less
    (run / "eval" / "samples.json").unlink()
    assert not run_evaluation(f"{run}@4", other).skipped
    assert not run_evaluation(f"{run}@4", other, again=True).skipped
    monkeypatch.setattr(run_module, "scoring_version", lambda vocab_size, n_tokens: 9)
    assert not run_evaluation(f"{run}@4", other).skipped
    assert len(loads) == 5


@pytest.mark.usefixtures("no_report")
def test_an_interrupted_evaluation_is_not_taken_for_a_whole_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(run, again=True)
    assert not records.path_of(run).exists()
    assert "Not measured yet" in write_report(run).read_text(encoding="utf-8")
    assert not run_evaluation(run).skipped


def test_every_validation_set_is_measured(run: Path, corpus: Path, prepared: Path) -> None:
    data = run / "data"
    shutil.copytree(prepared, data)
    shutil.copytree(prepared / "held_out", data / "validation" / "notes")
    saved = (run / "config.yaml").read_text(encoding="utf-8")
    config = Config.model_validate(settings(corpus, data, run.parent))
    text = saved.replace(str(prepared), str(data))
    text = re.sub(r"validation: \{\}", f"validation: {{notes: {{kind: text, paths: ['{corpus}']}}}}", text)
    assert text != saved
    (run / "config.yaml").write_text(text, encoding="utf-8")
    found = run_evaluation(run, config.eval)
    assert list(found.results.perplexity) == ["held_out", "notes"]
    assert found.results.perplexity["notes"].nats_per_token == found.held_out.nats_per_token
    assert (run / "eval" / "compression_notes.json").exists()
    assert "| notes |" in found.report.read_text(encoding="utf-8")


def test_a_growing_state_is_scored_in_windows_of_the_training_length(run: Path) -> None:
    config = load_model(run).config
    attention = config.model.model_copy(update={"mixer": {"name": "attention"}})
    assert run_module._bounded(config)
    assert not run_module._bounded(config.model_copy(update={"model": attention}))
    windowed = run_evaluation(run, reset_every=32)
    assert windowed.held_out.reset_every == 32
    assert "forgets after every 32 tokens" in windowed.report.read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_report")
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(run: Path) -> None:
    newest = run / "checkpoints" / "step_00000008" / "rank_00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
        found = run_evaluation(run, again=True)
    assert found.step == 4
    assert read_results(run).record.basis.step == 4  # type: ignore[union-attr]


# -- what is refused -----------------------------------------------------------------------------------------


def damage_nothing_there(run: Path) -> str:
    shutil.rmtree(run)
    return "no such run folder"


def damage_no_config(run: Path) -> str:
    (run / "config.yaml").unlink()
    return "no config.yaml"


def damage_no_checkpoint(run: Path) -> str:
    shutil.rmtree(run / "checkpoints")
    return "no checkpoint yet; train the run first"


def damage_no_metrics(run: Path) -> str:
    (run / "metrics.jsonl").unlink()
    return "metrics.jsonl: no such file"


def damage_metrics_line(run: Path) -> str:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines[2] = lines[2][:20] + "\n"
    (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return "metrics.jsonl:3: "


def damage_metrics_key(run: Path) -> str:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").replace('"grad_norm"', '"gradnorm"')
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    return "grad_norm"


def damage_store_missing(run: Path) -> str:
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(re.sub(r"(?m)^  dir: .*$", f"  dir: {run}/nowhere", config), encoding="utf-8")
    return "nowhere/held_out: no token store there"


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_there,
        damage_no_config,
        damage_no_checkpoint,
        damage_no_metrics,
        damage_metrics_line,
        damage_metrics_key,
        damage_store_missing,
    ],
    ids=lambda f: f.__name__.removeprefix("damage_"),
)
def test_a_run_that_cannot_be_evaluated_is_refused_in_one_line_and_untouched(run: Path, damage: Any) -> None:
    expected = damage(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        run_evaluation(run, again=True)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.usefixtures("no_report")
def test_a_report_says_which_result_is_damaged(run: Path) -> None:
    path = run / "eval" / "compression.json"
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    with pytest.raises(RunError, match=r"compression\.json: damaged") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not run_evaluation(run).skipped  # it is made again
    assert results.read_json(CompressionResult, path) is not None


def test_a_report_of_a_run_that_still_trains(run: Path) -> None:
    shutil.rmtree(run / "eval")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')  # what a crash leaves of a line
    (run / "environment.json").write_text("{", encoding="utf-8")
    report = write_report(run).read_text(encoding="utf-8")
    assert "Not measured yet" in report
    assert "environment.json cannot be read" in report
    shutil.copyfile(run / "metrics.jsonl", run / "whole.jsonl")
    rows = [json.loads(line) for line in (run / "whole.jsonl").read_text(encoding="utf-8").splitlines()[:-1]]
    kept = [json.dumps(row) for row in rows if row["step"] <= 5]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    report = write_report(run).read_text(encoding="utf-8")
    assert "so far (step 5 of 8)" in report
    assert "# train on" in report
    assert f"paralm run {run}/config.yaml run.root={run.parent} run.name={run.name} " in report  # a copy: it was moved


def test_a_report_of_a_fork_sets_its_own_tokens_beside_its_own_time(run: Path) -> None:
    config, metrics = run / "config.yaml", run / "metrics.jsonl"
    config.write_text(config.read_text(encoding="utf-8").replace("fork_from: null", "fork_from: runs/x@5"))
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] > 5), encoding="utf-8")
    report = write_report(run).read_text(encoding="utf-8")
    assert re.search(r"trained on 384 tokens in \S+( \S+)?, after 640 in the run it was forked from", report)


def test_an_export_without_text_is_told_what_to_give(evaluated: Path, tmp_path: Path) -> None:
    export(evaluated, tmp_path / "exported")
    with pytest.raises(UserError, match=r"exported: an export has no text; .* data\.dir=DIR"):
        run_evaluation(tmp_path / "exported")
