"""Generated code: reads like the equations, reuses buffers, and keeps what two phases share."""

from __future__ import annotations

import linecache

import pytest
import torch
from paralm_kernels import Cell, ParaGRU
from paralm_kernels.derive import derive
from paralm_kernels.laws import by, deviation, outcome, random_case, reference
from paralm_kernels.torch_code import torch_code


def code(cell):
    return torch_code(derive(cell))


def test_a_step_of_the_gru_is_nine_calls_in_three_buffers():
    walk = code(ParaGRU()).walk
    body = [line for line in walk.source.splitlines() if "out=" in line]
    assert len(body) == 9
    assert walk.numbers == 3
    assert sum("addcmul" in line for line in body) == 4
    assert "out=next_h" in body[-1]


def test_the_gradient_reads_what_the_jacobian_left():
    """No gate is computed a second time."""
    generated = code(ParaGRU())
    assert "sigmoid(" in generated.jacobian.source
    assert "torch.sigmoid(" not in generated.gradient.source
    assert "torch.tanh(" not in generated.gradient.source


def test_generated_lines_show_in_tracebacks(cell):
    generated = code(cell).step
    filename = generated.function.__code__.co_filename
    assert cell.name in filename
    assert "".join(linecache.getlines(filename)) == generated.source


def test_step_and_walk_round_alike(cell):
    """The decode step and the loop over time are the same calls, so they agree to the last bit."""
    case = random_case(cell, batch=4, time=3, channel=32, resets=0.0).to(torch.float32)
    states = [torch.empty(4, 3, 32) for _ in cell.state]
    walk = code(cell).walk
    scratch = walk.scratch((4, 32), torch.float32, torch.device("cpu"))
    steps = [x.unbind(1) for x in case.inputs]
    walk(*case.state, *steps, *case.params, *(h.unbind(1) for h in states), [None] * 3, *scratch)
    state = case.state
    for t in range(3):
        state = code(cell).step(*state, *(x[t].contiguous() for x in steps), *case.params)
        for h, value in zip(states, state, strict=True):
            assert torch.equal(h[:, t], value)


def test_scratch_is_as_asked():
    class Switch(Cell):
        name = "switch"
        state = ("h",)
        inputs = ("x",)

        def step(self, state, inputs, params):
            return (torch.where(state[0] > inputs[0], state[0] * 0.5, inputs[0]),)

    walk = code(Switch()).walk
    assert walk.flags == 1
    scratch = walk.scratch((2, 3), torch.float64, torch.device("cpu"))
    assert [buffer.dtype for buffer in scratch] == [torch.float64] * walk.numbers + [torch.bool]
    case = random_case(Switch(), time=20)
    worst, where = deviation(outcome(case, by("sequential")), outcome(case, reference), 1e-12)
    assert worst <= 1, where


def test_a_jacobian_entry_that_the_gradient_needs_survives_resets():
    """h ← z h + x with z = σ(x): the Jacobian is z, which the gradient reads; a reset zeroes one and not the other."""

    class Leaky(Cell):
        name = "leaky"
        state = ("h",)
        inputs = ("x",)
        params = ("a",)

        def step(self, state, inputs, params):
            z = torch.sigmoid(inputs[0] + params[0])
            return (z * state[0] + inputs[0],)

    case = random_case(Leaky(), time=40, resets=0.3)
    generated = code(Leaky())
    assert ".copy_(" in generated.jacobian.source
    worst, where = deviation(outcome(case, by("sequential")), outcome(case, reference), 1e-12)
    assert worst <= 1, where


@pytest.mark.parametrize("name", ["exp", "tanh", "constant", "walk", "state", "t", "w0", "cut"])
def test_any_allowed_name_may_name_an_input(name):
    """Generated code keeps its own names out of the user's."""

    class Named(Cell):
        state = ("h",)
        params = ("a",)

        def step(self, state, inputs, params):
            return (torch.tanh(state[0] * params[0] + torch.exp(-inputs[0].abs())),)

    kind = type("Named", (Named,), {"name": f"named_{name}", "inputs": (name,)})
    case = random_case(kind(), time=12)
    for method in ("sequential", "newton"):
        worst, where = deviation(outcome(case, by(method)), outcome(case, reference), 1e-12)
        assert worst <= 1, where
