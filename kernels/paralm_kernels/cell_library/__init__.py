"""The cells that come with the package; importing this module registers them."""

from .fastslow import FastSlow
from .mgu import MGU
from .paragru import ParaGRU
from .paralstm import ParaLSTM
from .slstm_diagonal import SLSTMDiagonal
from .tanh import Tanh

__all__ = ["MGU", "FastSlow", "ParaGRU", "ParaLSTM", "SLSTMDiagonal", "Tanh"]
