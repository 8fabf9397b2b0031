"""paralm export --format transformers, and paralm import: the same model either way, or one line that says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from paralm_data import Tokenizer
from paralm_launch import cli

import paralm
from paralm.config import ModelConfig
from paralm.errors import EXIT_USER, RunError, UserError
from paralm.evaluation.suite import Target, run_suite
from paralm.export import TOKENIZER
from paralm.interop import load_transformers, save_transformers
from paralm.interop.conversion import export_transformers, import_transformers
from paralm.models import LanguageModel, build_model
from tests.paralm.test_export import write_run

MAMBA2: dict[str, Any] = {
    "mixer": {"name": "mamba2", "n_groups": 2, "head_dim": 16, "d_state": 8},
    "mlp": {"enabled": False},
}


@pytest.fixture(scope="module")
def run(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint three ranks wrote."""
    path = tmp_path_factory.mktemp("conversion") / "run"
    write_run(corpus, prepared, path, world_size=3, model=MAMBA2)
    return path


@pytest.fixture(scope="module")
def converted(run: Path) -> Path:
    """It as transformers has it."""
    return export_transformers(run, run.parent / "transformers", max_shard_size=20_000).path


def same(one: LanguageModel, other: LanguageModel) -> None:
    found = dict(other.named_parameters())
    assert list(found) == [name for name, _ in one.named_parameters()]
    for name, parameter in one.named_parameters():
        assert torch.equal(found[name], parameter), name


def test_there_and_back(run: Path, converted: Path, prepared: Path, tmp_path: Path) -> None:
    original = paralm.load(run)
    same(original.model, load_transformers(converted))
    content = json.loads((converted / "config.json").read_text())
    tokenizer = original.tokenizer
    assert (content["bos_token_id"], content["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert content["vocab_size"] == tokenizer.vocab_size
    told: list[str] = []
    done = import_transformers(converted, tmp_path / "back", max_shard_size=20_000, warn=told.append)
    assert told == []
    assert len(done.shards) > 2
    back = paralm.load(tmp_path / "back")
    same(original.model, back.model)
    assert back.tokenizer.sha256 == tokenizer.sha256
    assert (back.step, back.tokens) == (0, 0)
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(back.model(tokens).logits, original.model(tokens).logits)


def test_the_commands(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert cli.run(["export", str(run), "--to", str(there), "--format", "transformers"]) == 0
    assert "exported: step 7" in capsys.readouterr().out
    assert sorted(p.name for p in there.iterdir()) == ["config.json", "model.safetensors", TOKENIZER]
    assert cli.run(["import", str(there), "--to", str(back)]) == 0
    assert "imported: " in capsys.readouterr().out
    texts = []
    for source in (run, back):
        assert cli.run(["generate", str(source), "--prompt", "the ", "--max-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    for arguments in (
        ["export", str(run), "--to", str(tmp_path / "x"), "--format", "gguf"],
        ["export", str(run), "--to", str(there), "--format", "transformers"],
        ["export", f"{run}@8", "--to", str(tmp_path / "x"), "--format", "transformers"],
        ["import", str(there), "--to", str(back)],
        ["import", str(there), "--to", str(there)],
        ["import", str(run), "--to", str(tmp_path / "x")],
        ["import", str(there), "--to", str(tmp_path / "x"), "--dtype", "fp8"],
        ["import", str(there), "--to", str(tmp_path / "x"), "--tokenizer", str(there / "config.json")],
    ):
        assert cli.run(arguments) == EXIT_USER, arguments
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "x").exists()
    assert cli.run(["export", str(run), "--to", str(there), "--format", "transformers", "--force"]) == 0


def test_nobody_says_at_what_length_an_imported_model_was_trained(
    run: Path, converted: Path, prepared: Path, tmp_path: Path
) -> None:
    assert paralm.load(run).train_seq_len == paralm.load(run).config.training.seq_len
    imported = import_transformers(converted, tmp_path / "imported").path
    assert Target.open(imported).train_seq_len is None
    (found,) = run_suite("perplexity", imported, ["max_tokens=500"], data_dir=prepared).results
    assert found.train_seq_len is None
    with pytest.raises(UserError, match="give train_seq_len=TOKENS"):
        run_suite("collapse", imported, data_dir=prepared)


def test_without_a_tokenizer_only_token_ids(
    converted: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, out = tmp_path / "bare", tmp_path / "out"
    shutil.copytree(converted, bare)
    (bare / TOKENIZER).unlink()
    assert cli.run(["import", str(bare), "--to", str(out)]) == 0
    captured = capsys.readouterr()
    told = [line for line in (captured.out + captured.err).splitlines() if "warning" in line]
    assert len(told) == 1
    assert str(bare) in told[0]
    assert "--tokenizer" in told[0]
    loaded = paralm.load(out)
    assert loaded.model(torch.arange(6).view(1, 6)).logits.shape == (1, 6, 320)
    with pytest.raises(RunError, match="without a tokenizer"):
        _ = loaded.tokenizer
    assert cli.run(["generate", str(out), "--prompt", "the "]) == EXIT_USER
    assert "without a tokenizer" in capsys.readouterr().err
    (bare / TOKENIZER).write_bytes(b"of another kind")
    notes: list[str] = []
    import_transformers(bare, out, force=True, warn=notes.append)
    assert len(notes) == 1
    assert "not a sentencepiece model" in notes[0]
    import_transformers(bare, out, tokenizer=prepared / TOKENIZER, force=True, warn=notes.append)
    assert len(notes) == 1
    assert paralm.load(out).tokenizer.sha256 == Tokenizer.load(prepared / TOKENIZER).sha256


def test_bfloat16_stays_and_a_tokenizer_must_fit(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(ModelConfig(d_model=32, n_layers=1, **MAMBA2), 100, seed=0).bfloat16()
    save_transformers(model, tmp_path / "saved")
    import_transformers(tmp_path / "saved", tmp_path / "out")
    back = paralm.load(tmp_path / "out")
    assert back.model.embedding.weight.dtype == torch.bfloat16
    same(model, back.model)
    import_transformers(tmp_path / "saved", tmp_path / "out", dtype="fp32", force=True)
    assert torch.equal(paralm.load(tmp_path / "out").model.norm.weight, model.norm.weight.float())
    shutil.copy(prepared / TOKENIZER, tmp_path / "saved" / TOKENIZER)
    assert cli.run(["import", str(tmp_path / "saved"), "--to", str(tmp_path / "x")]) == EXIT_USER
    err = capsys.readouterr().err
    assert "320 pieces" in err
    assert "100 tokens" in err


def test_an_architecture_transformers_does_not_have(
    corpus: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(corpus, prepared, tmp_path / "run", 1)
    assert cli.run(["export", str(tmp_path / "run"), "--to", str(tmp_path / "x"), "--format", "transformers"]) == 2
    assert "paragru" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
