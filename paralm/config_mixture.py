"""``data.mixture``: several sources instead of one, and how often each is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from paralm.config_base import Section, SourceConfig


class MixtureSourceConfig(SourceConfig):
    """One source of a mixture: text, as ``data.source``, or a folder that was prepared before."""

    kind: Literal["python-stdlib", "text", "jsonl", "parquet", "datasets"] | None = None  # type: ignore[assignment]
    store: Path | None = Field(default=None, description="instead of text: a prepared folder, or one token store")
    weight: NonNegativeFloat | None = Field(default=None, description="relative to the others'; default: 1")
    max_epochs: PositiveFloat | None = Field(default=None, description="times it may be read; default: any")

    @model_validator(mode="after")
    def _one_of_both(self) -> MixtureSourceConfig:
        if (self.kind is None) == (self.store is None):
            raise ValueError("a source of a mixture has either 'kind' (and where its text is) or 'store'")
        if self.store is not None and (self.paths or self.dataset or self.max_documents):
            raise ValueError("'store' is prepared already; leave out where its text was")
        return self


class MixtureConfig(Section):
    """Several sources, drawn by weights that are given, follow from their sizes, or are learned while training."""

    sources: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], MixtureSourceConfig]
    weights: Literal["fixed", "temperature", "exp3", "ucb1"] = Field(
        default="fixed",
        description="fixed: each source's weight; temperature: p ∝ tokens^(1/temperature); exp3, ucb1: learned, by how "
        "well a source's gradient agrees with the target's (arXiv 2302.00674)",
    )
    temperature: PositiveFloat = Field(default=1.0, description="1: in proportion to the tokens; larger: more equal")
    at_end: Literal["repeat", "stop"] = Field(
        default="repeat", description="of a source: read it again in a new order, or never (as max_epochs: 1)"
    )
    target: str | None = Field(
        default=None, description="exp3, ucb1: whose held-out text to get better at: a source or a validation set"
    )
    every: PositiveInt = Field(default=10, description="exp3, ucb1: steps from one measurement to the next")
    rows: PositiveInt = Field(default=8, description="exp3, ucb1: windows that a gradient is measured on")
    gradient: Literal["last_block", "all"] = Field(
        default="last_block", description="exp3, ucb1: the parameters whose gradients are compared"
    )
    beta: float = Field(default=0.1, gt=0, le=1, description="ucb1: how much of a mean the newest reward is")

    @property
    def learned(self) -> bool:
        """Whether the weights change while training."""
        return self.weights in ("exp3", "ucb1")

    @model_validator(mode="after")
    def _consistent(self) -> MixtureConfig:
        if len(self.sources) < (2 if self.learned else 1):
            least = "two of them" if self.learned else "at least one"
            raise ValueError(f"'sources' has {len(self.sources)}; weights: {self.weights} needs {least}")
        for name, source in self.sources.items():
            if name in ("train", "held_out"):
                raise ValueError(f"source '{name}': that name is of a split; give it another")
            if source.weight is not None and self.weights != "fixed":
                raise ValueError(f"sources.{name}.weight is of weights: fixed; leave it out with {self.weights}")
            if self.at_end == "stop" and (source.max_epochs or 1) > 1:
                raise ValueError(f"sources.{name}.max_epochs {source.max_epochs:g} needs at_end: repeat")
        if all(source.weight == 0 for source in self.sources.values()):
            raise ValueError("every source has weight 0; at least one needs a weight above 0")
        if self.temperature != 1.0 and self.weights != "temperature":
            raise ValueError(f"temperature {self.temperature:g} needs weights: temperature")
        if self.learned and self.target is None:
            raise ValueError(f"weights: {self.weights} needs target, the source or validation set to get better at")
        if not self.learned and self.target is not None:
            raise ValueError(f"target is of weights: exp3 and ucb1; leave it out with {self.weights}")
        return self
