"""One linear recurrence of matrices with a scalar decay per head, in chunks: Mamba2's SSD and xLSTM's mLSTM.

    plain        S_t = e^{d_t} S_{t−1} + g_t k_t v_tᵀ                       y_t = S_tᵀ q_t

    normalized   m_t = max(d_t + m_{t−1}, g_t)      F = e^{d_t + m_{t−1} − m_t}      I = e^{g_t − m_t}
                 C_t = F C_{t−1} + I k_t v_tᵀ       n_t = F n_{t−1} + I k_t
                 y_t = C_tᵀ q̃_t / (max(|n_t·q̃_t|, e^{−m_t}) + eps)         q̃ = q / √d_k

d is the log of the decay, g the gain of the step (its log where normalized). SSD (Dao & Gu, arXiv 2405.21060) is the
plain one with q = C, k = B, d = dt·A, g = dt; mLSTM (Beck et al., arXiv 2405.04517) the normalized one with
d = log σ(f), g = i. m only keeps numbers in range and cancels but for eps, so it is a constant in every gradient; the
normaliser's gradient is whole. Three faces with one result: `reference_chunkwise`, the loop over time under autograd;
"torch", chunks as batched matmuls on any device (chunkwise_torch.py); "triton", fused kernels (triton_chunkwise.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import fused
from .autocast import no_autocast
from .checks import DTYPES, compute_dtype, same_device, shape
from .chunkwise_reference import loop
from .chunkwise_torch import ChunkState, Plan, chunkwise_torch
from .errors import ArgumentError

METHODS = ("auto", "torch", "triton")


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    state: Tensor | tuple[Tensor, Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
    *,
    normalized: bool = False,
    chunk_size: int | None = None,
    method: str = "auto",
    eps: float = 1e-6,
) -> tuple[Tensor, Any]:
    """The outputs of a sequence and the state that continues it; differentiable in all inputs and the state.

    q, k: (batch, time, groups, d_k); v: (batch, time, heads, d_v), heads a multiple of groups: head h reads group
    h // (heads / groups). q, k and v are of one dtype: float16, bfloat16, float32 or float64. log_decay, at most 0,
    and gain: (batch, time, heads), finite, of any of these dtypes; gain is the factor of the step, with normalized its
    log. state: S (batch, heads, d_k, d_v); with normalized the tuple of C (batch, heads, d_k, d_v), n (batch, heads,
    d_k) and m (batch, heads); None is the initial one, zero and m = −∞. reset: bool (batch, time); where true the state
    before that step is the initial one and no gradient passes. Computed in at least float32; float64 does not mix.

    chunk_size: steps that are done side by side; the result does not depend on it. None: 64 in torch, and in the
    kernels what their arithmetic says is fastest for these widths. method: "torch", "triton" (needs a GPU or Triton's
    interpreter; chunk_size then is a power of two from 16 to 256) or "auto": triton on a GPU, with the nearest such
    chunk. eps: added to the normaliser.

    Returns y (batch, time, heads, d_v) in the dtype of v, and the state in the compute dtype. Memory: a backward pass
    keeps only the arguments and computes the states at the starts of chunks again. Raises ArgumentError.
    """
    plan = plan_of(check(q, k, v, log_decay, gain, state, reset, normalized), normalized, chunk_size, method, eps)
    dtype = plan.dtype
    begin = initial_state(q, v, dtype, normalized) if state is None else given_state(state, dtype)
    every = (q, k, v, log_decay, gain, *begin)
    if q.shape[1] == 1 and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in every)):
        with no_autocast(q):
            y, end = loop(q, k, v, log_decay, gain, begin, reset, normalized, eps, dtype)
    elif method == "triton" or (method == "auto" and fused.by_default(q)):
        run = fused.kernels("triton_chunkwise", "chunkwise: ").chunkwise_triton
        y, end = run(q, k, v, log_decay, gain, begin, reset, plan, strict=method == "triton")
    else:
        y, end = chunkwise_torch(q, k, v, log_decay, gain, begin, reset, plan)
    return y, (end if normalized else end[0])


def plan_of(dtype: torch.dtype, normalized: bool, chunk_size: int | None, method: str, eps: float) -> Plan:
    """The options of `chunkwise`, looked at."""
    if method not in METHODS:
        raise ArgumentError(f"chunkwise: method is {method!r}; expected one of {', '.join(METHODS)}")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ArgumentError(f"chunkwise: chunk_size is {chunk_size!r}; expected a whole number of at least 1")
    if not (math.isfinite(eps) and eps >= 0):
        raise ArgumentError(f"chunkwise: eps is {eps}; expected a finite number of at least 0")
    return Plan(normalized, chunk_size, eps, dtype)


def reference_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    state: Tensor | tuple[Tensor, Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
    *,
    normalized: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Any]:
    """`chunkwise` as a loop over time in plain torch under autograd: slow, obviously right. Same arguments."""
    dtype = check(q, k, v, log_decay, gain, state, reset, normalized)
    begin = initial_state(q, v, dtype, normalized) if state is None else given_state(state, dtype)
    with no_autocast(q):
        y, end = loop(q, k, v, log_decay, gain, begin, reset, normalized, eps, dtype)
    return y, (end if normalized else end[0])


def initial_state(q: Tensor, v: Tensor, dtype: torch.dtype, normalized: bool) -> ChunkState:
    (batch, _, heads, d_v), d_k = v.shape, q.shape[3]
    first = torch.zeros((batch, heads, d_k, d_v), dtype=dtype, device=v.device)
    if not normalized:
        return (first,)
    return first, first.new_zeros((batch, heads, d_k)), first.new_full((batch, heads), -math.inf)


def given_state(state: Tensor | tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> ChunkState:
    given = (state,) if isinstance(state, Tensor) else state
    return tuple(part.to(dtype) for part in given)


def check(q: Any, k: Any, v: Any, log_decay: Any, gain: Any, state: Any, reset: Any, normalized: bool) -> torch.dtype:
    """Refuses what cannot be computed, one line each; the dtype to compute in."""
    given = [("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("gain", gain)]
    for name, part in zip(("C", "n", "m") if normalized else ("S",), _parts(state, normalized), strict=False):
        given.append((f"state {name}", part))
    for name, value in given:
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"chunkwise: {name} must be a floating-point tensor, got {kind}")
    for name, value, form in (("q", q, "(batch, time, groups, d_k)"), ("v", v, "(batch, time, heads, d_v)")):
        if value.ndim != 4 or 0 in value.shape:
            raise ArgumentError(f"chunkwise: {name} is {tuple(value.shape)}, expected {form}, none of them 0")
    batch, time, groups, d_k = q.shape
    heads, d_v = v.shape[2:]
    shape("chunkwise: k", k, tuple(q.shape), "as q")
    shape("chunkwise: v", v, (batch, time, heads, d_v), f"(batch, time) as q {tuple(q.shape)}")
    if heads % groups:
        raise ArgumentError(f"chunkwise: v has {heads} heads and q has {groups} groups; expected a multiple of groups")
    for name, value in given[3:5]:
        shape(f"chunkwise: {name}", value, (batch, time, heads), f"(batch, time, heads) of v {tuple(v.shape)}")
    expected = ((batch, heads, d_k, d_v), (batch, heads, d_k), (batch, heads))
    for (name, value), full in zip(given[5:], expected, strict=False):
        shape(f"chunkwise: {name}", value, full, f"for q {tuple(q.shape)} and v {tuple(v.shape)}")
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise ArgumentError(f"chunkwise: {name} is {value.dtype} but q is {q.dtype}; give both one dtype")
    located = [(f"chunkwise: {name}", value) for name, value in given]
    dtype = compute_dtype([(name, (value,)) for name, value in located])
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise ArgumentError(f"chunkwise: reset must be a bool tensor (batch, time), got {kind}")
        shape("chunkwise: reset", reset, (batch, time), f"(batch, time) of q {tuple(q.shape)}")
        located.append(("chunkwise: reset", reset))
    same_device(located[0], located[1:])
    return dtype


def _parts(state: Any, normalized: bool) -> tuple[Any, ...]:
    if state is None:
        return ()
    if not normalized:
        if not isinstance(state, Tensor):
            raise ArgumentError(f"chunkwise: state must be one tensor S, got {type(state).__name__}")
        return (state,)
    if isinstance(state, Tensor) or not isinstance(state, (tuple, list)) or len(state) != 3:
        count = f" of {len(state)}" if isinstance(state, (tuple, list)) else ""
        raise ArgumentError(f"chunkwise: state must be a tuple (C, n, m), got {type(state).__name__}{count}")
    return tuple(state)
