"""Text from a language model, token by token, with the carried state: constant memory at any length.

The prompt is read in chunks; then each token is one step from the last state. Draws come from a generator of their
own, on the CPU, so a seed gives the same text whatever the device and whatever else draws random numbers. Holds for
every mixer with ``bounded_state``; attention's keys and values grow by one token a step.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paralm.errors import UserError

if TYPE_CHECKING:
    from paralm_data import Tokenizer

    from paralm.models import LanguageModel


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    chunk: int = 512,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` token ids that continue ``prompt_ids``; a stop id ends it and is not yielded.

    ``temperature``: 0 takes the likeliest token. ``top_k``: draw from the k likeliest, 0 for all. ``top_p``: draw
    from the smallest set of likeliest tokens whose probability reaches p. ``vocab_size``: the tokenizer's, when the
    model's is padded beyond it; larger ids are never drawn. ``chunk``: prompt tokens read at a time.

    Raises UserError, one line, for an empty prompt, ids outside the vocabulary or impossible options.
    """
    limit = min(vocab_size or model.vocab_size, model.vocab_size)
    check_options(max_tokens, temperature, top_k, top_p, seed)
    if len(prompt_ids) == 0:
        raise UserError("the prompt has no tokens; begin with the tokenizer's bos_id")
    outside = [i for i in prompt_ids if not 0 <= i < limit]
    if outside:
        raise UserError(f"prompt token {outside[0]} is outside the vocabulary of {limit}; is it another tokenizer's?")
    # The checks above run at the call, not at the first token.
    return _generate(model, prompt_ids, max_tokens, temperature, top_k, top_p, seed, frozenset(stop_ids), limit, chunk)


def check_options(max_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """UserError, one line, for options that cannot work."""
    if max_tokens < 0:
        raise UserError(f"max_tokens is {max_tokens}; give 0 or more")
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}; give 0 (the likeliest token always) or more")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; give 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; give a number above 0, at most 1 (all tokens)")
    if not 0 <= seed < 1 << 64:
        raise UserError(f"seed is {seed}; give a number from 0 to 2⁶⁴ − 1")


def _generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_ids: frozenset[int],
    limit: int,
    chunk: int,
) -> Iterator[int]:
    device = model.head_weight.device
    draws = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        state = model.initial_state(1, device)
        logits = torch.empty(0)
        for start in range(0, len(prompt_ids), chunk):
            logits, state = _advance(model, prompt_ids[start : start + chunk], state)
        for left in range(max_tokens, 0, -1):
            token = sample(logits[:limit], draws, temperature, top_k, top_p)
            if token in stop_ids:
                return
            yield token
            if left > 1:
                logits, state = _advance(model, [token], state)
    finally:
        model.train(was_training)


@torch.no_grad()  # not around the loop: a generator would leave it switched off in its caller between tokens
def _advance(model: LanguageModel, ids: Sequence[int], state: object) -> tuple[Tensor, object]:
    """Read some tokens; the next token's logits on the CPU, and the state."""
    tokens = torch.tensor([list(ids)], device=model.head_weight.device)
    output = model(tokens, state=state, last_logits=True)
    return output.logits[0, -1].cpu(), output.state


def check_finite(logits: Tensor) -> None:
    """UserError, one line, unless every logit (or log-probability) is finite."""
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's logits are not finite; its weights diverged: use an earlier checkpoint")


def sample(logits: Tensor, draws: torch.Generator, temperature: float, top_k: int = 0, top_p: float = 1.0) -> int:
    """One token id from logits (vocab,) on the CPU; see :func:`generate` for the options.

    Raises UserError if a logit is not finite.
    """
    check_finite(logits)
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.double()
    scaled = (scaled - scaled.max()) / temperature  # the shift keeps a tiny temperature from overflowing
    ranked, order = scaled.sort(descending=True, stable=True)
    if top_k:
        ranked = ranked[:top_k]
    probability = ranked.softmax(0)
    reached = probability.cumsum(0)
    if top_p < 1:
        reached = reached[reached - probability < top_p]  # the first token always stays
    # One uniform number a token, whatever the number of candidates: rounding in the tail moves no later draw.
    drawn = torch.rand(1, generator=draws, dtype=reached.dtype) * reached[-1]
    return int(order[min(int(torch.searchsorted(reached, drawn, right=True)), len(reached) - 1)])


def stop_ids_of(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids that end a text: of the document's end, and those that stand in no document."""
    return tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chunk: int = 512,
) -> Iterator[str]:
    """Yield pieces of text that continue ``prompt``, as soon as they are certain.

    A character of several bytes is never split over two pieces, and text that may turn out to begin a ``stop``
    string is held back until it does not. Ends at the tokenizer's end-of-document id, at a stop string (which is
    not yielded), or after ``max_tokens``. Options as for :func:`generate`; raises UserError like it.
    """
    if any(not s for s in stop):
        raise UserError("a stop string is empty; leave it out")
    ids = generate(
        model,
        [tokenizer.bos_id, *tokenizer.encode(prompt)],
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids_of(tokenizer),
        vocab_size=tokenizer.vocab_size,
        chunk=chunk,
    )
    return until_stop(whole_characters(ids, tokenizer), stop)


class WholeCharacters:
    """Text of ids that come one by one. A character spelled in bytes comes when its last byte is there.

    Bytes that never complete one come as U+FFFD, as they do from decoding everything at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def inside(self) -> bool:
        """Whether the bytes so far end inside a character."""
        return bool(self._decoder.getstate()[0])

    def push(self, token: int) -> str:
        """The text that this id makes certain."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def end(self) -> str:
        """What is left."""
        return self._decoder.decode(b"", final=True)


class UntilStop:
    """Passes text on until the first of the ``stop`` strings that is complete (of several at once the longest), which
    may span pieces; ``stopped`` once it came. How the text is cut into pieces changes nothing."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = stop, ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is certain now: none of it begins a stop string. Nothing after one."""
        if self.stopped:
            return ""
        held = self._held + piece
        found = [(at + len(s), at) for s in self._stop if (at := held.find(s)) >= 0]  # where it ends, and begins
        self.stopped = bool(found)
        certain = min(found)[1] if found else len(held) - max((_overlap(held, s) for s in self._stop), default=0)
        self._held = "" if found else held[certain:]
        return held[:certain]

    def end(self) -> str:
        """What was held back and turned out to be text."""
        held, self._held = self._held, ""
        return held


def whole_characters(ids: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Decode a stream of ids; see :class:`WholeCharacters`."""
    text = WholeCharacters(tokenizer)
    for token in ids:
        if piece := text.push(token):
            yield piece
    if piece := text.end():
        yield piece


def until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on until the first of the ``stop`` strings that is complete, which may span pieces; end before it."""
    passed = UntilStop(stop)
    for piece in pieces:
        if text := passed.push(piece):
            yield text
        if passed.stopped:
            return
    if text := passed.end():
        yield text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
