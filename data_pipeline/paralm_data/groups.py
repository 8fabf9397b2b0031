"""Finite groups of permutations, as multiplication tables."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from paralm_data.errors import DataError

GROUPS = {"S3": (3, False), "S4": (4, False), "A5": (5, True), "S5": (5, False)}
"""Name → (how many things are permuted, whether only by even permutations)."""


@dataclass(frozen=True, eq=False)
class Group:
    """``elements``: int64 (order, degree), every permutation as the images of 0 … degree − 1, in lexicographic order,
    so that element 0 is the identity. ``table``: int64 (order, order): ``table[a, b]`` is first a, then b."""

    name: str
    elements: NDArray[np.int64]
    table: NDArray[np.int64]

    @property
    def order(self) -> int:
        """How many elements there are."""
        return len(self.elements)

    def running_product(self, word: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, time) elements → (n, time): x_1, x_1·x_2, x_1·x_2·x_3, … with ``a·b`` first a, then b."""
        products = np.empty_like(word)
        so_far = np.zeros(len(word), dtype=np.int64)
        for time in range(word.shape[1]):
            so_far = self.table[so_far, word[:, time]]
            products[:, time] = so_far
        return products


def parity(permutation: tuple[int, ...]) -> int:
    """0 for an even permutation, 1 for an odd one: its number of inversions modulo 2."""
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2


@cache
def get_group(name: str) -> Group:
    """A group by name; DataError naming all of them otherwise."""
    if name not in GROUPS:
        raise DataError(f"no group '{name}'; it must be one of: {', '.join(GROUPS)}")
    degree, even = GROUPS[name]
    found = [p for p in itertools.permutations(range(degree)) if not (even and parity(p))]
    elements = np.array(found, dtype=np.int64)
    place = {p: i for i, p in enumerate(found)}
    table = np.array([[place[tuple(b[i] for i in a)] for b in found] for a in found], dtype=np.int64)
    return Group(name, elements, table)
