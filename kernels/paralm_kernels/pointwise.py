"""Elementwise functions, with sums along an axis at most, that a GPU runs as one kernel each.

    @pointwise
    def scaled(a, b):
        return a * b + b

    scaled(compiled, a, b)

As they stand on a CPU; where ``compiled`` is true, as torch's compiler writes them (a Triton kernel on a GPU); in a dry
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
MORE_FORMS: dict[str, Any] = (
    {"recompile_limit": _FORMS} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
)
"""For ``torch.compile``, where it takes it."""


def pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with ``compiled`` before its arguments."""

    @functools.cache
    def as_compiled() -> Callable[..., Any]:
        # Sizes are arguments of the kernel, not a kernel each: tiles at the end of a sequence have their own.
        return torch.compile(function, dynamic=True, **MORE_FORMS)

    @functools.wraps(function)
    def run(compiled: bool, *arguments: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
        told = observer() if compiled and tensors[0].is_meta else None
        if told is not None:
            return _told(told, function, arguments, tensors)
        return as_compiled()(*arguments) if compiled else function(*arguments)

    return run


def _told(told: Callable[..., None], function: Callable[..., Any], arguments: Any, tensors: list[Tensor]) -> Any:
    """Its results, without values, made at once."""
    with _disable_current_modes():
        shapes = function(*arguments)
    several = isinstance(shapes, tuple)
    made = [torch.empty_like(x) if isinstance(x, Tensor) else x for x in (shapes if several else (shapes,))]
    told(function.__name__, [*tensors, *(x for x in made if isinstance(x, Tensor))], True)
    return tuple(made) if several else made[0]
