"""From ATen operations to graph nodes: the white list of what a cell's step may use.

Anything not listed is refused by name. Operations PyTorch can decompose into listed ones (softplus, gelu, …) are
decomposed while tracing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions

from .errors import CellError
from .graph import COMPARE, UNARY, Builder, Node

aten = torch.ops.aten

DECOMPOSED: dict[Any, Callable[..., Any]] = get_decompositions(
    [
        aten.softplus,
        aten.softplus_backward,
        aten.log_sigmoid_forward,
        aten.log_sigmoid_backward,
        aten.silu,
        aten.silu_backward,
        aten.gelu,
        aten.gelu_backward,
        aten.hardtanh,
        aten.hardtanh_backward,
        aten.hardsigmoid,
        aten.hardsigmoid_backward,
        aten.hardswish,
        aten.hardswish_backward,
        aten.leaky_relu,
        aten.leaky_relu_backward,
        aten.elu,
        aten.elu_backward,
        aten.threshold,
        aten.threshold_backward,
        aten.masked_fill,
        aten.addcmul,
        aten.addcdiv,
        aten.logit,
        aten.xlogy,
    ]
)

Lower = Callable[..., Node]


def _scaled(build: Builder, node: Node, alpha: float | Node) -> Node:
    return build.call("mul", node, alpha if isinstance(alpha, Node) else build.const(alpha))


def _add(build: Builder, a: Node, b: Node, alpha: float = 1) -> Node:
    return build.call("add", a, _scaled(build, b, alpha))


def _sub(build: Builder, a: Node, b: Node, alpha: float | Node = 1) -> Node:
    return build.call("sub", a, _scaled(build, b, alpha))


def _div(build: Builder, a: Node, b: Node, rounding_mode: str | None = None) -> Node:
    if rounding_mode is not None:
        raise CellError(f"aten.div with rounding_mode={rounding_mode!r} has no useful derivative")
    if b.is_const and b.value != 0.0 and math.frexp(b.value)[0] in (0.5, -0.5):
        return build.call("mul", a, build.const(1.0 / b.value))  # exact for powers of two
    return build.call("div", a, b)


def _clamp(build: Builder, x: Node, low: Node | None = None, high: Node | None = None) -> Node:
    if low is not None:
        x = build.call("maximum", x, low)
    return x if high is None else build.call("minimum", x, high)


def _pow(build: Builder, base: Node, exponent: Node) -> Node:
    if base.is_const and base.value > 0.0:
        return build.call("exp", build.call("mul", exponent, build.const(math.log(base.value))))
    if not exponent.is_const:
        raise CellError("aten.pow with a tensor exponent cannot be lowered; write exp(exponent * log(base))")
    return build.call("pow", base, exponent)


def _lerp(build: Builder, start: Node, end: Node, weight: Node) -> Node:
    return build.call("add", start, build.call("mul", weight, build.call("sub", end, start)))


def _logical(op: str) -> Lower:
    def lower(build: Builder, *args: Node) -> Node:
        zero = build.const(0.0)
        return build.call(op, *(arg if arg.is_bool else build.call("ne", arg, zero) for arg in args))

    return lower


def _direct(op: str) -> Lower:
    return lambda build, *args: build.call(op, *args)


def _same(build: Builder, x: Node) -> Node:
    return x


def _filled(value: float) -> Lower:
    return lambda build, *_: build.const(value)


LOWERING: dict[str, Lower] = {
    **{op: _direct(op) for op in UNARY},
    **{op: _direct(op) for op in COMPARE},
    "add": _add,
    "sub": _sub,
    "rsub": lambda build, a, b, alpha=1: _sub(build, b, a, alpha),
    "mul": _direct("mul"),
    "div": _div,
    "pow": _pow,
    "exp2": lambda build, x: build.call("exp", _scaled(build, x, math.log(2.0))),
    "square": lambda build, x: build.call("mul", x, x),
    "maximum": _direct("maximum"),
    "minimum": _direct("minimum"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda build, x, high: _clamp(build, x, None, high),
    "relu": lambda build, x: build.call("maximum", x, build.const(0.0)),
    "sgn": _direct("sign"),
    "lerp": _lerp,
    "where": _direct("where"),
    "sigmoid_backward": _direct("sigmoid_backward"),
    "tanh_backward": _direct("tanh_backward"),
    **{op: _logical(op) for op in ("logical_and", "logical_or", "logical_not")},
    **{f"bitwise_{op}": _logical(f"logical_{op}") for op in ("and", "or", "not")},
    "detach": _same,
    "alias": _same,
    "clone": _same,
    "contiguous": _same,
    "lift_fresh_copy": _same,
    "zeros_like": _filled(0.0),
    "ones_like": _filled(1.0),
    "full_like": lambda build, _, value: value,
    "fill": lambda build, _, value: value,
    "empty_like": _filled(0.0),
    "scalar_tensor": lambda build, value: value,
    "full": lambda build, _, value: value,
    "new_zeros": _filled(0.0),
    "new_ones": _filled(1.0),
    "new_full": lambda build, _x, _size, value: value,
    "empty": _filled(0.0),
}

_LAYOUT_OPTIONS = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"}
_TYPE_CHANGES = {"_to_copy", "to", "type_as", "prims.convert_element_type"}


def lowerable() -> str:
    """The operations a step may use, for messages."""
    hidden = {"sigmoid_backward", "tanh_backward", "detach", "alias", "clone", "contiguous", "lift_fresh_copy"}
    hidden |= {"fill", "scalar_tensor", "sgn", "empty_like", "empty", "full", "new_zeros", "new_ones", "new_full"}
    extra = {"softplus", "logsigmoid", "silu", "gelu", "hardtanh", "hardswish", "leaky_relu", "elu"}
    return ", ".join(sorted((LOWERING.keys() - hidden) | extra))


def lower(build: Builder, target: Any, args: list[Any], kwargs: dict[str, Any], dtype: torch.dtype) -> Node:
    """The node for one traced call. `args` are nodes, numbers or None. Raises CellError for what is not listed."""
    name = str(target._schema.name).split("::")[-1] if hasattr(target, "_schema") else str(target)
    if name in _TYPE_CHANGES or name == "convert_element_type":
        return _type_change(build, args, kwargs, dtype)
    known = LOWERING.get(name)
    if known is None:
        raise CellError(_refusal(name, target))
    nodes = [build.const(arg) if isinstance(arg, bool | int | float) else arg for arg in args]
    options = {key: value for key, value in kwargs.items() if key not in _LAYOUT_OPTIONS}
    if options.keys() - {"alpha", "rounding_mode", "min", "max"}:
        raise CellError(f"aten.{name} with {', '.join(options)} cannot be lowered")
    renamed = {"min": "low", "max": "high"}
    return known(
        build,
        *nodes,
        **{
            renamed.get(key, key): build.const(value) if key in renamed and value is not None else value
            for key, value in options.items()
        },
    )


def _type_change(build: Builder, args: list[Any], kwargs: dict[str, Any], dtype: torch.dtype) -> Node:
    wanted = kwargs.get("dtype", args[1] if len(args) > 1 else None)
    if wanted is None or wanted == dtype:
        return build.as_number(args[0])
    if wanted == torch.bool:
        return args[0] if args[0].is_bool else build.call("ne", args[0], build.const(0.0))
    raise CellError(f"it casts to {wanted}; a step computes in the dtype it is given, write x.to(other.dtype)")


def _refusal(name: str, target: Any) -> str:
    tags = getattr(target, "tags", ())
    if name.endswith("_") or name == "copy":
        return f"aten.{name} changes an argument in place; a step returns new tensors"
    if torch.Tag.pointwise not in tags:
        return f"aten.{name} is not elementwise: it would mix channels, rows or time; allowed are: {lowerable()}"
    return f"aten.{name} cannot be lowered; allowed are: {lowerable()}"
