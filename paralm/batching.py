"""Many sequences side by side through one model, each as if it were alone.

No padding is ever read into a state: prompts of unequal length advance together and leave one by one, so the state
after a prompt is that of the prompt. States are split and joined by row, which needs the law of
:mod:`paralm.models.mixers.base` and nothing else; rows whose states differ in shape (attention that has read more or
less) run beside each other in groups of equal shape.

What a sequence gives does not depend on its neighbours, up to the rounding of matrix products of another batch size:
in float64 the tokens are the same, in float32 a draw may differ where two tokens are equally likely to seven digits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paralm.errors import UserError
from paralm.generation import UntilStop, WholeCharacters, check_finite, check_options, sample

if TYPE_CHECKING:
    from paralm_data import Tokenizer

    from paralm.models import LanguageModel
    from paralm.models.mixers.base import State

LOGITS_BYTES = 256 << 20  # of the logits of several positions that are held at once


def take_rows(state: State, rows: Sequence[int]) -> State:
    """The state of some of a batch's rows, in that order; a row may be taken several times."""
    leaves, tree = pytree.tree_flatten(state)
    if not leaves:
        return state
    index = torch.tensor(rows, device=leaves[0].device)
    return pytree.tree_unflatten([leaf.index_select(0, index) for leaf in leaves], tree)


def join_rows(states: Sequence[State]) -> State:
    """One batch of several states of equal :func:`signature`."""
    return states[0] if len(states) == 1 else pytree.tree_map(lambda *leaves: torch.cat(leaves), *states)


def signature(state: State) -> tuple[Any, ...]:
    """Shape without the batch, and dtype, of every leaf: states of equal signature can be joined."""
    return tuple((tuple(leaf.shape[1:]), leaf.dtype) for leaf in pytree.tree_leaves(state))


def state_nbytes(state: State) -> int:
    """Bytes of a state's tensors."""
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(state))


def logits_width(model: LanguageModel, rows: int, chunk: int) -> int:
    """How many positions of ``rows`` rows to take at once, at most ``chunk``, when all their logits are wanted."""
    return max(1, min(chunk, LOGITS_BYTES // (4 * rows * model.vocab_size)))


@torch.no_grad()
def read_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], *, chunk: int = 512
) -> tuple[Tensor, list[State]]:
    """Read prompts from a fresh state, side by side: the next token's logits (prompts, vocab), and each one's state.

    Each prompt has a token at least. The rows advance by what the shortest has left, at most ``chunk`` tokens at a
    time, and a row leaves when its prompt ends.
    """
    device = model.head_weight.device
    states: list[State] = [None] * len(prompts)
    logits: list[Tensor] = [torch.empty(0)] * len(prompts)
    left = list(range(len(prompts)))
    state, at = model.initial_state(len(prompts), device), 0
    while left:
        width = min([chunk, *(len(prompts[i]) - at for i in left)])
        tokens = torch.tensor([list(prompts[i][at : at + width]) for i in left], device=device)
        output = model(tokens, state=state, last_logits=True)
        at, state = at + width, output.state
        ended = [row for row, i in enumerate(left) if len(prompts[i]) == at]
        for row in ended:
            logits[left[row]], states[left[row]] = output.logits[row, -1], take_rows(state, [row])
        stay = [row for row, i in enumerate(left) if len(prompts[i]) > at]
        if ended and stay:
            state = take_rows(state, stay)
        left = [left[row] for row in stay]
    return torch.stack(logits), states


@dataclass(frozen=True)
class TokenScore:
    """How likely one token was, in nats at temperature 1, and the likeliest ids with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Stream:
    """One sequence: a prompt, and what to do after it. Raises UserError, one line, for options that cannot work.

    ``state``: where to go on from; None: a fresh one. ``top_scores``: with 0 or more, ``scores`` has each new
    token's log-probability and so many of the likeliest; ``prompt_scores`` asks for the prompt's too (its first token
    has none: nothing predicted it, or what did came before ``state``, which holds no logits). ``copies``: streams of
    their own that share this one's prompt and state, which is read once. ``keep_state``: ``state`` and
    ``prompt_state`` are there at the end.
    """

    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: Collection[int] = ()
    vocab_size: int | None = None
    state: State | None = None
    top_scores: int | None = None
    prompt_scores: bool = False
    copies: Sequence[Stream] = ()
    keep_state: bool = False

    tokens: list[int] = field(default_factory=list, init=False)
    """Drawn so far, without a stop id."""
    scores: list[TokenScore] = field(default_factory=list, init=False)
    of_prompt: list[TokenScore] = field(default_factory=list, init=False)
    """Of the prompt's tokens but the first."""
    prompt_state: State | None = field(default=None, init=False)
    """After the prompt."""
    finished: str | None = field(default=None, init=False)
    """``length``, ``stop`` (a stop id), ``cancelled`` or ``error``; None while it goes on."""
    error: Exception | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_options(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed)
        if not len(self.prompt):
            raise UserError("the prompt has no tokens; begin with the tokenizer's bos_id")
        self._read = 0
        self._draws = torch.Generator().manual_seed(self.seed)

    def cancel(self) -> None:
        """No further tokens; takes effect at the next step."""
        if self.finished is None:
            self.finished = "cancelled"

    @property
    def unread(self) -> list[int]:
        """Drawn tokens that ``state`` has not read: the last one, unless a stop id came after it."""
        return [] if self.finished == "stop" else self.tokens[-1:]


class StreamText:
    """The text of a stream's tokens, as far as it is certain, ended before the first of the ``stop`` strings."""

    def __init__(self, stream: Stream, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if any(not s for s in stop):
            raise UserError("a stop string is empty; leave it out")
        self.stream = stream
        self._characters, self._until = WholeCharacters(tokenizer), UntilStop(stop)
        self._ended, self._decoded = False, 0
        self._ends: list[int] = []  # where in the text each token that was taken ends
        self.text = ""
        """All that was taken."""

    @property
    def out(self) -> int:
        """How many tokens have all of their text taken, and not held back for a stop string or a whole character."""
        return bisect_right(self._ends, len(self.text))

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._until.stopped

    def take(self) -> str:
        """Text that became certain since the last call; all of it once the stream is finished. A stop string cancels
        the stream."""
        found = ""
        while len(self._ends) < len(self.stream.tokens) and not self.stopped:
            characters = self._characters.push(self.stream.tokens[len(self._ends)])
            self._decoded += len(characters)
            self._ends.append(self._decoded + self._characters.inside)
            found += self._until.push(characters)
        if self.stopped:
            self.stream.cancel()
        elif self.stream.finished is not None and not self._ended:
            self._ended = True
            found += self._until.push(self._characters.end())
            found += "" if self.stopped else self._until.end()
        self.text += found
        return found


class _Group:
    """Streams that draw, and their state as one batch."""

    def __init__(self) -> None:
        self.members: list[Stream] = []
        self.state: State | None = None

    def join(self, streams: Sequence[Stream], state: State) -> None:
        self.state = state if self.state is None else join_rows([self.state, state])
        self.members += streams

    def compact(self) -> list[Stream]:
        """Drop the finished, and return them."""
        alive = [row for row, stream in enumerate(self.members) if stream.finished is None]
        gone = [stream for stream in self.members if stream.finished is not None]
        if gone:
            for row, stream in enumerate(self.members):
                if stream.finished is not None and stream.keep_state:
                    stream.state = take_rows(self.state, [row])
            self.state = take_rows(self.state, alive) if alive else None
            self.members = [self.members[row] for row in alive]
        return gone


class Batch:
    """Continuous batching: streams come and go between steps.

    ``rows``: streams that run at once; further ones wait, first come first served. ``chunk``: prompt tokens read in
    one step, so that a long prompt does not hold up those that draw. Not safe to use from several threads.
    """

    def __init__(self, model: LanguageModel, *, rows: int = 16, chunk: int = 512) -> None:
        self.model, self.rows, self.chunk = model, rows, chunk
        self.device = model.head_weight.device
        self._waiting: deque[Stream] = deque()
        self._reading: list[Stream] = []
        self._groups: list[_Group] = []

    def add(self, stream: Stream) -> None:
        """Take a stream (its copies come along). UserError, one line, for a prompt outside the vocabulary."""
        limit = min(stream.vocab_size or self.model.vocab_size, self.model.vocab_size)
        outside = next((i for i in stream.prompt if not 0 <= i < limit), None)
        if outside is not None:
            raise UserError(f"prompt token {outside} is outside the vocabulary of {limit}; is it another tokenizer's?")
        self._waiting.append(stream)

    def __len__(self) -> int:
        """Streams that are not finished, waiting ones included."""
        return sum(1 + len(s.copies) for s in self._waiting) + self._running()

    def _running(self) -> int:
        return sum(1 + len(s.copies) for s in self._reading) + sum(len(g.members) for g in self._groups)

    @torch.no_grad()
    def step(self) -> list[Stream]:
        """Read a piece of waiting prompts, then draw a token for every stream that has one read.

        Returns the streams that drew a token or finished. An error in one stream's draw finishes that stream; one in
        the model's forward finishes the streams that were in it.
        """
        changed: list[Stream] = []
        for queue in (self._waiting, self._reading):
            for stream in [s for s in queue if all(one.finished is not None for one in (s, *s.copies))]:
                queue.remove(stream)
                changed += [stream, *stream.copies]
        for group in self._groups:
            changed += group.compact()  # cancelled since the last step
        self._groups = [group for group in self._groups if group.members]
        for group in self._groups:
            changed += self._draw_next(group)
        self._admit()
        changed += self._read()  # last: who joins now has drawn a token already
        for group in self._groups:
            group.compact()
        self._groups = [group for group in self._groups if group.members]
        return changed

    def _admit(self) -> None:
        running = self._running()
        while self._waiting and (not running or running + 1 + len(self._waiting[0].copies) <= self.rows):
            stream = self._waiting.popleft()
            self._reading.append(stream)
            running += 1 + len(stream.copies)

    def run(self) -> Iterator[Stream]:
        """Step until nothing is left; yields each stream as it finishes."""
        while len(self):
            yield from (stream for stream in self.step() if stream.finished is not None)

    # -- reading ---------------------------------------------------------------------------------------------

    def _read(self) -> list[Stream]:
        """One piece of the first prompt, and of those that can be read beside it."""
        if not self._reading:
            return []
        for stream in self._reading:
            if stream.state is None:
                stream.state = self.model.initial_state(1, self.device)
        first = self._reading[0]
        kind = (first.prompt_scores, signature(first.state))
        together = [s for s in self._reading if (s.prompt_scores, signature(s.state)) == kind][: self.rows]
        width = min([self.chunk, *(len(s.prompt) - s._read for s in together)])
        if first.prompt_scores:
            width = min(width, logits_width(self.model, len(together), self.chunk))
        try:
            tokens = torch.tensor([list(s.prompt[s._read : s._read + width]) for s in together], device=self.device)
            output = self.model(
                tokens, state=join_rows([s.state for s in together]), last_logits=not first.prompt_scores
            )
            last = output.logits[:, -1].cpu()
        except Exception as error:
            return self._fail(together, error)
        ready: list[Stream] = []
        for row, stream in enumerate(together):
            if stream.prompt_scores:
                known = stream.prompt[stream._read + 1 : stream._read + 1 + width]
                try:
                    stream.of_prompt += _scores(output.logits[row], known, stream.top_scores or 0)
                except UserError as error:
                    ready += self._fail([stream], error)
                    continue
            stream._read += width
            stream.state = take_rows(output.state, [row])
            if stream._read == len(stream.prompt):
                self._reading.remove(stream)
                ready += self._begin(stream, last[row])
        return ready

    def _begin(self, stream: Stream, logits: Tensor) -> list[Stream]:
        """Draw the first token of a stream whose prompt is read, and of its copies."""
        family = [stream, *stream.copies]
        for one in family:
            one.state = stream.state
            if one.keep_state:
                one.prompt_state = stream.state
            one.of_prompt = stream.of_prompt
            self._draw(one, logits)
        going = [one for one in family if one.finished is None]
        if going:
            state = take_rows(stream.state, [0] * len(going))
            kind = signature(state)
            group = next((g for g in self._groups if signature(g.state) == kind), None)
            if group is None:
                self._groups.append(group := _Group())
            group.join(going, state)
        for one in family:
            if one.finished is None or not one.keep_state:
                one.state = None  # the group has it
        return family

    def _fail(self, streams: Sequence[Stream], error: Exception) -> list[Stream]:
        failed: list[Stream] = []
        for stream in streams:
            if stream in self._reading:
                self._reading.remove(stream)
            for one in (stream, *stream.copies):
                if one.finished is None:
                    one.finished, one.error = "error", error
                    failed.append(one)
        return failed

    # -- drawing ---------------------------------------------------------------------------------------------

    def _draw_next(self, group: _Group) -> list[Stream]:
        """Read each member's last token and draw its next one."""
        members = group.members
        try:
            tokens = torch.tensor([stream.tokens[-1:] for stream in members], device=self.device)
            output = self.model(tokens, state=group.state, last_logits=True)
            logits = output.logits[:, -1].cpu()
        except Exception as error:
            return self._fail(members, error)
        group.state = output.state
        for stream, row in zip(members, logits, strict=True):
            self._draw(stream, row)
        return members

    def _draw(self, stream: Stream, logits: Tensor) -> None:
        if stream.finished is not None:
            return
        limit = min(stream.vocab_size or self.model.vocab_size, self.model.vocab_size)
        try:
            if len(stream.tokens) == stream.max_tokens:  # none is asked for
                check_finite(logits[:limit])
                stream.finished = "length"
                return
            token = sample(logits[:limit], stream._draws, stream.temperature, stream.top_k, stream.top_p)
            if token in stream.stop_ids:
                stream.finished = "stop"
                return
            if stream.top_scores is not None:
                stream.scores += _scores(logits[None], [token], stream.top_scores)
        except UserError as error:
            stream.finished, stream.error = "error", error
            return
        stream.tokens.append(token)
        if len(stream.tokens) == stream.max_tokens:
            stream.finished = "length"


def _scores(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Of ``tokens`` under the first rows of ``logits`` (positions, vocab). UserError where one is not finite."""
    if not len(tokens):
        return []
    each = logits[: len(tokens)].log_softmax(-1).cpu()
    check_finite(each)
    own = each.gather(1, torch.tensor(list(tokens))[:, None])[:, 0].tolist()
    best, ids = each.topk(min(top, each.shape[1])) if top else (torch.empty(len(own), 0), torch.empty(len(own), 0))
    return [
        TokenScore(int(token), value, tuple(zip(map(int, i), v, strict=True)))
        for token, value, v, i in zip(tokens, own, best.tolist(), ids.tolist(), strict=True)
    ]
