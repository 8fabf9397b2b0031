"""The random number generators of one rank, as tensors that go into its part of a checkpoint; and float32 as it is."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def whole_float32() -> None:
    """Take products of float32 as they are. Where the environment has torch round their factors to TF32, as NVIDIA's
    containers do (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), ``training.precision`` would not say what is computed, and MFU
    would be of another peak."""
    torch.set_float32_matmul_precision("highest")


def derive(seed: int, *purpose: int | str) -> int:
    """A seed below 2⁶³ from (seed, purpose …): unrelated uses never share a stream."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def seed_all(seed: int, *purpose: int | str) -> None:
    """Seed every generator of this rank from :func:`derive`."""
    value = derive(seed, *purpose)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002  (third-party code may use the global generator)
    torch.manual_seed(value)


def capture() -> dict[str, torch.Tensor]:
    """State of Python's, numpy's and torch's generators. Values are uint8/int64 tensors on the CPU."""
    version, words, gauss = random.getstate()
    keys = np.random.get_state(legacy=False)  # noqa: NPY002
    state = keys["state"]
    tensors = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*state["key"].tolist(), state["pos"], keys["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([keys["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore(tensors: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`capture` returned."""
    version, *words = tensors["python"].tolist()
    gauss = tensors["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *key, pos, has_gauss = tensors["numpy"].tolist()
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, dtype=np.uint32), "pos": pos},
            "has_gauss": has_gauss,
            "gauss": tensors["numpy_gauss"].item(),
        }
    )
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
