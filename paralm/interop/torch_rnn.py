"""torch.nn.LSTM, GRU and RNN ⇄ the mixers lstm, gru and elman with one head.

torch keeps two biases, of the input's and of the state's product. Only their sum acts, except for the GRU's candidate
n, whose second bias stands inside the reset: the mixer has that sum, and for the GRU both of n's. The mixer's output
projection has no counterpart, so it is left as it is:  mixer(x) = out_proj(module(x)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paralm.errors import ConfigError
from paralm.models.mixers.dense import GRU, LSTM, DenseMixer, Elman

_MODULES: dict[type[DenseMixer], type[nn.RNNBase]] = {LSTM: nn.LSTM, GRU: nn.GRU, Elman: nn.RNN}


@torch.no_grad()
def load_torch_rnn(mixer: DenseMixer, module: nn.RNNBase) -> None:
    """Copy a module's weights into a mixer of its kind, whose output projection stays.

    mixer: lstm, gru or elman with n_heads = 1, d_model the module's input_size and d_head its hidden_size. module: one
    layer, one direction, no projection; an nn.RNN with tanh. Raises ConfigError, one line with both sides.
    """
    if type(mixer) not in _MODULES:
        raise ConfigError(f"load_torch_rnn: {type(mixer).__name__} is none of the mixers lstm, gru, elman")
    wanted = _MODULES[type(mixer)]
    if not isinstance(module, wanted):
        raise ConfigError(
            f"load_torch_rnn: the mixer is {mixer.kind}, which takes torch.nn.{wanted.__name__}; got {_a(module)}"
        )
    if module.num_layers != 1 or module.bidirectional or module.proj_size:
        raise ConfigError(
            f"load_torch_rnn: {_a(module)} has {module.num_layers} layers, bidirectional={module.bidirectional} and "
            f"proj_size={module.proj_size}; a mixer is one layer, one direction, no projection"
        )
    if getattr(module, "nonlinearity", "tanh") != "tanh":
        raise ConfigError(f"load_torch_rnn: {_a(module)} has nonlinearity={module.nonlinearity!r}; elman has 'tanh'")
    ours = (mixer.in_proj.in_features, mixer.n_heads, mixer.d_head)
    if ours != (module.input_size, 1, module.hidden_size):
        raise ConfigError(
            f"load_torch_rnn: the mixer has d_model {ours[0]}, n_heads {ours[1]} and d_head {ours[2]}; {_a(module)} "
            f"has input_size {module.input_size} and hidden_size {module.hidden_size}, which is one head of that size"
        )
    weights = dict(module.named_parameters())
    mixer.in_proj.weight.copy_(weights["weight_ih_l0"])
    mixer.recurrent.copy_(weights["weight_hh_l0"].view(mixer.recurrent.shape))
    mixer.bias.copy_(_joined(mixer, weights) if module.bias else torch.zeros_like(mixer.bias))


def _joined(mixer: DenseMixer, weights: Mapping[str, Tensor]) -> Tensor:
    shape = (mixer.gates, 1, mixer.d_head)
    of_input, of_state = weights["bias_ih_l0"].view(shape), weights["bias_hh_l0"].view(shape)
    if mixer.kind != "gru":
        return of_input + of_state
    return torch.cat((of_input[:2] + of_state[:2], of_input[2:], of_state[2:]))


@torch.no_grad()
def to_torch_rnn(mixer: DenseMixer) -> nn.RNNBase:
    """The torch module (batch_first) with a mixer's weights, in their dtype and where they are; its output times
    `mixer.out_proj` is the mixer's. Raises ConfigError for more than one head."""
    if mixer.n_heads != 1:
        raise ConfigError(f"to_torch_rnn: the mixer has {mixer.n_heads} heads, a torch module has one")
    like = mixer.bias
    kind: Any = _MODULES[type(mixer)]  # torch's own classes share no constructor
    module = kind(mixer.in_proj.in_features, mixer.d_head, batch_first=True, device=like.device, dtype=like.dtype)
    weights = dict(module.named_parameters())
    weights["weight_ih_l0"].copy_(mixer.in_proj.weight)
    weights["weight_hh_l0"].copy_(mixer.recurrent.flatten(0, 2))
    weights["bias_ih_l0"].copy_(mixer.bias[: mixer.gates].flatten())
    weights["bias_hh_l0"].zero_()
    if mixer.kind == "gru":
        weights["bias_hh_l0"][-mixer.d_head :] = mixer.bias[3, 0]
    return module


def _a(module: nn.Module) -> str:
    return f"torch.nn.{type(module).__name__}"
