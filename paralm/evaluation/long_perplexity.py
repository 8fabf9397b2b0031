"""``paralm eval perplexity``: :mod:`paralm.evaluation.perplexity` in cells, a share of the documents each.

The parts' sums add up, so the result is that of all documents at once, up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from paralm.errors import UserError
from paralm.evaluation import markdown as md
from paralm.evaluation.perplexity import DocumentSums, PerplexityResult, score_documents, split_documents, summarize
from paralm.evaluation.result import Result
from paralm.evaluation.stream import select_documents
from paralm.evaluation.suite import Evaluation, EvaluationSettings, Target, register_evaluation

CELL_TOKENS = 500_000  # of a cell, unless `parts` is given


class PerplexitySettings(EvaluationSettings):
    """Of ``paralm eval perplexity``."""

    sets: list[str] | None = Field(
        default=None, description="held_out, train, validation sets; default: held_out and every validation set"
    )
    max_tokens: PositiveInt | None = Field(default=1_000_000, description="to score of each set; null: all")
    rows: PositiveInt = Field(default=16, description="documents streamed side by side")
    chunk: PositiveInt = Field(default=512, description="tokens a document advances at a time")
    reset_every: PositiveInt | None = Field(
        default=None,
        description="start afresh every so many tokens of a document; default: never, or the training length if the "
        "state grows",
    )
    parts: PositiveInt | None = Field(
        default=None, description=f"pieces a set is measured in; default: of about {CELL_TOKENS:,} tokens"
    )
    seed: int = Field(default=0, ge=0, description="of the bootstrap")


@register_evaluation
class Perplexity(Evaluation):
    """Loss, perplexity and bits per byte of whole documents with carried state, at any length, and loss by position."""

    name = "perplexity"
    Settings = PerplexitySettings
    Results = (PerplexityResult,)
    settings: PerplexitySettings
    version: ClassVar[int] = 1

    def __init__(self, target: Target, settings: PerplexitySettings) -> None:
        super().__init__(target, settings)
        wanted = settings.sets if settings.sets is not None else target.validation_sets
        if not wanted or len(set(wanted)) != len(wanted):
            raise UserError(f"sets: name each set once, at least one; got {wanted}")
        self.tokenizer = target.tokenizer
        self.stores = {name: target.store(name) for name in wanted}
        self.reset_every = settings.reset_every
        if self.reset_every is None and not target.model.bounded_state:
            self.reset_every = target.train_seq_len
        self._documents: dict[str, NDArray[np.int64]] = {}
        for name, store in self.stores.items():
            if store.n_documents == 0:
                raise UserError(f"{store.path}: no documents to score")
            chosen = select_documents(store, settings.max_tokens)
            total = sum(store.bounds(int(d))[1] - store.bounds(int(d))[0] for d in chosen)
            parts = min(settings.parts or -(-total // CELL_TOKENS), len(chosen))
            for part, documents in enumerate(split_documents(store, chosen, parts)):
                self._documents[f"{name}-{part + 1:04d}-of-{parts:04d}"] = documents
        self._sets = {cell: cell.rsplit("-", 3)[0] for cell in self._documents}

    def cells(self) -> list[str]:
        """Set by set, the parts of its documents."""
        return list(self._documents)

    def measure(self, cell: str) -> dict[str, Any]:
        """The sums of the cell's documents."""
        sums = score_documents(
            self.target.model,
            self.stores[self._sets[cell]],
            self.tokenizer,
            self._documents[cell],
            rows=self.settings.rows,
            chunk=self.settings.chunk,
            device=self.target.device,
            reset_every=self.reset_every,
            on_progress=self.on_progress,
        )
        return {
            "index": sums.index.tolist(),
            "nats": sums.nats.tolist(),
            "tokens": sums.tokens.tolist(),
            "n_bytes": sums.n_bytes.tolist(),
            "words": None if sums.words is None else sums.words.tolist(),
            "buckets": sums.buckets.tolist(),
            "detailed": sums.detailed,
        }

    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        """One result a set."""
        found: list[Result] = []
        for name, store in self.stores.items():
            parts = [_sums(content) for cell, content in cells.items() if self._sets[cell] == name]
            found.append(
                summarize(
                    DocumentSums.join(parts), store.n_documents, self.reset_every, name, self.target.train_seq_len,
                    self.settings.seed,
                )
            )  # fmt: skip
        return found

    @classmethod
    def page(cls, results: Sequence[PerplexityResult]) -> str:
        """Tables and figures."""
        parts = [_table(results)]
        resets = {result.reset_every for result in results}
        for every in sorted(resets, key=lambda value: value or 0):
            if every is not None:
                parts.append(f"The model forgets after every {every:,} tokens of a document.")
            else:
                parts.append(
                    "Every token but a document's first is scored once, with all before it in its document read: the "
                    "state is carried from the first to the last."
                )
        for result in results:
            parts += [f"### Loss by position, {result.set.replace('_', '-')}", _positions(result)]
            parts.append(f"![Loss by position]({result.name}_by_position.png)")
        return "\n\n".join(parts)


def _sums(content: dict[str, Any]) -> DocumentSums:
    words = content["words"]
    return DocumentSums(
        np.array(content["index"], dtype=np.int64),
        np.array(content["nats"], dtype=np.float64),
        np.array(content["tokens"], dtype=np.int64),
        np.array(content["n_bytes"], dtype=np.int64),
        None if words is None else np.array(words, dtype=np.int64),
        np.array(content["buckets"], dtype=np.float64),
        content["detailed"],
    )


def _table(results: Sequence[PerplexityResult]) -> str:
    header = ["set", "documents", "tokens", "nats per token", "token perplexity", "bits per byte", "word perplexity"]
    rows = [
        [
            r.set.replace("_", "-"),
            f"{r.n_documents:,} of {r.of_documents:,}",
            f"{r.tokens:,}",
            _shown(r.nats_per_token, r.nats_per_token_interval, 4),
            _shown(r.token_perplexity, r.token_perplexity_interval, 2),
            _shown(r.bits_per_byte, r.bits_per_byte_interval, 4),
            _shown(r.word_perplexity, r.word_perplexity_interval, 1),
        ]
        for r in results
    ]
    note = "In brackets: intervals of 95 %, by bootstrap over documents."
    return md.table(header, rows, right=range(1, len(header))) + f"\n\n{note}"


def _shown(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" + (f" ({md.interval(interval, digits)})" if interval is not None else "")


def _positions(result: PerplexityResult) -> str:
    past = result.train_seq_len
    rows = [
        [
            f"{b.first:,} – {b.last:,}" + (" (past the training length)" if past and b.first > past else ""),
            f"{b.tokens:,}",
            f"{b.nats_per_token:.4f}",
            md.interval(b.interval, 4),
        ]
        for b in result.by_position
    ]
    return md.table(["position", "tokens", "nats per token", "95 % interval"], rows, right=(1, 2, 3))
