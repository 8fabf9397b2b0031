"""The laws of streaming evaluation, over every registered mixer: chunked = whole, and memory that stays flat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from paralm.evaluation.scoring import score
from paralm.registry import MIXERS
from tests.paralm.small_models import small_model

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (61, 2, 40, 3, 33, 90)


@dataclass(frozen=True)
class Documents:
    """What scoring needs of a store: tokens one document after another, and where each lies."""

    tokens: np.ndarray
    ends: Sequence[int]

    def bounds(self, document: int) -> tuple[int, int]:
        return (self.ends[document - 1] if document else 0), self.ends[document]


DOCUMENTS = Documents(
    np.random.Generator(np.random.PCG64(0)).integers(0, 40, sum(LENGTHS), dtype=np.uint16),
    np.cumsum(LENGTHS).tolist(),
)


@pytest.mark.parametrize("reset_every", [None, 13])
@pytest.mark.parametrize("name", MIXERS.names())
def test_chunked_is_whole_whatever_rows_and_chunk(name: str, reset_every: int | None) -> None:
    """Against the logits of whole documents (or windows), one at a time, by mixers that keep no state between."""
    model = small_model(name, 40, scale=1.7)
    expected = []
    for document in range(len(LENGTHS)):
        ids = torch.from_numpy(DOCUMENTS.tokens[slice(*DOCUMENTS.bounds(document))].astype(np.int64))
        step, losses = reset_every or len(ids), []
        with torch.no_grad():
            for start in range(0, len(ids) - 1, step):
                part = ids[start : start + step + 1]
                log_p = model(part[None, :-1]).logits[0].log_softmax(-1)
                losses.append(-log_p.gather(1, part[1:, None])[:, 0])
        expected.append(torch.cat(losses).numpy())
    for rows, chunk in ((1, 1000), (1, 7), (3, 16), (6, 5)):
        found = score(model, DOCUMENTS, range(len(LENGTHS)), rows=rows, chunk=chunk, reset_every=reset_every)  # type: ignore[arg-type]
        # float64 sums of up to 90 losses of about 4 nats; the solvers stop at 1e-10 of a state
        np.testing.assert_allclose(found.loss, [e.sum() for e in expected], rtol=0, atol=1e-7)
        assert found.tokens.tolist() == [len(e) for e in expected]
        for bucket in range(7):
            inside = [e[(1 << bucket) - 1 : (2 << bucket) - 1].sum() for e in expected]
            assert found.bucket_loss[bucket] == pytest.approx(sum(inside), abs=1e-7)
            np.testing.assert_allclose(found.document_bucket_loss[:, bucket], inside, rtol=0, atol=1e-7)


# A million tokens of every mixer take half an hour of a core: benchmarks/evaluate.py does that, and its result is
# committed. Here the fastest do a million, the others as many as take less than half a minute on a quiet core.
MILLION = ("mlstm", "mamba2")
SLOW = ("slstm", "slstm_diagonal", "titans_mac", "lstm", "gru")
BOUNDED = [name for name, entry in MIXERS.entries().items() if entry.value.bounded_state]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        (1_000_000, MILLION),
        (100_000, tuple(name for name in BOUNDED if name not in (*MILLION, *SLOW))),
        (40_000, SLOW),
    ],
    ids=["1M", "100k", "40k"],
)
def test_memory_is_flat_over_a_long_stream(tokens: int, names: tuple[str, ...], tmp_path: Path) -> None:
    """Peak RSS at the end less that after 10,000 tokens, each in a process of its own, below 4 MB for a million
    tokens; of shorter streams below as much less as a steady growth would be, but for 1.5 MB of noise. What lies above
    is measured once more: growth would be there again."""
    rows = flat(names, tokens, tmp_path)
    assert [row["mixer"] for row in rows] == sorted(names)
    limit = max(4e6 * tokens / 1e6, 1.5e6)
    above = tuple(str(row["mixer"]) for row in rows if "error" not in row and row["peak_growth"] >= limit)
    if above:
        rows = [row for row in rows if row["mixer"] not in above] + flat(above, tokens, tmp_path)
    for row in rows:
        assert "error" not in row, row
        assert row["tokens"] == tokens
        assert row["flat"], row
        assert row["peak_growth"] < limit, row


@pytest.mark.slow
def test_a_state_that_grows_is_seen_by_that_test(tmp_path: Path) -> None:
    (row,) = flat(("attention",), 20_000, tmp_path)
    assert row["peak_growth"] > 4e6


def flat(names: Sequence[str], tokens: int, folder: Path) -> list[dict[str, object]]:
    """Rows of the benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / "evaluate.py"), "--only=flat", f"--tokens={tokens}"]
    command += [f"--mixers={','.join(names)}", f"--out={folder / 'flat.json'}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (folder / "flat.json").exists(), done.stderr
    rows: list[dict[str, object]] = json.loads((folder / "flat.json").read_text())["flat"]["rows"]
    return rows


def test_every_bounded_mixer_has_its_million_on_record() -> None:
    """benchmarks/results/evaluate.json, of the whole stream for each."""
    path = ROOT / "benchmarks" / "results" / "evaluate.json"
    rows = {row["mixer"]: row for row in json.loads(path.read_text())["flat"]["rows"]}
    missing = [name for name in BOUNDED if name not in rows]
    assert not missing
    for name in BOUNDED:
        assert rows[name]["tokens"] == 1_000_000
        assert rows[name]["peak_growth"] < 4e6, rows[name]
