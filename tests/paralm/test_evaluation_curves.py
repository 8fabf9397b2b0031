"""Curves and comparisons from metrics alone; Markdown that no text can break out of."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paralm.errors import RunError
from paralm.evaluation import figures
from paralm.evaluation import markdown as md
from paralm.evaluation.compare import compare
from paralm.evaluation.curves import loss_figure, newton_figure, read_curves, smooth, thin, write_curves


def make_run(path: Path, steps: int = 30, **changes: Any) -> Path:
    """A run folder with metrics and nothing else: loss 6/√step, half a second a step, a validation every 10."""
    path.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {
            "kind": "train", "step": step, "tokens": 100 * step, "loss": 6 / math.sqrt(step), "grad_norm": 1.0 / step,
            "lr": 1e-3, "tokens_per_s": 200.0, "time_data": 0.01, "time_forward_backward": 0.4, "time_step": 0.09,
            "mfu": None, "skipped": False,
            "newton": {"layer_00/newton_iterations": 4, "layer_00/newton_last_update": 1e-7,
                       "layer_01/newton_iterations": 5},
        }  # fmt: skip
        rows.append(row | changes)
        if step % 10 == 0:
            rows.append({
                "kind": "validation", "step": step, "set": "held_out", "loss": 7 / math.sqrt(step), "tokens": 50,
                "bits_per_byte": 3.5 / math.sqrt(step),
            })  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_metrics_become_arrays(tmp_path: Path) -> None:
    curves = read_curves(make_run(tmp_path / "a"))
    assert curves.step.tolist() == list(range(1, 31))
    assert curves.seconds[-1] == pytest.approx(15.0)  # 3000 tokens at 200 a second
    assert list(curves.newton) == ["layer_00/newton_iterations", "layer_01/newton_iterations"]
    held_out = curves.validation["held_out"]
    assert held_out.tokens.tolist() == [1000, 2000, 3000]
    assert held_out.seconds.tolist() == pytest.approx([5, 10, 15])
    assert curves.bytes_factor == pytest.approx(0.5)
    assert np.isnan(curves.mfu).all()


def test_time_adds_up_over_rows_that_were_not_logged(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [json.dumps(r) for r in lines if r["kind"] == "train" and r["step"] % 5 == 0]
    (path / "metrics.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    curves = read_curves(path)
    assert len(curves.step) == 6
    assert curves.seconds[-1] == pytest.approx(15.0)
    assert curves.bytes_factor is None


@pytest.mark.parametrize("source", ["runs/x@20", "runs/x"])
def test_time_of_a_forked_run_is_its_own(tmp_path: Path, source: str) -> None:
    path = make_run(tmp_path / "a")
    training = f"fork_from: {source}, log_every: 5, global_batch_size: 5, seq_len: 20"
    (path / "config.yaml").write_text(f"training: {{{training}}}\n", encoding="utf-8")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [r for r in lines if r["kind"] == "train" and r["step"] % 5 == 0 and r["step"] > 20]
    kept = [json.dumps(r | {"tokens": r["tokens"] + 4000}) for r in own]  # steps before the fork had more rows
    (path / "metrics.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    curves = read_curves(path)
    assert curves.tokens[-1] == 7000
    assert curves.seconds.tolist() == pytest.approx([2.5, 5.0])


def test_numbers_that_are_not_finite_are_drawn_around(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[4] |= {"loss": "nan", "grad_norm": "inf", "skipped": True}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    curves = read_curves(path)
    assert math.isnan(curves.loss[4])
    assert math.isinf(curves.grad_norm[4])
    files = write_curves(path, curves, {"gzip -9": 1.7})
    assert sorted(files) == ["loss", "newton", "optimization", "throughput"]
    assert all(f.parent == path and f.read_bytes().startswith(b"\x89PNG") for f in files.values())
    assert not list(path.glob(".*"))  # no temporary file stays


def test_names_of_close_levels_do_not_lie_on_one_another(tmp_path: Path) -> None:
    figure = loss_figure(read_curves(make_run(tmp_path / "a")), {"gzip -9": 1.70, "xz -9e": 1.69})
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 2
    assert not boxes[0].overlaps(boxes[1])


def test_there_is_no_newton_figure_where_nothing_was_solved(tmp_path: Path) -> None:
    assert newton_figure(read_curves(make_run(tmp_path / "a", newton={}))) is None
    assert newton_figure(read_curves(make_run(tmp_path / "b", newton={"layer_00/newton_iterations": 0}))) is None


@pytest.mark.parametrize("window", [1, 3, 9, 101])
def test_smoothing_is_a_centred_mean_that_looks_back_at_the_end(window: int) -> None:
    line = np.linspace(3.0, -2.0, 40)
    inside = len(line) - window // 2
    np.testing.assert_allclose(smooth(line, window)[: max(0, inside)], line[: max(0, inside)], atol=1e-12)
    assert smooth(line, window)[-1] == pytest.approx(line[-1 - min(window // 2, 39) :].mean())
    values = np.random.default_rng(0).normal(size=40)
    values[7] = math.nan
    found, reach = smooth(values, window), window // 2
    if reach:
        part = values[20 - min(reach, 20) : 20 + min(reach, 20) + 1]
        assert found[20] == pytest.approx(float(np.nanmean(part)))
        assert np.isfinite(found).all()


def test_thinning_keeps_short_curves_and_bounds_long_ones() -> None:
    x = np.arange(100.0)
    assert thin(x, x)[0] is x
    long = np.arange(1_000_003.0)
    few, same = thin(long, 2 * long)
    assert 1000 <= len(few) <= 2000
    np.testing.assert_allclose(same, 2 * few)


# -- comparison ----------------------------------------------------------------------------------------------


def test_runs_are_compared_by_name_in_the_order_given(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "b"), make_run(tmp_path / "a", steps=20, tokens_per_s=50.0)]
    found = compare(runs, tmp_path / "out" / "both.png")
    assert [row.run for row in found.rows] == ["b", "a"]
    assert found.figure.read_bytes().startswith(b"\x89PNG")
    assert found.rows[0].validation_bits_per_byte == pytest.approx(3.5 / math.sqrt(30))
    assert found.rows[1].seconds == pytest.approx(40.0)
    assert found.rows[0].bits_per_byte is None
    assert found.notes == ["Not evaluated yet: b, a (paralm eval RUN)."]
    lines = found.markdown().splitlines()
    assert lines[2].startswith("| b |")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]}) == 1
    json.dumps(found.as_dict())


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / part / "run") for part in ("x", "y")]
    found = compare(runs, tmp_path / "c.png")
    assert [Path(row.run).parent.name for row in found.rows] == ["x", "y"]


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good")
    empty, fresh, damaged = tmp_path / "empty", tmp_path / "fresh", make_run(tmp_path / "damaged")
    empty.mkdir()
    fresh.mkdir()
    (fresh / "metrics.jsonl").write_text("", encoding="utf-8")
    text = (damaged / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    (damaged / "metrics.jsonl").write_text("\n".join([*text[:6], "x", *text[7:]]), encoding="utf-8")
    cases = {
        (good,): "1 run to compare; give at least two",
        (good, good): "given twice",
        (good, tmp_path / "nowhere"): "nowhere: no such run folder",
        (good, empty): r"empty/metrics\.jsonl: no such file",
        (good, fresh): r"fresh/metrics\.jsonl: no training step in it yet",
        (good, damaged): r"damaged/metrics\.jsonl:7: ",
    }
    for runs, message in cases.items():
        with pytest.raises(RunError, match=message) as caught:
            compare(runs, tmp_path / "c.png")
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=r"ends in \.png"):
        compare([good, damaged], tmp_path / "c.txt")
    assert not (tmp_path / "c.png").exists()


# -- text ----------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("`~ab \n\r\t\x1b#|-"), max_size=60))
def test_no_text_ends_its_fence_early(text: str) -> None:
    lines = md.fence(text).split("\n")
    ticks = re.match("`+", lines[0])[0]  # type: ignore[index]
    closing = [n for n, line in enumerate(lines[1:], 1) if re.fullmatch(rf" {{0,3}}`{{{len(ticks)},}}\s*", line)]
    assert closing == [len(lines) - 1]
    assert "\x1b" not in "".join(lines)


@given(st.text(st.sampled_from("`ab \n\t"), min_size=1, max_size=20))
def test_a_code_span_is_one_line_and_closed_by_its_own_ticks(text: str) -> None:
    span = md.code(text)
    assert "\n" not in span
    runs = re.findall("`+", span)
    assert runs[0] == runs[-1]
    assert all(len(run) != len(runs[0]) for run in runs[1:-1])


def test_numbers_for_people() -> None:
    assert [figures.short(x) for x in (950, 12_500, 3_300_000, 7.29e9)] == ["950", "12.5k", "3.3M", "7.29B"]
    assert [md.duration(s) for s in (1.234, 42, 252, 12_000, 200_000)] == [
        "1.2 s", "42 s", "4 min 12 s", "3 h 20 min", "2 d 7 h",
    ]  # fmt: skip
    assert md.table(["a|b", "c"], [["1", "2"]], right=[1]) == "| a\\|b | c |\n| :--- | ---: |\n| 1 | 2 |"
