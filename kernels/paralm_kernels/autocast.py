"""Autocast rounds the operands of matrix products to 16 bits; here everything is computed in the dtype that is said."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast on the device of a tensor."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
