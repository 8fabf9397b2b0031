"""Dense recurrences per head: the adjoint against autograd, torch's own modules, pieces, resets, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from paralm_kernels import ArgumentError, dense_rnn, dense_state, dense_torch, reference_dense_rnn
from paralm_kernels.dense_cells import KINDS
from torch import Tensor

from tests.peers import run_peer

B, T, H, D = 3, 13, 2, 5
NAMES = list(KINDS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    draws = torch.Generator().manual_seed(seed + 7919 * len(shape))
    return torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype)


def arguments(kind: str, time: int = T, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (H, D)):
    """(inputs, weight, bias, state); a normaliser is positive, the rest normal."""
    cell = KINDS[kind]
    inputs = normal(B, time, len(cell.gates), *size, dtype=dtype)
    weight = normal(len(cell.gates), size[0], size[1], size[1], seed=1, dtype=dtype)
    bias = normal(len(cell.biases), *size, seed=2, dtype=dtype)
    state = [normal(B, *size, seed=3 + i, dtype=dtype) for i in range(len(cell.state))]
    if kind == "slstm":
        state[2] = state[2].abs() + 0.5
    return inputs, weight, bias, tuple(state)


def attached(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors if tensor is not None]


def score(*tensors: Tensor) -> Tensor:
    """A number that depends on every element with a weight of its own."""
    weights = (normal(*tensor.shape, seed=11, dtype=tensor.dtype).to(tensor.device) for tensor in tensors)
    return sum((weight * tensor).sum() for weight, tensor in zip(weights, tensors, strict=True))


def outcome(run, kind, inputs, weight, bias, state, reset=None, **options):
    """Outputs, final state, and gradients of everything given."""
    given = attached(inputs, weight, bias, *(state or ()))
    rest = iter(given[2:])
    b = None if bias is None else next(rest)
    y, end = run(kind, given[0], given[1], b, tuple(rest) or None, reset, **options)
    return [y, *end, *torch.autograd.grad(score(y, *end), given)]


def assert_same(got, expected, tolerance=1e-10):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def resets() -> Tensor:
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 0] = reset[1, 4] = reset[1, 5] = reset[2, 5] = reset[2, T - 1] = True
    return reset


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("biased", "carried", "cut"), list(itertools.product((False, True), repeat=3)))
def test_torch_is_the_reference(kind, biased, carried, cut, monkeypatch):
    """With pieces shorter than the sequence too."""
    inputs, weight, bias, state = arguments(kind)
    given = (kind, inputs, weight, bias if biased else None, state if carried else None, resets() if cut else None)
    expected = outcome(reference_dense_rnn, *given)
    assert all(value.isfinite().all() for value in expected)
    assert_same(outcome(dense_rnn, *given, method="torch"), expected)
    monkeypatch.setattr(dense_torch, "PIECE", 5)
    assert_same(outcome(dense_rnn, *given, method="torch"), expected)


@pytest.mark.parametrize("kind", NAMES)
def test_gradients_are_difference_quotients(kind):
    """Of the final state too, sLSTM's m among it."""
    inputs, weight, bias, state = arguments(kind, time=4, size=(2, 2))

    def run(inputs, weight, bias, *state):
        y, end = dense_rnn(kind, inputs, weight, bias, state)
        return (y, *end)

    assert torch.autograd.gradcheck(run, attached(inputs, weight, bias, *state))


@pytest.mark.parametrize("kind", NAMES)
def test_some_gradients_only(kind):
    """Weights that are not trained, outputs that are not used: what is asked for is the same."""
    inputs, weight, bias, state = arguments(kind)
    (x,) = attached(inputs)
    expected = attached(inputs, weight)
    y, end = dense_rnn(kind, x, weight, bias, state)
    y_all, end_all = dense_rnn(kind, *expected, bias, state)
    for got, whole in ((y, y_all), (end[-1], end_all[-1])):
        (grad,) = torch.autograd.grad(score(got), [x], retain_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(score(whole), expected[:1], retain_graph=True)[0])


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("lengths", [[1, T - 1], [5, 1, 7], [1] * T])
def test_pieces_are_the_whole(kind, lengths):
    inputs, weight, bias, state = arguments(kind)

    def in_pieces(kind, inputs, weight, bias, state, reset):
        outputs, at = [], 0
        for length in lengths:
            part = slice(at, at + length)
            y, state = dense_rnn(kind, inputs[:, part], weight, bias, state, reset[:, part])
            outputs.append(y)
            at += length
        return torch.cat(outputs, 1), state

    whole = outcome(dense_rnn, kind, inputs, weight, bias, state, resets())
    assert_same(outcome(in_pieces, kind, inputs, weight, bias, state, resets()), whole)
    with torch.no_grad():  # one step without gradients has a path of its own
        y, end = in_pieces(kind, inputs, weight, bias, state, resets())
    assert_same([y, *end], whole[: 1 + len(end)])


@pytest.mark.parametrize("kind", NAMES)
def test_a_reset_is_a_fresh_start(kind):
    inputs, weight, bias, state = arguments(kind)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 6] = True
    given = attached(inputs, *state)
    y, end = dense_rnn(kind, given[0], weight, bias, given[1:], reset)
    (fresh_inputs,) = attached(inputs[:, 6:])
    fresh_y, fresh_end = dense_rnn(kind, fresh_inputs, weight, bias)
    assert_same([y[:, 6:], *end], [fresh_y, *fresh_end])
    grads = torch.autograd.grad(score(y[:, 6:], *end), given)
    (expected,) = torch.autograd.grad(score(fresh_y, *fresh_end), [fresh_inputs])
    torch.testing.assert_close(grads[0][:, 6:], expected, rtol=1e-10, atol=1e-10)
    assert not grads[0][:, :6].any()
    assert not any(grad.any() for grad in grads[1:])


@pytest.mark.parametrize("kind", NAMES)
def test_no_state_is_the_initial_one(kind):
    inputs, weight, bias, _ = arguments(kind)
    initial = dense_state(kind, B, H, D, dtype=torch.float64)
    got = outcome(dense_rnn, kind, inputs, weight, bias, initial)
    assert all(value.isfinite().all() for value in got)
    expected = outcome(dense_rnn, kind, inputs, weight, bias, None)
    assert_same(got[: len(expected)], expected)


def torch_module(kind: str, d_in: int, width: int, dtype: torch.dtype) -> torch.nn.RNNBase:
    torch.manual_seed(0)
    made = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[kind]
    return made(d_in, width, batch_first=True, dtype=dtype)


def as_module(kind: str, module: torch.nn.RNNBase, x: Tensor, state: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the module computes, by dense_rnn with one head."""
    gates, width = len(KINDS[kind].gates), module.hidden_size
    inputs = torch.nn.functional.linear(x, module.weight_ih_l0).view(*x.shape[:2], gates, 1, width)
    b_in, b_rec = module.bias_ih_l0.view(gates, 1, width), module.bias_hh_l0.view(gates, 1, width)
    bias = b_in + b_rec
    if kind == "gru":
        bias = torch.cat((bias[:2], b_in[2:], b_rec[2:]))
    weight = module.weight_hh_l0.view(gates, 1, width, width)
    y, end = dense_rnn(kind, inputs, weight, bias, tuple(part.unsqueeze(1) for part in state))
    return y.squeeze(2), tuple(part.squeeze(1) for part in end)


@pytest.mark.parametrize("kind", ["lstm", "gru", "elman"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_torchs_own_modules(kind, dtype, tolerance):
    """Outputs, final states, gradients of inputs, states and all parameters."""
    module = torch_module(kind, 6, 8, dtype)
    x = normal(B, 20, 6, dtype=dtype)
    state = [normal(B, 8, seed=i, dtype=dtype) for i in range(len(KINDS[kind].state))]
    results = []
    for ours in (True, False):
        given = attached(x, *state)
        if ours:
            y, end = as_module(kind, module, given[0], given[1:])
        else:
            first = tuple(part.unsqueeze(0) for part in given[1:])
            y, last = module(given[0], first if len(first) > 1 else first[0])
            end = tuple(part.squeeze(0) for part in (last if isinstance(last, tuple) else (last,)))
        wanted = [*given, *module.parameters()]
        results.append([y, *end, *torch.autograd.grad(score(y, *end), wanted)])
    assert_same(*results, tolerance)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(kind, dtype):
    """The result is the float32 one of the rounded arguments, rounded once."""
    rounded = [part.to(dtype) for part in arguments(kind)[:3]]
    y, end = dense_rnn(kind, *rounded)
    wide_y, wide_end = dense_rnn(kind, *(part.float() for part in rounded))
    assert y.dtype == dtype
    assert all(part.dtype == torch.float32 for part in end)
    assert_same([y, *end], [wide_y.to(dtype), *wide_end], 1e-6)
    got = outcome(dense_rnn, kind, *rounded, end, resets())
    assert [value.dtype for value in got[1 + len(end) :]] == [dtype] * 3 + [torch.float32] * len(end)
    assert all(value.isfinite().all() for value in got)


@pytest.mark.parametrize("kind", NAMES)
def test_float32_is_close_to_float64(kind):
    inputs, weight, bias, state = arguments(kind)
    wide = outcome(dense_rnn, kind, inputs, weight / 4, bias, state, resets())
    narrow = outcome(
        dense_rnn, kind, inputs.float(), weight.float() / 4, bias.float(), tuple(s.float() for s in state), resets()
    )
    for a, b in zip(narrow, wide, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("size", [80.0, 1000.0, 1e4])
@pytest.mark.parametrize(("i", "f"), list(itertools.product((-1, 1), repeat=2)))
def test_slstm_neither_overflows_nor_divides_by_zero(size, i, f):
    """Exponential gates far out, from the fresh start, through a reset; in float32."""
    inputs, weight, bias, _ = (part if isinstance(part, tuple) else part.float() for part in arguments("slstm"))
    inputs[:, :, 0] += size * i
    inputs[:, ::2, 1] += size * f
    got = outcome(dense_rnn, "slstm", inputs, weight, bias, None, resets())
    assert all(value.isfinite().all() for value in got)
    assert got[0].abs().max() <= 1 + 1e-6  # an average of tanh times a gate


def test_slstms_hidden_state_does_not_see_a_shift_of_m():
    inputs, weight, bias, (h, c, n, m) = arguments("slstm")
    shift = normal(B, H, D, seed=9)
    y, _ = dense_rnn("slstm", inputs, weight, bias, (h, c, n, m))
    moved, _ = dense_rnn("slstm", inputs, weight, bias, (h, c * shift.exp(), n * shift.exp(), m - shift))
    torch.testing.assert_close(moved, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["torch", "newton"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind, method):
    given = arguments(kind, dtype=torch.float32)
    expected = outcome(dense_rnn, kind, *given, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        got = outcome(dense_rnn, kind, *given, method=method)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_returned_tensors_are_their_own():
    """Writing into an output or the state does not reach what the backward pass reads."""
    inputs, weight, bias, state = arguments("lstm")
    expected = outcome(dense_rnn, "lstm", inputs, weight, bias, state)[3:]
    given = attached(inputs, weight, bias, *state)
    y, end = dense_rnn("lstm", *given[:3], tuple(given[3:]))
    total = score(y, *end)
    with torch.no_grad():
        for tensor in (y, *end):
            tensor.detach().zero_()
    assert_same(torch.autograd.grad(total, given), expected)
    y, (h, _) = dense_rnn("lstm", inputs[:, :1], weight, bias, state)  # decoding
    y.zero_()
    assert h.any()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"kind": "rnn"}, ["kind", "'rnn'", "lstm, gru"]),
        ({"inputs": torch.zeros(B, T, 3, H, D)}, ["inputs is (3, 13, 3, 2, 5)", "(batch, time, 4, head, d_head)"]),
        ({"inputs": torch.zeros(B, 0, 4, H, D)}, ["inputs is (3, 0, 4, 2, 5)", "none of them 0"]),
        ({"inputs": torch.zeros(B, T, 4, H, D, dtype=torch.int64)}, ["inputs", "torch.int64"]),
        ({"weight": torch.zeros(4, H, D, D + 1)}, ["weight is (4, 2, 5, 6)", "(4, 2, 5, 5)"]),
        ({"weight": torch.zeros(4, H, D, D, dtype=torch.float64)}, ["float64 does not mix"]),
        ({"bias": torch.zeros(3, H, D)}, ["bias is (3, 2, 5)", "(4, 2, 5)", "i, f, z, o"]),
        ({"kind": "gru", "inputs": torch.zeros(B, T, 3, H, D), "weight": torch.zeros(3, H, D, D),
          "bias": torch.zeros(3, H, D)}, ["bias is (3, 2, 5)", "(4, 2, 5)", "r, z, n, recurrent n"]),
        ({"state": torch.zeros(B, H, D)}, ["state must be a tuple of 2 tensors (h, c)"]),
        ({"state": (torch.zeros(B, H, D),)}, ["state must be a tuple of 2 tensors (h, c)", "got 1 of them"]),
        ({"state": (torch.zeros(B, H, D), torch.zeros(B, D, H))}, ["state 'c' is (3, 5, 2)", "(3, 2, 5)"]),
        ({"state": (torch.zeros(B, H, D), [0.0])}, ["state 'c' must be a floating-point tensor", "list"]),
        ({"reset": torch.zeros(B, T)}, ["reset must be a bool tensor", "torch.float32"]),
        ({"reset": torch.zeros(T, B, dtype=torch.bool)}, ["reset is (13, 3)", "(3, 13)"]),
        ({"weight": torch.zeros(4, H, D, D, device="meta")}, ["weight is on meta", "inputs is on cpu"]),
        ({"method": "magic"}, ["method is 'magic'", "torch"]),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(change, parts):
    inputs, weight, bias, state = arguments("lstm", dtype=torch.float32)
    given = {"kind": "lstm", "inputs": inputs, "weight": weight, "bias": bias, "state": state, **change}
    if change.get("kind") == "gru":
        given["state"] = None
    with pytest.raises(ArgumentError) as caught:
        dense_rnn(**given)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


FLASHRNN = """
from flashrnn import flashrnn
for case in sorted({name.split("/")[0] for name in given}):
    own = {name.split("/")[1]: tensor for name, tensor in given.items() if name.startswith(case + "/")}
    wanted = [own[name].requires_grad_() for name in ("inputs", "weight", "bias", "state")]
    y, last = flashrnn(*wanted, case.split()[0], None, "vanilla", "float32")
    ((y[0] * own["by_y"]).sum() + (last[:, :, 0] * own["by_state"]).sum()).backward()
    for name, tensor in zip(("y", "end", *own), (y[0], last[:, :, 0], *(own[name].grad for name in own))):
        if tensor is not None:
            result[f"{case}/{name}"] = tensor
"""
"""FlashRNN's states are (state, batch, time, head, d_head). The gradients have the names of what they are of."""
GRU_GATES, GRU_BIASES = [2, 0, 1], [3, 0, 1, 2]
"""Its GRU's recurrent gates are (n, r, z) and its biases (recurrent n, r, z, n)."""


def flashrnn_case(kind: str, carried: bool) -> dict[str, Tensor]:
    """What FlashRNN is given, in its layout; a state that is not carried is its initial one."""
    inputs, weight, bias, parts = arguments(kind, dtype=torch.float32)
    state = torch.stack(parts) * carried
    if kind == "gru":
        weight, bias = weight[GRU_GATES], bias[GRU_BIASES]
    by_y, by_state = normal(B, T, H, D, seed=20).float(), normal(*state.shape, seed=21).float()
    given = {"inputs": inputs, "weight": weight, "bias": bias, "state": state.unsqueeze(2)}
    return {**given, "by_y": by_y, "by_state": by_state}


@pytest.fixture(scope="module")
def flashrnn_results() -> dict[str, Tensor]:
    """All cases in one process: importing it takes longer than running it."""
    cases = {f"{kind} {carried}": flashrnn_case(kind, carried) for kind in NAMES for carried in (True, False)}
    return run_peer("flashrnn", FLASHRNN, {f"{c}/{name}": v for c, case in cases.items() for name, v in case.items()})


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("carried", [True, False])
def test_flashrnn(kind, carried, flashrnn_results):
    """The published FlashRNN, its plain backend: outputs, final state, gradients of everything."""
    theirs = {name.split("/")[1]: v for name, v in flashrnn_results.items() if name.startswith(f"{kind} {carried}/")}
    case = flashrnn_case(kind, carried)
    inputs, weight, bias, *state = attached(*arguments(kind, dtype=torch.float32)[:3], *case["state"][:, :, 0])
    initial = KINDS[kind].initial if not carried else [0.0] * len(state)
    begin = tuple(part + value for part, value in zip(state, initial, strict=True))
    y, end = dense_rnn(kind, inputs, weight, bias, begin)
    total = (y * case["by_y"]).sum() + (torch.stack(end) * case["by_state"]).sum()
    to_inputs, to_weight, to_bias, *to_state = torch.autograd.grad(total, [inputs, weight, bias, *state])
    if kind == "gru":
        to_weight, to_bias = to_weight[GRU_GATES], to_bias[GRU_BIASES]
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, theirs["y"], **tolerance)
    torch.testing.assert_close(torch.stack(end), theirs["end"], **tolerance)
    torch.testing.assert_close(to_inputs, theirs["inputs"], **tolerance)
    torch.testing.assert_close(to_weight, theirs["weight"], **tolerance)
    torch.testing.assert_close(to_bias, theirs["bias"], **tolerance)
    if carried or kind != "slstm":  # its sLSTM starts from m = 0 where ours starts from −∞: other gradients of c and n
        torch.testing.assert_close(torch.stack(to_state), theirs["state"][:, :, 0], **tolerance)
