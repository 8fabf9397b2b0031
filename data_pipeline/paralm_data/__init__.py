"""Corpora, tokenizers, the token store, synthetic tasks and the loaders. Knows no model.

>>> prepared = prepare(SourceSpec("python-stdlib"), TokenizerSpec(vocab_size=4096), "data")
>>> loader = Loader(prepared.train, seq_len=256, global_batch_size=16, seed=0)
>>> batch = next(loader)  # tokens, labels, reset: (16, 256)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paralm_data.ahead import Ahead
    from paralm_data.bandits import Bandit, Exp3, Ucb1
    from paralm_data.errors import DataError
    from paralm_data.inspection import Excerpt, StoreReport, TokenCount, inspect, tokenizer_of
    from paralm_data.loader import IGNORE, Batch, Loader
    from paralm_data.manifest import Manifest
    from paralm_data.mixture import MixtureLoader, MixtureSource, random_windows, temperature_weights
    from paralm_data.mixture_preparation import PreparedMixture, prepare_mixture
    from paralm_data.permutation import Permutation, random_permutation
    from paralm_data.preparation import Execution, Prepared, is_prepared, prepare
    from paralm_data.progress import Progress
    from paralm_data.sources import Shard, documents, shards
    from paralm_data.specs import Document, SourceSpec, TokenizerSpec
    from paralm_data.steps import LanguageRule, LengthRule, MinHashRule, StepsSpec
    from paralm_data.store import TokenStore
    from paralm_data.store_writer import StoreWriter
    from paralm_data.synthetic import SyntheticLoader, Task, make_task, register_task, tasks
    from paralm_data.tokenizer import Tokenizer

# Where each name is: a module is imported when one of its names is first used, so that what prepares text, in hundreds
# of processes, has no torch in memory.
_WHERE = {
    "Ahead": "ahead",
    "Bandit": "bandits",
    "Exp3": "bandits",
    "Ucb1": "bandits",
    "DataError": "errors",
    "Excerpt": "inspection",
    "StoreReport": "inspection",
    "TokenCount": "inspection",
    "inspect": "inspection",
    "tokenizer_of": "inspection",
    "IGNORE": "loader",
    "Batch": "loader",
    "Loader": "loader",
    "Manifest": "manifest",
    "MixtureLoader": "mixture",
    "MixtureSource": "mixture",
    "random_windows": "mixture",
    "temperature_weights": "mixture",
    "PreparedMixture": "mixture_preparation",
    "prepare_mixture": "mixture_preparation",
    "Permutation": "permutation",
    "random_permutation": "permutation",
    "Execution": "preparation",
    "Prepared": "preparation",
    "is_prepared": "preparation",
    "prepare": "preparation",
    "Progress": "progress",
    "Shard": "sources",
    "documents": "sources",
    "shards": "sources",
    "Document": "specs",
    "SourceSpec": "specs",
    "TokenizerSpec": "specs",
    "LanguageRule": "steps",
    "LengthRule": "steps",
    "MinHashRule": "steps",
    "StepsSpec": "steps",
    "TokenStore": "store",
    "StoreWriter": "store_writer",
    "SyntheticLoader": "synthetic",
    "Task": "synthetic",
    "make_task": "synthetic",
    "register_task": "synthetic",
    "tasks": "synthetic",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'paralm_data' has no attribute '{name}'")
    found = getattr(importlib.import_module(f"paralm_data.{_WHERE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


__all__ = [
    "IGNORE",
    "Ahead",
    "Bandit",
    "Batch",
    "DataError",
    "Document",
    "Excerpt",
    "Execution",
    "Exp3",
    "LanguageRule",
    "LengthRule",
    "Loader",
    "Manifest",
    "MinHashRule",
    "MixtureLoader",
    "MixtureSource",
    "Permutation",
    "Prepared",
    "PreparedMixture",
    "Progress",
    "Shard",
    "SourceSpec",
    "StepsSpec",
    "StoreReport",
    "StoreWriter",
    "SyntheticLoader",
    "Task",
    "TokenCount",
    "TokenStore",
    "Tokenizer",
    "TokenizerSpec",
    "Ucb1",
    "documents",
    "inspect",
    "is_prepared",
    "make_task",
    "prepare",
    "prepare_mixture",
    "random_permutation",
    "random_windows",
    "register_task",
    "shards",
    "tasks",
    "temperature_weights",
    "tokenizer_of",
]
