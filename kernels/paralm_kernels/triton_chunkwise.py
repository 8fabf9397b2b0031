"""Launches chunkwise's kernels (triton_chunkwise_kernels.py, triton_chunkwise_backward.py), forward and backward.

Time goes in segments of whole chunks, so that the states at the starts of chunks never take more than a set room;
forward and backward both make them anew. Backward keeps the arguments and, normalized, y and n·q̃. With q, k and v in
bfloat16 the products take their operands, states among them, rounded to that and sum in float32; states are carried in
float32. Products in float32 are exact to float32 (three TF32 products each on NVIDIA). With float16, beyond whose
65,504 a state may well go, operands are float32 (rounded to TF32 on NVIDIA, as fine as float16), and so are the states
at the starts of chunks. No atomic sums: the same numbers every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_chunkwise_backward as backward
from . import triton_chunkwise_kernels as forward
from .chunkwise_reference import ChunkState
from .chunkwise_torch import GradEnd, Plan, chunkwise_torch, past
from .errors import ArgumentError
from .once import once_differentiable
from .triton_launch import Launch
from .triton_solver import check_device, interpreted

SEGMENT = 1 << 27
"""Numbers in the states of a segment: 256 MiB in bfloat16."""
PROGRAMS = 512
"""So many, a few for each multiprocessor; heads that share q and k share a program beyond that."""
CHUNKS = (16, 32, 64, 128, 256)
_DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
_ROWS = 65535
"""The largest second axis of a grid."""
_SCAN = 512
"""Steps that m's scan takes at a time."""
STAGES = 2
"""Loads that are under way ahead of a loop's products."""


def chunkwise_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    state: ChunkState,
    reset: Tensor | None,
    plan: Plan,
    strict: bool,
) -> tuple[Tensor, ChunkState]:
    """As chunkwise_torch. strict: refuse what the kernels do not take (ArgumentError), else torch computes it."""
    taken = takes(q, v, plan, strict)
    if taken is None:
        return chunkwise_torch(q, k, v, log_decay, gain, state, reset, plan)
    y, *end = _Fused.apply(taken, reset, q, k, v, log_decay, gain, *state)
    return y, tuple(end)


def takes(q: Tensor, v: Tensor, plan: Plan, strict: bool) -> Plan | None:
    """The plan by which the kernels compute this, in chunks of the nearest size that they take; None where they cannot.
    strict: ArgumentError, one line, where they cannot or the chunk is another."""
    wide = plan.dtype == torch.float64 and not interpreted()
    rows = v.shape[0] * v.shape[2]
    if not strict:
        if wide or rows > _ROWS:
            return None
        nearest = min(CHUNKS, key=lambda size: abs(size - plan.chunk_size))
        plan = replace(plan, chunk_size=nearest)
    check_device(q.device)
    if plan.chunk_size not in CHUNKS:
        raise ArgumentError(
            f"chunkwise: chunk_size is {plan.chunk_size}; method 'triton' takes one of {', '.join(map(str, CHUNKS))}"
        )
    if wide:
        raise ArgumentError("chunkwise: method 'triton' takes no float64 on a GPU, q is float64; use method='torch'")
    if rows > _ROWS:
        raise ArgumentError(
            f"chunkwise: v has {v.shape[0]} batch rows × {v.shape[2]} heads; method 'triton' takes {_ROWS} together"
        )
    return plan


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, reset: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        problem = Problem(plan, reset, tensors)
        y = torch.empty_like(tensors[2], memory_format=torch.contiguous_format)
        with context(problem.q):
            end, kept = outputs(problem, y)
        ctx.plan = plan
        ctx.save_for_backward(reset, *tensors, *kept)
        ctx.set_materialize_grads(False)
        if plan.normalized:
            ctx.mark_non_differentiable(end[-1])
        return (y, *end)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_end: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, *tensors = ctx.saved_tensors
        count = 8 if ctx.plan.normalized else 6
        problem, kept = Problem(ctx.plan, reset, tensors[:count]), tensors[count:]
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in problem.tensors[:5])
        with context(problem.q):
            return (None, None, *grads, *gradients(problem, kept, grad_y, grad_end, grads))


def context(x: Tensor) -> AbstractContextManager[Any]:
    """In which `outputs`, `end`, `gradients` and `entry_gradient` are called."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def constants(
    normalized: bool, eps: float, given: tl.dtype, d_k: int, d_v: int, chunk: int, vendor: str
) -> dict[str, Any]:
    """What the kernels are compiled for; given: the dtype of q."""
    compute = tl.float64 if given == tl.float64 else tl.float32
    dot = tl.float32 if given == tl.float16 else given
    exact = "tf32" if given == tl.float16 else "tf32x3"
    return {
        "NORM": normalized,
        "EPS": eps,
        "SCALE": d_k**-0.5 if normalized else 1.0,
        "DOT": dot,
        "COMPUTE": compute,
        "PRECISION": exact if dot == tl.float32 and vendor == "cuda" else "ieee",
        "DK": d_k,
        "DV": d_v,
        "L": chunk,
        "BLOCK": _SCAN,
        **blocks(dot, d_k, d_v, chunk),
    }


def blocks(dot: tl.dtype, d_k: int, d_v: int, chunk: int) -> dict[str, int]:
    """Steps and columns of a tile."""
    most = 64 if dot.primitive_bitwidth == 16 else 32
    return {"BT": min(most, chunk)} | {
        name: max(16, min(most, triton.next_power_of_2(width))) for name, width in (("BK", d_k), ("BV", d_v))
    }


_TWO_TILES = ("grad_q_kernel", "grad_k_kernel")
"""These hold a tile of the gradient twice, beside one of steps by steps."""


def shaped(name: str, chosen: dict[str, Any], vendor: str) -> tuple[dict[str, Any], int]:
    """A kernel's constants and warps: those of _TWO_TILES spill with a whole head in a tile, or on four warps on NVIDIA
    (eight of AMD's have half the registers each)."""
    if name not in _TWO_TILES:
        return chosen, 4
    return {**chosen, "BV": min(chosen["BV"], 32)}, 8 if vendor == "cuda" else 4


class Problem:
    """The arguments, with q, k and v such that heads lie side by side, and the launching of kernels."""

    def __init__(self, plan: Plan, reset: Tensor | None, tensors: Sequence[Tensor]) -> None:
        self.plan, self.reset = plan, reset
        self.q, self.k, self.v, self.log_decay, self.gain, *self.state = tensors
        self.tensors = tensors
        self.q, self.k, self.v = (_packed(x) for x in (self.q, self.k, self.v))
        self.batch, self.time, self.groups, self.d_k = self.q.shape
        self.heads, self.d_v = self.v.shape[2:]
        self.rows, self.shared = self.batch * self.heads, self.heads // self.groups
        self.vendor = "hip" if torch.version.hip else "cuda"
        given = _DOT[self.q.dtype]
        self.given = constants(plan.normalized, plan.eps, given, self.d_k, self.d_v, plan.chunk_size, self.vendor)
        if interpreted():
            self.given["PRECISION"] = "wide"
        self.given |= {"heads": self.heads, "groups": self.groups, "HAS_RESET": reset is not None}
        self.tiles_k, self.tiles_v = -(-self.d_k // self.given["BK"]), -(-self.d_v // self.given["BV"])
        self.subs = plan.chunk_size // self.given["BT"]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.plan.dtype, device=self.q.device)

    def segments(self) -> list[tuple[int, int]]:
        """(first step, step after the last): whole chunks, but for the last."""
        chunks = min(_ROWS, max(1, SEGMENT // (self.rows * self.d_k * self.d_v)))
        steps = chunks * self.plan.chunk_size
        return [(start, min(start + steps, self.time)) for start in range(0, self.time, steps)]

    def run(self, name: str, grid: tuple[int, ...], given: dict[str, Any]) -> None:
        kernel = _NAMED[name]
        every, warps = shaped(name, {**self.given, **given}, self.vendor)
        arguments = {argument: every[argument] for argument in kernel.arg_names}
        kernel[grid](**arguments, num_warps=warps, num_stages=STAGES)


def _packed(x: Tensor) -> Tensor:
    """x with its last two axes side by side; that is so for a slice of a wider projection, which is not copied."""
    return x if x.stride(3) == 1 and (x.stride(2) == x.shape[3] or x.shape[2] == 1) else x.contiguous()


def _big(name: str, x: Tensor) -> dict[str, Any]:
    return {f"{name}_ptr": x, f"{name}_batch": x.stride(0), f"{name}_step": x.stride(1)}


class _Segment:
    """A segment's views and weights, and the states of its chunks."""

    def __init__(self, problem: Problem, start: int, stop: int, state: ChunkState) -> None:
        self.problem, self.cut = problem, slice(start, stop)
        plan, rows, size = problem.plan, problem.rows, problem.plan.chunk_size
        self.time, self.chunks = stop - start, -(-(stop - start) // size)
        padded = self.chunks * size
        d, g = (self._gate(x) for x in (problem.log_decay, problem.gain))
        none = d  # stands for what a kernel does not read
        reset = None if problem.reset is None else problem.reset[:, self.cut].contiguous()
        self.sequence = None if reset is None else _sequence(reset, self.chunks, size)
        names = ("hi", "r", "c", "w", "a")
        weights = dict(zip(names, problem.empty(len(names), rows, padded), strict=True))
        self.given: dict[str, Any] = {f"{name}_ptr": value for name, value in weights.items()}
        self.given |= {"d_ptr": d, "g_ptr": g, "reset_ptr": none if reset is None else reset.view(torch.uint8)}
        self.given |= {"time": self.time, "chunks": self.chunks, "padded": padded}
        self.given |= (
            _big("q", problem.q[:, self.cut]) | _big("k", problem.k[:, self.cut]) | _big("v", problem.v[:, self.cut])
        )
        self.given["first_ptr"] = problem.empty(rows, padded, dtype=torch.int32)
        self.given["keep_ptr"] = problem.empty(rows, self.chunks)
        self.given["m_ptr"] = none
        self.first, self.m = state, None
        if plan.normalized:
            self.given["m_first_ptr"] = state[2].contiguous()
            self.given["m_ptr"] = self.m = problem.empty(rows, padded + 1)
            self.run("stabilizer_kernel", (rows,))
        self.run("weights_kernel", (rows, self.chunks))
        for name in ("n", "n_first", "n_last", "rho", "dn", "dnorm", "dn_last", "dn_first", "inner"):
            self.given[f"{name}_ptr"] = none

    def _gate(self, x: Tensor) -> Tensor:
        """(row, steps) of (batch, time, heads)."""
        return x[:, self.cut].to(self.problem.plan.dtype).transpose(1, 2).contiguous()

    def run(self, name: str, grid: tuple[int, ...], **given: Any) -> None:
        self.problem.run(name, grid, {**self.given, **given})

    def states(self, store: bool = True) -> ChunkState:
        """The state at the end; leaves those at the starts of chunks behind, where they are stored."""
        p = self.problem
        last = p.empty(p.batch, p.heads, p.d_k, p.d_v)
        self.given |= {"s_first_ptr": self.first[0].contiguous(), "s_last_ptr": last}
        shape = (p.rows, self.chunks, p.d_k)
        kept = None if p.q.dtype == torch.float16 else p.q.dtype
        self.given["s_ptr"] = p.empty(*shape, p.d_v, dtype=kept) if store else last
        if p.plan.normalized:
            norm_last = p.empty(p.batch, p.heads, p.d_k)
            self.given |= {"n_first_ptr": self.first[1].contiguous(), "n_last_ptr": norm_last}
            self.given["n_ptr"] = p.empty(*shape) if store else norm_last
        self.run("states_kernel", (p.tiles_k, p.tiles_v, p.rows), STORE=store)
        if self.m is None:
            return (last,)
        return last, norm_last, self.m[:, -1].clone().view(p.batch, p.heads)


def _sequence(reset: Tensor, chunks: int, size: int) -> Tensor:
    """Which sequence of its chunk a step is in, (batch, chunk, step)."""
    full = torch.nn.functional.pad(reset, (0, chunks * size - reset.shape[1]))
    return full.unflatten(1, (chunks, size)).cumsum(-1)


def outputs(problem: Problem, y: Tensor) -> tuple[ChunkState, tuple[Tensor, ...]]:
    """As chunkwise_torch's; y has a head's columns side by side. Kept: y and n·q̃ of every segment laid end to end (row,
    steps), where normalized."""
    state: ChunkState = tuple(problem.state)
    inner = []
    for start, stop in problem.segments():
        segment = _Segment(problem, start, stop, state)
        state = segment.states()
        if problem.plan.normalized:
            inner.append(problem.empty(problem.rows, segment.given["padded"]))
            segment.given["inner_ptr"] = inner[-1]
        grid = (segment.chunks * problem.subs, problem.rows, problem.tiles_v)
        segment.run("outputs_kernel", grid, **_big("y", y[:, segment.cut]))
    return state, ((y, torch.cat(inner, 1)) if inner else ())


def end(problem: Problem) -> ChunkState:
    """As chunkwise_torch's."""
    state: ChunkState = tuple(problem.state)
    for start, stop in problem.segments():
        state = _Segment(problem, start, stop, state).states(store=False)
    return state


def _starts(problem: Problem) -> Iterator[tuple[int, int, ChunkState]]:
    """Every segment with the state at its start."""
    state: ChunkState = tuple(problem.state)
    for start, stop in problem.segments():
        yield start, stop, state
        if stop < problem.time:
            state = _Segment(problem, start, stop, state).states(store=False)


def gradients(
    problem: Problem, kept: Sequence[Tensor], grad_y: Tensor | None, grad_end: GradEnd, grads: Sequence[Tensor]
) -> ChunkState:
    """As chunkwise_torch's; those of q, k and v have their last two axes side by side."""
    grad_state = _at_end(problem, grad_end)
    for segment in _reversed(problem, kept, grad_y):
        grad_state = _pull_back(segment, grad_state, tuple(x[:, segment.cut] for x in grads))
    return _at_start(problem, grad_state)


def entry_gradient(problem: Problem, kept: Sequence[Tensor], grad_y: Tensor | None, grad_end: GradEnd) -> ChunkState:
    """As chunkwise_torch's."""
    grad_state = _at_end(problem, grad_end)
    for segment in _reversed(problem, kept, grad_y):
        grad_state, _ = _grad_states(segment, grad_state)
    return _at_start(problem, grad_state)


def _at_end(p: Problem, grad_end: GradEnd) -> list[Tensor]:
    parts = 2 if p.plan.normalized else 1
    ends = zip(p.state[:parts], grad_end[:parts], strict=True)
    return [p.empty(*s.shape).zero_() if g is None else g.contiguous() for s, g in ends]


def _at_start(problem: Problem, grad_state: list[Tensor]) -> ChunkState:
    return (*grad_state, torch.zeros_like(problem.state[2])) if problem.plan.normalized else tuple(grad_state)


def _reversed(p: Problem, kept: Sequence[Tensor], grad_y: Tensor | None) -> Iterator[_Segment]:
    """From the last segment to the first, with its states and with dy, through the division where normalized."""
    dy = _packed(torch.zeros_like(p.v) if grad_y is None else grad_y.to(p.v.dtype))
    for start, stop, state in reversed(list(_starts(p))):
        segment = _Segment(p, start, stop, state)
        segment.states()
        segment.given |= _big("dy", dy[:, segment.cut])
        if p.plan.normalized:
            y, inner = kept
            padded = segment.given["padded"]
            rho, dn = p.empty(2, p.rows, padded)
            segment.given |= _big("y", y[:, segment.cut]) | {"rho_ptr": rho, "dn_ptr": dn}
            segment.given["inner_ptr"] = inner[:, start : start + padded].contiguous()
            segment.run("norm_back_kernel", (segment.chunks * p.subs, p.rows))
        yield segment


def _grad_states(segment: _Segment, last: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The gradient of the state before a segment, and what flows past the ends of its chunks, by tiles; leaves those of
    the states at the starts of chunks behind."""
    p, given = segment.problem, segment.given
    first = [torch.empty_like(x) for x in last]
    given |= {"ds_last_ptr": last[0], "ds_first_ptr": first[0], "ds_ptr": torch.empty_like(given["s_ptr"])}
    if p.plan.normalized:
        given |= {"dn_last_ptr": last[1], "dn_first_ptr": first[1], "dnorm_ptr": torch.empty_like(given["n_ptr"])}
    passed = p.empty(p.rows, segment.chunks, p.tiles_k * p.tiles_v)
    segment.run("grad_states_kernel", (p.tiles_k, p.tiles_v, p.rows), end_ptr=passed)
    return first, passed


def _pull_back(segment: _Segment, last: list[Tensor], grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Writes a segment's part of the gradients of q, k, v, log_decay and gain; returns that of the state before it."""
    p, given, chunks = segment.problem, segment.given, segment.chunks
    first, end = _grad_states(segment, last)
    segment.run("grad_v_kernel", (chunks * p.subs, p.rows, p.tiles_v), **_big("dv", grads[2]))
    splits = _splits(p, chunks)
    flows = []
    for name, grad in (("q", grads[0]), ("k", grads[1])):
        part = grad.unsqueeze(0)
        if splits > 1:
            part = p.empty(splits, p.batch, segment.time, p.groups, p.d_k)
        flows.append(p.empty(p.tiles_k, p.rows, chunks * p.plan.chunk_size))
        options = {**_big(f"d{name}", part[0]), f"d{name}_split": part.stride(0), "flow_ptr": flows[-1]}
        grid = (chunks * p.subs, p.batch * p.groups * splits, p.tiles_k)
        segment.run(f"grad_{name}_kernel", grid, each=p.shared // splits, **options)
        if splits > 1:
            torch.sum(part, 0, out=grad) if grad.dtype == part.dtype else grad.copy_(part.sum(0))
    shape = (p.batch, p.heads, chunks, p.plan.chunk_size)
    ending, starting = (flow.sum(0).view(shape) for flow in flows)
    grads[4].copy_(starting.flatten(2)[..., : segment.time].transpose(1, 2))
    if not p.plan.normalized:
        padded = (0, given["padded"] - segment.time)
        starting = starting * torch.nn.functional.pad(given["g_ptr"], padded).view(shape)
    at_end = end.sum(-1).view(p.batch, p.heads, chunks, 1)
    passing = past(segment.sequence, (ending - starting).permute(0, 2, 3, 1), at_end.permute(0, 2, 3, 1))
    grads[3].copy_(passing.flatten(1, 2)[:, : segment.time])
    return first


def _splits(problem: Problem, chunks: int) -> int:
    """How many programs share the heads of a group: the fewest that make PROGRAMS, or one for each head."""
    programs = chunks * problem.subs * problem.batch * problem.groups * problem.tiles_k
    counts = [count for count in range(1, problem.shared + 1) if problem.shared % count == 0]
    return next((count for count in counts if count * programs >= PROGRAMS), problem.shared)


_PLAIN_KERNELS = (
    forward.weights_kernel,
    forward.states_kernel,
    forward.outputs_kernel,
    backward.grad_states_kernel,
    backward.grad_q_kernel,
    backward.grad_k_kernel,
    backward.grad_v_kernel,
)
_KERNELS = (*_PLAIN_KERNELS, forward.stabilizer_kernel, backward.norm_back_kernel)
_NAMED = {kernel.__name__: kernel for kernel in _KERNELS}
_CHECKED = (("ssd", False, 128, 64, 256), ("mlstm", True, 256, 512, 64))
"""Compiled by default: name, normalized, d_k, d_v and chunk of Mamba2 and of the 7B mLSTM."""
_ALIKE = {"q", "k", "v", "y", "dy", "dq", "dk", "dv"}
"""Arguments in the dtype of q; s and ds are too, but for float16."""
_OTHER = {"reset_ptr": "*u8", "first_ptr": "*i32"}


def default_launches(dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Launch]:
    """Every kernel at the sizes of Mamba2 and of mLSTM, for each vendor; float64 is for the interpreter alone."""
    launches = []
    for given in dtypes:
        if given == "fp64":
            continue
        dot = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[given]
        for vendor, targets in (("cuda", ("sm_80", "sm_90")), ("hip", ("gfx942",))):
            for form, normalized, d_k, d_v, chunk in _CHECKED:
                chosen = constants(normalized, 1e-6, dot, d_k, d_v, chunk, vendor) | {"HAS_RESET": True, "STORE": True}
                for kernel in _KERNELS if normalized else _PLAIN_KERNELS:
                    label = f"{form} {d_k}x{d_v} {given}"
                    launches.append(_launch(kernel, label, given, *shaped(kernel.__name__, chosen, vendor), targets))
    return launches


def _launch(
    kernel: Any, label: str, given: str, chosen: dict[str, Any], warps: int, targets: tuple[str, ...]
) -> Launch:
    signature = {}
    alike = _ALIKE if given == "fp16" else {*_ALIKE, "s", "ds"}
    for name in kernel.arg_names:
        short = name.removesuffix("_ptr")
        pointer = _OTHER.get(name, f"*{given if short in alike else 'fp32'}")
        signature[name] = "constexpr" if name.isupper() else "i32" if short == name else pointer
    # Triton's launcher sees these to be multiples of 16 for the sizes of models: pointers, strides of time and batch.
    aligned = tuple(n for n in signature if n != "reset_ptr" and n.endswith(("_ptr", "_batch", "_step")))
    values = {name: chosen[name] for name in signature if name.isupper()}
    name = f"{kernel.__name__} {label}"
    return Launch(name, kernel, signature, values, warps, STAGES, aligned, targets)
