"""paralm: train large recurrent language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from paralm.training.load import LoadedModel

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoadedModel:
    """The trained model of an export's folder, or of a run (``RUN`` or ``RUN@STEP``), verified and in eval mode.

    ``device``: default: a GPU if there is one. ``dtype``: of the weights; default: the run's precision. Raises
    UserError, one line, for what is missing, damaged or of another model.
    """
    from paralm.training.load import load_model  # here, because it imports torch

    return load_model(path, device=device, dtype=dtype)
