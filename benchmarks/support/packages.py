"""Peers' packages whose own first import needs what nobody compiled here."""

from __future__ import annotations

import importlib.util
import sys
import types


def without_init(name: str) -> None:
    """Makes the modules of a package importable without its __init__: mamba_ssm's imports Mamba1's compiled kernel and
    transformers, neither of which Mamba2 needs. Raises ModuleNotFoundError.
    """
    if name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found is None:
            raise ModuleNotFoundError(f"No module named '{name}'")
        package = types.ModuleType(name)
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules[name] = package
