"""Intervals for ratios of sums over documents, by the bootstrap (Efron 1979): documents are drawn with replacement.

    Σ loss_d / Σ weight_d over D draws of d, many times; the interval holds the middle 95 % of the results

Documents and not tokens are drawn, since the tokens of one document are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
RESAMPLES = 1000
LEVEL = 0.95
_AT_ONCE = 1 << 20  # draws held in memory; the numbers do not depend on it


def ratio_intervals(
    numerator: NDArray[np.float64], denominators: Sequence[NDArray[Any]], seed: int = 0
) -> list[Interval | None]:
    """A 95 % interval of Σ numerator / Σ denominator for each denominator, all from the same draws.

    ``numerator``, ``denominators``: one entry a document. None where there are fewer than two documents, or where a
    draw's denominators can sum to 0. The same arguments give the same intervals on every machine.
    """
    count = len(numerator)
    if count < 2:
        return [None] * len(denominators)
    columns = np.stack([numerator, *(np.asarray(d, dtype=np.float64) for d in denominators)], axis=1)
    draws = np.random.Generator(np.random.PCG64(seed))
    sums = np.empty((RESAMPLES, columns.shape[1]))
    block = max(1, _AT_ONCE // count)
    for start in range(0, RESAMPLES, block):
        drawn = draws.integers(0, count, (min(block, RESAMPLES - start), count))
        for column in range(columns.shape[1]):
            sums[start : start + block, column] = columns[:, column][drawn].sum(axis=1)
    tail = 100 * (1 - LEVEL) / 2
    found: list[Interval | None] = []
    for column in range(1, columns.shape[1]):
        below = sums[:, column]
        if (below <= 0).any():
            found.append(None)
            continue
        low, high = np.percentile(sums[:, 0] / below, [tail, 100 - tail])
        found.append((float(low), float(high)))
    return found


def ratio_interval_by_moments(moments: Sequence[float] | NDArray[np.float64]) -> Interval | None:
    """A 95 % interval of r = Σ loss / Σ weight over documents from sums alone, which add up over parts.

    The ratio estimator's linearised variance (Cochran, Sampling Techniques, 3rd ed., section 2.11), with
    documents drawn with replacement:

        var r ≈ count/(count − 1) · Σ (loss_d − r weight_d)² / (Σ weight_d)²

    ``moments``: Σ loss, Σ weight, Σ loss², Σ loss·weight, Σ weight², count. None for fewer than two documents. Losses
    are at least 0, and so is the interval.
    """
    loss, weight, loss2, loss_weight, weight2, count = (float(moment) for moment in moments)
    if count < 2 or weight <= 0:
        return None
    ratio = loss / weight
    spread = max(0.0, loss2 - 2 * ratio * loss_weight + ratio * ratio * weight2)  # a sum of squares, up to rounding
    error = 1.959964 * math.sqrt(count / (count - 1) * spread) / weight
    return max(0.0, ratio - error), ratio + error
