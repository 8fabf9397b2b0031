"""Titans' neural long-term memory (arXiv 2501.00663, section 3): a small MLP a head, trained while it reads.

    ℓ(M; k, v) = ‖M(k) − v‖²  (summed over the head's channels)
    S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t'}; k_t, v_t)      M_t = (1 − α_t) M_{t−1} + S_t      y_t = M_t(q_t)

M is an MLP f itself, or with ``norm`` M(x) = x + γ ⊙ f(x)/√(|f(x)|² + 0.01): a residual and a norm around f, as TTT-MLP
has them (arXiv 2407.04620; there a layer norm). f's scale then changes nothing, and the larger its weights, the smaller
their steps.

t' is the start of the chunk, chunks counted from each row's own start (t' = C⌊(t−1)/C⌋, t = 1, 2, …): gradients are
taken at the chunk's first weights, everything else is per token, the read too. Within tiles of a chunk all is batched
matrix products (neural_memory_tile.py); chunks follow each other. Backward keeps the state of about every √n-th of n
tiles and recomputes the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import DTYPES, compute_dtype, same_device, shape
from .errors import ArgumentError
from .neural_memory_layout import Slot, plan
from .neural_memory_reference import loop
from .neural_memory_tile import ACTIVATIONS, Form, Gates, Layers, apply_memory, tile

MemoryState = dict[str, Any]
METHODS = ("auto", "torch", "reference")


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_keep: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    state: MemoryState | None = None,
    reset: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    chunk_size: int = 64,
    activation: str = "gelu",
    method: str = "auto",
    tile_size: int = 128,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, MemoryState]:
    """The memory's reads over a sequence, and the state that continues it.

    q, k: (batch, time, heads, d_in); v: (batch, time, heads, d_out). rate θ, log_momentum log η ≤ 0, log_keep
    log(1 − α) ≤ 0: (batch, time, heads); log_momentum None: no momentum (η = 0, the state has none), log_keep None: no
    forgetting. weights: the memory a sequence starts with, (heads, out, in) for each layer, biases (heads, out) each;
    activation "gelu" (exact) or "silu" between layers. norm: the gain γ (heads, d_out) of the norm and residual around
    M (d_in = d_out), None for neither. state: from a former call or ``memory_state``; reset: bool (batch, time), true
    where a new sequence starts.

    Returns y (batch, time, heads, d_out) like v, and the state, in at least float32: ``{"weights", "biases",
    "start_weights", "start_biases", "momentum_weights", "momentum_biases"}`` (tuples over layers, batch first; start:
    the weights gradients are taken at) and ``"position"`` int64 (batch,), tokens read of the running chunk (−1: a row
    that has not begun).
    Differentiable in every tensor, through the inner gradient too, and in the state both ways.

    method: "reference" is the loop over tokens. tile_size: tokens of a chunk that are taken at once; exact whatever it
    is. matmul_dtype: round operands of matrix products to this dtype (bfloat16 on a GPU); sums and state stay as they
    are. Raises ArgumentError for shapes, dtypes or devices that do not fit.
    """
    wide = _check(
        q, k, v, rate, log_momentum, log_keep, weights, biases, norm, reset, chunk_size, activation, method, tile_size
    )
    batch, time = q.shape[:2]
    depth = len(weights)
    norm = None if norm is None else norm.to(wide)
    initial = Layers(
        tuple(w.to(wide).expand(batch, *w.shape) for w in weights),
        tuple(c.to(wide).expand(batch, *c.shape) for c in biases or ()),
    )
    zero = None
    if log_momentum is not None:
        zero = Layers.of(tuple(torch.zeros_like(w) for w in initial.flat), depth)
    memory, start, momentum, position = initial, initial, zero, None
    if state is not None:
        memory, start, momentum, position = _unpack(state, initial, zero)
        now = position < 0 if reset is None else (position < 0) | reset[:, 0]
        memory, start = initial.where(now, memory), initial.where(now, start)
        momentum = None if momentum is None or zero is None else zero.where(now, momentum)
        position = torch.where(now, 0, position)
    if method == "reference":
        if position is None:
            position = torch.zeros(batch, dtype=torch.int64, device=q.device)
        by_head = [None if x is None else x.to(wide).transpose(1, 2) for x in (log_momentum, log_keep)]
        y, after = loop(
            q.to(wide).transpose(1, 2),
            k.to(wide).transpose(1, 2),
            v.to(wide).transpose(1, 2),
            (rate.to(wide).transpose(1, 2), by_head[0], by_head[1]),
            initial,
            (memory, start, momentum, position),
            reset,
            chunk_size,
            Form(activation, norm),
        )
        return y.transpose(1, 2).to(v.dtype), _pack(*after)
    layout = plan(position, reset if time > 1 else None, batch, time, chunk_size, tile_size)
    laid = tuple(None if x is None else layout.lay(x).transpose(1, 2) for x in (q, k, v, rate, log_momentum, log_keep))
    run = _Run(layout.slots, depth, len(biases or ()), activation, matmul_dtype, wide, momentum is not None)
    flat = [*memory.flat, *start.flat, *(momentum.flat if momentum is not None else ())]
    final: Sequence[Tensor]
    if len(layout.slots) == 1:  # nothing to recompute a state for
        read, final = run.step(layout.slots[0], laid, norm, initial, tuple(flat), read=True)
        assert read is not None
        y = read.to(v.dtype)
    else:
        y, *final = _Memory.apply(run, *laid, norm, *initial.flat, *flat)
    memory, start, momentum = run.split(tuple(final))
    return layout.restore(y.transpose(1, 2)), _pack(memory, start, momentum, layout.position.to(q.device))


def memory_state(
    batch: int,
    shapes: Sequence[tuple[int, int, int]],
    *,
    biases: bool = False,
    momentum: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> MemoryState:
    """The state before anything was read: position −1, which starts a row from the memory ``neural_memory`` is given,
    whatever the state holds (zeros), so that its weights get their gradient. shapes: (heads, out, in) of each layer.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def zeros() -> Layers:
        return Layers(
            tuple(torch.zeros(batch, *s, device=device, dtype=wide) for s in shapes),
            tuple(torch.zeros(batch, *s[:2], device=device, dtype=wide) for s in shapes if biases),
        )

    position = torch.full((batch,), -1, dtype=torch.int64, device=device)
    return _pack(zeros(), zeros(), zeros() if momentum else None, position)


def read_memory(
    q: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    norm: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """M(q) of a memory that stands still: q (batch, time, heads, d_in), weights (batch, heads, out, in) for each layer,
    biases (batch, heads, out), norm (heads, d_out) → (batch, time, heads, d_out) like q; computed in the dtype of the
    weights."""
    memory = Layers(tuple(weights), tuple(biases or ()))
    form = Form(activation, None if norm is None else norm.to(weights[0].dtype))
    y = apply_memory(memory, q.transpose(1, 2).to(weights[0].dtype), form)
    return y.transpose(1, 2).to(q.dtype)


def _pack(memory: Layers, start: Layers, momentum: Layers | None, position: Tensor) -> MemoryState:
    momentum = momentum or Layers((), ())
    return {
        "weights": memory.weights,
        "biases": memory.biases,
        "start_weights": start.weights,
        "start_biases": start.biases,
        "momentum_weights": momentum.weights,
        "momentum_biases": momentum.biases,
        "position": position,
    }


def _unpack(state: MemoryState, initial: Layers, zero: Layers | None) -> tuple[Layers, Layers, Layers | None, Tensor]:
    """The checked parts of a state, in the compute dtype."""
    parts = []
    for name, like in (("", initial), ("start_", initial), ("momentum_", zero or Layers((), ()))):
        for kind, expected in (("weights", like.weights), ("biases", like.biases)):
            given = state.get(f"{name}{kind}")
            what = f"neural_memory: state[{name + kind!r}]"
            if given is None or len(given) != len(expected):
                raise ArgumentError(f"{what} has {len(given or ())} layers, expected {len(expected)}")
            for n, (value, target) in enumerate(zip(given, expected)):
                shape(f"{what}[{n}]", value, tuple(target.shape), "(batch, heads, …) of the memory")
            parts.append(tuple(x.to(t.dtype) for x, t in zip(given, expected)))
    memory, start, momentum = (Layers(parts[i], parts[i + 1]) for i in (0, 2, 4))
    position = state["position"]
    shape("neural_memory: state['position']", position, (initial.weights[0].shape[0],), "(batch,)")
    return memory, start, momentum if zero is not None else None, position


class _Sizes(NamedTuple):
    slots: list[Slot]
    depth: int
    n_biases: int
    activation: str
    matmul_dtype: torch.dtype | None
    wide: torch.dtype
    momentum: bool


class _Run(_Sizes):
    """One call: its tiles, and how a flat list of tensors is a state."""

    @property
    def width(self) -> int:
        return self.depth + self.n_biases

    def split(self, flat: tuple[Tensor, ...]) -> tuple[Layers, Layers, Layers | None]:
        memory, start, momentum = (flat[i * self.width : (i + 1) * self.width] for i in range(3))
        last = Layers.of(momentum, self.depth) if self.momentum else None
        return Layers.of(memory, self.depth), Layers.of(start, self.depth), last

    def step(
        self,
        slot: Slot,
        pieces: Sequence[Tensor | None],
        norm: Tensor | None,
        initial: Layers,
        flat: tuple[Tensor, ...],
        read: bool,
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """One tile from the state ``flat`` to the next; pieces: q, k, v, rate, log η, log(1 − α) of the tile."""
        memory, start, momentum = self.split(flat)
        if slot.fresh is not None:
            memory, start = initial.where(slot.fresh, memory), initial.where(slot.fresh, start)
            if momentum is not None:
                zero = Layers.of(tuple(torch.zeros_like(s) for s in momentum.flat), self.depth)
                momentum = zero.where(slot.fresh, momentum)
        q, k, v, rate, log_momentum, log_keep = (None if p is None else p.to(self.wide) for p in pieces)
        assert k is not None
        assert v is not None
        assert rate is not None
        y, memory, momentum = tile(
            memory,
            start,
            momentum,
            q if read else None,
            k,
            v,
            Gates(rate, log_momentum, log_keep),
            slot.lengths,
            Form(self.activation, norm, self.matmul_dtype),
        )
        if isinstance(slot.ends, Tensor):
            start = memory.where(slot.ends, start)
        elif slot.ends:
            start = memory
        return y, (*memory.flat, *start.flat, *(momentum.flat if momentum is not None else ()))


def _pieces(laid: Sequence[Tensor | None], slot: Slot) -> list[Tensor | None]:
    return [None if x is None else x[:, :, slot.begin : slot.end].contiguous() for x in laid]


class _Memory(torch.autograd.Function):
    """(run; q, k, v, rate, log η, log(1 − α), all (batch, heads, time, …); γ; first memory; state) → (y, state).

    Saves the arguments and the state before every √n-th tile. Backward goes from the last such stretch to the first:
    the states inside it again without reads, then tile by tile forward once more and back.
    """

    @staticmethod
    def forward(ctx: Any, run: _Run, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        laid, norm = arguments[:6], arguments[6]
        rest = tuple(a for a in arguments[7:] if a is not None)  # none of these is None
        initial, flat = Layers.of(rest[: run.width], run.depth), rest[run.width :]
        stride = max(1, math.isqrt(len(run.slots)))
        kept: list[Tensor] = []
        outputs = []
        for n, slot in enumerate(run.slots):
            if n % stride == 0 and n:
                kept.extend(flat)
            y, flat = run.step(slot, _pieces(laid, slot), norm, initial, flat, read=True)
            assert y is not None
            assert laid[2] is not None
            outputs.append(y.to(laid[2].dtype))
        ctx.run, ctx.stride, ctx.n_arguments = run, stride, len(arguments)
        ctx.save_for_backward(*arguments, *kept)
        ctx.set_materialize_grads(False)
        # Each output a tensor of its own: the start of a chunk is the memory itself, and an argument may pass through.
        seen = {id(a) for a in arguments}
        final = []
        for tensor in flat:
            final.append(tensor.clone() if id(tensor) in seen else tensor)
            seen.add(id(tensor))
        return (torch.cat(outputs, dim=2), *final)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        saved, width = ctx.saved_tensors, run.width
        arguments, kept = saved[: ctx.n_arguments], saved[ctx.n_arguments :]
        laid, norm, initial, first = arguments[:6], arguments[6], arguments[7 : 7 + width], arguments[7 + width :]
        size = len(first)
        wanted = [x is not None and need for x, need in zip(laid, ctx.needs_input_grad[1:7])]
        grads: list[Tensor | None] = [torch.zeros_like(x) if w else None for x, w in zip(laid, wanted)]
        grad_norm: Tensor | None = None
        grad_initial: list[Tensor | None] = [None] * width
        grad_state: list[Tensor | None] = list(grad_final)
        for begin in reversed(range(0, len(run.slots), ctx.stride)):
            slots = run.slots[begin : begin + ctx.stride]
            group = begin // ctx.stride - 1
            states = [tuple(first) if begin == 0 else tuple(kept[group * size : (group + 1) * size])]
            for slot in slots[:-1]:
                _, flat = run.step(slot, _pieces(laid, slot), norm, Layers.of(initial, run.depth), states[-1], False)
                states.append(flat)
            for slot in reversed(slots):
                own, gain = [_leaf(p) for p in _pieces(laid, slot)], _leaf(norm)
                fresh = [_leaf(w) for w in initial] if slot.fresh is not None else list(initial)
                state = [_leaf(s) for s in states.pop()]
                with torch.enable_grad():
                    y, after = run.step(slot, own, gain, Layers.of(tuple(fresh), run.depth), tuple(state), read=True)  # type: ignore[arg-type]
                    assert y is not None
                pairs = [(a, g) for a, g in zip(after, grad_state) if g is not None and a.requires_grad]
                if grad_y is not None:
                    pairs.append((y, grad_y[:, :, slot.begin : slot.end].to(y.dtype)))
                targets: list[Tensor] = [p for p, w in zip(own, wanted) if w and p is not None]
                n_own = len(targets)
                n_fresh = width if slot.fresh is not None else 0
                targets += [*(fresh[:n_fresh]), *state, *([] if gain is None else [gain])]  # type: ignore[list-item]
                found: Sequence[Tensor | None] = [None] * len(targets)
                if pairs:
                    outputs, given = zip(*pairs)
                    found = torch.autograd.grad(outputs, targets, given, allow_unused=True)
                into = [g for g in grads if g is not None]
                for whole, part in zip(into, found[:n_own]):
                    if part is not None:
                        whole[:, :, slot.begin : slot.end] = part
                for n in range(n_fresh):
                    grad_initial[n] = _sum(grad_initial[n], found[n_own + n])
                if gain is not None:
                    *found, by_gain = found
                    grad_norm = _sum(grad_norm, by_gain)
                grad_state = list(found[n_own + n_fresh :])
        return (None, *grads, grad_norm, *grad_initial, *grad_state)


def _leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_keep: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    norm: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
    activation: str,
    method: str,
    tile_size: int,
) -> torch.dtype:
    what = "neural_memory: "
    if method not in METHODS:
        raise ArgumentError(f"{what}method is {method!r}; expected one of {', '.join(METHODS)}")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"{what}activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    for name, number in (("chunk_size", chunk_size), ("tile_size", tile_size)):
        if number < 1:
            raise ArgumentError(f"{what}{name} is {number}; expected at least 1")
    if not weights:
        raise ArgumentError(f"{what}weights is empty; expected (heads, out, in) for each layer")
    present = [("q", q), ("k", k), ("v", v), ("rate", rate), ("log_momentum", log_momentum), ("log_keep", log_keep)]
    present.append(("norm", norm))
    named = [(what + name, x) for name, x in present if x is not None]
    named += [(f"{what}weights[{n}]", w) for n, w in enumerate(weights)]
    named += [(f"{what}biases[{n}]", c) for n, c in enumerate(biases or ())]
    for name, x in named:
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"{name} must be a floating-point tensor, got {kind}")
    if q.ndim != 4 or 0 in q.shape:
        raise ArgumentError(f"{what}q is {tuple(q.shape)}, expected (batch, time, heads, d_in), none of them 0")
    batch, time, heads, d_in = q.shape
    shape(f"{what}k", k, tuple(q.shape), "as q")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ArgumentError(f"{what}v is {tuple(v.shape)}, expected {(batch, time, heads)} and d_out, as q")
    for name, gate in present[3:6]:
        if gate is not None:
            shape(what + name, gate, (batch, time, heads), f"(batch, time, heads) of q {tuple(q.shape)}")
    width = d_in
    for n, w in enumerate(weights):
        if w.ndim != 3 or w.shape[0] != heads or w.shape[2] != width:
            raise ArgumentError(f"{what}weights[{n}] is {tuple(w.shape)}, expected ({heads}, out, {width})")
        width = w.shape[1]
    if width != v.shape[3]:
        raise ArgumentError(f"{what}the last of weights gives {width} channels but v has {v.shape[3]}")
    if norm is not None:
        shape(f"{what}norm", norm, (heads, v.shape[3]), "(heads, d_out) of v")
        if d_in != v.shape[3]:
            raise ArgumentError(
                f"{what}norm adds q to M(q): as many channels of q as of v, got {d_in} and {v.shape[3]}"
            )
    if biases is not None and len(biases) not in (0, len(weights)):
        raise ArgumentError(f"{what}biases has {len(biases)} layers but weights {len(weights)}")
    for n, c in enumerate(biases or ()):
        shape(f"{what}biases[{n}]", c, tuple(weights[n].shape[:2]), f"(heads, out) of weights[{n}]")
    located = list(named)
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise ArgumentError(f"{what}reset must be a bool tensor (batch, time), got {kind}")
        shape(f"{what}reset", reset, (batch, time), f"(batch, time) of q {tuple(q.shape)}")
        located.append((f"{what}reset", reset))
    same_device(located[0], located[1:])
    return compute_dtype([(name, (x,)) for name, x in named])
