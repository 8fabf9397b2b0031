"""paralm_launch."""
