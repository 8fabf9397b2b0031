"""The fused kernels under Triton's interpreter, which must be on before Triton is imported: test_triton.py runs this
file in processes of its own; by hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_kernels.py

Yardstick: float64 to 1e-10 (states relative to 1 + |h|, gradients to their largest element); float32 states element by
element within 8·2⁻²⁴·κ, gradients at weights up to 1 within 2⁻¹⁸ of their largest element.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paralm_kernels import ArgumentError, Cell, ParaGRU, ParaLSTM, cells, solve, step, time_shards_solve
from paralm_kernels.laws import (
    FLOAT32_GRADIENTS,
    TOLERANCE,
    ULPS,
    amplification,
    by,
    deviation,
    in_pieces,
    outcome,
    random_case,
    reference,
)

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton.py runs this file with TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from paralm_kernels import triton_launch, triton_math, triton_solver, triton_table
from paralm_kernels.derive import derive

from .conftest import USER_CELLS
from .part_maps import assert_part_map
from .shard_threads import solve_on_shards

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a kernel overflows and selects
METHODS = ("triton-walk", "triton-tile", "triton-segments")
CHOSEN = os.environ.get("PARALM_TEST_CELLS", ",".join(cells())).split(",")
REST = pytest.mark.skipif(os.environ.get("PARALM_TEST_REST", "1") != "1", reason="runs in another process")


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Checkpoints every 4 steps instead of 32: several pieces, and walks that meet, in short sequences."""
    monkeypatch.setattr(triton_solver, "CHECK", 4)


@pytest.fixture(params=CHOSEN)
def registered(request) -> Cell:
    return cells()[request.param]


def assert_same(got, expected, tolerance=TOLERANCE):
    worst, where = deviation(got, expected, tolerance)
    assert worst <= 1, f"{where}: {worst:.2g} times what is allowed"


def options(method):
    return {"triton-tile": {"tile": 4}, "triton-segments": {"tile": 4}}.get(method, {})


@pytest.mark.parametrize("method", METHODS)
def test_every_kernel_is_the_plain_loop_in_values_and_gradients(registered, method):
    """Lengths of 1, primes, a tile and one more or less, several tiles; resets; weights to ±4; float64."""

    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    @given(
        batch=st.integers(1, 2),
        time=st.sampled_from((13, 1, 3, 4, 5, 7, 8, 11)),
        channel=st.integers(1, 3),
        weights=st.sampled_from((4.0, 0.5, 1.0)),
        resets=st.sampled_from((0.2, 0.0)),
        seed=st.integers(0, 99),
    )
    def law(**kwargs):
        case = random_case(registered, **kwargs)
        assert_same(outcome(case, by(method, **options(method))), outcome(case, reference))

    law()


@pytest.mark.parametrize("method", METHODS)
def test_several_tiles_and_pieces_with_resets(registered, method):
    case = random_case(registered, batch=1, time=13, channel=3, weights=4.0, resets=0.1, seed=5)
    assert_same(outcome(case, by(method, **options(method))), outcome(case, reference))


@pytest.mark.parametrize(("method", "tile"), [("triton-walk", None), ("triton-walk", "many"), ("triton-segments", 36)])
def test_several_groups_of_steps_and_a_rest(registered, method, tile, monkeypatch):
    """What a walk fetches ahead: two whole groups (16 steps at most), and steps that make none. Many: as where more
    warps walk than wait for their loads."""
    if tile == "many":
        monkeypatch.setattr(triton_solver, "FEW", 0)
        tile = None
    case = random_case(registered, batch=1, time=40, channel=2, weights=1.0, resets=0.1, seed=6)
    assert_same(outcome(case, by(method, tile=tile)), outcome(case, reference))


@pytest.mark.parametrize("method", METHODS)
def test_float32_stays_within_rounding_of_float64(registered, method):
    single = random_case(registered, batch=1, time=13, channel=4, weights=1.0, resets=0.05, seed=3).to(torch.float32)
    exact = single.to(torch.float64)
    got, expected = outcome(single, by(method, **options(method))), outcome(exact, reference)
    bound = ULPS * amplification(exact)
    for name in registered.state:
        value = expected.values[f"states[{name}]"]
        error = (got.values[f"states[{name}]"] - value).abs() / (bound * value.abs().max().clamp(min=1))
        assert float(error.max()) <= 1, name
    assert_same(replace(got, values={}), replace(expected, values={}), FLOAT32_GRADIENTS)


@pytest.mark.parametrize(("method", "tile"), [("triton-walk", None), ("triton-segments", 4)])
def test_a_part_s_map_is_the_plain_loop_s(registered, method, tile):
    """Of one piece and of several."""
    for time, resets in ((13, 0.0), (9, 0.1)):
        case = random_case(registered, batch=2, time=time, channel=3, weights=1.0, resets=resets, seed=time)
        assert_part_map(case, method, tile)


@pytest.mark.parametrize(("method", "tile"), [("triton-walk", None), ("triton-segments", 4)])
def test_time_shards_by_kernels_equal_the_loop(registered, method, tile, monkeypatch):
    """Parts of several pieces, of one, and one whose end is guessed first."""
    monkeypatch.setattr(time_shards_solve, "_FIRST", 8)
    case = random_case(registered, batch=2, time=33, channel=3, weights=1.0, resets=0.05, seed=4)
    got, _ = solve_on_shards(case, [13, 2, 18], method, tile=tile)
    assert_same(got, outcome(case, reference))


def test_the_decode_kernel_is_the_step(registered):
    case = random_case(registered, time=1, channel=5, resets=0.5, seed=2)
    inputs = tuple(x[:, 0] for x in case.inputs)
    got = triton_solver.decode(derive(registered), case.state, inputs, case.params, torch.float64)
    for a, b in zip(got, step(registered, case.state, inputs, case.params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    result = solve(registered, case.inputs, case.params, method="triton")
    assert result.info.method == "triton-decode"
    kept = [h.clone() for h in result.final]
    for h in result.states:
        h.zero_()
    assert all(torch.equal(h, value) for h, value in zip(result.final, kept, strict=True))  # it is carried on
    assert_same(outcome(case, by("triton")), outcome(case, reference))


@REST
@pytest.mark.parametrize("cell", USER_CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("method", METHODS)
def test_cells_of_a_user(cell, method):
    """Constants, functions of a parameter alone, comparisons, an entry of the Jacobian that is a parameter."""
    case = random_case(cell, batch=1, time=9, weights=2.0, resets=0.1)
    assert_same(outcome(case, by(method, **options(method))), outcome(case, reference))


class EveryOperation(Cell):
    """What the registered cells do not use; and names that the generated text needs for itself."""

    name = "every_operation"
    state = ("time", "h")
    inputs = ("mask", "tl_")
    params = ("exp", "step")

    def step(self, state, inputs, params):
        (h, k), (x, y), (a, b) = state, inputs, params
        u = torch.log1p(x * x) * torch.erf(a * h) + torch.expm1(-torch.abs(y)) * torch.sin(h)
        v = torch.sqrt(1 + k * k) - torch.rsqrt(2 + y * y) + torch.cos(b * k) * torch.log(2 + x * x)
        w = torch.maximum(torch.minimum(u, v), torch.tanh(x)) * torch.reciprocal(1.5 + torch.sigmoid(k))
        w = torch.where((x > 0) & ~(y > 0.1), 0.3 * w, torch.exp(-w * w)) + torch.sign(y) / (1 + (x**2) ** 1.7)
        return 0.1 * w + 0.2 * torch.nn.functional.softplus(h), 0.5 * torch.nn.functional.gelu(v) - 0.7 * (2 + w) ** -2


@REST
def test_every_operation_in_a_cell_with_awkward_names():
    case = random_case(EveryOperation(), batch=1, time=5, channel=4)
    assert_same(outcome(case, by("triton-walk")), outcome(case, reference))
    single = case.to(torch.float32)
    got, expected = outcome(single, by("triton-walk")), outcome(single.to(torch.float64), reference)
    assert_same(got, expected, 1e-5)


@REST
@pytest.mark.parametrize("method", ["triton-walk", "triton-segments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(method, dtype):
    cell = ParaLSTM()
    case = random_case(cell, batch=1, time=13, weights=0.5, resets=0.1)
    inputs = tuple(x.to(dtype).requires_grad_() for x in case.inputs)
    params = tuple(p.float().requires_grad_() for p in case.params)
    result = solve(cell, inputs, params, reset=case.reset, method=method, tile=options(method).get("tile"))
    sum(h.float().sum() for h in result.states).backward()
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact_params = tuple(p.detach().double().requires_grad_() for p in params)
    exact = solve(cell, exact_inputs, exact_params, reset=case.reset)
    sum(h.sum() for h in exact.states).backward()
    eps = torch.finfo(dtype).eps
    for h, value in zip(result.states, exact.states, strict=True):
        assert h.dtype == dtype
        torch.testing.assert_close(h.double(), value, rtol=eps, atol=1e-5)
    for h, value in zip(result.final, exact.final, strict=True):
        assert h.dtype == torch.float32
        torch.testing.assert_close(h.double(), value, rtol=1e-5, atol=1e-5)
    for p, value in zip((*params, *inputs), (*exact_params, *exact_inputs), strict=True):
        torch.testing.assert_close(p.grad.double(), value.grad, rtol=2 * eps, atol=4 * eps)


@REST
@pytest.mark.parametrize("method", METHODS)
def test_whole_is_pieces_and_a_reset_is_a_fresh_start(method):
    case = random_case(ParaGRU(), time=11, channel=2, weights=2.0, resets=0.1, seed=4)
    assert_same(outcome(case, in_pieces((3, 4), method)), outcome(case, reference))
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[:, 6] = True
    broken = tuple(torch.full_like(s, float("nan")) for s in case.state)
    poisoned = solve(case.cell, case.inputs, case.params, broken, reset, method, **options(method)).states[0]
    fresh = solve(case.cell, tuple(x[:, 6:] for x in case.inputs), case.params, method="sequential").states[0]
    torch.testing.assert_close(poisoned[:, 6:], fresh, rtol=1e-12, atol=1e-12)
    assert poisoned[:, :6].isnan().all()


@REST
def test_slices_of_one_projection_are_taken_as_they_are(monkeypatch):
    """No copy of the inputs; cotangents that are expanded numbers; any other strides are made contiguous."""
    wide = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = wide.chunk(3, -1)
    aligned, strides = triton_launch._aligned(inputs)
    assert all(a is b for a, b in zip(aligned, inputs, strict=True))
    assert strides == (45, 9)
    case = random_case(ParaGRU(), time=5, resets=0.0)
    for views in (inputs, tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:2]) + inputs[2:]):
        leaf = tuple(x.detach().requires_grad_() for x in views)
        result = solve(case.cell, leaf, case.params, case.state, method="triton-walk")
        expected = solve(case.cell, leaf, case.params, case.state, method="sequential")
        torch.testing.assert_close(result.states[0], expected.states[0], rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad(result.states[0].sum(), leaf)
        for a, b in zip(got, torch.autograd.grad(expected.states[0].sum(), leaf), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@REST
def test_inside_activation_checkpointing_and_the_same_bits_twice():
    case = random_case(ParaGRU(), time=9, channel=2)
    inputs = tuple(x.requires_grad_() for x in case.inputs)

    def run(*tensors):
        return solve(case.cell, tensors, case.params, case.state, case.reset, "triton-segments", tile=4).states[0]

    plain = torch.autograd.grad(run(*inputs).sum(), inputs)
    again = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(again.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@REST
@pytest.mark.parametrize("limit", [1, 2])
def test_a_tile_is_exact_however_few_newton_iterations_it_gets(limit):
    """Sweeps finish what Newton did not, bit for bit on the plain loop; and nothing is reported as unsolved."""
    case = random_case(ParaGRU(), batch=1, time=11, weights=4.0, resets=0.0, seed=1)
    arguments = (case.cell, case.inputs, case.params, case.state, None)
    result = solve(*arguments, "triton-tile", tile=8, max_iter=limit)
    torch.testing.assert_close(result.states[0], solve(*arguments, "triton-walk").states[0], rtol=0, atol=0)
    assert result.info.iterations > limit
    assert result.info.last_update == 0
    assert 1 <= solve(*arguments, "triton-tile", tile=8).info.iterations <= 8


def remembering(time, **changes):
    """A ParaGRU whose update gate is nearly shut: a piece depends on all that was before it."""
    case = random_case(ParaGRU(), batch=1, time=time, channel=2, weights=1.0, resets=0.0, seed=7)
    return replace(case, inputs=(case.inputs[0] - 6, *case.inputs[1:]), **changes)


@REST
@pytest.mark.parametrize("rounds", [1, 3])
def test_segments_are_exact_however_few_rounds_they_get(rounds):
    """What forgets meets its stored trajectory; what remembers is joined by the product of Jacobians."""
    case = remembering(24)
    result = solve(case.cell, case.inputs, case.params, case.state, None, "triton-segments", tile=4, max_iter=rounds)
    expected = solve(case.cell, case.inputs, case.params, case.state, method="sequential").states[0]
    torch.testing.assert_close(result.states[0], expected, rtol=1e-13, atol=1e-13)
    assert result.info.last_update <= 1e-15
    assert 0 < result.info.rewalked < 5 * 5 / 6 + 0.01
    assert 2 <= result.info.iterations <= 1 + rounds + 5


@REST
def test_the_product_of_jacobians_saves_rounds():
    """Six pieces of a recurrence that remembers: Newton on the entries is done after 3 walks; without it, 6."""
    case = remembering(24)
    arguments = (case.cell, case.inputs, case.params, case.state, None, "triton-segments")
    assert solve(*arguments, tile=4, max_iter=5, tol=1e-12).info.rewalked <= 4 * 5 / 6 + 1e-6
    linear = replace(case, cell=cells()["tanh"], inputs=(case.inputs[0] * 1e-9,), params=case.params[:1])
    info = solve(linear.cell, linear.inputs, linear.params, None, None, "triton-segments", tile=4, max_iter=5).info
    assert info.iterations <= 3  # all but linear: one join is enough


@REST
def test_how_it_goes_does_not_depend_on_what_memory_held(monkeypatch):
    """The first join takes the products of Jacobians for zero, and not for what was there."""
    case = random_case(cells()["tanh"], batch=1, time=48, channel=2, weights=0.5, resets=0.0, seed=3)
    empty, found = triton_launch.Kernels.empty, []
    for value in (0.0, 1.0):
        monkeypatch.setattr(triton_launch.Kernels, "empty", lambda *a, v=value, **k: empty(*a, **k).fill_(v))
        info = solve(case.cell, case.inputs, case.params, case.state, None, "triton-segments", tile=4).info
        found.append((info.iterations, info.rewalked))
    assert found[0] == found[1]
    assert found[0][0] <= 4


@REST
@pytest.mark.parametrize("method", ["triton-walk", "triton-tile", "triton-segments"])
def test_every_input_is_read_once_and_every_state_written_once(method, monkeypatch):
    """Counted in the interpreter, per tensor; segments read (1 + ρ) times, and up to two blocks ahead of where they
    meet."""
    reads, writes = {}, {}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(table, pointers, mask):
        for address in pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]:
            table[int(address)] = table.get(int(address), 0) + 1

    def counted_load(self, pointers, mask, *rest):
        count(reads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        count(writes, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    written = []
    empty = triton_launch.Kernels.empty
    monkeypatch.setattr(triton_launch.Kernels, "empty", lambda *a, **k: written.append(empty(*a, **k)) or written[-1])
    case = random_case(ParaGRU(), batch=2, time=13, channel=3, weights=0.5, resets=0.0)
    info = solve(case.cell, case.inputs, case.params, case.state, None, method, **options(method)).info
    numbers = 2 * 13 * 3

    def total(table, tensor):
        first = tensor.data_ptr()  # on a CPU the interpreter works on the tensors themselves
        size = tensor.element_size()
        return sum(table.get(address, 0) for address in range(first, first + numbers * size, size))

    states = next(tensor for tensor in written if tensor.shape == (2, 13, 3))
    if method == "triton-segments":
        assert 0 < info.rewalked < 2
        for x in case.inputs:
            assert numbers < total(reads, x) <= (1 + info.rewalked) * numbers + 2 * 3 * 4 * 8
        assert total(writes, states) == round((1 + info.rewalked) * numbers)
    else:
        assert [total(reads, x) for x in case.inputs] == [numbers] * 3
        assert total(writes, states) == numbers
        assert info.rewalked == 0


@triton.jit
def _map(F: tl.constexpr, x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, F(tl.load(x_ptr + at)))


EXACT = {
    "exp": np.exp,
    "log": np.log,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "sigmoid": lambda x: np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x))),
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


@REST
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elementwise_functions_to_a_few_units_in_the_last_place(name, dtype):
    """Tiny, large, infinite and NaN arguments too; against extended precision."""
    generator = np.random.default_rng(0)
    spread = generator.normal(size=6000) * 10.0 ** generator.uniform(-30, 2, 6000)
    edges = [0.0, np.inf, -np.inf, np.nan, 1e38, -1e38, -87.0, -100.0, 88.7, 89.0, -1.0, 1.0]
    values = np.concatenate([spread, generator.uniform(-3, 3, 2180), edges])
    x = torch.tensor(values).to(dtype)
    y = torch.empty_like(x)
    _map[(len(x) // 4096,)](getattr(triton_math, name), x, y, 4096)
    with np.errstate(all="ignore"):
        exact = EXACT[name](x.numpy().astype(np.longdouble))[: len(x) // 4096 * 4096]
        wanted, got = exact.astype(x.numpy().dtype), y.numpy()[: len(exact)]
        assert (np.isnan(wanted) == np.isnan(got)).all()
        assert (np.isinf(wanted) == np.isinf(got)).all()
        normal = np.isfinite(wanted) & (np.abs(wanted) > np.finfo(wanted.dtype).tiny)
        ulps = np.abs(got - exact)[normal] / np.spacing(np.abs(wanted[normal])).astype(np.longdouble)
        small = np.maximum(-x.numpy()[: len(exact)][normal], 0)
    allowed = {"tanh": 4, "sigmoid": 3 + small}.get(name, 3)  # a shut gate: e⁻ˣ is off by |x| roundings
    assert (ulps <= (5 if dtype == torch.float64 else allowed)).all()
    assert (np.abs(got[~normal & np.isfinite(wanted)]) <= 2 * np.finfo(wanted.dtype).tiny).all()


@REST
def test_the_choice_among_the_algorithms(monkeypatch):
    """Many channels walk; one long sequence of few channels is cut; a measurement beats the model."""
    assert triton_table.choose("paragru", 8, 2048, 4096, 8).method == "walk"
    long = triton_table.choose("paragru", 1, 1 << 20, 1024, 8)
    assert long.method == "segments"
    assert 0.9 * triton_table.WARPS <= long.pieces * 32 <= triton_table.WARPS  # one more would wait for all others
    assert triton_table.choose("paragru", 1, 64, 16, 8).method == "walk"
    monkeypatch.setitem(triton_table.MEASURED, ("paragru", 8, 2048, 4096), "tile")
    assert triton_table.choose("paragru", 8, 2048, 4096, 8) == triton_table.Choice("tile")
    case = random_case(ParaGRU(), batch=1, time=9, channel=2)
    monkeypatch.setitem(triton_table.MEASURED, ("paragru", 1, 9, 2), "tile")
    assert solve(case.cell, case.inputs, case.params, method="triton").info.method == "triton-tile"


@REST
def test_a_tile_that_does_not_fit_is_refused():
    case = random_case(ParaGRU(), time=4)
    for tile in (3, 128):
        with pytest.raises(ArgumentError, match=f"tile is {tile}; method 'triton-tile' takes a power of two up to 64"):
            solve(case.cell, case.inputs, case.params, method="triton-tile", tile=tile)
