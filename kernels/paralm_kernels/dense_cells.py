"""The four cells whose recurrence is dense within a head: one step of each, and the transpose of its derivative.

A step reads pre-activations in which the recurrent products and biases are already summed; h_ is the state before:

    lstm    i, f, z, o:   c = σ(f) c_ + σ(i) tanh z;   h = σ(o) tanh c             (Gers et al. 2000)
    gru     r, z, a, n:   h = σ(z) h_ + (1 − σ(z)) tanh(n + σ(r) a)                (cuDNN's: a = R_n h_ + b_a)
    elman   z:            h = tanh z                                               (Elman 1990)
    slstm   i, f, z, o:   m = max(log σ(f) + m_, i);   F = e^{log σ(f)+m_−m};   I = e^{i−m}
                          c = F c_ + I tanh z;   n = F n_ + I;   h = σ(o) c/n      (arXiv 2405.04517)

A sequence starts with zeros, sLSTM's m with −∞: then F = 0 and m = i without a special case, n is at least 1 ever
after, and every gradient is finite. m only keeps numbers small: h does not change when c and n are scaled and m moved
against it. But m is carried, so its gradient is the true one, through the maximum (where both sides are equal: the
past's).

Backward, a step is linear in what comes back. `linearize` computes its coefficients for all steps at once, `pull` is
the step: from the gradients of the states after it to those of its pre-activations, written into the tensors given, and
of the states before it (h's without what comes back through the recurrent product; None where that is all).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = tuple[Tensor, ...]
Pulled = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class DenseKind:
    """What a cell consists of.

    rows: its pre-activations; the first `recurrent` of them have a recurrent product. input_rows: the rows that an
    input is added to, in the order of the inputs' gates. bias_rows: the row of each bias, in the order of the biases.
    state: its components, h first; initial: what each starts with.
    """

    name: str
    rows: tuple[str, ...]
    recurrent: int
    input_rows: tuple[int, ...]
    bias_rows: tuple[int, ...]
    state: tuple[str, ...]
    initial: tuple[float, ...]
    step: Callable[[Tensors, Tensors], Tensors]
    linearize: Callable[[Tensors, Tensors, Tensors], Tensors]
    pull: Callable[[Tensors, Tensors, Tensors], Pulled]

    @property
    def gates(self) -> tuple[str, ...]:
        """The names of the inputs' gates."""
        return tuple(self.rows[row] for row in self.input_rows)

    @property
    def biases(self) -> tuple[str, ...]:
        """The names of the biases."""
        return tuple(self.rows[row] for row in self.bias_rows)


def _lstm(rows: Tensors, state: Tensors) -> Tensors:
    i, f, z, o = rows
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_linearize(rows: Tensors, before: Tensors, after: Tensors) -> Tensors:
    i, f, o, z = torch.sigmoid(rows[0]), torch.sigmoid(rows[1]), torch.sigmoid(rows[3]), torch.tanh(rows[2])
    tanh_c = torch.tanh(after[1])
    return (
        o * (1 - tanh_c * tanh_c),
        f,
        z * i * (1 - i),
        before[1] * f * (1 - f),
        i * (1 - z * z),
        tanh_c * o * (1 - o),
    )


def _lstm_pull(coefficients: Tensors, grads: Tensors, to_rows: Tensors) -> Pulled:
    to_c, f, to_i, to_f, to_z, to_o = coefficients
    h, c = grads
    c = torch.addcmul(c, h, to_c)
    torch.mul(c, to_i, out=to_rows[0])
    torch.mul(c, to_f, out=to_rows[1])
    torch.mul(c, to_z, out=to_rows[2])
    torch.mul(h, to_o, out=to_rows[3])
    return None, c * f


def _gru(rows: Tensors, state: Tensors) -> Tensors:
    r, z, a, n = rows
    n = torch.tanh(n + torch.sigmoid(r) * a)
    return (n + torch.sigmoid(z) * (state[0] - n),)


def _gru_linearize(rows: Tensors, before: Tensors, after: Tensors) -> Tensors:
    r, z, a = torch.sigmoid(rows[0]), torch.sigmoid(rows[1]), rows[2]
    n = torch.tanh(rows[3] + r * a)
    to_n = (1 - z) * (1 - n * n)
    to_a = to_n * r
    return z, to_a * a * (1 - r), (before[0] - n) * z * (1 - z), to_a, to_n


def _gru_pull(coefficients: Tensors, grads: Tensors, to_rows: Tensors) -> Pulled:
    (h,) = grads
    for coefficient, target in zip(coefficients[1:], to_rows, strict=True):
        torch.mul(h, coefficient, out=target)
    return (h * coefficients[0],)


def _elman(rows: Tensors, state: Tensors) -> Tensors:
    return (torch.tanh(rows[0]),)


def _elman_linearize(rows: Tensors, before: Tensors, after: Tensors) -> Tensors:
    return (1 - after[0] * after[0],)


def _elman_pull(coefficients: Tensors, grads: Tensors, to_rows: Tensors) -> Pulled:
    torch.mul(grads[0], coefficients[0], out=to_rows[0])
    return (None,)


def _slstm(rows: Tensors, state: Tensors) -> Tensors:
    i, f, z, o = rows
    _, c, n, m = state
    past = F.logsigmoid(f) + m
    m = torch.where(past >= i, past, i)
    forget, write = torch.exp(past - m), torch.exp(i - m)
    c, n = forget * c + write * torch.tanh(z), forget * n + write
    return torch.sigmoid(o) * c / n, c, n, m


def _slstm_linearize(rows: Tensors, before: Tensors, after: Tensors) -> Tensors:
    i, f, z, o = rows
    h, _, n, _ = after
    excess = F.logsigmoid(f) + before[3] - i  # how much the past outweighs this step; one of the two factors is 1
    forget, write = torch.exp(excess.clamp(max=0)), torch.exp((-excess).clamp(max=0))
    past, z, o = (excess >= 0).to(i.dtype), torch.tanh(z), torch.sigmoid(o)
    # With gc, gn, gm of the states after, the excess gets gc · by_c + gn · by_n, and m goes to the larger side.
    by_c = torch.where(excess < 0, forget * before[1], -write * z)
    by_n = torch.where(excess < 0, forget * before[2], -write)
    return o / n, h / n, forget, write * (1 - z * z), h * (1 - o), by_c, by_n, past, torch.sigmoid(-f)


def _slstm_pull(coefficients: Tensors, grads: Tensors, to_rows: Tensors) -> Pulled:
    to_c, to_n, forget, to_z, to_o, by_c, by_n, past, to_f = coefficients
    h, c, n, m = grads
    c, n = torch.addcmul(c, h, to_c), torch.addcmul(n, h, to_n, value=-1)
    m_past = torch.addcmul(torch.addcmul(m * past, c, by_c), n, by_n)
    torch.sub(m, m_past, out=to_rows[0])
    torch.mul(m_past, to_f, out=to_rows[1])
    torch.mul(c, to_z, out=to_rows[2])
    torch.mul(h, to_o, out=to_rows[3])
    return None, c * forget, n * forget, m_past


_FOUR = (0, 1, 2, 3)

KINDS: dict[str, DenseKind] = {
    kind.name: kind
    for kind in (
        DenseKind(
            "lstm",
            ("i", "f", "z", "o"),
            recurrent=4,
            input_rows=_FOUR,
            bias_rows=_FOUR,
            state=("h", "c"),
            initial=(0.0, 0.0),
            step=_lstm,
            linearize=_lstm_linearize,
            pull=_lstm_pull,
        ),
        DenseKind(
            "gru",
            ("r", "z", "a", "n"),
            recurrent=3,
            input_rows=(0, 1, 3),
            bias_rows=(0, 1, 3, 2),
            state=("h",),
            initial=(0.0,),
            step=_gru,
            linearize=_gru_linearize,
            pull=_gru_pull,
        ),
        DenseKind(
            "slstm",
            ("i", "f", "z", "o"),
            recurrent=4,
            input_rows=_FOUR,
            bias_rows=_FOUR,
            state=("h", "c", "n", "m"),
            initial=(0.0, 0.0, 0.0, float("-inf")),
            step=_slstm,
            linearize=_slstm_linearize,
            pull=_slstm_pull,
        ),
        DenseKind(
            "elman",
            ("z",),
            recurrent=1,
            input_rows=(0,),
            bias_rows=(0,),
            state=("h",),
            initial=(0.0,),
            step=_elman,
            linearize=_elman_linearize,
            pull=_elman_pull,
        ),
    )
}
"""Every kind by name."""
