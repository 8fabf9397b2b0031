"""Weights of other implementations, loaded into ours and given back."""

from paralm.interop.transformers import load_transformers, save_transformers

__all__ = ["load_transformers", "save_transformers"]
