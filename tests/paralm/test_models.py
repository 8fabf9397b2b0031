"""The language model: its outputs, its state, checkpointing, and the counts it reports."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from paralm.config import MLPConfig, ModelConfig
from paralm.errors import ConfigError
from paralm.models import LanguageModel, build_model, flops_per_token
from paralm.models.mlp import default_d_ff
from paralm.registry import MIXERS

NAMES = ["paragru", "paralstm", "attention"]


def model(name: str = "paragru", dtype: torch.dtype = torch.float64, **keys: Any) -> LanguageModel:
    config = ModelConfig(**{"d_model": 32, "n_layers": 2, "mixer": {"name": name}, "loss_chunk": 7, **keys})
    return build_model(config, 61, seed=0, dtype=dtype)


def batch(rows: int = 3, time: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels (some masked), resets."""
    draws = torch.Generator().manual_seed(time)
    tokens = torch.randint(0, 61, (rows, time), generator=draws)
    labels = torch.randint(0, 61, (rows, time), generator=draws)
    reset = torch.rand(rows, time, generator=draws) < 0.1
    return tokens, labels.masked_fill(torch.rand(rows, time, generator=draws) < 0.2, -100), reset


def gradients(lm: LanguageModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_cross_entropy_of_the_logits(name: str, tied: bool) -> None:
    lm = model(name, tie_embeddings=tied, z_loss=0.01, logit_cap=5.0)
    tokens, labels, reset = batch()
    output = lm(tokens, labels=labels, reset=reset)
    logits = lm(tokens, reset=reset).logits
    assert output.logits is None
    assert logits.shape == (3, 17, 61)
    flat = logits.flatten(0, 1)
    expected = F.cross_entropy(flat, labels.flatten(), reduction="sum")
    z = 0.01 * (flat.logsumexp(-1).square() * (labels.flatten() != -100)).sum()
    torch.testing.assert_close((output.loss, output.aux), (expected, z), rtol=1e-10, atol=1e-10)
    (output.loss + output.aux).backward()
    ours = gradients(lm)
    (expected + z).backward()
    torch.testing.assert_close(ours, gradients(lm), rtol=1e-9, atol=1e-9)
    assert set(ours) == {n for n, _ in lm.named_parameters()}


def test_token_losses_for_evaluation() -> None:
    lm = model()
    tokens, labels, reset = batch()
    output = lm(tokens, labels=labels, reset=reset, return_token_losses=True)
    expected = F.cross_entropy(lm(tokens, reset=reset).logits.mT, labels, reduction="none")
    torch.testing.assert_close(output.token_losses, expected.detach(), rtol=1e-10, atol=1e-10)
    assert (output.token_losses[labels == -100] == 0).all()
    torch.testing.assert_close(output.loss, lm(tokens, labels=labels, reset=reset).loss.detach())
    assert not output.loss.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_in_the_trained_loss_only(tied: bool) -> None:
    """What is measured and generated has no padding in its distribution, however likely training left it."""
    tokens, labels, reset = batch()
    keys = {"d_model": 8, "n_layers": 1, "mixer": {"name": "paragru"}, "tie_embeddings": tied}
    plain, padded = (build_model(ModelConfig(**keys, vocab_size=size), 61, seed=1).double() for size in (None, 64))
    weights = plain.state_dict()
    with torch.no_grad():
        for key, value in padded.state_dict().items():
            value[: len(weights[key])] = weights[key]
        padded.head_weight[61:] = 0.1  # by no means unlikely
    assert torch.equal(padded(tokens, reset=reset).logits, plain(tokens, reset=reset).logits)
    for lm in (plain, padded):
        found = lm(tokens, labels=labels, reset=reset, return_token_losses=True)
        assert torch.equal(found.loss, plain(tokens, labels=labels, reset=reset, return_token_losses=True).loss)
    assert padded(tokens, labels=labels).loss > plain(tokens, labels=labels).loss + 0.01


@pytest.mark.parametrize("name", NAMES)
def test_whole_equals_pieces_with_state_and_resets(name: str) -> None:
    """The law of the mixers holds for the stack: loss, gradients and final state of one call or several."""
    lm = model(name).eval()
    tokens, labels, reset = batch()
    whole = lm(tokens, labels=labels, reset=reset, return_state=True)
    (whole.loss + whole.aux).backward()
    expected = gradients(lm)
    total, state, at = torch.zeros((), dtype=torch.float64), None, 0
    for length in (1, 6, 2, 8):
        part = slice(at, at + length)
        output = lm(tokens[:, part], labels=labels[:, part], state=state, reset=reset[:, part], return_state=True)
        total, state, at = total + output.loss + output.aux, output.state, at + length
    total.backward()
    torch.testing.assert_close(total, whole.loss + whole.aux, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(lm), expected, rtol=1e-9, atol=1e-9)
    assert pytree.tree_structure(state) == pytree.tree_structure(whole.state)
    if lm.bounded_state:
        torch.testing.assert_close(state, whole.state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_initial_state_is_none(name: str) -> None:
    lm = model(name)
    tokens = batch()[0]
    state = lm.initial_state(3)
    torch.testing.assert_close(lm(tokens, state=state).logits, lm(tokens).logits, rtol=0, atol=0)
    assert all(len(leaf) == 3 for leaf in pytree.tree_leaves(state))
    assert set(state) == {"layers"}
    assert len(state["layers"]) == 2


def test_a_state_that_cannot_be_this_models() -> None:
    tokens = batch()[0]
    with pytest.raises(ValueError, match="3 layers, the model 2"):
        model()(tokens, state=model(n_layers=3).initial_state(3))
    with pytest.raises(ValueError, match="2 rows, the tokens 3"):
        model()(tokens, state=model().initial_state(2))


def test_a_growing_state_is_not_kept_while_training() -> None:
    tokens, labels, _ = batch()
    attention = model("attention")
    assert not attention.bounded_state
    assert attention(tokens, labels=labels).state is None
    assert attention(tokens, labels=labels, return_state=True).state is not None
    assert attention(tokens).state is not None
    with torch.no_grad():
        assert attention(tokens, labels=labels).state is not None
    assert model("paragru")(tokens, labels=labels).state is not None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MIXERS.names())
def test_activation_checkpointing_changes_nothing(name: str, dropout: float) -> None:
    """Of no mixer, whichever blocks run again: losses and gradients to the last bit."""
    tokens, labels, reset = batch()
    results = []
    for blocks in (False, 1, 2, True):
        lm = model(name, dropout=dropout, n_layers=3).train()
        lm.set_activation_checkpointing(blocks)
        torch.manual_seed(0)
        output = lm(tokens, labels=labels, reset=reset)
        output.loss.backward()
        results.append((output.loss.detach(), gradients(lm)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0)


def test_activation_checkpointing_keeps_less() -> None:
    kept = []
    for blocks in (False, 1, 2, 3, True):
        lm = model(n_layers=4)
        lm.set_activation_checkpointing(blocks)
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            lm(*batch()[:2])
        kept.append(sum(sizes))
    assert kept[-1] < kept[0] / 3
    steps = [a - b for a, b in itertools.pairwise(kept)]
    assert steps == [steps[0]] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paragru", "attention"])
def test_a_compiled_feed_forward_is_the_feed_forward(name: str) -> None:
    """In training, blocks that run again included; without a gradient nothing of it is used."""
    tokens, labels, reset = batch()
    results = []
    for compiled in (False, True):
        lm = model(name, torch.float32, n_layers=3)
        lm.set_activation_checkpointing(1)
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            for block in lm.layers:
                block.compile_feed_forward()
        output = lm(tokens, labels=labels, reset=reset)
        output.loss.backward()
        results.append((output.loss.detach(), gradients(lm)))
        with torch.no_grad():
            results.append((lm(tokens, labels=labels, reset=reset).loss, {}))
    (eager, ours), (scored, _), (loss, theirs), (scored_too, _) = results
    assert torch.equal(scored, scored_too)
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
    for key, grad in ours.items():
        assert float((theirs[key] - grad).abs().max()) <= 1e-5 * float(grad.abs().max()), key
    assert counters["stats"]["unique_graphs"] == 1, "one graph serves every block"


def test_a_feed_forward_is_compiled_for_more_shapes_than_torch_compiles_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    block = model("paragru", torch.float32, n_layers=1).layers[0]
    with torch._dynamo.config.patch(recompile_limit=8):
        block.compile_feed_forward()
        for time in range(2, 11):
            x = torch.randn(2, time, block.mlp_norm.weight.numel())
            torch.testing.assert_close(block._compiled(x), block.feed_forward(x))


def test_dropout_is_for_training_only() -> None:
    tokens, labels, _ = batch()
    lm = model(dropout=0.5)
    lm.eval()
    assert lm(tokens, labels=labels).loss == lm(tokens, labels=labels).loss
    lm.train()
    assert lm(tokens, labels=labels).loss != lm(tokens, labels=labels).loss


def test_statistics_by_layer() -> None:
    stats = model(mixer={"name": "paragru", "method": "newton"})(batch()[0]).stats
    assert set(stats) == {
        f"layer_{layer:02d}/newton_{what}" for layer in (0, 1) for what in ("iterations", "last_update")
    }
    assert all(float(stats[f"layer_{layer:02d}/newton_iterations"]) > 0 for layer in (0, 1))
    assert model("attention")(batch()[0]).stats == {}


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_model_has_float32_where_it_matters(name: str) -> None:
    """The loss and the residual stream are float32; the result is near the float32 model's."""
    tokens, labels, reset = batch()
    low, high = model(name, torch.bfloat16), model(name, torch.float32)
    seen: list[torch.dtype] = []
    low.layers[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    output = low(tokens, labels=labels, reset=reset)
    assert output.loss.dtype == output.aux.dtype == torch.float32
    assert seen == [torch.float32]
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in low.parameters())
    expected = high(tokens, labels=labels, reset=reset).loss
    # Weights of 8 bits: 2^-9 relative each, averaged over 61 logits of size ~0.1 about a loss of ln 61.
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-3)


@pytest.mark.parametrize(("d_model", "d_ff"), [(256, 704), (320, 896), (64, 192), (4096, 10944)])
def test_default_mlp_width(d_model: int, d_ff: int) -> None:
    assert default_d_ff(d_model) == d_ff


def test_mlp_can_be_left_out() -> None:
    lm = model(mlp=MLPConfig(enabled=False))
    assert not any("mlp" in name for name, _ in lm.named_parameters())
    assert model(mlp=MLPConfig(d_ff=40)).layers[0].mlp.down.weight.shape == (32, 40)


def test_vocabulary_may_be_padded_but_not_cut() -> None:
    assert model(vocab_size=64).vocab_size == 64
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 60 is less than the tokenizer's 61"):
        model(vocab_size=60)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_matrix_products(name: str, tied: bool) -> None:
    """Against torch's own counter on a real forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    lm = model(name, torch.float32, tie_embeddings=tied)
    tokens, labels = batch(2, 16)[0], batch(2, 16)[0]
    with FlopCounterMode(display=False) as counter:
        output = lm(tokens, labels=labels)
        (output.loss + output.aux).backward()
    counted = counter.get_total_flops() / tokens.numel()
    # What the counter does not see: the head's weight gradient (summed in place), and attention on a CPU.
    unseen = 2 * 61 * 32 + 3 * sum(mixer.extra_flops_per_token(16) for mixer in lm.mixers)
    assert flops_per_token(lm, 16) == counted + unseen


def test_attention_flops_are_those_of_the_visible_keys() -> None:
    mixer = model("attention").mixers[0]
    pairs = sum(position + 1 for position in range(16))
    assert 16 * mixer.extra_flops_per_token(16) == pairs * 2 * 2 * 32
