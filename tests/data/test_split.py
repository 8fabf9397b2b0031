"""Where a document goes depends on its text alone."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paralm_data import Document
from paralm_data.split import Distinct, digest, is_held_out, position

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure


@relaxed
@given(st.lists(st.text(max_size=5)), st.randoms(use_true_random=False), st.floats(0.01, 0.5))
def test_the_split_does_not_depend_on_order_or_company(texts: list[str], random: object, fraction: float) -> None:
    def held_out(of: list[str]) -> set[str]:
        return {d.text for key, d in Distinct()(Document(t, "") for t in of) if is_held_out(key, fraction)}

    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert held_out(texts) == held_out(shuffled)
    assert held_out(texts) == {t for text in texts for t in held_out([text])}


def test_a_digest_is_the_same_for_ever() -> None:
    # Another digest would move documents between the splits of existing corpora.
    assert digest("def f():\n    return 1\n").hex() == "769f3e10b2658f579b86424aa74d7ae3"


def test_the_fraction_is_kept() -> None:
    # 4000 documents at 0.1: 400 expected, standard deviation 19; six are allowed.
    count = sum(is_held_out(digest(f"document {i}"), 0.1) for i in range(4000))
    assert abs(count - 400) < 114


def test_a_larger_fraction_holds_out_a_superset() -> None:
    keys = [digest(str(i)) for i in range(300)]
    for key in keys:
        assert is_held_out(key, 0.5) or not is_held_out(key, 0.1)
        assert 0 <= position(key) < 1


def test_duplicates_and_empty_documents_are_dropped_and_counted() -> None:
    distinct = Distinct()
    kept = [d.origin for _, d in distinct(Document(t, o) for t, o in [("a", "1"), ("", "2"), ("b", "3"), ("a", "4")])]
    assert kept == ["1", "3"]
    counts = distinct.counts
    assert (counts.read, counts.empty, counts.duplicates, counts.kept) == (4, 1, 1, 2)
    assert counts.least_position == min(position(digest("a")), position(digest("b")))
