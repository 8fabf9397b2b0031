"""The cells that come with the package; importing this module registers them."""

from .paragru import ParaGRU
from .paralstm import ParaLSTM

__all__ = ["ParaGRU", "ParaLSTM"]
