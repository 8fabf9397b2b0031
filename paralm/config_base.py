"""What several sections of the configuration are made from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """A part of the configuration. Unknown keys are refused; values are not coerced across types."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class SourceConfig(Section):
    """Where text comes from."""

    kind: Literal["python-stdlib", "text", "jsonl", "parquet", "datasets"] = "python-stdlib"
    paths: list[str] = Field(default_factory=list, description="files, folders or globs (text, jsonl, parquet)")
    text_key: str = Field(default="text", description="the field that holds the text (jsonl, parquet, datasets)")
    dataset: str | None = Field(default=None, description="hub name or local path (kind: datasets)")
    subset: str | None = Field(
        default=None, description="the dataset's configuration name; of python-stdlib: code, docs or tests"
    )
    split: str = "train"
    streaming: bool = True
    max_documents: PositiveInt | None = None

    @model_validator(mode="after")
    def _complete(self) -> SourceConfig:
        if self.kind in ("text", "jsonl", "parquet") and not self.paths:
            raise ValueError(f"kind '{self.kind}' needs 'paths'")
        if self.kind == "python-stdlib" and self.subset not in (None, "code", "docs", "tests"):
            raise ValueError(f"subset '{self.subset}' is no part of python-stdlib; it must be code, docs or tests")
        if self.kind == "datasets" and not self.dataset:
            raise ValueError("kind 'datasets' needs 'dataset', a hub name or a local path")
        return self
