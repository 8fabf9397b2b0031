"""Weights of other implementations, loaded into ours and given back."""
