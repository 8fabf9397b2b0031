"""The neural memory: tiles against the loop over tokens, pieces against the whole, resets against fresh starts, and
titans-pytorch."""

from __future__ import annotations

import functools
import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from paralm_kernels import ArgumentError, memory_state, neural_memory, read_memory
from paralm_kernels.neural_memory_layout import plan
from paralm_kernels.pointwise import pointwise
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.peers import run_peer

HEADS, D_IN, D_OUT = 2, 3, 4


class Case:
    """Random arguments in float64, every leaf with a gradient."""

    def __init__(
        self,
        time: int = 19,
        depth: int = 2,
        biases: bool = False,
        momentum: bool = True,
        keep: bool = True,
        norm: bool = False,
        batch: int = 3,
    ) -> None:
        self.draws = torch.Generator().manual_seed(time)
        self.depth, self.batch, self.time = depth, batch, time
        d_out = D_IN if norm else D_OUT
        widths = [D_IN, *[5] * (depth - 1), d_out]
        self.q = self.normal(batch, time, HEADS, D_IN)
        self.k = self.normal(batch, time, HEADS, D_IN)
        self.v = self.normal(batch, time, HEADS, d_out)
        self.rate = self.normal(batch, time, HEADS).sigmoid().mul(0.1).detach().requires_grad_()
        self.log_momentum = self.log() if momentum else None
        self.log_keep = self.log(2.0) if keep else None
        self.weights = [self.normal(HEADS, o, i, scale=0.5) for i, o in pairwise(widths)]
        self.biases = [self.normal(HEADS, o, scale=0.5) for o in widths[1:]] if biases else None
        self.norm = self.normal(HEADS, d_out) if norm else None

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.draws, dtype=torch.float64)).requires_grad_()

    def log(self, shift: float = 0.0) -> Tensor:
        gate = torch.nn.functional.logsigmoid(self.normal(self.batch, self.time, HEADS) + shift)
        return gate.detach().requires_grad_()

    def resets(self) -> Tensor:
        reset = torch.zeros(self.batch, self.time, dtype=torch.bool)
        reset[0, 0] = reset[0, 7] = reset[1, 4] = reset[1, 5] = True
        return reset

    def leaves(self) -> list[Tensor]:
        given = [self.q, self.k, self.v, self.rate, self.log_momentum, self.log_keep, *self.weights]
        return [x for x in [*given, *(self.biases or ()), self.norm] if x is not None]

    def moved(self, device: str) -> list[Tensor]:
        """The leaves, from now on there."""
        for name in ("q", "k", "v", "rate", "log_momentum", "log_keep", "norm"):
            setattr(self, name, _there(getattr(self, name), device))
        self.weights = [_there(w, device) for w in self.weights]
        self.biases = None if self.biases is None else [_there(c, device) for c in self.biases]
        return self.leaves()

    def run(
        self, pieces: list[int] | None = None, state: Any = None, reset: Tensor | None = None, **keys: Any
    ) -> tuple[Tensor, Any]:
        outputs, at = [], 0
        for length in pieces or [self.time]:
            part = slice(at, at + length)
            cut = [
                None if x is None else x[:, part]
                for x in (self.q, self.k, self.v, self.rate, self.log_momentum, self.log_keep)
            ]
            now = None if reset is None else reset[:, part]
            y, state = neural_memory(
                *cut, self.weights, self.biases, state, now, norm=self.norm, **{"chunk_size": 4, **keys}
            )
            outputs.append(y)
            at += length
        return torch.cat(outputs, 1), state


def _there(x: Any, device: str) -> Any:
    return None if x is None else x.detach().to(device).requires_grad_()


def attached(state: Any) -> Any:
    if state is None:
        return None
    return pytree.tree_map(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), state)


def floating(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if x.is_floating_point()]


def gradients(tree: Any, leaves: list[Tensor]) -> list[Tensor]:
    draws = torch.Generator().manual_seed(5)
    score = sum((x * torch.randn(x.shape, generator=draws, dtype=x.dtype).to(x.device)).sum() for x in floating(tree))
    found = torch.autograd.grad(score, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]


def close(got: Any, expected: Any, tolerance: float = 1e-9) -> None:
    left, right = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1)) <= tolerance


KINDS: list[dict[str, Any]] = [
    {},
    {"depth": 1},
    {"depth": 3, "biases": True},
    {"momentum": False, "biases": True},
    {"keep": False},
    {"depth": 1, "momentum": False, "keep": False},
    {"norm": True},
    {"norm": True, "depth": 3, "biases": True},
]


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tiles_are_the_loop(kind: dict[str, Any], cuts: bool) -> None:
    """Outputs, final state and all gradients, from the first state and from one in the middle of a chunk."""
    case = Case(**kind)
    reset = case.resets() if cuts else None
    keys: dict[str, Any] = {"activation": "silu"} if kind else {}
    for state in (None, case.run(reset=case.resets())[1]):
        start = attached(state)
        leaves = [*case.leaves(), *(floating(start) if start is not None else [])]
        expected = case.run(state=start, reset=reset, method="reference", **keys)
        got = case.run(state=start, reset=reset, **keys)
        close(got, expected)
        close(gradients(got, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("kind", [{}, {"norm": True, "depth": 3, "biases": True}], ids=str)
def test_compiled_is_the_loop(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's compiler takes up of it: each function whole. (The code it writes then is torch's; test_gpu.py.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    case = Case(**kind)
    reset = case.resets()
    expected = case.run(reset=reset, method="reference")
    got = case.run(reset=reset, method="compiled")
    close(got, expected)
    close(gradients(got, case.leaves()), gradients(expected, case.leaves()))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] or kind


@pytest.mark.parametrize("limit", ["of a function", "of a process"])
def test_more_forms_of_a_call_than_torch_compiles_by_itself(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 8 it would run every new one as it stands: a training, its validation and a question need as many."""
    compiler = functools.partial(torch.compile, backend="eager")
    before_2_12 = lambda function, *, dynamic: compiler(function, dynamic=dynamic)  # noqa: E731, no recompile_limit
    monkeypatch.setattr(torch, "compile", compiler if limit == "of a function" else before_2_12)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @pointwise
    def scaled(x: Tensor, kind: str) -> Tensor:
        return x * len(kind)

    with torch._dynamo.config.patch(recompile_limit=8):
        for n in range(12):
            assert torch.equal(scaled(True, torch.ones(3), "x" * n), torch.full((3,), float(n)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12


def test_with_a_gradient_and_without_the_same_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    case = Case(depth=1, momentum=False, keep=False, time=12)
    case.run(method="compiled")
    compiled = graphs["unique_graphs"]
    with torch.no_grad():
        case.run(method="compiled")
    for x in case.leaves():
        x.requires_grad_(False)
    case.run(method="compiled")
    assert graphs["unique_graphs"] == compiled > 0


@pytest.mark.parametrize(("chunk", "tile"), [(1, 1), (4, 3), (7, 4), (16, 5), (64, 128)])
def test_any_tile_of_any_chunk(chunk: int, tile: int) -> None:
    case = Case(biases=True)
    for reset in (None, case.resets()):
        expected = case.run(reset=reset, method="reference", chunk_size=chunk)
        got = case.run(reset=reset, chunk_size=chunk, tile_size=tile)
        close(got, expected)
        close(gradients(got, case.leaves()), gradients(expected, case.leaves()))


@pytest.mark.parametrize("cuts", [False, True])
def test_pieces_are_the_whole(cuts: bool) -> None:
    case = Case()
    reset = case.resets() if cuts else None
    whole = case.run(reset=reset)
    expected = gradients(whole, case.leaves())
    for pieces in ([1, 18], [18, 1], [2, 5, 1, 11], [1] * 19):
        got = case.run(pieces, reset=reset)
        close(got, whole)
        close(gradients(got, case.leaves()), expected)


def test_short_documents_take_no_more_places_than_tokens() -> None:
    """One row is laid out as long as it is; several, as long as the longest of each piece."""
    reset = torch.zeros(2, 400, dtype=torch.bool)
    reset[0, :100:4] = reset[1, 50] = True
    assert plan(None, reset[:1], 1, 400, 64, 64).slots[-1].end == 400
    both = plan(None, reset, 2, 400, 64, 64)
    assert [slot.end - slot.begin for slot in both.slots[:3]] == [50, 64, 64]
    assert both.slots[-1].end <= 800


def test_sequences_of_about_one_length_share_a_slot() -> None:
    """Those between the first reset and the last of each row, in any order; so little of a slot is padding."""
    reset = torch.rand(8, 2048, generator=torch.Generator().manual_seed(1)) < 1 / 30
    laid = plan(None, reset, 8, 2048, 64, 64)
    assert laid.slots[-1].end < 1.5 * 2048  # in the order of time, 2.2 times
    x = torch.randn(8, 2048, 3)
    assert torch.equal(laid.restore(laid.lay(x)), x)


def test_whatever_their_order_sequences_are_the_loops() -> None:
    case = Case(biases=True)
    reset = torch.zeros(3, 19, dtype=torch.bool)
    for row, starts in enumerate([(2, 3, 8, 15), (0, 1, 2, 7, 9, 18), (5, 6, 12)]):
        reset[row, list(starts)] = True
    for state in (None, case.run(reset=case.resets())[1]):
        start = attached(state)
        leaves = [*case.leaves(), *(floating(start) if start is not None else [])]
        expected = case.run(state=start, reset=reset, method="reference")
        got = case.run(state=start, reset=reset)
        close(got, expected)
        close(gradients(got, leaves), gradients(expected, leaves))
        close(case.run([7, 12], state=start, reset=reset), got)


def test_a_reset_is_a_fresh_start() -> None:
    case = Case()
    reset = torch.zeros(3, 19, dtype=torch.bool)
    reset[:, 6] = True
    y, final = case.run(reset=reset)
    tail = [
        None if x is None else x[:, 6:] for x in (case.q, case.k, case.v, case.rate, case.log_momentum, case.log_keep)
    ]
    expected = neural_memory(*tail, case.weights, chunk_size=4)
    close((y[:, 6:], final), expected)
    close(gradients((y[:, 6:], final), case.leaves()), gradients(expected, case.leaves()))


def test_exact_zeros_of_gates() -> None:
    """α = 1 and η = 0: logarithms of −∞, finite outputs and gradients, and the loop's."""
    case = Case()
    with torch.no_grad():
        case.log_keep[0, 3] = case.log_keep[1, 4:6] = case.log_momentum[1, 4] = case.log_momentum[2, 9] = -torch.inf
    got, expected = case.run(), case.run(method="reference")
    close(got, expected)
    assert all(torch.isfinite(g).all() for g in gradients(got, case.leaves()))


@pytest.mark.parametrize("keys", [{}, {"chunk_size": 64}, {"method": "reference"}], ids=str)
def test_autocast_changes_nothing(keys: dict[str, Any]) -> None:
    case = Case()
    for name, x in vars(case).items():
        if isinstance(x, Tensor):
            setattr(case, name, x.detach().float().requires_grad_())
    case.weights = [w.detach().float().requires_grad_() for w in case.weights]

    def everything() -> list[Tensor]:
        y, state = case.run(**keys)
        return [y, read_memory(case.q, state["weights"]), *gradients((y, state), case.leaves())]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = case.run(**keys)
        read = read_memory(case.q, state["weights"])
    got = [y, read, *gradients((y, state), case.leaves())]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("chunk", [4, 64])
def test_a_carried_state_does_not_follow_the_weights(chunk: int) -> None:
    """An optimizer changes them in place between two pieces of a sequence."""
    case = Case(biases=True)
    _, state = case.run(chunk_size=chunk)
    before = [x.clone() for x in floating(state)]
    with torch.no_grad():
        for w in (*case.weights, *(case.biases or ())):
            w.zero_()
    assert all(torch.equal(a, b) for a, b in zip(floating(state), before, strict=True))


def test_the_first_state_and_reads() -> None:
    case = Case(biases=True)
    first = memory_state(3, [tuple(w.shape) for w in case.weights], biases=True, dtype=torch.float64)
    for method in ("torch", "reference"):
        got = case.run(state=first, method=method)
        close(got, case.run())
        close(gradients(got, case.leaves()), gradients(case.run(), case.leaves()))
    y, state = case.run()
    read = read_memory(case.q[:, -1:], state["weights"], state["biases"])
    close(read, y[:, -1:])


def test_the_norm_around_a_memory() -> None:
    """M(x) = x + γ z/√(|z|² + 0.01): a read says so, and where z is long its scale changes nothing."""
    case = Case(norm=True)
    y, state = case.run()
    read = read_memory(case.q[:, -1:], state["weights"], norm=case.norm)
    close(read, y[:, -1:])
    plain = read_memory(case.q[:, -1:], state["weights"])
    assert case.norm is not None
    close(read, case.q[:, -1:] + case.norm * plain * (plain.square().sum(-1, keepdim=True) + 0.01).rsqrt())
    scaled = [read_memory(case.q, [case.weights[0], s * case.weights[1]], norm=case.norm) for s in (1e3, 1e4)]
    close(scaled[1], scaled[0], 1e-4)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("period", [1, 2, None])
def test_the_norm_keeps_a_memory_from_running_away(scale: float, period: int | None) -> None:
    """One token for ever, two in turn, all different: the plain MLP's weights grow past all bounds, these do not."""
    time, d, hidden = 2048, 16, 64
    draws = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws)

    count = period or time
    k = torch.nn.functional.normalize(normal(1, count, 1, d), dim=-1).repeat(1, time // count, 1, 1)
    v = normal(1, count, 1, d).repeat(1, time // count, 1, 1)
    weights = [scale * normal(1, hidden, d) / d**0.5, scale * normal(1, d, hidden) / hidden**0.5]
    gates = [torch.full((1, time, 1), x) for x in (0.5 / 64, math.log(0.5), math.log(0.999))]
    largest = {}
    for name, norm in (("plain", None), ("normed", torch.ones(1, d))):
        state = neural_memory(k, k, v, *gates, weights, norm=norm, chunk_size=64)[1]
        largest[name] = max(float(w.abs().max()) for w in state["weights"])
    assert largest["normed"] < 2 * scale
    if period is not None or scale > 1:
        assert not largest["plain"] < 1e3


def test_backward_keeps_few_states() -> None:
    """Of 64 chunks 8 states are kept; stored states would be 64."""
    case = Case(time=256, batch=1)
    saved = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.run()
    state = 3 * sum(w.numel() for w in case.weights)
    arguments = sum(x.numel() for x in case.leaves())
    assert saved <= arguments + 12 * state


def test_low_precision() -> None:
    case = Case()
    given = [x.detach().bfloat16() for x in (case.q, case.k, case.v, case.rate, case.log_momentum, case.log_keep)]
    weights = [w.detach().bfloat16() for w in case.weights]
    y, state = neural_memory(*given, weights, chunk_size=4)
    assert y.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in floating(state))
    wide, _ = neural_memory(*(x.float() for x in given), [w.float() for w in weights], chunk_size=4)
    torch.testing.assert_close(y, wide.bfloat16())
    rounded, _ = neural_memory(*given, weights, chunk_size=4, matmul_dtype=torch.bfloat16)
    torch.testing.assert_close(rounded.float(), wide, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("normed", [False, True])
def test_rounded_products_cost_little(normed: bool) -> None:
    """y and every gradient are those of exact products to 2 %, by length, at sizes and gates as a model has them."""
    time, heads, d, hidden = 256, 2, 32, 128
    log = torch.nn.functional.logsigmoid

    def everything(dtype: torch.dtype, products: torch.dtype | None) -> list[Tensor]:
        draws = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draws, dtype=torch.float64)

        q, k = (torch.nn.functional.normalize(normal(1, time, heads, d), dim=-1) for _ in range(2))
        gates = normal(1, time, heads).sigmoid() / 64, log(normal(1, time, heads)), log(4 + normal(1, time, heads))
        weights = normal(heads, hidden, d) / d**0.5, normal(heads, d, hidden) / hidden**0.5
        leaves = [q, k, normal(1, time, heads, d), *gates, *weights, 1 + 0.1 * normal(heads, d)]
        leaves = [x.to(dtype).requires_grad_() for x in leaves[: None if normed else -1]]
        norm = leaves[8] if normed else None
        y, _ = neural_memory(*leaves[:6], leaves[6:8], norm=norm, chunk_size=64, matmul_dtype=products)
        return [y, *torch.autograd.grad((y * normal(*y.shape).to(dtype)).sum(), leaves)]

    rounded, exact = everything(torch.float32, torch.bfloat16), everything(torch.float64, None)
    assert all(float((a - b).norm() / b.norm()) < 0.02 for a, b in zip(rounded, exact, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0; expected at least 1"),
        ({"chunk_size": 2.5}, "chunk_size is 2.5; expected at least 1 (a whole number)"),
        ({"activation": "relu"}, "activation is 'relu'; expected one of gelu, silu"),
        ({"method": "triton"}, "method is 'triton'"),
        ({"k": torch.zeros(3, 19, 2, 4)}, "k is (3, 19, 2, 4), expected (3, 19, 2, 3) as q"),
        ({"rate": torch.zeros(3, 19)}, "rate is (3, 19), expected (3, 19, 2)"),
        ({"weights": []}, "weights is empty"),
        ({"weights": torch.zeros(2, 4, 3)}, "weights must be a tuple, a tensor for each layer, got one tensor"),
        ({"weights": [torch.zeros(2, 4, 5)]}, "weights[0] is (2, 4, 5), expected (2, out, 3)"),
        ({"weights": [torch.zeros(2, 5, 3)]}, "the last of weights gives 5 channels but v has 4"),
        ({"biases": [torch.zeros(2, 4)]}, "biases has 1 layers but weights 2"),
        ({"reset": torch.zeros(3, 19)}, "reset must be a bool tensor"),
        ({"state": {}}, "state['weights'] has 0 layers, expected 2"),
        ({"norm": torch.zeros(2, 3)}, "norm is (2, 3), expected (2, 4)"),
        ({"norm": torch.zeros(2, 4)}, "as many channels of q as of v, got 3 and 4"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = Case()
    arguments = {
        **{n: getattr(case, n) for n in ("q", "k", "v", "rate", "log_momentum", "log_keep", "weights")},
        **change,
    }
    with pytest.raises(ArgumentError, match=re.escape(message)) as caught:
        neural_memory(**arguments)
    assert "\n" not in str(caught.value)


PEER = """
import titans_pytorch
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
memory = titans_pytorch.NeuralMemory(
    dim=6, dim_head=4, heads=2, chunk_size=1, batch_size=4, pre_rmsnorm=False, mem_model_norm_add_residual=False,
    default_model_kwargs=dict(depth=2, expansion_factor=2.0),
)
for p in memory.parameters():
    p.data = p.data.clone() + 0.1 * torch.randn(p.shape)
x = given["x"].requires_grad_()
y, state = memory(x)
weights, momentum = state.states
names = sorted(weights.keys())
result["y"] = y
leaves = {"x": x, **dict(memory.named_parameters())}
leaves = {n: p for n, p in leaves.items() if not n.startswith("memory_model.")}
score = (y * given["score"]).sum()
for n, name in enumerate(names):
    result[f"weights.{n}"], result[f"momentum.{n}"] = weights[name], momentum[name][0]
    score = score + weights[name].sin().sum() + momentum[name].cos().sum()
for (name, p), g in zip(leaves.items(), torch.autograd.grad(score, list(leaves.values()))):
    result[f"leaf.{name}"], result[f"grad.{name}"] = p, g
"""


def test_titans_pytorch() -> None:
    """Outputs, memory, momentum and the gradients of all parameters, with gradients taken anew every 4 tokens.

    Its conventions: a mean over channels in the loss, weights (in, out), keys that are not normed, a sigmoid gate and a
    projection after the read.
    """
    draws = torch.Generator().manual_seed(3)
    x, score = (torch.randn(2, 11, 6, generator=draws, dtype=torch.float64) for _ in range(2))
    peer = run_peer("titans-pytorch", PEER, {"x": x, "score": score})
    own = {n.removeprefix("leaf."): p.requires_grad_() for n, p in peer.items() if n.startswith("leaf.")}

    def heads(name: str) -> Tensor:
        return (own["x"] @ own[f"{name}.weight"].T).unflatten(-1, (2, 4))

    def gate(name: str) -> Tensor:
        return own["x"] @ own[f"{name}.0.weight"].T + own[f"{name}.0.bias"]

    log = torch.nn.functional.logsigmoid
    y, state = neural_memory(
        heads("to_queries"),
        heads("to_keys"),
        heads("to_values"),
        gate("to_adaptive_step").sigmoid() / 4,
        log(gate("to_momentum")),
        log(-gate("to_decay_factor")),
        [own[f"memory_model_parameters.{n}"].mT for n in range(2)],
        chunk_size=4,
    )
    gated = y * (own["x"] @ own["retrieve_gate.0.weight"].T).sigmoid()[..., None]
    y = gated.flatten(2) @ own["combine_heads.weight"].T
    close(y, peer["y"], 1e-6)
    total = (y * score).sum()
    for n in range(2):
        weights, momentum = (state[f"{kind}weights"][n].mT.flatten(0, 1) for kind in ("", "momentum_"))
        close(weights, peer[f"weights.{n}"], 1e-6)
        close(momentum, peer[f"momentum.{n}"], 1e-6)
        total = total + weights.sin().sum() + momentum.cos().sum()
    for name, g in zip(own, torch.autograd.grad(total, list(own.values()))):
        close(g, peer[f"grad.{name}"], 1e-6)
