"""A random permutation of 0 … n−1 that is never written down: any element in constant time and memory.

A Feistel network over the smallest power of two that holds n, cut into two halves whose sizes may differ by one bit
(Luby and Rackoff 1988): each round replaces (L, R) by (R, L ⊕ F_i(R)), which is invertible whatever F_i is. An index
that lands outside 0 … n−1 goes through again until it is inside (cycle walking, Black and Rogaway 2002, section 4);
that walks along a cycle of a bijection, so it is one too, and takes two passes on average at most. The round keys come
from BLAKE2b of the key given, so the order is the same on every machine and with every numpy.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # MurmurHash3's finaliser
_HALF = np.uint64(33)


class Permutation:
    """The permutation of ``range(n)`` that ``key`` chooses; call it with indices (int64 array) to get their images."""

    def __init__(self, n: int, *key: int | str) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} elements; there must be at least 1")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._bits = (bits - bits // 2, bits // 2)  # of the left and of the right half
        text = "\0".join(map(str, key)).encode("utf-8")
        self._keys = [
            np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=bytes([i])).digest(), "little"))
            for i in range(ROUNDS)
        ]

    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of ``index``, same shape; every index must be in 0 … n−1."""
        index = np.asarray(index, dtype=np.int64)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.n:
            raise IndexError(f"an index outside 0 … {self.n - 1}")
        values = self._pass(index.astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = again = self._pass(values[outside])
            outside = outside[again >= self.n]
        return values.astype(np.int64).reshape(index.shape)

    def _pass(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_bits, right_bits = self._bits
        left = values >> np.uint64(right_bits)
        right = values & np.uint64((1 << right_bits) - 1)
        for key in self._keys:
            # (L, R) with sizes (a, b) becomes (R, L ⊕ F(R)) with sizes (b, a); after an even number it is (a, b) again
            mixed = (right ^ key) * _MIX_1
            mixed ^= mixed >> _HALF
            mixed *= _MIX_2
            mixed >>= np.uint64(64 - left_bits)
            mixed ^= left
            left, right = right, mixed
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


def random_permutation(n: int, seed: int, epoch: int, purpose: str = "") -> Permutation:
    """The order of an epoch: a permutation of ``range(n)`` that is a function of the arguments alone."""
    return Permutation(n, purpose, seed, epoch)
