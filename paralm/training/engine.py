"""The one engine: DeepSpeed, at world size 1 as at 256, and the configuration generated for it.

DeepSpeed is imported here, inside functions, because importing it settles the accelerator for the process.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from paralm.config import Config
from paralm.errors import ConfigError
from paralm.models import build_model, construct_model
from paralm.training.optimizers import Partitioned, build_optimizer
from paralm.training.rendezvous import device
from paralm.training.replicated import Replicated

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
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.mics_shard_size",  # checkpoints assume that a parameter is cut over all ranks
    "zero_optimization.zero_hpz_partition_size",
    "managed_gradient_accumulation",
)


def grad_accum_steps(config: Config, world_size: int) -> int:
    """Micro-batches a step: what the rank with the most rows of the global batch needs."""
    rows = -(-config.training.global_batch_size // max(1, world_size // config.parallel.time))
    return -(-rows // config.training.micro_batch_size)


def deepspeed_config(config: Config, world_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration, generated from ours, with ``parallel.deepspeed`` laid over it.

    ``parameters``: element count of the model; buckets need never be larger (DeepSpeed allocates them whole).
    """
    parallel = config.parallel
    steps = grad_accum_steps(config, world_size)
    micro = config.training.micro_batch_size
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro * steps * world_size,
        # At stage 0 our own optimizer clips, and keeps the fp32 masters of bf16 weights (paralm.training.replicated).
        "gradient_clipping": config.optimizer.clip_grad_norm if parallel.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": parallel.zero_stage},
        "bf16": {
            "enabled": config.training.precision == "bf16" and parallel.zero_stage > 0,
            "check_grad_overflow": True,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        # Sums over ranks too: in bf16 their rounding grows with the number of ranks.
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if parallel.zero_stage:
        generated["zero_optimization"] |= _zero_options(config, parameters)
    _overlay(generated, parallel.deepspeed, "")
    return generated


def _zero_options(config: Config, parameters: int) -> dict[str, Any]:
    parallel = config.parallel
    bucket = min(parallel.bucket_size, max(2**20, 2 * parameters))
    options: dict[str, Any] = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        # The reduction runs on its own stream; on a CPU there is none to overlap with.
        "overlap_comm": torch.cuda.is_available() if parallel.overlap_comm is None else parallel.overlap_comm,
    }
    if parallel.zero_stage == 3:
        options |= {
            "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
            # Its replacement of F.linear outlives the model and the run (a global patch).
            "memory_efficient_linear": False,
        }
    for key, where in (
        ("offload_optimizer", parallel.offload_optimizer),
        ("offload_param", parallel.offload_parameters),
    ):
        if where == "none":
            continue
        options[key] = {"device": where, "pin_memory": torch.cuda.is_available()}
        if where == "nvme":
            options[key]["nvme_path"] = str(parallel.nvme_path)
    return options


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


def _deepspeed() -> Any:
    """DeepSpeed, imported so that it is quiet and compiles nothing that training does not call."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, in a lone process too
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # skipped steps and the optimizer's name are ours to report
    if device().type == "cpu":
        # DeepSpeed would compile a shared-memory op for CPU ranks here, which training never calls; a process
        # killed meanwhile leaves a lock file that hangs every later run (measured, 0.19.8).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It takes over the group there is; without this zero.Init believes that it is alone.
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def build_engine(config: Config, vocab_size: int, world_size: int) -> tuple[Any, Partitioned]:
    """A DeepSpeed engine (which has no types) around the configured model, and the optimizer inside it.

    The weights are zero: fill them through :class:`~paralm.training.fragments.EngineFragments`. At stage 3 each module
    is cut as soon as it is constructed, so the model never exists whole on a rank. The process group must exist.
    """
    deepspeed = _deepspeed()
    blueprint = build_model(config.model, vocab_size, seed=0, device="meta")
    generated = deepspeed_config(config, world_size, sum(p.numel() for p in blueprint.parameters()))
    if config.parallel.time > 1 and not all(mixer.joins_shards for mixer in blueprint.mixers):
        reduce_after_backward(generated, sum(p.numel() for p in blueprint.parameters()))
    _check_nvme(config)
    stage = config.parallel.zero_stage
    bf16 = config.training.precision == "bf16"
    again = config.training.activation_checkpointing
    if again == "auto":
        from paralm.planning.checkpointing import settle_here  # it asks this module what DeepSpeed is told

        again = settle_here(config, blueprint, vocab_size, world_size, device())
    with _refusals(config), contextlib.redirect_stdout(io.StringIO()):  # it prints the machine's memory six times
        if stage == 3:
            # Without its dtype argument, which on a CPU means bf16 whatever it says (0.19.8).
            with deepspeed.zero.Init(config_dict_or_path=generated):
                model = construct_model(config.model, vocab_size)
        else:
            model = blueprint.to_empty(device=device())
            for parameter in model.parameters():
                parameter.detach().zero_()
            if bf16 and stage:
                model.to(torch.bfloat16)
        model.set_activation_checkpointing(again)
        if config.training.compile:
            for block in model.layers:
                block.compile_feed_forward()
        offloaded = config.parallel.offload_optimizer != "none"
        optimizer = build_optimizer(model.parameter_groups(), config.optimizer, config.run.seed, offloaded)
        outer = Replicated(optimizer, config.optimizer.clip_grad_norm) if stage == 0 else optimizer
        engine, *_ = deepspeed.initialize(model=model, optimizer=outer, config=generated, dist_init_required=False)
        if isinstance(outer, Replicated) and bf16:
            outer.to_bf16()
    return engine, optimizer


def reduce_after_backward(generated: dict[str, Any], parameters: int) -> None:
    """Ranks that take turns within a backward pass must not wait for each other in it: one bucket, reduced after it."""
    generated["zero_optimization"]["reduce_bucket_size"] = 1 + parameters


@contextlib.contextmanager
def _refusals(config: Config) -> Iterator[None]:
    """What DeepSpeed does not like of the raw keys a user gave, as one line."""
    try:
        yield
    except (ValueError, AssertionError, TypeError) as error:
        if not config.parallel.deepspeed:
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"parallel.deepspeed: DeepSpeed refuses the configuration: {first}") from None


def _check_nvme(config: Config) -> None:
    parallel = config.parallel
    if "nvme" not in (parallel.offload_optimizer, parallel.offload_parameters):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "parallel.offload_…: nvme needs DeepSpeed's async_io, which needs libaio (Debian: apt install libaio-dev)"
        )
    assert parallel.nvme_path is not None
    if not parallel.nvme_path.is_dir():
        raise ConfigError(f"parallel.nvme_path: {parallel.nvme_path} is no folder on this node")
