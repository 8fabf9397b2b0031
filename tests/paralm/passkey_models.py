"""Models for the passkey tests that know the key, and that know nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from paralm_data import Tokenizer
from paralm_data.passkey import ids_after
from torch import nn

from paralm.config import ModelConfig

LENGTHS = {"passkey": 200, "niah_noise": 240, "niah_prose": 240, "niah_uuid": 640, "niah_multikey": 640,
           "niah_multiquery": 640}  # fmt: skip
"""Tokens in which each task's prompt finds room."""


class Fake(nn.Module):
    """What Target and Reader use of a LanguageModel besides forward."""

    bounded_state = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size + 3  # padded
        self.n_tokens = tokenizer.vocab_size
        self.head_weight = nn.Parameter(torch.zeros(1))
        self.config = ModelConfig()


class Oracle(Fake):
    """Looks the value up in the text, and writes it token by token. The state is every token read."""

    def forward(self, tokens: torch.Tensor, state: Any = None, last_logits: bool = False) -> Any:
        read = tokens if state is None else torch.cat((state["read"], tokens), dim=1)
        places = range(1) if last_logits else range(tokens.shape[1] - 1, -1, -1)
        logits = torch.stack([self.rows(read[:, : read.shape[1] - back]) for back in places], dim=1)
        logits[..., self.tokenizer.vocab_size :] = 1e6  # padding that must never be an answer
        return SimpleNamespace(logits=logits, state={"read": read})

    def rows(self, read: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [nn.functional.one_hot(torch.tensor(self.next(row.tolist())), self.vocab_size) for row in read]
        ).float()

    def next(self, read: list[int]) -> int:
        text = self.tokenizer.decode(read)
        named = re.search(r"What is the number of the (.+?)\? The number of the .+? is ([0-9a-f-]*)$", text)
        plain = re.search(r"What is the pass key\? The pass key is (\d*)$", text)
        if named:
            found, given = re.search(rf"number of the {named[1]} is (\S+)\.\n", text), named[2]
        elif plain:
            found, given = re.search(r"The pass key is (\d+)\. Remember", text), plain[1]
        else:
            return 5
        assert found is not None
        ids = ids_after(self.tokenizer, found[1], "is ").tolist()
        done = next(n for n in range(len(ids) + 1) if self.tokenizer.decode(ids[:n]) == given)
        return [*ids, self.tokenizer.eos_id][done]


class Blind(Fake):
    """Says any digit; remembers nothing."""

    bounded_state = True

    def forward(self, tokens: torch.Tensor, state: Any = None, last_logits: bool = False) -> Any:
        self.draws = getattr(self, "draws", np.random.Generator(np.random.PCG64(0)))
        digits = np.concatenate([ids_after(self.tokenizer, str(digit), "is ") for digit in range(10)])
        said = digits[self.draws.integers(10, size=(len(tokens), 1 if last_logits else tokens.shape[1]))]
        logits = nn.functional.one_hot(torch.from_numpy(said), self.vocab_size).float()
        return SimpleNamespace(logits=logits, state={"none": tokens[:, :0]})
