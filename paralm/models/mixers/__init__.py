"""Mixers, one file each. Importing this package registers the built-in ones."""

from paralm.models.mixers.attention import Attention
from paralm.models.mixers.base import LayerContext, Mixer, State
from paralm.models.mixers.dense import GRU, LSTM, DenseMixer, Elman
from paralm.models.mixers.mamba2 import Mamba2
from paralm.models.mixers.mlstm import MLSTM
from paralm.models.mixers.pararnn import CellMixer
from paralm.models.mixers.slstm import SLSTM
from paralm.models.mixers.titans import TitansMAC, TitansMAG, TitansMAL, TitansMemory
from paralm.models.mixers.windowed import WindowAttention

__all__ = [
    "GRU",
    "LSTM",
    "MLSTM",
    "SLSTM",
    "Attention",
    "CellMixer",
    "DenseMixer",
    "Elman",
    "LayerContext",
    "Mamba2",
    "Mixer",
    "State",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansMemory",
    "WindowAttention",
]
