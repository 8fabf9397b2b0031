"""Intervals for proportions: Wilson's score interval (Wilson 1927), right at 0 and 1 and for few samples.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)         p = hits/n, z = Φ⁻¹(0.975)

All of 5 right is an accuracy above 57 %, of 20 above 84 %, of 50 above 93 %, of 200 above 98 %, with 95 % confidence.
"""

from __future__ import annotations

import math
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion of which ``hits`` of ``n`` were seen. ValueError unless 0 ≤ hits ≤ n, n ≥ 1."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} of {n} is no proportion")
    p, z2 = hits / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    return 0.0 if hits == 0 else low, 1.0 if hits == n else high
