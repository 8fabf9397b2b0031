"""Affine maps x ↦ A x + b over per-channel states, their composition, and the one scan over them.

Every time recurrence that is linear goes through here: Newton's inner solve, the adjoint, the public linear scans. A
state is the constant map (A = 0), so "run the maps from an initial state" and "compose the maps" are the same scan.

Layout: `offset` is (S, …); `matrix` is (S, …) for a diagonal, (S, S, …) row by row for a full matrix, None for A = 0.
In a sequence of maps the last two dimensions are (time, channel).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError

TIME = -2
_WALK_WIDTH = 512
"""Numbers in one time step from which a plain loop over time beats odd–even reduction on a CPU."""


@dataclass(frozen=True)
class AffineMap:
    """x ↦ matrix · x + offset, independently for every batch row, time and channel.

    offset: (S, …). matrix: (S, …) diagonal, (S, S, …) full, or None for the constant map x ↦ offset.
    """

    matrix: Tensor | None
    offset: Tensor

    @property
    def full(self) -> bool:
        """True where the matrix has off-diagonal entries."""
        return self.matrix is not None and self.matrix.ndim == self.offset.ndim + 1

    @property
    def length(self) -> int:
        """The number of maps in time."""
        return self.offset.shape[TIME]

    def __call__(self, x: Tensor) -> Tensor:
        """The map applied to states x: (S, …)."""
        if self.matrix is None:
            return self.offset
        return torch.addcmul(self.offset, self.matrix, x) if not self.full else self.offset + _apply(self.matrix, x)

    def after(self, first: AffineMap) -> AffineMap:
        """The composition x ↦ self(first(x)); both diagonal or both full."""
        if self.matrix is None or first.matrix is None:
            return AffineMap(None, self(first.offset))
        if self.full != first.full:
            raise ArgumentError("cannot compose a diagonal affine map with a full one; make both the same kind")
        if self.full:
            matrix = (self.matrix.unsqueeze(2) * first.matrix.unsqueeze(0)).sum(1)
        else:
            matrix = self.matrix * first.matrix
        return AffineMap(matrix, self(first.offset))

    def at(self, index: int | slice) -> AffineMap:
        """The maps at these positions in time."""
        key = (..., index, slice(None))
        return AffineMap(None if self.matrix is None else self.matrix[key], self.offset[key])

    def reversed(self) -> AffineMap:
        """The same maps, last first."""
        return AffineMap(None if self.matrix is None else self.matrix.flip(TIME), self.offset.flip(TIME))


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix * x).sum(1)


def scan(maps: AffineMap, before: AffineMap | None = None) -> AffineMap:
    """All prefixes: result t is maps[t] ∘ … ∘ maps[0] ∘ before, by odd–even reduction (O(T) work, O(log T) depth).

    maps: length T ≥ 1 in time. before: one map without a time dimension; the constant map of a state makes every
    result constant, and its offset is the trajectory from that state.
    """
    if before is not None:
        first = maps.at(slice(0, 1)).after(AffineMap(_stretch(before.matrix), before.offset.unsqueeze(TIME)))
        maps, constant = _with_first(maps, first), first.matrix is None
    else:
        constant = maps.matrix is None
    return _prefixes(maps, constant)


def whole(maps: AffineMap) -> AffineMap:
    """maps[0] ∘ maps[1] ∘ … ∘ maps[T − 1], one map without a time dimension, by halves. maps: T ≥ 1 in time."""
    while maps.length > 1:
        outer, inner = maps.at(slice(0, None, 2)), maps.at(slice(1, None, 2))
        pairs = outer.at(slice(0, inner.length)).after(inner)
        if outer.length > inner.length:
            rest = outer.at(slice(inner.length, None))
            matrix = None
            if pairs.matrix is not None and rest.matrix is not None:
                matrix = torch.cat((pairs.matrix, rest.matrix), TIME)
            pairs = AffineMap(matrix, torch.cat((pairs.offset, rest.offset), TIME))
        maps = pairs
    return maps.at(0)


def _stretch(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.unsqueeze(TIME)


def _with_first(maps: AffineMap, first: AffineMap) -> AffineMap:
    rest = maps.at(slice(1, None))
    matrix = maps.matrix
    if rest.matrix is not None and first.matrix is not None:
        matrix = torch.cat((first.matrix, rest.matrix), TIME)
    return AffineMap(matrix, torch.cat((first.offset, rest.offset), TIME))


def _prefixes(maps: AffineMap, constant: bool) -> AffineMap:
    """Inclusive prefixes; `constant` says that maps[0] is a constant map whatever its matrix holds."""
    length = maps.length
    if length == 1:
        return AffineMap(None, maps.offset) if constant else maps
    even, odd = maps.at(slice(0, None, 2)), maps.at(slice(1, None, 2))
    pairs = _prefixes(odd.after(even.at(slice(0, odd.length))), constant)
    offset = torch.empty_like(maps.offset)
    offset[..., 0, :] = maps.offset[..., 0, :]
    offset[..., 1::2, :] = pairs.offset
    later = even.at(slice(1, None)).after(pairs.at(slice(0, even.length - 1)))
    offset[..., 2::2, :] = later.offset
    if pairs.matrix is None or maps.matrix is None or later.matrix is None:
        return AffineMap(None, offset)
    matrix = torch.empty_like(maps.matrix)
    matrix[..., 0, :] = maps.matrix[..., 0, :]
    matrix[..., 1::2, :] = pairs.matrix
    matrix[..., 2::2, :] = later.matrix
    return AffineMap(matrix, offset)


class Recurrence:
    """x_t = A_t x_{t−1} + b_t, run in place: b becomes x. Slices of time are taken once, so running again is cheap.

    maps: T in time, with a matrix; `reverse` runs from the last to the first, x_t = A_t x_{t+1} + b_t. The values may
    change between runs, the tensors may not.
    """

    def __init__(self, maps: AffineMap, reverse: bool = False) -> None:
        if maps.matrix is None:
            raise ArgumentError("a recurrence of constant maps has nothing to run; its states are the offsets")
        self.maps, self.reverse = maps, reverse
        width = maps.offset.numel() // max(maps.length, 1)
        self._walks = maps.offset.device.type == "cpu" and (width >= _WALK_WIDTH or maps.length <= 4)
        if not self._walks:
            return
        order = slice(None, None, -1 if reverse else 1)
        self._targets = maps.offset.unbind(TIME)[order]
        if maps.full:
            parts = [component.unbind(TIME)[order] for component in maps.offset]
            columns = [column.unbind(TIME)[order] for column in maps.matrix.unbind(1)]
            self._sources, self._factors = list(zip(*parts, strict=True)), list(zip(*columns, strict=True))
        else:
            self._sources = [(target,) for target in self._targets]
            self._factors = [(factor,) for factor in maps.matrix.unbind(TIME)[order]]

    def run(self, initial: Tensor | None = None) -> Tensor:
        """The states from x_{−1} = initial, (S, …, channel), zero if None; returns `maps.offset`, overwritten."""
        if not self._walks:
            return self._reduce(initial)
        previous = None
        if initial is not None:
            previous = initial.unbind(0) if self.maps.full else (initial,)
        for target, factors, source in zip(self._targets, self._factors, self._sources, strict=True):
            if previous is not None:
                for factor, x in zip(factors, previous, strict=True):
                    target.addcmul_(factor, x)
            previous = source
        return self.maps.offset

    def _reduce(self, initial: Tensor | None) -> Tensor:
        if initial is None:
            initial = torch.zeros_like(self.maps.offset[..., 0, :])
        ordered = self.maps.reversed() if self.reverse else self.maps
        states = scan(ordered, AffineMap(None, initial)).offset
        return self.maps.offset.copy_(states.flip(TIME) if self.reverse else states)


def trajectory(maps: AffineMap, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    """The states x_t = maps[t](x_{t−1}) from x_{−1} = initial, zero if None; `reverse` runs from the last to the first.

    maps: T in time; initial: (S, …, channel) without time; returns a new (S, …, T, channel). Not differentiable; see
    scan.py.
    """
    return Recurrence(AffineMap(maps.matrix, maps.offset.clone()), reverse).run(initial)
