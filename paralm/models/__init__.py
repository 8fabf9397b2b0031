"""Language models: the stack, its mixers, the loss and the initial values."""

from paralm.models.lm import Block, LanguageModel, LMOutput, build_mixer, build_model, construct_model, flops_per_token
from paralm.models.mixers import LayerContext, Mixer, State
from paralm.models.parameters import constant, declare, normal, uniform

__all__ = [
    "Block",
    "LMOutput",
    "LanguageModel",
    "LayerContext",
    "Mixer",
    "State",
    "build_mixer",
    "build_model",
    "constant",
    "construct_model",
    "declare",
    "flops_per_token",
    "normal",
    "uniform",
]
