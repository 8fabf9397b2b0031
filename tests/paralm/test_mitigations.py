"""Mitigations of state collapse: over every registered mixer each works under its laws or is refused with a reason."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import paralm_kernels
import pytest
import torch
from paralm_kernels import ArgumentError
from torch import Tensor
from torch.utils import _pytree as pytree

from paralm.config import ModelConfig
from paralm.errors import UserError
from paralm.models import LanguageModel, build_model
from paralm.models.mitigations import Clipped, Mitigation, mitigated
from paralm.models.mixers.base import named_leaves
from paralm.registry import MIXERS

D, VOCAB, TIME = 32, 40, 23
KEYS: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16, "d_state": 8, "n_groups": 2, "chunk_size": 4},
    "mlstm": {"n_heads": 2, "chunk_size": 4, "input_gate_bias": 0.0},
}
SPECS = {"scale": "decay=0.9,input=0.6", "clip": "clip=0.2,every=3", "window": "window=5"}
IDENTITY = {"scale": "decay=1,input=1", "clip": "clip=1e30,every=3", "window": "window=1000"}
REFUSED = {
    "scale": set(MIXERS.names()) - {"mamba2", "mlstm"},
    "window": set(MIXERS.names()) - {"mamba2", "mlstm"},
    "clip": {name for name in MIXERS.names() if name.startswith(("attention", "window", "titans", "slstm"))},
}
CASES = [(name, kind) for name in MIXERS.names() for kind in SPECS]
ADMITTED = [(name, kind) for name, kind in CASES if name not in REFUSED[kind]]


def model_of(name: str) -> LanguageModel:
    config = ModelConfig(d_model=D, n_layers=2, mixer={"name": name, **KEYS.get(name, {})})
    model = build_model(config, VOCAB, seed=1).double().eval()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide what they multiply
            parameter.add_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64), alpha=0.1)
    return model


def tokens(batch: int = 3, time: int = TIME) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(2))


def resets() -> Tensor:
    reset = torch.zeros(3, TIME, dtype=torch.bool)
    reset[0, 0] = reset[1, 9] = reset[1, 10] = reset[2, 17] = True
    return reset


def run(model: LanguageModel, ids: Tensor, reset: Tensor | None, pieces: list[int], state: Any = None) -> Any:
    outputs, at = [], 0
    for length in pieces:
        part = None if reset is None else reset[:, at : at + length]
        found = model(ids[:, at : at + length], state=state, reset=part)
        outputs.append(found.logits)
        state, at = found.state, at + length
    return torch.cat(outputs, 1), state


def close(got: Any, expected: Any, tolerance: float = 1e-9) -> None:
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case not in ADMITTED])
def test_what_a_mixer_does_not_admit_is_refused_with_the_reason(name: str, kind: str) -> None:
    model = model_of(name)
    with pytest.raises(UserError) as error, mitigated(model, Mitigation.parse(SPECS[kind])):
        pass
    message = str(error.value)
    assert f"no {kind} in layer 0, {name}: " in message
    assert len(message.rpartition(f"{name}: ")[2]) > 20
    assert "\n" not in message


@pytest.mark.parametrize(("name", "kind"), ADMITTED)
@torch.no_grad()
def test_pieces_equal_the_whole(name: str, kind: str) -> None:
    model, ids, reset = model_of(name), tokens(), resets()
    plain = model(ids, reset=reset).logits
    with mitigated(model, Mitigation.parse(SPECS[kind])):
        whole = run(model, ids, reset, [TIME])
        for pieces in ([1] * TIME, [4, 1, 11, TIME - 16], [TIME - 1, 1]):
            close(run(model, ids, reset, pieces), whole)
        close(run(model, ids, reset, [TIME], model.initial_state(3)), whole)
    assert (whole[0] - plain).abs().max() > 1e-4  # it does something


@pytest.mark.parametrize(("name", "kind"), ADMITTED)
@torch.no_grad()
def test_a_reset_is_a_fresh_start_and_rows_do_not_see_each_other(name: str, kind: str) -> None:
    model, ids, reset = model_of(name), tokens(), resets()
    with mitigated(model, Mitigation.parse(SPECS[kind])):
        whole, _ = run(model, ids, reset, [TIME])
        fresh, _ = run(model, ids[1:2, 10:], None, [TIME - 10])
        alone, _ = run(model, ids[2:], reset[2:], [TIME])
    close(whole[1:2, 10:], fresh)
    close(whole[2:], alone)


@pytest.mark.parametrize(("name", "kind"), ADMITTED)
@torch.no_grad()
def test_the_identity_changes_nothing(name: str, kind: str) -> None:
    """Through the mitigated forward, not around it: p and r are large, not infinite."""
    model, ids, reset = model_of(name), tokens(), resets()
    plain = run(model, ids, reset, [TIME])[0]
    mitigation = Mitigation.parse(IDENTITY[kind])
    with mitigated(model, mitigation):
        found = run(model, ids, reset, [TIME])[0]
        assert isinstance(model.mixers[0], Clipped) == (kind == "clip")
    close(found, plain, 1e-12)
    if kind != "clip" and name == "mamba2":
        assert torch.equal(found, plain)
    assert torch.equal(run(model, ids, reset, [TIME])[0], plain)  # and outside it is gone


@pytest.mark.parametrize("name", [name for name in MIXERS.names() if name not in REFUSED["clip"]])
@torch.no_grad()
def test_clipping_bounds_every_head_where_it_clips(name: str) -> None:
    model, ids = model_of(name), tokens(time=21)
    with mitigated(model, Mitigation(clip=0.2, every=7)):
        _, state = run(model, ids, None, [21])
        _, later = run(model, ids[:, :1], None, [1], state)
        mixer = model.mixers[1]
        largest = []
        for path, leaf in named_leaves(state["layers"][1]):
            layout = mixer.leaf(path)
            if layout.free and not (name == "mlstm" and path.endswith("1")):  # n goes with C
                heads = leaf.unsqueeze(1) if layout.heads is None else leaf.movedim(layout.heads, 1)
                largest.append(float(heads.flatten(2).norm(dim=-1).max()))
        assert max(largest) == pytest.approx(0.2, rel=1e-9)
    assert later["layers"][1]["read"].tolist() == [22] * 3


@torch.no_grad()
def test_clipping_at_every_token_is_the_formula() -> None:
    """Mamba2, written out: h ← h·p/‖h‖ when ‖h‖ > p, after each step, per head."""
    model, p = model_of("mamba2"), 0.05
    mixer: Any = model.mixers[0]
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with mitigated(model, Mitigation(clip=p, every=1)):
        clipped = model.mixers[0](x)[0]
    state, outputs, bound = mixer.initial_state(2), [], 0
    for t in range(9):
        y, state = mixer(x[:, t : t + 1], state)
        norm = state["ssm"].flatten(2).norm(dim=-1)[..., None, None]
        bound += int((norm > p).sum())
        state = {**state, "ssm": torch.where(norm > p, state["ssm"] * p / norm, state["ssm"])}
        outputs.append(y)
    close(clipped, torch.cat(outputs, 1), 1e-12)
    assert 10 < bound < 2 * 9 * mixer.n_heads  # some, not all


@torch.no_grad()
def test_scaling_is_of_decay_and_input() -> None:
    """Mamba2: the state after one step is b times as large, and after a step without input c α times what it was."""
    model = model_of("mamba2")
    mixer = model.mixers[0]
    x = torch.randn(2, 2, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one, two = mixer(x[:, :1])[1]["ssm"], mixer(x)[1]["ssm"]
    with mitigated(model, Mitigation(decay=0.8, input=0.5)):
        scaled_one, scaled_two = mixer(x[:, :1])[1]["ssm"], mixer(x)[1]["ssm"]
    with mitigated(model, Mitigation(input=0.5)):
        half_two = mixer(x)[1]["ssm"]
    close(scaled_one, 0.5 * one, 1e-12)
    close(half_two, 0.5 * two, 1e-12)
    alpha_one = (two - scaled_two * 2) / 0.2  # two = α one + u, scaled = b (c α one + u)
    alpha = (alpha_one / one).flatten(2)
    close(alpha, alpha[..., :1].expand_as(alpha), 1e-6)
    assert 0 < float(alpha.min()) <= float(alpha.max()) < 1


@pytest.mark.parametrize("name", ["mamba2", "mlstm"])
@torch.no_grad()
def test_a_window_is_the_last_tokens_read_anew(name: str) -> None:
    """The output at t is that of a fresh recurrence over the last r tokens (with Mamba2's convolution as it was)."""
    model, r = model_of(name), 5
    mixer = model.mixers[0]
    x = torch.randn(2, 19, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with mitigated(model, Mitigation(window=r)):
        y, _ = mixer(x)
    for t in range(19):
        begin = max(0, t - r + 1)
        state = mixer.initial_state(2)
        if name == "mamba2" and begin:
            state = {**state, "conv": mixer(x[:, :begin])[1]["conv"]}
        expected = mixer(x[:, begin : t + 1], state)[0][:, -1]
        torch.testing.assert_close(y[:, t], expected, rtol=1e-10, atol=1e-10)


def recurrence(time: int, seed: int = 0) -> Any:
    draws = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, time, 2, 3, generator=draws, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, time, 4, 5, generator=draws, dtype=torch.float64)
    log_decay = -torch.rand(2, time, 4, generator=draws, dtype=torch.float64)
    return q, k, v, log_decay, torch.rand(2, time, 4, generator=draws, dtype=torch.float64)


@pytest.mark.parametrize("window", [1, 4, 30])
def test_windowed_chunkwise_is_the_sum_over_the_last_tokens(window: int) -> None:
    """Against h_t = Σ over the last r tokens of (Π α) g k vᵀ, term by term."""
    q, k, v, log_decay, gain = recurrence(11)
    y, state = paralm_kernels.windowed_chunkwise(q, k, v, log_decay, gain, window, chunk_size=3)
    wide_q, wide_k = (part.repeat_interleave(2, 2) for part in (q, k))
    h = torch.zeros(0)
    for t in range(11):
        h = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
        for j in range(max(0, t - window + 1), t + 1):
            weight = log_decay[:, j + 1 : t + 1].sum(1).exp() * gain[:, j]
            h += torch.einsum("bh,bhk,bhv->bhkv", weight, wide_k[:, j], v[:, j])
        torch.testing.assert_close(y[:, t], torch.einsum("bhk,bhkv->bhv", wide_q[:, t], h), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state["S"], h, rtol=1e-10, atol=1e-10)


def test_a_window_does_not_drift_at_decays_near_one() -> None:
    """float32, α = 1 − 1e-5: after 20,000 tokens still the last 64 of them to 1e-4."""
    draws = torch.Generator().manual_seed(0)
    time, window = 20_000, 64
    q, k = (torch.randn(1, time, 1, 4, generator=draws) for _ in range(2))
    v = torch.randn(1, time, 1, 4, generator=draws)
    log_decay, gain = torch.full((1, time, 1), -1e-5), torch.ones(1, time, 1)
    _, state = paralm_kernels.windowed_chunkwise(q, k, v, log_decay, gain, window)
    last = slice(time - window, None)
    exact = paralm_kernels.chunkwise(*(x[:, last].double() for x in (q, k, v, log_decay, gain)))[1]
    assert (state["S"] - exact).abs().max() < 1e-4 * exact.abs().max()


def test_gains_of_16_bits_are_taken_out_in_32() -> None:
    q, k, v, log_decay, gain = (x.float() for x in recurrence(200))
    gain, log_decay = gain.bfloat16(), 0.01 * log_decay
    _, state = paralm_kernels.windowed_chunkwise(q, k, v, log_decay, gain, 8)
    exact = paralm_kernels.chunkwise(*(x[:, -8:].double() for x in (q, k, v, log_decay, gain)))[1]
    assert (state["S"] - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_window_that_cannot_be_is_refused() -> None:
    q, k, v, log_decay, gain = recurrence(3)
    with pytest.raises(ArgumentError, match="window is 0"):
        paralm_kernels.windowed_chunkwise(q, k, v, log_decay, gain, 0)
    _, state = paralm_kernels.windowed_chunkwise(q, k, v, log_decay, gain, 2)
    with pytest.raises(ArgumentError, match="the state is of a window of 2 tokens, window is 3"):
        paralm_kernels.windowed_chunkwise(q, k, v, log_decay, gain, 3, state)


@pytest.mark.parametrize(
    "text",
    [
        "decay=0.999,input=0.7",
        "clip=10",
        "clip=2.5,every=1",
        "window=256",
        "decay=0.5,window=3",
        "decay=0.9999999",
        "decay=0.99999949,window=1048576",
    ],
)
def test_a_specification_is_read_and_written(text: str) -> None:
    assert str(Mitigation.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("decay=1.1", "decay=1.1: it must be above 0 and at most 1"),
        ("decay=nan", "decay=nan"),
        ("input=0", "input=0"),
        ("clip=-1", "clip=-1"),
        ("clip=5,every=0", "every=0"),
        ("window=0", "window=0"),
        ("window=1.5", "window must be a whole number"),
        ("input=x", "input must be a number"),
        ("clips=1", "no such key; there are decay, input, clip, every, window"),
        ("decay=0.9,decay=0.8", "given twice"),
        ("clip=1,window=4", "give one"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        Mitigation.parse(text)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_it_is_for_inference_once_and_ends_with_the_block() -> None:
    model, mitigation = model_of("mamba2"), Mitigation(clip=1.0, decay=0.5)
    names = [name for name, _ in model.named_parameters()]
    with (
        mitigated(model, mitigation),
        pytest.raises(UserError, match="another is in force"),
        mitigated(model, Mitigation(window=4)),
    ):
        pass
    with pytest.raises(ZeroDivisionError), mitigated(model, mitigation):
        _ = 1 / 0
    assert [name for name, _ in model.named_parameters()] == names
    assert all(mixer.mitigation is None for mixer in model.mixers)
    with pytest.raises(UserError, match="for inference only"), mitigated(model.train(), mitigation):
        pass
    with mitigated(model, Mitigation()), mitigated(model, None):  # nothing to do
        assert math.isinf(Mitigation().clip)


def test_a_hybrid_is_refused_by_the_layer_that_cannot() -> None:
    config = ModelConfig(d_model=D, n_layers=2, mixers=["mamba2", "paragru"])
    model = build_model(config, VOCAB, seed=1).eval()
    with pytest.raises(UserError, match="no window in layer 1, paragru"), mitigated(model, Mitigation(window=4)):
        pass
    assert model.mixers[0].mitigation is None


@pytest.mark.parametrize("name", MIXERS.names())
def test_what_a_mixer_says_of_its_states_leaves_is_so(name: str) -> None:
    """Named leaves exist, heads have an axis of their own behind the batch, matrices two more, free ones start at 0."""
    mixer = model_of(name).mixers[0]
    leaves = named_leaves(mixer.initial_state(2))
    for pattern in mixer.state_leaves:
        if not name.startswith("titans"):  # whose variants share one list
            assert any(fnmatchcase(path, pattern) for path, _ in leaves), pattern
    if name.startswith("titans"):
        assert [mixer.leaf(path).matrix for path, _ in leaves if "weights/" in path]
        assert all(mixer.leaf(path).matrix for path, _ in leaves if "weights/" in path)
    for path, leaf in leaves:
        layout = mixer.leaf(path)
        if layout.heads is not None:
            assert 1 <= layout.heads < leaf.ndim, path
        assert not layout.matrix or leaf.ndim >= 4, path
        assert not layout.free or (leaf.is_floating_point() and not leaf.any()), path
