"""The ParaRNN block around any registered cell (ParaRNN, arXiv 2510.21450).

    u, g = W_in x;   v = SiLU(conv_4(u));   i_k = B_k v + b_k  (B_k block-diagonal over heads, one for each input)
    h_t = cell(h_{t−1}, i_t; a)             by paralm_kernels.solve, parallel in time
    y = W_out (RMSNorm(h) ⊙ SiLU(g))

h is the cell's last state component (ParaLSTM's state is [c, h]). One class serves every cell: registering a cell
makes a mixer of that name.

Initial values, by ``init``: ``released`` has the recurrent vectors normal with std 2/√(5d), B Xavier-uniform, and
−linspace(0, 1) as the first gate's bias; ``language_model`` has them normal with std 1/√d and kept within ±0.5, B
Kaiming-uniform, biases 0. ``gate_spread`` overrides how far the first gate's biases run.

Two bounds of B differ from the library released with the paper. Its Xavier takes all d channels for the fan-out of a
block, √(6/(in + d)), here √(3/in), which keeps the variance whatever the blocks. What it calls Kaiming is √(3/in), here
1/√in, as torch's linear maps; ``input_bound: 1.732`` is the library's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, ClassVar, Literal

import paralm_kernels
import torch
import torch.nn.functional as F
from paralm_kernels import Cell
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from paralm.errors import ConfigError
from paralm.models.functional import block_diagonal
from paralm.models.linear import Linear
from paralm.models.mixers.base import LayerContext, Mixer, State, StateLeaf, default_heads
from paralm.models.norms import GatedRMSNorm
from paralm.models.parameters import Init, constant, declare, normal, output_std, uniform
from paralm.registry import Entry, EntryConfig


class CellMixerConfig(EntryConfig):
    """Keys of ``model.mixer`` for a cell."""

    n_heads: PositiveInt | None = Field(
        default=None, description="blocks of the input projection; default: of 64 channels or a little more"
    )
    d_conv: int = Field(default=4, ge=2, le=16, description="width of the short convolution, in tokens")
    expand: PositiveInt = Field(default=1, description="channels of the recurrence over d_model")
    init: Literal["released", "language_model"] | None = Field(default=None, description="default: model.init")
    gate_spread: float | None = Field(
        default=None,
        description="the first gate's biases run from 0 to this over the channels, so that they start with different "
        "memories: ParaGRU forgets over about 1 + e^-bias steps; default: -1 with init released, else 0",
    )
    input_bound: PositiveFloat | None = Field(
        default=None,
        description="the input maps start uniform within this over the root of a block's channels; default: sqrt(3) "
        "with init released, else 1",
    )
    clamp: PositiveFloat | Literal["default", "none"] = Field(
        default="default",
        description="elementwise bound on recurrent weights; default: 0.5 with init language_model, else none",
    )
    method: Literal["auto", "sequential", "newton"] = Field(default="auto", description="of solving")
    tol: PositiveFloat | None = Field(default=None, description="Newton's, on the last update; default: the solver's")
    max_iter: PositiveInt | None = Field(default=None, description="Newton's; default: the solver's")
    on_failure: Literal["raise", "sequential"] = Field(
        default="raise", description="when Newton does not converge: stop, or walk the sequence"
    )


class CellInputs(nn.Module):
    """i_k = B_k v + b_k for each of a cell's inputs; B_k block-diagonal, ``weight`` (inputs, heads, out, in)."""

    def __init__(self, config: CellMixerConfig, channels: int, n_inputs: int, n_heads: int, released: bool) -> None:
        super().__init__()
        width = channels // n_heads
        self.weight = nn.Parameter(torch.empty(n_inputs, n_heads, width, width))
        self.bias = nn.Parameter(torch.empty(n_inputs, channels))
        # Xavier's bound √(6/(in + out)) with in = out; torch's Kaiming bound 1/√in.
        bound = config.input_bound if config.input_bound is not None else math.sqrt(3.0) if released else 1.0
        declare(self, "weight", uniform(bound / math.sqrt(width)), decay=True)
        spread = config.gate_spread if config.gate_spread is not None else -1.0 if released else 0.0
        declare(self, "bias", partial(_spread_first_gate, spread), decay=False)

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        """(batch, time, channel) → one such tensor for each input."""
        return block_diagonal(v, self.weight, self.bias)


def _spread_first_gate(last: float, tensor: Tensor, generator: torch.Generator) -> None:
    """The first gate's biases are linspace(0, last) over the channels (the released code: last = −1), the others 0."""
    tensor.zero_()
    tensor[0] = torch.linspace(0, last, tensor.shape[1])


class CellMixer(Mixer):
    """The block, for the cell in the class attribute ``cell``; see :func:`cell_mixers`."""

    refuses: ClassVar[str] = "the decay of its recurrence depends on its own state"

    cell: ClassVar[Cell]
    config: CellMixerConfig

    def __init__(self, config: CellMixerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        d_model, channels = context.d_model, config.expand * context.d_model
        n_heads = config.n_heads or default_heads(channels)
        if channels % n_heads:
            raise ConfigError(
                f"model.mixer.n_heads: {n_heads} heads do not divide {channels} channels (expand × model.d_model)"
            )
        init = config.init or context.init
        self.channels = channels
        self.in_proj = Linear(d_model, (channels, channels))
        self.conv_weight = nn.Parameter(torch.empty(channels, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.inputs = CellInputs(config, channels, len(self.cell.inputs), n_heads, init == "released")
        self.recurrent = nn.ParameterDict({name: nn.Parameter(torch.empty(channels)) for name in self.cell.params})
        self.norm = GatedRMSNorm(channels, context.norm_eps)
        self.out_proj = Linear(channels, d_model, output_std(channels, context.n_layers))
        declare(self, "conv_weight", uniform(config.d_conv**-0.5), decay=False)
        declare(self, "conv_bias", constant(0.0), decay=False)
        for name in self.cell.params:
            declare(self.recurrent, name, self._recurrent_init(init), decay=False, clamp=self._clamp(init))

    def leaf(self, path: str) -> StateLeaf:
        """The cell's components, free where the cell says so."""
        return StateLeaf(free=self.cell.free_state) if path.startswith("cell/") else StateLeaf()

    def refusal(self, kind: str) -> str | None:
        """See :class:`Mixer`."""
        if kind != "clip":
            return super().refusal(kind)
        return None if self.cell.free_state else "its output is a weighted mean, whose normaliser is part of the state"

    def _recurrent_init(self, init: str) -> Init:
        return normal(2 / math.sqrt(5 * self.channels) if init == "released" else 1 / math.sqrt(self.channels))

    def _clamp(self, init: str) -> float | None:
        if isinstance(self.config.clamp, float):
            return self.config.clamp
        return 0.5 if self.config.clamp == "default" and init == "language_model" else None

    @property
    def joins_shards(self) -> bool:
        """See :class:`Mixer`."""
        return True

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """See :class:`Mixer`. State: ``{"cell": (…, one (batch, channel) for each component), "conv": …}``."""
        cell_state, conv_state = (None, None) if state is None else (state["cell"], state["conv"])
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u, conv_state = self.kernels.causal_conv(u, self.conv_weight, self.conv_bias, conv_state, reset)
        inputs = self.inputs(F.silu(u))
        params = tuple(self.recurrent[name] for name in self.cell.params)
        hidden, cell_state = self._recur(inputs, params, cell_state, reset)
        return self.out_proj(self.norm(hidden, gate)), {"cell": cell_state, "conv": conv_state}

    def _recur(
        self,
        inputs: tuple[Tensor, ...],
        params: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output (batch, time, channel) and final state."""
        config = self.config
        alone = self.time_shards is None and inputs[0].shape[1] == 1
        if alone and state is not None and reset is None and not torch.is_grad_enabled():
            self.stats = {}
            state = paralm_kernels.step(self.cell, state, tuple(i.squeeze(1) for i in inputs), params)
            return state[-1].unsqueeze(1), state
        trajectory = self.kernels.solve(
            self.cell,
            inputs,
            params,
            state=state,
            reset=reset,
            method=config.method,
            tol=config.tol,
            max_iter=config.max_iter,
            on_failure=config.on_failure,
        )
        info = trajectory.info
        self.stats = {"newton_iterations": info.iterations, "newton_last_update": info.last_update}
        return trajectory.states[-1], trajectory.final

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros; the cell's in at least float32."""
        dtype = dtype or self.conv_weight.dtype
        device = device or self.conv_weight.device
        wide = torch.promote_types(dtype, torch.float32)
        return {
            "cell": tuple(torch.zeros(batch, self.channels, device=device, dtype=wide) for _ in self.cell.state),
            "conv": torch.zeros(batch, self.config.d_conv - 1, self.channels, device=device, dtype=dtype),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.cell.name,), self.__getstate__()


def _unpickled(name: str) -> CellMixer:
    """An empty mixer of the cell of that name: its class is made from the cell, so it cannot be found by its own."""
    kind = _mixer_class(paralm_kernels.get_cell(name))
    return kind.__new__(kind)


@cache
def _mixer_class(cell: Cell) -> type[CellMixer]:
    kind = type(cell)
    namespace = {"cell": cell, "__module__": kind.__module__, "__doc__": f"The ParaRNN block around {cell.name}."}
    return type(f"{kind.__name__}Mixer", (CellMixer,), namespace)


def cell_mixers() -> Mapping[str, Entry[type[Mixer]]]:
    """A mixer for every registered cell, by the cell's name."""
    return {name: Entry(name, CellMixerConfig, _mixer_class(cell)) for name, cell in paralm_kernels.cells().items()}
