"""paralm_data."""
