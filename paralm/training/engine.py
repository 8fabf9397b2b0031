"""The one engine: DeepSpeed, at world size 1 as at 256, and the configuration generated for it.

ZeRO-1 is the least stage offered: at stage 0 DeepSpeed reports a gradient norm of 0 in fp32 and lets a NaN
step into the weights (measured, 0.19.8). DeepSpeed is imported here, inside functions, because importing it
settles the accelerator for the process.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paralm.config import Config
from paralm.errors import ConfigError, RunError

# Keys of DeepSpeed's configuration that paralm owns: overriding them would break accounting or exactness.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "zero_optimization.stage",
    "zero_optimization.compute_grad_norm",  # without it nothing notices a NaN
    "managed_gradient_accumulation",
)


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank_and_world() -> tuple[int, int]:
    """From the environment a launcher set (torchrun's names); a lone process is rank 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start_distributed(timeout: float) -> None:
    """Join the process group, once in a process's life; it is left again when the process exits.

    DeepSpeed caches groups, so a second group in one process would be used through stale handles.
    """
    where = device()
    if where.type == "cuda":
        if where.index >= torch.cuda.device_count():
            raise RunError(f"LOCAL_RANK is {where.index}, but this node has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(where)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if dist.is_initialized():
        return
    rank, world = rank_and_world()
    backend = "nccl" if where.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    if world == 1:
        # A store in memory: a lone process opens no port, so any number of them can share a machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    else:
        if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            dist.init_process_group(backend, rank=rank, world_size=world, timeout=limit)
        except (ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise RunError(
                f"rank {rank} of {world} cannot join the others: {first}; "
                "check RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            ) from None
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def grad_accum_steps(config: Config, world_size: int) -> int:
    """Micro-batches a step: what the rank with the most rows of the global batch needs."""
    rows = -(-config.training.global_batch_size // world_size)
    return -(-rows // config.training.micro_batch_size)


def deepspeed_config(config: Config, world_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration, generated from ours, with ``parallel.deepspeed`` laid over it.

    ``parameters``: element count of the model; buckets need never be larger (DeepSpeed allocates them whole).
    """
    steps = grad_accum_steps(config, world_size)
    micro = config.training.micro_batch_size
    bucket = int(min(5e8, max(2**20, 2 * parameters)))
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro * steps * world_size,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": True,
            # The reduction runs on its own stream; on a CPU there is none to overlap with.
            "overlap_comm": torch.cuda.is_available(),
        },
        "bf16": {"enabled": config.training.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    _overlay(generated, config.parallel.deepspeed, "")
    return generated


def _overlay(base: dict[str, Any], extra: dict[str, Any], prefix: str) -> None:
    for key, value in extra.items():
        path = f"{prefix}{key}"
        if path in _OWNED:
            raise ConfigError(
                f"parallel.deepspeed.{path}: set by paralm; use its own key instead (training, optimizer)"
            )
        if isinstance(base.get(key), dict):
            if not isinstance(value, dict):
                raise ConfigError(f"parallel.deepspeed.{path}: a section with keys is expected, got {value!r}")
            _overlay(base[key], value, f"{path}.")
        else:
            base[key] = value


def build_engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config, world_size: int
) -> Any:  # deepspeed.DeepSpeedEngine, which has no types
    """A DeepSpeed engine around the model. The process group must exist."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, in a lone process too
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # skipped steps and the optimizer's name are ours to report
    if device().type == "cpu":
        # DeepSpeed would compile a shared-memory op for CPU ranks here, which training never calls; a process
        # killed meanwhile leaves a lock file that hangs every later run (measured, 0.19.8).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    count = sum(p.numel() for p in model.parameters())
    # DeepSpeed's BF16_Optimizer prints the machine's memory six times; nothing else is printed here.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(config, world_size, count),
                dist_init_required=False,
            )
        except (ValueError, AssertionError, TypeError) as error:
            if not config.parallel.deepspeed:
                raise
            first = str(error).splitlines()[0]
            raise ConfigError(f"parallel.deepspeed: DeepSpeed refuses the configuration: {first}") from None
    return engine
