"""What a long job says of itself: counts, rates, and the time it still takes."""

from __future__ import annotations

import pytest
from paralm_data import Progress
from paralm_data.progress import Meter


def test_rates_count_what_is_done_now_and_the_time_left_what_was_done_before() -> None:
    progress = Progress("tokenizing", 30, 6_000_000, 900, seconds=3.0, fraction=0.7, before=0.4)
    assert (progress.documents_per_s, progress.mb_per_s, progress.tokens_per_s) == (10, 2, 300)
    assert progress.eta == pytest.approx(3.0)  # 0.3 in three seconds, 0.3 to go
    assert Progress("x", 0, 0, 0, 1.0, fraction=0.4, before=0.4).eta is None
    assert Progress("x", 0, 0, 0, 1.0).eta is None


def test_a_meter_ends_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meter, "EVERY", 0.0)
    said: list[Progress] = []
    meter = Meter("stage", said.append, work=10.0, before=4.0)
    meter.add(1, 2, 3, work=2.0)
    meter.add(1, 2, 3)
    meter.done()
    assert [step.fraction for step in said] == [0.4, pytest.approx(0.6), pytest.approx(0.6), 1.0]
    assert {step.before for step in said} == {0.4}
    assert (said[-1].documents, said[-1].bytes, said[-1].tokens, said[-1].done) == (2, 4, 6, True)
    Meter("unknown size", said.append).done()
    assert said[-1].fraction is None
