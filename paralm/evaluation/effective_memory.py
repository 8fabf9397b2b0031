"""``paralm eval memory``: how many of the last tokens decide what a model predicts.

Of a document x₀ … x_{T−1} (x₀ is BOS), the next token's distribution is compared with that of the same model when it
has read the last k tokens only, from a fresh state, so without the first t = T − k tokens:

    TV(k) = ½ Σ_v |p(v | x₀ … x_{T−1}) − p(v | x_{T−k} … x_{T−1})|        (total variation, between 0 and 1)

This is effective remembrance (Buitrago and Gu, arXiv 2507.02782), whose EffRem_T(t) is TV(T − t): near 0, the first t
tokens do not count. The **effective memory** is the smallest k on a logarithmic grid from which on the mean of TV over
documents stays at most ``threshold``, at every larger k of the grid. Its interval, and TV's, are of 95 % by bootstrap
over documents. A model that ignores its past has an effective memory of 1; one that needs more than the grid has, none.
A state that collapses shows too: then TV does not fall with k, since what was read long ago disturbs.

Read in chunks with carried state: memory does not depend on T where the state is bounded. Each document costs about
T + Σ k ≈ T · (1 + 1/(2^(1/per_octave) − 1)) tokens where T is a power of 2: 3.41 T by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from paralm_data import TokenStore, random_permutation
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from paralm.errors import UserError
from paralm.evaluation import markdown as md
from paralm.evaluation.bootstrap import LEVEL, RESAMPLES, Interval
from paralm.evaluation.result import Result
from paralm.evaluation.suite import Evaluation, EvaluationSettings, Target, register_evaluation
from paralm.models import LanguageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_LENGTHS = 4  # training lengths, where enough documents are so long


class MemorySettings(EvaluationSettings):
    """Of ``paralm eval memory``."""

    set: str = Field(default="held_out", description="held_out, train, or a validation set")
    length: PositiveInt | None = Field(
        default=None,
        description=f"tokens of a document (T); default: {DEFAULT_LENGTHS} training lengths, or less where too few "
        "documents are so long",
    )
    documents: PositiveInt = Field(default=64, ge=2, description="documents; the first T tokens of each")
    per_octave: PositiveInt = Field(default=2, description="values of k for each doubling")
    threshold: float = Field(default=0.05, gt=0, lt=1, description="of the total variation")
    rows: PositiveInt = Field(default=16, description="documents side by side, one piece of work")
    chunk: PositiveInt = Field(default=512, description="tokens read at a time")
    seed: int = Field(default=0, ge=0, description="of the choice of documents and the bootstrap")


class Kept(BaseModel):
    """Total variation with the last ``tokens`` tokens kept, over documents."""

    tokens: int  # k
    dropped: int  # t = T − k
    mean: float
    interval: Interval
    worst: float  # of any document


class MemoryResult(Result):
    """The curve, and where it stays under the threshold. ``effective_memory`` None: nowhere below T."""

    kind: ClassVar[str] = "memory"

    set: str
    length: int  # T
    n_documents: int
    of_documents: int  # that are so long
    threshold: float
    effective_memory: int | None
    low: int | None  # of its interval; None: beyond the grid
    high: int | None
    curve: list[Kept]  # ascending in tokens
    documents: list[int]
    distances: list[list[float]]  # documents × curve

    def scalars(self) -> dict[str, float]:
        """For TensorBoard; beyond the grid counts as T."""
        found = {"effective_memory": float(self.effective_memory or self.length)}
        inside = [k for k in self.curve if self.train_seq_len and k.tokens <= self.train_seq_len]
        return {**found, "tv_at_training_length": inside[-1].mean} if inside else found

    def figures(self) -> dict[str, Figure]:
        """Total variation over tokens kept."""
        return {"total_variation": self._curve()}

    def _curve(self) -> Figure:
        from paralm.evaluation import figures

        figure, axes = figures.new("last tokens kept, k", "total variation to the whole document")
        x = [k.tokens for k in self.curve]
        axes.plot(x, [k.mean for k in self.curve], marker="o", markersize=4, color=figures.BLUE)
        axes.fill_between(
            x, [k.interval[0] for k in self.curve], [k.interval[1] for k in self.curve],
            color=figures.BLUE, alpha=0.18, linewidth=0,
        )  # fmt: skip
        axes.axhline(self.threshold, color=figures.GREY, linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.02, max(1.0, *(k.mean for k in self.curve)) + 0.02)
        if self.train_seq_len and self.train_seq_len <= self.length:
            figures.mark(axes, self.train_seq_len, "training length")
        if self.effective_memory is not None:
            axes.axvline(self.effective_memory, color=figures.RED, linewidth=1.2)
        axes.set_title(f"How many tokens decide the next, of {self.length:,}")
        return figure


@register_evaluation
class Memory(Evaluation):
    """Effective memory: how far predictions change when the first tokens of a document are left out."""

    name = "memory"
    Settings = MemorySettings
    Results = (MemoryResult,)
    settings: MemorySettings

    def __init__(self, target: Target, settings: MemorySettings) -> None:
        super().__init__(target, settings)
        self.store = target.store(settings.set)
        lengths = np.diff(self.store.doc_ends, prepend=np.int64(0)) - 1  # EOS is predicted, not read
        self.length = settings.length or self._default_length(lengths)
        long_enough = np.flatnonzero(lengths >= self.length)
        self.of_documents = len(long_enough)
        if self.of_documents < 2 or self.length < 2:
            raise UserError(
                f"length: {len(long_enough)} documents of {self.store.path} have {self.length:,} tokens, at least 2 "
                f"are needed; the second longest has {int(np.sort(lengths)[-2]) if len(lengths) > 1 else 0:,}"
            )
        self.documents = self._choose(long_enough)
        self.kept = grid(self.length, settings.per_octave)

    def _default_length(self, lengths: NDArray[np.int64]) -> int:
        """Of what enough documents have."""
        enough = np.sort(lengths)[-min(self.settings.documents, len(lengths)) :]
        wanted = DEFAULT_LENGTHS * (self.target.train_seq_len or int(enough[0]))
        return min(wanted, int(enough[0]))

    def _choose(self, among: NDArray[np.int64]) -> list[int]:
        order = random_permutation(len(among), self.settings.seed, 0, "effective memory")
        picked = order(np.arange(min(self.settings.documents, len(among)), dtype=np.int64))
        return sorted(among[picked].tolist())

    def cells(self) -> list[str]:
        """``rows`` documents each."""
        rows = self.settings.rows
        return [f"documents-{start:05d}" for start in range(0, len(self.documents), rows)]

    def measure(self, cell: str) -> dict[str, Any]:
        """Total variation, documents × k."""
        start = int(cell.removeprefix("documents-"))
        documents = self.documents[start : start + self.settings.rows]
        total = len(documents) * (self.length + sum(self.kept))
        tokens = first_tokens(self.store, documents, self.length)
        found = distances(
            self.target.model,
            tokens,
            self.kept,
            self.settings.chunk,
            on_progress=lambda read: self.on_progress(read, total),
        )
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(bad):
            raise UserError(
                f"{self.store.path}: the model's predictions on document {documents[bad[0]]} are not finite; its "
                "weights or its state may have diverged"
            )
        return {"documents": documents, "distances": found.tolist()}

    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        """Means, intervals, and the effective memory."""
        documents = [document for found in cells.values() for document in found["documents"]]
        values = np.array([row for found in cells.values() for row in found["distances"]], dtype=np.float64)
        means = bootstrap_means(values, self.settings.seed)
        tail = 100 * (1 - LEVEL) / 2
        low, high = np.percentile(means, [tail, 100 - tail], axis=0)
        curve = [
            Kept(
                tokens=k,
                dropped=self.length - k,
                mean=float(values[:, i].mean()),
                interval=(float(low[i]), float(high[i])),
                worst=float(values[:, i].max()),
            )
            for i, k in enumerate(self.kept)
        ]
        places = np.array([first_under(row, self.settings.threshold) for row in means])
        ends = [int(place) for place in np.percentile(places, [tail, 100 - tail], method="nearest")]
        found = first_under(values.mean(axis=0), self.settings.threshold)
        return [
            MemoryResult(
                set=self.settings.set,
                length=self.length,
                n_documents=len(documents),
                of_documents=self.of_documents,
                threshold=self.settings.threshold,
                effective_memory=self._at(found),
                low=self._at(ends[0]),
                high=self._at(ends[1]),
                curve=curve,
                documents=documents,
                distances=values.tolist(),
            )
        ]

    def _at(self, place: int) -> int | None:
        return self.kept[place] if place < len(self.kept) else None

    @classmethod
    def page(cls, results: Sequence[MemoryResult]) -> str:
        """What it is, and the curve."""
        return "\n\n".join(_page(result) for result in results)


def grid(length: int, per_octave: int) -> list[int]:
    """1 … below ``length``, ``per_octave`` integers for each doubling (fewer where they would be the same)."""
    count = math.ceil(per_octave * math.log2(length)) + 1
    found = {round(2 ** (i / per_octave)) for i in range(count)}
    return sorted(k for k in found if k < length) or [1]


def first_tokens(store: TokenStore, documents: Sequence[int], length: int) -> NDArray[np.int64]:
    """(documents, length): their first tokens, BOS included."""
    starts = [store.bounds(document)[0] for document in documents]
    return np.stack([store.tokens[start : start + length].astype(np.int64) for start in starts])


@torch.no_grad()
def distances(
    model: LanguageModel,
    tokens: NDArray[np.int64],
    kept: Sequence[int],
    chunk: int,
    on_progress: Any = None,
) -> NDArray[np.float64]:
    """Total variation, (rows, len(kept)), between the next token's distribution after all of ``tokens`` (rows, T)
    and after its last k only. In float64 from float32 logits. The numbers do not depend on ``chunk`` beyond rounding.
    """
    read = 0

    def predict(part: NDArray[np.int64]) -> Tensor:
        nonlocal read
        state: Any = model.initial_state(len(part), model.head_weight.device)
        logits = torch.empty(0)
        for start in range(0, part.shape[1], chunk):
            piece = torch.from_numpy(np.ascontiguousarray(part[:, start : start + chunk]))
            output = model(piece.to(model.head_weight.device), state=state, last_logits=True)
            state, logits = output.state, output.logits
            read += piece.numel()
            if on_progress is not None:
                on_progress(read)
        return logits[:, -1].double().softmax(-1)

    whole = predict(tokens)
    length = tokens.shape[1]
    found = [0.5 * (predict(tokens[:, length - k :]) - whole).abs().sum(-1) for k in kept]
    return torch.stack(found, dim=1).cpu().numpy()


def first_under(curve: NDArray[np.float64], threshold: float) -> int:
    """The first place from which on the curve stays at most ``threshold``; its length if it ends above."""
    above = np.flatnonzero(curve > threshold)
    return int(above[-1]) + 1 if len(above) else 0


def bootstrap_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """(resamples, columns): means over rows drawn with replacement, the same rows for all columns."""
    draws = np.random.Generator(np.random.PCG64(seed))
    rows = draws.integers(0, len(values), (RESAMPLES, len(values)))
    weights = np.stack([np.bincount(row, minlength=len(values)) for row in rows]) / len(values)
    return weights @ values


def _page(result: MemoryResult) -> str:
    beyond = f"more than {result.curve[-1].tokens:,}"

    def shown(value: int | None) -> str:
        return beyond if value is None else f"{value:,}"

    parts = [
        f"**Effective memory: {shown(result.effective_memory)} tokens** (95 % interval {shown(result.low)} – "
        f"{shown(result.high)}, by bootstrap over {result.n_documents:,} documents): the smallest number k of last "
        f"tokens from which on the next token's distribution is within {result.threshold:g} of that after all "
        f"{result.length:,} tokens, in total variation, on average over documents, at every larger k tried. "
        f"After arXiv 2507.02782, whose EffRem(t) is the row of t.",
        "![Total variation](memory_total_variation.png)",
    ]
    rows = [
        [f"{k.tokens:,}", f"{k.dropped:,}", f"{k.mean:.4f}", md.interval(k.interval, 4), f"{k.worst:.4f}"]
        for k in result.curve
    ]
    header = ["last tokens kept, k", "first tokens left out, t", "total variation", "95 % interval", "largest"]
    return "\n\n".join([*parts, md.table(header, rows, right=range(5))])
