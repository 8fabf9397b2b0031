"""``paralm eval collapse``: whether, where and in which heads a model breaks past its training length, and what helps.

Natural text is read with carried state far past the training length T, and the same tokens are read *afresh*, from
states that are T/2 to T tokens old: what the carried state loses against that, by position, is the curve on which
:mod:`paralm.evaluation.collapse_rule` gives its verdict. What the text at a position is like cancels in it, and a
model that makes use of what lies further back than T lies below 0. The same rule on the loss itself is stated beside
it. States are measured head by head on natural text, one passage repeated, and newlines. Each mitigation
(:mod:`paralm.models.mitigations`) is one more reading of the natural text, judged against the same fresh reading by the
model as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from paralm.errors import UserError
from paralm.evaluation.collapse_result import CollapseResult, build_result
from paralm.evaluation.collapse_rule import LEAST_STREAMS, bucket_edges
from paralm.evaluation.collapse_streams import Streams, read_afresh, read_carried
from paralm.evaluation.result import Result
from paralm.evaluation.suite import Evaluation, EvaluationSettings, Target, register_evaluation
from paralm.models.mitigations import Mitigation, check_admitted, mitigated

LONGEST = 64
"""Training lengths that a stream has by default, if there is text enough."""


class CollapseSettings(EvaluationSettings):
    """Settings of ``paralm eval collapse``."""

    set: str = Field(default="held_out", description="the text: held_out, train or a validation set")
    streams: int = Field(default=16, ge=LEAST_STREAMS, description="streams of text, which do not overlap")
    length: PositiveInt | None = Field(
        default=None, description="tokens of a stream; default: 64 training lengths, or what text there is"
    )
    train_seq_len: PositiveInt | None = Field(default=None, ge=8, description="default: the run's training.seq_len")
    texts: tuple[Literal["repeat", "newlines"], ...] = Field(
        default=("repeat", "newlines"), description="what states are measured on besides natural text"
    )
    mitigations: tuple[str, ...] = Field(
        default=(), description='each read and judged too, such as ["decay=0.99,input=0.7", "clip=10", "window=256"]'
    )
    chunk: PositiveInt = Field(default=512, description="tokens a stream advances at a time; no result depends on it")

    @field_validator("mitigations", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("mitigations")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            written = tuple(str(Mitigation.parse(text)) for text in value)
        except UserError as error:
            raise ValueError(str(error)) from None
        if "" in written:
            raise ValueError(f"'{value[written.index('')]}' changes nothing")
        if len(set(written)) < len(written):
            raise ValueError("the same mitigation twice")
        return written


@register_evaluation
class Collapse(Evaluation):
    """State collapse: whether the loss rises past the training length, from where, in which heads, and what helps."""

    name = "collapse"
    Settings = CollapseSettings
    Results = (CollapseResult,)
    settings: CollapseSettings

    def __init__(self, target: Target, settings: CollapseSettings) -> None:
        super().__init__(target, settings)
        if not target.model.bounded_state:
            raise UserError("collapse: the model's state grows with the sequence, so there is none to collapse")
        trained = settings.train_seq_len or target.train_seq_len
        if trained is None:
            raise UserError("collapse: nobody says what length the model was trained on; give train_seq_len=TOKENS")
        self.trained = trained
        self.store = target.store(settings.set)
        room = (self.store.n_tokens - 1) // settings.streams
        self.edges = bucket_edges(trained, settings.length or min(LONGEST * trained, room))
        self.tokenizer = target.tokenizer if "newlines" in settings.texts else target.own_tokenizer
        for text in settings.mitigations:
            check_admitted(target.model, Mitigation.parse(text))
        for text in ("natural", *settings.texts):
            self._streams(text)

    def _streams(self, text: str) -> Streams:
        return Streams(self.store, self.tokenizer, text, self.settings.streams, self.edges[-1], self.trained)

    def cells(self) -> list[str]:
        """Texts, the fresh reading, and natural text under each mitigation."""
        rest = [f"natural+{mitigation}" for mitigation in self.settings.mitigations]
        return [*reversed(self.settings.texts), "natural", "afresh", *rest]

    def measure(self, cell: str) -> dict[str, Any]:
        """Read one text in one way."""
        text, _, mitigation = cell.partition("+")
        if cell == "afresh":
            streams, chunk = self._streams("natural"), self.settings.chunk
            return read_afresh(self.target.model, streams, self.edges, self.trained, chunk, self.on_progress)
        with mitigated(self.target.model, Mitigation.parse(mitigation)) as model:
            return read_carried(model, self._streams(text), self.edges, self.settings.chunk, self.on_progress)

    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        """Verdicts, departures and all that figures show."""
        ordered = sorted(cells, key=lambda name: (not name.startswith("natural"), self.cells().index(name)))
        return [build_result({name: cells[name] for name in ordered}, self.edges, self.trained, self.settings.set)]

    @classmethod
    def page(cls, results: Sequence[CollapseResult]) -> str:
        """The verdict, the mitigations beside it, and the heads."""
        return "\n\n".join(result.page() for result in results)
