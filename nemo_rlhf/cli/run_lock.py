"""One run at a time in a run directory: a lock that names who holds it, and outlives nobody.

A file of the directory is locked (POSIX locks, which NFS has too and which end with their process), and says which
process of which host and job has it. Where locks do not reach, because a file system has none or each host its own,
what the file says decides: whether that process, or its SLURM job, is still there, or has given a sign of life of late.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK = ".lock"
BEAT_S = 20.0  # between signs of life, which are the file's time
SILENCE_S = 180.0  # after which a process on another host is taken for dead
WAIT_S = 60.0  # for the process of the same job that has been told to end
_POLL_S = 0.5
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_AT_WORK = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}


@dataclass(frozen=True)
class Holder:
    """Who has a run directory. ``boot``: which start of which machine it runs on; ``started``: when the process began,
    so that another of the same number is not taken for it; ``restarts``: how often SLURM has requeued the job."""

    host: str
    boot: str
    pid: int
    started: str
    job: str | None
    restarts: int
    since: str

    def __str__(self) -> str:
        job = f" of SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @classmethod
    def me(cls) -> Holder:
        return cls(
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            pid=os.getpid(),
            started=_started(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """This process has ``directory``, which exists, to itself.

    Raises:
        OSError: a run goes on in it; the sentence names its process, host and job.
    """
    path = directory / LOCK
    me = Holder.me()
    file = _taken(path, me)
    try:
        done = threading.Event()
        threading.Thread(target=_beat, args=(file, done), name="nemo_rlhf.run_lock", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            if _is_at(path, file) and _holder(file) == me:
                path.unlink()
    finally:
        os.close(file)


def _taken(path: Path, me: Holder) -> int:
    """The locked file, open."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(file, path, me)
            if _is_at(path, file):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # whoever had it has deleted it since it was opened


def _take(file: int, path: Path, me: Holder) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        is_locked = _lock(file)
        holder = _holder(file)
        if is_locked is not False and (holder is None or _is_gone(holder, me, file, bool(is_locked))):
            break
        is_ending = holder is not None and me.job is not None and holder.job == me.job and holder.restarts < me.restarts
        if not is_ending or time.monotonic() > deadline:
            raise _refusal(holder, path)
        time.sleep(_POLL_S)
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(asdict(me)).encode(), 0)
    os.fsync(file)
    if is_locked is None:
        time.sleep(2 * _POLL_S)  # another may have come to the same conclusion: the last one to write it has it
        holder = _holder(file)
        if holder != me:
            raise _refusal(holder, path)


def _is_at(path: Path, file: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file))
    return False


def _lock(file: int) -> bool | None:
    """Whether this process has got the lock; None where there are no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _refusal(holder: Holder | None, path: Path) -> OSError:
    who = str(holder) if holder else "a process that is just starting"
    return OSError(
        f"A run goes on in {path.parent} ({who}): wait for it, end it, or choose another exp_manager.explicit_log_dir. "
        f"Should it be gone for good, delete {path}."
    )


def _is_gone(holder: Holder, me: Holder, file: int, is_locked: bool) -> bool:
    """Whether whoever the file names is no longer there. ``is_locked``: this process has a lock, which at least no
    other process of this machine had."""
    if holder.host == me.host or (holder.boot and holder.boot == me.boot):
        is_there = bool(holder.started) and _started(holder.pid) == holder.started
        if is_there and holder.boot == me.boot and holder.pid != me.pid:
            return False  # its lock is gone once anything in it has opened and closed the file
        return is_locked or not is_there
    if holder.job is not None:
        if holder.job == me.job and (is_locked or holder.restarts < me.restarts):
            return True
        is_at_work = _is_at_work(holder.job)
        if is_at_work is not None:
            return not is_at_work
    return time.time() - os.fstat(file).st_mtime > SILENCE_S


def _is_at_work(job: str) -> bool | None:
    """Whether processes of this SLURM job may run; None where SLURM does not say."""
    if not job.isdecimal() or shutil.which("squeue") is None:
        return None
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if said.returncode:
        return False if "invalid job id" in said.stderr.lower() else None
    return bool(_AT_WORK & set(said.stdout.split()))


def _beat(file: int, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with suppress(OSError):  # a file system that is away for a moment
            os.utime(file)


def _holder(file: int) -> Holder | None:
    """Whom the file names: None for an empty one, and for what a process that was killed has half written."""
    try:
        return Holder(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where there is none, or one that has ended."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # what stands before may hold spaces
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else ""


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""
