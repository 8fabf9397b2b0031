"""Cells the kernel tests run over: every registered one, and cells a user might write."""

from __future__ import annotations

import os

import pytest
import torch
from paralm_kernels import Cell, cells

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter

    interpreter.use()


class MinimalGated(Cell):
    """One component; a constant and a function of a parameter in the step."""

    name = "minimal_gated"
    state = ("h",)
    inputs = ("x_z", "x_h")
    params = ("a", "decay")

    def step(self, state, inputs, params):
        (h,), (x_z, x_h), (a, decay) = state, inputs, params
        z = torch.sigmoid(a * h + x_z - 0.5)
        return (torch.exp(-torch.nn.functional.softplus(decay)) * (1 - z) * h + z * torch.tanh(x_h),)


class ThreeParts(Cell):
    """Three components: one linear (its Jacobian is a parameter), one that reads the others, one switched."""

    name = "three_parts"
    state = ("u", "v", "w")
    inputs = ("x",)
    params = ("a", "b", "c")

    def step(self, state, inputs, params):
        (u, v, w), (x,), (a, b, c) = state, inputs, params
        u_next = torch.sigmoid(a) * u + x
        v_next = torch.tanh(b * v + u_next)
        return u_next, v_next, torch.where(v > 0, 0.5 * w + v, torch.sin(c) * w)


USER_CELLS = (MinimalGated(), ThreeParts())
ALL_CELLS = (*cells().values(), *USER_CELLS)


@pytest.fixture(params=ALL_CELLS, ids=lambda cell: cell.name)
def cell(request: pytest.FixtureRequest) -> Cell:
    """Every registered cell and every user-defined one."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
