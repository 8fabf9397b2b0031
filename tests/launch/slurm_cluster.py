"""A real SLURM of two nodes for the tests, in namespaces of its own: no port, process or mount of it is the machine's.

    with SlurmCluster(folder) as cluster:
        cluster.run("sbatch", "job.sh")

The controller and both node daemons run below one keeper, the first process of a PID namespace: with it everything
ends, whatever a job left behind. The network namespace has a loopback, and a link from itself to itself on which node1
is 10.77.0.11 and node2 10.77.0.12: Open MPI's daemons take no loopback for a network between nodes. Commands of the
tests enter it through ``nsenter``. Partition ``main`` is the default; jobs in ``urgent`` preempt its jobs, which get 30
seconds and are queued again.

It needs root, Linux namespaces, and Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = {"node1": "10.77.0.11", "node2": "10.77.0.12"}  # not of 127.0.0.0/8, which no resolver counts as a network
_LINK = ("fabric", "fabric-end")
PACKAGES = "slurmctld slurmd slurm-client munge"
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel", "srun", "unshare", "nsenter")
_DAEMONS = ("slurm", "munged")  # how the names of its own processes begin
_NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--uts")
_GUARD = (sys.executable, "-m", "paralm_launch.launchers.guard")  # it ends when the tests do, however they end
_SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

_CONF = """\
ClusterName=test
FirstJobId={first_job}
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: how long a job that was queued again waits before it may start
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
KillWait=20
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=2 PreemptMode=off
"""
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
_NODE = "NodeName={0} NodeHostname={0} NodeAddr={1} Port={2} CPUs=4 RealMemory=8000 State=UNKNOWN"


def missing() -> str | None:
    """Why this machine cannot run it, in one line; None where it can."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_SEARCH) is None]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install -y --no-install-recommends {PACKAGES}"
    if os.geteuid() != 0:
        return "a SLURM in namespaces of its own needs root"
    network = [*_NAMESPACES, sys.executable, __file__]
    tried = subprocess.run(network, check=False, capture_output=True, text=True)
    if tried.returncode:
        return f"no namespaces here, or no network in them: {(tried.stderr.splitlines() or ['?'])[-1]}"
    return None


class SlurmCluster:
    """A context manager. ``environment`` is what SLURM's commands need; ``run`` and ``start`` run them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._outer: subprocess.Popen[bytes] | None = None
        self._keeper = 0

    def __enter__(self) -> SlurmCluster:
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir(parents=True)
        for node in NODES:
            (self.folder / "spool" / node).mkdir()
        for path in (self.folder, *self.folder.parents):  # munged refuses a socket below what others may write
            if path.stat().st_mode & 0o022 and not path.stat().st_mode & 0o1000:
                raise RuntimeError(f"{path} can be written by others, which munged refuses")
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        first_job = 1 + secrets.randbelow(50_000)  # the folders of jobs lie in /tmp, beside those of other clusters
        nodes = "\n".join(_NODE.format(*node, 6818 + index) for index, node in enumerate(NODES.items()))
        (self.folder / "slurm.conf").write_text(_CONF.format(folder=self.folder, nodes=nodes, first_job=first_job))
        hosts = {"localhost": "127.0.0.1", "controller": "127.0.0.1", **NODES}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        with (self.folder / "log" / "keeper").open("wb") as log:
            self._outer = subprocess.Popen(
                [*_GUARD, *_NAMESPACES, sys.executable, __file__, str(self.folder)],
                env={**self.environment, "PATH": _SEARCH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_up(self, patience: float = 60.0) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            assert self._outer is not None
            if self._outer.poll() is not None:
                break
            below = psutil.Process(self._outer.pid).children()
            if below:
                self._keeper = below[0].pid
                idle = self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False)
                if idle.stdout.strip() == str(len(NODES)):
                    return
            time.sleep(0.1)
        logs = "\n".join(
            f"{p.name}: {p.read_text(errors='replace')[-1000:]}" for p in sorted((self.folder / "log").iterdir())
        )
        raise RuntimeError(f"SLURM did not come up in {patience:.0f} s:\n{logs}")

    def __exit__(self, *error: object) -> None:
        if self._outer is not None and self._outer.poll() is None:
            self._outer.kill()  # --kill-child: the keeper goes, and all of its PID namespace with it
        if self._outer is not None:
            self._outer.wait()

    # -- what runs in it ------------------------------------------------------------------------------------------

    def inside(self, *command: str | Path) -> list[str]:
        """A command line that runs in the cluster's network, where it reaches the controller."""
        return ["nsenter", f"--net=/proc/{self._keeper}/ns/net", *map(str, command)]

    def run(
        self, *command: str | Path, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.inside(*command),
            check=False,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            cwd=cwd,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def start(self, *command: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.inside(*command),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
        )

    # -- what is to be seen of it ---------------------------------------------------------------------------------

    def state(self, job: str) -> str:
        """SLURM's word for a job, such as RUNNING; of an array, each task's that differs."""
        text = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").stdout
        return ",".join(dict.fromkeys(text.split()))

    def restarts(self, job: str) -> int:
        text = self.run("scontrol", "-o", "show", "job", job).stdout
        return int(text.partition("Restarts=")[2].split()[0])

    def wait(self, job: str, state: str = "COMPLETED", patience: float = 400.0, log: Path | None = None) -> None:
        """Until the job is in ``state``; fails at once when it has ended in another."""
        others = _ENDED - {state}
        self._wait(job, lambda: self.state(job) == state, lambda found: bool(others & found), state, patience, log)

    def wait_until_requeued(self, job: str, patience: float = 400.0) -> None:
        """Until the job has been queued again once; fails at once when it has ended instead."""
        self._wait(job, lambda: self.restarts(job) == 1, lambda found: found <= _ENDED, "queued again", patience)

    def _wait(
        self,
        job: str,
        reached: Callable[[], bool],
        over: Callable[[set[str]], bool],
        wanted: str,
        patience: float,
        log: Path | None = None,
    ) -> None:
        deadline = time.monotonic() + patience
        while not reached():
            found = set(self.state(job).split(","))
            ended = over(found) and "COMPLETING" not in found and not reached()
            if ended or time.monotonic() > deadline:
                said = log.read_text(errors="replace") if log is not None and log.exists() else ""
                raise AssertionError(f"job {job} is {','.join(sorted(found))}, not {wanted}:\n{said}")
            time.sleep(0.2)

    def left_over(self, job: str = "") -> list[str]:
        """Command lines of processes in the cluster (of one job) that are neither SLURM's nor the keeper."""
        mine = os.readlink(f"/proc/{self._keeper}/ns/pid")
        found = []
        for process in psutil.process_iter(["name", "cmdline", "status"]):
            try:
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == mine
                of_job = not job or process.environ().get("SLURM_JOB_ID") == job
            except (OSError, psutil.Error):
                continue
            alive = process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != self._keeper
            if inside and of_job and alive and not process.info["name"].startswith(_DAEMONS):
                found.append(" ".join(process.info["cmdline"] or [process.info["name"]]))
        return found


def _open_network() -> None:
    """Bring up the loopback of this new network, and a link with the nodes' addresses on it."""
    set_address, set_flags, up_and_running = 0x8916, 0x8914, 0x1 | 0x40  # of linux/sockios.h and linux/if.h
    _add_link()
    with socket.socket() as any_socket:
        for name in ("lo", *_LINK):
            fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", name.encode(), up_and_running))
        for index, address in enumerate(NODES.values()):
            name = f"{_LINK[0]}:{index}" if index else _LINK[0]
            request = struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(any_socket, set_address, request)


def _add_link() -> None:
    """Add a veth, a link with two ends here: RTM_NEWLINK of linux/rtnetlink.h, its attributes of linux/if_link.h."""
    new_link, flags, name, info, kind, data, peer = 16, 0x1 | 0x4 | 0x400 | 0x200, 3, 18, 1, 2, 1

    def attribute(number: int, content: bytes) -> bytes:
        return struct.pack("HH", 4 + len(content), number) + content + bytes(-len(content) % 4)

    one, other = (bytes(16) + attribute(name, end.encode() + b"\0") for end in _LINK)  # after a struct ifinfomsg
    body = one + attribute(info, attribute(kind, b"veth") + attribute(data, attribute(peer, other)))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(body), new_link, flags, 1, 0) + body)
        code = struct.unpack_from("i", kernel.recv(4096), 16)[0]
    if code:
        raise OSError(-code, f"no link of kind veth: {os.strerror(-code)}")


def keep(folder: Path) -> None:
    """The keeper: starts the daemons and reaps what ends below it, until one of the daemons ends."""
    socket.sethostname("controller")
    _open_network()
    subprocess.run(["mount", "--bind", str(folder / "hosts"), "/etc/hosts"], check=True)
    munge = folder / "munge"
    files = {"socket": "sock", "key-file": "key", "seed-file": "seed", "pid-file": "pid", "log-file": "log"}
    options = [f"--{option}={munge / name}" for option, name in files.items()]
    daemons = [subprocess.Popen(["munged", "--foreground", "--force", "--num-threads=2", *options])]
    while not (munge / "sock").exists():
        time.sleep(0.02)
    daemons.append(subprocess.Popen(["slurmctld", "-D"]))
    for node in NODES:
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$1" && exec slurmd -D -N "$1"', "slurmd", node]
        daemons.append(subprocess.Popen(named))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    pids = {daemon.pid for daemon in daemons}
    while os.wait()[0] not in pids:
        pass


if __name__ == "__main__":
    keep(Path(sys.argv[1])) if sys.argv[1:] else _open_network()
