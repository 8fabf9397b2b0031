"""The plain loop over time: h_t = step(h_{t−1}, x_t), one step after the other, without autograd.

Exact by construction, and on a CPU with many channels also the fastest: a step costs a handful of operations on
(batch, channel), all into buffers that stay in the cache. The gradient is adjoint.py's.
"""

from __future__ import annotations

from .cell import Tensors
from .problem import Problem, SolveInfo

_CONVERT = 256
"""Steps whose inputs are converted at once where the compute dtype is not theirs."""


def solve_sequential(problem: Problem) -> tuple[Tensors, SolveInfo]:
    """The states (batch, time, channel) in the compute dtype."""
    batch, time, channel = problem.shape
    states = tuple(problem.empty(batch, time, channel) for _ in problem.state)
    walk = problem.code.walk
    scratch = walk.scratch((batch, channel), problem.dtype, problem.device)
    entry = problem.state
    length = time if problem.inputs[0].dtype == problem.dtype else _CONVERT
    for start in range(0, time, length):
        stop = min(start + length, time)
        inputs = [x.unbind(1) for x in problem.inputs_at(start, stop)]
        outputs = [h[:, start:stop].unbind(1) for h in states]
        walk(*entry, *inputs, *problem.params, *outputs, problem.cuts(start, stop), *scratch)
        entry = tuple(steps[-1] for steps in outputs)
    return states, problem.info(0, 0.0, "sequential")
