"""The laws catch what they are for: each broken mixer here breaks exactly the laws it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from paralm.config import ModelConfig
from paralm.errors import ConfigError
from paralm.laws import LAWS, check_mixer
from paralm.models import LayerContext, Mixer, build_model, constant, declare
from paralm.registry import MIXERS, EntryConfig


class Mean(Mixer):
    """A lawful mixer: y_t = w · (mean of x since the last reset). Its state is a sum and an integer count."""

    def __init__(self, config: EntryConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.weight = nn.Parameter(torch.empty(context.d_model))
        declare(self, "weight", constant(1.0), decay=False)

    def initial_state(self, batch: int, device: Any = None, dtype: Any = None) -> Any:
        zeros = torch.zeros(batch, self.context.d_model, dtype=dtype)
        return {"sum": zeros, "count": torch.zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        state = self.initial_state(len(x), x.device, x.dtype) if state is None else state
        total, count, outputs = state["sum"], state["count"], []
        for t in range(x.shape[1]):
            if reset is not None:
                total, count = self.restart(total, count, reset[:, t])
            total, count = self.add(total, x, t), count + 1
            outputs.append(self.weight * total / count[:, None])
        return torch.stack(outputs, dim=1), {"sum": total, "count": count}

    def restart(self, total: Tensor, count: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return total.masked_fill(where[:, None], 0), count.masked_fill(where, 0)

    def add(self, total: Tensor, x: Tensor, t: int) -> Tensor:
        return total + x[:, t]


class ForgetsTheState(Mean):
    def forward(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        return super().forward(x, None, reset)


class CutsGradients(Mean):
    """Right values everywhere; the state comes back detached."""

    def forward(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        y, new = super().forward(x, state, reset)
        return y, {**new, "sum": new["sum"].detach()}


class KeepsTheCountOverResets(Mean):
    def restart(self, total: Tensor, count: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return total.masked_fill(where[:, None], 0), count


class ResetsEveryRow(Mean):
    def restart(self, total: Tensor, count: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return super().restart(total, count, where.any().expand_as(where))


class LooksAhead(Mean):
    def add(self, total: Tensor, x: Tensor, t: int) -> Tensor:
        return total + x[:, t] + 0.01 * x[:, -1]


class ChangesTheStateInPlace(Mean):
    def forward(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        y, new = super().forward(x, state, reset)
        if state is not None:
            state["count"].copy_(new["count"])
        return y, new


class KeepsAPlainNumber(Mean):
    def forward(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        y, new = super().forward(x, {k: state[k] for k in ("sum", "count")} if state else None, reset)
        return y, {**new, "read": x.shape[1]}

    def initial_state(self, batch: int, device: Any = None, dtype: Any = None) -> Any:
        return {**super().initial_state(batch, device, dtype), "read": 0}


class Grows(Mean):
    def forward(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        past = x[:, :0] if state is None else state["past"]
        y, new = super().forward(x, None if state is None else state, reset)
        return y, {**new, "past": torch.cat((past, x), dim=1)}

    def initial_state(self, batch: int, device: Any = None, dtype: Any = None) -> Any:
        past = torch.zeros(batch, 0, self.context.d_model, dtype=dtype)
        return {**super().initial_state(batch, device, dtype), "past": past}


class AdmitsToGrow(Grows):
    bounded_state: ClassVar[bool] = False


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.001


class WrongGradient(Mean):
    """The same wrong gradient whole and in pieces: only the difference quotient can tell."""

    def add(self, total: Tensor, x: Tensor, t: int) -> Tensor:
        return total + _Wrong.apply(x[:, t])


class KeepsABuffer(Mean):
    """A model is built without values, so a table made here would be whatever lies in memory."""

    def __init__(self, config: EntryConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.register_buffer("table", torch.ones(context.d_model))


class DoesNotTrain(Mean):
    """No fragment of a frozen weight is in a checkpoint, which would then be called damaged."""

    def __init__(self, config: EntryConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.weight.requires_grad_(False)


class Crashes(Mean):
    def restart(self, total: Tensor, count: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        raise KeyError("no such thing")


@pytest.fixture
def broken() -> Any:
    """Registers a mixer class for one test; returns the names of the laws it breaks, with the details."""
    added: list[str] = []

    def laws_broken(kind: type[Mixer]) -> dict[str, str]:
        MIXERS.register(kind.__name__, EntryConfig)(kind)
        added.append(kind.__name__)
        return {result.name: result.detail for result in check_mixer(kind.__name__, d_model=4) if not result.ok}

    yield laws_broken
    for name in added:
        del MIXERS._own[name]


@pytest.mark.parametrize(
    ("kind", "laws"),
    [
        (Mean, set()),
        (AdmitsToGrow, set()),
        (ForgetsTheState, {"pieces", "decode"}),
        (CutsGradients, {"pieces", "gradient"}),
        (KeepsTheCountOverResets, {"reset"}),
        (ResetsEveryRow, {"rows", "reset"}),
        (LooksAhead, {"causal", "pieces", "decode"}),
        (ChangesTheStateInPlace, {"state"}),
        (KeepsAPlainNumber, {"state"}),
        (Grows, {"bounded"}),
        (WrongGradient, {"gradient"}),
        (Crashes, {"reset", "rows"}),
    ],
)
def test_a_broken_mixer_breaks_its_laws(
    broken: Callable[[type[Mixer]], dict[str, str]], kind: type[Mixer], laws: set[str]
) -> None:
    found = broken(kind)
    assert laws <= set(found), found
    if not laws:
        assert not found


@pytest.mark.parametrize(("kind", "what"), [(KeepsABuffer, "buffer 'table'"), (DoesNotTrain, "parameter 'weight'")])
def test_what_no_checkpoint_would_hold_is_refused(
    broken: Callable[[type[Mixer]], dict[str, str]], kind: type[Mixer], what: str
) -> None:
    found = broken(kind)
    assert set(found) == set(LAWS)
    assert all(what in detail for detail in found.values())
    with pytest.raises(ConfigError, match=f"mixer '{kind.__name__}': {what}"):
        build_model(ModelConfig(d_model=4, n_layers=1, mixer={"name": kind.__name__}), 10, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y, state: y, "forward must return (y, state), got Tensor"),
        (lambda y, state: (y.transpose(0, 1), state), "a y of (2, 3, 4), expected (3, 2, 4), (batch, time, d_model)"),
        (lambda y, state: (y, state["sum"]), "a state that is a Tensor; make it a dict or a tuple"),
    ],
)
def test_what_is_no_output_and_state_is_named_by_every_law(
    broken: Callable[[type[Mixer]], dict[str, str]], change: Callable[[Tensor, Any], Any], says: str
) -> None:
    class Misshapen(Mean):
        def forward(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> Any:
            return change(*super().forward(x, state, reset))

    found = broken(Misshapen)
    assert set(found) == set(LAWS)
    assert all(says in detail for detail in found.values())


def test_every_law_is_caught_breaking_by_some_mixer(broken: Callable[[type[Mixer]], dict[str, str]]) -> None:
    kinds = (ForgetsTheState, ResetsEveryRow, LooksAhead, ChangesTheStateInPlace, Grows, WrongGradient)
    assert set().union(*(broken(kind) for kind in kinds)) == set(LAWS)


def test_details_say_what_and_how_much(broken: Callable[[type[Mixer]], dict[str, str]]) -> None:
    assert "KeyError: 'no such thing'" in broken(Crashes)["reset"]
    assert "read" not in broken(Grows)
    assert "in pieces of" in broken(ForgetsTheState)["pieces"]
    assert "allowed" in broken(WrongGradient)["gradient"]


def test_results_are_measured_in_units_of_what_is_allowed() -> None:
    results = check_mixer("attention")
    assert [result.name for result in results] == list(LAWS)
    assert all(0 <= result.worst <= 1 for result in results)


def test_unknown_names_and_keys() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paragru'"):
        check_mixer("paragrue")
    with pytest.raises(ConfigError, match="n_heads"):
        check_mixer("paragru", {"heads": 2})
