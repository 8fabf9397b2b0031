"""'paralm submit ray' on a real Ray cluster of this machine: submit, follow, stop, resume, and a lost cluster."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from paralm_launch.cluster import records

from tests.conftest import settings
from tests.launch.launching import STEPS, losses

# A file named `hold` beside this one holds the steps after the third.
HELD = """
import time
from pathlib import Path
from paralm.training import control
from paralm.training.step import Stepper

run, enter = Stepper.run, control.Control.__enter__
current, count = [], [0]

def held(self, *args, **kwargs):
    count[0] += 1
    while count[0] > 3 and (Path(__file__).parent / "hold").exists() and current[-1].stop_signal is None:
        time.sleep(0.05)
    return run(self, *args, **kwargs)

def entered(self):
    current.append(self)
    count[0] = 0
    return enter(self)

Stepper.run, control.Control.__enter__ = held, entered
"""


class Head:
    """``ray start --head`` with its Jobs API at a port, on the loopback; below this process, and ended with it."""

    def __init__(self, home: Path, ports: tuple[int, int]) -> None:
        self.home, (self.port, self.dashboard) = home, ports
        self.folder = tempfile.mkdtemp(prefix="paralm-", dir="/tmp")  # short, for its sockets
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")},
            "HOME": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 stays what it is
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "temp-dir": self.folder,
            "node-ip-address": "127.0.0.1",
            "port": self.port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": self.dashboard,
            "num-cpus": 3,
            "include-dashboard": "true",
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "paralm_launch.launchers.guard", str(Path(sys.executable).parent / "ray")),
                *("start", "--head", "--block", "--disable-usage-stats"),
                *(f"--{key}={value}" for key, value in options.items()),
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=(self.home / "ray.out").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def below(self) -> list[psutil.Process]:
        assert self._process is not None
        return psutil.Process(self._process.pid).children(recursive=True)

    def kill(self) -> None:
        """As when its machine is lost."""
        if self._process is None or self._process.poll() is not None:
            return
        everything = [*self.below(), psutil.Process(self._process.pid)]
        for process in everything:
            try:
                process.kill()
            except psutil.Error:
                continue
        self._process.wait()
        psutil.wait_procs(everything, timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    made = Head(tmp_path_factory.mktemp("home"), (free_port(), free_port()))
    made.start()
    yield made
    made.kill()
    shutil.rmtree(made.folder, ignore_errors=True)


@pytest.mark.slow
def test_submit_follow_stop_resume_and_a_cluster_that_is_lost(
    head: Head, corpus: Path, prepared: Path, reference: list[float], tmp_path: Path
) -> None:
    made = settings(corpus, prepared, tmp_path, training={"max_steps": STEPS}, checkpoint={"every": 4})
    made["cluster"] = {"cpus_per_rank": 1, "ranks_per_node": 2, "ray": head.address}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    (tmp_path / "held.py").write_text(HELD)
    (tmp_path / "hold").touch()
    run = tmp_path / "tiny"

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "paralm_launch", *arguments],
            cwd=tmp_path,
            env=head.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def paralm(*arguments: str) -> str:
        said, _ = start(*arguments).communicate(timeout=300)
        return said

    def reached(step: int) -> Callable[[], bool]:
        return lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= step

    # -- submit and stop: --keep waits until the cluster is up, and shows what the job says
    first = start("submit", "ray", "run.yaml", "imports=[held.py]", "--keep")
    wait_for(reached(3), first)
    shown = paralm("status", "tiny", "--root", ".")
    assert "RUNNING" in shown
    assert f"of {STEPS}, loss" in shown
    twice = paralm("submit", "ray", "run.yaml")
    assert "is RUNNING; cancel it" in twice
    job = records.jobs_of(run)[-1]
    assert f"cancelled: {job.id}" in paralm("cancel", job.id, "--root", ".")
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 2
    assert "stopped by SIGTERM at step 4; saved" in said, "it is shown what the job says"
    assert f"error: job {job.id} was stopped; the same command continues" in said
    assert (run / "checkpoints" / "step_00000004").is_dir()
    assert job.events()[-1].endswith("end code=75")

    # -- resume; then the whole cluster is lost, and another comes up at its address
    second = start("submit", "ray", "run.yaml", "imports=[held.py]", "--keep")
    wait_for(reached(7), second)
    head.kill()
    (tmp_path / "hold").unlink()
    head.start()
    said, _ = second.communicate(timeout=400)
    assert second.returncode == 0, said
    assert "submitted again" in said
    assert f"training: {STEPS} steps" in said
    assert losses(run) == pytest.approx(reference, rel=1e-5)
    assert len(records.jobs_of(run)) >= 3
    assert "SUCCEEDED" in paralm("status", "tiny", "--root", ".").splitlines()[-1]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], patience: float = 300.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.send_signal(signal.SIGINT)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
