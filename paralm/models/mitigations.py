"""Mitigations of state collapse that need no training: switches on a model whose mixers admit them (inference only).

    scale     α ← c·α, u ← b·u          decay c in (0, 1] and input b > 0 of every step of a linear recurrence
    clip      h ← h·p/‖h‖ where ‖h‖ > p   a head's state, after every ``every``-th token of a sequence
    window    h_t = Σ over the last r tokens only (:func:`paralm_kernels.windowed_chunkwise`)

(arXiv 2410.07145, which scaled a 780M Mamba2 by c = 0.99999, b = 0.7.) A specification is text:
``decay=0.999,input=0.7`` or ``clip=10`` or ``clip=10,every=1`` or ``window=256``; several keys together are one
specification. What a mixer admits it says itself; the others are refused with the reason.

Clipping works on any mixer that names leaves of its state as free: :class:`Clipped` stands around the mixer, cuts the
sequence after tokens ``every``, 2·``every``, … of each row, counted from the row's start or last reset, and clips the
carried state there. The places depend on the position alone, so pieces equal the whole and rows do not see each other.
At ``every`` 1 it is the formula at every token, one step of the model at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import paralm_kernels
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paralm.errors import UserError
from paralm.models.hybrid import layer_mixers
from paralm.models.lm import LanguageModel
from paralm.models.mixers.base import Mixer, State, StateLeaf

KINDS = ("scale", "clip", "window")


@dataclass(frozen=True)
class Mitigation:
    """One specification. Raises UserError, one line, for values that cannot work."""

    decay: float = 1.0
    """c, in (0, 1]."""
    input: float = 1.0
    """b, above 0."""
    clip: float = math.inf
    """p, above 0: the largest norm of a head's state."""
    every: int = 16
    """Tokens between clips."""
    window: int | None = None
    """r, tokens."""

    def __post_init__(self) -> None:
        for key, good, wanted in (
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
            ("input", 0 < self.input < math.inf, "finite and above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("every", self.every >= 1, "at least 1"),
            ("window", self.window is None or self.window >= 1, "at least 1"),
        ):
            if not good:
                raise UserError(f"mitigation {key}={_text(getattr(self, key))}: it must be {wanted}")
        if self.clip < math.inf and self.window is not None:
            raise UserError("mitigation clip with window: more would leave the window than is left of it; give one")

    @classmethod
    def parse(cls, text: str) -> Mitigation:
        """``KEY=VALUE,…``. UserError, one line, for an unknown key or a value that is no number."""
        found: dict[str, float | int] = {}
        known = [field.name for field in fields(cls)]
        for part in filter(None, text.replace(" ", "").split(",")):
            key, _, value = part.partition("=")
            if key not in known:
                raise UserError(f"mitigation '{part}': no such key; there are {', '.join(known)}")
            if key in found:
                raise UserError(f"mitigation '{text}': {key} is given twice")
            try:
                found[key] = int(value) if key in ("every", "window") else float(value)
            except ValueError:
                what = "a whole number" if key in ("every", "window") else "a number"
                raise UserError(f"mitigation '{part}': {key} must be {what}") from None
        return cls(**found)  # type: ignore[arg-type]

    @property
    def kinds(self) -> list[str]:
        """Which of KINDS it does; none: it changes nothing."""
        on = (self.decay != 1 or self.input != 1, self.clip < math.inf, self.window is not None)
        return [kind for kind, does in zip(KINDS, on, strict=True) if does]

    def scaled(self, log_decay: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays and (not logarithmic) gains under c and b."""
        return log_decay + math.log(self.decay), gain * self.input

    def __str__(self) -> str:
        """The specification, shortest; :meth:`parse` reads it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        parts = [f"{name}={_text(value)}" for name, value in values.items()]
        return ",".join(part for part in parts if self.clip < math.inf or not part.startswith("every="))


def _text(value: float) -> str:
    """Every digit that counts, and no more."""
    return repr(value).removesuffix(".0")


@contextlib.contextmanager
def mitigated(model: LanguageModel, mitigation: Mitigation | None) -> Iterator[LanguageModel]:
    """The model under ``mitigation`` inside, as it was outside. Weights stay; states inside are of another structure
    and begin with ``model.initial_state`` or None.

    Raises UserError, one line, before anything is changed: a mixer that does not admit it, a model in training mode
    or already mitigated.
    """
    kinds = mitigation.kinds if mitigation is not None else []
    if mitigation is None or not kinds:
        yield model
        return
    check_admitted(model, mitigation)
    if model.training:
        raise UserError(f"mitigation {mitigation}: for inference only; call model.eval() first")
    inside = Mitigation(decay=mitigation.decay, input=mitigation.input, window=mitigation.window)
    before = model.mixers
    try:
        for block, mixer in zip(model.layers, before, strict=True):
            if inside.kinds:
                mixer.mitigation = inside
            if "clip" in kinds:
                block.mixer = Clipped(mixer, mitigation.clip, mitigation.every)
        yield model
    finally:
        for block, mixer in zip(model.layers, before, strict=True):
            block.mixer, mixer.mitigation = mixer, None


def check_admitted(model: LanguageModel, mitigation: Mitigation) -> None:
    """UserError, one line, if a mixer of the model does not admit it, or one is in force."""
    names = [spec["name"] for spec in layer_mixers(model.config)]
    for layer, (name, mixer) in enumerate(zip(names, model.mixers, strict=True)):
        if mixer.mitigation is not None or isinstance(mixer, Clipped):
            raise UserError(f"mitigation {mitigation}: another is in force; give both in one")
        for kind in mitigation.kinds:
            why = mixer.refusal(kind)
            if why is not None:
                raise UserError(f"mitigation {mitigation}: no {kind} in layer {layer}, {name}: {why}")


class Clipped(Mixer):
    """A mixer whose carried state is clipped; see the module. State: ``{"inner": the mixer's, "read": (batch,)}``, read
    the tokens since the row's start, int64."""

    def __init__(self, inner: Mixer, limit: float, every: int) -> None:
        super().__init__(inner.config, inner.context)
        self.inner, self.limit, self.every = inner, limit, every
        self.train(inner.training)

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`."""
        batch, time = x.shape[:2]
        inner, read = (None, None) if state is None else (state["inner"], state["read"])
        if read is None:
            read = torch.zeros(batch, dtype=torch.int64, device=x.device)
        counts = paralm_kernels.positions(read, reset, time) + 1
        due = counts % self.every == 0
        cuts = sorted({*(due.any(0).nonzero().flatten() + 1).tolist(), time})
        outputs, begin = [], 0
        for end in cuts:
            now = None if reset is None else reset[:, begin:end]
            y, inner = self.inner(x[:, begin:end], inner, now)
            outputs.append(y)
            inner = self._clip(inner, due[:, end - 1])
            begin = end
        self.stats = self.inner.stats
        return torch.cat(outputs, 1), {"inner": inner, "read": counts[:, -1].contiguous()}

    def _clip(self, state: State, rows: Tensor) -> State:
        if not bool(rows.any()):
            return state
        clipped = self.inner.clip_state(state, self.limit)
        if bool(rows.all()):
            return clipped
        return pytree.tree_map(
            lambda new, old: torch.where(rows.view(-1, *[1] * (old.ndim - 1)), new, old), clipped, state
        )

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The mixer's own, and nothing read."""
        inner = self.inner.initial_state(batch, device, dtype)
        where = pytree.tree_leaves(inner)[0].device
        return {"inner": inner, "read": torch.zeros(batch, dtype=torch.int64, device=where)}

    def leaf(self, path: str) -> StateLeaf:
        """The mixer's."""
        return self.inner.leaf(path.removeprefix("inner/")) if path.startswith("inner/") else StateLeaf()

    def extra_flops_per_token(self, seq_len: int) -> float:
        """The mixer's."""
        return self.inner.extra_flops_per_token(seq_len)
