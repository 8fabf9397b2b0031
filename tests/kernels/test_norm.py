"""Norms, gates and SwiGLU: what defines them, and refusals in one line."""

from __future__ import annotations

import pytest
import torch
from paralm_kernels import ArgumentError, gated_norm, swiglu

FORMS = {
    "plain": {},
    "gate after": {"gate": True},
    "gate first, groups, skip": {"gate": True, "gate_first": True, "groups": 3, "skip": 4},
    "skip alone": {"skip": 6},
    "heads, centred, sigmoid": {"gate": True, "centred": True, "groups": 2, "activation": "sigmoid"},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
CHANNELS = 12


def random_case(form, rows=(2, 5), dtype=torch.float64, channels=CHANNELS, seed=0):
    """Leaves by name, and the remaining options. gate and v are parts of a wider projection."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    leaves = {"x": random(*rows, channels), "weight": random(channels)}
    options = dict(form)
    if options.pop("gate", False):
        leaves["gate"] = random(*rows, 2 * channels + 3)
    share = options.pop("skip", 0)
    if share:
        leaves |= {"d": random(channels // share), "v": random(*rows, channels + 1)}
    return leaves, options


def run(leaves, options, method):
    more = dict(options)
    channels = leaves["x"].shape[-1]
    if "gate" in leaves:
        more["gate"] = leaves["gate"][..., channels + 1 : 2 * channels + 1]
    if "v" in leaves:
        more["skip"] = (leaves["d"], leaves["v"][..., 1:])
    return gated_norm(leaves["x"], leaves["weight"], 1e-3, **more, method=method)


def values_and_gradients(leaves, options, method):
    y = run(leaves, options, method)
    cotangent = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y)
    return [y, *torch.autograd.grad(y, list(leaves.values()), cotangent)]


def by_definition(leaves, options):
    """Channel by channel, as the module's docstring has it."""
    x, channels = leaves["x"], leaves["x"].shape[-1]
    act = torch.sigmoid if options.get("activation") == "sigmoid" else lambda g: g / (1 + (-g).exp())
    a = act(leaves["gate"][..., channels + 1 : 2 * channels + 1]) if "gate" in leaves else torch.ones_like(x)
    groups, first = options.get("groups", 1), options.get("gate_first", False)
    columns = []
    for c in range(channels):
        u = x[..., c]
        if "v" in leaves:
            u = u + leaves["d"][c * len(leaves["d"]) // channels] * leaves["v"][..., c + 1]
        columns.append(u * a[..., c] if first else u)
    result = []
    for c, u in enumerate(columns):
        size = channels // groups
        mates = columns[c // size * size : (c // size + 1) * size]
        mean = sum(mates) / size if options.get("centred") else 0.0
        n = (u - mean) / (sum((m - mean) ** 2 for m in mates) / size + 1e-3).sqrt() * leaves["weight"][c]
        result.append(n if first else n * a[..., c])
    return torch.stack(result, -1)


@every_form
def test_torch_is_the_definition(form):
    leaves, options = random_case(form)
    torch.testing.assert_close(run(leaves, options, "torch"), by_definition(leaves, options), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(leaves, options, "auto"), run(leaves, options, "torch"), rtol=0, atol=0)


def test_swiglu_is_its_definition():
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    a, b = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), a / (1 + (-a).exp()) * b, rtol=1e-12, atol=1e-12)


def test_the_result_has_the_weights_dtype_and_is_rounded_once():
    x = torch.randn(40, 64).bfloat16()
    weight, gate = torch.ones(64).bfloat16(), torch.randn(40, 64).bfloat16()
    got = gated_norm(x, weight, 1e-6, gate)
    exact = gated_norm(x.double(), weight.double(), 1e-6, gate.double())
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() * 1.01 + 1e-6).all()
    assert gated_norm(x, weight.float(), 1e-6).dtype == torch.float32


X, W = torch.zeros(2, 6), torch.ones(6)
WRONG = {
    "weight is (5,) and x has 6 channels": lambda: gated_norm(X, W[:5], 1e-6),
    "gate is (2, 5) and x is (2, 6)": lambda: gated_norm(X, W, 1e-6, X[:, :5]),
    "skip's v is (1, 6) and x is (2, 6)": lambda: gated_norm(X, W, 1e-6, skip=(W, X[:1])),
    "skip's D is (4,), which does not divide 6 channels": lambda: gated_norm(X, W, 1e-6, skip=(W[:4], X)),
    "4 groups do not divide 6 channels": lambda: gated_norm(X, W, 1e-6, groups=4),
    "no activation 'tanh' among silu, sigmoid": lambda: gated_norm(X, W, 1e-6, X, activation="tanh"),
    "no method 'cuda' among auto, torch, triton": lambda: gated_norm(X, W, 1e-6, method="cuda"),
    "swiglu: the last axis has 5 channels": lambda: swiglu(X[:, :5]),
    "groups of 8193 channels; method 'triton' takes 8192": lambda: gated_norm(
        torch.zeros(1, 8193), torch.ones(8193), 1e-6, method="triton"
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments_are_one_line(message):
    with pytest.raises(ArgumentError) as caught:
        WRONG[message]()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
