"""Export: the model that was trained, whatever wrote its checkpoint, in little memory; damage and misuse refused."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from paralm_data import Tokenizer
from paralm_launch import cli
from safetensors.torch import load_file

import paralm
from paralm import weight_files
from paralm.config import Config
from paralm.errors import EXIT_USER, CheckpointError, ConfigError, RunError
from paralm.export import CONFIG, TOKENIZER, export
from paralm.models import LanguageModel, build_model
from paralm.training import checkpoint as ckpt
from paralm.training import tensor_file
from paralm.training.load import load_model, saved_config
from paralm.training.tensor_file import TensorSpec
from paralm.user_modules import load_modules
from paralm.weight_files import INDEX, parse_size, plan_shards
from tests.conftest import settings


def write_run(
    corpus: Path, data_dir: Path, run: Path, world_size: int, step: int = 7, **sections: Any
) -> LanguageModel:
    """A run's folder with a checkpoint of an untrained model, in fragments that cross parameters; the model."""
    config = Config.model_validate(settings(corpus, data_dir, run.parent, **sections))
    config.run.name = run.name
    tokenizer = Tokenizer.load(data_dir / "tokenizer.model")
    model = build_model(config.model, tokenizer.vocab_size, seed=3)
    parameters = dict(model.named_parameters())
    folder = ckpt.writing_folder(run / "checkpoints", step, 1, 1)
    total = sum(p.numel() for p in parameters.values())
    files = []
    for rank in range(world_size):
        begin, low, high = 0, total * rank // world_size, total * (rank + 1) // world_size
        fragments = []
        for name, parameter in parameters.items():
            start, stop = max(begin, low) - begin, min(begin + parameter.numel(), high) - begin
            if start < stop:
                fragments.append(("master", name, start, parameter.detach().view(-1)[start:stop]))
            begin += parameter.numel()
        files.append(ckpt.write_rank_file(folder, rank, fragments, {}))
    meta = {
        "step": step,
        "tokens": 1000 * step,
        "parameters": {name: {"shape": list(p.shape)} for name, p in parameters.items()},
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
    }
    ckpt.write_manifest(folder, files, meta)
    ckpt.install(folder, run / "checkpoints", step)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return model


@pytest.fixture(scope="module")
def run(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint three ranks wrote."""
    path = tmp_path_factory.mktemp("export") / "run"
    write_run(corpus, prepared, path, world_size=3)
    return path


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """An export of it in several shards."""
    return export(run, run.parent / "exported", max_shard_size=20_000).path


@pytest.mark.parametrize(("world_size", "tied"), [(1, True), (5, False)])
def test_the_exported_model_is_the_model(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, tied: bool
) -> None:
    monkeypatch.setattr(weight_files, "PIECE", 100)  # far smaller than the tensors, as for a large model
    monkeypatch.setattr(tensor_file, "PIECE", 1000)
    model = write_run(corpus, prepared, tmp_path / "run", world_size, model={"tie_embeddings": tied})
    done = export(tmp_path / "run", tmp_path / "out", max_shard_size=20_000)
    assert len(done.shards) > 3
    loaded = paralm.load(done.path)
    assert not loaded.model.training
    assert (loaded.step, loaded.tokens) == (7, 7000)
    assert loaded.tokenizer.sha256 == Tokenizer.load(prepared / "tokenizer.model").sha256
    found = dict(loaded.model.named_parameters())
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(loaded.model(tokens).logits, load_model(tmp_path / "run").model(tokens).logits)


def test_other_programs_read_it(run: Path, exported: Path) -> None:
    index = json.loads((exported / INDEX).read_text())
    whole: dict[str, torch.Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        shard = load_file(exported / name)
        assert dict.fromkeys(shard, name) == {k: v for k, v in index["weight_map"].items() if v == name}
        assert not set(shard) & set(whole)  # every tensor once
        whole |= shard
    model = load_model(run).model
    assert set(whole) == {name for name, _ in model.named_parameters()}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    content = json.loads((exported / CONFIG).read_text())
    assert content["vocab_size"] == 320
    assert content["model"]["d_model"] == 32
    assert str(run.parent) not in json.dumps(content)  # nothing of the machine it was made on


def test_bf16_rounds_each_weight_once(run: Path, tmp_path: Path) -> None:
    done = export(f"{run}@7", tmp_path / "out", dtype="bf16")
    weights = load_file(tmp_path / "out" / done.shards[0])
    for name, parameter in load_model(run).model.named_parameters():
        assert torch.equal(weights[name], parameter.to(torch.bfloat16)), name
    assert paralm.load(done.path, dtype=torch.bfloat16).model.head_weight.dtype == torch.bfloat16


def test_shards_keep_to_their_size() -> None:
    specs = [TensorSpec(str(i), torch.float32, (n,)) for i, n in enumerate([10, 5, 5, 40, 1, 19, 1])]
    planned = [[spec.nbytes // 4 for spec in shard] for shard in plan_shards(specs, 80)]
    assert planned == [[10, 5, 5], [40], [1, 19], [1]]
    assert [parse_size(text) for text in ("5GB", "2 KiB", "17", "1.5mb", "9B")] == [5 * 10**9, 2048, 17, 1_500_000, 9]
    for text in ("", "GB", "0", "-1GB", "5 parsecs"):
        with pytest.raises(ConfigError, match="shard size"):
            parse_size(text)


def test_every_damage_to_an_export_is_one_line(exported: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    for path in sorted(exported.iterdir()):
        damaged = tmp_path / path.name / "model"
        whole = path.read_bytes()
        for trial in range(4):
            shutil.copytree(exported, damaged)
            at = rng.randrange(len(whole))
            content = whole[:at] if trial % 2 else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            (damaged / path.name).write_bytes(content)
            with pytest.raises(CheckpointError) as caught:
                paralm.load(damaged)
            assert path.name in str(caught.value)
            assert "\n" not in str(caught.value)
            shutil.rmtree(damaged)
    assert {p.name for p in exported.iterdir()} >= {CONFIG, INDEX, TOKENIZER}


def test_what_is_there_is_not_overwritten(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--force"):
        export(run, exported)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"format": "of another program"}')
    (foreign / INDEX).write_text("{}")
    for force in (False, True):
        with pytest.raises(RunError, match="not an export of paralm"):
            export(run, foreign, force=force)
    assert len(list(foreign.iterdir())) == 2
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / CONFIG).write_bytes((copy / CONFIG).read_bytes()[:-9])  # a damaged one may be replaced
    export(run, copy, force=True)
    assert paralm.load(copy).step == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "mine"]


def test_a_failed_export_leaves_nothing_and_the_old_one(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)

    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "flush", full)
    for target, force in ((copy, True), (tmp_path / "new", False)):
        with pytest.raises(RunError, match="No space left"):
            export(run, target, force=force)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert paralm.load(copy).step == 7


def test_the_commands_take_an_export(
    run: Path, exported: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["export", str(run), "--to", str(tmp_path / "out"), "--max-shard-size", "50KB"]) == 0
    assert "exported: step 7" in capsys.readouterr().out
    texts = []
    for source in (run, tmp_path / "out"):
        assert cli.run(["generate", str(source), "--prompt", "the ", "--max-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    small = ["eval.max_tokens=300", "eval.sample_tokens=4", "eval.prompts=[the]"]
    assert cli.run(["eval", str(tmp_path / "out"), f"data.dir={prepared}", *small]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert paralm.load(tmp_path / "out").step == 7  # what was measured lies beside it and harms nothing
    for arguments in (
        ["export", str(run / "nothing"), "--to", str(tmp_path / "x")],
        ["export", f"{run}@8", "--to", str(tmp_path / "x")],
        ["export", str(run), "--to", str(tmp_path / "out")],
        ["export", str(run), "--to", str(tmp_path / "x"), "--dtype", "fp8"],
        ["generate", f"{exported}@8"],
        ["eval", str(exported)],
        ["eval", str(exported), "model.d_model=8"],
        ["export", str(exported), "--to", str(tmp_path / "x")],
    ):
        assert cli.run(arguments) == EXIT_USER, arguments
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


_OWN = """
import paralm_kernels

@paralm_kernels.register
class CarriedOfExportTest(paralm_kernels.Cell):
    name, state, inputs, params = "carried_of_export_test", ("h",), ("x",), ("a",)

    def step(self, state, inputs, params):
        return (0.9 * inputs[0] + params[0] * state[0].sin() * 0.5,)
"""


def forget_files() -> None:
    """As in another process: no module of ``imports:`` is loaded."""
    for name in [name for name in sys.modules if name.startswith(("paralm_user_", "helpers_of_export_test"))]:
        del sys.modules[name]


def test_a_model_of_a_users_cell_is_loaded_where_its_file_is_not(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = tmp_path / "a/own.py", tmp_path / "b/own.py"
    first.write_text(_OWN)
    helper = tmp_path / "b/helpers_of_export_test/own.py"  # a package without __init__.py
    second.write_text("from helpers_of_export_test.own import ran")
    helper.parent.mkdir()
    helper.write_text("ran = 1")
    load_modules([str(first)])
    imports = [str(first), str(second), "json"]
    model = write_run(corpus, prepared, tmp_path / "run", 1, model={"mixer": {"name": "carried_of_export_test"}})
    saved = tmp_path / "run/config.yaml"
    saved.write_text(saved.read_text().replace("imports: []", f"imports: {json.dumps(imports)}"))
    said: list[str] = []
    out = export(tmp_path / "run", tmp_path / "out", warn=said.append).path
    assert said == ["imports: json is not in the export, being no .py file; install it where the export is loaded"]
    tokens = torch.arange(24).view(2, 12)
    assert paralm.load(out).config.imports == imports  # all there as they were

    first.unlink()
    helper.write_text("raise SystemExit('not what was exported')")
    moved = out.rename(tmp_path / "moved")
    forget_files()
    loaded = paralm.load(moved)
    assert loaded.config.imports == [str(moved / "own.py"), str(moved / "own_2.py"), "json"]
    assert torch.equal(loaded.model(tokens).logits, model.eval()(tokens).logits)
    again = shutil.copytree(moved, tmp_path / "again")
    assert paralm.load(again).config.imports == loaded.config.imports  # loaded already: not registered twice

    forget_files()
    for name in ("helpers_of_export_test/own.py", "own_2.py"):
        (moved / name).write_text("raise SystemExit('nor this')")
        with pytest.raises(CheckpointError, match=rf"damaged export: .*{name}"):
            saved_config(moved)


TOOLS = Path(__file__).resolve().parents[2] / "tools"
# The kernel's high-water mark, set back to what is resident: a process starts with that of the one that spawned it.
_MEASURED = """
import sys
import paralm.export, paralm.training.load
from paralm.models import build_model
from paralm.training.run_folder import RunFolder

sys.path.insert(0, sys.argv[3])
from memory import forget_peak, held

build_model(RunFolder(paralm.export.Path(sys.argv[1])).saved_config().model, 320, seed=0, device="meta")
forget_peak()
before = held("VmRSS")
done = paralm.export.export(sys.argv[1], sys.argv[2], max_shard_size=50_000_000)
print(held("VmHWM") - before, len(done.shards), done.nbytes)
"""


def test_memory_stays_far_below_a_checkpoint(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    """Above what the imports take, less than twice the largest shard, though the checkpoint is many times that."""
    run = tmp_path / "run"
    mixer = {"name": "paragru", "n_heads": 2}
    write_run(corpus, prepared, run, 4, model={"d_model": 1024, "n_layers": 4, "mixer": mixer})
    command = [sys.executable, "-c", _MEASURED, str(run), str(tmp_path / "out"), str(TOOLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    above, shards, nbytes = map(int, done.stdout.split())
    largest = max(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    print(f"{above / 1e6:.0f} MB above the imports; {nbytes / 1e6:.0f} MB in {shards} shards of ≤ {largest / 1e6:.0f}")
    assert shards >= 4
    assert nbytes > 3 * largest  # who held everything would exceed the bound
    assert above < 2 * largest
