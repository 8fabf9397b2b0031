"""Triton modules of the registered cells, written by `python -m paralm_kernels.generate`."""
