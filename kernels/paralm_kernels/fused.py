"""Where the fused kernels are, and when they are taken: Triton is not on every platform, so it is imported on use."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from .dry import on_gpu
from .errors import ArgumentError


def by_default(x: Tensor) -> bool:
    """Whether method "auto" takes them for a tensor: on a GPU, where Triton is installed."""
    return on_gpu(x) and _triton_is_there()


METHODS = ("auto", "torch", "triton")


def taken(x: Tensor, method: str, module: str, caller: str) -> bool:
    """Whether a function of these METHODS is left to the kernels of a module: by "triton", and by "auto" where they are
    the default and x has numbers. ArgumentError, one line, for another method, and for "triton" where it cannot be.
    """
    if method not in METHODS:
        raise ArgumentError(f"{caller}: no method '{method}' among {', '.join(METHODS)}")
    if method == "auto":
        return by_default(x) and x.numel() > 0
    if method == "triton":
        kernels(module, f"{caller}: ")
        kernels("triton_solver").check_device(x.device)
    return method == "triton"


def kernels(module: str, caller: str = "") -> Any:
    """One of this package's modules that need Triton. ArgumentError, one line, without it; ``caller`` begins it."""
    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        message = f"{caller}method 'triton' needs the package triton ({error}); use method='auto'"
        raise ArgumentError(message) from None


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None
