"""The plain recurrence of chunkwise.py over the last ``window`` tokens only: what is older is taken out as it leaves.

    h_t = α_t h_{t−1} + u_t − (Π_{i=t−r+1..t} α_i) u_{t−r}        u_t = g_t k_t v_tᵀ, α = e^d, r the window
    so  h_t = Σ_{j=t−r+1..t} (Π_{i=j+1..t} α_i) u_j               y_t = h_tᵀ q_t

(sliding window by difference, arXiv 2410.07145, in the form that streams). The difference of two states,
h_t − Π α h_{t−r}, is the same in exact arithmetic but cancels where α ≈ 1; here rounding errors decay like the state
itself. A token is two steps of `chunkwise`, one that adds u_t and one, of decay 1, that adds −Π α u_{t−r}: the same
kernels, twice the work. Products of decays are differences of their logs' running sum, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunkwise import chunkwise
from .errors import ArgumentError
from .positions import positions

WindowState = dict[str, Tensor]
"""``S`` (batch, heads, d_k, d_v); the last ``window`` tokens' ``k``, ``v``, ``log_decay`` and ``gain``, oldest first,
(batch, window, …); ``read`` int64 (batch,), tokens read since the start."""


def windowed_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    gain: Tensor,
    window: int,
    state: WindowState | None = None,
    reset: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    method: str = "auto",
) -> tuple[Tensor, WindowState]:
    """As `chunkwise` (plain), each state made of the last ``window`` tokens, itself among them.

    Arguments and y as there; ``state`` as :data:`WindowState`, or None. While no row has read more than ``window``
    tokens it is `chunkwise` itself, to the bit. Feeding a sequence in pieces equals feeding it whole, to rounding.
    Raises ArgumentError.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ArgumentError(f"windowed_chunkwise: window is {window!r}; expected a whole number of at least 1")
    batch, time = log_decay.shape[:2]
    if state is None:
        sizes = k.shape[2], v.shape[2], k.shape[3], v.shape[3]
        state = window_state(batch, window, *sizes, dtype=k.dtype, device=k.device)
    if state["k"].shape[1] != window:
        raise ArgumentError(
            f"windowed_chunkwise: the state is of a window of {state['k'].shape[1]} tokens, window is {window}"
        )
    read = positions(state["read"], reset, time) + 1
    lines = {
        name: torch.cat((state[name].to(now.dtype), now), 1)
        for name, now in (("k", k), ("v", v), ("log_decay", log_decay), ("gain", gain))
    }
    leaving = read > window
    if bool(leaving.any()):
        total = lines["log_decay"].double().cumsum(1)
        gain = gain.to(torch.promote_types(gain.dtype, torch.float32))  # what is taken out is what was put in
        factor = (total[:, window:] - total[:, :time]).exp().to(gain.dtype) * lines["gain"][:, :time]
        factor = factor.masked_fill(~leaving.unsqueeze(-1), 0.0)
        y, after = chunkwise(
            q.repeat_interleave(2, 1),
            _alternate(k, lines["k"][:, :time]),
            _alternate(v, lines["v"][:, :time]),
            _alternate(log_decay, torch.zeros_like(log_decay)),
            _alternate(gain, -factor),
            state["S"],
            None if reset is None else _alternate(reset, torch.zeros_like(reset)),
            chunk_size=chunk_size,
            method=method,
        )
        y = y[:, 1::2]
    else:
        y, after = chunkwise(q, k, v, log_decay, gain, state["S"], reset, chunk_size=chunk_size, method=method)
    kept = {name: line[:, -window:].clone() for name, line in lines.items()}
    return y, {"S": after, **kept, "read": read[:, -1].contiguous()}


def window_state(
    batch: int,
    window: int,
    groups: int,
    heads: int,
    d_k: int,
    d_v: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> WindowState:
    """The state before anything was read; k and v in ``dtype``, the rest in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    gates = torch.zeros((batch, window, heads), dtype=wide, device=device)
    return {
        "S": gates.new_zeros((batch, heads, d_k, d_v)),
        "k": torch.zeros((batch, window, groups, d_k), dtype=dtype, device=device),
        "v": torch.zeros((batch, window, heads, d_v), dtype=dtype, device=device),
        "log_decay": gates,
        "gain": gates.clone(),
        "read": torch.zeros(batch, dtype=torch.int64, device=device),
    }


def _alternate(first: Tensor, second: Tensor) -> Tensor:
    """(batch, time, …) twice → (batch, 2 time, …), taking turns."""
    return torch.stack((first, second), 2).flatten(1, 2)
