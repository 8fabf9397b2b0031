"""What a piece of torch code holds and moves, counted while it runs on tensors that have no values.

Every operation is seen (a dispatch mode), every new storage counts from the operation that makes it until the last
reference to it is gone. Sizes are real, values are not; nothing is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Work:
    """One kernel: matrix-product FLOPs, bytes read and written, whether the products are of float32, and whether it is
    one of ours, fused."""

    flops: float
    moved: int
    wide: bool = False
    fused: bool = False


@dataclass
class Segment:
    """From one mark to the next. ``begin``, ``end``: bytes held; ``peak``: the most, beside ``gradients_at_peak``
    elements of weights' gradients that were finished by then; ``gradients``: those that were finished in it."""

    name: str
    begin: int = 0
    peak: int = 0
    end: int = 0
    gradients: int = 0
    gradients_at_peak: int = 0
    kernels: int = 0
    """Fused kernels among the work that may have matrix products, which are not counted in it."""
    work: list[Work] = field(default_factory=list)

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(work.moved for work in self.work)


class Ledger(TorchDispatchMode):
    """Bytes held and moved inside it, by segment; :meth:`mark` begins the next.

    ``gradient_bytes``: of an element of a finished gradient, when the peak is looked for (0: they are not kept).
    Questions for values that do not exist (has it converged, is any true, where does it start) are answered: 0, False.
    """

    def __init__(self, gradient_bytes: int = 0) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self.live = 0
        self._gradient_bytes, self._gradients = gradient_bytes, 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.mark("start")

    def mark(self, name: str) -> None:
        """Begin a segment."""
        if self.segments:
            self.segments[-1].end = self.live
        self.segments.append(Segment(name, self.live, self.live, self.live))

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Count tensors that were there before as if they did not exist (weights)."""
        for x in tensors:
            self._known[x.untyped_storage()._cdata] = (weakref.ref(x.untyped_storage(), self._forget(x)), 0)

    def gradient(self, parameter: Tensor) -> None:
        """The gradient of a weight is finished: from here on it is the optimizer's."""
        grad = parameter.grad
        assert grad is not None
        segment = self.segments[-1]
        segment.gradients += grad.numel()
        self._gradients += grad.numel()
        key = grad.untyped_storage()._cdata
        reference, size = self._known.get(key, (None, 0))
        self.live -= size
        if reference is not None:
            self._known[key] = (reference, 0)
        self._look()

    def told(self, name: str, tensors: Sequence[Tensor], pointwise: bool) -> None:
        """A fused kernel that would have started; ``pointwise``: without matrix products."""
        each = {(x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape)): x for x in tensors}
        self.segments[-1].kernels += not pointwise
        self.segments[-1].work.append(Work(0.0, sum(map(_size, each.values())), fused=True))

    def _forget(self, x: Tensor) -> Any:
        key = x.untyped_storage()._cdata

        def gone(_: Any) -> None:
            self.live -= self._known.pop(key, (None, 0))[1]

        return gone

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            size = storage.nbytes()
            self._known[storage._cdata] = (weakref.ref(storage, self._forget(x)), size)
            self.live += size

    def _look(self) -> None:
        segment = self.segments[-1]
        held = self.live + self._gradient_bytes * segment.gradients
        if held > segment.peak + self._gradient_bytes * segment.gradients_at_peak:
            segment.peak, segment.gradients_at_peak = self.live, segment.gradients

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and (args[0].is_meta or type(args[0]) is not Tensor):
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        outputs = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        for x in outputs:
            self._hold(x)
        self._look()
        if not func.is_view:
            self._record(func, args, kwargs, out, outputs)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any, outputs: list[Tensor]) -> None:
        if func.namespace != "aten" or func.overloadpacket in _FREE:
            return
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not inputs and not outputs:  # a question about dtypes, say
            return
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **kwargs, out_val=out)) if count is not None else 0.0
        wide = bool(inputs) and inputs[0].dtype == torch.float32
        self.segments[-1].work.append(Work(flops, sum(map(_size, (*inputs, *outputs))), wide))


_FREE = {
    torch.ops.aten.detach,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten._unsafe_view,  # of a product's own result; not a view by its name only
}
"""Operations that move nothing."""


def _size(x: Tensor) -> int:
    """Bytes of what a tensor reads: broadcast axes once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if attn_mask is None and q.element_size() == 2:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )[0]
        return out
    bias = None
    if attn_mask is not None:
        rows = attn_mask.shape[-1]
        bias = torch.empty((*attn_mask.shape[:-1], -(-rows // 8) * 8), dtype=q.dtype, device=q.device)[..., :rows]
        bias = bias.expand(*q.shape[:3], rows)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out = efficient(q, k, v, bias, q.requires_grad, dropout_p, is_causal, scale=scale)[0]
    return out


@contextmanager
def gpu_attention() -> Iterator[None]:
    """Within it ``F.scaled_dot_product_attention`` of tensors on the meta device makes what a GPU's kernels make.

    Of tensors without values torch takes the composite, with all its scores; a GPU does not: without a mask flash
    attention, with one the memory-efficient kernel, as torch chooses them for 16 bits. (Not by a mode for functions:
    a backward pass, in which activation checkpointing runs blocks again, leaves those.)
    """
    import torch._meta_registrations

    composite = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta or query.dtype == torch.float64:
            return composite(query, *args, **kwargs)
        return _attention(query, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = composite
