"""What the later readings of a shard share: the texts of the records that were kept, which must be what they were."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paralm_data.duplicates import fates_of
from paralm_data.errors import DataError
from paralm_data.readers import Record
from paralm_data.scanning import ROW
from paralm_data.scratch import BLOCK, map_array
from paralm_data.sources import Shard
from paralm_data.split import digest
from paralm_data.steps import StepsSpec


@dataclass(frozen=True)
class _Others:
    """Of each record, in order, whether its fate is none of those ``wanted``; without a list of all of them."""

    fates: NDArray[np.uint8]
    wanted: Collection[int]

    def __len__(self) -> int:
        return len(self.fates)

    def __iter__(self) -> Iterator[bool]:
        for at in range(0, len(self.fates), BLOCK):
            yield from np.isin(self.fates[at : at + BLOCK], list(self.wanted), invert=True).tolist()


@dataclass(frozen=True)
class Reading:
    """The base of tasks that read a shard again. ``scan``: the marker of its first reading; ``choice``: of its records'
    fates; ``size``: UTF-8 bytes of the (normalised) text that is asked for, as the first reading counted them;
    ``folder``: of the stage.
    """

    shard: Shard
    steps: StepsSpec
    scan: Path
    choice: Path
    size: int
    folder: Path

    @property
    def label(self) -> str:
        return self.shard.label

    @property
    def marker(self) -> Path:
        return self.folder / self.choice.name

    @property
    def weight(self) -> float:
        return float(self.size)

    def texts(self, wanted: Collection[int]) -> Iterator[tuple[int, str, int]]:
        """(fate, text, its UTF-8 bytes) of each record whose fate is in ``wanted``, in order.

        DataError, at the latest after the last one, for a shard that is not what it was when the fates were decided: of
        another number of records or bytes, with other text, or with a record that cannot be read any more.
        """
        fates = fates_of(self.choice)
        positions = map_array(self.scan.with_suffix(".rows"), ROW, len(fates))["position"]
        other: Record | None = None  # the first whose text is another
        count = size = 0
        for record in self.shard.records(self.steps.max_document_bytes, _Others(fates, wanted)):
            count += 1
            if fates[count - 1] not in wanted:
                continue
            if record.problem is not None:
                raise self._changed(record.problem, self.shard.place(record))
            text = self.steps.normalized(record.text)
            n_bytes = len(text.encode("utf-8"))
            size += n_bytes
            if other is None and int.from_bytes(digest(text)[:8], "big") != int(positions[count - 1]):
                other = record
            yield int(fates[count - 1]), text, n_bytes
        if count != len(fates):
            raise self._changed(f"it has {count:,} records, and had {len(fates):,}")
        if size != self.size:
            raise self._changed(f"the text that is kept has {size:,} bytes, and had {self.size:,}")
        if other is not None:
            raise self._changed("its text is another", self.shard.place(other))

    def _changed(self, how: str, place: str = "") -> DataError:
        return DataError(f"{place or self.label}: changed while it was prepared: {how}; {self.shard.again}")
