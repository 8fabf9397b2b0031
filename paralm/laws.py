"""The laws every mixer obeys, as functions: the tests run them on the registered mixers, anyone on their own.

    pieces    f(x) = f(x[:k]) then f(x[k:], state), ragged and one step at a time: outputs, final state, gradients
    decode    the same without gradients, one step at a time, as generation does
    reset     a reset at t = a fresh start at t, whatever came before; nothing flows back across it
    rows      rows of a batch do not see each other
    causal    an output does not depend on later inputs
    state     every leaf a tensor with the batch first; None means initial_state; nothing is changed in place
    bounded   the state's size does not depend on the length (mixers that declare it)
    gradient  agrees with the difference quotient along random directions

All in float64, where equal means to 1e-9 of the largest value (the difference quotient: 1e-6). A mixer that obeys
them can be trained in pieces, streamed, generated from and saved by code that knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from paralm_kernels.laws import LawResult
from torch import Tensor
from torch.utils import _pytree as pytree

from paralm.models.mixers.base import LayerContext, Mixer, State
from paralm.models.parameters import initialize, refuse_unsaved
from paralm.registry import validate_mixer

TOLERANCE = 1e-9
QUOTIENT_TOLERANCE = 1e-6
"""Central differences with a step of 1e-6 are good to about 1e-9 of the value; the rest is curvature."""


class LawBroken(Exception):
    """Raised inside a law by the first thing that breaks it; ``worst`` in units of what is allowed."""

    def __init__(self, detail: str, worst: float = float("inf")) -> None:
        super().__init__(detail)
        self.worst = worst


def check_mixer(
    name: str,
    config: Mapping[str, Any] | None = None,
    *,
    laws: Iterable[str] | None = None,
    d_model: int = 32,
    time: int = 19,
    seed: int = 0,
) -> list[LawResult]:
    """Hold the laws against the mixer registered as ``name``, with ``config`` as its own keys.

    ``laws``: some of LAWS, default all. ``time``: tokens tried; more than the mixer's chunk, if it has one. Returns a
    result for each law; a law that ends in an exception is a failed one. Raises ConfigError for an unknown name or
    keys. A cell has laws of its own, :func:`paralm_kernels.laws.check_cell`.
    """
    entry, keys = validate_mixer({"name": name, **(config or {})})

    wanted = set(LAWS if laws is None else laws)

    def build() -> _Subject:
        return _Subject(entry.value, keys, d_model, time, seed)

    return [_hold(law, check, build) for law, check in LAWS.items() if law in wanted]


def _hold(law: str, check: Callable[[_Subject], float], build: Callable[[], _Subject]) -> LawResult:
    try:
        worst = check(build())
    except LawBroken as broken:
        return LawResult(law, False, broken.worst, str(broken))
    except Exception as error:
        # A stranger's mixer may fail in any way, and that is a finding like any other.
        return LawResult(law, False, float("inf"), " ".join(f"{type(error).__name__}: {error}".split()))
    return LawResult(law, True, worst, "holds")


class _Subject:
    """A small float64 mixer with weights away from their special initial values, and things to feed it."""

    batch = 3

    def __init__(
        self, make: Callable[[Any, LayerContext], Mixer], keys: Any, d_model: int, time: int, seed: int
    ) -> None:
        self.mixer = make(keys, LayerContext(d_model, layer=1, n_layers=2)).double()
        refuse_unsaved(self.mixer, type(self.mixer).__name__)
        initialize(self.mixer, seed)
        self.draws = torch.Generator().manual_seed(seed)
        self.d_model, self.time = d_model, time
        with torch.no_grad():
            for parameter in self.mixer.parameters():  # zeros and ones would hide what they multiply
                parameter.add_(self.normal(*parameter.shape), alpha=0.1)
        self._check_form()

    @torch.no_grad()
    def _check_form(self) -> None:
        """Refuse what is no (y, state): the laws would stumble over it without a word of what is wrong."""
        x = torch.full((self.batch, 2, self.d_model), 0.5, dtype=torch.float64)
        result = self.mixer(x)
        if not isinstance(result, tuple) or len(result) != 2:
            got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
            raise LawBroken(f"forward must return (y, state), got {got}")
        y, state = result
        if not isinstance(y, Tensor) or y.shape != x.shape:
            form = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise LawBroken(f"forward returns a y of {form}, expected {tuple(x.shape)}, (batch, time, d_model), as x")
        if not isinstance(state, dict | tuple):
            raise LawBroken(f"forward returns a state that is a {type(state).__name__}; make it a dict or a tuple")

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draws, dtype=torch.float64)

    def x(self, time: int | None = None) -> Tensor:
        return self.normal(self.batch, time or self.time, self.d_model)

    def resets(self) -> Tensor:
        """Some inside, one at the very start of a row, two in a row."""
        reset = torch.rand(self.batch, self.time, generator=self.draws) < 0.1
        reset[0, 0] = True
        reset[1, 4:6] = True
        return reset

    def state(self) -> State:
        """A state that something was read into."""
        with torch.no_grad():
            return self.mixer(self.x(7))[1]

    def splits(self) -> list[list[int]]:
        """Lengths of pieces, each list summing to ``time``."""
        rest = self.time - 1
        return [[1, rest], [rest, 1], [2, 5, 1, self.time - 8], [1] * self.time]


def _compare(what: str, got: Any, expected: Any, tolerance: float = TOLERANCE) -> float:
    """The largest difference over the leaves, relative to the largest value (at least 1), in units of what is
    allowed; LawBroken if it is more."""
    left, right = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    if pytree.tree_structure(got) != pytree.tree_structure(expected):
        raise LawBroken(f"{what}: the structure differs")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            a, b = _filled(a, b), _filled(b, a)
        if a.shape != b.shape:
            raise LawBroken(f"{what}: {tuple(a.shape)} where {tuple(b.shape)} is expected")
        if a.dtype != b.dtype:
            raise LawBroken(f"{what}: {a.dtype} where {b.dtype} is expected")
        if a.numel() == 0:
            continue
        special = ~torch.isfinite(b) | ~torch.isfinite(a)
        if bool((special & (a != b)).any()):
            raise LawBroken(f"{what}: not finite where the other is, or the other way round")
        a, b = (v.detach().masked_fill(special, 0).double() for v in (a, b))
        difference = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
        if not difference <= tolerance:
            raise LawBroken(f"{what}: differs by {difference:.1e}, allowed {tolerance:.0e}", difference / tolerance)
        worst = max(worst, difference / tolerance)
    return worst


def _filled(value: Tensor | None, like: Tensor | None) -> Tensor:
    """A gradient that does not exist is one of zeros."""
    if value is not None:
        return value
    return torch.zeros((), dtype=torch.float64) if like is None else torch.zeros_like(like)


def _run(
    mixer: Mixer, x: Tensor, pieces: Sequence[int], state: State | None, reset: Tensor | None
) -> tuple[Tensor, State]:
    """Outputs of all pieces in one, and the final state."""
    outputs, at = [], 0
    for length in pieces:
        part = None if reset is None else reset[:, at : at + length]
        y, state = mixer(x[:, at : at + length], state, part)
        outputs.append(y)
        at += length
    return torch.cat(outputs, dim=1), state


def _floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if leaf.is_floating_point()]


def _score(tree: Any, seed: int = 1) -> Tensor:
    """A scalar that depends on every finite element of the floating leaves, each with a weight of its own."""
    draws = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for leaf in _floating(tree):
        weight = torch.randn(leaf.shape, generator=draws, dtype=torch.float64)
        total = total + (weight * torch.where(torch.isfinite(leaf), leaf, 0.0)).sum()
    return total


def _gradients(mixer: Mixer, score: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    wanted = [*leaves, *mixer.parameters()]
    return list(torch.autograd.grad(score, wanted, allow_unused=True))


def _attached(tree: Any) -> Any:
    """A copy whose floating leaves ask for gradients."""
    return pytree.tree_map(lambda v: v.detach().clone().requires_grad_(v.is_floating_point()), tree)


def _law_pieces(s: _Subject) -> float:
    x, reset, state, worst = s.x(), s.resets(), s.state(), 0.0
    for start, cuts in ((None, None), (state, None), (state, reset)):
        reference = None
        for pieces in ([s.time], *s.splits()):
            given, begin = _attached(x), _attached(start) if start is not None else None
            y, final = _run(s.mixer, given, pieces, begin, cuts)
            gradients = _gradients(s.mixer, _score((y, final)), [given, *_floating(begin or ())])
            result = (y.detach(), pytree.tree_map(torch.Tensor.detach, final), gradients)
            if reference is None:
                reference = result
                continue
            where = f"in pieces of {pieces if len(set(pieces)) > 1 else 'one step'}"
            for what, got, expected in zip(("outputs", "final state", "gradients"), result, reference, strict=True):
                worst = max(worst, _compare(f"{what} {where}", got, expected))
    return worst


@torch.no_grad()
def _law_decode(s: _Subject) -> float:
    x, start = s.x(), s.state()
    whole = _run(s.mixer, x, [s.time], start, None)
    steps = _run(s.mixer, x, [1] * s.time, start, None)
    return max(_compare("outputs", steps[0], whole[0]), _compare("final state", steps[1], whole[1]))


def _law_reset(s: _Subject) -> float:
    state, probe, worst = s.state(), s.x(5), 0.0
    for cuts in ([0, 0, 0], [6, 6, 6], [1, s.time - 1, 8]):
        x = _attached(s.x())
        reset = torch.zeros(s.batch, s.time, dtype=torch.bool)
        for row, at in enumerate(cuts):
            reset[row, at] = True
        y, final = s.mixer(x, state, reset)
        after = s.mixer(probe, final)[0]  # states are compared by what follows: a cache may hold what no one sees
        kept = [(y[row, at:], after[row]) for row, at in enumerate(cuts)]
        gradients = _gradients(s.mixer, _score(kept), [x])
        fresh = []
        for row, at in enumerate(cuts):
            y_row, final_row = s.mixer(x[row : row + 1, at:])
            fresh.append((y_row[0], s.mixer(probe[row : row + 1], final_row)[0][0]))
            if s.mixer.bounded_state:
                own = pytree.tree_map(lambda leaf, row=row: leaf[row : row + 1], final)
                worst = max(worst, _compare(f"final state after a reset at {at}", own, final_row))
        worst = max(worst, _compare(f"outputs after resets at {cuts}", kept, fresh))
        expected = _gradients(s.mixer, _score(fresh), [x])
        worst = max(worst, _compare(f"gradients after resets at {cuts}", gradients, expected))
    return worst


def _law_rows(s: _Subject) -> float:
    x, reset, state = s.x(), s.resets(), s.state()
    with torch.no_grad():
        y, final = s.mixer(x, state, reset)
        worst = 0.0
        for row in range(s.batch):
            one = slice(row, row + 1)
            mine = pytree.tree_map(lambda leaf, one=one: leaf[one], state)
            y_row, final_row = s.mixer(x[one], mine, reset[one])
            worst = max(worst, _compare(f"outputs of row {row} alone", y_row, y[one]))
            if s.mixer.bounded_state:
                expected = pytree.tree_map(lambda leaf, one=one: leaf[one], final)
                worst = max(worst, _compare(f"final state of row {row} alone", final_row, expected))
    return worst


def _law_causal(s: _Subject) -> float:
    x, worst = s.x(), 0.0
    with torch.no_grad():
        whole = s.mixer(x)[0]
        for at in (1, s.time // 2, s.time - 1):
            changed = torch.cat((x[:, :at], s.x(s.time - at)), dim=1)
            worst = max(worst, _compare(f"outputs before a change at {at}", s.mixer(changed)[0][:, :at], whole[:, :at]))
    return worst


def _law_state(s: _Subject) -> float:
    x, reset = s.x(), s.resets()
    first = s.mixer.initial_state(s.batch, x.device, x.dtype)
    with torch.no_grad():
        state = s.mixer(x, first)[1]
    for kind, tree in (("initial_state", first), ("the returned state", state)):
        for leaf in pytree.tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                raise LawBroken(f"{kind} has a leaf that is no tensor: {type(leaf).__name__}")
            if leaf.dim() == 0 or len(leaf) != s.batch:
                raise LawBroken(f"{kind} has a leaf of shape {tuple(leaf.shape)}; the batch, {s.batch}, comes first")
    kinds = [[(leaf.dtype, leaf.dim()) for leaf in pytree.tree_leaves(tree)] for tree in (first, state)]
    if kinds[0] != kinds[1] or pytree.tree_structure(first) != pytree.tree_structure(state):
        raise LawBroken("initial_state and the returned state differ in structure or dtype")
    worst = _compare("from initial_state instead of None", s.mixer(x, first), s.mixer(x))
    before = pytree.tree_map(torch.Tensor.clone, state)
    y, _ = s.mixer(_attached(x), state, reset)
    y.sum().backward()
    s.mixer(x[:, :1], state)
    return max(worst, _compare("a state that was read from, so changed in place", state, before))


def _law_bounded(s: _Subject) -> float:
    if not s.mixer.bounded_state:
        return 0.0
    with torch.no_grad():
        sizes = [sum(leaf.numel() for leaf in pytree.tree_leaves(s.mixer(s.x(n))[1])) for n in (1, s.time, 4 * s.time)]
    if len(set(sizes)) > 1:
        raise LawBroken(f"{sizes} numbers after 1, {s.time} and {4 * s.time} tokens; if it must, bounded_state = False")
    return 0.0


def _law_gradient(s: _Subject) -> float:
    x, reset, state, worst = _attached(s.x()), s.resets(), _attached(s.state()), 0.0
    leaves = [x, *_floating(state), *s.mixer.parameters()]

    def score() -> Tensor:
        return _score(s.mixer(x, state, reset))

    gradients = torch.autograd.grad(score(), leaves, allow_unused=True)
    step = 1e-6
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf.numel() == 0:
            continue
        direction = s.normal(*leaf.shape)
        with torch.no_grad():
            original = leaf.clone()
            leaf.copy_(original + step * direction)
            above = score()
            leaf.copy_(original - step * direction)
            quotient = (above - score()) / (2 * step)
            leaf.copy_(original)
        expected = torch.zeros_like(quotient) if gradient is None else (gradient * direction).sum()
        what = f"difference quotient along a direction of a leaf {tuple(leaf.shape)}"
        worst = max(worst, _compare(what, quotient, expected, QUOTIENT_TOLERANCE))
    return worst


LAWS: dict[str, Callable[[_Subject], float]] = {
    "pieces": _law_pieces,
    "decode": _law_decode,
    "reset": _law_reset,
    "rows": _law_rows,
    "causal": _law_causal,
    "state": _law_state,
    "bounded": _law_bounded,
    "gradient": _law_gradient,
}
"""Every law by name."""
