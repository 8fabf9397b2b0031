"""What a mixer is: anything that carries a state through time.

    y, state = mixer(x, state, reset)        x, y (batch, time, d_model); reset bool (batch, time)

and the law it obeys (:mod:`paralm.laws` checks it): feeding a sequence in pieces, handing the state on, equals
feeding it whole, in outputs, final state and gradients; and a reset at position t equals a fresh start at t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import paralm_kernels
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paralm.errors import ConfigError

if TYPE_CHECKING:
    from paralm_kernels import TimeShards

    from paralm.models.mitigations import Mitigation

State = Any
"""A nested dict or tuple. Every leaf is a tensor with the batch first, counters too, and none is changed in place:
a state can be saved, moved, indexed by row and sent to another rank by code that knows nothing of the mixer."""


class StateLeaf(NamedTuple):
    """How a leaf of a state is laid out, and what may be done to it."""

    heads: int | None = None
    """Its axis of heads (0 is the batch); None: the leaf is one head."""
    matrix: bool = False
    """Each head's part is a matrix, of the last two axes."""
    free: bool = False
    """What the recurrence carries, zero at the start, and any real value is a state: it may be clipped and drawn."""
    conv: bool = False
    """The last inputs of a convolution; a leaf named "conv" is taken for one anyway."""


@dataclass(frozen=True)
class LayerContext:
    """Where in which model a mixer stands."""

    d_model: int
    layer: int = 0
    n_layers: int = 1
    norm_eps: float = 1e-5
    init: str = "language_model"


def default_heads(channels: int, even: bool = False) -> int:
    """Heads of 64 channels, or as little wider as divides ``channels`` (``even``: into heads of even width)."""
    fitting = (h for h in range(channels // 64, 0, -1) if channels % (2 * h if even else h) == 0)
    return next(fitting, 1)


class Mixer(nn.Module):
    """Base class. A subclass takes ``(config, context)``, declares its parameters, and registers itself:

    ```python
    @register_mixer("mine", MyConfig)
    class MyMixer(Mixer):
        def __init__(self, config: MyConfig, context: LayerContext) -> None: ...
    ```

    Wrong sizes (a head count that does not divide) are ConfigErrors raised in ``__init__``, before allocation.
    """

    bounded_state: ClassVar[bool] = True
    """Whether the state's size does not depend on how much was read."""

    state_leaves: ClassVar[Mapping[str, StateLeaf]] = {}
    """Layout of the state's leaves by path ("cell/0", "memory/weights/*"); one that is not named is one head."""

    admits: ClassVar[frozenset[str]] = frozenset()
    """Mitigations of state collapse that its forward applies: "scale", "window" (:mod:`paralm.models.mitigations`)."""

    refuses: ClassVar[str] = "it declares no linear recurrence of known decay"
    """Why it admits no others, in a few words."""

    time_shards: TimeShards | None = None
    """Set where the time of sequences lies on several ranks (:func:`shard_time`); x is then this rank's part."""

    mitigation: Mitigation | None = None
    """In force (:func:`paralm.models.mitigations.mitigated`)."""

    def __init__(self, config: BaseModel, context: LayerContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.stats: dict[str, Tensor | float] = {}
        """How the last forward went (solver iterations, …): numbers on a CPU, tensors on a device."""

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """``x``: (batch, time, d_model), time ≥ 1. ``state``: from a former call or :meth:`initial_state`; None
        means the initial one. ``reset``: bool (batch, time), true where a new sequence starts."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, state, reset)")

    @property
    def joins_shards(self) -> bool:
        """Whether its forward itself joins the parts of time shards, by :attr:`kernels`; else ranks take turns."""
        return False

    @property
    def kernels(self) -> Any:
        """The functions that run over time: of `paralm_kernels`, or those of the same names over time shards."""
        return self.time_shards if self.time_shards is not None and self.joins_shards else paralm_kernels

    def over_time(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """:meth:`forward`, of a part of the sequence where its time lies on several ranks."""
        if self.time_shards is None or self.joins_shards:
            result: tuple[Tensor, State] = self(x, state, reset)
            return result
        return self.time_shards.relay(self, lambda batch: self.initial_state(batch, x.device, x.dtype), x, state, reset)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before anything was read, for ``batch`` rows; ``dtype`` is that of the activations."""
        raise TypeError(f"{type(self).__name__} does not define initial_state(batch, device, dtype)")

    def leaf(self, path: str) -> StateLeaf:
        """The layout of the state's leaf at ``path``."""
        return next((leaf for pattern, leaf in self.state_leaves.items() if fnmatchcase(path, pattern)), StateLeaf())

    def refusal(self, kind: str) -> str | None:
        """Why the mitigation ``kind`` ("scale", "clip", "window") cannot be applied; None: it can."""
        if kind in self.admits:
            return None
        if kind == "clip":
            free = any(leaf.free for leaf in self.state_leaves.values())
            return None if free else "it declares no leaf of its state that may be clipped"
        return self.refuses

    def clip_state(self, state: State, limit: float) -> State:
        """Each free leaf h, head by head: h · limit / ‖h‖ where ‖h‖ > limit (all elements' 2-norm), else h."""

        def clipped(path: str, leaf: Tensor) -> Tensor:
            layout = self.leaf(path)
            return leaf * clip_factor(leaf, limit, layout.heads) if layout.free else leaf

        return map_leaves(clipped, state)

    def extra_flops_per_token(self, seq_len: int) -> float:
        """Forward matrix-product FLOPs a token beyond two for each matrix element; see ``flops_per_token``."""
        return 0.0


def shard_time(model: nn.Module, shards: TimeShards | None) -> None:
    """Tells every mixer of a model that its sequences' time lies on several ranks; None: no longer. Raises ConfigError,
    one line, where a state grows with what was read."""
    mixers = list(_outermost(model))
    for mixer in mixers:
        if shards is not None and not mixer.bounded_state:
            raise ConfigError(
                f"{type(mixer).__name__}'s state grows with the sequence, so it cannot be handed from rank to rank; "
                "time shards need mixers of bounded state"
            )
    for mixer in mixers:
        mixer.time_shards = shards


def _outermost(module: nn.Module) -> Iterator[Mixer]:
    """The mixers that no other mixer contains."""
    if isinstance(module, Mixer):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def map_leaves(function: Any, state: State) -> State:
    """``function(path, leaf)`` of every leaf, in the same structure; paths as in :attr:`Mixer.state_leaves`."""
    leaves, structure = pytree.tree_flatten_with_path(state)
    return pytree.tree_unflatten([function(_path(keys), leaf) for keys, leaf in leaves], structure)


def named_leaves(state: State) -> list[tuple[str, Tensor]]:
    """(path, leaf) of every leaf, in order; paths as in :attr:`Mixer.state_leaves`."""
    return [(_path(keys), leaf) for keys, leaf in pytree.tree_flatten_with_path(state)[0]]


def _path(keys: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def clip_factor(leaf: Tensor, limit: float, heads: int | None) -> Tensor:
    """min(1, limit / ‖h‖) of each head of a leaf, broadcastable to it; its norm in at least float32."""
    wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    axes = [axis for axis in range(1, leaf.ndim) if axis != heads]
    norm = torch.linalg.vector_norm(wide, dim=axes, keepdim=True)
    return (limit / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0).to(leaf.dtype)
