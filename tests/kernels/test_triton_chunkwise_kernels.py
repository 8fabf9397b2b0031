"""chunkwise's fused kernels under Triton's interpreter, which must be on before Triton is imported:
test_triton_chunkwise.py runs this file in a process of its own; by hand: TRITON_INTERPRET=1 python -m pytest FILE

Yardstick: the loop over time in float64, to 1e-10 of the largest element in float64.
"""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from paralm_kernels import ArgumentError, chunkwise, reference_chunkwise

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_chunkwise.py runs this file with TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl
import triton.runtime.interpreter as interpreter
from paralm_kernels import triton_chunkwise

from .shard_threads import chunkwise_on_shards
from .test_chunkwise import FORMS, Case, assert_close

_patch_language = interpreter._patch_lang


def _patch_once(fn):
    """The interpreter patches the language anew for every call of a function; within a launch once is enough."""
    languages = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
    if all(not tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _patch_language(fn)


interpreter._patch_lang = _patch_once
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a masked difference overflows


def double(case):
    case.inputs, case.state, case.weights = (
        [x.double() for x in part] for part in (case.inputs, case.state, case.weights)
    )
    return case


def spy(monkeypatch, name):
    """What a function of triton_chunkwise gives, call by call."""
    function, given = getattr(triton_chunkwise, name), []
    monkeypatch.setattr(triton_chunkwise, name, lambda *args: given.append(function(*args)) or given[-1])
    return given


@FORMS
@pytest.mark.parametrize(
    ("time", "chunk_size", "groups", "shared", "d_k", "d_v", "resets", "state"),
    [
        (23, 16, 1, 3, 5, 4, 0.15, True),  # ragged
        (40, 16, 2, 1, 3, 20, 0, False),
        (70, 64, 1, 2, 40, 17, 0.05, True),  # two sub-blocks of steps, two tiles of d_k
        (64, 32, 1, 1, 16, 70, 0.9, False),  # three tiles of d_v, resets one after the other
        (3, 16, 2, 2, 2, 2, 0.5, True),  # shorter than a chunk
        (1, 16, 1, 2, 4, 3, 0, True),
    ],
)
def test_kernels_equal_the_loop(normalized, time, chunk_size, groups, shared, d_k, d_v, resets, state):
    case = Case(normalized, 1, time, groups, shared, d_k, d_v, resets, state)
    got = case.run(chunk_size=chunk_size, method="triton")
    assert_close(got, case.run(reference_chunkwise), 1e-10)


@FORMS
@pytest.mark.parametrize("pieces", [[1, 39], [17, 3, 20]])
def test_pieces_equal_the_whole(normalized, pieces):
    case = Case(normalized, batch=1, time=40, groups=1)
    whole = case.run(chunk_size=16, method="triton")
    assert_close(case.run(pieces=pieces, chunk_size=16, method="triton"), whole, 1e-10)


@FORMS
@pytest.mark.parametrize(
    ("batch", "groups", "shared"),
    [(1, 2, 1), (1, 1, 3), (2, 1, 1), (1, 1, 1)],
    ids=["lanes of groups", "lanes of heads that share q and k", "lanes of rows", "one lane"],
)
def test_time_shards_by_kernels_equal_the_loop(normalized, batch, groups, shared):
    case = Case(normalized, batch, 45, groups, shared, resets=0.03)
    got = chunkwise_on_shards(case, [17, 3, 25], chunk_size=16, method="triton")
    assert_close(got, case.run(reference_chunkwise), 1e-10)


@FORMS
def test_segments_of_time_and_splits_of_heads_change_nothing(normalized, monkeypatch):
    """Room for one chunk's states at a time; the heads of a group in one program, in two, in four."""
    case = Case(normalized, batch=1, time=20, groups=1, shared=4)
    expected = case.run(reference_chunkwise)
    for segment, programs in ((1, 1), (1 << 20, 4), (1, 1 << 20)):
        monkeypatch.setattr(triton_chunkwise, "SEGMENT", segment)
        monkeypatch.setattr(triton_chunkwise, "PROGRAMS", programs)
        assert_close(case.run(chunk_size=16, method="triton"), expected, 1e-10)


@FORMS
@pytest.mark.parametrize(("walks", "pieces"), [(6, 3), (1 << 20, 5)])
def test_pieces_of_a_walk_change_nothing(normalized, walks, pieces, monkeypatch):
    """Seven chunks in pieces of three, and of two, of which one is empty then; forward, backward, and over shards."""
    case = Case(normalized, 1, 100, 1, 2, d_k=4, d_v=3, resets=0.02)
    expected = case.run(reference_chunkwise)
    monkeypatch.setattr(triton_chunkwise.shapes, "WALKS", walks)
    monkeypatch.setattr(triton_chunkwise.shapes, "WALKED", 1)
    monkeypatch.setattr(triton_chunkwise.shapes, "MOST_PIECES", 5)
    monkeypatch.setattr(triton_chunkwise.shapes, "SCAN", 16)
    made = spy(monkeypatch, "_pieces")
    assert_close(case.run(chunk_size=16, method="triton"), expected, 1e-10)
    assert made[0] == pieces
    if pieces == 3:
        got = chunkwise_on_shards(case, [60, 40], chunk_size=16, method="triton")
        assert_close(got, expected, 1e-10)


@FORMS
def test_wide_tiles_change_nothing(normalized, monkeypatch):
    """Which only operands of 16 bits have otherwise; two of them each way in every kernel, and some of them partly."""
    monkeypatch.setattr(triton_chunkwise.shapes, "WIDE_BITS", (64,))
    monkeypatch.setattr(triton_chunkwise.shapes, "WALKS", 1)
    case = Case(normalized, 1, 20, 1, 2, d_k=70, d_v=100, resets=0.05)
    assert_close(case.run(chunk_size=16, method="triton"), case.run(reference_chunkwise), 1e-10)


@pytest.mark.parametrize(
    ("normalized", "heads", "groups", "d_k", "d_v", "chunk"), [(False, 2, 1, 64, 32, 64), (True, 1, 1, 32, 64, 64)]
)
def test_products_are_made_once(normalized, heads, groups, d_k, d_v, chunk, monkeypatch):
    """Multiplications and additions in all matrix products are those of the algorithm: q·k and its gradient once for
    all heads and columns, tiles above the diagonal not at all."""
    done = []
    dot = interpreter.InterpreterBuilder.create_dot

    def counted(self, a, b, *rest):
        done.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(triton_chunkwise, "PROGRAMS", 1)
    case = Case(normalized, 1, chunk, groups, heads // groups, d_k, d_v, resets=0, state=False)
    inputs = [x.requires_grad_() for x in case.inputs]
    y, _ = chunkwise(*inputs, normalized=normalized, chunk_size=chunk, method="triton")
    tile = 32  # steps, in float64
    below = chunk * (chunk + tile) // 2
    scores = groups * below * d_k
    assert sum(done) == heads * (2 * chunk * d_k * d_v + below * d_v) + scores
    done.clear()
    y.sum().backward()
    states, in_chunk = 5 * chunk * d_k * d_v, 2 * below * d_v  # S, dS, dv, dq and dk; dv and the gradient of q·k
    assert sum(done) == heads * (states + in_chunk) + 3 * scores


@FORMS
def test_extreme_gates(normalized):
    """As in test_chunkwise.py: decays of 1 and e^−10000, gains of e^±40, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        case = Case(normalized, 1, 40, 1, 2, state=False, dtype=dtype)
        log_decay, gain = case.inputs[3:]
        pick = torch.rand(log_decay.shape, generator=case.draws)
        log_decay[pick < 0.2] = -1e4
        log_decay[(pick > 0.2) & (pick < 0.4)] = 0.0
        if normalized:
            gain[pick > 0.7] = 40.0
            gain[pick > 0.85] = -40.0
        got = case.run(chunk_size=16, method="triton")
        assert_close(got, double(case).run(reference_chunkwise), 2e-4 if dtype == torch.float32 else 1e-10)


@FORMS
def test_nothing_written_yet_reads_zero(normalized):
    case = Case(normalized, 1, 20, state=False, resets=0)
    case.inputs[4] = torch.full_like(case.inputs[4], -float("inf") if normalized else 0.0)
    y, *rest = case.run(chunk_size=16, method="triton")
    assert not y.any()
    assert not any(x.isnan().any() for x in rest)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_and_half_precision(normalized, dtype):
    """bfloat16: the operands of every product are rounded, 2⁻⁹ each, as in any such kernel. float16: states and what
    is inside a chunk go far beyond its 65504, the results do not."""
    case = Case(normalized, 1, 40, 1, 2, 16, 16, dtype=torch.float32)
    if dtype == torch.float16:
        case.inputs[:3] = [x * factor for x, factor in zip(case.inputs[:3], (1e-3, 600.0, 600.0), strict=True)]
        case.weights = [1e-5 * w for w in case.weights]
    case.inputs[:3] = [x.to(dtype) for x in case.inputs[:3]]
    case.weights[0] = case.weights[0].to(dtype).float()
    got = case.run(chunk_size=16, method="triton")
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert_close(got, double(case).run(reference_chunkwise), tolerance)


@FORMS
def test_slices_of_one_projection_are_read_where_they_are(normalized):
    """Mamba2's x, B and C, as views of one tensor."""
    case = Case(normalized, 2, 20, 1, 2, 4, 4, state=False, resets=0)
    q, k, v, log_decay, gain = case.inputs
    together = torch.cat([x.flatten(2) for x in (v, k, q)], -1)
    views = [part.unflatten(-1, x.shape[2:]) for part, x in zip(together.split([8, 4, 4], -1), (v, k, q), strict=True)]
    assert all(triton_chunkwise._packed(x).data_ptr() == x.data_ptr() for x in views)
    options = {"normalized": normalized, "chunk_size": 16, "method": "triton"}
    y, _ = chunkwise(views[2], views[1], views[0].requires_grad_(), log_decay, gain, **options)
    assert_close([y.detach()], case.run(reference_chunkwise)[:1], 1e-10)


@FORMS
def test_a_state_and_a_gradient_of_any_strides(normalized):
    case = Case(normalized, 1, 20, 1, 2)
    case.state[0] = case.state[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs = [x.requires_grad_() for x in (*case.inputs, *case.state[:2])]
    state = (*inputs[5:], case.state[2]) if normalized else inputs[5]
    y, _ = chunkwise(*inputs[:5], state, case.reset, normalized=normalized, chunk_size=16, method="triton")
    case.weights = [torch.ones_like(case.weights[0]), *(torch.zeros_like(w) for w in case.weights[1:])]
    expected = case.run(reference_chunkwise)[len(case.state) + 1 :]
    assert_close(torch.autograd.grad(y.sum(), inputs), expected[: len(inputs)], 1e-10)  # strides of zero


def test_the_chunk_is_refused_in_one_line():
    case = Case(False)
    with pytest.raises(ArgumentError, match="chunk_size is 24; method 'triton' takes one of 16, 32, 64, 128, 256"):
        chunkwise(*case.inputs, chunk_size=24, method="triton")


def test_more_rows_than_a_grid_has_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(triton_chunkwise, "_ROWS", 7)
    with pytest.raises(ArgumentError, match="v has 2 batch rows × 4 heads; method 'triton' takes 7 together"):
        chunkwise(*Case(False).inputs, method="triton")
