"""Batches out of a token store: a pure function of (seed, step), whatever the world size.

A step's global batch is ``global_batch_size`` rows; rank r of W takes rows [G·r//W, G·(r+1)//W), so the ranks' rows
laid end to end are the batch that a single rank would see, and a run can go on with another number of ranks. Ranks
may also share rows, each with a ``part`` of their steps: of a store it reads no more than these and the last one's
label. The only state is the number of the next step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paralm_data.errors import DataError
from paralm_data.manifest import Manifest
from paralm_data.orders import ORDERS, Rows, Spans
from paralm_data.store import TokenStore

IGNORE = -100  # the label of a position that has none: torch's cross-entropy leaves it out


@dataclass(frozen=True, eq=False)
class Batch:
    """This rank's rows of a global batch, or its ``part`` of their steps (all seq_len of them by default).

    ``rows``: (n,) int64, their numbers in the global batch. ``tokens``: (n, steps) int64. ``labels``: (n, steps)
    int64, the next token, -100 where that belongs to another document or the position is padding. ``reset``: (n,
    steps) bool, true where a document starts. ``continues``: (n,) bool, the row goes on where the same row of the
    previous step ended; where false a carried state is dropped. ``epoch``: epochs done before this step. ``sources``:
    (n,) int64, the source of each row in a mixture, None without one.
    """

    step: int
    rows: NDArray[np.int64]
    tokens: torch.Tensor
    labels: torch.Tensor
    reset: torch.Tensor
    continues: torch.Tensor
    epoch: float
    sources: NDArray[np.int64] | None = None


def labelled(
    raw: Rows, manifest: Manifest, step: int, numbers: NDArray[np.int64], sources: NDArray[np.int64] | None = None
) -> Batch:
    """Rows (n, steps + 1) of a store's ids as a batch: with labels, resets, and padding masked."""
    tokens, following = raw.tokens[:, :-1], raw.tokens[:, 1:]
    labels = following.astype(np.int64)
    # Sparse: a search for the few places, then a write to them, is several times faster than a masked write.
    labels.reshape(-1)[np.flatnonzero(tokens == manifest.eos_id)] = IGNORE
    reset = tokens == manifest.bos_id
    tokens = tokens.astype(np.int64)
    for index in np.flatnonzero(raw.valid < tokens.shape[1]):
        padding = slice(int(raw.valid[index]), None)
        tokens[index, padding], labels[index, padding], reset[index, padding] = manifest.eos_id, IGNORE, False
    return Batch(
        step=step,
        rows=numbers,
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        reset=torch.from_numpy(reset),
        continues=torch.from_numpy(raw.continues),
        epoch=raw.epoch,
        sources=sources,
    )


class StepLoader(ABC):
    """What every loader is: a pure function of the step, the rows of a rank, and the number of the next step.

    :meth:`batch` is random access; ``next(loader)`` is ``batch(loader.step)`` and advances ``step``. ``part``: which
    steps of its rows this rank holds, a slice of range(seq_len). Raises DataError for an argument out of range.
    """

    def __init__(
        self, seq_len: int, global_batch_size: int, seed: int, rank: int, world_size: int, part: slice | None = None
    ) -> None:
        for name, value in (("seq_len", seq_len), ("global_batch_size", global_batch_size), ("world_size", world_size)):
            if value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of {world_size}: ranks count from 0")
        self.part = part or slice(0, seq_len)
        if self.part.step not in (None, 1) or not 0 <= self.part.start < self.part.stop <= seq_len:
            raise DataError(f"part is {self.part}; it must be consecutive steps of range({seq_len})")
        self.seq_len, self.global_batch_size = seq_len, global_batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.step = 0
        self._rows = range(global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size)

    @property
    def _numbers(self) -> NDArray[np.int64]:
        """(n,): the numbers of this rank's rows."""
        return np.arange(self._rows.start, self._rows.stop, dtype=np.int64)

    def start_at(self, step: int) -> None:
        """Begin with ``step``, as a run that takes over nothing of the data before it."""
        self.step = step

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of ``step`` (from 0)."""

    def spans(self, step: int) -> list[tuple[TokenStore, Spans]]:
        """Where the batch of ``step`` lies in stores; nothing where that is not known, or it is computed."""
        return []

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What is read, and how; JSON-able, equal on every rank."""

    def _check_step(self, step: int) -> None:
        if step < 0:
            raise DataError(f"step {step}: steps count from 0")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The next step, and what must be the same for it to mean the same; JSON-able, equal on every rank."""
        return {
            "step": self.step,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "global_batch_size": self.global_batch_size,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was, on any world size. DataError, with both values, if it read otherwise."""
        for key, mine in self.state_dict().items():
            if key not in state:
                raise DataError(f"the loader's saved state has no '{key}'")
            if key != "step" and state[key] != mine:
                raise DataError(
                    f"the loader's saved state has {key} {state[key]!r}, this one {mine!r}; "
                    "a run goes on only with the same data, order and sizes"
                )
        if type(state["step"]) is not int or state["step"] < 0:
            raise DataError(f"the loader's saved state has step {state['step']!r}, which is no step")
        self.step = state["step"]


class Loader(StepLoader):
    """Reads ``store`` in rows of ``seq_len`` tokens, in an ``order``: ``windows`` or ``lanes``.

    Raises DataError for a store without a window, or an argument out of range.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        global_batch_size: int,
        seed: int = 0,
        order: str = "windows",
        rank: int = 0,
        world_size: int = 1,
        part: slice | None = None,
    ) -> None:
        if order not in ORDERS:
            raise DataError(f"data.order is '{order}'; it must be one of: {', '.join(ORDERS)}")
        super().__init__(seq_len, global_batch_size, seed, rank, world_size, part)
        self.store, self.order = store, order
        self._order = ORDERS[order](store, seq_len, global_batch_size, seed, self.part)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every window (lanes: every token) is read once; with windows not a whole number."""
        return self._order.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of ``step`` (from 0)."""
        self._check_step(step)
        return labelled(self._order.rows(step, self._rows), self.store.manifest, step, self._numbers)

    def spans(self, step: int) -> list[tuple[TokenStore, Spans]]:
        return [(self.store, self._order.spans(step, self._rows))]

    def _identity(self) -> dict[str, Any]:
        return {"order": self.order, "store": self.store.manifest.fingerprint}
