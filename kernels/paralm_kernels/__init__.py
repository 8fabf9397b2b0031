"""Recurrences over time, solved exactly, from nothing but a cell's elementwise step.

`Cell` defines a recurrence; `solve` runs it over time (sequential loop with an analytic adjoint, or Newton's method),
`step` advances it by one for decoding; `causal_conv` and the linear scans (`diagonal_scan`, `matrix_scan`) are the
recurrences that need no cell.
"""

from .affine import AffineMap
from .cell import Cell, cells, get_cell, register
from .cell_library import MGU, SLSTM, FastSlow, ParaGRU, ParaLSTM, Tanh
from .conv import causal_conv
from .errors import ArgumentError, CellError, NotConverged
from .problem import SolveInfo
from .scan import Scan, diagonal_scan, matrix_scan
from .solve import Trajectory, solve, step

__all__ = [
    "MGU",
    "SLSTM",
    "AffineMap",
    "ArgumentError",
    "Cell",
    "CellError",
    "FastSlow",
    "NotConverged",
    "ParaGRU",
    "ParaLSTM",
    "Scan",
    "SolveInfo",
    "Tanh",
    "Trajectory",
    "causal_conv",
    "cells",
    "diagonal_scan",
    "get_cell",
    "matrix_scan",
    "register",
    "solve",
    "step",
]
