"""chunkwise: the chunk form equals the loop over time, in values, states and gradients, whole or in pieces, at extreme
gates and in every dtype; and every wrong argument is refused in one line."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paralm_kernels import ArgumentError, chunkwise, reference_chunkwise

from .shard_threads import chunkwise_on_shards

FORMS = pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])


class Case:
    """Random arguments in one dtype, with weights for a loss over the output and the final state."""

    def __init__(
        self,
        normalized,
        batch=2,
        time=23,
        groups=2,
        shared=2,
        d_k=5,
        d_v=4,
        resets=0.15,
        state=True,
        seed=0,
        dtype=None,
    ):
        self.normalized, self.dtype, self.draws = (
            normalized,
            dtype or torch.float64,
            torch.Generator().manual_seed(seed),
        )
        heads = groups * shared
        q, k, v = (self.draw(batch, time, *s) for s in ((groups, d_k), (groups, d_k), (heads, d_v)))
        log_decay = torch.nn.functional.logsigmoid(2 * self.draw(batch, time, heads) + 1)
        self.inputs = [q, k, v, log_decay, 2 * self.draw(batch, time, heads)]
        self.weights = [self.draw(batch, time, heads, d_v), self.draw(batch, heads, d_k, d_v)]
        self.state = [self.draw(batch, heads, d_k, d_v)]
        if normalized:
            self.state += [self.draw(batch, heads, d_k), self.draw(batch, heads)]
            self.weights.append(self.draw(batch, heads, d_k))
        if not state:
            self.state = []
        self.reset = torch.rand(batch, time, generator=self.draws) < resets if resets else None

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.draws, dtype=torch.float64).to(self.dtype)

    def run(self, function=chunkwise, pieces=None, **options):
        """y, the parts of the final state, the gradients of inputs and state."""
        inputs = [x.detach().clone().requires_grad_() for x in self.inputs]
        state = [x.detach().clone().requires_grad_() for x in self.state]
        now, outputs = (tuple(state) if self.normalized else state[0]) if state else None, []
        start = 0
        for length in pieces or [inputs[0].shape[1]]:
            cut = slice(start, start + length)
            reset = None if self.reset is None else self.reset[:, cut]
            y, now = function(*(x[:, cut] for x in inputs), now, reset, normalized=self.normalized, **options)
            outputs.append(y)
            start += length
        final = list(now) if self.normalized else [now]
        y = torch.cat(outputs, 1)
        loss = sum((a * w).sum() for a, w in zip([y, *final], self.weights, strict=False))
        grads = torch.autograd.grad(loss, [*inputs, *state], allow_unused=True)
        zeros = [torch.zeros_like(x) for x in (*inputs, *state)]
        grads = [z if g is None else g for g, z in zip(grads, zeros, strict=True)]
        return [x.detach() for x in (y, *final, *grads)]


def assert_close(got, expected, tolerance=1e-9):
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a.isfinite(), b.isfinite()), index
        assert not a.isnan().any(), index
        a, b = (x.double().masked_fill(~x.isfinite(), 0) for x in (a, b))
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1))
        assert error <= tolerance, (index, error)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    normalized=st.booleans(),
    batch=st.integers(1, 2),
    time=st.integers(1, 30),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    d_k=st.integers(1, 6),
    d_v=st.integers(1, 6),
    chunk_size=st.sampled_from([1, 3, 4, 8, 64]),
    resets=st.sampled_from([0.0, 0.1, 0.9]),
    state=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chunks_equal_the_loop(chunk_size, **shape):
    case = Case(**shape)
    assert_close(case.run(chunk_size=chunk_size), case.run(reference_chunkwise), 1e-11)


@FORMS
@pytest.mark.parametrize("pieces", [[1, 22], [22, 1], [2, 5, 1, 15], [1] * 23])
def test_pieces_equal_the_whole(normalized, pieces):
    for state in (False, True):
        case = Case(normalized, state=state)
        assert_close(case.run(pieces=pieces, chunk_size=4), case.run(chunk_size=8))


@FORMS
def test_blocks_of_chunks_equal_one_block(normalized, monkeypatch):
    """Long sequences go block by block; the smallest budget makes a block of each few chunks."""
    case = Case(normalized, time=61)
    whole = case.run(chunk_size=4)
    monkeypatch.setitem(__import__("paralm_kernels.chunkwise_torch", fromlist=["_"])._BUDGET, "cpu", 1)
    assert_close(case.run(chunk_size=4), whole, 1e-12)


@FORMS
def test_a_reset_is_a_fresh_start(normalized):
    case = Case(normalized, resets=0)
    case.reset = torch.zeros(2, 23, dtype=torch.bool)
    case.reset[:, 9] = True
    case.weights[0][:, :9] = 0
    y, *rest = case.run(chunk_size=8)
    late = [x[:, 9:] for x in case.inputs]
    fresh, end = chunkwise(*late, normalized=normalized)
    assert_close([y[:, 9:], rest[0]], [fresh, end[0] if normalized else end], 1e-12)
    grads = rest[len(case.state) :]
    assert not any(grad.any() for grad in (*grads[5:], *(g[:, :9] for g in grads[:5]))), "a gradient passed the reset"
    assert not grads[3][:, 9].any(), "a decay at a reset decays nothing"


@FORMS
def test_gradients_are_the_difference_quotients(normalized):
    case = Case(normalized, batch=1, time=9, groups=1, shared=2)
    case.weights[1:] = [torch.zeros_like(w) for w in case.weights[1:]]
    grads = case.run(chunk_size=4)[len(case.state) + 1 :]
    every = [*case.inputs, *case.state[:2]]
    directions = [case.draw(*x.shape) for x in every]

    def loss(step):
        moved = [x + step * d for x, d in zip(every, directions, strict=True)]
        state = (*moved[5:], case.state[2]) if normalized else moved[5]
        y, _ = chunkwise(*moved[:5], state, case.reset, normalized=normalized, chunk_size=4)
        return float((y * case.weights[0]).sum())

    quotient = (loss(1e-5) - loss(-1e-5)) / 2e-5  # y depends on m by eps alone: 1e-6
    slope = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=False))
    assert abs(slope - quotient) <= 1e-5 * max(1, abs(quotient))


def test_the_mlstm_cell_has_the_exact_gradient():
    """Against float64 autograd of the unstabilised recurrence written out here: the normaliser's gradient is in it."""
    batch, time, heads, d_k, d_v = 2, 40, 3, 8, 8
    case = Case(True, batch, time, heads, 1, d_k, d_v, resets=0, state=False)
    inputs = [x.detach().clone().requires_grad_() for x in case.inputs]
    q, k, v, log_decay, i = inputs
    c, n = torch.zeros(batch, heads, d_k, d_v).double(), torch.zeros(batch, heads, d_k).double()
    outputs, below = [], 0
    for t in range(time):
        f_t, i_t = log_decay[:, t].exp(), i[:, t].exp()
        c = f_t[..., None, None] * c + (i_t[..., None] * k[:, t])[..., None] * v[:, t, :, None]
        n = f_t[..., None] * n + i_t[..., None] * k[:, t]
        q_t = q[:, t] / math.sqrt(d_k)
        norm = (n * q_t).sum(-1).abs()
        below += int((norm < 1).sum())
        outputs.append((c * q_t[..., None]).sum(-2) / norm.clamp(min=1)[..., None])
    assert 20 < below < batch * time * heads - 20  # both branches of the maximum
    y = torch.stack(outputs, 1)
    expected = torch.autograd.grad((y * case.weights[0]).sum(), inputs)
    got, _ = chunkwise(*inputs, normalized=True, eps=0.0, chunk_size=16)
    assert_close([got.detach(), *torch.autograd.grad((got * case.weights[0]).sum(), inputs)], [y.detach(), *expected])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates_stay_finite_and_right(normalized, dtype):
    """Decays of 1 and of e^−10000, gains of e^±40, in chunks where both meet; also over time shards."""
    for seed in range(4):
        case = Case(normalized, time=40, state=False, seed=seed, dtype=dtype)
        log_decay, gain = case.inputs[3:]
        pick = torch.rand(log_decay.shape, generator=case.draws)
        log_decay[pick < 0.2] = -1e4
        log_decay[(pick > 0.2) & (pick < 0.4)] = 0.0
        log_decay[(pick > 0.4) & (pick < 0.5)] = -40.0
        if normalized:
            gain[pick > 0.7] = 40.0
            gain[pick > 0.85] = -40.0
        every = case.run(chunk_size=16), chunkwise_on_shards(case, [13, 1, 20, 6], chunk_size=16)
        case.inputs, case.weights = [x.double() for x in case.inputs], [w.double() for w in case.weights]
        for got in every:
            assert_close(got, case.run(reference_chunkwise), 2e-4 if dtype == torch.float32 else 1e-9)


def test_a_large_decay_does_not_blur_the_others():
    """In float32, differences of sums near 10000 are good to 1e-3; the result is not to be that bad."""
    case = Case(False, time=32, resets=0, state=False, dtype=torch.float32)
    case.inputs[3][:, ::8] = -1e4
    y = case.run(chunk_size=32)[0]
    case.inputs, case.weights = [x.double() for x in case.inputs], [w.double() for w in case.weights]
    expected = case.run(reference_chunkwise)[0]
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-6


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(normalized, dtype):
    case = Case(normalized, time=50, dtype=torch.float32, state=False)
    case.inputs[:3] = [x.to(dtype) for x in case.inputs[:3]]
    case.weights[0] = case.weights[0].to(dtype).float()  # as the gradient of y is
    got = case.run(chunk_size=16)
    assert got[0].dtype == dtype
    assert {x.dtype for x in got[1 : len(case.weights)]} == {torch.float32}
    case.inputs, case.weights = [x.double() for x in case.inputs], [w.double() for w in case.weights]
    tolerance = 4e-3 if dtype == torch.bfloat16 else 5e-4  # a rounding of the results
    assert_close(got, case.run(reference_chunkwise), tolerance)


@FORMS
def test_decoding_step_by_step_without_gradients(normalized):
    case = Case(normalized)
    state = tuple(case.state) if normalized else case.state[0]
    with torch.no_grad():
        y, end = chunkwise(*case.inputs, state, case.reset, normalized=normalized)
        outputs = []
        for t in range(23):
            cut = slice(t, t + 1)
            arguments = [x[:, cut] for x in case.inputs]
            one, state = chunkwise(*arguments, state, case.reset[:, cut], normalized=normalized)
            outputs.append(one)
    ends = (end, state) if normalized else ((end,), (state,))
    assert_close([torch.cat(outputs, 1), *ends[1]], [y, *ends[0]], 1e-11)


@FORMS
def test_nothing_written_yet_reads_zero(normalized):
    """Steps with gain 0 (its log −∞) leave the initial state, also m = −∞, and no NaN in any gradient."""
    case = Case(normalized, state=False, resets=0)
    case.inputs[4] = torch.full_like(case.inputs[4], -math.inf if normalized else 0.0)
    y, *rest = case.run(chunk_size=8)
    assert not y.any()
    assert not rest[0].any()
    assert not any(x.isnan().any() for x in rest)


@FORMS
def test_arguments_are_left_alone_and_autocast_changes_nothing(normalized):
    case = Case(normalized, dtype=torch.float32)
    state = tuple(case.state) if normalized else case.state[0]
    before = [x.clone() for x in (*case.inputs, *case.state)]
    expected, _ = chunkwise(*case.inputs, state, case.reset, normalized=normalized)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = chunkwise(*case.inputs, state, case.reset, normalized=normalized)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (*case.inputs, *case.state), strict=True))
    step = [x[:, :1] for x in case.inputs]  # decoding is the loop
    expected, _ = chunkwise(*step, state, normalized=normalized)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunkwise(*step, state, normalized=normalized)[0], expected)


def arguments(**changed):
    every = dict(zip(("q", "k", "v", "log_decay", "gain"), Case(False).inputs, strict=True))
    return {**every, **changed}


REFUSED = {
    "v has 3 heads and q has 2 groups": {"v": torch.zeros(2, 23, 3, 4).double()},
    "k is (2, 23, 2, 6), expected (2, 23, 2, 5) as q": {"k": torch.zeros(2, 23, 2, 6).double()},
    "q is (2, 23, 2), expected (batch, time, groups, d_k)": {"q": torch.zeros(2, 23, 2).double()},
    "log_decay is (2, 23, 2), expected (2, 23, 4)": {"log_decay": torch.zeros(2, 23, 2).double()},
    "gain must be a floating-point tensor, got torch.int64": {"gain": torch.zeros(2, 23, 4).long()},
    "k is torch.float32 but q is torch.float64": {"k": torch.zeros(2, 23, 2, 5)},
    "float64 does not mix": {"gain": torch.zeros(2, 23, 4)},
    "state must be one tensor S, got tuple": {"state": (torch.zeros(2, 4, 5, 4).double(),)},
    "state S is (2, 4, 4, 5), expected (2, 4, 5, 4)": {"state": torch.zeros(2, 4, 4, 5).double()},
    "state must be a tuple (C, n, m), got Tensor": {"state": torch.zeros(2, 4, 5, 4).double(), "normalized": True},
    "state must be a tuple (C, n, m), got tuple of 1": {"state": (torch.zeros(1),), "normalized": True},
    "reset must be a bool tensor (batch, time), got torch.int64": {"reset": torch.zeros(2, 23).long()},
    "reset is (2, 22), expected (2, 23)": {"reset": torch.zeros(2, 22).bool()},
    "chunk_size is 0; expected a whole number": {"chunk_size": 0},
    "method is 'cuda'; expected one of auto, torch, triton": {"method": "cuda"},
    "eps is -1.0; expected a finite number": {"eps": -1.0},
    "v is on meta but chunkwise: q is on cpu": {"v": torch.zeros(2, 23, 4, 4, device="meta").double()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_arguments_are_refused_in_one_line(message):
    with pytest.raises(ArgumentError) as caught:
        chunkwise(**arguments(**REFUSED[message]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    normalized=st.booleans(),
    batch=st.integers(1, 2),
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    resets=st.sampled_from([0, 0.05, 0.3]),
    state=st.booleans(),
    chunk_size=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_time_shards_equal_the_loop(normalized, batch, cuts, groups, shared, resets, state, chunk_size, seed):
    case = Case(normalized, batch, sum(cuts), groups, shared, resets=resets, state=state, seed=seed)
    assert_close(chunkwise_on_shards(case, cuts, chunk_size=chunk_size), case.run(reference_chunkwise))


@FORMS
def test_lanes_of_heads_round_what_they_share_once(normalized):
    """In bfloat16: the gradients of q and k are sums over heads whose two halves nearly cancel."""
    case = Case(normalized, 1, 48, groups=1, shared=4, resets=0, state=False, dtype=torch.bfloat16)
    for x in (*case.inputs[2:], case.weights[0]):
        x[:, :, 2:] = x[:, :, :2]
    case.weights[0][:, :, 2:] *= -(1 + 2**-7)
    case.weights[1:] = [torch.zeros_like(w) for w in case.weights[1:]]
    whole, parts = case.run(chunk_size=16), chunkwise_on_shards(case, [20, 28], chunk_size=16)
    case.inputs, case.weights = [x.double() for x in case.inputs], [w.double() for w in case.weights]
    exact = case.run(reference_chunkwise)
    first = -5  # of the gradients: q's
    for index in (first, first + 1):
        errors = [float((got[index].double() - exact[index]).norm() / exact[index].norm()) for got in (whole, parts)]
        assert errors[1] <= 1.5 * errors[0] + 1e-3, errors
