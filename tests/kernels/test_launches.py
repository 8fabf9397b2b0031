"""Every launch compiles as a GPU would be asked to: with the arguments' values and alignment, on a machine without one.

Triton compiles a whole number that is one as a constant, and what works on a number need not work on a constant; only a
launch shows it. Here the launches of the public functions run in a process whose Triton believes in an H100: each is
compiled for what it is called with, must fit its shared memory, and is then left out.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FRAME = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class H100:
    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448}

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(H100())
compile_and_launch, compiled = JITFunction.run, set()


def run(self, *args, grid, warmup, **kwargs):
    made = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert made.metadata.shared <= 232448, (self._fn_name, made.metadata.shared)
    compiled.add(self._fn_name.split(".")[-1])


JITFunction.run = run
import paralm_kernels
from paralm_kernels import triton_chunkwise, triton_dense, triton_solver

for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("paralm_kernels") and hasattr(module, "check_device"):
        module.check_device = lambda device: None


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype).requires_grad_()


def back(*outputs):
    sum(y.float().nan_to_num().sum() for y in outputs).backward()


{body}
print(" ".join(sorted(compiled)))
"""

SOLVE = """
for method, tile, time in (("triton-walk", None, 33), ("triton-segments", 16, 33), ("triton-tile", 16, 16)):
    for batch, channels in ((1, 40), (2, 64)):
        cell = paralm_kernels.get_cell("tanh")
        x = [random(batch, time, channels) for _ in cell.inputs]
        a = [random(channels, dtype=torch.float32) for _ in cell.params]
        back(*paralm_kernels.solve(cell, x, a, method=method, tile=tile).states)
paralm_kernels.solve(cell, [random(1, 1, 40)], [a[0][:1].expand(40)], method="triton")
"""

DENSE = """
sizes = {"elman": (1, 1, 1), "gru": (1, 3, 2), "lstm": (2, LSTM_TIME, 1), "slstm": (1, 2, 1)}
for kind, (batch, time, heads) in sizes.items():
    cell = paralm_kernels.dense_cells.KINDS[kind]
    weight = random(len(cell.gates), heads, D_HEAD, D_HEAD)
    inputs = random(batch, time, len(cell.gates), heads, D_HEAD)
    y, end = paralm_kernels.dense_rnn(kind, inputs, weight, method="triton")
    back(y, *end)
"""

CHUNKWISE = """
for normalized in (False, True):
    for batch, time, heads in ((1, 1, 1), (1, 40, 2)):
        q, k, v = random(batch, time, 1, 16), random(batch, time, 1, 16), random(batch, time, heads, 16)
        gates = [random(batch, time, heads, dtype=torch.float32) for _ in range(2)]
        options = {"normalized": normalized, "chunk_size": 32, "method": "triton"}
        y, _ = paralm_kernels.chunkwise(q, k, v, -gates[0].abs(), gates[1], **options)
        back(y)
"""

CONV = """
for batch, time, taps in ((1, 1, 4), (2, 40, 4), (1, 33, 1)):
    x, weight = random(batch, time, 48), random(48, taps)
    reset = torch.zeros(batch, time, dtype=torch.bool) if time > 1 else None
    y, end = paralm_kernels.causal_conv(x, weight, None, None, reset, method="triton")
    back(y, end)
"""

NORM = """
for rows, channels, groups in ((1, 48, 1), (40, 64, 2)):
    x, gate, v = (random(rows, channels) for _ in range(3))
    weight, d = random(channels), random(channels // 16)
    back(paralm_kernels.gated_norm(x.float().detach().requires_grad_(), weight, 1e-5, method="triton"))
    for first in (False, True):
        options = {"groups": groups, "gate_first": first, "centred": not first, "method": "triton"}
        back(paralm_kernels.gated_norm(x, weight, 1e-5, gate, skip=(d, v) if first else None, **options))
    back(paralm_kernels.swiglu(random(rows, 2 * channels), method="triton"))
    angles = paralm_kernels.rotary_angles(torch.arange(rows)[None], 16, 1e4, torch.bfloat16)
    back(paralm_kernels.rotate(random(groups, rows, channels // 16, 16), *angles, method="triton"))
"""

CASES = {
    "solve": (SOLVE, {"walk_kernel", "segments_kernel", "segments_finish_kernel", "tile_kernel", "decode_kernel"}),
    "conv": (CONV, {"conv_kernel", "conv_backward_kernel"}),
    "norm": (NORM, {"norm_kernel", "norm_backward_kernel", "swiglu_kernel", "swiglu_backward_kernel", "rotate_kernel"}),
    "dense": (DENSE.replace("D_HEAD", "16").replace("LSTM_TIME", "1"), {"forward_kernel", "backward_kernel"}),
    "dense of large heads": (
        DENSE.replace("D_HEAD", "256").replace("LSTM_TIME", "2"),
        {"wide_forward_kernel", "wide_backward_kernel"},
    ),
    "chunkwise": (CHUNKWISE, {"states_kernel", "outputs_kernel", "grad_states_kernel", "grad_q_kernel"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_launch_compiles_for_what_it_is_called_with(name, tmp_path):
    body, kernels = CASES[name]
    script = tmp_path / "launches.py"
    script.write_text(FRAME.replace("{body}", body))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert kernels <= set(done.stdout.split())
