"""Corpora, tokenizers, the token store, synthetic tasks and the loaders. Knows no model.

>>> prepared = prepare(SourceSpec("python-stdlib"), TokenizerSpec(vocab_size=4096), "data")
>>> loader = Loader(prepared.train, seq_len=256, global_batch_size=16, seed=0)
>>> batch = next(loader)  # tokens, labels, reset: (16, 256)
"""

from paralm_data.bandits import Bandit, Exp3, Ucb1
from paralm_data.errors import DataError
from paralm_data.inspection import Excerpt, StoreReport, TokenCount, inspect, tokenizer_of
from paralm_data.loader import IGNORE, Batch, Loader
from paralm_data.manifest import Manifest
from paralm_data.mixture import MixtureLoader, MixtureSource, random_windows, temperature_weights
from paralm_data.mixture_preparation import PreparedMixture, prepare_mixture
from paralm_data.permutation import Permutation, random_permutation
from paralm_data.preparation import Prepared, is_prepared, prepare
from paralm_data.progress import Progress
from paralm_data.sources import Shard, documents, shards
from paralm_data.specs import Document, SourceSpec, TokenizerSpec
from paralm_data.store import TokenStore
from paralm_data.store_writer import StoreWriter
from paralm_data.synthetic import SyntheticLoader, Task, make_task, register_task, tasks
from paralm_data.tokenizer import Tokenizer

__all__ = [
    "IGNORE",
    "Bandit",
    "Batch",
    "DataError",
    "Document",
    "Excerpt",
    "Exp3",
    "Loader",
    "Manifest",
    "MixtureLoader",
    "MixtureSource",
    "Permutation",
    "Prepared",
    "PreparedMixture",
    "Progress",
    "Shard",
    "SourceSpec",
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
