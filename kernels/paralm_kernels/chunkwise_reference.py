"""The loop over time that chunkwise.py's chunk form must equal: plain torch under autograd, one step after the other.

    plain        S_t = e^{d_t} S_{t−1} + g_t k_t v_tᵀ                       y_t = S_tᵀ q_t
    normalized   m_t = max(d_t + m_{t−1}, g_t),  C and n with e^{d_t + m_{t−1} − m_t} and e^{g_t − m_t},
                 y_t = C_tᵀ q̃_t / (max(|n_t·q̃_t|, e^{−m_t}) + eps)      (Beck et al., arXiv 2405.04517, section 2.3)

It is also the fast path of decoding, where the sequence is one step long.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ChunkState = tuple[Tensor, ...]
"""(S,) or (C, n, m), as chunkwise.py has them, in the compute dtype."""


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    state: ChunkState,
    reset: Tensor | None,
    normalized: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ChunkState]:
    """y (batch, time, heads, d_v) in v's dtype and the last state in the compute dtype; arguments as `chunkwise`'s,
    checked, the state given."""
    batch, time, groups, d_k = q.shape
    heads = v.shape[2]
    shared = heads // groups
    q, k, u = q.to(dtype), k.to(dtype), v.to(dtype)
    log_decay, gain = log_decay.to(dtype), gain.to(dtype)
    outputs = []
    for t in range(time):
        now = None if reset is None else reset[:, t, None]
        q_t, k_t = (x[:, t, :, None].expand(batch, groups, shared, d_k).reshape(batch, heads, d_k) for x in (q, k))
        if normalized:
            y, state = _normalized_step(q_t, k_t, u[:, t], log_decay[:, t], gain[:, t], state, now, eps)
        else:
            y, state = _plain_step(q_t, k_t, u[:, t], log_decay[:, t], gain[:, t], state, now)
        outputs.append(y)
    return torch.stack(outputs, 1).to(v.dtype), state


def _plain_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, gain: Tensor, state: ChunkState, reset: Tensor | None
) -> tuple[Tensor, ChunkState]:
    """q, k (batch, heads, d_k); v (batch, heads, d_v); log_decay, gain (batch, heads); reset (batch, 1)."""
    (s,) = state
    if reset is not None:
        s = s.masked_fill(reset[..., None, None], 0.0)
    s = log_decay.exp()[..., None, None] * s + (gain.unsqueeze(-1) * k).unsqueeze(-1) * v.unsqueeze(-2)
    return torch.einsum("bhk,bhkv->bhv", q, s), (s,)


def _normalized_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    state: ChunkState,
    reset: Tensor | None,
    eps: float,
) -> tuple[Tensor, ChunkState]:
    c, n, m_before = state
    if reset is not None:
        c = c.masked_fill(reset[..., None, None], 0.0)
        n = n.masked_fill(reset[..., None], 0.0)
        m_before = m_before.masked_fill(reset, -math.inf)
    m_before = m_before.detach()
    m = torch.maximum(log_decay.detach() + m_before, gain.detach())
    by = m.masked_fill(m == -math.inf, 0.0)  # nothing has been written yet: weights e^{−∞}, not NaN
    keep, write = torch.exp(log_decay + m_before - by), torch.exp(gain - by)
    write_k = write.unsqueeze(-1) * k
    c = keep[..., None, None] * c + write_k.unsqueeze(-1) * v.unsqueeze(-2)
    n = keep.unsqueeze(-1) * n + write_k
    q = q * q.shape[-1] ** -0.5
    inner, floor = torch.einsum("bhk,bhk->bh", q, n), torch.exp(-m)
    norm = torch.where(inner.abs() > floor, inner.abs(), floor) + eps
    return torch.einsum("bhk,bhkv->bhv", q, c) / norm.unsqueeze(-1), (c, n, m)
