"""Triton's interpreter with less to do: the same numbers in about half of the time.

Imported by conftest.py where TRITON_INTERPRET=1. The interpreter patches triton.language anew for every call of a
function, and looks a dtype up in a table that it makes each time.
"""

from __future__ import annotations

import gc
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter

_patch_language = interpreter._patch_lang
_patched: set[int] = set()
"""Modules, by the ids of their globals, whose language is as the interpreter has it."""


def _patch_once(fn: Any) -> Any:
    """Once for a module, and for good: in this process kernels are interpreted, and nothing else."""
    if id(fn.__globals__) not in _patched:
        _patched.add(id(fn.__globals__))
        if any(tl.core.is_builtin(x.load) for x in fn.__globals__.values() if x is tl or x is tl.core):
            _patch_language(fn)
    return interpreter._LangPatchScope()


_table = interpreter._get_np_dtype
_known: dict[str, Any] = {}


def _numpy_dtype(dtype: Any) -> Any:
    """The interpreter's answer for a number, of which there are few."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return _table(scalar)
    if scalar.name not in _known:
        _known[scalar.name] = _table(scalar)
    return _known[scalar.name]


def use() -> None:
    """From here on in this process."""
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _numpy_dtype
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
