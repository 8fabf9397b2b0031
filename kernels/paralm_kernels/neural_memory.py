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
from torch.utils import _pytree as pytree

from .autocast import no_autocast
from .checks import DTYPES, compute_dtype, same_device, shape, whole_numbers
from .dry import on_gpu
from .errors import ArgumentError
from .neural_memory_backward import tile_grads
from .neural_memory_layout import Slot, plan
from .neural_memory_reference import loop
from .neural_memory_tile import ACTIVATIONS, Form, Gates, Layers, Read, Tile, apply_memory, learn, read, update
from .once import once_differentiable

MemoryState = dict[str, Any]
_LONG = 16
"""Steps from which on "auto" compiles: what is shorter (generation) has a kernel of its own for each small size."""
METHODS = ("auto", "torch", "compiled", "reference")


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
    tile_size: int | None = None,
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

    method: "torch" as it stands; "compiled" (auto, on a GPU, but of few steps): what is between matrix products as
    kernels that torch's compiler writes; "reference": the loop over tokens. tile_size: tokens of a chunk that are taken
    at once, exact whatever it is; None: 256 where memory traffic decides (compiled), else 128. matmul_dtype: round
    operands of matrix products to this dtype (bfloat16 on a GPU); sums and state stay as they are. Raises ArgumentError
    for shapes, dtypes or devices that do not fit.
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
        with no_autocast(q):
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
    compiled = method == "compiled" or (method == "auto" and on_gpu(q) and time >= _LONG)
    tile_size = tile_size or (256 if compiled else 128)
    layout = plan(position, reset if time > 1 else None, batch, time, chunk_size, tile_size)
    laid = tuple(None if x is None else layout.lay(x).transpose(1, 2) for x in (q, k, v, rate, log_momentum, log_keep))
    run = _Run(layout.slots, depth, len(biases or ()), activation, matmul_dtype, wide, momentum is not None, compiled)
    flat = [*memory.flat, *start.flat, *(momentum.flat if momentum is not None else ())]
    with no_autocast(q):
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
    with no_autocast(q):
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
    compiled: bool


class _Run(_Sizes):
    """One call: its tiles, and how a flat list of tensors is a state."""

    @property
    def width(self) -> int:
        return self.depth + self.n_biases

    def split(self, flat: tuple[Tensor, ...]) -> tuple[Layers, Layers, Layers | None]:
        memory, start, momentum = (flat[i * self.width : (i + 1) * self.width] for i in range(3))
        last = Layers.of(momentum, self.depth) if self.momentum else None
        return Layers.of(memory, self.depth), Layers.of(start, self.depth), last

    def learn(
        self,
        slot: Slot,
        pieces: Sequence[Tensor | None],
        norm: Tensor | None,
        initial: Layers,
        flat: tuple[Tensor, ...],
    ) -> Tile:
        """One tile from the state ``flat``; pieces: q, k, v, rate, log η, log(1 − α) of it."""
        memory, start, momentum = self.split(flat)
        if slot.fresh is not None:
            memory, start = initial.where(slot.fresh, memory), initial.where(slot.fresh, start)
            if momentum is not None:
                zero = Layers.of(tuple(torch.zeros_like(s) for s in momentum.flat), self.depth)
                momentum = zero.where(slot.fresh, momentum)
        k, v, rate, log_momentum, log_keep = (None if p is None else p.to(self.wide) for p in pieces[1:])
        assert k is not None
        assert v is not None
        assert rate is not None
        gates = Gates(rate, log_momentum, log_keep)
        return learn(memory, start, momentum, k, v, gates, slot.lengths, self.form(norm))

    def after(
        self, slot: Slot, learned: Tile, norm: Tensor | None, initial: Layers, flat: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The state after a tile that has learned from the state ``flat``."""
        start = self.split(flat)[1]
        memory, momentum = update(learned, self.form(norm), self.n_biases > 0)
        if slot.fresh is not None:
            start = initial.where(slot.fresh, start)
        if isinstance(slot.ends, Tensor):
            start = memory.where(slot.ends, start)
        elif slot.ends:
            start = memory
        return (*memory.flat, *start.flat, *(momentum.flat if momentum is not None else ()))

    def read(self, pieces: Sequence[Tensor | None], learned: Tile, norm: Tensor | None) -> tuple[Tensor, Read]:
        """y of a tile, in the compute dtype."""
        assert pieces[0] is not None
        return read(learned, pieces[0].to(self.wide), self.form(norm))

    def form(self, norm: Tensor | None) -> Form:
        return Form(self.activation, norm, self.matmul_dtype, self.compiled)

    def back(
        self,
        slot: Slot,
        learned: Tile,
        reads: Read,
        norm: Tensor | None,
        flat: tuple[Tensor, ...],
        grad_y: Tensor | None,
        grad_flat: Sequence[Tensor | None],
    ) -> _StepGrads:
        """The gradient of a tile, from those to y and to the state after it."""
        if grad_y is None and all(g is None for g in grad_flat):
            return _StepGrads([None] * 6, None, None, [None] * len(flat))
        memory, start, momentum = (list(grad_flat[n * self.width : (n + 1) * self.width]) for n in range(3))
        if slot.ends is not False:
            for n, g in enumerate(start):
                if g is not None:
                    ends = None if slot.ends is True else slot.ends.reshape(-1, *(1,) * (g.dim() - 1))
                    memory[n] = _sum(memory[n], g if ends is None else torch.where(ends, g, 0.0))
                    start[n] = None if ends is None else torch.where(ends, 0.0, g)
        given = [torch.zeros_like(x) if g is None else g for g, x in zip((*memory, *momentum), flat + flat)]
        found = tile_grads(
            learned,
            reads,
            None if grad_y is None else grad_y.to(self.wide),
            Layers.of(tuple(given[: self.width]), self.depth),
            Layers.of(tuple(given[self.width :]), self.depth) if self.momentum else None,
            slot.lengths,
            self.form(norm),
        )
        by_state: list[Tensor | None] = [*found.memory.flat]
        by_state += [_sum(g, new) for g, new in zip(start, found.start.flat)]
        by_state += list(found.momentum.flat) if found.momentum is not None else []
        by_initial = None
        if slot.fresh is not None:
            masked = [(slot.fresh.reshape(-1, *(1,) * (g.dim() - 1)), g) for g in by_state if g is not None]
            used = [torch.where(fresh, g, 0.0) for fresh, g in masked[: 2 * self.width]]
            by_initial = [a + b for a, b in zip(used[: self.width], used[self.width :])]
            by_state = [torch.where(fresh, 0.0, g) for fresh, g in masked]
        return _StepGrads([found.q, found.k, found.v, *found.gates], found.gain, by_initial, by_state)


class _StepGrads(NamedTuple):
    """To the pieces of a tile, γ, the first memory (where a row starts anew), and the state before the tile."""

    pieces: list[Tensor | None]
    norm: Tensor | None
    initial: list[Tensor] | None
    state: list[Tensor | None]


def _pieces(laid: Sequence[Tensor | None], slot: Slot) -> list[Tensor | None]:
    return [None if x is None else x[:, :, slot.begin : slot.end].contiguous() for x in laid]


class _Memory(torch.autograd.Function):
    """(run; q, k, v, rate, log η, log(1 − α), all (batch, heads, time, …); γ; first memory; state) → (y, state).

    Saves the arguments and the state before every √n-th tile. Backward goes from the last such stretch to the first:
    the states inside it again without reads, then tile by tile forward once more and back. Of a single tile all that
    its gradient needs is kept instead.
    """

    @staticmethod
    def forward(ctx: Any, run: _Run, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        given = _plain(arguments)
        laid, norm = given[:6], given[6]
        rest = tuple(a for a in given[7:] if a is not None)  # none of these is None
        initial, flat = Layers.of(rest[: run.width], run.depth), rest[run.width :]
        stride = max(1, math.isqrt(len(run.slots)))
        kept: list[Tensor | None] = []
        outputs = []
        for n, slot in enumerate(run.slots):
            if n % stride == 0 and n:
                kept.extend(flat)
            pieces = _pieces(laid, slot)
            learned = run.learn(slot, pieces, norm, initial, flat)
            y, reads = run.read(pieces, learned, norm)
            flat = run.after(slot, learned, norm, initial, flat)
            assert laid[2] is not None
            outputs.append(y.to(laid[2].dtype))
            if len(run.slots) == 1:
                kept, ctx.spec = pytree.tree_flatten((learned, reads))
        ctx.run, ctx.stride, ctx.n_arguments = run, stride, len(arguments)
        ctx.save_for_backward(*arguments, *kept)
        ctx.set_materialize_grads(False)
        # Each output a tensor of its own: the start of a chunk is the memory itself, and an argument may pass through.
        seen = {id(a) for a in given}
        final = []
        for tensor in flat:
            final.append(tensor.clone() if id(tensor) in seen else tensor)
            seen.add(id(tensor))
        return (torch.cat(outputs, dim=2), *final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        saved, width = _plain(ctx.saved_tensors), run.width
        arguments, kept = saved[: ctx.n_arguments], saved[ctx.n_arguments :]
        laid, norm = arguments[:6], arguments[6]
        initial, first = Layers.of(arguments[7 : 7 + width], run.depth), arguments[7 + width :]
        size = len(first)
        wanted = [x is not None and need for x, need in zip(laid, ctx.needs_input_grad[1:7])]
        grads: list[Tensor | None] = [torch.zeros_like(x) if w else None for x, w in zip(laid, wanted)]
        grad_norm: Tensor | None = None
        grad_initial: list[Tensor | None] = [None] * width
        grad_state: Sequence[Tensor | None] = grad_final
        with no_autocast(arguments[0]):
            for begin in reversed(range(0, len(run.slots), ctx.stride)):
                slots = run.slots[begin : begin + ctx.stride]
                group = begin // ctx.stride - 1
                states = [tuple(first) if begin == 0 else tuple(kept[group * size : (group + 1) * size])]
                for slot in slots[:-1]:
                    learned = run.learn(slot, _pieces(laid, slot), norm, initial, states[-1])
                    states.append(run.after(slot, learned, norm, initial, states[-1]))
                for slot in reversed(slots):
                    state, part = states.pop(), slice(slot.begin, slot.end)
                    if len(run.slots) == 1:
                        learned, reads = pytree.tree_unflatten(kept, ctx.spec)
                    else:
                        pieces = _pieces(laid, slot)
                        learned = run.learn(slot, pieces, norm, initial, state)
                        reads = run.read(pieces, learned, norm)[1]
                    given = None if grad_y is None else grad_y[:, :, part]
                    found = run.back(slot, learned, reads, norm, state, given, grad_state)
                    for whole, piece in zip(grads, found.pieces):
                        if whole is not None and piece is not None:
                            whole[:, :, part] = piece
                    for n, g in enumerate(found.initial or ()):
                        grad_initial[n] = _sum(grad_initial[n], g)
                    grad_norm = _sum(grad_norm, found.norm)
                    grad_state = found.state
        return (None, *grads, grad_norm, *grad_initial, *grad_state)


def _plain(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Without what autograd knows of them, which would be two kernels where one does. What is given twice is one."""
    plain = {id(x): x.detach() for x in tensors if x is not None}
    return tuple(None if x is None else plain[id(x)] for x in tensors)


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
    tile_size: int | None,
) -> torch.dtype:
    what = "neural_memory: "
    if method not in METHODS:
        raise ArgumentError(f"{what}method is {method!r}; expected one of {', '.join(METHODS)}")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"{what}activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    whole_numbers(what, chunk_size=chunk_size, tile_size=tile_size)
    for name, layers in (("weights", weights), ("biases", biases)):
        if isinstance(layers, Tensor):
            raise ArgumentError(f"{what}{name} must be a tuple, a tensor for each layer, got one tensor")
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
