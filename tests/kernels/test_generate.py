"""Generated Triton modules: those committed are what their cells say; others are made in memory and can be read."""

from __future__ import annotations

import ast
import builtins
import linecache

import pytest
import torch
from paralm_kernels import Cell, CellError, ParaGRU, cells

pytest.importorskip("triton")

from paralm_kernels import generate as generator
from paralm_kernels.derive import derive
from paralm_kernels.generate import FOLDER, generate, main, module
from paralm_kernels.graph import Builder, Graph
from paralm_kernels.triton_code import identifiers

from .conftest import ALL_CELLS, USER_CELLS


@pytest.mark.parametrize("name", list(cells()))
def test_the_committed_module_is_what_the_cell_says(name):
    assert (FOLDER / f"{name}.py").read_text(encoding="utf-8") == generate(cells()[name]), (
        "run python -m paralm_kernels.generate"
    )


def test_the_committed_module_is_the_one_that_runs():
    assert module(cells()["paragru"]).__name__ == "paralm_kernels.generated.paragru"


def test_check_finds_what_is_stale_missing_or_left_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    assert main(["--check"]) == 1
    assert "generated/paragru.py: is not what its cell says" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main([]) == 0
    assert main(["--check"]) == 0
    (tmp_path / "gone.py").write_text("")
    assert main(["--check"]) == 1
    assert "generated/gone.py: no registered cell has this name" in capsys.readouterr().out


@pytest.mark.parametrize("cell", ALL_CELLS, ids=lambda cell: cell.name)
def test_the_text_is_python_with_one_function_of_each_name(cell):
    tree = ast.parse(generate(cell))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(names) == len(set(names))
    kernels = {name for name in names if name.endswith("_kernel")}
    assert {"walk_kernel", "tile_kernel", "segments_kernel", "decode_kernel", "backward_kernel"} <= kernels
    assert cell.name in ast.get_docstring(tree)
    assert "def step(self" in ast.get_docstring(tree)
    assert max(map(len, generate(cell).splitlines())) <= 120


def test_a_users_cell_is_generated_in_memory_once_and_its_lines_can_be_shown():
    made = module(USER_CELLS[0])
    assert module(USER_CELLS[0]) is made
    lines = linecache.getlines(made.__file__)
    assert "".join(lines) == generate(USER_CELLS[0])


def test_it_is_written_out_where_a_folder_is_named(tmp_path, monkeypatch):
    class Fresh(type(USER_CELLS[0])):
        name = "fresh"

    monkeypatch.setenv("PARALM_KERNELS_DIR", str(tmp_path / "out"))
    module(Fresh())
    (path,) = (tmp_path / "out").iterdir()
    assert path.name.startswith("fresh_")
    assert path.read_text(encoding="utf-8") == generate(Fresh())


def test_a_cell_of_a_registered_name_does_not_get_that_cells_kernels():
    class Other(Cell):
        name = "paragru"
        state = ("h",)
        inputs = ("x",)
        params = ()

        def step(self, state, inputs, params):
            return (0.5 * state[0] + inputs[0],)

    made = module(Other())
    assert made.__name__ != module(cells()["paragru"]).__name__
    assert "next_h = x + h * 0.5" in generate(Other())


def test_numbers_of_any_size_are_written():
    class Far(Cell):
        name = "far"
        state, inputs, params = ("h",), ("x",), ()

        def step(self, state, inputs, params):
            h, x = state[0], inputs[0]
            return (torch.where(h > x, float("inf"), h).clamp(-1e300, 1e300),)

    text = generate(Far())
    assert 'tl.where(h > x, float("inf"), h)' in text
    assert "constant(1e+300, h)" in text


def test_names_that_the_text_needs_are_renamed():
    class Awkward(Cell):
        name = "awkward"
        state = ("time", "mask")
        inputs = ("t", "BLOCK")
        params = ("exp",)

        def step(self, state, inputs, params):
            return torch.exp(-(state[0] ** 2)) * params[0] + inputs[0], state[1] * inputs[1]

    text = generate(Awkward())
    assert "def step(time_, mask_, t_, block_, exp_):" in text
    assert "exp(" in text


class Marked(Cell):
    """Its names are found again in the text."""

    name = "marked"
    state, inputs, params = ("zqs", "zqt"), ("zqx", "zqy"), ("zqp",)

    def step(self, state, inputs, params):
        a, b = state
        return torch.tanh(params[0] * a + inputs[0]) * b, torch.sigmoid(b + inputs[1]) * a

    def box(self, state):
        return (1.0, None)


def names_in(text):
    tree = list(ast.walk(ast.parse(text)))
    found = {node.id for node in tree if isinstance(node, ast.Name)} | {n.arg for n in tree if isinstance(n, ast.arg)}
    return found | {node.name for node in tree if isinstance(node, ast.FunctionDef)}


def test_every_name_of_the_text_may_be_a_cells(monkeypatch):
    """Whatever the text calls its own, or makes of a cell's names, a cell that uses it gets another."""
    text = generate(Marked())
    own = {name for name in names_in(text) if "zq" not in name and not name.isupper() and not name.startswith("_")}
    made = {name.replace("zqs", "h") for name in names_in(text) if "zqs" in name and name != "zqs"}
    made = {name for name in made if "zq" not in name and not name.startswith(("_", "next_", "grad_"))}
    for taken in sorted((own | made) - set(dir(builtins)) - {"triton", "tl"}):

        class Taking(Cell):
            name = "taking"
            state, inputs, params = ("h",), ("x",), (taken,)

            def step(self, state, inputs, params):
                return (torch.tanh(params[0] * state[0] + inputs[0]),)

        chosen = identifiers(derive(Taking()))[taken]
        assert chosen not in own | made, taken
        assert chosen != taken


def test_an_operation_without_a_form_is_refused_by_name(monkeypatch):
    from paralm_kernels import triton_code

    monkeypatch.setattr(triton_code, "LOWERED", triton_code.LOWERED - {"tanh"})
    with pytest.raises(CellError) as caught:
        generate(ParaGRU())
    assert str(caught.value).startswith("cell 'paragru': tanh has no form in Triton; allowed are: abs, add, cos, div,")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda b, x, y: b.call("sub", x, b.call("sub", y, x)), "x - (y - x)"),
        (lambda b, x, y: b.call("mul", b.call("add", x, y), x), "x * (x + y)"),
        (lambda b, x, y: b.call("div", x, b.call("mul", x, y)), "x / (x * y)"),
        (lambda b, x, y: b.call("div", b.call("mul", x, y), b.const(3.0)), "x * y / 3.0"),
        (lambda b, x, y: b.call("neg", b.call("add", x, y)), "-(x + y)"),
        (lambda b, x, y: b.call("mul", x, b.const(-0.3)), "x * -0.3"),
        (lambda b, x, y: b.call("maximum", x, b.const(0.1)), "maximum(x, constant(0.1, x))"),
        (lambda b, x, y: b.call("tanh_backward", y, x), "y * (1.0 - x * x)"),
        (
            lambda b, x, y: b.call(
                "where", b.call("logical_and", b.call("gt", x, y), b.call("lt", x, b.const(1.0))), x, b.const(0.0)
            ),
            "tl.where((x > y) & (x < 1.0), x, 0.0)",
        ),
    ],
)
def test_expressions_keep_their_meaning(make, text):
    """Parentheses where Python would group otherwise; numbers beside float64 tensors lose nothing."""
    from paralm_kernels.derive import derive
    from paralm_kernels.triton_code import statements

    build = Builder()
    node = make(build, build.input("h"), build.input("x_z"))
    assert Graph(("h", "x_z"), {"out": node}).outputs
    (line,) = statements(derive(ParaGRU()), [("out", node)], {"h": "x", "x_z": "y"}, "x")
    assert line == f"out = {text}"
