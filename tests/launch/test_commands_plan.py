"""``paralm plan`` as it is typed: a preset by its bare name, a run's configuration, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from paralm_launch import cli


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def rows(text: str) -> dict[str, str]:
    """The tables' lines: first cell → the rest."""
    split = (line.split("  ", 1) for line in text.splitlines() if "  " in line)
    return {key.strip(): rest.strip() for key, rest in split}


def test_a_preset_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """7B, eight GPUs: all there is to know before a node is booked, and what to change."""
    code, out, err = call(capsys, "paragru_7b", "--price", "2")
    assert (code, err) == (0, "")
    assert "6,945,738,752" in out
    assert "8 × H100 SXM 80 GB: ZeRO 1, bf16, micro-batch 1 × 2,048 tokens, 32 a step" in out
    assert "does not fit: " in out
    assert re.search(r"fits with: training\.activation_checkpointing=\d+  \(7\d\.\d\d GiB, ", out)
    assert "or with: parallel.zero_stage=2" in out
    found = rows(out)
    for key in ("weights", "gradients", "optimizer", "activations", "loss head", "MFU", "cost", "checkpoint", "step"):
        assert key in found, key
    assert found["MFU"].endswith("% of the peak in bf16")
    assert found["communication a step"].startswith("allreduce 27.8 GB, allgather_base 13.9 GB")
    assert "139G tokens (20 a parameter)" in found
    assert "assumed: products at 80% of 989 TFLOP/s" in out
    sizes = [found[kind] for kind in ("weights", "gradients", "optimizer", "activations", "loss head")]
    assert sum(float(size.removesuffix(" GiB")) for size in sizes) == pytest.approx(
        float(found["all"].removesuffix(" GiB")), abs=0.1
    )


def test_values_laid_over_a_preset_count(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "model/paragru_10m", "training.seq_len=512", "training.micro_batch_size=4", "--gpus=16")
    assert code == 0
    assert "micro-batch 4 × 512 tokens, 4 a step" in out
    assert "\nfits: " in out
    assert "16 × H100" in out


def test_a_run_s_configuration_is_planned_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paralm.planning import parts

    monkeypatch.delattr(parts, "build_model")  # the planner's model is the only one that is built
    path = tmp_path / "run.yaml"
    training = {"max_steps": 7, "seq_len": 32, "global_batch_size": 4, "micro_batch_size": 4}
    path.write_text(yaml.safe_dump({"model": {"d_model": 32, "n_layers": 2}, "training": training}))
    code, out, _ = call(capsys, str(path), "--gpus", "1", "--device", "a100")
    assert code == 0
    assert "1 × A100 SXM 80 GB: ZeRO 1, fp32, micro-batch 4 × 32 tokens, 1 a step" in out
    assert f"{7 * 4 * 32} tokens (training.max_steps)" in rows(out)


def test_a_search_names_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["training.seq_len=512", "training.global_batch_size=16"]
    code, out, _ = call(capsys, "model/paragru_10m", "--search", "--gpus", "2", *shape)
    assert code == 0
    assert re.search(r"^2 × H100 SXM 80 GB: \d+ tried, \d+ fit with 10% left$", out, re.MULTILINE)
    best = re.search(r"best \(equal within 5%: the lowest stage\): (.*)  \((.*) s a step\)", out)
    assert best is not None
    assert best.group(1).startswith("parallel.zero_stage=0 parallel.time=")
    code, again, _ = call(capsys, "model/paragru_10m", "--gpus", "2", *shape, *best.group(1).split())
    assert rows(again)["step"].startswith(f"{best.group(2)} s: ")


def test_a_run_s_own_cluster_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert "64 × H100" in call(capsys, "7b/transformer_64")[1]
    assert "8 × H100" in call(capsys, "7b/transformer_64", "--gpus", "8")[1]


def test_slower_fused_kernels_take_longer(capsys: pytest.CaptureFixture[str]) -> None:
    as_copies, slower = (
        float(rows(call(capsys, "paragru_400m", *more)[1])["step"].split(" s")[0]) for more in ([], ["--kernels=0.3"])
    )
    assert slower > 1.02 * as_copies


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model/paragru_7c"], "nearest: model/paragru_7b"),
        (["paragru_10m", "--device", "b300"], "it must be one of: h100, h200, a100, mi300x"),
        (["paragru_10m", "--gpus", "12"], "--gpus: 12 is no number of whole nodes of 8"),
        (["paragru_10m", "parallel.time=3"], "parallel.time: 3 time shards do not divide 8 ranks"),
        (["transformer_10m", "parallel.time=2"], "its state grows with the sequence"),
        (["paragru_10m", "--efficiency", "1.5"], "--efficiency: 1.5 is not above 0 and at most 1"),
        (["paragru_10m", "--kernels", "0"], "--kernels: 0.0 is not above 0 and at most 1"),
        (["paragru_10m", "--tokens", "-1"], "--tokens: -1 is not above 0"),
        (["paragru_10m", "--price", "-1"], "--price: -1 is below 0"),
        (["paragru_10m", "--tokens", "inf"], "--tokens: inf is not above 0 and finite"),
        (["paragru_10m", "--price", "inf"], "--price: inf is below 0 or not finite"),
        (
            [
                "paragru_10m",
                "parallel.zero_stage=2",
                "parallel.deepspeed={zero_optimization: {reduce_bucket_size: auto}}",
            ],
            "parallel.deepspeed.zero_optimization.reduce_bucket_size: 'auto' is no number",
        ),
        *(
            (
                ["paragru_10m", "parallel.zero_stage=3", f"parallel.deepspeed={{zero_optimization: {{{key}: auto}}}}"],
                f"parallel.deepspeed.zero_optimization.{key}: 'auto' is no number",
            )
            for key in ("stage3_max_reuse_distance", "stage3_param_persistence_threshold", "stage3_max_live_parameters")
        ),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *arguments)
    assert code != 0
    assert says in err
    assert len(err.strip().splitlines()) == 1
