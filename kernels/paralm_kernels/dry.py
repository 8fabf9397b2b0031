"""Running on tensors without values, to learn what a GPU would hold and move.

    with dry_run(told):                    # told(name of a kernel, its tensors, whether it is pointwise)
        y, state = mixer(x_on_meta)

Inside, a tensor on torch's meta device stands for one on a GPU: every function of this package goes the way it goes
there and makes the same tensors, and a fused kernel is told to the observer instead of launched. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Told = Callable[[str, list[Tensor], bool], None]
"""(kernel's name, the tensors it reads and writes, whether it is pointwise: certainly without matrix products)."""

_POINTWISE = ("triton_norm_kernels", "triton_conv_kernels", "generated")
"""In the names of modules whose kernels have no matrix products."""
_TOLD: ContextVar[Told | None] = ContextVar("paralm_kernels_told", default=None)


@contextmanager
def dry_run(told: Told | None = None) -> Iterator[None]:
    """Tensors on the meta device go the way of a GPU's; see above. ``told`` hears of every kernel that would start.

    Without Triton (which is not on every platform) there are no fused kernels here either, as on a GPU without it.
    """
    token = _TOLD.set(told or (lambda name, tensors, pointwise: None))
    try:
        with _told_instead_of_launched():
            yield
    finally:
        _TOLD.reset(token)


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a GPU, or in a dry run stands for one that is."""
    return x.device.type == "cuda" or (x.device.type == "meta" and _TOLD.get() is not None)


def observer() -> Told | None:
    """Who hears of kernels that would start; None outside a dry run."""
    return _TOLD.get()


@contextmanager
def _told_instead_of_launched() -> Iterator[None]:
    """Triton's launches of meta tensors, which it cannot make, go to the observer; all others are made as ever."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    launch = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        told = _TOLD.get()
        if told is None or not any(x.device == torch.device("meta") for x in tensors):
            return launch(self, *args, **kwargs)
        told(self.fn.__name__, tensors, any(name in self.fn.__module__ for name in _POINTWISE))
        return None

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch
