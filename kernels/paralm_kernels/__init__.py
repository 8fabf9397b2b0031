"""Recurrences over time, solved exactly, from nothing but a cell's elementwise step.

`Cell` defines a recurrence; `solve` runs it over time (sequential loop with an analytic adjoint, or Newton's method),
`step` advances it by one for decoding; `causal_conv` and the linear scans (`diagonal_scan`, `matrix_scan`) are the
recurrences that need no cell. `dense_rnn` runs those that are dense within a head (LSTM, GRU, sLSTM, Elman),
`chunkwise` those whose state is a matrix with a scalar decay (Mamba2's SSD, mLSTM). `gated_norm`, `swiglu` and
`rotate` are what stands between them in a model. `TimeShards` has them for a
sequence whose time lies on several ranks.
"""

from .affine import AffineMap
from .cell import Cell, cells, get_cell, register
from .cell_library import MGU, FastSlow, ParaGRU, ParaLSTM, SLSTMDiagonal, Tanh
from .chunkwise import chunkwise, reference_chunkwise
from .chunkwise_window import window_state, windowed_chunkwise
from .conv import causal_conv
from .dense_rnn import dense_rnn, dense_state, reference_dense_rnn
from .dry import dry_run
from .errors import ArgumentError, CellError, NotConverged
from .neural_memory import memory_state, neural_memory, read_memory
from .norm import gated_norm, swiglu
from .positions import positions
from .problem import SolveInfo
from .rotary import rotary_angles, rotate
from .scan import Scan, diagonal_scan, matrix_scan
from .solve import Trajectory, solve, step
from .time_shards import TimeShards

__all__ = [
    "MGU",
    "AffineMap",
    "ArgumentError",
    "Cell",
    "CellError",
    "FastSlow",
    "NotConverged",
    "ParaGRU",
    "ParaLSTM",
    "SLSTMDiagonal",
    "Scan",
    "SolveInfo",
    "Tanh",
    "TimeShards",
    "Trajectory",
    "causal_conv",
    "cells",
    "chunkwise",
    "dense_rnn",
    "dense_state",
    "diagonal_scan",
    "dry_run",
    "gated_norm",
    "get_cell",
    "matrix_scan",
    "memory_state",
    "neural_memory",
    "positions",
    "read_memory",
    "reference_chunkwise",
    "reference_dense_rnn",
    "register",
    "rotary_angles",
    "rotate",
    "solve",
    "step",
    "swiglu",
    "window_state",
    "windowed_chunkwise",
]
