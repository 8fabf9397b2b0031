"""Ray Train: the same run through lost workers, a lost node and a lost driver, all of it on the loopback."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from paralm_launch.launchers.ray import start as start_ray
from paralm_launch.launchers.ray_room import Need, Shortage

from paralm.config import Config, LauncherConfig
from paralm.errors import StoppedError
from paralm.training.rendezvous import LostRanksError
from tests.conftest import ran_alone
from tests.launch.launching import Start, finish, losses, outside_the_loopback, wait_for_step


def ray_workers(roots: list[psutil.Process]) -> list[psutil.Process]:
    """The processes of Ray Train's workers below ``roots``."""
    found = []
    for root in roots:
        for below in root.children(recursive=True):
            try:
                name = below.cmdline()[:1]
            except psutil.Error:
                continue
            if name and name[0].startswith("ray::") and "RayTrainWorker" in name[0]:
                found.append(below)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray keeps a token in the home folder."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield folder


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Any]:
    """Two nodes of one machine, two CPUs each."""
    if ran_alone(__file__, "test_a_killed_driver_and_a_lost_node_leave_the_run_as_it_is"):
        yield None
        return
    from ray.cluster_utils import Cluster

    before = {process.pid for process in psutil.Process().children(recursive=True)}
    node = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    made.second = made.add_node(num_cpus=2, node_ip_address="127.0.0.1")
    made.roots = [process for process in psutil.Process().children() if process.pid not in before]
    yield made
    made.shutdown()
    for process in made.roots:
        if process.is_running():
            process.kill()


@pytest.mark.slow
def test_a_killed_driver_and_a_lost_node_leave_the_run_as_it_is(
    cluster: Any, start: Start, reference: list[float], tmp_path: Path
) -> None:
    if cluster is None:
        return  # it ran, in a process of its own
    run = tmp_path / "tiny"
    overrides = ("launcher.kind=ray", f"launcher.address={cluster.address}", "launcher.ranks=2")
    first = start(*overrides, "launcher.placement=STRICT_SPREAD")
    wait_for_step(first, run, 2)
    workers = ray_workers(cluster.roots)
    assert len(workers) == 2
    first.kill()
    first.wait()
    _, left = psutil.wait_procs(workers, timeout=60)
    assert left == [], "Ray ends the workers of a driver that is gone"
    second = start(*overrides, "launcher.placement=SPREAD")
    begun = time.monotonic()
    while not ray_workers(cluster.roots) and time.monotonic() - begun < 100:
        time.sleep(0.1)
    seen = len(losses(run))
    wait_for_step(second, run, min(seen + 1, 36))
    cluster.remove_node(cluster.second, allow_graceful=False)
    output = finish(second)
    assert "start 1 of at most 3, from the newest checkpoint" in output
    assert losses(run) == pytest.approx(reference, rel=1e-5)
    assert all(process.is_running() for process in cluster.roots[:1]), "a cluster that was there stays"


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_a_cluster_of_its_own_goes(
    home: Path, start: Start, reference: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    process = start("launcher.kind=ray", "launcher.ranks=1", "run.root=.", prefix=("env", "-C", str(tmp_path)))
    wait_for_step(process, run, 3)
    driver = psutil.Process(process.pid)
    os.kill(ray_workers([driver])[0].pid, 9)
    everything = driver.children(recursive=True)
    assert not outside_the_loopback([driver, *everything])
    output = finish(process)
    assert "start 1 of at most 3, from the newest checkpoint" in output
    assert "Traceback" not in output
    assert losses(run) == pytest.approx(reference, rel=1e-5)
    _, left = psutil.wait_procs(everything, timeout=30)
    assert left == []
    assert not (run / "launches").exists()


@pytest.mark.slow
def test_a_cluster_without_what_the_ranks_need_is_left_after_a_while(home: Path, start: Start, tmp_path: Path) -> None:
    more = ("launcher.gpus_per_rank=1", "launcher.nodes_timeout=6", "run.root=.")
    process = start("launcher.kind=ray", "launcher.ranks=1", *more, prefix=("env", "-C", str(tmp_path)))
    output = finish(process, 4)
    lacks = "Ray: the nodes there are have room for 0 of 1 ranks of 1 CPU and 1 GPU"
    assert f"{lacks}; waiting 6 s for nodes (launcher.nodes_timeout)" in output
    assert f"error: {lacks}, for 6 s (launcher.nodes_timeout); add nodes, or set launcher.ranks" in output
    assert "Traceback" not in output
    assert not (tmp_path / "tiny" / "launches").exists()


def test_workers_get_what_was_exported_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by 'cluster.setup'. Ray writes the environments of workers into its logs, so secrets go another way."""
    given = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth1", "HF_HOME": "/hf", "OMP_NUM_THREADS": "3"}
    secret = {"HF_TOKEN": "hf_1", "PARALM_API_KEY": "k2"}
    for name, value in {**given, **secret, "CUDA_VISIBLE_DEVICES": "1", "RANK": "0", "SSH_TTY": "t"}.items():
        monkeypatch.setenv(name, value)
    asked: dict[str, Any] = {}
    fake = SimpleNamespace(is_initialized=lambda: False, init=lambda **more: asked.update(more))
    start_ray(fake, Config(), 2)
    seen = asked["runtime_env"]["env_vars"]
    assert given.items() <= seen.items()
    assert not {*secret, "CUDA_VISIBLE_DEVICES", "RANK", "SSH_TTY"} & seen.keys()
    assert not any(value in repr(asked) for value in secret.values())
    for name in secret:
        monkeypatch.setenv(name, "")
    asked["runtime_env"]["worker_process_setup_hook"]()
    assert secret.items() <= os.environ.items()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": {"HF_HOME": "/hf"}}}))
    start_ray(fake, Config(), 2)
    assert given.keys() - asked["runtime_env"]["env_vars"].keys() == {"HF_HOME"}, "of 'ray job submit --runtime-env'"
    start_ray(fake, Config.model_validate({"launcher": {"address": "ray://head:10001"}}), 2)
    assert "worker_process_setup_hook" not in asked["runtime_env"], "which Ray's client refuses"


def nodes(*cpus: float, dead: int = 0) -> list[dict[str, Any]]:
    """As of ``ray.nodes()``."""
    return [{"Alive": index >= dead, "Resources": {"CPU": count, "memory": 1.0}} for index, count in enumerate(cpus)]


@pytest.mark.parametrize(
    ("there", "placement", "room"),
    [
        (nodes(4, 4), "PACK", 4),
        (nodes(4, 4, dead=1), "SPREAD", 2),
        (nodes(3, 5), "PACK", 3),
        (nodes(3, 5), "STRICT_PACK", 2),
        (nodes(3, 5, 1), "STRICT_SPREAD", 2),
        ([{"Alive": True, "Resources": {}}], "PACK", 0),
        ([], "STRICT_PACK", 0),
    ],
)
def test_room_is_counted_by_node(there: list[dict[str, Any]], placement: str, room: int) -> None:
    assert Need(3, {"CPU": 2.0}, placement).room(there) == room
    assert Need(3, {"CPU": 0.0}, "PACK").room(there) == 3 * sum(node["Alive"] for node in there)


def test_nodes_that_come_back_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved meanwhile decides whether another start can go on."""
    now, there, steps = [0.0], [nodes(2, 2)], [7]
    said: list[str] = []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    settings = LauncherConfig(nodes_timeout=60)
    made = Shortage(Need(4, {"CPU": 1.0}, "PACK"), lambda: there[0], settings, said.append, lambda: steps[0])

    def until(seconds: float) -> None:
        while now[0] < seconds:
            now[0] += 0.2
            made.look()

    until(1000)
    assert not said
    there[0] = nodes(2, 2, dead=1)
    until(1050)
    there[0] = nodes(2, 2)
    until(1100)
    assert said == [
        "Ray: the nodes there are have room for 2 of 4 ranks of 1 CPU; waiting 60 s for nodes (launcher.nodes_timeout)",
        "Ray: the cluster has room for 4 ranks of 1 CPU again",
    ]
    there[0] = nodes(2, 2, dead=1)
    with pytest.raises(LostRanksError, match="add nodes"):
        until(1200)
    assert 1160 < now[0] < 1170
    steps[0] = 8
    with pytest.raises(StoppedError, match=r"room for 2 of 4 .* for 60 s .* the same command continues"):
        until(1200)
