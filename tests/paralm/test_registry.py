"""Names in configurations: found, or refused in one line that names the nearest valid one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import BaseModel, Field, PositiveInt

from paralm.errors import ConfigError
from paralm.registry import MIXERS, EntryConfig, Registry, get_mixer, mixers, validate_mixer


class WidgetConfig(EntryConfig):
    size: PositiveInt = 3
    shape: str = Field(default="round")


def registry() -> Registry[Callable[[], str]]:
    widgets: Registry[Callable[[], str]] = Registry("widget", "shop.widget")

    @widgets.register("gear", WidgetConfig)
    def gear() -> str:
        return "gear"

    return widgets


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_found_by_name_with_defaults() -> None:
    entry, keys = registry().validate({"name": "gear", "size": 5})
    assert entry.value() == "gear"
    assert keys == WidgetConfig(size=5, shape="round")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ({"name": "geer"}, ["shop.widget.name", "'geer'", "did you mean 'gear'"]),
        ({"name": "anvil"}, ["'anvil'", "valid: gear"]),
        ({}, ["shop.widget.name", "missing", "gear"]),
        ({"name": 3}, ["shop.widget.name"]),
        ({"name": "gear", "sise": 4}, ["shop.widget.sise", "did you mean 'size'"]),
        ({"name": "gear", "size": "big"}, ["shop.widget.size", "'big'"]),
        ({"name": "gear", "size": 0}, ["shop.widget.size", "0"]),
    ],
)
def test_mistakes_are_one_line_with_the_key_and_the_nearest(spec: dict[str, object], parts: list[str]) -> None:
    text = message(lambda: registry().validate(spec))
    for part in parts:
        assert part in text


def test_a_name_is_taken_once() -> None:
    widgets = registry()

    def other() -> str:
        return "other"

    assert "taken" in message(lambda: widgets.register("gear", WidgetConfig)(other))
    assert widgets.get("gear").value() == "gear"


def test_the_same_definition_again_replaces_itself() -> None:
    widgets = registry()
    again = registry().get("gear").value
    widgets.register("gear", WidgetConfig)(again)
    assert widgets.get("gear").value is again


def test_a_config_that_ignores_unknown_keys_is_refused() -> None:
    class Loose(BaseModel):
        size: int = 1

    assert "EntryConfig" in message(lambda: registry().register("loose", Loose))


def test_builtin_mixers() -> None:
    assert {"attention", "paragru", "paralstm"} <= set(mixers())
    assert get_mixer("attention").value.bounded_state is False
    assert get_mixer("paragru").value.bounded_state is True


def test_a_mixer_cannot_take_a_cells_name() -> None:
    taken = get_mixer("attention").value
    assert "taken" in message(lambda: MIXERS.register("paragru", EntryConfig)(taken))


def test_mixer_keys_are_checked() -> None:
    text = message(lambda: validate_mixer({"name": "paralstm", "n_head": 4}))
    assert "model.mixer.n_head" in text
    assert "'n_heads'" in text
