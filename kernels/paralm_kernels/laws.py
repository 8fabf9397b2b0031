"""The laws every cell obeys, as functions a user can run on a cell of their own.

`check_cell(cell)` compares, in float64 unless said otherwise, every way of running a cell with the plain loop over
`Cell.step` under autograd, which is slow and obviously right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from .cell import Cell, Tensors
from .derive import box_of, derive
from .errors import ArgumentError, CellError, NotConverged
from .generate import generate
from .solve import Trajectory, solve, step
from .torch_code import torch_code

TOLERANCE = 1e-10
"""Of float64 comparisons: relative to 1 + |value| for states, to the largest element for each gradient."""
ULPS = 8 * 2.0**-24
"""Of float32 states, times the condition number of `amplification`: a handful of roundings per step."""
FLOAT32_GRADIENTS = 2.0**-18
"""Of float32 gradients, relative to the largest element, at recurrent weights up to 1 (64 roundings; measured: 11)."""


@dataclass(frozen=True)
class LawResult:
    """name: what must hold. ok: whether it did. worst: the largest deviation, in units of what is allowed (at most 1
    where ok). detail: where, or why not."""

    name: str
    ok: bool
    worst: float
    detail: str


@dataclass(frozen=True)
class Case:
    """One recurrence with random cotangents. inputs (batch, time, channel), params (channel,), state (batch, channel),
    reset bool (batch, time) or None; grad_states and grad_final as the states and the final state."""

    cell: Cell
    inputs: Tensors
    params: Tensors
    state: Tensors
    reset: Tensor | None
    grad_states: Tensors
    grad_final: Tensors

    def to(self, dtype: torch.dtype) -> Case:
        """The same case in another dtype."""

        def convert(tensors: Tensors) -> Tensors:
            return tuple(x.to(dtype) for x in tensors)

        return replace(
            self,
            inputs=convert(self.inputs),
            params=convert(self.params),
            state=convert(self.state),
            grad_states=convert(self.grad_states),
            grad_final=convert(self.grad_final),
        )


@dataclass(frozen=True)
class Outcome:
    """Values and gradients of a case, by name."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]


def random_case(
    cell: Cell,
    batch: int = 2,
    time: int = 33,
    channel: int = 3,
    weights: float = 1.0,
    resets: float = 0.1,
    seed: int = 0,
) -> Case:
    """A float64 case: normal inputs and cotangents, parameters uniform in ±weights; the initial state is what three
    random steps make of a normal one times ½, because any numbers need not be a state that the cell can be in."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform() -> Tensor:
        return (2 * torch.rand(channel, generator=generator, dtype=torch.float64) - 1) * weights

    inputs = tuple(normal(batch, time, channel) for _ in cell.inputs)
    params = tuple(uniform() for _ in cell.params)
    state = tuple(normal(batch, channel) / 2 for _ in cell.state)
    for _ in range(3):
        state = _stepped(cell, state, tuple(normal(batch, channel) for _ in cell.inputs), params)
    return Case(
        cell,
        inputs,
        params,
        state,
        torch.rand((batch, time), generator=generator) < resets if resets else None,
        tuple(normal(batch, time, channel) for _ in cell.state),
        tuple(normal(batch, channel) for _ in cell.state),
    )


def _stepped(cell: Cell, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
    """The next state, (batch, channel) each: a step may return what broadcasts to it, such as a parameter."""
    after = cell.step(state, inputs, params)
    return tuple(h.expand_as(before) for h, before in zip(after, state, strict=True))


def plain_loop(
    cell: Cell, inputs: Tensors, params: Tensors, state: Tensors, reset: Tensor | None
) -> tuple[Tensors, Tensors]:
    """The reference: `Cell.step` in a Python loop. Returns states and final state; autograd runs through it."""
    steps: list[Tensors] = []
    for t in range(inputs[0].shape[1]):
        if reset is not None:
            state = tuple(h.masked_fill(reset[:, t, None], 0.0) for h in state)
        state = _stepped(cell, state, tuple(x[:, t] for x in inputs), params)
        steps.append(state)
    return tuple(torch.stack(component, 1) for component in zip(*steps, strict=True)), state


Runner = Callable[[Case, Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


def reference(case: Case, inputs: Tensors, params: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    """Runs a case through the plain loop."""
    return plain_loop(case.cell, inputs, params, state, case.reset)


def by(method: str, **options: int) -> Runner:
    """Runs a case through `solve`."""

    def run(case: Case, inputs: Tensors, params: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        result = solve(case.cell, inputs, params, state, case.reset, method, **options)  # type: ignore[arg-type]
        return result.states, result.final

    return run


def in_pieces(cuts: Sequence[int], method: str = "auto") -> Runner:
    """Runs a case piece by piece, each from the final state of the one before."""

    def run(case: Case, inputs: Tensors, params: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        edges = [0, *cuts, inputs[0].shape[1]]
        parts: list[Trajectory] = []
        for start, stop in pairwise(edges):
            reset = None if case.reset is None else case.reset[:, start:stop]
            part = solve(case.cell, tuple(x[:, start:stop] for x in inputs), params, state, reset, method)
            parts.append(part)
            state = part.final
        states = zip(*(part.states for part in parts), strict=True)
        return tuple(torch.cat(component, 1) for component in states), state

    return run


def decoded(case: Case, inputs: Tensors, params: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    """Runs a case through the decode step, one step at a time."""
    steps: list[Tensors] = []
    for t in range(inputs[0].shape[1]):
        if case.reset is not None:
            state = tuple(h.masked_fill(case.reset[:, t, None], 0.0) for h in state)
        state = step(case.cell, state, tuple(x[:, t] for x in inputs), params)
        steps.append(state)
    return tuple(torch.stack(component, 1) for component in zip(*steps, strict=True)), state


def outcome(case: Case, run: Runner) -> Outcome:
    """States, final state and all gradients of a case."""
    cell = case.cell
    leaves = {
        **{f"inputs[{n}]": x.detach().clone().requires_grad_() for n, x in zip(cell.inputs, case.inputs, strict=True)},
        **{f"params[{n}]": p.detach().clone().requires_grad_() for n, p in zip(cell.params, case.params, strict=True)},
        **{f"state[{n}]": s.detach().clone().requires_grad_() for n, s in zip(cell.state, case.state, strict=True)},
    }
    tensors = tuple(leaves.values())
    first, second = len(cell.inputs), len(cell.inputs) + len(cell.params)
    states, final = run(case, tensors[:first], tensors[first:second], tensors[second:])
    values = {f"states[{n}]": h for n, h in zip(cell.state, states, strict=True)}
    values |= {f"final[{n}]": h for n, h in zip(cell.state, final, strict=True)}
    outputs = [h for h in (*states, *final) if h.requires_grad]
    cotangents = [
        g for g, h in zip((*case.grad_states, *case.grad_final), (*states, *final), strict=True) if h.requires_grad
    ]
    grads = torch.autograd.grad(outputs, tensors, cotangents, allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, tensors, strict=True))
    return Outcome({n: h.detach() for n, h in values.items()}, dict(zip(leaves, filled, strict=True)))


def deviation(got: Outcome, expected: Outcome, tolerance: float) -> tuple[float, str]:
    """The largest deviation in units of the tolerance, and where: states relative to 1 + |value|, gradients to their
    largest element. Anything not finite is an infinite deviation."""
    worst, where = 0.0, "all equal"
    for what, pairs in (("values", expected.values), ("grads", expected.grads)):
        for name, value in pairs.items():
            other = getattr(got, what)[name]
            scale = 1 + value.abs() if what == "values" else value.abs().max().clamp(min=1e-30)
            error = float(((other.to(value.dtype) - value).abs() / scale).max()) / tolerance
            error = error if error == error else float("inf")
            if error > worst:
                worst, where = error, f"{'gradient of ' if what == 'grads' else ''}{name}"
    return worst, where


def amplification(case: Case) -> Tensor:
    """κ_t = 1 + |J_t| κ_{t−1} with κ_{−1} = 0: how far a rounding of each step so far may have grown by step t,
    (batch, time, channel); |J| the maximum norm. A float64 case."""
    derived = derive(case.cell)
    with torch.no_grad():
        states, _ = plain_loop(case.cell, case.inputs, case.params, case.state, case.reset)
        before = tuple(torch.cat((s.unsqueeze(1), h[:, :-1]), 1) for s, h in zip(case.state, states, strict=True))
        if case.reset is not None:
            before = tuple(h.masked_fill(case.reset.unsqueeze(-1), 0.0) for h in before)
        values = torch_code(derived).linearised(*before, *case.inputs, *case.params)
    size = derived.n_state
    jacobian = torch.stack(values[size:]).abs()
    norm = jacobian.amax(0) if derived.diagonal else jacobian.unflatten(0, (size, size)).sum(1).amax(0)
    if case.reset is not None:
        norm = norm.masked_fill(case.reset.unsqueeze(-1), 0.0)
    kappa = torch.zeros_like(norm[:, 0])
    result = []
    for t in range(norm.shape[1]):
        kappa = 1 + norm[:, t] * kappa
        result.append(kappa)
    return torch.stack(result, 1)


def check_cell(cell: Cell, weights: float = 1.0, seed: int = 0) -> list[LawResult]:
    """Runs every law on a cell; takes about a second. Nothing is raised: what fails is in the results. The fused
    kernels are run where there is a GPU, or Triton's interpreter (TRITON_INTERPRET=1); elsewhere only generated.

    weights: parameters are drawn uniformly from ±weights. seed: of everything random.
    """
    try:
        derive(cell)
    except CellError as error:
        return [LawResult("the step can be derived", False, float("inf"), str(error))]
    results = [LawResult("the step can be derived", True, 0.0, f"{len(derive(cell).step.nodes)} nodes")]
    laws: list[tuple[str, Callable[[Case], tuple[float, str]]]] = [
        ("sequential = the plain loop under autograd", lambda case: _same(case, by("sequential"), reference)),
        ("newton = sequential", lambda case: _same(case, by("newton", tile=16), by("sequential"))),
        ("whole = pieces", lambda case: _same(case, in_pieces((1, 7, 20)), by("auto"))),
        ("decode = solve", lambda case: _same(case, decoded, by("auto"))),
        ("a reset is a fresh start", _fresh_start),
        ("gradients = finite differences", _finite_differences),
        ("float32 = float64 within rounding", lambda case: _float32(case, with_gradients=weights <= 1)),
        ("states stay in the box", _stays_in_box),
        ("fused kernels are generated", _generated),
    ]
    if kernels_run():
        laws.append(("fused kernels = sequential", lambda case: _same(case, fused, by("sequential"))))
    case = random_case(cell, weights=weights, seed=seed)
    for name, law in laws:
        try:
            worst, detail = law(case)
        except (ArgumentError, CellError, NotConverged, RuntimeError) as error:
            worst, detail = float("inf"), str(error).splitlines()[0]
        results.append(LawResult(name, worst <= 1.0, worst, detail))
    return results


def kernels_run() -> bool:
    """Whether fused kernels run in this process: on a GPU, or interpreted."""
    if find_spec("triton") is None:
        return False
    from .triton_solver import interpreted  # Triton is loaded where it is used only

    return interpreted() or torch.cuda.is_available()


def fused(case: Case, inputs: Tensors, params: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    """Runs a case on the CPU through the fused kernels, where they run."""
    from .triton_solver import interpreted

    device = "cpu" if interpreted() else "cuda"
    inputs, params, state = (tuple(x.to(device) for x in group) for group in (inputs, params, state))
    reset = None if case.reset is None else case.reset.to(device)
    result = solve(case.cell, inputs, params, state, reset, "triton")
    return tuple(h.cpu() for h in result.states), tuple(h.cpu() for h in result.final)


def _generated(case: Case) -> tuple[float, str]:
    """CellError where an operation has no form in Triton."""
    text = generate(case.cell)
    compile(text, case.cell.name, "exec")
    return 0.0, f"{len(text.splitlines())} lines"


def _same(case: Case, run: Runner, expected: Runner) -> tuple[float, str]:
    return deviation(outcome(case, run), outcome(case, expected), TOLERANCE)


def _fresh_start(case: Case) -> tuple[float, str]:
    """A reset of all rows at t against two sequences, the second from the zero state."""
    time = case.inputs[0].shape[1]
    at = time // 2
    reset = torch.zeros(case.inputs[0].shape[:2], dtype=torch.bool)
    reset[:, at] = True

    def fresh(case: Case, inputs: Tensors, params: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        first = solve(case.cell, tuple(x[:, :at] for x in inputs), params, state)
        second = solve(case.cell, tuple(x[:, at:] for x in inputs), params)
        states = tuple(torch.cat(pair, 1) for pair in zip(first.states, second.states, strict=True))
        return states, second.final

    return _same(replace(case, reset=reset), by("auto"), fresh)


def _finite_differences(case: Case) -> tuple[float, str]:
    short = replace(
        case,
        inputs=tuple(x[:1, :5, :2] for x in case.inputs),
        params=tuple(p[:2] for p in case.params),
        state=tuple(s[:1, :2] for s in case.state),
        reset=None if case.reset is None else case.reset[:1, :5],
    )
    leaves = tuple(x.clone().requires_grad_() for x in (*short.inputs, *short.params, *short.state))
    first, second = len(short.inputs), len(short.inputs) + len(short.params)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = solve(short.cell, tensors[:first], tensors[first:second], tensors[second:], short.reset)
        return (*result.states, *result.final)

    try:
        gradcheck(run, leaves, atol=1e-6, rtol=1e-5)
    except GradcheckError as error:
        wrong = re.search(r"for output (\d+) with respect to input (\d+)", str(error))
        if wrong is None:
            raise
        outputs = [f"{kind}[{n}]" for kind in ("states", "final") for n in short.cell.state]
        given = [*short.cell.inputs, *short.cell.params, *(f"the initial {n}" for n in short.cell.state)]
        return float("inf"), (
            f"the gradient of {outputs[int(wrong[1])]} by {given[int(wrong[2])]} is not the difference quotient: step "
            "must be differentiable, without detach, no_grad or .data, which hide from Newton how the state moves"
        )
    return 0.0, "torch.autograd.gradcheck"


def _float32(case: Case, with_gradients: bool) -> tuple[float, str]:
    """States element by element against κ, gradients against their largest element; exact float32 numbers in both."""
    single = case.to(torch.float32)
    exact = single.to(torch.float64)
    got, expected = outcome(single, by("auto")), outcome(exact, reference)
    bound = ULPS * amplification(exact)
    worst, where = 0.0, "all equal"
    for name in case.cell.state:
        value = expected.values[f"states[{name}]"]
        error = (got.values[f"states[{name}]"] - value).abs() / (bound * value.abs().max().clamp(min=1.0))
        if float(error.max()) > worst:
            worst, where = float(error.max()), f"states[{name}]"
    if with_gradients:
        found = deviation(replace(got, values={}), replace(expected, values={}), FLOAT32_GRADIENTS)
        return max((worst, where), found)
    return worst, where


def _stays_in_box(case: Case) -> tuple[float, str]:
    if case.cell.box(case.state) is None:
        return 0.0, "the cell declares none"
    bounds = box_of(case.cell, case.state)
    values = outcome(case, reference).values
    worst, where = 0.0, "no component is bounded"
    for name, bound in zip(case.cell.state, bounds, strict=True):
        if bound is not None:
            limit = torch.as_tensor(bound, dtype=torch.float64)
            if bool((limit < 0).any()):
                return float("inf"), f"box bounds |{name}| by a negative number"
            limit = limit.unsqueeze(1) if limit.ndim == 2 else limit
            ratio = float((values[f"states[{name}]"].abs() / (limit * (1 + TOLERANCE))).max())
            if ratio > worst:
                worst, where = ratio, f"{name} reaches {ratio:.3f} of its bound"
    return worst, where
