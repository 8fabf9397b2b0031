"""Elementwise functions, with sums along an axis at most, that a GPU runs as one kernel each.

    @pointwise
    def scaled(a, b):
        return a * b + b

    scaled(fused, a, b)

As they stand on a CPU; where ``fused`` is true, as torch's compiler writes them (a Triton kernel on a GPU); in a dry
run (:mod:`.dry`) told like a kernel. They are called where no gradient is recorded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .dry import observer

_FORMS = 64
"""Kernels of one function, of which torch by itself makes 8 and then no more in a process: a form of a call is which
arguments are None, their dtypes, which sizes are 1 and which are equal. Two models and an evaluation need twenty."""


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """As ``torch.compile``, for more forms of a call than torch makes by itself. torch 2.11 has one limit for all
    that a process compiles, and no keyword: there it is raised for all."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _FORMS
    else:
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _FORMS)
    return torch.compile(function, **options)


def pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with ``fused`` before its arguments."""

    @functools.cache
    def as_compiled() -> Callable[..., Any]:
        # Sizes are arguments of the kernel, not a kernel each: tiles at the end of a sequence have their own.
        return compiled(function, dynamic=True)

    @functools.wraps(function)
    def run(fused: bool, *arguments: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
        told = observer() if fused and tensors[0].is_meta else None
        if told is not None:
            return _told(told, function, arguments, tensors)
        return as_compiled()(*arguments) if fused else function(*arguments)

    return run


def _told(told: Callable[..., None], function: Callable[..., Any], arguments: Any, tensors: list[Tensor]) -> Any:
    """Its results, without values, made at once."""
    with _disable_current_modes():
        shapes = function(*arguments)
    several = isinstance(shapes, tuple)
    made = [torch.empty_like(x) if isinstance(x, Tensor) else x for x in (shapes if several else (shapes,))]
    told(function.__name__, [*tensors, *(x for x in made if isinstance(x, Tensor))], True)
    return tuple(made) if several else made[0]
