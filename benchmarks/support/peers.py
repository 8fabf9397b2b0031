"""The named peers of the recurrence benchmark, each built on first use so that a missing one is a row with its error.

A peer is make(shape, dtype, device) → (call, tensors to differentiate); a call returns its output. Layers of peers have
their input projection inside, so they are compared with ours plus a Linear; scans are compared with ours alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .packages import without_init

Shape = tuple[int, int, int]
Built = tuple[Callable[[], Tensor], list[Tensor]]


def projected(x: Tensor, layer: torch.nn.Module, run: Callable[[Tensor], Any]) -> Built:
    """A call of a layer on x; gradients to x and to all parameters that need one."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def call() -> Tensor:
        y = run(x)
        result: Tensor = y[0] if isinstance(y, tuple) else y
        return result

    return call, wanted


def _input(shape: Shape, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)


def pararnn_torch(cell: str, shape: Shape, dtype: torch.dtype, device: str) -> Built:
    """pararnn-torch's fused Newton kernels (three iterations), its projection included."""
    pararnn = importlib.import_module("pararnn")
    channels = shape[2]
    made = getattr(pararnn, cell)(channels, channels)
    layer = pararnn.ParaRNN(made, config=pararnn.NewtonConfig(scan_backend="fused"))
    layer = layer.to(device=device, dtype=dtype).train()
    return projected(_input(shape, dtype, device), layer, layer)


def dense(kind: str, shape: Shape, dtype: torch.dtype, device: str) -> Built:
    """torch.nn.GRU or LSTM of the same width: cuDNN on a GPU; a dense recurrence."""
    layer = getattr(torch.nn, kind)(shape[2], shape[2], batch_first=True, device=device, dtype=dtype)
    return projected(_input(shape, dtype, device), layer, layer)


def accelerated_scan(module: str, shape: Shape, dtype: torch.dtype, device: str) -> Built:
    """accelerated-scan's linear scan of the same size, in its own layout (batch, channel, time)."""
    scan = importlib.import_module(f"accelerated_scan.{module}").scan
    batch, time, channel = shape
    gate = torch.rand((batch, channel, time), dtype=dtype, device=device).mul_(0.5).requires_grad_()
    token = torch.randn((batch, channel, time), dtype=dtype, device=device, requires_grad=True)
    return lambda: scan(gate, token), [gate, token]


def our_scan(shape: Shape, dtype: torch.dtype, device: str) -> Built:
    """paralm_kernels.diagonal_scan of the same size."""
    from paralm_kernels import diagonal_scan

    a = torch.rand(shape, dtype=dtype, device=device).mul_(0.5).requires_grad_()
    b = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    return lambda: diagonal_scan(a, b).states, [a, b]


def mamba2(shape: Shape, dtype: torch.dtype, device: str) -> Built:
    """mamba_ssm's chunked scan at equal d_model: d_inner 2·d_model in heads of 64, d_state 128, one group."""
    without_init("mamba_ssm")
    module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    batch, time, d_model = shape
    heads, width, d_state = max(1, 2 * d_model // 64), 64, 128

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, requires_grad=True)

    x, b, c = random(batch, time, heads, width), random(batch, time, 1, d_state), random(batch, time, 1, d_state)
    dt = (0.1 * torch.rand((batch, time, heads), dtype=dtype, device=device)).requires_grad_()
    decay = (-1 - 15 * torch.rand(heads, device=device)).requires_grad_()
    return lambda: module.mamba_chunk_scan_combined(x, dt, decay, b, c, chunk_size=256), [x, dt, decay, b, c]


PEERS: dict[str, Callable[[Shape, torch.dtype, str], Built]] = {
    "pararnn-torch ParaGRU, fused, with projection": lambda *a: pararnn_torch("ParaGRU", *a),
    "pararnn-torch ParaLSTM, fused, with projection": lambda *a: pararnn_torch("ParaLSTM", *a),
    "torch.nn.GRU (cuDNN), dense, with projection": lambda *a: dense("GRU", *a),
    "torch.nn.LSTM (cuDNN), dense, with projection": lambda *a: dense("LSTM", *a),
    "accelerated-scan, warp": lambda *a: accelerated_scan("warp", *a),
    "accelerated-scan, scalar": lambda *a: accelerated_scan("scalar", *a),
    "paralm diagonal_scan": our_scan,
    "mamba_ssm Mamba2 scan": mamba2,
}
LINEAR_SCANS = [name for name in PEERS if name.startswith(("accelerated-scan", "paralm diagonal_scan"))]
