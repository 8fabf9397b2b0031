"""Graphs: equal values are one node, constants fold, what no output needs is dropped."""

from __future__ import annotations

import pytest
from paralm_kernels.graph import OPERATIONS, Builder, Graph


@pytest.fixture
def build():
    return Builder()


def test_equal_expressions_are_one_node(build):
    x, y = build.input("x"), build.input("y")
    assert build.call("mul", x, y) is build.call("mul", y, x)
    assert build.call("sub", x, y) is not build.call("sub", y, x)
    assert build.const(1) is build.const(1.0)
    assert build.const(0.0) is not build.const(-0.0)


def test_exact_simplifications(build):
    x, y = build.input("x"), build.input("y")
    zero, one = build.const(0), build.const(1)
    assert build.call("mul", x, one) is x
    assert build.call("mul", zero, x) is zero
    assert build.call("add", zero, x) is x
    assert build.call("sub", x, zero) is x
    assert build.call("div", x, one) is x
    assert build.call("neg", build.call("neg", x)) is x
    assert build.call("mul", x, build.const(-1)) is build.call("neg", x)
    assert build.call("add", x, build.call("neg", y)) is build.call("sub", x, y)
    assert build.call("add", build.call("neg", x), y) is build.call("sub", y, x)
    assert build.call("sub", x, build.call("neg", y)) is build.call("add", x, y)
    assert build.call("tanh_backward", zero, x) is zero
    assert build.call("where", build.call("gt", x, y), x, x) is x
    assert build.call("pow", x, build.const(3)) is build.call("mul", build.call("mul", x, x), x)
    assert build.call("add", build.const(2), build.const(3)).value == 5


def test_a_fold_that_is_not_finite_is_left_to_run_time(build):
    assert build.call("log", build.const(0)).op == "log"
    assert build.call("div", build.const(1), build.const(0)).op == "div"


def test_a_condition_used_as_a_number_becomes_one(build):
    x = build.input("x")
    product = build.call("mul", build.call("gt", x, build.const(0)), x)
    assert {node.op for node in Graph(("x",), {"y": product}).nodes} == {"input", "const", "gt", "where", "mul"}


def test_unknown_operation_is_refused(build):
    with pytest.raises(KeyError):
        build.call("matmul", build.input("x"))
    assert "matmul" not in OPERATIONS


def test_only_what_outputs_need_is_kept_and_ordered(build):
    x = build.input("x")
    build.call("exp", x)
    y = build.call("tanh", build.call("mul", x, x))
    graph = Graph(("x",), {"y": y})
    assert [node.op for node in graph.nodes] == ["input", "mul", "tanh"]
    assert str(graph).splitlines()[-1].startswith("y = v")


def test_substitution_folds_again(build):
    x, g = build.input("x"), build.input("g")
    root = build.call("add", build.call("mul", g, x), build.call("sigmoid_backward", g, x))
    assert build.substitute({"r": root}, {"g": 0.0})["r"].value == 0.0
    assert build.substitute({"r": build.call("mul", g, x)}, {"g": 1.0})["r"] is x
