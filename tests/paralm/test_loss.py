"""The chunked loss is the plain one: values, gradients, masks, caps, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paralm.models.loss import IGNORE, cross_entropy, token_losses


def problem(tokens: int, masked: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 8, generator=draws, dtype=dtype).requires_grad_()
    weight = torch.randn(23, 8, generator=draws, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 23, (tokens,), generator=draws)
    return hidden, weight, labels.masked_fill(torch.rand(tokens, generator=draws) < masked, IGNORE)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """The same two numbers by the definition, all logits at once."""
    logits = hidden @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return loss, z_loss * (logits.logsumexp(-1).square() * (labels != IGNORE)).sum()


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("masked", [0.0, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_equals_plain_cross_entropy(chunk: int, masked: float, cap: float | None) -> None:
    hidden, weight, labels = problem(50, masked)
    ours = cross_entropy(hidden, weight, labels, chunk=chunk, z_loss=0.01, logit_cap=cap)
    theirs = plain(hidden, weight, labels, 0.01, cap)
    # 0.3 and 1.7: the two outputs are scaled differently, and each gradient is still exact.
    for scales in ((1.0, 1.0), (0.3, 1.7), (1.0, 0.0), (0.0, 1.0)):
        gradients = [
            torch.autograd.grad(scales[0] * loss + scales[1] * aux, (hidden, weight), retain_graph=True)
            for loss, aux in (ours, theirs)
        ]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_one_of_the_outputs_alone() -> None:
    hidden, weight, labels = problem(30, 0.1)
    for index in (0, 1):
        ours = cross_entropy(hidden, weight, labels, chunk=8, z_loss=0.5)[index]
        theirs = plain(hidden, weight, labels, 0.5, None)[index]
        got, expected = (torch.autograd.grad(value, (hidden, weight)) for value in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    """Also where the gradient that comes in is a constant, and torch alone would make this one a constant too."""
    hidden, weight, labels = problem(9, 0.0)
    (grad,) = torch.autograd.grad(cross_entropy(hidden, weight, labels, chunk=4)[0], hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_gradcheck() -> None:
    hidden, weight, labels = problem(9, 0.3)

    def both(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(h, w, labels, chunk=4, z_loss=0.1, logit_cap=5.0)

    assert torch.autograd.gradcheck(both, (hidden, weight))


def test_only_the_asked_gradients() -> None:
    hidden, weight, labels = problem(20, 0.0)
    loss, aux = cross_entropy(hidden, weight.detach(), labels, chunk=8, z_loss=0.1)
    expected = torch.autograd.grad(sum(plain(hidden, weight, labels, 0.1, None)), hidden)
    torch.testing.assert_close(torch.autograd.grad(loss + aux, hidden), expected, rtol=1e-12, atol=1e-12)
    loss, _ = cross_entropy(hidden.detach(), weight.detach(), labels, chunk=8)
    assert not loss.requires_grad


def test_float32_is_close_to_float64_at_extreme_logits() -> None:
    """Logits of ±1e3 must neither overflow nor lose the target: every sum is taken below the largest logit."""
    hidden, weight, labels = problem(40, 0.1)
    hidden = (hidden * 100).detach().requires_grad_()
    exact = plain(hidden, weight, labels, 1e-4, None)
    low = [v.detach().float().requires_grad_() for v in (hidden, weight)]
    loss, aux = cross_entropy(low[0], low[1], labels, chunk=16, z_loss=1e-4)
    assert loss.dtype == aux.dtype == torch.float32
    torch.testing.assert_close(torch.stack((loss, aux)).double(), torch.stack(exact), rtol=1e-5, atol=1e-5)
    got, expected = torch.autograd.grad(loss + aux, low), torch.autograd.grad(sum(exact), (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        # fp32 rounds logits of 1e3 to 6e-5, which is the relative error of the probabilities.
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_bfloat16_sums_in_float32() -> None:
    """The weight's gradient sums over tokens; in bf16 itself 2000 equal terms would stop growing at 256."""
    hidden, weight, labels = (v.detach() for v in problem(2000, 0.0, torch.float32))
    low = [v.bfloat16().requires_grad_() for v in (hidden, weight)]
    high = [v.detach().double().requires_grad_() for v in low]
    loss, aux = cross_entropy(low[0], low[1], labels, chunk=64)
    assert loss.dtype == aux.dtype == torch.float32
    expected = plain(high[0], high[1], labels, 0.0, None)[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    for a, b in zip(torch.autograd.grad(loss, low), torch.autograd.grad(expected, high), strict=True):
        assert a.dtype == torch.bfloat16
        # Two roundings to bf16 (of the logits' gradient and of the result), 2^-9 each, and a little.
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2**-7 * float(b.abs().max()))


@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
def test_token_losses(masked: float) -> None:
    hidden, weight, labels = problem(33, masked)
    each = token_losses(hidden, weight, labels, chunk=10, logit_cap=4.0)
    logits = 4.0 * torch.tanh(hidden @ weight.T / 4.0)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    assert not each.requires_grad
    assert (each[labels == IGNORE] == 0).all()
    summed = cross_entropy(hidden, weight, labels, chunk=10, logit_cap=4.0)[0]
    torch.testing.assert_close(summed.detach(), each.sum(), rtol=1e-12, atol=1e-12)


def test_never_all_logits() -> None:
    """No tensor of (tokens, vocab) is made, forward or backward: the largest has ``chunk`` rows."""
    hidden, _, labels = problem(400, 0.0, torch.float32)
    big = torch.randn(5000, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss, aux = cross_entropy(hidden, big, labels, chunk=16, z_loss=0.1)
        (loss + aux).backward()
    held = [event.cpu_memory_usage for event in profile.events()]
    assert max(held) < 400 * 5000 * 4 / 4
    assert max(held) >= 16 * 5000 * 4  # the profiler did see the chunk's buffer
