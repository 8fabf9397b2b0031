"""``launcher.kind: ray``: ranks on the workers of Ray Train, on a cluster that is there or on one for this run.

Ray places the workers and starts them again when one is lost. The process group is ours, as everywhere. What a
run is stays in the run folder: nothing is given to Ray's checkpoint storage, so a new start, of the workers or of
the driver, continues from the newest checkpoint like any other.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralm.config import Config
from paralm.errors import RunError
from paralm_launch.launchers import register_launcher
from paralm_launch.launchers.parent import Launch, number_of_ranks, worker_environment

if TYPE_CHECKING:
    from paralm.training.loop import TrainResult
    from paralm_launch.launchers.ray_room import Need

_PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "DS_ACCELERATOR")
_PASSED_ON_BY_PREFIX = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "HF_", "PARALM_")
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSW")  # in a variable's name


def import_ray(config: Config) -> Any:
    """Ray, told through the environment what it only takes from there."""
    address = config.launcher.address
    os.environ["RAY_USAGE_STATS_ENABLED"] = "1" if config.launcher.usage_stats else "0"
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # a busy machine takes more than Ray's 30 s
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do anyway, without its warning
    if address is None or address.startswith(("127.", "localhost")):
        # Ray would turn 127.0.0.1 into the machine's outer address, and listen at all of them.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise RunError(f"launcher.kind: ray needs Ray ({error}); install paralm[ray]") from None
    return ray


def _train_worker(task: dict[str, str]) -> None:
    """What a Ray worker runs: one rank."""
    try:
        os.chdir(task["folder"])  # paths of the configuration are relative to where the launcher runs
    except OSError as error:
        raise RunError(f"{task['folder']}: not on this node ({error.strerror}); it must be shared") from None
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from paralm_launch.discovery import settle
    from paralm_launch.launchers.worker import run_rank

    settle()
    if run_rank(Path(task["exchange"])):
        from paralm.training.rendezvous import leave

        leave()
    else:
        raise RuntimeError("this rank ended, and says why in the run folder")  # which is what starts it again


def _passed_on() -> tuple[dict[str, str], dict[str, str]]:
    """What Ray's workers get of this environment: variables that Ray may write into its logs, and secrets. Those that
    a Ray job was submitted with reach them anyhow, and Ray refuses to be given them again.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    found = {
        key: value
        for key, value in worker_environment().items()
        if (key in _PASSED_ON or key.startswith(_PASSED_ON_BY_PREFIX)) and key not in job.get("env_vars", {})
    }
    secrets = {key: value for key, value in found.items() if _SECRET.search(key)}
    return {key: value for key, value in found.items() if key not in secrets}, secrets


def start(ray: Any, config: Config, ranks: int) -> bool:
    """Connect to ``launcher.address``, or start a cluster on this machine; returns whether it is ours to end."""
    settings = config.launcher
    if ray.is_initialized():
        return False
    environment, secrets = _passed_on()
    given: dict[str, Any] = {"env_vars": environment}
    if secrets and not (settings.address or "").startswith("ray://"):  # Ray's client can pass on no function
        given["worker_process_setup_hook"] = lambda: os.environ.update(secrets)
    common = {"log_to_driver": False, "configure_logging": False, "runtime_env": given}
    if settings.address is not None:
        try:
            ray.init(address=settings.address, **common)
        except (ConnectionError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise RunError(f"launcher.address: no Ray cluster at {settings.address}: {first}") from None
        return True
    # Where all is on this machine, gloo and Ray stay on its loopback.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cpus = max(os.cpu_count() or 1, math.ceil(ranks * settings.cpus_per_rank) + 1)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=settings.dashboard,
        _node_ip_address="127.0.0.1",
        **common,
    )
    return True


def _need(ray: Any, config: Config, ranks: int) -> Need:
    from paralm_launch.launchers.ray_room import Need

    settings = config.launcher
    gpus = settings.gpus_per_rank
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    resources = {"CPU": settings.cpus_per_rank, **({"GPU": gpus} if gpus else {})}
    return Need(ranks, resources, settings.placement)


def _trainer(config: Config, launch: Launch, need: Need) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class NoGroup(Backend):
        """Workers without a process group of Ray's making."""

        share_cuda_visible_devices = True  # every rank sees the node's GPUs, and takes its own by LOCAL_RANK

    class NoGroupConfig(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return NoGroup

    settings = config.launcher
    storage = settings.storage or launch.exchange.path / "ray"
    failures: dict[str, Any] = {
        "max_failures": settings.max_failures,
        "max_preemption_failures": settings.max_preemptions,
    }
    return TorchTrainer(
        _train_worker,
        train_loop_config={"folder": os.getcwd(), "exchange": str(launch.exchange.path)},
        torch_config=NoGroupConfig(),
        scaling_config=ScalingConfig(
            num_workers=need.ranks,
            use_gpu="GPU" in need.resources,
            resources_per_worker=dict(need.resources),
            placement_strategy=need.placement,
        ),
        run_config=RunConfig(
            name=launch.exchange.path.name,
            storage_path=str(Path(storage).absolute()),
            failure_config=FailureConfig(**failures),
        ),
    )


@register_launcher("ray")
def ray(config: Config, on_progress: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> TrainResult:
    """Train on ``launcher.ranks`` workers of Ray Train."""
    module = import_ray(config)
    from paralm.training import checkpoint
    from paralm_launch.launchers.ray_room import Shortage

    ranks = number_of_ranks(config)
    ours = False

    def end() -> None:
        if ours:
            module.shutdown()

    with Launch(config, on_progress, say, end) as launch:
        ours = start(module, config, ranks)
        launch.take_signals()  # Ray took SIGTERM
        need = _need(module, config, ranks)

        def saved() -> int:
            return max(checkpoint.steps(config.run_dir / "checkpoints"), default=0)

        shortage = Shortage(need, module.nodes, config.launcher, launch.say, saved)
        problem: list[BaseException] = []

        def fit() -> None:
            try:
                _trainer(config, launch, need).fit()
            except BaseException as error:
                problem.append(error)

        # In a thread, because there Ray leaves SIGINT alone; a daemon, because it may never end.
        thread = threading.Thread(target=fit, name="paralm-ray", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if not launch.stopping and not launch.exchange.outcomes():
                shortage.look()
        reason = "Ray ended the training"
        if problem:
            error = problem[0]
            if not launch.exchange.outcomes() and not launch.exchange.failures() and not _lost(error):
                raise error
            reason = f"Ray: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
        sys.stdout.flush()
        return launch.result(reason)


def _lost(error: BaseException) -> bool:
    """Whether Ray says that workers or nodes went."""
    return type(error).__module__.startswith("ray.")
