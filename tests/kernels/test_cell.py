"""A cell's definition is checked in the user's words; cells are found by name."""

from __future__ import annotations

import pytest
from paralm_kernels import Cell, CellError, ParaGRU, cells, get_cell, register
from paralm_kernels.cell import _registry, validate


def make(**fields):
    """A cell class with some fields replaced."""
    base = {"name": "made", "state": ("h",), "inputs": ("x",), "params": ("a",)}
    base["step"] = lambda self, state, inputs, params: (state[0] * params[0] + inputs[0],)
    return type("Made", (Cell,), {**base, **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "name must be a non-empty string"),
        ({"state": "h"}, "state is the string 'h'; write a tuple, ('h',)"),
        ({"state": ["h"]}, "state must be a tuple of names"),
        ({"state": ()}, "state is empty"),
        ({"inputs": ()}, "inputs is empty"),
        ({"params": ("a b",)}, "params name 'a b' is not a plain Python identifier"),
        ({"params": ("lambda",)}, "'lambda' is not a plain Python identifier"),
        ({"params": ("_a",)}, "'_a' is not a plain Python identifier"),
        ({"params": ("h",)}, "'h' is in both state and params"),
        ({"params": ("torch",)}, "'torch' is reserved for generated code"),
        ({"inputs": ("grad_h",)}, "'grad_h' is reserved for generated code"),
        ({"picard": -1}, "picard must be a number of sweeps >= 0"),
        ({"step": Cell.step}, "step is not defined"),
    ],
)
def test_malformed_definition_is_one_clear_line(fields, says):
    with pytest.raises(CellError) as caught:
        validate(make(**fields)())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Made" in str(caught.value)


def test_a_class_instead_of_an_instance_is_named():
    with pytest.raises(CellError, match="expected a Cell instance, got type"):
        validate(ParaGRU)


@pytest.fixture
def clean_registry():
    before = dict(_registry)
    yield
    _registry.clear()
    _registry.update(before)


def test_registered_cells_are_found(clean_registry):
    assert {"paragru", "paralstm"} <= set(cells())
    made = register(make())
    assert isinstance(get_cell("made"), made)
    register(make())  # the same definition again, as in a notebook
    with pytest.raises(TypeError):
        cells()["x"] = ParaGRU()


def test_two_cells_of_one_name_are_refused(clean_registry):
    with pytest.raises(CellError, match=r"cell name 'paragru' is taken by ParaGRU; give Made another name"):
        register(make(name="paragru"))
    assert isinstance(get_cell("paragru"), ParaGRU)


def test_unknown_name_names_the_nearest():
    with pytest.raises(CellError, match=r"no cell named 'paragruu'; did you mean 'paragru'\?"):
        get_cell("paragruu")
