"""paralm_kernels."""
