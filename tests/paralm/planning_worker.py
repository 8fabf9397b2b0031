"""One rank of test_planning_memory.py: what a process really holds at most over training steps, in bytes.

python -m tests.paralm.planning_worker CONFIG_JSON VOCABULARY STEPS → a line of JSON from each rank
(RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment)
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main(given: str, vocabulary: int, steps: int) -> None:
    import torch

    sys.path.insert(0, str(ROOT / "tools"))
    import synthetic
    from memory import held, restart_peak

    from paralm.config import Config

    torch.set_num_threads(1)
    config = Config.model_validate(json.loads(given))

    def offloaded(engine: Any) -> int:
        """Bytes that the optimizer holds, without what is on a GPU if there is one."""
        storages = {}

        def add(value: Any) -> None:
            if isinstance(value, dict | list | tuple):
                for one in value.values() if isinstance(value, dict) else value:
                    add(one)
            elif isinstance(value, torch.Tensor) and value.device.type == "cpu":
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
                if value.is_leaf and value.grad is not None:
                    add(value.grad)

        add({name: value for name, value in vars(engine.optimizer).items() if "gpu" not in name})
        add(dict(engine.optimizer.optimizer.state))
        for p in engine.module.parameters():
            storages.pop(p.untyped_storage().data_ptr(), None)
        return sum(storages.values())

    def train(config: Config, count: int) -> int:
        stepper = synthetic.stepper(config, vocabulary)
        training = config.training
        for step in range(count):
            batch = synthetic.batch(step, training.global_batch_size, training.seq_len, vocabulary)
            stepper.run(batch, step, 1e-3, lambda: 0, timed=False)
        host = offloaded(stepper.engine) if config.parallel.offload_optimizer != "none" else 0
        stepper.engine.destroy()
        return host

    # Everything that is loaded or made once, by a model of the same kind that is small.
    small = config.model_copy(update={"model": config.model.model_copy(update={"d_model": 32})})
    small = small.model_copy(update={"training": config.training.model_copy(update={"seq_len": 16})})
    train(small, 2)
    # Freed memory goes back at once, as a device's allocator would count it: arenas that keep it are not the plan's.
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: tensors are mapped by themselves
        libc.mallopt(-1, 1 << 16)  # M_TRIM_THRESHOLD
    before = restart_peak()
    host = train(config, steps)
    row = {"rank": torch.distributed.get_rank(), "bytes": held("VmHWM") - before, "host": host}
    sys.stdout.write(json.dumps(row) + "\n")  # at once: ranks may share a pipe
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
