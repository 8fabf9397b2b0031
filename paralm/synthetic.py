"""``data.synthetic``: a computed task (:mod:`paralm_data.synthetic`) in the place of a corpus, as the configuration has
it."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from paralm_data import Task, make_task
from paralm_data.synthetic import check_keys, task_class
from pydantic import ConfigDict, create_model

from paralm.config import DataConfig


def task_of(data: DataConfig) -> Task | None:
    """The task that ``data`` describes; None where it is text. DataError, one line, for one that cannot be."""
    return None if data.synthetic is None else make_task(data.synthetic)


def vocab_size_of(data: DataConfig) -> int:
    """Of the task, or of the tokenizer that is going to be trained."""
    task = task_of(data)
    return data.tokenizer.vocab_size if task is None else task.vocab_size


def checked(spec: Mapping[str, Any]) -> Task:
    """The task of a specification as it was written; its ``spec`` has all settings, defaults filled in.

    Raises DataError, one line, for an unknown task or setting or a value out of range; pydantic's ValidationError for
    a value of the wrong type (its place counted from ``data.synthetic``).
    """
    keys = {key: value for key, value in spec.items() if key != "task"}
    kind = task_class(spec.get("task"))
    check_keys(kind, keys)
    hints = typing.get_type_hints(kind.Settings)
    known: dict[str, Any] = {f.name: (hints[f.name], ...) for f in fields(kind.Settings) if f.name in keys}
    needed = [f.name for f in fields(kind.Settings) if f.default is MISSING and f.default_factory is MISSING]
    known |= {name: (hints[name], ...) for name in needed}
    strict = create_model("Settings", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **known)
    strict.model_validate_json(json.dumps(keys), strict=True)
    return make_task(spec)
