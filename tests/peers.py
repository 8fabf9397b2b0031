"""Others' implementations, each run in a process where no other one can be imported.

`make peers` (part of `make test`) lays each peer in a folder of its own, ``$VENV/peers/NAME``, without its dependencies
on torch. A script gets the tensors it is given, runs the peer, and gives tensors back:

    outputs = run_peer("xlstm", SCRIPT, {"x": x})        # SCRIPT reads the dict `given`, fills the dict `result`

``transformers`` takes over `mamba_ssm` or `xlstm` silently where it finds them: here it does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
from torch import Tensor

PEERS = Path(os.environ.get("PARALM_PEERS", Path(sys.prefix) / "peers"))
FOREIGN = ("mamba_ssm", "causal_conv1d", "xlstm", "mlstm_kernels", "flashrnn", "titans_pytorch", "transformers", "fla")
"""None of these may be importable in a peer's process but those that are meant."""

_FRAME = """
import importlib.util, sys
import safetensors.torch
for name in {absent!r}:
    if importlib.util.find_spec(name) is not None:
        sys.exit(f"{{name}} can be imported beside {peer}")
import torch
torch.set_num_threads(1)
given = safetensors.torch.load_file({inputs!r})
result = {{}}
exec(compile(open({script!r}, encoding="utf-8").read(), {peer!r} + " script", "exec"))
safetensors.torch.save_file({{k: v.detach().contiguous().clone() for k, v in result.items()}}, {outputs!r})
"""


def run_peer(
    peer: str, script: str, given: dict[str, Tensor], importable: tuple[str, ...] = (), timeout: float = 300
) -> dict[str, Tensor]:
    """Run ``script`` with ``peer`` importable (and the modules ``importable``, which are its own parts).

    ``given``, and what the script puts into ``result``: tensors by name. Without the peer the test skips, and fails
    under CI.
    """
    folder = PEERS / peer
    if not folder.is_dir():
        what = f"{peer} is not in {PEERS}; `make peers` lays it there"
        if os.environ.get("CI") == "true":
            pytest.fail(what)
        pytest.skip(what)
    meant = {peer.replace("-", "_"), *importable}
    with tempfile.TemporaryDirectory(prefix="paralm-peer-") as text:
        here = Path(text)
        inputs, outputs, body = here / "inputs.safetensors", here / "outputs.safetensors", here / "script.py"
        safetensors.torch.save_file({k: v.detach().contiguous().clone() for k, v in given.items()}, inputs)
        body.write_text(script, encoding="utf-8")
        absent = [name for name in FOREIGN if name not in meant]
        frame = _FRAME.format(absent=absent, peer=peer, inputs=str(inputs), script=str(body), outputs=str(outputs))
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", frame], env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{peer}: {done.stderr[-3000:] or done.stdout[-3000:]}"
        return safetensors.torch.load_file(outputs)
