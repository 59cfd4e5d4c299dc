"""A real SLURM on this machine for tests: its own munge, controller and nodes, without systemd.

Jobs run on the nodes ``n1`` and ``n2``, each with its own network, processes and name, so that one can lose its power
or its cable. ``gpu1`` ... ``gpu8`` have eight faked GPUs each and only answer whether they would take a job. Nothing of
an installed cluster is touched.
"""

from __future__ import annotations

import getpass
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import psutil

from nemo_rlhf.cli import main
from tests.jobs import ROOT

NODES = ("n1", "n2")
NUM_GPU_NODES = 8
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "unshare", "nsenter")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_HOST = socket.gethostname().partition(".")[0]
_NAME = f"nr{os.getpid()}"  # of network namespaces and cables
_NET = f"10.{78 + os.getpid() % 100}.{os.getpid() // 100 % 250}"

_CONF = """
ClusterName=tests
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/spool/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
KillWait=3
OverTimeLimit=2
MinJobAge=600
SlurmdTimeout=10
CompleteWait=0
NodeName=n[1-2] NodeAddr={net}.[11-12] Port={node_port} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=batch Nodes=gpu[1-{gpu_nodes}] MaxTime=INFINITE State=UP
"""
_WARNS = "SlurmctldParameters=preempt_send_user_signal\n"
_GPU_NODE = (
    "NodeName=gpu{n} NodeAddr={net}.1 Port={port} CPUs=128 Sockets=2 CoresPerSocket=64 "
    "ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:h100:8 State=UNKNOWN\n"
)
# bash is the node's first process: when it dies, the kernel ends everything on the node
_NODE = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o size=1g,mode=1777 shm /dev/shm
slurmd -D -f "$2/slurm.conf" -N "$1" & wait $!
"""


@cache
def why_not() -> str | None:
    """What is missing for a SLURM of our own here, if anything is."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} not found): scripts/test.sh installs it where it may"
    if os.geteuid() != 0 or _run("ip", "netns", "add", f"{_NAME}-try").returncode != 0:
        return "SLURM's nodes need networks of their own, which only root of a machine or a virtual machine may make"
    _run("ip", "netns", "del", f"{_NAME}-try")
    return None


class Cluster:
    """Both nodes, and what can happen to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.root / "daemons.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, "PATH": _PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.daemons.append(process)
        return process

    def boot(self, node: str) -> None:
        own = ("--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._nodes[node] = self.start(
            "ip", "netns", "exec", f"{_NAME}-{node}", "unshare", *own, "bash", "-c", _NODE, "node", node, str(self.root)
        )

    def crash(self, node: str) -> None:
        """As if its power were cut."""
        self._nodes[node].kill()
        self._nodes[node].wait()

    def cut(self, node: str) -> None:
        """Pull its network cable."""
        _must("ip", "-n", f"{_NAME}-sw", "link", "set", node, "down")

    def plug(self, node: str) -> None:
        _must("ip", "-n", f"{_NAME}-sw", "link", "set", node, "up")

    def warn_preempted(self, warn: bool) -> None:
        """Whether a job that is preempted gets the signal that it has asked for, or else SIGTERM."""
        conf = self.root / "slurm.conf"
        text = conf.read_text().replace(_WARNS, "")
        conf.write_text(_WARNS + text if warn else text)
        _must("scontrol", "reconfigure")

    def wait_for(self, reached: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{log}:\n{log.read_text()[-1500:]}" for log in self.root.glob("*.log"))
                raise TimeoutError(f"SLURM was not there in {timeout_s} s:\n{logs}")
            time.sleep(0.1)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """SLURM, started with all its files below the root of a new ``Cluster``; SLURM_CONF is set while it runs. A job
    that is preempted gets the signal that it has asked for."""
    # not among pytest's own, whose parent nobody else may enter: munge's socket must be within reach
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    made = Cluster(root)
    before = os.environ.get("SLURM_CONF")
    ports = _configure(root)
    os.environ["SLURM_CONF"] = str(root / "slurm.conf")
    try:
        _plug_in()
        names = ("key-file", "munge.key"), ("socket", "munge.socket"), ("pid-file", "munge.pid")
        made.start("munged", "-F", *(f"--{option}={root / name}" for option, name in names),
                   f"--seed-file={root / 'munge.seed'}", f"--log-file={root / 'munged.log'}")  # fmt: skip
        made.wait_for((root / "munge.socket").exists)
        made.start("slurmctld", "-D", "-f", str(root / "slurm.conf"))
        made.wait_for(lambda: "UP" in _run("scontrol", "ping").stdout)
        for node in NODES:
            made.boot(node)
        for n in range(1, len(ports) + 1):
            made.start("slurmd", "-D", "-f", str(root / "slurm.conf"), "-N", f"gpu{n}")
        made.wait_for(lambda: states() == {"idle"})
        yield made
    finally:
        _end(made)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(root, ignore_errors=True)


def program_of(job: str, rank: int) -> psutil.Process:
    """The program that is a rank of a job, wherever it runs."""
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error):
            if process.info["name"] == "nemo-rlhf":
                env = process.environ()
                if (env.get("SLURM_JOB_ID"), env.get("SLURM_PROCID")) == (job, str(rank)):
                    return process
    raise AssertionError(f"rank {rank} of job {job} does not run")


def states() -> set[str]:
    """Of all nodes, such as "idle"."""
    return set(_run("sinfo", "-h", "-N", "-o", "%t").stdout.split())


def job_state(job: str) -> str:
    """State of a job, also for a while after its end: "PENDING", "RUNNING", "COMPLETED", "FAILED" ..."""
    return _must("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]


def hurry(*jobs: str) -> None:
    """Spare jobs that went back into the queue most of the 6 s that SLURM lets them wait there; the first two it needs
    for the end of what they were."""
    for job in jobs:
        shown = _must("scontrol", "show", "job", job)
        if "Reason=BeginTime" in shown:
            starts = datetime.fromisoformat(shown.partition("StartTime=")[2].split()[0])
            if starts - datetime.now() < timedelta(seconds=4):
                _run("scontrol", "update", f"JobId={job}", "StartTime=now")


class Jobs:
    """Submits jobs below one directory, which is the working directory, and reads what they leave there."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.root = root
        self._all: list[str] = []
        self._cluster = root / "here.yaml"
        path = f"{root / 'bin'}:{Path(sys.executable).parent}"
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        self._cluster.write_text(
            "slurm: {gpus: false, memory: null, exclusive: false, min_free_gib: 0.1, log_dir: logs, "
            f"setup: ['PATH={path}:$PATH'], environment: {json.dumps(variables)}}}\n"
        )

    def submit(self, name: str, *words: str) -> str:
        out = io.StringIO()
        with redirect_stdout(out):
            code = main(["slurm", *words, "--cluster", str(self._cluster), f"slurm.job_name={name}", "--submit"])
        assert code == 0
        self._all.append(out.getvalue().strip())
        assert self._all[-1].isdigit()
        return self._all[-1]

    def log(self, name: str, job: str) -> str:
        path = self.root / "logs" / f"{name}-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait_until(self, reached: Callable[[], bool], timeout_s: float = 150.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline, f"not reached in {timeout_s:g} s; logs are in {self.root}"
            hurry(*self._all)
            time.sleep(0.1)

    def preempt(self) -> None:
        """Let a short job of a partition that comes first take both nodes."""
        urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
        self._all.append(_must("sbatch", "--parsable", *urgent).strip())
        assert self.finished(self._all[-1]) == "COMPLETED"

    def finished(self, job: str) -> str:
        self.wait_until(lambda: job_state(job) not in ("PENDING", "RUNNING", "COMPLETING"))
        return job_state(job)


def _configure(root: Path) -> list[int]:
    """Writes the files; returns the ports of nodes with GPUs."""
    for name in (
        "state",
        "dev",
        *(f"spool/{node}" for node in (*NODES, *(f"gpu{n + 1}" for n in range(NUM_GPU_NODES)))),
    ):
        (root / name).mkdir(parents=True)
    # munge wants a directory that nobody else may write to, and a key that nobody else may read.
    root.chmod(0o755)
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    port, node_port, *ports = _free_ports(NUM_GPU_NODES + 2)
    text = _CONF.format(host=_HOST, user=getpass.getuser(), root=root, port=port, node_port=node_port, net=_NET,
                        gpu_nodes=NUM_GPU_NODES)  # fmt: skip
    nodes = "".join(_GPU_NODE.format(n=n + 1, port=port, net=_NET) for n, port in enumerate(ports))
    (root / "slurm.conf").write_text(_WARNS + text.replace("PartitionName", nodes + "PartitionName", 1))
    for gpu in range(8):
        (root / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")
    (root / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName=gpu[1-{NUM_GPU_NODES}] Name=gpu Type=h100 File={root}/dev/nvidia[0-7]\n"
    )
    old = _run("slurmd", "-V").stdout.split()[1].split(".")[0] in ("20", "21", "22")
    # slurmd loads a plugin for control groups even when it has no use for one.
    (root / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n")
    # Without DNS: a node has no way out, and torch would wait for it whenever it looks up a name.
    (root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    hosts = [f"127.0.0.1 localhost\n{_NET}.1 {_HOST}\n"]
    hosts += [f"{_NET}.{11 + index} {node}\n" for index, node in enumerate(NODES)]
    (root / "hosts").write_text("".join(hosts))
    return ports


def _plug_in() -> None:
    """A switch in a network of its own, and cables from it to each node and to us."""
    switch, us = f"{_NAME}-sw", f"{_NAME}-c"
    for command in (
        f"ip netns add {switch}",
        f"ip -n {switch} link add br0 type bridge",
        f"ip -n {switch} link set br0 up",
        f"ip link add {us} type veth peer name us netns {switch}",
        f"ip addr add {_NET}.1/24 dev {us}",
        f"ip link set {us} up",
        f"ip -n {switch} link set us master br0 up",
    ):
        _must(*command.split())
    for index, node in enumerate(NODES):
        space = f"{_NAME}-{node}"
        for command in (
            f"ip netns add {space}",
            f"ip -n {space} link set lo up",
            f"ip -n {space} link add eth0 type veth peer name {node} netns {switch}",
            f"ip -n {space} addr add {_NET}.{11 + index}/24 dev eth0",
            f"ip -n {space} link set eth0 up",
            f"ip -n {switch} link set {node} master br0 up",
        ):
            _must(*command.split())


def _end(made: Cluster) -> None:
    for node in NODES:
        if node in made._nodes:
            made.crash(node)
    for daemon in reversed(made.daemons):
        daemon.send_signal(signal.SIGTERM)
    for daemon in made.daemons:
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    _run("ip", "link", "del", f"{_NAME}-c")
    for space in ("sw", *NODES):
        _run("ip", "netns", "del", f"{_NAME}-{space}")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, "PATH": _PATH}, capture_output=True, text=True, check=False, timeout=60
    )


def _must(*command: str) -> str:
    done = _run(*command)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
