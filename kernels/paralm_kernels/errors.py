"""The errors a user of the kernels can cause. Each is one line: what was given, what was expected, what to change."""


class CellError(ValueError):
    """A cell's definition cannot be used: a bad name, a step that mixes channels, branches on data, …"""


class ArgumentError(ValueError):
    """An argument of `solve`, `step` or `causal_conv` has the wrong shape, dtype, device or value."""


class NotConverged(RuntimeError):
    """Newton's method used up `max_iter` before its largest update fell below the tolerance."""
