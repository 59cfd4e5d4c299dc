"""Starts the other processes of a job on this node, or finds out from SLURM which one this is.

``launch_if_needed`` makes ``nemo-rlhf ppo trainer.devices=8`` and ``python train.py`` work as they stand: the program
runs itself once per device, and the first process only looks after the others. torchrun is not used for that: it
turns every exit code into 1, so that "stopped after saving, run again" (75) and "wrong input" (2) are lost, it does
not forward SIGUSR1, which SLURM sends before the time limit, and it wraps one sentence on wrong input in a traceback
of its own. Programs that were started by torchrun or srun are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from nemo_rlhf.cli import environment

EXIT_STOPPED = 75  # a rank stopped by a signal after it saved
EXIT_UNAVAILABLE = 69  # the same, because a source of rewards stayed away
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
_AGREED = (EXIT_UNAVAILABLE, EXIT_STOPPED)  # codes with which ranks end together

GRACE_S = 5.0  # between SIGTERM and SIGKILL for the other ranks, when one has failed
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
_LAUNCHED = "NEMO_RLHF_LAUNCHED"  # marks our ranks, so that one that lost RANK never starts others in turn
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launch_if_needed(num_local: int, num_nodes: int = 1, tensor_parallel: int = 1) -> None:
    """Return in a process that is one rank of the job, with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT in the environment; where there is none yet, start ``num_local`` of them from this
    program's own command line, wait for them and exit with their code. ``environment.set_defaults`` has then been
    called with ``tensor_parallel``.

    The exit code is 0, 75 or 69 when ranks stopped after saving, otherwise that of the rank that failed first (128 + n
    when signal n killed it). Raises ValueError when the job has not ``num_local * num_nodes`` processes.
    """
    environment.set_defaults(tensor_parallel)
    env = os.environ
    if "RANK" not in env and _started_by_srun(env):
        env_from_slurm()
    if "RANK" in env:
        _complete_env(num_local, num_nodes)
        return
    if num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={num_nodes}, but this is a single process: start one for each device on every node, "
            f"as srun --nodes={num_nodes} --ntasks-per-node={num_local} does."
        )
    if num_local > 1:
        if _LAUNCHED in env:
            raise ValueError(
                f"{_LAUNCHED} is set, but RANK is not: leave RANK in the environment of a rank, or unset both to start "
                "a job from within another."
            )
        sys.exit(_run_ranks(_own_command(), num_local))
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(_free_port())}.items():
        env.setdefault(key, value)
    _complete_env(1, 1)


def env_from_slurm() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, where unset, from what srun tells its tasks.
    The port is derived from the job and step numbers, so that every task finds the same one."""
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    job, step = (int(env.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    env.setdefault("RANK", env["SLURM_PROCID"])
    env.setdefault("WORLD_SIZE", env["SLURM_NTASKS"])
    env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(nodes)
    # Below the range from which the kernel draws ports for outgoing connections.
    env.setdefault("MASTER_PORT", str(10000 + (job * 31 + step) % 20000))


def _started_by_srun(env: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of srun. A batch script has SLURM_PROCID too, but runs in no step."""
    return "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1


def _complete_env(num_local: int, num_nodes: int) -> None:
    """Fill in what the launcher left out. Raises ValueError when the job has another size than was configured."""
    env = os.environ
    world_size = int(env.get("WORLD_SIZE", "1"))
    if world_size != num_local * num_nodes:
        raise ValueError(
            f"The job was started with {world_size} processes, but trainer.devices={num_local} times "
            f"trainer.num_nodes={num_nodes} is {num_local * num_nodes}: start as many processes or change one of them."
        )
    env.setdefault("WORLD_SIZE", str(world_size))
    env.setdefault("LOCAL_RANK", str(int(env["RANK"]) % num_local))
    env.setdefault("LOCAL_WORLD_SIZE", str(num_local))
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        raise ValueError(
            "RANK is set, but MASTER_PORT is not: set MASTER_ADDR and MASTER_PORT, the same on every rank."
        )


def _first_host(nodelist: str) -> str:
    """The first host of SLURM's list, by scontrol where there is one."""
    if shutil.which("scontrol"):
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=False
        ).stdout.split()
        if listed:
            return listed[0]
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    return "".join(part or "" for part in match.groups()) if match else "127.0.0.1"


def _own_command() -> list[str]:
    """What starts this very program again."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if not (os.path.isfile(path) if path else "-c" in sys.orig_argv):
        raise ValueError(
            "More than one device needs a program that can be started again, and this is an interactive session: "
            "put the code in a file, or start it with torchrun."
        )
    return [sys.executable, *sys.orig_argv[1:]]


def _run_ranks(command: Sequence[str], num_local: int) -> int:
    """Run ``command`` once per rank and return the exit code of the job."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {
        **os.environ,
        "WORLD_SIZE": str(num_local),
        "LOCAL_WORLD_SIZE": str(num_local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        _LAUNCHED: "1",
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_local)))
    ranks: list[subprocess.Popen[bytes]] = []
    pending: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: pending.append(n)) for number in _FORWARDED}
    try:
        for rank in range(num_local):
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    # A session of its own: Ctrl-C in a terminal then reaches a rank once, from us.
                    start_new_session=True,
                    preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509
                )
            )
        return _watch(ranks, pending)
    finally:
        _kill(ranks)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[subprocess.Popen[bytes]], pending: list[int]) -> int:
    """Forward signals until every rank has ended, or one has failed; then end the others."""
    interrupts = 0
    while True:
        while pending:
            number = pending.pop(0)
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                return 128 + signal.SIGINT  # the second Ctrl-C does not wait
            _signal(ranks, number)
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, *_AGREED)]
        if failed:
            # Of several that ended since the last look, a killed one is the cause and an exit the consequence.
            culprit = min(failed, key=lambda rank: (codes[rank] or 0) > 0)
            _end_others(ranks, culprit)
            return _report(ranks, culprit)
        if None not in codes:
            return next((code for code in _AGREED if code in codes), 0)
        time.sleep(_POLL_S)


def _end_others(ranks: Sequence[subprocess.Popen[bytes]], culprit: int) -> None:
    others = [rank for number, rank in enumerate(ranks) if number != culprit]
    _signal(others, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(rank.poll() is None for rank in others) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    _kill(others)


def _report(ranks: Sequence[subprocess.Popen[bytes]], culprit: int) -> int:
    """Name the rank that ended the job on stderr, unless it has said so itself; return the job's exit code."""
    code = ranks[culprit].returncode
    if code == EXIT_WRONG_INPUT and culprit == 0:
        return code
    how = f"ended with exit code {code}"
    if code not in (EXIT_FAILED, EXIT_WRONG_INPUT):
        how += " (none of nemo-rlhf's own: code that runs in its process has likely called sys.exit or os._exit)"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        how = f"was killed by {name}"
        if -code == signal.SIGKILL:
            how += " (out of memory, if nobody else did it)"
    rest = f"; the other {len(ranks) - 1} were stopped" if len(ranks) > 1 else ""
    print(f"nemo-rlhf: rank {culprit} {how}{rest}.", file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End ranks that still run, and whatever they or ranks that a signal has killed have started."""
    for rank in ranks:
        code = rank.poll()
        if code is None or code < 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def _die_with(parent: int) -> Callable[[], None] | None:
    """A function for the new process that ties its life to ours, where the system is Linux: even if we are killed
    with SIGKILL, no rank stays behind and holds its device."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(128 + signal.SIGKILL)

    return tie


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
