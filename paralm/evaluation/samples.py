"""Text that a model writes after a few prompts, to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from paralm_data import Tokenizer
from pydantic import BaseModel

from paralm.evaluation.result import Result
from paralm.generation import generate, stop_ids_of

if TYPE_CHECKING:
    from paralm.models import LanguageModel


class Sample(BaseModel):
    """One continuation; ``ended``: the model ended the document before ``max_tokens``."""

    prompt: str
    text: str
    tokens: int
    ended: bool


class SamplesResult(Result):
    """Continuations and how they were drawn; the same settings and weights give the same text."""

    kind: ClassVar[str] = "samples"

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    samples: list[Sample]


def samples(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> SamplesResult:
    """Continue each prompt by up to ``max_tokens`` tokens, from the start of a document.

    Each prompt has a seed of its own (``seed`` plus its place). Options as for :func:`paralm.generation.generate`.
    """
    found = []
    ends = stop_ids_of(tokenizer)
    for index, prompt in enumerate(prompts):
        ids: list[int] = []
        for token in generate(
            model,
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed + index,
            stop_ids=ends,
            vocab_size=tokenizer.vocab_size,
        ):
            ids.append(token)
            if on_progress is not None:
                on_progress(index * max_tokens + len(ids), len(prompts) * max_tokens)
        text = tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")
        found.append(Sample(prompt=prompt, text=text, tokens=len(ids), ended=len(ids) < max_tokens))
    return SamplesResult(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=max_tokens, samples=found
    )
