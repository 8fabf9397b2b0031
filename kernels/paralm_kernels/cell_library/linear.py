"""Linear recurrences as cells, h = A h_ + b with A an input: what the public scans run as fused kernels.

Not registered: a linear recurrence is no mixer of its own, and these have no parameters.
"""

from functools import cache

from ..cell import Cell, Tensors


class DiagonalScan(Cell):
    """h = a h_ + b"""

    name = "diagonal_scan"
    state = ("h",)
    inputs = ("a", "b")

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        a, b = inputs
        return (a * state[0] + b,)


class _MatrixScan(Cell):
    """h_i = Σ_j a_ij h_j + b_i; the inputs are A row by row, then b."""

    def step(self, state: Tensors, inputs: Tensors, params: Tensors) -> Tensors:
        size = len(state)
        result = []
        for i, total in enumerate(inputs[size * size :]):
            for j, h in enumerate(state):
                total = total + inputs[i * size + j] * h
            result.append(total)
        return tuple(result)


@cache
def matrix_scan_cell(size: int) -> Cell:
    """The cell of size×size linear recurrences."""
    numbers = range(size)
    kind = type(
        f"MatrixScan{size}",
        (_MatrixScan,),
        {
            "name": f"matrix_scan_{size}x{size}",
            "state": tuple(f"h{i}" for i in numbers),
            "inputs": (*(f"a{i}{j}" for i in numbers for j in numbers), *(f"b{i}" for i in numbers)),
            "__doc__": f"h = A h_ + b with A of {size}×{size}.",
            "__module__": __name__,
        },
    )
    cell: Cell = kind()
    return cell
