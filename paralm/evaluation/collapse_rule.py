"""The rule that says whether a model collapses past its training length, from where on, and which heads; no picture.

State collapse (arXiv 2410.07145): past the training length T the loss rises, because the state takes values that
training never visited. Given are S ≥ 4 streams of tokens, read with carried state, and buckets of positions with edges
T·2^{j/2}: bucket b holds the positions eᵦ < p ≤ eᵦ₊₁ (the prediction at position p has read p tokens). With x_{s,b} the
mean of stream s in bucket b, in nats a token:

    ρ        the bucket with the least mean over streams, of those in (T/8, T]
    d_{s,b} = x_{s,b} − x_{s,ρ}         m_b = mean_s d_{s,b}          SE_b = sd_s(d_{s,b}) / √S
    b is raised where                   m_b > max(δ, z·SE_b)
    onset    the first bucket past T from which on every bucket is raised, two of them (an octave) at least

The onset is stated as the bucket's first position. Its interval: streams are drawn with replacement 1000 times, the
whole rule is applied to each draw, and the middle 95 % of the onsets found is the interval, a draw without onset
counting as infinity. The verdict:

    collapse     the streams have an onset, and so do 97.5 % of the draws (the interval is finite)
    unclear      the streams have an onset and fewer draws have
    none         there is no onset: no lasting rise above ``resolution``, max(δ, z·SE) at its largest in the last octave

δ = 0.05 nats, z = 3. x is either the loss itself or what the same tokens lose by being read with the carried state
instead of afresh (:mod:`paralm.evaluation.collapse`), which is the sharper of the two: what the text at a position is
like cancels in it.

A head *leaves its range* by a statistic r_{s,c} ≥ 0 of its state (its norm or its most extreme channel, stream s after
as many tokens as checkpoint c says, the edges) where the median over streams is, from some checkpoint past T on and to
the end, two checkpoints at least, above f times the largest or below 1/f of the least value that any stream had at a
checkpoint in (T/8, T]; f = 2. Its onset and interval are found in the same way.

These constants and this text were fixed before any run of ours was judged by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from paralm.errors import UserError
from paralm.evaluation.bootstrap import LEVEL, RESAMPLES, Interval

Floats = NDArray[np.float64]

DELTA = 0.05
"""δ: nats a token that count as a rise."""
Z = 3.0
"""z: standard errors that a rise must stand out by."""
FACTOR = 2.0
"""f: by how much a head's statistic must leave its range."""
LAST = 2
"""Buckets or checkpoints that must be raised, the last one among them."""
PER_OCTAVE = 2
LEAST_STREAMS = 4


class Verdict(BaseModel):
    """What the rule says of one curve. Positions in tokens, rises in nats a token."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    verdict: Literal["collapse", "unclear", "none"]
    onset: float | None  # first position of the bucket; None: there is none
    onset_interval: Interval | None  # 95 %; an end is infinite where draws have no onset; None with onset
    share: float  # of the draws that have an onset
    reference: int  # ρ
    rise: list[float]  # m_b, one a bucket
    rise_se: list[float]  # SE_b
    resolution: float  # a lasting rise below this would not have been seen

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if self.onset is None:
            return f"no collapse: no lasting rise above {self.resolution:.3f} nats"
        low, high = self.onset_interval or (self.onset, self.onset)
        to = f"{high:,.0f}" if math.isfinite(high) else "past the end"
        head = "collapse" if self.verdict == "collapse" else f"unclear ({self.share:.0%} of the draws)"
        return (
            f"{head} from position {self.onset:,.0f} (95 %: {low:,.0f} to {to}), {self.rise[-1]:+.3f} nats at the end"
        )


class Departure(BaseModel):
    """A head whose state leaves the range that it had within the training length."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    layer: int
    leaf: str  # of the layer's state
    head: int
    statistic: str
    onset: float  # tokens
    onset_interval: Interval
    ratio: float  # the median at the last checkpoint over the end of the range that it has left; below 1: it fell


def bucket_edges(train_seq_len: int, length: int) -> list[int]:
    """0 = e₀ < e₁ < … = ``length``, otherwise at T·2^{j/2}, rounded: a last bucket of less than half its width is
    part of the one before. UserError, one line, if the rule needs a longer ``length``."""
    edges = {round(train_seq_len * 2 ** (j / PER_OCTAVE)) for j in range(-PER_OCTAVE * 60, PER_OCTAVE * 60)}
    below = sorted(edge for edge in edges if 1 <= edge < length)
    if below and length / below[-1] < 2 ** (0.5 / PER_OCTAVE):
        below.pop()
    if len([edge for edge in below if edge >= train_seq_len]) < LAST:
        raise UserError(
            f"length is {length}, and the model was trained on {train_seq_len} tokens at a time: "
            f"the rule needs at least {2 * train_seq_len}"
        )
    return [0, *below, length]


def judge(curves: Floats, edges: list[int], train_seq_len: int, seed: int = 0) -> Verdict:
    """The rule's verdict on ``curves``, (streams, buckets) of finite means, ``edges`` of :func:`bucket_edges`.

    Pure: the same arguments give the same verdict. UserError, one line, for fewer than four streams or for means
    that are not finite.
    """
    streams, buckets = curves.shape
    if streams < LEAST_STREAMS:
        raise UserError(f"streams is {streams}; the rule needs at least {LEAST_STREAMS}")
    if buckets != len(edges) - 1:
        raise ValueError(f"{buckets} buckets and {len(edges)} edges")
    bad = np.argwhere(~np.isfinite(curves))
    if len(bad):
        raise UserError(f"stream {bad[0][0]}: the loss is not finite at position {edges[bad[0][1]] + 1} or later")
    ends = np.asarray(edges[1:])
    inside = np.flatnonzero((ends <= train_seq_len) & (8 * ends > train_seq_len))
    past = int(np.searchsorted(ends, train_seq_len, side="right"))

    def onset(drawn: Floats) -> int | None:
        rise, error, _ = _rises(drawn, inside)
        return _lasting(rise > np.maximum(DELTA, Z * error), past)

    rise, error, reference = _rises(curves, inside)
    found = onset(curves)
    starts = [edge + 1 for edge in edges[:-1]]
    positions, share = _drawn_onsets(curves, onset, starts, seed)
    limits = np.maximum(DELTA, Z * error)
    verdict: Literal["collapse", "unclear", "none"] = "none"
    if found is not None:
        verdict = "collapse" if share >= 1 - (1 - LEVEL) / 2 else "unclear"
    return Verdict(
        verdict=verdict,
        onset=None if found is None else float(starts[found]),
        onset_interval=None if found is None else _middle(positions),
        share=share,
        reference=reference,
        rise=rise.tolist(),
        rise_se=error.tolist(),
        resolution=float(limits[-LAST:].max()),
    )


def departure(
    values: Floats, checkpoints: list[int], train_seq_len: int, *, seed: int = 0, **names: Any
) -> Departure | None:
    """Whether a statistic, (streams, checkpoints), at least 0, leaves its range; None if it does not.

    ``checkpoints``: tokens read; ``names``: layer, leaf, head, statistic.
    """
    at = np.asarray(checkpoints)
    inside = values[:, (at <= train_seq_len) & (8 * at > train_seq_len)]
    low, high = float(inside.min()), float(inside.max())
    past = int(np.searchsorted(at, train_seq_len, side="right"))

    def onset(drawn: Floats) -> int | None:
        middle = np.median(drawn, axis=0)
        above, below = _lasting(middle > FACTOR * high, past), _lasting(middle < low / FACTOR, past)
        return above if above is not None else below

    found = onset(values)
    if found is None:
        return None
    positions, _ = _drawn_onsets(values, onset, checkpoints, seed)
    last = float(np.median(values[:, -1]))
    by = (last / high if high else math.inf) if last > high else last / low
    where = float(checkpoints[found])
    return Departure(onset=where, onset_interval=_middle(positions), ratio=by, **names)


def _rises(curves: Floats, inside: NDArray[np.int64]) -> tuple[Floats, Floats, int]:
    """m_b, SE_b and ρ."""
    reference = int(inside[curves[:, inside].mean(axis=0).argmin()])
    differences = curves - curves[:, [reference]]
    return differences.mean(axis=0), differences.std(axis=0, ddof=1) / math.sqrt(len(curves)), reference


def _lasting(raised: NDArray[np.bool_], past: int) -> int | None:
    """The first place from ``past`` on after which everything is raised; None for fewer than LAST such places."""
    lowered = np.flatnonzero(~raised[past:])
    first = past + (int(lowered[-1]) + 1 if len(lowered) else 0)
    return first if len(raised) - first >= LAST else None


def _drawn_onsets(
    values: Floats, onset: Callable[[Floats], int | None], positions: list[int], seed: int
) -> tuple[Floats, float]:
    """Onset positions of the draws of streams, infinite where there is none, and the share of those that have one."""
    draws = np.random.Generator(np.random.PCG64(seed)).integers(0, len(values), (RESAMPLES, len(values)))
    found = [onset(values[rows]) for rows in draws]
    at = np.array([math.inf if f is None else float(positions[f]) for f in found])
    return at, float(np.isfinite(at).mean())


def _middle(positions: Floats) -> Interval:
    """The middle 95 %: of values that were found, none between them, since some may be infinite."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(positions, [tail, 100 - tail], method="closest_observation")
    return float(low), float(high)
