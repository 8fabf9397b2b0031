"""The derived Jacobian and gradient are those of the step, whatever listed operations it uses; the rest is refused."""

from __future__ import annotations

import math
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from paralm_kernels import Cell, CellError, solve
from paralm_kernels.derive import derive, jacobian_name
from paralm_kernels.generate import generate
from paralm_kernels.laws import by, deviation, outcome, random_case, reference
from paralm_kernels.lowering import lowerable
from paralm_kernels.torch_code import torch_code
from paralm_kernels.triton_template import Names
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def one_component(function):
    """A cell h ← function(h, x, a)."""

    class Made(Cell):
        name = "made"
        state = ("h",)
        inputs = ("x",)
        params = ("a",)

        def step(self, state, inputs, params):
            return (function(state[0], inputs[0], params[0]),)

    return Made()


ELEMENTWISE = {
    "arithmetic": lambda h, x, a: (a * h - x) / (2 + h * h) - (-h) + 1 / (3 + x.abs()),
    "reversed": lambda h, x, a: 1 - h * a + 2.0 / (x * x + 1) + torch.rsub(x, 1.0, alpha=2),
    "exponential": lambda h, x, a: torch.exp(-h.abs()) * a + torch.expm1(x / 4) - torch.exp2(a),
    "logarithm": lambda h, x, a: torch.log(1 + h * h) + torch.log1p(x.square()) * a,
    "roots": lambda h, x, a: torch.sqrt(1 + h * h) * a - torch.rsqrt(2 + x * x) + (1 + x * x) ** 0.5,
    "powers": lambda h, x, a: torch.tanh(0.1 * h**3 + (1 + x * x) ** -1.5 + (1 + a * a).pow(2.5) + 2**h),
    "trigonometry": lambda h, x, a: torch.sin(a * h) + torch.cos(x),
    "erf and gelu": lambda h, x, a: torch.erf(a * h) + F.gelu(x) + F.gelu(h, approximate="tanh"),
    "gates": lambda h, x, a: F.silu(a * h + x) + F.softplus(h) - F.logsigmoid(x),
    "rectifiers": lambda h, x, a: F.relu(a * h + x) + F.leaky_relu(h, 0.1) + F.elu(x) + F.hardtanh(h),
    "hard gates": lambda h, x, a: F.hardsigmoid(a * h) + F.relu6(x) + F.hardswish(h),
    "extremes": lambda h, x, a: torch.maximum(a * h, x) + torch.minimum(h, x) + h.clamp(-0.5, 0.5) + x.clamp(min=0.1),
    "switches": lambda h, x, a: torch.where((h > 0) & ~(x <= a), h * a, torch.where(x != 0, 0.5, 0.25)),
    "constants only": lambda h, x, a: torch.where(h > x, 0.25, 0.5) + 0 * a,
    "mask as a number": lambda h, x, a: (h > x) * a + (h > 0).to(h.dtype),
    "lerp": lambda h, x, a: torch.lerp(h, x, torch.sigmoid(a)) + torch.addcmul(h, x, a, value=0.5),
    "sign": lambda h, x, a: h.sign() * a + torch.abs(x) * h,
    "constant tensors": lambda h, x, a: torch.tensor(0.3) * h + h.new_tensor(2.0) * x + torch.zeros_like(h) + a,
    "logaddexp by hand": lambda h, x, a: torch.maximum(h, x) + torch.log1p(torch.exp(-(h - x).abs())) * a,
    "detached": lambda h, x, a: h.detach() * x + a * h,
    "state not read": lambda h, x, a: torch.tanh(x) * a,
    "state alone": lambda h, x, a: h,
    "input alone": lambda h, x, a: x,
    "linear": lambda h, x, a: a * h + x,
    "infinities": lambda h, x, a: torch.exp(torch.where(h > x, -math.inf, a * h)).clamp(max=math.inf) + x,
    "beyond float32": lambda h, x, a: (a * h + x).clamp(-1e300, 1e300),
    "parameter alone": lambda h, x, a: torch.tanh(a) + 0 * h,
    "fresh tensor changed in place": lambda h, x, a: (h * a).add_(x).tanh_(),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_listed_operations_give_the_values_and_gradients_of_autograd(name):
    """float64 against autograd through the plain loop: only roundings differ."""
    tolerance = 1e-7 if name == "hard gates" else 1e-12  # ATen's hardsigmoid kernels hold 1/6 in float32
    case = random_case(one_component(ELEMENTWISE[name]), time=7, weights=0.9, seed=3)
    got, expected = outcome(case, by("sequential")), outcome(case, reference)
    worst, where = deviation(got, expected, tolerance)
    assert worst <= 1, where


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda h, x, a: h if (h > 0).all() else x, "branches on data"),
        (lambda h, x, a: h * float(x.sum()), "branches on data"),
        (lambda h, x, a: h - h.mean(-1, keepdim=True), "aten.mean is not elementwise"),
        (lambda h, x, a: h.flip(-1), "aten.flip is not elementwise"),
        (lambda h, x, a: torch.roll(h, 1, -1), "is not elementwise"),
        (lambda h, x, a: h.cumsum(-1), "aten.cumsum is not elementwise"),
        (lambda h, x, a: F.softmax(h, -1), "aten._softmax is not elementwise"),
        (lambda h, x, a: h @ torch.eye(3, dtype=h.dtype), "is not elementwise"),
        (lambda h, x, a: h[:1] * x, "is not elementwise"),
        (lambda h, x, a: torch.special.erfinv(h), "aten.erfinv cannot be lowered; allowed are: abs, add"),
        (lambda h, x, a: torch.atan2(h, x), "aten.atan2 cannot be lowered"),
        (lambda h, x, a: torch.div(h, x, rounding_mode="floor"), "rounding_mode='floor'"),
        (lambda h, x, a: x.abs() ** h, "tensor exponent cannot be lowered; write exp(exponent * log(base))"),
        (lambda h, x, a: F.dropout(h, 0.5), "draws random numbers"),
        (lambda h, x, a: h + torch.randn_like(h), "draws random numbers"),
        (lambda h, x, a: h.float() * a, "it casts to torch.float32; a step computes in the dtype it is given"),
        (lambda h, x, a: h.half(), "from torch.float64 into torch.float16"),
        (lambda h, x, a: h.mul_(a), "changes an argument in place"),
        (lambda h, x, a: h.sum(), "of shape (2, 3) into ()"),
        (lambda h, x, a: 1.0, "h is a float"),
        (lambda h, x, a: torch.tanh(h * a) / x.shape[-1] ** 0.5, "for the same numbers in tensors of another shape"),
        (lambda h, x, a: h.nonexistent(), "it raised AttributeError"),
    ],
)
def test_what_cannot_be_lowered_is_refused_in_one_line(function, says):
    with pytest.raises(CellError) as caught:
        derive(one_component(function))
    assert says in str(caught.value)
    assert "'made'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_captured_vector_is_refused_as_a_missing_parameter():
    vector = torch.rand(3, dtype=torch.float64)
    with pytest.raises(CellError, match=r"tensor of shape \(3,\) that is not an argument; name it in params"):
        derive(one_component(lambda h, x, a: h * vector))


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        (1.0, "box must return None or a tuple of 2 bounds (h, c), got float"),
        ((1.0,), "got a tuple of 1"),
        ((1.0, "1"), "got a str for c"),
        ((1.0, -1.0), "cell 'made': box bounds |c|, so by no negative number, got -1.0"),
        ((torch.tensor([1.0, -1.0, 1.0]), None), "box bounds |h|, so by no negative number, got one in a tensor"),
    ],
)
def test_a_box_must_have_a_bound_for_each_component(bounds, says):
    class Made(Cell):
        name = "made"
        state = ("h", "c")
        inputs = ("x",)

        def step(self, state, inputs, params):
            return torch.tanh(state[1] + inputs[0]), state[0]

        def box(self, state):
            return bounds

    with pytest.raises(CellError, match=re.escape(says)):
        derive(Made())


def test_a_box_that_raises_is_named_in_one_line():
    class Made(Cell):
        name = "made"
        state = ("h",)
        inputs = ("x",)

        def step(self, state, inputs, params):
            return (torch.tanh(state[0] + inputs[0]),)

        def box(self, state):
            return (self.bound,)

    with pytest.raises(CellError, match=r"^cell 'made': box raised AttributeError: .Made. object has no attribute"):
        derive(Made())


def test_a_captured_parameter_is_refused_as_a_missing_one():
    """It would be a constant: never trained, and read once."""
    parameter = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(CellError, match="tensor that wants a gradient and is not an argument; name it in params"):
        derive(one_component(lambda h, x, a: h * parameter + x * a))


@pytest.mark.parametrize("result", [lambda h: h, lambda h: (h, h), lambda h: [h]])
def test_a_step_must_return_its_tuple(result):
    class Made(Cell):
        name = "made"
        state = ("h",)
        inputs = ("x",)

        def step(self, state, inputs, params):
            return result(state[0])

    with pytest.raises(CellError, match=r"step must return a tuple of 1 tensors \(h\), got"):
        derive(Made())


def test_the_jacobian_is_that_of_torch_func(cell):
    derived = derive(cell)
    generator = torch.Generator().manual_seed(1)
    count = len(cell.state) + len(cell.inputs) + len(cell.params)
    args = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(count)]
    n, m = len(cell.state), len(cell.state) + len(cell.inputs)

    def step(*state):
        return cell.step(state, tuple(args[n:m]), tuple(args[m:]))

    expected = torch.autograd.functional.jacobian(step, tuple(args[:n]))
    values = dict(zip(derived.jacobian_names, torch_code(derived).linearised(*args)[n:], strict=True))
    for i, row in enumerate(cell.state):
        for j, column in enumerate(cell.state):
            entry = expected[i][j].diagonal()  # elementwise: only the diagonal over channels is not zero
            got = values.get(jacobian_name(row, column), torch.zeros_like(entry))
            torch.testing.assert_close(got, entry, rtol=1e-13, atol=1e-13)


def test_structure_is_seen(cell):
    derived = derive(cell)
    assert derived.diagonal == (len(cell.state) == 1)
    assert len(derived.jacobian_names) == (1 if derived.diagonal else len(cell.state) ** 2)


def test_independent_components_have_a_diagonal_jacobian():
    class Pair(Cell):
        name = "pair"
        state = ("u", "v")
        inputs = ("x",)

        def step(self, state, inputs, params):
            return torch.tanh(state[0] + inputs[0]), 0.5 * state[1] + inputs[0]

    derived = derive(Pair())
    assert derived.diagonal
    case = random_case(Pair(), time=40)
    for method in ("sequential", "newton"):
        worst, where = deviation(outcome(case, by(method)), outcome(case, reference), 1e-12)
        assert worst <= 1, (method, where)


def test_a_cell_is_traced_once_per_definition():
    class Scaled(Cell):
        name = "scaled"
        state = ("h",)
        inputs = ("x",)
        calls = 0

        def __init__(self, scale):
            self.scale = scale

        def step(self, state, inputs, params):
            Scaled.calls += 1
            return (torch.tanh(self.scale * state[0] + inputs[0]),)

    assert derive(Scaled(0.5)) is derive(Scaled(0.5))
    assert derive(Scaled(0.5)) is not derive(Scaled(0.25))
    once = Scaled.calls
    derive(Scaled(0.5))
    assert Scaled.calls == once


def test_a_cell_is_traced_wherever_it_is_first_met():
    """Within activation checkpointing, whose hooks torch.func does not allow, and within a mode."""

    met = one_component(lambda h, x, a: torch.tanh(a * h + x))

    def run(x):
        return solve(met, (x,), (torch.ones(3),)).states[0]

    x = torch.randn(1, 4, 3, requires_grad=True)
    with FlopCounterMode(display=False):
        y = checkpoint(run, x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(y, run(x))


def test_the_list_of_operations_is_for_people():
    assert "sigmoid" in lowerable()
    assert "_backward" not in lowerable()


def test_nothing_is_computed_where_a_cell_is_first_used(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a plan, which counts operations, would find more of them in a process that meets the cell for the first
    time than in any other."""
    monkeypatch.setattr("paralm_kernels.derive._cache", weakref.WeakKeyDictionary())
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen(), torch.device("meta"):
        names = Names(derive(cell))
        generate(cell)
    assert seen == []
    box = cell.box(tuple(torch.zeros(2, 3) for _ in cell.state)) or (None,) * len(cell.state)
    assert names.bounded == [names.of[h] for h, bound in zip(cell.state, box, strict=True) if bound is not None]
