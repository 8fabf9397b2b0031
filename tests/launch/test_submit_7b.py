"""The SLURM scripts of the 7B runs: rendered from their configurations, with the nodes, GPUs and ranks they are for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from paralm_launch import cli

MODELS = ("paragru", "paralstm", "mamba2", "xlstm", "titans_mag", "transformer")


@pytest.mark.parametrize("gpus", [8, 64, 256])
@pytest.mark.parametrize("model", MODELS)
def test_each_run_has_its_scripts(
    model: str, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PARALM_SITE", raising=False)
    code = cli.run(["submit", "slurm", f"7b/{model}_{gpus}", "--dry-run", "--pipeline"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert not list(tmp_path.iterdir())
    parts = re.split(r"^# ==== (.*)\n", out, flags=re.MULTILINE)[1:]
    scripts = {Path(path).stem.split("-", 1)[1]: text for path, text in zip(parts[::2], parts[1::2], strict=True)}
    assert list(scripts) == ["prepare", "train", "evaluate-report"]
    for name, text in scripts.items():
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0, name
    train = scripts["train"]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", train, re.MULTILINE))
    ranks = re.search(r"^ranks_per_node=(\d+)$", train, re.MULTILINE)
    assert ranks is not None
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == gpus
    assert int(options["nodes"]) * int(ranks.group(1)) == gpus
    assert options["ntasks-per-node"] == "1"
    assert int(options["cpus-per-task"]) == 8 * int(ranks.group(1))
    assert options["time"] == "24:00:00"
    assert options["job-name"] == f"paralm-7b-{model.replace('_', '-')}-{gpus}-train"
    assert "#SBATCH --requeue" in train
    assert "set -- " in train
